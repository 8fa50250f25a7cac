"""From token ids to packed tensors: how a step is cut into micro-batches, and packing.

Nothing here knows attention masks, rewards or losses.

Letters: B rows, T tokens per row, N pairs.
"""

from __future__ import annotations

import bisect
import collections
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from data import PairDataset

MICRO_BATCH_START = 256  # starting a forward costs about as much as so many tokens
LEAST_COSTLY_WIDTH = 2048  # small models would rather have narrow rows, but those are filled below 95 %
WIDTH_STEP = 64  # packed rows are as wide as a multiple of this: see `packed_width`
PAIRS_PLANNED_AT_ONCE = 4096  # more would pack no better and take memory for their tensors

# ---------------------------------------------------------------------------------------------------------------------
# Planning: how a step is cut into micro-batches
# ---------------------------------------------------------------------------------------------------------------------


Rows = list[list[int]]  # for each row, the positions of its pairs


@dataclass(frozen=True, eq=False)
class MicroBatchPlan:
    """One micro-batch before its tensors are made: cheap to keep, to count and to deal out."""

    indices: np.ndarray  # (N,) which pairs of the dataset, in the order of the batch
    rows: Rows  # for each row, the positions in `indices` of its pairs
    is_packed: bool  # whether the two sides of a pair share a row; if not, each has one of its own
    width: int  # T, padding included
    needed_tokens: int
    cost: float  # estimated, in tokens of a short row; see `cost_of`

    @property
    def pairs(self) -> int:
        return len(self.indices)

    @property
    def computed_tokens(self) -> int:
        return len(self.rows) * self.width * (1 if self.is_packed else 2)


def cost_of(rows: int, width: int, costly_width: float) -> float:
    """What a forward and backward of rows · width tokens costs, in tokens of a short row.

    Tokens are dearer the wider their row, because attention looks along all of it; and each micro-batch has a start.
    """
    return rows * width * (1 + width / max(costly_width, LEAST_COSTLY_WIDTH)) + MICRO_BATCH_START


def plan_step(
    dataset: PairDataset, indices: np.ndarray, tokens_per_batch: int, batch_size: int, costly_width: float | None
) -> list[MicroBatchPlan]:
    """The micro-batches of one step (or of an evaluation), still without tensors: `build` makes those.

    Deterministic: the same arguments give the same list, on every machine.

    Args:
        indices: (N,) pairs of `dataset`.
        tokens_per_batch, batch_size, costly_width: as in `plan_micro_batches`; a `costly_width` of None puts every
            side in a row of its own, for models that cannot share prefixes.
    """
    return list(_plans(dataset, indices, tokens_per_batch, batch_size, costly_width))


def _plans(
    dataset: PairDataset, indices: np.ndarray, tokens_per_batch: int, batch_size: int, costly_width: float | None
) -> Iterator[MicroBatchPlan]:
    """`plan_step`, a few thousand pairs at a time, so that the first micro-batch of a large split is soon there."""
    longest_sides = None if costly_width is not None else dataset.longest_sides()
    for start in range(0, len(indices), PAIRS_PLANNED_AT_ONCE):
        part = np.asarray(indices[start : start + PAIRS_PLANNED_AT_ONCE])
        lengths = dataset.packed_lengths[part]
        if costly_width is not None:
            cut = plan_micro_batches(lengths, tokens_per_batch, batch_size, costly_width)
        else:
            cut = plan_separate_rows(longest_sides[part], tokens_per_batch, batch_size)
        for rows in cut:
            order = [position for row in rows for position in row]
            if costly_width is not None:
                height, width = len(rows), packed_width([int(lengths[row].sum()) for row in rows], tokens_per_batch)
            else:
                height, width = 2 * len(rows), int(longest_sides[part[order]].max())
            places = iter(range(len(order)))
            yield MicroBatchPlan(
                indices=part[order],
                rows=[[next(places) for _ in row] for row in rows],
                is_packed=costly_width is not None,
                width=width,
                needed_tokens=int(lengths[order].sum()),
                cost=cost_of(height, width, costly_width or LEAST_COSTLY_WIDTH),
            )


