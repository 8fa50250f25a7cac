"""probe.py: `--tokens_per_batch auto` finds what fits, keeps it with the checkpoint, and changes nothing else."""

import json
import re
import types

import psutil
import pytest
import torch
from safetensors.torch import load_file

import data
import models
import train_rm
from checkpointing import checkpoint
from modeling import devices
from training import distributed, probe
from training.config import TrainConfig
from utils import UserError


@pytest.fixture
def made_up_run(base, tokenizer, demo_folder):
    """A run as far as probing looks at it, with the demo's model and pairs."""
    model = models.RewardModel.create(base, tokenizer, seed=0).train()
    return types.SimpleNamespace(
        config=TrainConfig(batch_size=32),
        model=model,
        module=model,
        world=distributed.World(),
        optimizer=torch.optim.AdamW(model.hf_model.parameters()),
        train_pairs=data.load_pairs(str(demo_folder[1]), tokenizer)[0],
    )


def memory_of(monkeypatch, bytes_a_token, limit):
    """Make memory grow by `bytes_a_token` from 1,000 on; returns the budgets that are tried."""
    tried = []

    def peak_of(run, budget):
        tried.append(budget)
        return 1000 + bytes_a_token * budget

    monkeypatch.setattr(probe, "peak_of", peak_of)
    monkeypatch.setattr(probe, "memory_now", lambda device: 1000)
    monkeypatch.setattr(probe, "memory_limit", lambda device, to_come: limit)
    return tried


def test_the_budget_is_the_largest_that_fits_and_none_is_tried_that_does_not(made_up_run, monkeypatch):
    tried = memory_of(monkeypatch, bytes_a_token=10, limit=1000 + 10 * 3000)
    found = probe.largest_budget(made_up_run)
    assert 3000 / probe.LEAST_GAIN <= found <= 3000
    assert tried[0] == probe.FIRST_BUDGET and max(tried) <= 3000


def test_no_budget_is_larger_than_what_a_micro_batch_can_hold(made_up_run, monkeypatch, capsys):
    memory_of(monkeypatch, bytes_a_token=1, limit=10**12)
    largest = sum(sorted(made_up_run.train_pairs.packed_lengths)[-32:])
    assert probe.largest_budget(made_up_run) == largest
    assert f"tokens a batch: {largest:,} (probed: " in capsys.readouterr().out


def test_the_tightest_process_decides_for_all(made_up_run, monkeypatch):
    memory_of(monkeypatch, bytes_a_token=10, limit=10**12)
    made_up_run.world.smallest = lambda number: min(number, 1500)
    assert probe.largest_budget(made_up_run) == 1500


def test_a_first_try_that_does_not_fit_says_what_to_change(made_up_run, monkeypatch):
    def no_memory(run, budget):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(probe, "peak_of", no_memory)
    with pytest.raises(UserError, match=r"1,024 tokens in a micro-batch do not fit(.|\n)*--gradient_checkpointing"):
        probe.largest_budget(made_up_run)


def test_a_real_try_sees_the_memory_it_takes_and_leaves_no_trace(made_up_run):
    before = {name: weights.clone() for name, weights in made_up_run.model.state_dict().items()}
    devices.free(torch.device("cpu"))  # earlier tests have the heap keep what they freed
    now = probe.memory_now(torch.device("cpu"))
    assert probe.peak_of(made_up_run, 2000) > now
    assert all(parameter.grad is None for parameter in made_up_run.model.parameters())
    assert all(torch.equal(weights, before[name]) for name, weights in made_up_run.model.state_dict().items())


def test_memory_is_watched_while_it_is_held():
    device = torch.device("cpu")
    devices.free(device)
    with probe.watched_memory(device) as peak:
        before = peak[0]
        block = torch.ones(64 * 2**20)  # 256 MiB
        assert block.sum() > 0
        del block
    assert 200 * 2**20 < peak[0] - before < 400 * 2**20


def test_what_adamw_will_hold_is_left_free(made_up_run, monkeypatch):
    parameters = list(made_up_run.model.hf_model.parameters())
    assert probe.bytes_to_come(made_up_run) == sum(8 * parameter.numel() for parameter in parameters)
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    made_up_run.optimizer.step()
    assert probe.bytes_to_come(made_up_run) == 0
    device = torch.device("cpu")
    monkeypatch.setattr(psutil, "virtual_memory", lambda: types.SimpleNamespace(available=8 * 2**30))
    monkeypatch.setattr(probe, "memory_now", lambda device: 2**30)
    assert probe.memory_limit(device, 0) == 2**30 + int(probe.SHARE_OF_MEMORY * 8 * 2**30)
    assert probe.memory_limit(device, 2**30) == 2**30 + int(probe.SHARE_OF_MEMORY * 7 * 2**30)


def test_auto_trains_what_a_number_trains_and_is_not_probed_again_on_resuming(
    base, small_dataset, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    flags = ["--model", base, "--dataset", small_dataset, "--batch_size", "8", "--grad_accum", "2", "--max_steps", "3"]
    flags += ["--lora", "--lora_dropout", "0.1", "--eval_num_batches", "1"]
    train_rm.main([*flags, "--tokens_per_batch", "auto", "--run_name", "auto", "--save_steps", "2"])
    budget = int(re.search(r"tokens a batch: ([\d,]+)", capsys.readouterr().out).group(1).replace(",", ""))
    auto = tmp_path / "checkpoints/rm/auto"
    assert checkpoint.read_position(auto / "step-2").tokens_per_batch == budget
    assert json.loads((auto / "step-2/train_config.json").read_text())["tokens_per_batch"] == "auto"

    train_rm.main([*flags, "--tokens_per_batch", str(budget), "--run_name", "number"])
    train_rm.main(["--resume_from", str(auto / "step-2"), "--run_name", "resumed"])
    assert "probed" not in capsys.readouterr().out
    for name in ("number", "resumed"):
        for file in ("adapter_model.safetensors", "optimizer.safetensors"):
            one, other = (load_file(tmp_path / f"checkpoints/rm/{run}/step-3" / file) for run in ("auto", name))
            assert all(torch.equal(one[key], other[key]) for key in one), name
    # asked for anew, it is probed anew
    train_rm.main(["--resume_from", "checkpoints/rm/number", "--tokens_per_batch", "auto", "--max_steps", "4"])
    assert "probed" in capsys.readouterr().out


@pytest.mark.parametrize("content", ['{"tokens_per_batch": "auto"}', '{"tokens_per_batch": 512}'])
def test_a_config_file_takes_auto_or_a_number(base, small_dataset, tmp_path, monkeypatch, capsys, content):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "settings.json").write_text(content)
    flags = ["--model", base, "--dataset", small_dataset, "--max_steps", "1", "--eval_num_batches", "1"]
    train_rm.main([*flags, "--config", "settings.json"])
    assert ("probed" in capsys.readouterr().out) == ("auto" in content)


@pytest.mark.parametrize("words", [["--tokens_per_batch", "most"], ["--config", "settings.json"]])
def test_another_word_is_refused(tmp_path, monkeypatch, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "settings.json").write_text('{"tokens_per_batch": "most"}')
    with pytest.raises(UserError, match=r"tokens_per_batch(.|\n)*'most', wants a whole number or auto"):
        train_rm.main(words)
