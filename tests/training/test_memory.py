"""training/memory.py: what `auto` finds fits the memory, is fast, and changes nothing else."""

import gc
import json
import types

import numpy as np
import psutil
import pytest
import torch
from safetensors.torch import load_file

import data
import models
import train_rm
from checkpointing import checkpoint
from modeling import devices
from training import distributed, memory, micro_batches
from training.optimizer import AdamW
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
    return AdamW(batcher.model.hf_model.parameters(), fused=True)


def memory_of(monkeypatch, bytes_a_token, limit):
    """Make memory grow by `bytes_a_token` from 1,000 on; returns the budgets that are tried."""
    tried = []

    def peak_bytes(batcher, dataset, optimizer, budget):
        tried.append(budget)
        return 1000 + bytes_a_token * budget

    monkeypatch.setattr(memory, "peak_bytes", peak_bytes)
    monkeypatch.setattr(memory, "memory_now", lambda device: 1000)
    monkeypatch.setattr(memory, "memory_limit", lambda device: limit)
    return tried


def test_the_budget_is_the_largest_that_fits_and_none_is_tried_that_does_not(batcher, pairs, optimizer, monkeypatch):
    tried = memory_of(monkeypatch, bytes_a_token=10, limit=1000 + 10 * 3000)
    found, is_all = memory.find_max_tokens_per_batch(batcher, pairs, optimizer)
    assert 3000 / memory.MIN_GAIN <= found <= 3000 and not is_all
    assert tried[0] == micro_batches.FIRST_BUDGET and max(tried) <= 3000


def test_no_budget_is_larger_than_what_a_micro_batch_can_hold(batcher, pairs, optimizer, monkeypatch, capsys):
    memory_of(monkeypatch, bytes_a_token=1, limit=10**12)
    largest = sum(sorted(pairs.lengths.sum(axis=1))[-32:])
    assert memory.find_max_tokens_per_batch(batcher, pairs, optimizer) == (largest, True)
    assert f"tokens a batch without gradient checkpointing: {largest:,} of " in capsys.readouterr().out


def test_the_tightest_process_decides_for_all(batcher, pairs, optimizer, monkeypatch):
    memory_of(monkeypatch, bytes_a_token=10, limit=10**12)
    batcher.world.smallest = lambda number: min(number, 1500)
    assert memory.find_max_tokens_per_batch(batcher, pairs, optimizer) == (1500, False)


def test_an_example_that_is_computed_alone_does_not_hide_how_the_others_grow(batcher, pairs):
    lengths = np.sort(pairs.longest_sides())
    batcher.alone_above = int(lengths[-4])  # fewer than four pairs are longer
    computed = [memory.largest_micro_batch(batcher, pairs, budget)[0] for budget in (20, 500, 1000)]
    assert [plan.is_packed for plan in computed] == [False, True, True]
    assert computed[0].num_examples == 1 and computed[0].width == lengths[-1]
    assert computed[0].computed_tokens < computed[1].computed_tokens < computed[2].computed_tokens


@pytest.fixture
def on_a_gpu(batcher, monkeypatch):
    """A batcher whose model says that it is on a GPU; what would touch the GPU is replaced by the test."""
    monkeypatch.setattr(type(batcher.model), "device", property(lambda self: torch.device("cuda")))
    for function in ("free", "forget_peak"):
        monkeypatch.setattr(devices, function, lambda device: None)
    return batcher


def room_for(monkeypatch, tokens, tokens_recomputing):
    """Room for so many tokens in a micro-batch, with and without keeping activations; beyond, memory runs out."""
    tried = []
    recomputing = tokens_recomputing if callable(tokens_recomputing) else lambda: tokens_recomputing

    def peak_bytes(batcher, dataset, optimizer, budget):
        most = recomputing() if batcher.recomputes else tokens
        tried.append((batcher.recomputes, budget))
        return None if budget > most else 1000 + 10**6 * budget // most

    monkeypatch.setattr(memory, "peak_bytes", peak_bytes)
    monkeypatch.setattr(memory, "memory_now", lambda device: 1000)
    monkeypatch.setattr(memory, "memory_limit", lambda device: 1000 + 10**6)
    return tried


