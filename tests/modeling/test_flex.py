"""flex.py: its map of blocks is the mask's, and its compiled forms are few. The kernels themselves want a GPU."""

import itertools
import types
import warnings

import numpy as np
import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask

from data_pipeline import packing
from modeling import attention, flex
from tests.conftest import micro_batches_of, random_completions
from tests.modeling.test_attention import random_ids
from tests.test_models import make_model, packed_batches, random_pairs, rewards_of


def dense_counts(example_index, completion_index):
    """What `flex.count_visible` gives, from the whole mask."""
    mask = attention.packed_attention_mask(example_index, completion_index)[:, 0]  # (B, T, T)
    blocks = -(-mask.shape[1] // flex.BLOCK)
    short = blocks * flex.BLOCK - mask.shape[1]
    mask = torch.nn.functional.pad(mask, (0, short, 0, short))
    return mask.view(len(mask), blocks, flex.BLOCK, blocks, flex.BLOCK).sum(dim=(2, 4)).numpy()


def indices_of(completions):
    """(example_index, completion_index) of random examples with `completions` completions each, in single rows."""
    examples = random_completions(12, completions, longest=200)
    batches = micro_batches_of(examples, np.arange(12), 4096, 12, 0, float("inf"))
    return [(batch.example_index, batch.completion_index) for batch in batches]


@pytest.mark.parametrize("width", [90, 128, 300, 512])
def test_blocks_are_counted_as_the_mask_has_them(width):
    for seed in range(4):
        indices = random_ids(seed, width=width)
        assert np.array_equal(flex.count_visible(*(part.numpy() for part in indices)), dense_counts(*indices))


@pytest.mark.parametrize("completions", [1, 2, 5, 16])
def test_blocks_of_single_rows_are_counted_for_any_number_of_completions(completions):
    for indices in indices_of(completions):
        assert np.array_equal(flex.count_visible(*(part.numpy() for part in indices)), dense_counts(*indices))


def test_the_map_of_blocks_is_that_of_pytorch():
    example_index, completion_index = indices_of(2)[0]
    counts = torch.from_numpy(flex.count_visible(example_index.numpy(), completion_index.numpy()))
    got = flex.block_map(counts, example_index, completion_index)
    width = example_index.shape[1]
    wanted = create_block_mask(got.mask_mod, 1, None, width, width, device="cpu", BLOCK_SIZE=flex.BLOCK)
    assert got.seq_lengths == wanted.seq_lengths and got.BLOCK_SIZE == wanted.BLOCK_SIZE
    for name in ("kv", "full_kv", "q", "full_q"):
        numbers, order = f"{name}_num_blocks", f"{name}_indices"
        assert torch.equal(getattr(got, numbers), getattr(wanted, numbers))
        for ours, theirs, count in zip(
            getattr(got, order)[0, 0], getattr(wanted, order)[0, 0], getattr(got, numbers)[0, 0], strict=True
        ):
            assert torch.equal(ours[:count], theirs[:count])
    assert got.full_kv_num_blocks.sum() > 0


# -- Compiled forms ----------------------------------------------------------------------------------------------------


@pytest.fixture
def forms(monkeypatch):
    """How many forms dynamo made meanwhile. Compiled for a CPU without a compiler: dynamo decides on forms alike."""
    compiled = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **options: compiled(function, backend="eager", **options))
    monkeypatch.setattr(flex, "_compiled", lambda mode, made={}: made.setdefault(mode, flex._compile(mode)))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield lambda: torch._dynamo.utils.counters["stats"]["unique_graphs"]
    torch._dynamo.reset()


def attend_compiled(width, layout):
    query, key = (torch.randn(1, count, width, 16) for count in (4, 2))
    blocks = attention.PackedMask(*layout(width), "flex").blocks
    options = {"block_mask": blocks, "scale": 0.25, "enable_gqa": True, "kernel_options": None}
    return flex.run_compiled(flex._compiled(flex.current_mode()), query, key, key.clone(), **options)


