"""What only a GPU can show: FlexAttention's kernels and compiled forms, copies that overlap, and the same bits again.

Without a CUDA device all of them are skipped. TEST_DEVICE=cpu runs those that a CPU can run, only to see that they are
whole. `record_property` hands their figures to bench/on_gpu.py.
"""

import itertools
import os
import warnings

import numpy as np
import pytest
import torch

import models
import train_rm
import utils
from checkpointing import checkpoint
from modeling import attention, devices, flex, speedups
from tests.conftest import micro_batches_of
from tests.test_models import PairsFromIds, make_model, random_pairs
from training import optimizer

DEVICE = torch.device(os.environ.get("TEST_DEVICE", "cuda"))
ON_CUDA = DEVICE.type == "cuda"
HAS_DEVICE = not ON_CUDA or torch.cuda.is_available()
HAS_FLEX = ON_CUDA and HAS_DEVICE and torch.cuda.get_device_capability() >= devices.AMPERE
pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not HAS_DEVICE, reason="no CUDA device here")]
needs_cuda = pytest.mark.skipif(not ON_CUDA, reason="wants a CUDA device")
needs_flex = pytest.mark.skipif(not HAS_FLEX, reason="FlexAttention wants CUDA and compute capability 8.0")
each_attention = pytest.mark.parametrize("implementation", [pytest.param("flex", marks=needs_flex), "sdpa"])

WIDTHS = (384, 512, 640, 1024, 1280, 2048, 4096)  # of single rows, as training has them
PAIRS = 24 if ON_CUDA else 4  # a CPU may have no bf16
OTHER_SHAPES = ((1, 64), (1, 320), (2, 128), (3, 192), (4, 832), (5, 1000), (2, 2047))  # rows, tokens


