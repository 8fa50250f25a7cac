"""packing.py: a step cut into micro-batches, packed tensors."""

import math

import numpy as np
import pytest
import torch

from data_pipeline import packing
from tests.conftest import dataset_of, micro_batches_of, random_completions


def random_pairs(count, seed=0, longest=60):
    draw = np.random.default_rng(seed)
    pairs = []
    for _ in range(count):
        prefix, chosen, rejected = (draw.integers(5, 1000, size=draw.integers(1, longest)) for _ in range(3))
        pairs.append((np.concatenate([prefix, chosen]), np.concatenate([prefix, rejected])))
    return pairs


# ---------------------------------------------------------------------------------------------------------------------
# Planning
# ---------------------------------------------------------------------------------------------------------------------


def random_lengths(seed):
    draw = np.random.default_rng(seed)
    count = int(draw.integers(1, 200))
    kind = seed % 4
    if kind == 0:
        return draw.integers(2, 1000, size=count)
    if kind == 1:
        return np.minimum(draw.lognormal(5, 1, size=count).astype(int) + 2, 4000)
    return np.full(count, 77) if kind == 2 else draw.choice([2, 3, 3000], size=count)


@pytest.mark.parametrize("tokens_per_batch", [1, 50, 300, 1024, 4096, 30_000])
@pytest.mark.parametrize("batch_size", [1, 3, 32, 1000])
def test_micro_batches_hold_every_pair_once_within_the_budget(tokens_per_batch, batch_size):
    for seed in range(8):
        lengths, crossover_length = random_lengths(seed), (50.0, 3840.0)[seed // 4]
        micro_batches = packing.plan_packed_rows(lengths, tokens_per_batch, batch_size, crossover_length)
        taken = [position for rows in micro_batches for row in rows for position in row]
        assert sorted(taken) == list(range(len(lengths)))
        for rows_of_pairs in micro_batches:
            assert all(rows_of_pairs), "an empty row"
            pairs = [position for row in rows_of_pairs for position in row]
            row_lengths = [int(lengths[row].sum()) for row in rows_of_pairs]
            width = packing.packed_width(row_lengths, tokens_per_batch)
            assert max(row_lengths) <= width < max(row_lengths) + packing.WIDTH_STEP
            assert len(pairs) <= batch_size
            assert len(rows_of_pairs) * width <= tokens_per_batch or len(pairs) == 1
            assert width <= max(lengths[pairs].max() + packing.WIDTH_STEP - 1, min(1024, tokens_per_batch))


def test_the_longest_pair_is_in_the_first_micro_batch():
    for seed in range(12):
        lengths = random_lengths(seed)
        first = packing.plan_packed_rows(lengths, 2048, 32, 3840.0)[0]
        assert lengths.max() in [lengths[position] for row in first for position in row]


def test_short_pairs_share_rows_without_padding():
    micro_batches = packing.plan_packed_rows(np.array([300, 100, 100, 100]), 640, 32, 3840.0)
    assert [[sorted(row) for row in rows_of_pairs] for rows_of_pairs in micro_batches] == [[[0], [1, 2, 3]]]


@pytest.mark.parametrize(
    "row_lengths, budget, width",
    [([70], 4096, 128), ([100, 128], 4096, 128), ([300, 300], 600, 300), ([300, 290], 630, 315), ([500], 64, 500)],
)
def test_rows_are_as_wide_as_a_multiple_of_64_where_the_budget_allows_it(row_lengths, budget, width):
    assert packing.packed_width(row_lengths, budget) == width


def test_steps_of_other_pairs_come_in_few_shapes():
    shapes, needed, computed = set(), 0, 0
    for seed in range(20):
        lengths = np.minimum(np.random.default_rng(seed).lognormal(5.5, 0.7, size=128).astype(int) + 20, 4000)
        for rows in packing.plan_packed_rows(lengths, 4096, 32, 3840.0):
            row_lengths = [int(lengths[row].sum()) for row in rows]
            shapes.add(len(rows) * packing.packed_width(row_lengths, 4096))
            needed += sum(row_lengths)
            computed += len(rows) * packing.packed_width(row_lengths, 4096)
    assert len(shapes) <= 4096 // packing.WIDTH_STEP and needed / computed > 0.97


@pytest.mark.parametrize("tokens_per_batch", [1, 50, 300, 4096, 30_000])
@pytest.mark.parametrize("batch_size", [1, 3, 32])
def test_separate_rows_hold_every_pair_once_within_the_budget(tokens_per_batch, batch_size):
    for seed in range(8):
        longest_sides = random_lengths(seed)
        micro_batches = packing.plan_separate_rows(longest_sides, tokens_per_batch, batch_size, completions=2)
        taken = [position for rows in micro_batches for (position,) in rows]
        assert sorted(taken) == list(range(len(longest_sides)))
        assert longest_sides[taken].tolist() == sorted(longest_sides.tolist(), reverse=True)
        for rows_of_pairs in micro_batches:
            width = max(int(longest_sides[position]) for (position,) in rows_of_pairs)
            assert 1 <= len(rows_of_pairs) <= batch_size
            assert 2 * len(rows_of_pairs) * width <= tokens_per_batch or len(rows_of_pairs) == 1


# ---------------------------------------------------------------------------------------------------------------------
# Packing
# ---------------------------------------------------------------------------------------------------------------------


def test_one_pair_is_packed_as_the_docstring_says(tmp_path):
    pairs = dataset_of(tmp_path / "made", [([11, 12, 21, 22], [11, 12, 31])], margins=[0.25])
    batch = packing.pack(pairs, np.array([0]), [[0]], pad_id=9, width=5)
    assert batch.input_ids.tolist() == [[11, 12, 21, 22, 31]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 2]]
    assert batch.completion_index.tolist() == [[0, 0, 1, 1, 2]]
    assert batch.example_index.tolist() == [[0, 0, 0, 0, 0]]
    assert batch.last_token_positions.tolist() == [[3, 4]]
    assert pairs.label_margins[batch.indices].tolist() == [0.25] and batch.indices.tolist() == [0]
    assert (batch.example_index >= 0).sum() == batch.input_ids.numel() == 5
    indices = batch.input_ids, batch.position_ids, batch.last_token_positions
    assert {tensor.dtype for tensor in indices} == {torch.int64}
    assert batch.example_index.dtype == batch.completion_index.dtype == torch.int32