def packed_width(row_lengths: Sequence[int], tokens_per_batch: int) -> int:
    """How wide the rows of a micro-batch are: a multiple of `WIDTH_STEP` if the token budget allows that.

    On a CPU oneDNN compiles a kernel for each new shape of a matrix product, which takes milliseconds, and keeps a
    thousand of them, a megabyte or more each. A few widths that come again and again spare both, and since rows are
    filled up to such a width, they are padded hardly more.
    """
    widest = max(row_lengths)
    return min(_rounded_up(widest), max(widest, tokens_per_batch // len(row_lengths)))


def _rounded_up(width: int) -> int:
    return -(-width // WIDTH_STEP) * WIDTH_STEP


def plan_micro_batches(lengths: np.ndarray, tokens_per_batch: int, batch_size: int, costly_width: float) -> list[Rows]:
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
        widths = {max(width, min(_rounded_up(width), tokens_per_batch)) for width in widths}
        tried = [_fill_rows(left, width, tokens_per_batch, batch_size) for width in sorted(widths)]
        rows = max(tried, key=lambda rows: _useful_work(rows, lengths, tokens_per_batch, costly_width))
        micro_batches.append(rows)
        taken = {position for row in rows for position in row}
        left = [pair for pair in left if pair[1] not in taken]
    return micro_batches


def _fill_rows(left: list[tuple[int, int]], width: int, tokens_per_batch: int, batch_size: int) -> Rows:
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


def _useful_work(rows: Rows, lengths: np.ndarray, tokens_per_batch: int, costly_width: float) -> float:
    """Needed tokens for each unit of cost."""
    row_lengths = [sum(int(lengths[position]) for position in row) for row in rows]
    return sum(row_lengths) / cost_of(len(rows), packed_width(row_lengths, tokens_per_batch), costly_width)


def plan_separate_rows(longest_sides: np.ndarray, tokens_per_batch: int, batch_size: int) -> list[Rows]:
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

    def inputs(self) -> tuple[Tensor, ...]:
        """What the reward model's forward takes."""
        return self.input_ids, self.position_ids, self.pair_ids, self.branch_ids, self.ends

    def to(self, device: torch.device) -> PackedBatch:
        return _moved(self, device)

    def pinned(self) -> PackedBatch:
        return _pinned(self)


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

    def inputs(self) -> tuple[Tensor, ...]:
        """What the reward model's forward takes."""
        return self.input_ids, self.attention_mask

    def to(self, device: torch.device) -> SeparateBatch:
        return _moved(self, device)

    def pinned(self) -> SeparateBatch:
        return _pinned(self)


def _moved(batch: Any, device: torch.device) -> Any:
    return _with_each_tensor(batch, lambda tensor: tensor.to(device, non_blocking=True))


def _pinned(batch: Any) -> Any:
    """In memory that a CUDA device reads by itself: only from there does a copy run beside the computing."""
    return _with_each_tensor(batch, torch.Tensor.pin_memory)


def _with_each_tensor(batch: Any, change: Callable[[Tensor], Tensor]) -> Any:
    tensors = {name: change(value) for name, value in vars(batch).items() if torch.is_tensor(value)}
    return type(batch)(**{**vars(batch), **tensors})


def pack(dataset: PairDataset, indices: np.ndarray, rows: Rows, pad_id: int, width: int) -> PackedBatch:
    """The tensors of one micro-batch of `plan_micro_batches`; `rows` hold positions in `indices`."""
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


def separate(dataset: PairDataset, indices: np.ndarray, rows: Rows, pad_id: int, width: int) -> SeparateBatch:
    """The same pairs, each side in a row of its own."""
    order = [int(indices[i]) for row in rows for i in row]
    sequences = [sequence for index in order for sequence in dataset.sequences(index)]
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


def build(dataset: PairDataset, plan: MicroBatchPlan, pad_id: int) -> PackedBatch | SeparateBatch:
    """The tensors of a planned micro-batch."""
    return (pack if plan.is_packed else separate)(dataset, plan.indices, plan.rows, pad_id, plan.width)


def micro_batches_of(
    dataset: PairDataset,
    indices: np.ndarray,
    tokens_per_batch: int,
    batch_size: int,
    pad_id: int,
    costly_width: float | None,
) -> Iterator[PackedBatch | SeparateBatch]:
    """The micro-batches of `plan_step` one after another, each built when it is asked for."""
    for plan in _plans(dataset, indices, tokens_per_batch, batch_size, costly_width):
        yield build(dataset, plan, pad_id)


def prefetched(plans: Iterable[Any], build: Callable[[Any], Any], depth: int = 1) -> Iterator[Any]:
    """`build(plan)` for each of `plans` in order, up to `depth` of them made ahead in a thread.

    What `build` raises comes out where its batch would have. Who stops early closes the generator, or drops it; what
    has not begun is then never built. `build` must draw no random numbers, for the draws' order would be chance.
    """
    ahead = collections.deque()
    with ThreadPoolExecutor(1, "prefetch") as thread:
        try:
            for plan in plans:
                ahead.append(thread.submit(build, plan))
                if len(ahead) > depth:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        finally:
            for future in ahead:
                future.cancel()