def layout(seed, rows, width):
    """(example_index, completion_index) of rows of pairs from a few tokens to half a row, padded at the end."""
    draw = np.random.default_rng(seed)
    example_index, completion_index = (torch.full((rows, width), value) for value in (-1, 0))
    number = 0
    for row in range(rows):
        column, longest = 0, int(draw.choice([8, 40, 150, width // 2]))
        while True:
            lengths = [int(draw.integers(0, longest + 1)), *draw.integers(1, longest + 1, size=2).tolist()]
            whole = slice(column, column + sum(lengths))
            if whole.stop >= width:
                break
            example_index[row, whole] = number
            completion_index[row, whole] = torch.repeat_interleave(torch.arange(3), torch.tensor(lengths))
            column, number = whole.stop, number + 1
    return example_index.to(DEVICE), completion_index.to(DEVICE)


def long_pairs(count, seed=0):
    """Pairs of up to some hundred tokens, so that rows are wider than FlexAttention's blocks of 128."""
    draw = np.random.default_rng(seed)
    pairs = []
    for _ in range(count):
        prompt, chosen, rejected = (draw.integers(5, 1000, size=draw.integers(3, 120)) for _ in range(3))
        pairs.append((np.concatenate([prompt, chosen]), np.concatenate([prompt, rejected])))
    return PairsFromIds(pairs)


def packed_batches(model, pairs, budget=1024):
    crossover_length = model.attention_crossover_length()
    batches = micro_batches_of(pairs, np.arange(len(pairs.lengths)), budget, 32, 0, crossover_length)
    return [model.prepared(batch) for batch in batches]


def separate_batches(pairs):
    return micro_batches_of(pairs, np.arange(len(pairs.lengths)), 2048, 32, 0, None)


def rewards_and_gradients(model, batches):
    """Rewards (N, 2) in the pairs' own order, and the gradient of the summed loss for each weight."""
    model.zero_grad(set_to_none=True)
    found, order = [], []
    for batch in batches:
        rewards = train_rm.score(model, batch.to(DEVICE))  # (n, 2)
        train_rm.bradley_terry_loss(*rewards.unbind(dim=1), torch.zeros(len(rewards), device=DEVICE)).sum().backward()
        found.append(rewards.detach())
        order.append(batch.indices)
    gradients = {name: weight.grad.clone() for name, weight in model.trained_parameters().items()}
    own_order = torch.from_numpy(np.argsort(np.concatenate(order))).to(DEVICE)
    return torch.cat(found)[own_order], gradients


def relative_errors(got, wanted):
    """How far each gradient is off, relative to its norm; those of almost nothing aside."""
    assert got.keys() == wanted.keys() and len(wanted) > 5
    return {n: float((got[n] - w).norm() / w.norm()) for n, w in wanted.items() if w.norm() > 1e-6}


@pytest.fixture
def forms():
    """How many forms dynamo compiled meanwhile; computing FlexAttention densely is an error."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*flex_attention called without torch.compile.*")
        yield lambda: torch._dynamo.utils.counters["stats"]["unique_graphs"]
    torch._dynamo.reset()


# -- FlexAttention's kernels -------------------------------------------------------------------------------------------


def flex_errors(shapes, heads, key_heads, size, dtype):
    """The largest error of the result o and of the gradients q, k, v, relative to fp64 under the dense mask."""
    torch.manual_seed(0)
    worst = dict.fromkeys("oqkv", 0.0)
    for seed, (rows, width) in enumerate(shapes):
        mask = attention.PackedMask(*layout(seed, rows, width), "flex")
        counts = (heads, key_heads, key_heads)  # as transformers hands them over: (B, T, H, D) transposed
        inputs = [torch.randn(rows, width, n, size, device=DEVICE).transpose(1, 2).to(dtype) for n in counts]
        inputs = [tensor.requires_grad_() for tensor in inputs]
        exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
        is_real = (mask.example_index >= 0)[:, None, :, None]
        weight = (torch.randn(rows, heads, width, size, device=DEVICE) * is_real).to(dtype)  # no loss reads padding
        got = flex.attend(*inputs, mask.blocks, size**-0.5)
        gradients = torch.autograd.grad(got, inputs, weight)
        key, value = (tensor.repeat_interleave(heads // key_heads, dim=1) for tensor in exact[1:])
        wanted = torch.nn.functional.scaled_dot_product_attention(exact[0], key, value, attn_mask=mask.dense)
        wanted_gradients = torch.autograd.grad(wanted, exact, weight.double())
        pairs = zip("oqkv", (got * is_real, *gradients), (wanted * is_real, *wanted_gradients), strict=True)
        for name, ours, theirs in pairs:
            assert ours.isfinite().all(), (name, rows, width)
            worst[name] = max(worst[name], float((ours.double() - theirs).norm() / theirs.norm()))
    return worst


@needs_flex
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 5e-5), (torch.bfloat16, 1.5e-2)], ids=str)
@pytest.mark.parametrize("heads, key_heads, size", [(16, 8, 128), (4, 4, 64), (14, 2, 64)])
def test_flex_of_single_rows_is_exact_in_few_forms(dtype, tolerance, heads, key_heads, size, forms, record_property):
    worst = flex_errors([(1, width) for width in WIDTHS * 2], heads, key_heads, size, dtype)
    record_property("errors", worst)
    record_property("compiled_forms", forms())
    assert max(worst.values()) < tolerance
    assert forms() <= 2


@needs_flex
def test_flex_of_other_shapes_is_exact(forms, record_property):
    worst = flex_errors(OTHER_SHAPES, 16, 8, 128, torch.bfloat16)
    record_property("errors", worst)
    record_property("compiled_forms", forms())
    assert max(worst.values()) < 1.5e-2


@needs_flex
def test_the_fp32_kernel_for_cards_with_little_shared_memory_is_exact(forms, monkeypatch):
    monkeypatch.setattr(flex, "FP32_SHARED_BYTES", 2**40)  # no card has as much
    assert max(flex_errors([(1, 384), (1, 1280)], 16, 8, 128, torch.float32).values()) < 5e-5


@needs_flex
def test_training_evaluating_and_scoring_compile_a_form_or_two_each(forms, record_property):
    modes = (torch.enable_grad, torch.no_grad, torch.inference_mode)
    for mode, width in itertools.product(modes, WIDTHS):
        with mode():
            query, key = (
                torch.randn(1, width, n, 128, device=DEVICE, dtype=torch.bfloat16).transpose(1, 2) for n in (16, 8)
            )
            blocks = attention.PackedMask(*layout(0, 1, width), "flex").blocks
            assert flex.attend(query, key, key.clone(), blocks, 0.1).isfinite().all()
    record_property("compiled_forms", forms())
    assert forms() <= 2 * len(modes)


@needs_flex
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_auto_takes_flex(base, tokenizer, dtype):
    model = make_model(base, tokenizer).to(DEVICE)
    model.autocast_dtype = None if dtype == torch.float32 else dtype
    assert model.use_attention() == "flex", "what was tried before relying on it rejects what is right"


# -- Whole models ------------------------------------------------------------------------------------------------------


@each_attention
@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_rewards_and_gradients_are_those_of_separate_sequences(
    base, tokenizer, lora, checkpointing, implementation, forms, record_property
):
    pairs = long_pairs(PAIRS)
    model = make_model(base, tokenizer, lora).to(DEVICE).train()
    wanted, wanted_gradients = rewards_and_gradients(model, separate_batches(pairs))
    assert model.use_attention(implementation) == implementation
    speedups.set_gradient_checkpointing(model, checkpointing)
    got, gradients = rewards_and_gradients(model, packed_batches(model, pairs))
    errors = relative_errors(gradients, wanted_gradients)
    record_property("largest_error_of_a_gradient", max(errors.values()))
    record_property("compiled_forms", forms())
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
    assert max(errors.values()) < 1e-3


@each_attention
def test_bf16_is_near_fp32(base, tokenizer, implementation, record_property):
    pairs, model = long_pairs(PAIRS), make_model(base, tokenizer).to(DEVICE).train()
    wanted, wanted_gradients = rewards_and_gradients(model, separate_batches(pairs))
    model.autocast_dtype = torch.bfloat16
    assert model.use_attention(implementation) == implementation
    speedups.set_gradient_checkpointing(model)
    got, gradients = rewards_and_gradients(model, packed_batches(model, pairs))
    errors = relative_errors(gradients, wanted_gradients)
    record_property("largest_error_of_a_reward", float((got - wanted).abs().max()))
    record_property("largest_error_of_a_gradient", max(errors.values()))
    assert (got - wanted).abs().max() < 0.1 and max(errors.values()) < 0.1


@needs_cuda
@each_attention
@pytest.mark.parametrize("checkpointing", [False, True])
def test_compiled_layers_have_the_same_rewards_and_gradients(
    base, tokenizer, checkpointing, implementation, forms, record_property
):
    pairs, model = long_pairs(PAIRS), make_model(base, tokenizer).to(DEVICE).train()
    assert model.use_attention(implementation) == implementation
    speedups.set_gradient_checkpointing(model, checkpointing)
    wanted, wanted_gradients = rewards_and_gradients(model, packed_batches(model, pairs))
    speedups.compile_layers(model)
    got, gradients = rewards_and_gradients(model, packed_batches(model, pairs))
    record_property("compiled_forms", forms())
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
    assert max(relative_errors(gradients, wanted_gradients).values()) < 1e-3


@needs_cuda
@each_attention
def test_auto_compiles(base, tokenizer, implementation, forms):
    model = make_model(base, tokenizer).to(DEVICE).train()
    model.autocast_dtype = torch.bfloat16
    assert model.use_attention(implementation) == implementation
    assert speedups.try_compiling(model) == ""


# -- The same bits again -----------------------------------------------------------------------------------------------


@each_attention
def test_a_step_with_dropout_comes_out_the_same_again(base, tokenizer, implementation):
    pairs = long_pairs(PAIRS)
    model = models.RewardModel.create(base, tokenizer, 0, models.LoraSettings(dropout=0.1)).to(DEVICE).train()
    model.autocast_dtype = torch.bfloat16
    assert model.use_attention(implementation) == implementation
    speedups.set_gradient_checkpointing(model)
    state, found = checkpoint.random_state(), []
    for is_restored in (True, True, False):
        if is_restored:
            checkpoint.set_random_state(state)
        found.append(rewards_and_gradients(model, packed_batches(model, pairs))[1])
    first, again, other = found
    assert all(torch.equal(gradient, again[name]) for name, gradient in first.items())
    assert not all(torch.equal(gradient, other[name]) for name, gradient in first.items()), "nothing was dropped"


def test_the_gradient_of_the_embedding_comes_out_the_same_again():
    torch.manual_seed(0)
    tokens = 16384 if ON_CUDA else 256
    ids, weight = torch.randint(0, 500, (2, tokens)), torch.randn(2, tokens, 256)

    def gradient(device):
        embedding = torch.nn.Embedding(20000, 256, padding_idx=3, device=device)
        for micro_batch in range(2):
            (embedding(ids[micro_batch].to(device)) * weight[micro_batch].to(device)).sum().backward()
        return embedding.weight.grad

    first = gradient(DEVICE)
    assert torch.equal(first, gradient(DEVICE)), "it is summed in another order each time"
    torch.testing.assert_close(first.cpu(), gradient("cpu"), rtol=1e-4, atol=1e-3)


def test_moments_in_main_memory_give_the_same_weights():
    torch.manual_seed(0)
    # on CUDA more numbers than pass through the GPU at once
    shape = (3000, 9000) if ON_CUDA else (30, 9)
    start, gradients = torch.randn(shape), torch.randn(3, *shape)
    found = []
    for is_offloaded in (False, True):
        weight = torch.nn.Parameter(start.clone().to(DEVICE))
        adamw = optimizer.AdamW([weight], lr=0.1, weight_decay=0.01, fused=True)
        if is_offloaded:
            adamw.offload()
        adamw.make_moments()
        for gradient in gradients:
            weight.grad = gradient.to(DEVICE)
            adamw.step()
        found.append([weight.detach(), *(adamw.state[weight][name].to(DEVICE) for name in optimizer.MOMENTS)])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


# -- Memory ------------------------------------------------------------------------------------------------------------


def test_batches_are_copied_completely_while_the_device_is_busy():
    """What they are copied from is dropped at once, and its memory used again."""
    size = 4096 if ON_CUDA else 64
    busy, copies, wanted = torch.randn(size, size, device=DEVICE), [], []
    for batch in micro_batches_of(random_pairs(200), np.arange(200), 64, 32, 0, float("inf")):
        for _ in range(10):
            busy = busy @ busy
            busy = busy / busy.norm()
        wanted.append(batch.input_ids.clone())
        source = batch.pinned() if ON_CUDA else batch
        copies.append(source.to(DEVICE).input_ids)
        del batch, source
    assert len(copies) > 20 and all(torch.equal(a.cpu(), b) for a, b in zip(copies, wanted, strict=True))


@needs_cuda
def test_running_out_of_memory_is_recognized_and_leaves_the_device_usable():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**50, dtype=torch.uint8, device=DEVICE)
    assert utils.is_out_of_memory(caught.value)
    assert torch.ones(1000, device=DEVICE).sum() == 1000
