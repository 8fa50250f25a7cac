"""scorer.py: a model is opened for scoring with everything that makes it fast."""

import pytest

import models
from modeling.scorer import Scorer, ScoringConfig


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_scoring_in_bf16_uses_the_fast_attention(kind, reward_checkpoint, lora_checkpoint, capsys):
    scorer = Scorer(
        models.RewardModel.restore({"full": reward_checkpoint, "lora": lora_checkpoint}[kind]), ScoringConfig()
    )
    assert scorer.model.attention == "pieces"
    assert capsys.readouterr().out == ""