@pytest.mark.parametrize(
    "kept, recomputed, found",
    [
        (10**9, 10**9, ("all", False)),  # a card with room for everything
        (2500, 20000, (2500, False)),  # room enough without recomputing, if not for much
        (1500, 3000, (3000, True)),  # too little
        (900, 3000, (3000, True)),  # not even one try
    ],
)
def test_a_gpu_recomputes_only_if_little_fits_otherwise(
    on_a_gpu, pairs, optimizer, monkeypatch, kept, recomputed, found
):
    on_a_gpu.batch_size = 400
    room_for(monkeypatch, kept, recomputed)
    memory.choose(on_a_gpu, pairs, optimizer, memory.Choices("auto", "auto", False))
    wanted = sum(sorted(pairs.lengths.sum(axis=1))[-400:]) if found[0] == "all" else found[0]
    assert wanted / memory.MIN_GAIN <= on_a_gpu.tokens_per_batch <= wanted
    assert on_a_gpu.recomputes == on_a_gpu.model.hf_model.is_gradient_checkpointing == found[1]


@pytest.mark.parametrize(
    "recomputed, offloaded, found",
    [(3000, 9000, (3000, False)), (1200, 9000, (9000, True)), (100, 1500, (1500, True)), (1200, 1200, (1200, True))],
)
def test_a_gpu_keeps_the_moments_elsewhere_only_if_little_fits_beside_them(
    on_a_gpu, pairs, optimizer, monkeypatch, recomputed, offloaded, found
):
    on_a_gpu.batch_size = 400
    room_for(monkeypatch, 600, lambda: offloaded if optimizer.is_offloaded else recomputed)
    memory.choose(on_a_gpu, pairs, optimizer, memory.Choices("auto", "auto", "auto"))
    assert found[0] / memory.MIN_GAIN <= on_a_gpu.tokens_per_batch <= found[0]
    assert (optimizer.is_offloaded, on_a_gpu.recomputes) == (found[1], True)


@pytest.mark.parametrize("recompute", [True, False])
def test_what_the_user_chose_is_not_tried_otherwise(on_a_gpu, pairs, optimizer, monkeypatch, recompute):
    tried = room_for(monkeypatch, 1100, 3000)
    memory.choose(on_a_gpu, pairs, optimizer, memory.Choices("auto", recompute, False))
    assert {was_on for was_on, _ in tried} == {recompute}
    tried.clear()
    memory.choose(on_a_gpu, pairs, optimizer, memory.Choices(700, recompute, False))
    assert (on_a_gpu.tokens_per_batch, on_a_gpu.recomputes, tried) == (700, recompute, [])


@pytest.mark.parametrize("budget, recomputes", [(1000, False), (2000, True)])
def test_a_given_budget_decides_whether_to_recompute(on_a_gpu, pairs, optimizer, monkeypatch, budget, recomputes):
    room_for(monkeypatch, 1100, 3000)
    memory.choose(on_a_gpu, pairs, optimizer, memory.Choices(budget, "auto", False))
    assert (on_a_gpu.tokens_per_batch, on_a_gpu.recomputes) == (budget, recomputes)


def test_a_try_that_runs_out_of_memory_goes_back_to_what_fitted(on_a_gpu, pairs, optimizer, monkeypatch):
    tried = room_for(monkeypatch, 10**9, 10**9)
    grows_faster = memory.peak_bytes
    monkeypatch.setattr(
        memory, "peak_bytes", lambda *arguments: None if arguments[-1] > 1500 else grows_faster(*arguments)
    )
    assert memory.find_max_tokens_per_batch(on_a_gpu, pairs, optimizer) == (tried[0][1], False)