def test_rows_of_several_pairs_are_packed_side_by_side_and_padded(tmp_path):
    made = [([1, 2], [1, 3]), ([11, 12, 21, 22], [11, 12, 31]), ([4], [5, 6])]
    pairs = dataset_of(tmp_path / "made", made)
    # positions in `indices`, not indices: row 0 holds pairs 2 and 0, row 1 holds pair 1
    batch = packing.pack(pairs, np.array([1, 0, 2]), [[2, 1], [0]], pad_id=9, width=6)
    assert batch.input_ids.tolist() == [[4, 5, 6, 1, 2, 3], [11, 12, 21, 22, 31, 9]]
    assert batch.position_ids.tolist() == [[0, 0, 1, 0, 1, 1], [0, 1, 2, 3, 2, 0]]
    assert batch.completion_index.tolist() == [[1, 2, 2, 0, 1, 2], [0, 0, 1, 1, 2, 0]]
    assert batch.example_index.tolist() == [[0, 0, 0, 1, 1, 1], [2, 2, 2, 2, 2, -1]]
    assert batch.last_token_positions.tolist() == [[0, 2], [4, 5], [9, 10]]
    assert batch.indices.tolist() == [2, 0, 1] and pairs.label_margins[batch.indices].tolist() == [2, 0, 1]
    assert ((batch.example_index >= 0).sum(), batch.input_ids.numel()) == (11, 12)


def unpacked(batch, number):
    """The sequences of an example of a batch, from its indices alone, and the flat positions of their last tokens."""
    flat = {
        name: getattr(batch, name).flatten()
        for name in ("input_ids", "position_ids", "example_index", "completion_index")
    }
    sides, ends = [], []
    for completion in range(1, batch.last_token_positions.shape[1] + 1):
        is_own = (flat["completion_index"] == 0) | (flat["completion_index"] == completion)
        is_side = (flat["example_index"] == number) & is_own
        assert flat["position_ids"][is_side].tolist() == list(range(int(is_side.sum())))
        sides.append(flat["input_ids"][is_side].tolist())
        ends.append(int(is_side.nonzero()[-1]))
    return sides, ends


