"""checkpoint.py: complete or absent, and every kind of damage is found and named."""

import stat
from types import SimpleNamespace

import pytest
import torch

import models
import utils
from checkpointing import checkpoint, manifest, resolve
from checkpointing.run_folder import step_folders
from train_rm import RewardTrainingConfig
from training.config import read_config
from training.distributed import World
from training.optimizer import AdamW


def save(run, model, optimizer, step, config):
    state = checkpoint.gather_state(model, optimizer, World())
    position = checkpoint.TrainingState(step, 8 * step, "data", 64, 4096)
    return checkpoint.save(run, model, state, checkpoint.random_state(), position, config)


@pytest.fixture
def saved(base, tokenizer, tmp_path):
    """(run folder, model, optimizer) with step-1 and step-2 on disk."""
    model = models.RewardModel.create(base, tokenizer, seed=0)
    optimizer = torch.optim.AdamW(model.hf_model.parameters(), lr=1e-3, fused=True)
    for step in (1, 2):
        for parameter in model.hf_model.parameters():
            parameter.grad = torch.full_like(parameter, 0.1 * step)
        optimizer.step()
        save(tmp_path / "run", model, optimizer, step, {"lr": 1e-3})
    return tmp_path / "run", model, optimizer


def test_everything_comes_back(saved, base):
    run, model, optimizer = saved
    folder = manifest.find(str(run))
    assert folder == run / "step-2"
    again = models.RewardModel.restore(folder)
    other = AdamW(again.hf_model.parameters(), lr=1e-3, fused=True)
    checkpoint.restore_optimizer(folder, again, other, World())
    for (name, old), new in zip(model.hf_model.named_parameters(), again.hf_model.parameters(), strict=True):
        assert torch.equal(old, new), name
        for key in ("step", "exp_avg", "exp_avg_sq"):
            assert torch.equal(optimizer.state[old][key], other.state[new][key]), (name, key)
    assert checkpoint.read_training_state(folder) == checkpoint.TrainingState(2, 16, "data", 64, 4096)
    assert resolve.training_settings(folder) == {"lr": 1e-3}


def test_random_numbers_go_on_where_they_were():
    state = checkpoint.random_state()
    first = torch.rand(3)
    checkpoint.set_random_state(state)
    assert torch.equal(torch.rand(3), first)


def test_nothing_in_a_checkpoint_is_a_pickle_or_private(saved):
    mask = utils.os.umask(0o027)
    utils.os.umask(mask)
    for path in (saved[0] / "step-2").iterdir():
        assert path.suffix in (".safetensors", ".json", ".jinja"), path.name
        assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~mask, path.name


DAMAGES = {
    "missing": lambda path: path.unlink(),
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-3]),
    "emptied": lambda path: path.write_bytes(b""),
    "bit-flipped": lambda path: path.write_bytes(path.read_bytes()[:-1] + bytes([path.read_bytes()[-1] ^ 1])),
    "zeroed at the end": lambda path: path.write_bytes(path.read_bytes()[:16] + bytes(path.stat().st_size - 16)),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_any_damage_to_any_file_is_named_with_the_newest_sound_step(saved, damage):
    run = saved[0]
    names = sorted(path.name for path in (run / "step-2").iterdir())
    assert len(names) == 10
    for name in names:
        path = run / "step-2" / name
        whole = path.read_bytes()
        DAMAGES[damage](path)
        with pytest.raises(utils.CheckpointError) as caught:
            manifest.find(str(run / "step-2"))
        assert caught.value.exit_code == 3
        message = str(caught.value)
        assert name in message and "step-1 is complete" in message and f"--resume_from {run / 'step-1'}" in message
        assert manifest.find(str(run)) == run / "step-1", "a run folder should fall back to its newest sound step"
        path.write_bytes(whole)
    assert manifest.find(str(run)) == run / "step-2"


def test_a_run_without_sound_steps_is_refused(saved, tmp_path):
    for step in ("step-1", "step-2"):
        (saved[0] / step / "manifest.json").write_text("{}")
    with pytest.raises(utils.CheckpointError, match="every checkpoint"):
        manifest.find(str(saved[0]))
    (tmp_path / "empty").mkdir()
    with pytest.raises(utils.UserError, match=r"no checkpoint there(.|\n)*empty holds nothing") as caught:
        manifest.find(str(tmp_path / "empty"))
    assert caught.value.exit_code == 2, "nothing is damaged"


def test_a_typo_suggests_the_nearest_folder(saved):
    with pytest.raises(utils.UserError, match=r"did you mean 'step-1'(.|\n)*step-1, step-2"):
        manifest.find(str(saved[0] / "step_1"))


