"""eval_rm.py: models whose behaviour is known, rewards equal to those of transformers, bad input."""

import math
import random
import shutil
from pathlib import Path

import pytest
import torch

import eval_rm
import models
from tests.evaluation.conftest import FP32, lines_of
from tests.reward_models import save_length_model
from utils import CheckpointError, DiskOrNetworkError, UserError

# -- Models whose behaviour is known -----------------------------------------------------------------------------------


def test_a_model_that_rewards_length_is_exposed(evaluate, length_model):
    found = evaluate(length_model, "--scores_out", "scores.jsonl", *FP32)
    tokenizer = models.load_tokenizer(str(length_model))
    for one in lines_of("scores.jsonl")[:20]:  # it is what it is meant to be
        count = len(tokenizer.apply_chat_template(one["chosen"], return_dict=False))
        assert one["reward_chosen"] == pytest.approx(count - 1, abs=0.01)
    length = found["length"]
    assert length["model_prefers_longer"] > 0.99
    assert length["better_is_longer"]["accuracy"] > 0.99 and length["better_is_shorter"]["accuracy"] < 0.01
    assert length["within_prompts"]["pearson"] > 0.99
    assert length["length_controlled"]["accuracy"] == pytest.approx(0.5, abs=0.01)
    assert found["accuracy"] == pytest.approx(found["baselines"]["longer wins"]["accuracy"], abs=0.02)
    assert any("Its reward is length" in finding for finding in found["findings"])
    assert "Its reward is length" in Path("out/report.html").read_text(encoding="utf-8")


def test_a_constant_model_is_reported_as_all_ties(evaluate, constant_model):
    found = evaluate(constant_model)
    assert (found["ties"], found["right"], found["wrong"], found["accuracy"]) == (400, 0, 0, 0.0)
    assert found["calibration"]["temperature"] is None and found["calibration"]["brier"] == 0.25
    assert found["findings"] == [
        "Every pair is a tie: the model gives all replies the same reward, and has learned nothing."
    ]


def test_a_known_temperature_is_recovered(evaluate, tmp_path, base, write_rows):
    """People prefer by σ(0.2 · Δtokens) and the model says 0.8 · Δtokens: its rewards are to be divided by 4."""
    model = save_length_model(tmp_path / "four", base, scale=0.8)
    draw, pairs = random.Random(1), []
    for number in range(2500):
        lengths = draw.sample(range(1, 16), 2)
        if draw.random() > 1 / (1 + math.exp(-0.2 * (lengths[0] - lengths[1]))):
            lengths.reverse()
        chosen, rejected = (" ".join(["a"] * length) for length in lengths)
        pairs.append({"prompt": f"How many? {number}", "chosen": chosen, "rejected": rejected})
    dataset = write_rows(pairs, "labels.jsonl")
    found = evaluate(model, "--split", "all", *FP32, dataset=dataset)
    temperature = found["calibration"]["temperature"]
    assert temperature["low"] < 4 < temperature["high"]
    assert temperature["value"] == pytest.approx(4, rel=0.12)
    assert any("overconfident" in finding for finding in found["findings"])


def test_a_breakdown_by_kind_turns_and_length_loses_no_pair(evaluate, reward_checkpoint, demo_folder):
    found = evaluate(reward_checkpoint)
    assert set(found["by_subset"]) == {"complete", "harmless", "on topic", "polite"}
    for name in ("by_subset", "by_turns", "by_length"):
        assert sum(one["n"] for one in found[name].values()) == found["n"] == 400
        assert sum(one["right"] for one in found[name].values()) == found["right"]
    kinds = [row["kind"] for row in lines_of(demo_folder[1] / "test.jsonl")]
    assert {kind: one["n"] for kind, one in found["by_subset"].items()} == {k: kinds.count(k) for k in set(kinds)}


# -- Rewards are transformers' own -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bert(base, tmp_path_factory):
    from transformers import BertConfig, BertForSequenceClassification

    folder = tmp_path_factory.mktemp("bert") / "bert"
    tokenizer = models.load_tokenizer(base)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        num_labels=1, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    BertForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("which", ["reward_checkpoint", "adapter", "bert"])
