"""catalogue.py: what a folder holds, told from its files, which model talks and which scores, and what is on offer."""

import os
import shutil

import pytest

import models
import utils
from chat_app import model_list
from checkpointing import manifest, resolve


@pytest.fixture(scope="module")
def lora_checkpoint(base, tokenizer, tmp_path_factory):
    """A reward adapter without a train_config.json."""
    folder = tmp_path_factory.mktemp("lora") / "adapter"
    models.RewardModel.create(base, tokenizer, 0, models.LoraSettings()).save(folder)
    return folder


def test_a_reward_checkpoint_scores_and_its_base_talks(reward_checkpoint, base):
    assert model_list.choose_models(str(reward_checkpoint), None) == (base, reward_checkpoint)


def test_a_reward_adapter_names_its_base_itself(lora_checkpoint, base):
    assert resolve.kind_of(lora_checkpoint) == "reward"
    assert model_list.choose_models(str(lora_checkpoint), None) == (base, lora_checkpoint)


def test_a_base_that_moved_gives_way_to_the_one_the_adapter_knows(lora_checkpoint, base, tmp_path):
    for path in lora_checkpoint.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    utils.write_json(tmp_path / "train_config.json", {"model": "demo/of/another/folder"})
    assert resolve.base_model_of(tmp_path) == base


def test_a_policy_talks_and_nobody_scores_unless_asked(base, reward_checkpoint):
    assert model_list.choose_models(base, None) == (base, None)
    assert model_list.choose_models(base, str(reward_checkpoint)) == (base, reward_checkpoint)
    assert model_list.choose_models("Qwen/Qwen3-0.6B", None) == ("Qwen/Qwen3-0.6B", None)


def test_a_policy_adapter_is_no_reward_checkpoint(tmp_path):
    utils.write_json(tmp_path / "adapter_config.json", {"task_type": "CAUSAL_LM"})
    assert resolve.kind_of(tmp_path) == "policy"


def test_a_run_folder_means_its_newest_sound_step(tmp_path):
    for step, content in ((9, "whole"), (10, "whole")):
        folder = tmp_path / f"step-{step}"
        folder.mkdir()
        (folder / "config.json").write_text(content)
        manifest.write_manifest(folder, step)
    assert resolve.sound_checkpoint(str(tmp_path)) == tmp_path / "step-10"
    (tmp_path / "step-10" / "config.json").write_text("wholf")
    assert resolve.sound_checkpoint(str(tmp_path)) == tmp_path / "step-9"
    with pytest.raises(utils.CheckpointError, match="step-9 is complete"):
        resolve.sound_checkpoint(str(tmp_path / "step-10"))


def test_a_reward_checkpoint_of_unknown_base_asks_for_the_reward_model_flag(tmp_path):
    utils.write_json(tmp_path / "config.json", {"architectures": ["Qwen3ForSequenceClassification"]})
    with pytest.raises(utils.UserError, match="--model TALKER --reward_model"):
        model_list.choose_models(str(tmp_path), None)


def test_a_policy_is_refused_as_reward_model(base):
    with pytest.raises(utils.UserError, match="--reward_model is not a reward checkpoint"):
        model_list.choose_models(base, base)


@pytest.mark.parametrize("content", ["{", "[1]", "3"])
def test_settings_that_are_no_object_are_named(tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(utils.UserError, match=r"config\.json"):
        resolve.kind_of(tmp_path)


def test_kinds_are_told_from_the_files_of_a_folder(base, reward_checkpoint, lora_checkpoint, tmp_path):
    models.PolicyModel.create(base, models.LoraSettings()).save(tmp_path / "adapter")
    (tmp_path / "empty").mkdir()
    folders = (base, reward_checkpoint, lora_checkpoint, tmp_path / "adapter", tmp_path / "empty")
    kinds = [resolve.kind_of(model_list.Path(folder)) for folder in folders]
    assert kinds == ["policy", "reward", "reward", "policy", None]


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
    return [choice.label for choice in choices]


def test_complete_checkpoints_are_offered_newest_run_first_with_newest_and_best_marked(output_dir, base):
    (output_dir / "new/.tmp-step-11").mkdir()
    (output_dir / "new/step-12").mkdir()  # without a manifest: nothing that a training published
    (output_dir / "link").symlink_to(output_dir / "new")
    policies, reward_models = model_list.list_models(output_dir, base, None)
    assert labels(reward_models) == ["none", "new / step-10 (newest)", "new / step-3 (best)", "old / step-1"]
    assert labels(policies) == [base, "Qwen/Qwen3-0.6B (default)", "old / step-2 (newest)"]


def test_what_the_flags_named_is_offered_and_nothing_twice(output_dir, base, lora_checkpoint, monkeypatch):
    monkeypatch.chdir(output_dir)
    _, reward_models = model_list.list_models(output_dir, base, model_list.Path("new/step-3"))
    assert labels(reward_models).count("new / step-3 (best)") == 1 and len(reward_models) == 4
    _, reward_models = model_list.list_models(output_dir, base, lora_checkpoint)
    assert labels(reward_models)[-1] == "lora0 / adapter"


def test_a_checkpoint_that_cannot_be_read_is_not_offered_and_no_folder_offers_nothing(output_dir, base, tmp_path):
    (output_dir / "new/step-3/config.json").write_text("{")
    assert "new / step-3 (best)" not in labels(model_list.list_models(output_dir, base, None)[1])
    assert labels(model_list.list_models(tmp_path / "nowhere", base, None)[1]) == ["none"]
