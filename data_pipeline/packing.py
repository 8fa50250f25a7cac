"""From token ids to packed tensors: how a step is cut into micro-batches, and the tensors of each one.

An *example* is a prompt with its k completions: two for a preference pair (chosen, rejected). Packed, it takes one
stretch of a row, `[prompt | completion 1 | … | completion k]`, so the prompt is computed once. Nothing here knows
attention masks, rewards or losses.

Letters: B rows, T tokens per row, N examples, k completions per example.
"""

import bisect
import dataclasses
import heapq
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, Self

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from data_pipeline.tokenization import longest_sequences, split_sequences
from utils import round_up

MICRO_BATCH_OVERHEAD = 256  # starting a forward costs about as much as this many tokens
MIN_CROSSOVER_LENGTH = 2048  # small models would prefer narrow rows, but those are filled below 95 %
WIDTH_STEP = 64  # packed rows are as wide as a multiple of this: see `packed_width`
EXAMPLES_PLANNED_AT_ONCE = 4096  # planning more at once packs no better and takes longer

Rows = list[list[int]]  # for each row, the positions of its examples


class Examples(Protocol):
    """What packing needs of a dataset; `data.PairDataset` is one."""

    lengths: np.ndarray  # (N, 1 + k) tokens of the prompt and of each completion, which has at least one

    def tokens(self, index: int) -> np.ndarray:
        """The ids of `[prompt | completion 1 | … | completion k]`."""


# -- Planning: how a step is cut into micro-batches --------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class MicroBatchPlan:
    """One micro-batch before its tensors are made: cheap to keep, to count and to assign."""

    indices: np.ndarray  # (N,) which examples of the dataset, in the order of the batch
    rows: Rows  # for each row, the positions in `indices` of its examples
    is_packed: bool  # whether the completions of an example share a row; if not, each has its own
    width: int  # T, padding included
    needed_tokens: int  # with each prompt counted once
    computed_tokens: int  # B · T
    cost: float  # estimated, in tokens of a short row; see `cost_of`

    @property
    def num_examples(self) -> int:
        return len(self.indices)


def cost_of(rows: int, width: int, crossover_length: float) -> float:
    """What a forward and backward pass of rows · width tokens costs, in tokens of a short row.

    A token costs more the wider its row, because attention looks along all of it; and each micro-batch has an overhead.
    """
    return rows * width * (1 + width / max(crossover_length, MIN_CROSSOVER_LENGTH)) + MICRO_BATCH_OVERHEAD


def plan_step(
    dataset: Examples, indices: np.ndarray, tokens_per_batch: int, batch_size: int, crossover_length: float | None,
    alone_above: int | None = None,
) -> list[MicroBatchPlan]:  # fmt: skip
    """The micro-batches of one step (or of an evaluation), still without tensors: `build` makes those.

    Deterministic: the same arguments give the same list on every machine.

    Args:
        indices: (N,) examples of `dataset`.
        tokens_per_batch, batch_size, crossover_length: as in `plan_packed_rows`. An infinite crossover length means
            that a wide row costs no more than several narrow ones: each micro-batch is a single row. Without one each
            completion gets its own row, for models that cannot share prompts.
        alone_above: an example with a sequence of more tokens gets a micro-batch of its own, a row for each completion.
    """
    if alone_above is not None:
        is_alone = longest_sequences(dataset.lengths[indices]) > alone_above  # (N,)
        together = plan_step(dataset, indices[~is_alone], tokens_per_batch, batch_size, crossover_length)
        return plan_step(dataset, indices[is_alone], tokens_per_batch, 1, None) + together
    plans = []
    is_packed = crossover_length is not None
    for start in range(0, len(indices), EXAMPLES_PLANNED_AT_ONCE):
        part = np.asarray(indices[start : start + EXAMPLES_PLANNED_AT_ONCE])
        lengths = dataset.lengths[part]  # (n, 1 + k)
        packed = lengths.sum(axis=1)  # (n,)
        longest = longest_sequences(lengths)  # (n,)
        completions = lengths.shape[1] - 1
        is_single = is_packed and math.isinf(crossover_length)
        if is_single:
            micro_batches = plan_single_rows(packed, tokens_per_batch, batch_size)
        elif is_packed:
            micro_batches = plan_packed_rows(packed, tokens_per_batch, batch_size, crossover_length)
        else:
            micro_batches = plan_separate_rows(longest, tokens_per_batch, batch_size, completions)
        for rows in micro_batches:
            order = [position for row in rows for position in row]
            if is_single:
                height, width = 1, round_up(int(packed[order].sum()), WIDTH_STEP)
            elif is_packed:
                height, width = len(rows), packed_width([int(packed[row].sum()) for row in rows], tokens_per_batch)
            else:
                height, width = completions * len(rows), int(longest[order].max())
            positions = iter(range(len(order)))
            plans.append(
                MicroBatchPlan(
                    indices=part[order],
                    rows=[[next(positions) for _ in row] for row in rows],
                    is_packed=is_packed,
                    width=width,
                    needed_tokens=int(packed[order].sum()),
                    computed_tokens=height * width,
                    cost=cost_of(height, width, crossover_length or MIN_CROSSOVER_LENGTH),
                )
            )
    return plans