def test_a_first_try_that_does_not_fit_says_what_to_change(on_a_gpu, pairs, optimizer, monkeypatch):
    room_for(monkeypatch, 10, 20)
    with pytest.raises(UserError, match=r"longest example does not fit(.|\n)*--max_length(.|\n)*--lora"):
        memory.choose(on_a_gpu, pairs, optimizer, memory.Choices("auto", "auto", False))


def test_running_out_of_memory_in_a_try_is_survived(batcher, pairs, optimizer, monkeypatch):
    def no_memory(*tensors):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(batcher.model, "score_packed", no_memory)
    assert memory.peak_bytes(batcher, pairs, optimizer, 1000) is None
    monkeypatch.setattr(batcher.model, "score_packed", lambda *tensors: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        memory.peak_bytes(batcher, pairs, optimizer, 1000)


def test_the_gradients_of_a_step_count(batcher, pairs, optimizer, monkeypatch):
    """From the second micro-batch of a step on they are there beside its activations."""
    seen = []
    module = batcher.module
    monkeypatch.setattr(batcher, "module", lambda *inputs: (seen.append(has_gradients()), module(*inputs))[1])

    def has_gradients():
        return any(parameter.grad is not None for parameter in module.parameters())

    memory.peak_bytes(batcher, pairs, optimizer, 1000)
    assert seen == [False, True] and not has_gradients()


@pytest.mark.parametrize("mib, recomputes", [(8000, False), (20, True)])
def test_a_cpu_recomputes_if_activations_would_not_fit(batcher, pairs, optimizer, monkeypatch, mib, recomputes):
    monkeypatch.setattr(devices, "available_bytes", lambda: mib * 2**20)
    memory.choose(batcher, pairs, optimizer, memory.Choices("auto", "auto", False))
    assert (batcher.tokens_per_batch, batcher.recomputes) == (memory.CPU_BUDGET, recomputes)
    assert batcher.model.hf_model.is_gradient_checkpointing == recomputes
    memory.choose(batcher, pairs, optimizer, memory.Choices(700, not recomputes, False))
    assert (batcher.tokens_per_batch, batcher.recomputes) == (700, not recomputes)


def test_counting_activations_leaves_none(batcher, pairs, optimizer):
    batcher.tokens_per_batch = memory.CPU_BUDGET
    batcher.model.use_attention("pieces")
    before = tensors_alive()
    assert memory.activations_fit(batcher, pairs, optimizer)
    assert tensors_alive() == before


def tensors_alive():
    gc.disable()  # a cycle would be found some day, and until then take memory
    try:
        return sum(torch.is_tensor(thing) for thing in gc.get_objects())
    finally:
        gc.enable()


def test_a_real_try_sees_the_memory_it_takes_and_leaves_no_trace(batcher, pairs, optimizer):
    before = {name: weights.clone() for name, weights in batcher.model.state_dict().items()}
    devices.free(torch.device("cpu"))  # earlier tests have the heap keep what they freed
    now = memory.memory_now(torch.device("cpu"))
    assert memory.peak_bytes(batcher, pairs, optimizer, 2000) > now
    assert all(parameter.grad is None for parameter in batcher.model.parameters())
    assert all(torch.equal(weights, before[name]) for name, weights in batcher.model.state_dict().items())


def test_memory_is_watched_while_it_is_held():
    device = torch.device("cpu")
    devices.free(device)
    with memory.watched_memory(device) as peak:
        before = peak[0]
        block = torch.ones(64 * 2**20)  # 256 MiB
        assert block.sum() > 0
        del block
    assert 200 * 2**20 < peak[0] - before < 400 * 2**20


def test_some_memory_is_left_free(monkeypatch):
    monkeypatch.setattr(psutil, "virtual_memory", lambda: types.SimpleNamespace(available=8 * 2**30))
    monkeypatch.setattr(memory, "memory_now", lambda device: 2**30)
    assert memory.memory_limit(torch.device("cpu")) == 2**30 + int(memory.SHARE_OF_MEMORY * 8 * 2**30)


@pytest.mark.parametrize("free, usable", [(1, 0), (4, 3), (40, 36)])
def test_on_a_gpu_at_least_a_gibibyte_is_left_free(free, usable, monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free * 2**30, 0))
    for function in ("memory_reserved", "memory_allocated"):
        monkeypatch.setattr(torch.cuda, function, lambda device: 2**30)
    assert memory.memory_limit(torch.device("cuda")) == 2**30 + usable * 2**30


