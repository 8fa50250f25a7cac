"""From token ids to packed tensors: which pairs a step takes, how they are cut into micro-batches, and packing.

Nothing here knows attention masks, rewards or losses.

Letters: B rows, T tokens per row, N pairs.
"""

from __future__ import annotations

import bisect
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from data import PairDataset

MICRO_BATCH_START = 256  # starting a forward costs about as much as so many tokens
LEAST_COSTLY_WIDTH = 2048  # small models would rather have narrow rows, but those are filled below 95 %
PAIRS_PLANNED_AT_ONCE = 4096  # more would pack no better and take memory for their tensors

# ---------------------------------------------------------------------------------------------------------------------
# The step's plan: which pairs, cut how
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StepPlan:
    """Which pairs each optimizer step takes: a function of (seed, epoch, step) alone, so resuming is an index.

    Steps count from 1. The last step of an epoch is smaller if the pairs do not divide.
    """

    num_pairs: int
    pairs_per_step: int
    epochs: int
    seed: int
    max_steps: int = 0

    @property
    def steps_per_epoch(self) -> int:
        return -(-self.num_pairs // self.pairs_per_step)

    @property
    def total_steps(self) -> int:
        steps = self.steps_per_epoch * self.epochs
        return min(steps, self.max_steps) if self.max_steps else steps

    def pairs_of(self, step: int) -> np.ndarray:
        """Indices (N,) of the pairs of one step."""
        epoch, position = divmod(step - 1, self.steps_per_epoch)
        order = _shuffled(self.num_pairs, self.seed, epoch)
        return order[position * self.pairs_per_step : (position + 1) * self.pairs_per_step]

    def examples_seen(self, step: int) -> int:
        """Pairs taken by steps 1 to `step`."""
        epochs, position = divmod(step, self.steps_per_epoch)
        return epochs * self.num_pairs + min(position * self.pairs_per_step, self.num_pairs)


@functools.lru_cache(maxsize=2)
def _shuffled(num_pairs: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.Generator(np.random.PCG64([seed, epoch])).permutation(num_pairs)


def fixed_sample(num_pairs: int, size: int, seed: int) -> np.ndarray:
    """The same `size` indices every time, spread over the whole split; all of them if size is 0."""
    everything = np.arange(num_pairs)
    return everything if size == 0 or size >= num_pairs else np.sort(_shuffled(num_pairs, seed, 0)[:size])


MicroBatchPlan = list[list[int]]  # for each row, the positions of its pairs


def plan_micro_batches(
    lengths: np.ndarray, tokens_per_batch: int, batch_size: int, costly_width: float
) -> list[MicroBatchPlan]:
    """Cut a step into micro-batches of rows of pairs, so that little is padded and none exceeds the token budget.

    Longest pairs first, because then memory peaks at once. Each micro-batch tries a few row widths, fills the rows
    best-fit decreasing, and takes the width that does most useful work for its cost.

    Args:
        lengths: (N,) tokens of each packed pair.
        tokens_per_batch: the most rows × width may come to; a single longer pair gets a micro-batch of its own.
        batch_size: the most pairs in a micro-batch.
        costly_width: the row width at which a token costs twice what it does in a short row, because attention grows
            with the width. Wider rows are filled better and cost more; this weighs the two.

    Returns:
        For each micro-batch its rows, for each row the positions in `lengths` of its pairs.
    """
    left = sorted((int(length), position) for position, length in enumerate(lengths))  # ascending
    micro_batches = []
    while left:
        longest, total = left[-1][0], sum(length for length, _ in left)
        widest = min(1024, tokens_per_batch)
        even_splits = [int(1.02 * total / rows) + 1 for rows in range(1, 9)]
        widths = {
            longest,
            *(width for width in (128, 192, 256, 384, 512, 640, *even_splits) if longest < width <= widest),
        }
        tried = [_fill_rows(left, width, tokens_per_batch, batch_size) for width in sorted(widths)]
        rows = max(tried, key=lambda rows: _useful_work(rows, lengths, costly_width))
        micro_batches.append(rows)
        taken = {position for row in rows for position in row}
        left = [pair for pair in left if pair[1] not in taken]
    return micro_batches


def _fill_rows(left: list[tuple[int, int]], width: int, tokens_per_batch: int, batch_size: int) -> MicroBatchPlan:
    """Rows of `width` tokens, each filled with the longest pair that still fits until none does."""
    left, rows, pairs = list(left), [], 0
    while left and pairs < batch_size and (not rows or (len(rows) + 1) * width <= tokens_per_batch):
        row, free = [], width
        while pairs < batch_size and (fitting := bisect.bisect_right(left, free, key=lambda pair: pair[0])):
            length, position = left.pop(fitting - 1)
            row.append(position)
            free -= length
            pairs += 1
        rows.append(row)
    return rows


def _useful_work(rows: MicroBatchPlan, lengths: np.ndarray, costly_width: float) -> float:
    """Needed tokens for each unit of cost: tokens computed, dearer by attention over the row's width, and a start."""
    row_lengths = [sum(int(lengths[position]) for position in row) for row in rows]
    width = max(row_lengths)
    price = 1 + width / max(costly_width, LEAST_COSTLY_WIDTH)
    return sum(row_lengths) / (len(rows) * width * price + MICRO_BATCH_START)


def plan_separate_rows(longest_sides: np.ndarray, tokens_per_batch: int, batch_size: int) -> list[MicroBatchPlan]:
    """The same for two rows a pair, each side padded to the micro-batch's longest."""
    order = [int(position) for position in np.argsort(-longest_sides, kind="stable")]
    micro_batches = []
    while order:
        fitting = int(tokens_per_batch // (2 * longest_sides[order[0]]))
        size = max(1, min(batch_size, fitting))
        micro_batches.append([[position] for position in order[:size]])
        order = order[size:]
    return micro_batches


# ---------------------------------------------------------------------------------------------------------------------
# Packing
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class PackedBatch:
    """One micro-batch: rows that each hold one or more pairs as `[prefix | chosen tail | rejected tail]`.

    One row with prefix p, chosen c, rejected r:
        input_ids     p p c c r     position_ids  0 1 2 3 2
        branch_ids    0 0 1 1 2     pair_ids      0 0 0 0 0    (-1 where padded)
    """

    input_ids: Tensor  # (B, T)
    position_ids: Tensor  # (B, T), restarting for the rejected tail
    pair_ids: Tensor  # (B, T)
    branch_ids: Tensor  # (B, T)
    ends: Tensor  # (N, 2), row · T + column of the last token of chosen and rejected
    margins: Tensor  # (N,)
    indices: np.ndarray  # (N,) which pairs of the dataset
    needed_tokens: int

    @property
    def computed_tokens(self) -> int:
        return self.input_ids.numel()

    def to(self, device: torch.device) -> PackedBatch:
        return _moved(self, device)


@dataclass
class SeparateBatch:
    """One micro-batch with each side in a row of its own, for models that cannot share prefixes."""

    input_ids: Tensor  # (2N, T): chosen and rejected in turn, padded on the right
    attention_mask: Tensor  # (2N, T)
    margins: Tensor  # (N,)
    indices: np.ndarray
    needed_tokens: int

    @property
    def computed_tokens(self) -> int:
        return self.input_ids.numel()

    def to(self, device: torch.device) -> SeparateBatch:
        return _moved(self, device)


def _moved(batch: Any, device: torch.device) -> Any:
    tensors = {
        name: value.to(device, non_blocking=True) for name, value in vars(batch).items() if torch.is_tensor(value)
    }
    return type(batch)(**{**vars(batch), **tensors})


def pack(dataset: PairDataset, indices: np.ndarray, rows: list[list[int]], pad_id: int) -> PackedBatch:
    """The tensors of one micro-batch of `plan_micro_batches`; `rows` hold positions in `indices`."""
    width = max(sum(int(dataset.packed_lengths[indices[i]]) for i in row) for row in rows)
    input_ids = np.full((len(rows), width), pad_id, dtype=np.int64)
    position_ids = np.zeros((len(rows), width), dtype=np.int64)
    pair_ids = np.full((len(rows), width), -1, dtype=np.int64)
    branch_ids = np.zeros((len(rows), width), dtype=np.int64)
    ends, order = [], []
    for row_number, row in enumerate(rows):
        column = 0
        for i in row:
            index = int(indices[i])
            prefix, chosen, rejected = (int(length) for length in dataset.lengths[index])
            whole = slice(column, column + prefix + chosen + rejected)
            input_ids[row_number, whole] = dataset.tokens(index)
            pair_ids[row_number, whole] = len(order)
            position_ids[row_number, whole] = np.concatenate(
                [np.arange(prefix + chosen), np.arange(prefix, prefix + rejected)]
            )
            branch_ids[row_number, whole] = np.repeat([0, 1, 2], [prefix, chosen, rejected])
            last = row_number * width + whole.stop - 1
            ends.append((last - rejected, last))
            order.append(index)
            column = whole.stop
    return PackedBatch(
        *(torch.from_numpy(array) for array in (input_ids, position_ids, pair_ids, branch_ids)),
        ends=torch.tensor(ends),
        margins=torch.from_numpy(dataset.margins[order]),
        indices=np.array(order),
        needed_tokens=int(dataset.packed_lengths[order].sum()),
    )


def separate(dataset: PairDataset, indices: np.ndarray, rows: list[list[int]], pad_id: int) -> SeparateBatch:
    """The same pairs, each side in a row of its own."""
    order = [int(indices[i]) for row in rows for i in row]
    sequences = [sequence for index in order for sequence in dataset.sequences(index)]
    width = max(len(sequence) for sequence in sequences)
    input_ids = np.full((len(sequences), width), pad_id, dtype=np.int64)
    attention_mask = np.zeros((len(sequences), width), dtype=np.int64)
    for row_number, sequence in enumerate(sequences):
        input_ids[row_number, : len(sequence)] = sequence
        attention_mask[row_number, : len(sequence)] = 1
    return SeparateBatch(
        torch.from_numpy(input_ids),
        torch.from_numpy(attention_mask),
        margins=torch.from_numpy(dataset.margins[order]),
        indices=np.array(order),
        needed_tokens=int(dataset.packed_lengths[order].sum()),
    )


def micro_batches_of(
    dataset: PairDataset,
    indices: np.ndarray,
    tokens_per_batch: int,
    batch_size: int,
    pad_id: int,
    costly_width: float | None,
) -> Iterator[PackedBatch | SeparateBatch]:
    """The micro-batches of one step (or, a few thousand pairs at a time, of an evaluation).

    `costly_width` is that of `plan_micro_batches`; None puts every side in a row of its own.
    """
    for start in range(0, len(indices), PAIRS_PLANNED_AT_ONCE):
        part = indices[start : start + PAIRS_PLANNED_AT_ONCE]
        if costly_width is not None:
            lengths = dataset.packed_lengths[part]
            for rows in plan_micro_batches(lengths, tokens_per_batch, batch_size, costly_width):
                yield pack(dataset, part, rows, pad_id)
        else:
            for rows in plan_separate_rows(dataset.longest_sides()[part], tokens_per_batch, batch_size):
                yield separate(dataset, part, rows, pad_id)
