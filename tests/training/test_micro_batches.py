"""training/micro_batches.py: `--tokens_per_batch auto` finds what fits and changes nothing else."""

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
from training import distributed, micro_batches
from utils import UserError


@pytest.fixture
def pairs(tokenizer, demo_folder):
    return data.load_pairs(str(demo_folder[1]), tokenizer)[0]


@pytest.fixture
def batcher(base, tokenizer):
    model = models.RewardModel.create(base, tokenizer, seed=0).train()
    return micro_batches.MicroBatcher(model, model, distributed.World(), batch_size=32, max_length=2048)


@pytest.fixture
def optimizer(batcher):
    return torch.optim.AdamW(batcher.model.hf_model.parameters())


def memory_of(monkeypatch, bytes_a_token, limit):
    """Make memory grow by `bytes_a_token` from 1,000 on; returns the budgets that are tried."""
    tried = []

    def peak_bytes(batcher, dataset, optimizer, budget):
        tried.append(budget)
        return 1000 + bytes_a_token * budget

    monkeypatch.setattr(micro_batches, "peak_bytes", peak_bytes)
    monkeypatch.setattr(micro_batches, "memory_now", lambda device: 1000)
    monkeypatch.setattr(micro_batches, "memory_limit", lambda device, to_come: limit)
    return tried


def test_the_budget_is_the_largest_that_fits_and_none_is_tried_that_does_not(batcher, pairs, optimizer, monkeypatch):
    tried = memory_of(monkeypatch, bytes_a_token=10, limit=1000 + 10 * 3000)
    found = micro_batches.find_max_tokens_per_batch(batcher, pairs, optimizer)
    assert 3000 / micro_batches.MIN_GAIN <= found <= 3000
    assert tried[0] == micro_batches.FIRST_BUDGET and max(tried) <= 3000


def test_no_budget_is_larger_than_what_a_micro_batch_can_hold(batcher, pairs, optimizer, monkeypatch, capsys):
    memory_of(monkeypatch, bytes_a_token=1, limit=10**12)
    largest = sum(sorted(pairs.lengths.sum(axis=1))[-32:])
    assert micro_batches.find_max_tokens_per_batch(batcher, pairs, optimizer) == largest
    assert f"tokens a batch: {largest:,} (probed: " in capsys.readouterr().out


def test_the_tightest_process_decides_for_all(batcher, pairs, optimizer, monkeypatch):
    memory_of(monkeypatch, bytes_a_token=10, limit=10**12)
    batcher.world.smallest = lambda number: min(number, 1500)
    assert micro_batches.find_max_tokens_per_batch(batcher, pairs, optimizer) == 1500


def test_a_first_try_that_does_not_fit_says_what_to_change(batcher, pairs, optimizer, monkeypatch):
    def no_memory(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(micro_batches, "peak_bytes", no_memory)
    with pytest.raises(UserError, match=r"1,024 tokens in a micro-batch do not fit(.|\n)*--gradient_checkpointing"):
        micro_batches.find_max_tokens_per_batch(batcher, pairs, optimizer)


def test_a_real_try_sees_the_memory_it_takes_and_leaves_no_trace(batcher, pairs, optimizer):
    before = {name: weights.clone() for name, weights in batcher.model.state_dict().items()}
    devices.free(torch.device("cpu"))  # earlier tests have the heap keep what they freed
    now = micro_batches.memory_now(torch.device("cpu"))
    assert micro_batches.peak_bytes(batcher, pairs, optimizer, 2000) > now
    assert all(parameter.grad is None for parameter in batcher.model.parameters())
    assert all(torch.equal(weights, before[name]) for name, weights in batcher.model.state_dict().items())


def test_memory_is_watched_while_it_is_held():
    device = torch.device("cpu")
    devices.free(device)
    with micro_batches.watched_memory(device) as peak:
        before = peak[0]
        block = torch.ones(64 * 2**20)  # 256 MiB
        assert block.sum() > 0
        del block
    assert 200 * 2**20 < peak[0] - before < 400 * 2**20


def test_what_adamw_will_hold_is_left_free(batcher, optimizer, monkeypatch):
    parameters = list(batcher.model.hf_model.parameters())
    assert micro_batches.bytes_of_optimizer_to_come(optimizer) == sum(8 * parameter.numel() for parameter in parameters)
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert micro_batches.bytes_of_optimizer_to_come(optimizer) == 0
    device = torch.device("cpu")
    monkeypatch.setattr(psutil, "virtual_memory", lambda: types.SimpleNamespace(available=8 * 2**30))
    monkeypatch.setattr(micro_batches, "memory_now", lambda device: 2**30)
    assert micro_batches.memory_limit(device, 0) == 2**30 + int(micro_batches.SHARE_OF_MEMORY * 8 * 2**30)
    assert micro_batches.memory_limit(device, 2**30) == 2**30 + int(micro_batches.SHARE_OF_MEMORY * 7 * 2**30)


def test_auto_trains_what_a_number_trains_and_is_not_probed_again_on_resuming(
    base, small_dataset, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    flags = ["--model", base, "--dataset", small_dataset, "--batch_size", "8", "--grad_accum", "2", "--max_steps", "3"]
    flags += ["--lora", "--lora_dropout", "0.1", "--eval_num_batches", "1", "--no_report"]
    train_rm.main([*flags, "--tokens_per_batch", "auto", "--run_name", "auto", "--save_steps", "2"])
    budget = int(re.search(r"tokens a batch: ([\d,]+)", capsys.readouterr().out).group(1).replace(",", ""))
    auto = tmp_path / "checkpoints/rm/auto"
    assert checkpoint.read_training_state(auto / "step-2").tokens_per_batch == budget
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
    train_rm.main([*flags, "--no_report", "--config", "settings.json"])
    assert ("probed" in capsys.readouterr().out) == ("auto" in content)


@pytest.mark.parametrize("words", [["--tokens_per_batch", "most"], ["--config", "settings.json"]])
def test_another_word_is_refused(tmp_path, monkeypatch, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "settings.json").write_text('{"tokens_per_batch": "most"}')
    with pytest.raises(UserError, match=r"tokens_per_batch(.|\n)*'most', expected a whole number or auto"):
        train_rm.main(words)
