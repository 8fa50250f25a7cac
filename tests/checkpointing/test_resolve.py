"""resolve.py: what a folder holds, told from its files."""

from pathlib import Path

import pytest

import models
import utils
from checkpointing import manifest, resolve


def test_a_base_that_moved_is_found_where_the_adapter_says(lora_checkpoint, base, tmp_path):
    for path in lora_checkpoint.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    utils.write_json(tmp_path / "train_config.json", {"model": "demo/of/another/folder"})
    assert resolve.base_model_of(tmp_path) == base


def test_a_policy_adapter_is_not_a_reward_checkpoint(tmp_path):
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
    with pytest.raises(utils.CheckpointError, match="step-9 is complete") as caught:
        resolve.sound_checkpoint(str(tmp_path / "step-10"))
    assert f"use {tmp_path / 'step-9'} instead" in str(caught.value) and "--resume_from" not in str(caught.value)


@pytest.mark.parametrize("content", ["{", "[1]", "3"])
def test_settings_that_are_not_an_object_are_named(tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(utils.UserError, match=r"config\.json"):
        resolve.kind_of(tmp_path)


def test_kinds_are_told_from_the_files_of_a_folder(base, reward_checkpoint, lora_checkpoint, tmp_path):
    models.PolicyModel.create(base, models.LoraSettings()).save(tmp_path / "adapter")
    (tmp_path / "empty").mkdir()
    folders = (base, reward_checkpoint, lora_checkpoint, tmp_path / "adapter", tmp_path / "empty")
    kinds = [resolve.kind_of(Path(folder)) for folder in folders]
    assert kinds == ["policy", "reward", "reward", "policy", None]