def test_both_sequences_of_every_pair_can_be_rebuilt_from_packed_rows(tmp_path):
    made = random_pairs(60)
    pairs = dataset_of(tmp_path / "made", made)
    indices = np.random.default_rng(1).permutation(60)[:50]
    batches = list(micro_batches_of(pairs, indices, 500, 12, pad_id=0, crossover_length=3840.0))
    assert len(batches) > 3 and any((batch.example_index == -1).any() for batch in batches)
    seen = []
    for batch in batches:
        for number, index in enumerate(batch.indices.tolist()):
            sides, ends = unpacked(batch, number)
            assert sides == [made[index][0].tolist(), made[index][1].tolist()]
            assert ends == batch.last_token_positions[number].tolist()
            assert batch.input_ids.flatten()[batch.last_token_positions[number]].tolist() == [
                made[index][0][-1],
                made[index][1][-1],
            ]
        assert pairs.lengths[batch.indices].sum() == (batch.example_index >= 0).sum()
        assert (batch.input_ids[batch.example_index < 0] == 0).all()
        seen += batch.indices.tolist()
    assert sorted(seen) == sorted(indices.tolist())


@pytest.mark.parametrize("completions", [1, 2, 3, 7, 16])
@pytest.mark.parametrize("crossover_length", [3840.0, None])
def test_any_number_of_completions_stays_whole_and_within_the_budget(completions, crossover_length):
    dataset, indices = random_completions(40, completions), np.random.default_rng(1).permutation(40)[:33]
    plans = packing.plan_step(dataset, indices, 600, 6, crossover_length)
    assert len(plans) > 2 and sorted(np.concatenate([plan.indices for plan in plans])) == sorted(indices)
    for plan in plans:
        batch = packing.build(dataset, plan, pad_id=3)
        assert plan.indices.tolist() == batch.indices.tolist() and plan.computed_tokens == batch.input_ids.numel()
        assert plan.needed_tokens == dataset.lengths[plan.indices].sum()
        assert plan.num_examples <= 6 and (plan.computed_tokens <= 600 or plan.num_examples == 1)
        wanted = [[sequence.tolist() for sequence in dataset.sequences(index)] for index in batch.indices]
        if plan.is_packed:
            for number, sequences in enumerate(wanted):
                assert unpacked(batch, number) == (sequences, batch.last_token_positions[number].tolist())
        else:
            rows = zip(batch.input_ids.tolist(), batch.attention_mask.sum(dim=1).tolist(), strict=True)
            assert [ids[:length] for ids, length in rows] == [ids for sequences in wanted for ids in sequences]
            assert (batch.input_ids[batch.attention_mask == 0] == 3).all()


def test_separate_rows_are_the_plain_sequences_padded_on_the_right(tmp_path):
    made = random_pairs(20)
    pairs = dataset_of(tmp_path / "made", made)
    indices = np.arange(19, -1, -1)
    seen = []
    for batch in micro_batches_of(pairs, indices, 500, 6, pad_id=3, crossover_length=None):
        sides = [side.tolist() for index in batch.indices for side in made[index]]
        width = max(map(len, sides))
        assert batch.input_ids.tolist() == [side + [3] * (width - len(side)) for side in sides]
        assert batch.attention_mask.tolist() == [[1] * len(side) + [0] * (width - len(side)) for side in sides]
        assert batch.input_ids.numel() <= 500 and len(batch.indices) <= 6
        seen += batch.indices.tolist()
    assert sorted(seen) == list(range(20))


@pytest.mark.parametrize("crossover_length", [3840.0, math.inf, None])
def test_an_example_with_a_longer_sequence_gets_a_micro_batch_of_its_own(crossover_length):
    dataset, indices = random_completions(40, 2), np.random.default_rng(1).permutation(40)
    longest = dataset.lengths[:, 0] + dataset.lengths[:, 1:].max(axis=1)
    plans = packing.plan_step(dataset, indices, 600, 6, crossover_length, alone_above=30)
    assert sorted(np.concatenate([plan.indices for plan in plans])) == list(range(40))
    alone = [plan for plan in plans if longest[plan.indices].max() > 30]
    assert 2 < len(alone) < len(plans) and all(plan.num_examples == 1 and not plan.is_packed for plan in alone)
    together = packing.plan_step(dataset, indices[longest[indices] <= 30], 600, 6, crossover_length)
    assert [plan.indices.tolist() for plan in plans[len(alone) :]] == [plan.indices.tolist() for plan in together]