def packed_width(row_lengths: Sequence[int], tokens_per_batch: int) -> int:
    """How wide the rows of a micro-batch are: a multiple of `WIDTH_STEP` if the token budget allows that.

    On a CPU, oneDNN compiles a kernel for each new shape of a matrix product, which takes milliseconds, and keeps a
    thousand of them, a megabyte or more each. Using the same few widths again and again avoids both, and since rows are
    filled up to such a width, there is hardly more padding.
    """
    widest = max(row_lengths)
    return min(round_up(widest, WIDTH_STEP), max(widest, tokens_per_batch // len(row_lengths)))


def plan_packed_rows(
    lengths: np.ndarray, tokens_per_batch: int, batch_size: int, crossover_length: float
) -> list[Rows]:
    """Cut a step into micro-batches of rows of examples, with little padding and none above the token budget.

    The longest examples come first, so that memory peaks at once. Each micro-batch tries a few row widths, fills the
    rows best-fit decreasing, and takes the width that does the most useful work for its cost.

    Args:
        lengths: (N,) tokens of each packed example.
        tokens_per_batch: the upper limit for rows · width; a longer example gets its own micro-batch.
        batch_size: the most examples in a micro-batch.
        crossover_length: the row width at which a token costs twice what it does in a short row, because attention
            grows with the width. Wider rows are filled better and cost more; this weighs the two.

    Returns:
        For each micro-batch its rows, for each row the positions in `lengths` of its examples.
    """
    remaining = sorted((int(length), position) for position, length in enumerate(lengths))  # ascending
    micro_batches = []
    while remaining:
        longest, total = remaining[-1][0], sum(length for length, _ in remaining)
        widest = min(1024, tokens_per_batch)
        even_splits = [int(1.02 * total / rows) + 1 for rows in range(1, 9)]
        widths = [width for width in (128, 192, 256, 384, 512, 640, *even_splits) if longest < width <= widest]
        widths = {max(width, min(round_up(width, WIDTH_STEP), tokens_per_batch)) for width in (longest, *widths)}
        candidates = [_fill_rows(remaining, width, tokens_per_batch, batch_size) for width in sorted(widths)]
        rows = max(candidates, key=lambda rows: _useful_work(rows, lengths, tokens_per_batch, crossover_length))
        micro_batches.append(rows)
        taken = {position for row in rows for position in row}
        remaining = [example for example in remaining if example[1] not in taken]
    return micro_batches


def plan_single_rows(lengths: np.ndarray, tokens_per_batch: int, batch_size: int) -> list[Rows]:
    """The same with one row a micro-batch, all about equally wide, so that none is mostly padding.

    The longest examples come first, each into the row with the fewest tokens so far (Graham 1969); with one row more
    if that overfills any.
    """
    order = np.argsort(-lengths, kind="stable").tolist()
    room = max(WIDTH_STEP, tokens_per_batch // WIDTH_STEP * WIDTH_STEP)
    count = max(1, math.ceil(lengths.sum() / room), math.ceil(len(lengths) / batch_size))
    while True:
        rows: list[list[int]] = [[] for _ in range(count)]
        fewest = [(0, number) for number in range(count)]  # a heap: (tokens, row)
        for position in order:
            tokens, number = fewest[0]
            rows[number].append(position)
            heapq.heapreplace(fewest, (tokens + int(lengths[position]), number))
        is_within_room = all(len(rows[number]) == 1 or tokens <= room for tokens, number in fewest)
        if is_within_room and max(map(len, rows)) <= batch_size:
            return [[row] for row in sorted(rows, key=lambda row: -int(lengths[row].sum())) if row]
        count += max(1, count // 16)


def _fill_rows(remaining: list[tuple[int, int]], width: int, tokens_per_batch: int, batch_size: int) -> Rows:
    """Rows of `width` tokens, each filled with the longest example that still fits until none does."""
    remaining, rows, taken = list(remaining), [], 0
    while remaining and taken < batch_size and (not rows or (len(rows) + 1) * width <= tokens_per_batch):
        row, free = [], width
        while taken < batch_size and (fitting := bisect.bisect_right(remaining, free, key=lambda example: example[0])):
            length, position = remaining.pop(fitting - 1)
            row.append(position)
            free -= length
            taken += 1
        rows.append(row)
    return rows


def _useful_work(rows: Rows, lengths: np.ndarray, tokens_per_batch: int, crossover_length: float) -> float:
    """Needed tokens per unit of cost."""
    row_lengths = [sum(int(lengths[position]) for position in row) for row in rows]
    return sum(row_lengths) / cost_of(len(rows), packed_width(row_lengths, tokens_per_batch), crossover_length)


def plan_separate_rows(longest: np.ndarray, tokens_per_batch: int, batch_size: int, completions: int) -> list[Rows]:
    """The same with a row for each completion, padded to the longest of the micro-batch; `longest` is (N,)."""
    order = [int(position) for position in np.argsort(-longest, kind="stable")]
    micro_batches = []
    while order:
        size = max(1, min(batch_size, tokens_per_batch // int(completions * longest[order[0]])))
        micro_batches.append([[position] for position in order[:size]])
        order = order[size:]
    return micro_batches


# -- Packing: the tensors of a micro-batch -----------------------------------------------------------------------------


class _Batch:
    """Moves all tensors of one of the two dataclasses below at once."""

    def to(self, device: torch.device) -> Self:
        """On a device. The copy may still be going on only on CUDA: MPS would read memory that was freed meanwhile.

        https://github.com/pytorch/pytorch/issues/189690
        """
        return self._with_tensors(lambda tensor: tensor.to(device, non_blocking=device.type == "cuda"))

    def pinned(self) -> Self:
        """In page-locked memory, from which a copy to a CUDA device can overlap with computing."""
        return self._with_tensors(torch.Tensor.pin_memory)

    def _with_tensors(self, change: Callable[[Tensor], Tensor]) -> Self:
        tensors = {name: change(value) for name, value in vars(self).items() if torch.is_tensor(value)}
        return dataclasses.replace(self, **tensors)


@dataclass
class PackedBatch(_Batch):
    """One micro-batch: rows that each hold one or more examples as `[prompt | completion 1 | … | completion k]`.

    One row with a prompt p and the completions c and r:
        input_ids         p p c c r     position_ids   0 1 2 3 2
        completion_index  0 0 1 1 2     example_index  0 0 0 0 0    (-1 where padded)
    """

    input_ids: Tensor  # (B, T)
    position_ids: Tensor  # (B, T), going on from the prompt's in each completion
    example_index: Tensor  # (B, T), which example of the batch a token belongs to
    completion_index: Tensor  # (B, T), 0 in the prompt, 1 to k in the completions
    last_token_positions: Tensor  # (N, k), row · T + column of each completion's last token
    indices: np.ndarray  # (N,) which examples of the dataset
    block_counts: Tensor | None = None  # (B, n, n), what FlexAttention needs besides; see `flex.count_visible`

    def inputs(self) -> tuple[Tensor, ...]:
        """The arguments of the reward model's forward."""
        needed = self.input_ids, self.position_ids, self.example_index, self.completion_index, self.last_token_positions
        return needed if self.block_counts is None else (*needed, self.block_counts)


@dataclass
class SeparateBatch(_Batch):
    """One micro-batch with a row for each completion, behind its own copy of the prompt."""

    input_ids: Tensor  # (N · k, T): all completions of one example, then those of the next, padded on the right
    attention_mask: Tensor  # (N · k, T)
    prompt_lengths: Tensor  # (N · k,) tokens of the prompt in each row
    indices: np.ndarray  # (N,) which examples of the dataset

    def inputs(self) -> tuple[Tensor, ...]:
        """The arguments of the reward model's forward."""
        return self.input_ids, self.attention_mask


@dataclass
class TokenBatch(_Batch):
    """One micro-batch for a policy, which is asked about every token of the completions.

    The P tokens come example by example, completion by completion, as they are in both kinds of `batch`.
    """

    batch: PackedBatch | SeparateBatch
    sources: Tensor  # (P,) row · T + column of the token before each of them in its own sequence
    targets: Tensor  # (P,) their ids

    @property
    def indices(self) -> np.ndarray:
        return self.batch.indices

    def inputs(self) -> tuple[Tensor, ...]:
        """The arguments of the policy's forward."""
        batch = self.batch
        if isinstance(batch, SeparateBatch):
            return batch.input_ids, batch.attention_mask, self.sources, self.targets
        needed = batch.input_ids, batch.position_ids, batch.example_index, batch.completion_index
        more = () if batch.block_counts is None else (batch.block_counts,)
        return (*needed, self.sources, self.targets, *more)

    def _with_tensors(self, change: Callable[[Tensor], Tensor]) -> Self:
        inner = self.batch._with_tensors(change)
        return dataclasses.replace(self, batch=inner, sources=change(self.sources), targets=change(self.targets))


def with_targets(batch: PackedBatch | SeparateBatch) -> TokenBatch:
    """A micro-batch on the CPU with the places of its completions' tokens, and of those that predict them.

    [p p c c r] of a prompt and two completions: c, c and r, predicted from the second p, the first c, the second p.
    """
    width = batch.input_ids.shape[1]
    if isinstance(batch, SeparateBatch):
        columns = torch.arange(width)
        is_target = (columns >= batch.prompt_lengths[:, None]) & (batch.attention_mask > 0)  # (N · k, T)
        targets = is_target.flatten().nonzero()[:, 0]
        return TokenBatch(batch, targets - 1, batch.input_ids.flatten()[targets])
    examples, completions = batch.example_index.flatten(), batch.completion_index.flatten()
    targets = ((completions > 0) & (examples >= 0)).nonzero()[:, 0]  # (P,)
    is_first = (completions[targets] != completions[targets - 1]) | (examples[targets] != examples[targets - 1])
    in_prompt = ((completions == 0) & (examples >= 0)).nonzero()[:, 0]
    last_of_prompt = torch.zeros(len(batch.indices), dtype=torch.int64)
    last_of_prompt.scatter_reduce_(0, examples[in_prompt].long(), in_prompt, "amax")
    sources = torch.where(is_first, last_of_prompt[examples[targets].long()], targets - 1)
    return TokenBatch(batch, sources, batch.input_ids.flatten()[targets])


def pack(dataset: Examples, indices: np.ndarray, rows: Rows, pad_id: int, width: int) -> PackedBatch:
    """The tensors of one micro-batch of `plan_packed_rows`; `rows` hold positions in `indices`."""
    input_ids = np.full((len(rows), width), pad_id, dtype=np.int64)
    position_ids = np.zeros((len(rows), width), dtype=np.int64)
    example_index = np.full((len(rows), width), -1, dtype=np.int32)
    completion_index = np.zeros((len(rows), width), dtype=np.int32)
    last_token_positions, order = [], []
    for row_number, row in enumerate(rows):
        column = 0
        for i in row:
            index = int(indices[i])
            lengths = dataset.lengths[index]  # (1 + k,)
            prompt, ends = lengths[0], np.cumsum(lengths)
            columns = slice(column, column + ends[-1])
            numbers = np.repeat(np.arange(len(lengths)), lengths)  # 0 in the prompt, 1 to k in the completions
            # completion j starts at ends[j - 1] in the row, but at the prompt's end in its own sequence
            skipped = np.concatenate([[0], ends[:-1] - prompt])
            input_ids[row_number, columns] = dataset.tokens(index)
            position_ids[row_number, columns] = np.arange(ends[-1]) - skipped[numbers]
            example_index[row_number, columns] = len(order)
            completion_index[row_number, columns] = numbers
            last_token_positions.append(row_number * width + column + ends[1:] - 1)
            order.append(index)
            column = columns.stop
    arrays = input_ids, position_ids, example_index, completion_index, np.array(last_token_positions, dtype=np.int64)
    return PackedBatch(*map(torch.from_numpy, arrays), indices=np.array(order))


def separate(dataset: Examples, indices: np.ndarray, pad_id: int) -> SeparateBatch:
    """The tensors of one micro-batch of `plan_separate_rows`."""
    sequences = [
        torch.from_numpy(sequence.astype(np.int64))
        for index in indices
        for sequence in split_sequences(dataset.tokens(index), dataset.lengths[index])
    ]
    input_ids = pad_sequence(sequences, batch_first=True, padding_value=pad_id)
    attention_mask = pad_sequence([torch.ones_like(sequence) for sequence in sequences], batch_first=True)
    completions = dataset.lengths.shape[1] - 1
    prompt_lengths = torch.from_numpy(np.repeat(dataset.lengths[indices, 0], completions).astype(np.int64))
    return SeparateBatch(input_ids, attention_mask, prompt_lengths, indices)


def build(dataset: Examples, plan: MicroBatchPlan, pad_id: int) -> PackedBatch | SeparateBatch:
    """The tensors of a planned micro-batch."""
    if plan.is_packed:
        return pack(dataset, plan.indices, plan.rows, pad_id, plan.width)
    return separate(dataset, plan.indices, pad_id)