def test_auto_trains_what_a_number_trains_and_is_not_chosen_again_on_resuming(
    base, small_dataset, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    flags = ["--model", base, "--dataset", small_dataset, "--batch_size", "16", "--grad_accum", "1", "--max_steps", "3"]
    flags += ["--lora", "--lora_dropout", "0.1", "--eval_num_batches", "1", "--no_report"]
    train_rm.main([*flags, "--run_name", "auto", "--save_steps", "2"])
    assert "gradient checkpointing: off" in capsys.readouterr().out
    auto = tmp_path / "checkpoints/rm/auto"
    state = checkpoint.read_training_state(auto / "step-2")
    assert (state.tokens_per_batch, state.recomputes) == (memory.CPU_BUDGET, False)
    stored = json.loads((auto / "step-2/train_config.json").read_text())
    assert stored["tokens_per_batch"] == stored["gradient_checkpointing"] == "auto"

    numbers = ["--tokens_per_batch", str(memory.CPU_BUDGET), "--no_gradient_checkpointing"]
    train_rm.main([*flags, *numbers, "--run_name", "number"])
    monkeypatch.setattr(memory, "activations_fit", lambda *arguments: 1 / 0)
    train_rm.main(["--resume_from", str(auto / "step-2"), "--run_name", "resumed"])
    for name in ("number", "resumed"):
        for file in ("adapter_model.safetensors", "optimizer.safetensors"):
            one, other = (load_file(tmp_path / f"checkpoints/rm/{run}/step-3" / file) for run in ("auto", name))
            assert all(torch.equal(one[key], other[key]) for key in one), name
    # asked for anew, it is chosen anew
    monkeypatch.setattr(memory, "activations_fit", lambda *arguments: False)
    train_rm.main(["--resume_from", "checkpoints/rm/number", "--gradient_checkpointing", "auto", "--max_steps", "4"])
    assert "gradient checkpointing: on" in capsys.readouterr().out


def test_recomputing_changes_no_bit(base, small_dataset, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = ["--model", base, "--dataset", small_dataset, "--batch_size", "16", "--grad_accum", "1", "--max_steps", "3"]
    for name, switch in (("kept", "--no_gradient_checkpointing"), ("recomputed", "--gradient_checkpointing")):
        train_rm.main([*flags, switch, "--run_name", name, "--eval_num_batches", "1", "--no_report"])
    one, other = (
        load_file(tmp_path / f"checkpoints/rm/{name}/step-3/model.safetensors") for name in ("kept", "recomputed")
    )
    assert all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("content", ['{"tokens_per_batch": "auto"}', '{"tokens_per_batch": 512}'])
def test_a_config_file_takes_auto_or_a_number(base, small_dataset, tmp_path, monkeypatch, content):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "settings.json").write_text(content)
    flags = ["--model", base, "--dataset", small_dataset, "--max_steps", "1", "--eval_num_batches", "1"]
    train_rm.main([*flags, "--no_report", "--config", "settings.json", "--run_name", "run"])
    used = checkpoint.read_training_state(tmp_path / "checkpoints/rm/run/step-1").tokens_per_batch
    assert used == (memory.CPU_BUDGET if "auto" in content else 512)


@pytest.mark.parametrize("words", [["--tokens_per_batch", "most"], ["--config", "settings.json"]])
def test_another_word_is_refused(tmp_path, monkeypatch, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "settings.json").write_text('{"tokens_per_batch": "most"}')
    with pytest.raises(UserError, match=r"tokens_per_batch(.|\n)*'most', expected a whole number or auto"):
        train_rm.main(words)