def test_an_optimizer_of_another_model_is_refused(saved, base, tokenizer):
    lora = models.RewardModel.create(base, tokenizer, 0, models.LoraSettings())
    optimizer = torch.optim.AdamW(lora.trained_parameters().values(), lr=1e-3)
    with pytest.raises(utils.CheckpointError, match="optimizer"):
        checkpoint.restore_optimizer(saved[0] / "step-2", lora, optimizer, World())


def test_an_existing_step_is_never_written_into(saved):
    run, model, optimizer = saved
    before = (run / "step-2" / "manifest.json").stat().st_mtime_ns
    with pytest.raises(FileExistsError):
        save(run, model, optimizer, 2, {"lr": 1})
    assert (run / "step-2" / "manifest.json").stat().st_mtime_ns == before
    assert resolve.training_settings(run / "step-2") == {"lr": 1e-3}


def test_a_disk_without_room_is_foreseen_with_needed_and_free_bytes(saved, monkeypatch):
    run, model, optimizer = saved
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(utils.DiskOrNetworkError, match=r"bytes needed, 1,000 free(.|\n)*step-2 is untouched") as caught:
        save(run, model, optimizer, 3, {})
    assert caught.value.exit_code == 4
    assert sorted(path.name for path in run.iterdir()) == ["step-1", "step-2"]


@pytest.mark.parametrize("at_once", [1, 10**9])
def test_what_was_written_wrongly_is_not_published(saved, monkeypatch, at_once):
    run, model, optimizer = saved
    monkeypatch.setattr(checkpoint, "BYTES_COMPARED_AT_ONCE", at_once)
    original = checkpoint.save_file

    def flip_one(tensors, path):
        name = next(iter(tensors))
        original({**tensors, name: tensors[name] + 1}, path)

    monkeypatch.setattr(checkpoint, "save_file", flip_one)
    with pytest.raises(utils.DiskOrNetworkError, match="not what is in memory"):
        save(run, model, optimizer, 3, {})
    assert sorted(path.name for path in run.iterdir()) == ["step-1", "step-2"]


def test_later_steps_are_set_aside_and_not_deleted(saved):
    run = saved[0]
    assert checkpoint.set_aside_later_steps(run, 2) is None
    aside = checkpoint.set_aside_later_steps(run, 1)
    assert manifest.problem(aside / "step-2") is None
    assert [path.name for path in step_folders(run)] == ["step-1"]


def test_weights_that_are_not_numbers_are_compared_bit_by_bit_too(saved):
    run, model, _ = saved
    with torch.no_grad():
        next(model.hf_model.parameters())[0, 0] = float("nan")
    optimizer = torch.optim.AdamW(model.hf_model.parameters())
    folder = save(run, model, optimizer, 3, {"lr": 1e-3})
    assert folder.name == "step-3" and manifest.problem(folder) is None


def test_pruning_leaves_links_alone(saved, tmp_path):
    run, model, optimizer = saved
    elsewhere = tmp_path / "elsewhere"
    (run / "step-2").rename(elsewhere)
    (run / "step-2").symlink_to(elsewhere)
    for step in (3, 4):
        save(run, model, optimizer, step, {"lr": 1e-3})
    assert [path.name for path in checkpoint.prune(run, 1)] == ["step-1", "step-3"]
    assert elsewhere.is_dir() and (run / "step-2").is_symlink()


def test_a_damaged_newest_step_is_named_when_an_older_one_is_taken(saved, capsys):
    run, model, optimizer = saved
    save(run, model, optimizer, 3, {"lr": 1e-3})
    with (run / "step-3" / "config.json").open("ab") as file:
        file.write(b" ")
    assert manifest.find(str(run)).name == "step-2"
    said = capsys.readouterr().out
    assert "step-3 is damaged (config.json: " in said and "going on from step-2" in said


@pytest.mark.parametrize(
    "name, content, found",
    [
        ("optimizer.safetensors", None, "no such file"),
        ("train_config.json", None, "no such file"),
        ("train_config.json", "[]", "no 'model'; no 'dataset'"),
        ("train_config.json", '{"lr": "abc", "log_dir": "x"}', "'lr': got 'abc', expected a number"),
        ("training_state.json", '{"step": 2}', "'examples_seen' is missing"),
    ],
)
def test_a_sound_manifest_over_a_checkpoint_that_is_none_exits_3(saved, name, content, found):
    run, *_ = saved
    folder = run / "step-2"
    (folder / "manifest.json").unlink()
    (folder / name).unlink() if content is None else (folder / name).write_text(content)
    manifest.write_manifest(folder, 2)
    with pytest.raises(utils.CheckpointError, match=found) as caught:
        if name == "training_state.json":
            checkpoint.read_training_state(folder)
        read_config(RewardTrainingConfig, ["--resume_from", str(folder)], "A test.")
    assert caught.value.exit_code == 3 and name in str(caught.value)
