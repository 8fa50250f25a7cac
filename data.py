"""From pairs of dialogues to packed tensors: tokenising, the cache, the step's plan, packing.

Nothing here knows attention masks, rewards or losses.

Letters: B rows, T tokens per row, N pairs.
"""

from __future__ import annotations

import bisect
import functools
import hashlib
import itertools
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import utils
from rows import LEFT_OUT, NOTED, Pair, Source, find_sources, read_pairs

CACHE_VERSION = 1  # raise it when parsing or tokenising changes what comes out
ROWS_AT_A_TIME = 2000
MOST_LEFT_OUT = 0.10
MICRO_BATCH_START = 256  # starting a forward costs about as much as so many tokens
LEAST_COSTLY_WIDTH = 2048  # small models would rather have narrow rows, but those are filled below 95 %
PAIRS_PLANNED_AT_ONCE = 4096  # more would pack no better and take memory for their tensors

# ---------------------------------------------------------------------------------------------------------------------
# Tokenised pairs
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class Counts:
    """What became of every row of a source, with the numbers of the first few of each sort."""

    rows: int = 0
    count: Counter = field(default_factory=Counter)
    first_rows: dict[str, list[int]] = field(default_factory=dict)

    def add(self, key: str, row: int) -> None:
        self.count[key] += 1
        if len(self.first_rows.setdefault(key, [])) < 5:
            self.first_rows[key].append(row)

    @property
    def left_out(self) -> int:
        return sum(self.count[key] for key in LEFT_OUT)

    def lines(self) -> list[str]:
        """A line for each sort of row that is not plainly kept."""
        lines = []
        for texts, verb in ((LEFT_OUT, "left out"), (NOTED, "kept")):
            for key, text in texts.items():
                if self.count[key]:
                    rows = ", ".join(str(row) for row in self.first_rows[key])
                    more = ", …" if self.count[key] > len(self.first_rows[key]) else ""
                    plural = "row" if self.count[key] == 1 else "rows"
                    lines.append(f"  {verb} {self.count[key]:,} {text} ({plural} {rows}{more})")
        return lines


