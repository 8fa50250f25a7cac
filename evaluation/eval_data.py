"""The data of an evaluation: which files, which of their rows, and what each row compares.

Rows are read as in training (data_pipeline/). In addition, a row of RewardBench 2 has one prompt with several chosen or
rejected replies, and a folder may hold many files, by which the accuracy is then broken down.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from common import hub
from data_pipeline import parsing, sampler, shapes, sources
from data_pipeline.messages import Messages, RowError
from data_pipeline.sources import Source
from evaluation import reward_bench
from utils import UserError, nearest

SPLITS = {"train": ("train",), "test": sources.TEST_NAMES}
EXPECTED_ROW = "chosen and rejected, a text, a list of messages or for several replies a list of those"
SUBSET_COLUMNS = ("subset", "kind")  # the first that a row has


@dataclass(frozen=True)
class Part:
    """One file or split, and its name in the breakdown if it is one of several."""

    name: str
    source: Source


@dataclass(frozen=True)
class Comparison:
    """Dialogues that end in a chosen reply, and dialogues that end in a rejected one; for a pair one of each."""

    chosen: tuple[Messages, ...]
    rejected: tuple[Messages, ...]
    subset: str
    key: str | None  # the `id` of a row with lists of replies, as RewardBench 2's are; else None
    tools: Any = None  # what the assistant could call

    @property
    def is_pair(self) -> bool:
        return len(self.chosen) == len(self.rejected) == 1

    @property
    def turns(self) -> int:
        """Number of user turns in the first chosen dialogue."""
        return sum(message["role"] == "user" for message in self.chosen[0])


@dataclass(frozen=True)
class Row:
    """One row of the data: what it compares, or the key of `parsing.SKIP_REASONS` that says why it is skipped."""

    position: int  # counted from 0 over all rows that are read
    part: int
    number: int  # line or row number in its file
    content: Comparison | str

    @property
    def dialogues(self) -> list[Messages] | str:
        return self.content if isinstance(self.content, str) else [*self.content.chosen, *self.content.rejected]


@dataclass(frozen=True)
class Data:
    """The rows to compare: what --dataset and --split name, and which rows of it."""

    dataset: str
    split: str
    parts: tuple[Part, ...]
    subset_column: str | None  # whose values name the subsets
    chosen_rows: frozenset[tuple[int, int]] | None = None  # (part, number); None: all
    num_rows: int | None = None  # how many rows `read` yields, if they were counted
    notes: tuple[str, ...] = ()  # what the user should know about how the files were chosen

    def fingerprint(self) -> list[Any]:
        """Changes whenever the rows, their order or their selection change."""
        chosen = None if self.chosen_rows is None else sorted(self.chosen_rows)
        return [[part.source.fingerprint() for part in self.parts], self.subset_column, chosen]

    def read(self) -> Iterator[Row]:
        """The rows in order. UserError says what is broken and where."""
        position = 0
        for part_number, part in enumerate(self.parts):
            for number, row in sources.read_rows(part.source):
                if self.chosen_rows is not None and (part_number, number) not in self.chosen_rows:
                    continue
                content = self._parse(part, number, row)
                if part.source.includes(row, prompt_of(content)):
                    yield Row(position, part_number, number, content)
                    position += 1

    def _parse(self, part: Part, number: int, row: Any) -> Comparison | str:
        row_error = parsing.row_errors(part.source.place, number, EXPECTED_ROW)
        shape = parsing.recognised(row, row_error)
        subset = self._subset(part, row, row_error)
        if shape.columns != ("chosen", "rejected"):
            return _comparison(parsing.parse_row(row, row_error), 1, subset)
        (view,) = shapes.views(row, shape)
        chosen, rejected = (_replies(row[column], column, row_error) for column in ("chosen", "rejected"))
        # each chosen reply beside the first rejected one, then each other rejected one beside the first chosen one
        beside = [(reply, rejected[0]) for reply in chosen] + [(chosen[0], reply) for reply in rejected[1:]]
        pairs = [parsing.parse_pair({**view, "chosen": a, "rejected": b}, row_error) for a, b in beside]
        is_listed = chosen[0] is not row["chosen"] or rejected[0] is not row["rejected"]
        return _comparison(pairs, len(chosen), subset, str(row.get("id") or "") if is_listed else None)

    def _subset(self, part: Part, row: dict[str, Any], row_error: RowError) -> str:
        if self.subset_column is None and len(self.parts) > 1:
            return part.name
        columns = (self.subset_column,) if self.subset_column else SUBSET_COLUMNS
        column = next((name for name in columns if name in row), None)
        if column is None and self.subset_column:
            raise row_error(f"no column {self.subset_column!r} (--subset_column){nearest(self.subset_column, row)}")
        value = row.get(column)
        return "" if value is None else str(value).encode("utf-8", "replace").decode()


def _comparison(
    pairs: list[parsing.Pair | str], num_chosen: int, subset: str, key: str | None = None
) -> Comparison | str:
    """A row's pairs, the first `num_chosen` of which have chosen replies of their own, as one comparison."""
    if reasons := [pair for pair in pairs if isinstance(pair, str)]:
        return reasons[0]
    return Comparison(
        chosen=tuple(pair.chosen for pair in pairs[:num_chosen]),
        rejected=tuple(pair.rejected for pair in [pairs[0], *pairs[num_chosen:]]),
        subset=subset,
        key=key,
        tools=pairs[0].tools,
    )