def one_row(width):
    completion_index = torch.zeros(1, width, dtype=torch.long)
    completion_index[:, width // 2 :] = 1
    return torch.zeros(1, width, dtype=torch.long), completion_index


def test_training_evaluating_and_scoring_take_one_form_each(forms):
    """Single rows as wide as multiples of 128, in one process, as train_rm.py with its report does."""
    modes = (torch.enable_grad, torch.no_grad, torch.inference_mode)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for mode, width in itertools.product(modes, (384, 640, 4096, 512, 1280, 384)):
            with mode():
                attend_compiled(width, one_row)
    assert forms() == len(modes)


def test_no_form_left_is_an_error_and_never_computed_densely(forms, monkeypatch):
    monkeypatch.setattr(flex, "MAX_FORMS", 1)
    with torch.no_grad():
        attend_compiled(384, one_row)
        with pytest.raises(RuntimeError, match="no compiled form left for "):
            attend_compiled(384, lambda width: [part.expand(2, -1) for part in one_row(width)])


@pytest.mark.parametrize(
    "dtype, shared_kib, is_small",
    [(torch.float32, 99, True), (torch.float32, 163, False), (torch.float32, 227, False), (torch.bfloat16, 99, False)],
)
def test_fp32_takes_a_smaller_kernel_on_cards_with_little_shared_memory(monkeypatch, dtype, shared_kib, is_small):
    card = types.SimpleNamespace(shared_memory_per_block_optin=shared_kib * 1024)  # RTX 30 and 40, A100, H100
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    query = types.SimpleNamespace(is_cuda=True, dtype=dtype, device="cuda:0")
    assert flex.kernel_options(query) == (flex.SMALL_FP32_KERNEL if is_small else None)


# -- Single rows -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget, batch_size", [(1000, 512), (4096, 512), (4096, 7), (300, 512), (10**9, 10**6)])
def test_single_rows_are_evenly_wide_and_keep_to_the_limits(budget, batch_size):
    draw = np.random.default_rng(0)
    lengths = np.append(draw.integers(3, 400, size=200), 5000)
    micro_batches = packing.plan_single_rows(lengths, budget, batch_size)
    rows = [row for (row,) in micro_batches]
    assert sorted(position for row in rows for position in row) == list(range(201))
    widths = np.array([lengths[row].sum() for row in rows])
    assert all(width <= budget or len(row) == 1 for width, row in zip(widths, rows, strict=True))
    assert max(map(len, rows)) <= batch_size
    if budget >= 1000 and len(widths) > 1:  # the one of 5,000 tokens is a row of its own
        assert widths[-1] > 0.6 * widths[1]


def test_single_rows_are_padded_to_whole_blocks_for_flex_only():
    examples = random_completions(40, 2, longest=60)
    for batch in micro_batches_of(examples, np.arange(40), 1000, 32, 0, float("inf")):
        assert batch.input_ids.shape[0] == 1 and batch.input_ids.shape[1] % 64 == 0
        assert batch.input_ids.shape[1] <= 1024
        padded = flex.prepared(batch)
        width = batch.input_ids.shape[1]
        assert padded.input_ids.shape[1] == max(384, -(-width // 128) * 128)
        assert torch.equal(padded.example_index[:, :width], batch.example_index)
        assert (padded.example_index[:, width:] == -1).all()
        assert len(padded.inputs()) == 6 and len(batch.inputs()) == 5


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_prepared_rows_have_the_same_rewards(base, tokenizer):
    model, pairs = make_model(base, tokenizer).eval(), random_pairs(12)
    with torch.no_grad():
        wanted = rewards_of(model, packed_batches(pairs))
        assert attention.install(model.hf_model)
        model.attention = "flex"
        batches = micro_batches_of(pairs, np.arange(12), 300, 32, 0, model.attention_crossover_length())
        got = rewards_of(model, [model.prepared(batch) for batch in batches])
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