class PairDataset:
    """Tokenised pairs, each stored once as `[prefix | chosen tail | rejected tail]`, memory-mapped from the cache.

    The prefix is the longest common prefix of the two token sequences, at most so long that each side keeps a token.
    """

    def __init__(self, folder: Path, name: str, max_length: int | None = None):
        report = utils.read_json(folder / "report.json")
        self.name, self.kind_names = name, report["kinds"]
        self.counts = Counts(report["rows"], Counter(report["count"]), report["first_rows"])
        lengths = np.load(folder / "lengths.npy")  # (N, 3): prefix, chosen tail, rejected tail
        rows = np.load(folder / "rows.npy")  # (N,) line or row number in the source
        starts = np.concatenate([[0], np.cumsum(lengths.sum(axis=1, dtype=np.int64))])
        self._tokens = (
            np.memmap(folder / "tokens.bin", dtype=np.int32, mode="r") if starts[-1] else np.zeros(0, np.int32)
        )
        longest_side = lengths[:, 0] + np.maximum(lengths[:, 1], lengths[:, 2])
        fits = longest_side <= (max_length or np.iinfo(np.int32).max)
        for row in rows[~fits]:
            self.counts.add("too_long", int(row))
        self.lengths, self.rows, self._starts = lengths[fits], rows[fits], starts[:-1][fits]
        self.margins = np.load(folder / "margins.npy")[fits]  # (N,)
        self.kinds = np.load(folder / "kinds.npy")[fits]  # (N,) index into kind_names
        self.packed_lengths = self.lengths.sum(axis=1)  # (N,) tokens when the prefix is shared
        # What the pairs are, wherever they came from: resuming compares it.
        self.fingerprint = hashlib.sha256(report["tokens_sha256"].encode() + self.rows.tobytes()).hexdigest()

    def __len__(self) -> int:
        return len(self.lengths)

    def tokens(self, index: int) -> np.ndarray:
        """The ids of `[prefix | chosen tail | rejected tail]`."""
        start = self._starts[index]
        return self._tokens[start : start + self.packed_lengths[index]]

    def sequences(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """The pair as two plain sequences of ids: (chosen, rejected)."""
        prefix, chosen, _ = self.lengths[index]
        ids = self.tokens(index)
        return ids[: prefix + chosen], np.concatenate([ids[:prefix], ids[prefix + chosen :]])

    def refuse_if_too_much_is_left_out(self) -> None:
        """Raise UserError if more than a tenth of the rows cannot be used."""
        if self.counts.left_out > MOST_LEFT_OUT * self.counts.rows:
            share = self.counts.left_out / self.counts.rows
            raise utils.UserError(
                f"{share:.0%} of the rows would be left out",
                where=self.name,
                found="\n".join(["", *self.counts.lines()]).replace("\n", "\n  "),
                next="mend the data, raise --max_length, or accept it with --bad_rows skip",
            )


def load_pairs(dataset: str, tokenizer: Any, max_length: int | None = None) -> tuple[PairDataset, PairDataset]:
    """The train and test pairs of a dataset, tokenised now or read from the cache, up to `max_length` tokens a side."""
    sources = find_sources(dataset)
    tokenizer.backend_tokenizer.no_padding()  # some published tokenizers pad or cut on their own
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer_print = hashlib.sha256(
        (tokenizer.backend_tokenizer.to_str() + str(tokenizer.chat_template)).encode()
    ).hexdigest()
    return tuple(
        PairDataset(_cached(source, tokenizer, tokenizer_print), source.name, max_length) for source in sources
    )


def cache_root() -> Path:
    default = os.environ.get("XDG_CACHE_HOME") or os.environ.get("LOCALAPPDATA") or Path.home() / ".cache"
    return Path(os.environ.get("RL_WITH_RM_CACHE") or Path(default) / "rl-with-rm")


def _cached(source: Source, tokenizer: Any, tokenizer_print: str) -> Path:
    key = hashlib.sha256(f"{CACHE_VERSION}/{source.fingerprint()}/{tokenizer_print}".encode()).hexdigest()[:32]
    folder = cache_root() / key
    if not (folder / "report.json").exists():
        try:
            with utils.published_folder(folder, f".tmp-{key}-{os.getpid()}") as temporary:
                _tokenise(source, tokenizer, temporary)
        except FileExistsError:
            return folder  # another process was faster, with the same result
        except PermissionError as error:
            raise utils.DiskOrNetworkError(
                "the token cache cannot be written", where=cache_root(), found=error,
                next="set RL_WITH_RM_CACHE to a folder of yours",
            ) from error  # fmt: skip
    return folder


def _tokenise(source: Source, tokenizer: Any, folder: Path) -> None:
    counts, kind_names = Counts(), [""]
    lengths, rows, margins, kinds = [], [], [], []
    started, last_shown = time.monotonic(), time.monotonic()
    with (folder / "tokens.bin").open("wb") as tokens_file:
        pairs = read_pairs(source)
        while chunk := list(itertools.islice(pairs, ROWS_AT_A_TIME)):
            counts.rows += len(chunk)
            for row, pair, chosen, rejected in _encode(chunk, tokenizer, counts):
                prefix = shared_prefix(chosen, rejected)
                np.concatenate([chosen, rejected[prefix:]]).tofile(tokens_file)
                lengths.append((prefix, len(chosen) - prefix, len(rejected) - prefix))
                rows.append(row)
                margins.append(pair.margin)
                if pair.kind not in kind_names:
                    kind_names.append(pair.kind)
                kinds.append(kind_names.index(pair.kind))
                for note in pair.notes:
                    counts.add(note, row)
            if time.monotonic() - last_shown > 5:
                last_shown = time.monotonic()
                rate = counts.rows / (last_shown - started)
                print(
                    f"tokenising {source.name}: {counts.rows:,} pairs, {rate:,.0f} pairs/s", file=sys.stderr, flush=True
                )
    np.save(folder / "lengths.npy", np.array(lengths, dtype=np.int32).reshape(-1, 3))
    np.save(folder / "rows.npy", np.array(rows, dtype=np.int64))
    np.save(folder / "margins.npy", np.array(margins, dtype=np.float32))
    np.save(folder / "kinds.npy", np.array(kinds, dtype=np.int32))
    utils.write_json(
        folder / "report.json",
        {"rows": counts.rows, "count": counts.count, "first_rows": counts.first_rows, "kinds": kind_names,
         "tokens_sha256": utils.sha256_of(folder / "tokens.bin"), "source": source.name},
    )  # fmt: skip


def _encode(chunk: list[tuple[int, Pair | str]], tokenizer: Any, counts: Counts) -> list[tuple[int, Pair, Any, Any]]:
    """Template and tokenise a chunk of rows; (row, pair, chosen ids, rejected ids) of those that are pairs."""
    kept, texts = [], []
    for row, pair in chunk:
        if isinstance(pair, str):
            counts.add(pair, row)
            continue
        try:
            rendered = tokenizer.apply_chat_template([pair.chosen, pair.rejected], tokenize=False)
        except Exception as error:  # templates raise what they like; their own complaint is jinja2's TemplateError
            if type(error).__name__ != "TemplateError":
                raise
            counts.add("template", row)
            continue
        kept.append((row, pair))
        texts += rendered
    # `encode_batch_fast` skips the offsets into the text, which nothing here needs
    encodings = tokenizer.backend_tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    ids = [np.array(encoding.ids, dtype=np.int32) for encoding in encodings]
    result = []
    for (row, pair), chosen, rejected in zip(kept, ids[::2], ids[1::2], strict=True):
        if np.array_equal(chosen, rejected):  # different texts, same tokens
            counts.add("identical", row)
        else:
            result.append((row, pair, chosen, rejected))
    return result


def shared_prefix(chosen: np.ndarray, rejected: np.ndarray) -> int:
    """Tokens that two sequences share from the start, leaving each at least one of its own.

    [a b c] and [a b d e] -> 2; [a b c] and [a b c d] -> 2, so that c is read in both branches.
    """
    shortest = min(len(chosen), len(rejected))
    differ = np.flatnonzero(chosen[:shortest] != rejected[:shortest])
    return min(int(differ[0]) if len(differ) else shortest, shortest - 1)


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
            longest_sides = dataset.lengths[part, 0] + dataset.lengths[part, 1:].max(axis=1)
            for rows in plan_separate_rows(longest_sides, tokens_per_batch, batch_size):
                yield separate(dataset, part, rows, pad_id)