def prompt_of(content: Comparison | str) -> Messages | None:
    return None if isinstance(content, str) else content.chosen[0][:-1]


def _replies(value: Any, column: str, row_error: RowError) -> list[Any]:
    """The replies of one side: a list of texts or of message lists holds several, a list of messages is one."""
    if not isinstance(value, list) or any(isinstance(item, dict) for item in value):
        return [value]
    if not value:
        raise row_error(f"{column!r} is an empty list")
    return value


def is_of_benchmark(row: Any) -> bool:
    """Whether a row can only come from a benchmark: it has several replies, or a subset of RewardBench's."""
    if not isinstance(row, dict):
        return False
    sides = [row.get("chosen"), row.get("rejected")]
    several = any(isinstance(side, list) and side and not isinstance(side[0], dict) for side in sides)
    return several or row.get("subset") in reward_bench.SUBSETS


# -- Finding -----------------------------------------------------------------------------------------------------------


def find(dataset: str, split: str, subset_column: str | None) -> Data:
    """The files or hub splits that `--dataset` and `--split` name; "all" means every row.

    For a single file, and for a folder with train.* but no test.*, `test` is what training holds out. Of a folder with
    neither, all files are read, or those of the split in each folder inside it, as in HH-RLHF's repository.
    """
    hub.check_path_exists(dataset, "--dataset")
    path = Path(dataset).expanduser()
    notes: list[str] = []
    if path.is_file():
        parts = [Part("", _in_file(path, split))]
    elif path.is_dir():
        parts, notes = _in_folder(path, split)
    else:
        parts = [Part("", source) for source in _on_hub(dataset, split)]
    for source in (part.source for part in parts if part.source.part != "all"):
        held_out = f"by prompt, 1 in {sources.HELD_OUT_IN} is held out, as in train_rm.py"
        notes.append(f"the {split} split of {source.name}: {held_out}; --split all takes every row")
    return Data(dataset, split, tuple(parts), subset_column, notes=tuple(notes))


def _in_file(path: Path, split: str) -> Source:
    train, test = sources.find_sources(str(path))
    whole = replace(test, part="all")
    if split not in (*SPLITS, "all"):
        raise UserError(f"--split {split}: a single file has train, test and all", where=path)
    first = next((row for _, row in itertools.islice(sources.read_rows(whole), 1)), None)
    if split == "all" or is_of_benchmark(first):  # training never holds out a part of a benchmark
        return whole
    return train if split == "train" else test


def _in_folder(folder: Path, split: str) -> tuple[list[Part], list[str]]:
    files = sorted(path for path in folder.iterdir() if path.is_file() and path.name.endswith(hub.DATA_SUFFIXES))
    names = SPLITS.get(split, (split,))
    if split in SPLITS and sources.source_in(folder, ("train",)):
        return [Part("", sources.find_sources(str(folder))[split == "test"])], []
    if split != "all" and (found := sources.source_in(folder, names)):
        return [Part("", found)], []
    if files and split not in (*SPLITS, "all"):
        raise UserError(
            f"--split {split}: no such file", where=folder, found=", ".join(p.name for p in files[:8]),
            next="--split takes train, test, all or a file's name without its ending",
        )  # fmt: skip
    if files:
        return [Part(_stem(path), Source(str(path), path)) for path in files], []
    wanted = [(name,) for names in SPLITS.values() for name in names] if split == "all" else [names]
    parts, without = [], []
    for inner in sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")):
        inside = [Part(inner.name, source) for names in wanted if (source := sources.source_in(inner, names))]
        parts += inside
        if not inside:
            without.append(inner.name)
    if not parts:
        found = ", ".join(sorted(path.name for path in folder.iterdir())[:8]) or "nothing"
        raise UserError(f"--dataset is a folder without a {split} file", where=folder, found=found)
    return parts, [f"skipped: {name}, a folder without a {split} file" for name in without]


def _stem(path: Path) -> str:
    return path.name.removesuffix(next(suffix for suffix in hub.DATA_SUFFIXES if path.name.endswith(suffix)))


def _on_hub(dataset: str, split: str) -> list[Source]:
    if split in SPLITS:
        return [sources.find_sources(dataset)[split == "test"]]
    splits = sources.hub_splits(dataset)
    names = list(splits) if split == "all" else [split]
    if split not in (*splits, "all"):
        raise UserError(
            f"--split {split}: {dataset} has no such split{nearest(split, splits)}", found=", ".join(splits)
        )
    return [Source(f"{dataset} {name}", hub_rows=splits[name]) for name in names]


def sample(data: Data, size: int) -> Data:
    """`size` rows spread over all of them, the same every time; all of them if there are no more or size is 0."""
    places = [
        (part_number, number)
        for part_number, part in enumerate(data.parts)
        for number, row in sources.read_rows(part.source)
        if part.source.part == "all" or part.source.includes(row, prompt_of(data._parse(part, number, row)))
    ]
    if not size or size >= len(places):
        return replace(data, num_rows=len(places))
    chosen = sampler.fixed_sample(len(places), size, seed=0)
    return replace(data, chosen_rows=frozenset(places[index] for index in chosen), num_rows=size)
