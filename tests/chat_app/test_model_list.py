"""model_list.py: which models the flags mean, and which ones the page offers."""

import os
import shutil

import pytest

import utils
from chat_app import model_list
from checkpointing import manifest, resolve


def test_a_reward_checkpoint_brings_its_base_as_the_policy(reward_checkpoint, base):
    assert model_list.choose_models(str(reward_checkpoint), None) == (base, reward_checkpoint)


def test_a_reward_adapter_names_its_base_itself(lora_checkpoint, base):
    assert resolve.kind_of(lora_checkpoint) == "reward"
    assert model_list.choose_models(str(lora_checkpoint), None) == (base, lora_checkpoint)


def test_a_policy_comes_without_a_reward_model_unless_one_is_given(base, reward_checkpoint):
    assert model_list.choose_models(base, None) == (base, None)
    assert model_list.choose_models(base, str(reward_checkpoint)) == (base, reward_checkpoint)
    assert model_list.choose_models("Qwen/Qwen3-0.6B", None) == ("Qwen/Qwen3-0.6B", None)


def test_a_reward_checkpoint_of_unknown_base_asks_for_the_reward_model_flag(tmp_path):
    utils.write_json(tmp_path / "config.json", {"architectures": ["Qwen3ForSequenceClassification"]})
    with pytest.raises(utils.UserError, match="--model POLICY --reward_model"):
        model_list.choose_models(str(tmp_path), None)


def test_a_policy_is_refused_as_reward_model(base):
    with pytest.raises(utils.UserError, match="--reward_model does not name a reward model"):
        model_list.choose_models(base, base)


@pytest.fixture
def output_dir(base, reward_checkpoint, tmp_path):
    """Two runs: `old` with a reward and a policy checkpoint, `new` with two reward checkpoints, the older better."""
    for run, step, source, accuracy in (
        ("old", 1, reward_checkpoint, None),
        ("old", 2, base, None),
        ("new", 3, reward_checkpoint, 0.9),
        ("new", 10, reward_checkpoint, 0.8),
    ):
        folder = tmp_path / run / f"step-{step}"
        shutil.copytree(source, folder)
        utils.write_json(folder / "training_state.json", {"eval_accuracy": accuracy})
        (folder / "manifest.json").unlink(missing_ok=True)
        manifest.write_manifest(folder, step)
        os.utime(folder, (step, step))
    return tmp_path


def labels(choices):
    return list(choices.values())


def test_complete_checkpoints_are_offered_newest_run_first_with_newest_and_best_marked(output_dir, base):
    (output_dir / "new/.tmp-step-11").mkdir()
    (output_dir / "new/step-12").mkdir()  # without a manifest: nothing that a training published
    (output_dir / "link").symlink_to(output_dir / "new")
    policies, reward_models = model_list.list_models(output_dir, base, None)
    assert labels(reward_models) == ["none", "new / step-10 (newest)", "new / step-3 (best)", "old / step-1"]
    assert labels(policies) == [base, "Qwen/Qwen3-0.6B (default)", "old / step-2 (newest)"]


def test_the_models_of_the_flags_are_offered_and_none_twice(output_dir, base, lora_checkpoint, monkeypatch):
    monkeypatch.chdir(output_dir)
    _, reward_models = model_list.list_models(output_dir, base, model_list.Path("new/step-3"))
    assert labels(reward_models).count("new / step-3 (best)") == 1 and len(reward_models) == 4
    _, reward_models = model_list.list_models(output_dir, base, lora_checkpoint)
    assert labels(reward_models)[-1] == f"{lora_checkpoint.parent.name} / adapter"


def test_a_checkpoint_that_cannot_be_read_is_not_offered_and_no_folder_offers_nothing(output_dir, base, tmp_path):
    (output_dir / "new/step-3/config.json").write_text("{")
    assert "new / step-3 (best)" not in labels(model_list.list_models(output_dir, base, None)[1])
    assert labels(model_list.list_models(tmp_path / "nowhere", base, None)[1]) == ["none"]