@pytest.mark.parametrize("crossover_length", [3840.0, None])
def test_an_evaluation_planned_in_parts_takes_every_pair_once(tmp_path, monkeypatch, crossover_length):
    monkeypatch.setattr(packing, "EXAMPLES_PLANNED_AT_ONCE", 7)
    pairs = dataset_of(tmp_path / "made", random_pairs(30))
    batches = list(micro_batches_of(pairs, np.arange(30), 1000, 32, 0, crossover_length))
    assert sorted(np.concatenate([batch.indices for batch in batches]).tolist()) == list(range(30))
    assert max(len(batch.indices) for batch in batches) <= 7


@pytest.mark.parametrize("crossover_length", [3840.0, None])
def test_moving_a_batch_keeps_everything_else(tmp_path, crossover_length):
    pairs = dataset_of(tmp_path / "made", random_pairs(3))
    (batch,) = micro_batches_of(pairs, np.arange(3), 10_000, 32, 0, crossover_length)
    moved = batch.to(torch.device("meta"))
    assert type(moved) is type(batch) and moved.input_ids.is_meta
    assert moved.indices is batch.indices
    assert not batch.input_ids.is_meta


# ---------------------------------------------------------------------------------------------------------------------
# Plans first, tensors later
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("crossover_length", [3840.0, None])
def test_a_plan_says_of_its_batch_what_the_built_batch_is(tmp_path, crossover_length):
    pairs = dataset_of(tmp_path / "made", random_pairs(60))
    indices = np.random.default_rng(1).permutation(60)[:50]
    plans = packing.plan_step(pairs, indices, 500, 12, crossover_length)
    assert len(plans) > 3 and sum(plan.num_examples for plan in plans) == 50
    for plan in plans:
        batch = packing.build(pairs, plan, pad_id=0)
        assert plan.indices.tolist() == batch.indices.tolist()
        assert (plan.num_examples, plan.needed_tokens) == (len(batch.indices), pairs.lengths[batch.indices].sum())
        assert plan.computed_tokens == batch.input_ids.numel()
        assert [place for row in plan.rows for place in row] == list(range(plan.num_examples))
        height, width = batch.input_ids.shape
        price = 1 + width / max(crossover_length or 0, packing.MIN_CROSSOVER_LENGTH)
        assert plan.cost == pytest.approx(height * width * price + packing.MICRO_BATCH_OVERHEAD)


@pytest.mark.parametrize("crossover_length", [3840.0, None])
def test_planning_then_building_gives_the_micro_batches_themselves(tmp_path, crossover_length):
    pairs = dataset_of(tmp_path / "made", random_pairs(40))
    indices = np.random.default_rng(1).permutation(40)
    plans = packing.plan_step(pairs, indices, 400, 12, crossover_length)
    batches = list(micro_batches_of(pairs, indices, 400, 12, 7, crossover_length))
    for plan, batch in zip(plans, batches, strict=True):
        built = packing.build(pairs, plan, 7)
        assert type(built) is type(batch)
        for name, value in vars(batch).items():
            if torch.is_tensor(value):
                assert torch.equal(getattr(built, name), value), name


def test_pinned_batches_keep_everything(tmp_path):
    if not torch.cuda.is_available():
        pytest.skip("pinned memory is CUDA's")
    pairs = dataset_of(tmp_path / "made", random_pairs(3))
    (batch,) = micro_batches_of(pairs, np.arange(3), 10_000, 32, 0, 3840.0)
    pinned = batch.pinned()
    assert pinned.input_ids.is_pinned() and torch.equal(pinned.input_ids, batch.input_ids)
    assert pinned.indices is batch.indices


@pytest.mark.parametrize("kind, may_overlap", [("cuda", True), ("mps", False), ("cpu", False)])
def test_only_a_copy_to_cuda_goes_on_while_its_source_may_be_freed(kind, may_overlap, tmp_path, monkeypatch):
    pairs = dataset_of(tmp_path / "made", random_pairs(3))
    (batch,) = micro_batches_of(pairs, np.arange(3), 10_000, 32, 0, 3840.0)
    asked = []
    monkeypatch.setattr(torch.Tensor, "to", lambda tensor, device, non_blocking: asked.append(non_blocking) or tensor)
    batch.to(torch.device(kind))
    assert asked and set(asked) == {may_overlap}
