"""grpo/opening.py: what a policy training opens, and what it refuses before it begins."""

import json
import shutil

import pytest

import models
from data_pipeline import dialogues
from data_pipeline.sources import DataSpec
from grpo import opening
from modeling.scorer import Scorer, ScoringConfig
from train_grpo import PolicyTrainingConfig
from training.setup import Parts
from utils import UserError


@pytest.fixture(scope="module")
def letters(base, tmp_path_factory):
    """The demo's model with a tokenizer that has a token for each byte: its folder."""
    folder = tmp_path_factory.mktemp("letters") / "model"
    shutil.copytree(base, folder)
    content = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    content["model"]["merges"] = []
    (folder / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    return str(folder)


def check(policy, reward_model, data, **settings):
    """Whether this policy may be trained against this reward model, both of 2,048 positions."""
    tokenizer = models.load_tokenizer(policy)
    prompts = dialogues.load_prompts(DataSpec(data), tokenizer, 1000)
    parts = Parts(models.PolicyModel.create(policy, tokenizer=tokenizer), *prompts)
    reward = models.RewardModel.create(reward_model, models.load_tokenizer(reward_model), 0)
    config = PolicyTrainingConfig(reward_model="./judge", **settings)
    opening.check_positions({"reward_model": Scorer(reward, ScoringConfig())}, config, parts)


def test_positions_are_counted_in_the_tokens_of_the_reward_model(base, letters, small_dataset):
    long = {"prompt_max_length": 300, "max_new_tokens": 1500}
    check(base, base, small_dataset, **long)
    words = r"--reward_model has 2,048 positions(.|\n)*\d+ tokens of its tokenizer, and about [4-7],\d+ for 1,500 of"
    with pytest.raises(UserError, match=words):
        check(base, letters, small_dataset, **long)
    check(letters, base, small_dataset, prompt_max_length=900, max_new_tokens=1900)