def test_rewards_equal_those_of_plain_transformers(which, request, evaluate, small_dataset):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    folder = request.getfixturevalue(which)
    evaluate(folder, "--scores_out", "scores.jsonl", "--no_untrained_baseline", *FP32, dataset=small_dataset)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    plain = AutoModelForSequenceClassification.from_pretrained(
        folder, num_labels=1, pad_token_id=tokenizer.pad_token_id, dtype=torch.float32
    ).eval()
    scores = lines_of("scores.jsonl")
    assert len(scores) == 16
    for one in scores:
        for side in ("chosen", "rejected"):
            text = tokenizer.apply_chat_template(one[side], tokenize=False)
            with torch.no_grad():
                wanted = plain(**tokenizer(text, add_special_tokens=False, return_tensors="pt")).logits[0, 0]
            assert one[f"reward_{side}"] == pytest.approx(float(wanted), abs=1e-5)
        assert one["margin"] == pytest.approx(one["reward_chosen"] - one["reward_rejected"], abs=1e-6)


@pytest.mark.usefixtures("undrawn")
def test_out_of_memory_goes_on_with_a_smaller_budget_and_the_same_rewards(evaluate, reward_checkpoint, monkeypatch):
    wanted = evaluate(reward_checkpoint, *FP32)
    whole, budgets = models.RewardModel.score_packed, []

    def score_packed(self, input_ids, *rest):
        budgets.append(input_ids.numel())
        if input_ids.numel() > 1500:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return whole(self, input_ids, *rest)

    monkeypatch.setattr(models.RewardModel, "score_packed", score_packed)
    found = evaluate(reward_checkpoint, *FP32)
    assert max(budgets) > 1500 > min(budgets)
    assert found["accuracy"] == wanted["accuracy"] and found["n"] == 400
    assert found["mean_margin"] == pytest.approx(wanted["mean_margin"], abs=1e-5)


# -- Bad input ---------------------------------------------------------------------------------------------------------


def test_anything_but_a_reward_model_is_rejected(evaluate, base, tmp_path, reward_checkpoint):
    with pytest.raises(UserError, match="--model: no such file or folder"):
        evaluate("./nowhere")
    with pytest.raises(UserError, match="--against: no such file or folder"):
        evaluate(reward_checkpoint, "--against", "./nowhere")
    with pytest.raises(UserError, match="--against names the model itself"):
        evaluate(reward_checkpoint, "--against", reward_checkpoint.parent)  # a run's folder is its newest step
    with pytest.raises(
        UserError, match=r"--model does not name a reward model(.|\n)*a language model without a reward head"
    ):
        evaluate(base)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"no config.json of a model"):
        evaluate(tmp_path / "empty")
    with pytest.raises(DiskOrNetworkError, match="no local copy of some/where"):
        evaluate("some/where")
    with pytest.raises(UserError, match="--model: expected a reward model"):
        eval_rm.main([])


def test_a_model_with_two_labels_is_rejected(evaluate, base, tmp_path, constant_model):
    with pytest.raises(UserError, match="--against does not name a reward model"):
        evaluate(constant_model, "--against", base)
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=2, pad_token_id=0)
    model.save_pretrained(tmp_path / "two")
    models.load_tokenizer(base).save_pretrained(tmp_path / "two")
    with pytest.raises(UserError, match="--model has 2 labels, but a reward model has one"):
        evaluate(tmp_path / "two")


def test_a_damaged_checkpoint_is_rejected(evaluate, reward_checkpoint, tmp_path):
    shutil.copytree(reward_checkpoint, tmp_path / "run/step-2")
    with (tmp_path / "run/step-2/model.safetensors").open("ab") as file:
        file.write(b"x")
    with pytest.raises(CheckpointError, match="the checkpoint is damaged") as raised:
        evaluate(tmp_path / "run/step-2")
    assert raised.value.exit_code == 3
    assert not Path("out").exists()


def test_a_reward_that_is_not_finite_is_an_error(evaluate, tmp_path, base, tokenizer, small_dataset):
    model = models.RewardModel.create(base, tokenizer, 0)
    with torch.no_grad():
        model.hf_model.score.weight.fill_(3e38)
    model.save(tmp_path / "inf")
    with pytest.raises(UserError, match="a reward that is not a finite number"):
        evaluate(tmp_path / "inf", dataset=small_dataset)


def test_all_bad_flags_are_reported_at_once():
    with pytest.raises(UserError) as raised:
        eval_rm.main(["--best_of", "--batch_size", "0", "--precision", "int8", "--scores_out", "/"])
    for name in ("--model", "--best_of", "--batch_size", "--precision", "--scores_out"):
        assert name in str(raised.value)
    with pytest.raises(UserError, match="--against: cannot be combined with --score"):
        eval_rm.main(["--model", "x", "--score", "-", "--against", "y"])
    with pytest.raises(UserError, match="--split: cannot be combined with --score"):
        eval_rm.main(["--model", "x", "--score", "-", "--split", "train"])
