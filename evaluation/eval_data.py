"""The data of an evaluation: which files, which of their rows, and what each row compares.

Rows are read as in training (data_pipeline/). In addition, a row of RewardBench 2 has one prompt with several chosen or
rejected replies, and a folder may hold many files, by which the accuracy is then broken down.
"""

import contextlib
import functools
import hashlib
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import utils
from common import hub
from data_pipeline import parsing, sampler, sources
from data_pipeline.messages import Messages, RowError
from data_pipeline.reading import HELD_OUT_IN, Source
from data_pipeline.sources import DataSpec
from evaluation import reward_bench
from utils import UserError, nearest

SPLITS = ("train", "test")
EXPECTED_ROW = (
    "chosen and rejected, a text, a list of messages or for several replies a list of those;\n          "
    "--columns prompt=NAME,chosen=NAME,rejected=NAME reads columns of other names"
)
SUBSET_COLUMNS = ("subset", "kind")  # the first that a row has
TRAINED_ON = "trained_on"  # of parsing.SKIP_REASONS


@dataclass(frozen=True)
class Part:
    """One file or split, and its name in the breakdown if it is one of several."""

    name: str
    source: Source
    seen: frozenset[int] = frozenset()  # pairs that a model was trained on, which are skipped; see `_digests`
    seen_rows: frozenset[tuple[int, int]] = frozenset()  # (file, row) that a model was trained on: not of this part
    drops_seen: bool = False  # rows that were trained on are not of this part, instead of being skipped


@dataclass(frozen=True)
class Comparison:
    """Dialogues that end in a chosen reply, and dialogues that end in a rejected one; for a pair one of each."""

    chosen: tuple[Messages, ...]
    rejected: tuple[Messages, ...]
    subset: str
    key: str | None  # the `id` of a row with lists of replies, as RewardBench 2's are; else None
    tools: Any = None  # what the assistant could call
    unused: tuple[str, ...] = ()  # columns like those of a dialogue that are not in it
    shape: str = ""  # what the row was read as, if not as chosen and rejected

    @property
    def is_pair(self) -> bool:
        return len(self.chosen) == len(self.rejected) == 1

    @property
    def turns(self) -> int:
        """Number of user turns in the first chosen dialogue."""
        return sum(message["role"] == "user" for message in self.chosen[0])


@dataclass(frozen=True)
class Row:
    """One row of the data: what it compares, or the reason (see parsing.py) why it is skipped."""

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
        seen = [_digest_of_all(part.seen) for part in self.parts]
        rows = [sorted(part.seen_rows) for part in self.parts]
        return [[part.source.fingerprint() for part in self.parts], seen, rows, self.subset_column, chosen]

    def read(self) -> Iterator[Row]:
        """The rows in order. UserError says what is broken and where."""
        for position, (part_number, number, _, content) in enumerate(self._rows()):
            yield Row(position, part_number, number, content)

    def places(self) -> list[tuple[int, int, bool]]:
        """(part, row number, whether a model was trained on it) of all rows that `read` yields."""
        return [(part_number, number, content == TRAINED_ON) for part_number, number, _, content in self._rows()]

    def row_name(self, place: tuple[int, int]) -> str:
        """A row, given as (part, number): its number, with its file or part where there are several."""
        part, number = place
        name = self.parts[part].source.row_name(number)
        return f"{self.parts[part].name}:{number}" if len(self.parts) > 1 and name == str(number) else name

    def _rows(self) -> Iterator[tuple[int, int, Any, Comparison | str]]:
        for part_number, part in enumerate(self.parts):
            for number, row, content in self._parsed(part):
                if self.chosen_rows is not None:
                    is_wanted = (part_number, number) in self.chosen_rows
                else:
                    is_whole = part.source.part == "all"
                    is_wanted = is_whole or part.source.includes(*sampler.digests(row, prompt_of(content)))
                    is_wanted = is_wanted and part.source.position(number) not in part.seen_rows
                if is_wanted:
                    is_known = (
                        part.seen and not isinstance(content, str) and not part.seen.isdisjoint(_digests(content))
                    )
                    if not (is_known and part.drops_seen):
                        yield part_number, number, row, TRAINED_ON if is_known else content

    def _parsed(self, part: Part) -> Iterator[tuple[int, Any, Comparison | str]]:
        parse = functools.partial(self._parse, part)
        return parsing.parsed(part.source.rows(), part.source.place, EXPECTED_ROW, parse)

    def with_held_out(self) -> "Data":
        """The same, knowing for each part that is split by hash whether rows or prompts are drawn."""
        parts = []
        for part in self.parts:
            if part.source.part != "all":
                kept = ((n, row, found) for n, row, found in self._parsed(part) if not isinstance(found, str))
                shares = sampler.shares_prompts(
                    (n, sampler.digests(row, prompt_of(found))[0]) for n, row, found in kept
                )
                part = replace(part, source=replace(part.source, holds_out_rows=shares))
            parts.append(part)
        return replace(self, parts=tuple(parts))

    def _parse(self, part: Part, row: Any, row_error: RowError) -> Comparison | str:
        columns = part.source.columns
        view = parsing.with_columns(row, columns, row_error)
        shape = parsing.recognised(view, row_error)
        subset = self._subset(part, view, row_error)
        if shape.columns != ("chosen", "rejected"):
            return _comparison(parsing.parse_row(row, row_error, columns), 1, subset)
        chosen, rejected = (_replies(view[column], column, row_error) for column in shape.columns)
        # each chosen reply beside the first rejected one, then each other rejected one beside the first chosen one
        beside = [(reply, rejected[0]) for reply in chosen] + [(chosen[0], reply) for reply in rejected[1:]]
        pairs = [pair for a, b in beside for pair in parsing.parse_row({**view, "chosen": a, "rejected": b}, row_error)]
        is_listed = chosen[0] is not view["chosen"] or rejected[0] is not view["rejected"]
        return _comparison(pairs, len(chosen), subset, str(row.get("id") or "") if is_listed else None)

    def _subset(self, part: Part, row: dict[str, Any], row_error: RowError) -> str:
        if self.subset_column is None and len(self.parts) > 1:
            return part.name
        columns = (self.subset_column,) if self.subset_column else SUBSET_COLUMNS
        column = next((name for name in columns if name in row), None)
        if column is None and self.subset_column:
            guess = nearest(self.subset_column, row)
            raise row_error(f"no column {self.subset_column!r} (--subset_column){guess}", "no_columns")
        value = row.get(column)
        return "" if value is None else str(value).encode("utf-8", "replace").decode()


def _comparison(
    pairs: list[parsing.Pair | str], num_chosen: int, subset: str, key: str | None = None
) -> Comparison | str:
    """A row's pairs, the first `num_chosen` of which have chosen replies of their own, as one comparison."""
    reasons = [pair for pair in pairs if isinstance(pair, str)]
    if reasons and (key is not None or len(reasons) == len(pairs)):  # a benchmark's row is whole, or it is none
        return reasons[0]
    pairs = [pair for pair in pairs if not isinstance(pair, str)]
    return Comparison(
        chosen=tuple(pair.chosen for pair in pairs[:num_chosen]),
        rejected=tuple(pair.rejected for pair in [pairs[0], *pairs[num_chosen:]]),
        subset=subset,
        key=key,
        tools=pairs[0].tools,
        unused=pairs[0].unused,
        shape=pairs[0].shape,
    )


def _digests(content: Comparison) -> list[int]:
    """A digest of each pair of a chosen and a rejected reply."""
    return [parsing.pair_digest(one, other) for one in content.chosen for other in content.rejected]


@functools.lru_cache(maxsize=4)  # many parts have the same
def _digest_of_all(seen: frozenset[int]) -> str:
    return hashlib.sha256(str(sorted(seen)).encode()).hexdigest()


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


@dataclass(frozen=True)
class Trained:
    """What a model was trained on, as far as its checkpoint says."""

    spec: DataSpec | None
    pairs: frozenset[int] | None = None  # of `parsing.pair_digest`


def find(spec: DataSpec, split: str, subset_column: str | None, trained: Iterable[Trained] = ()) -> Data:
    """The files or hub splits that `--dataset` and `--split` name; "all" means every row.

    `trained` says what the models were trained on: pairs of that are never scored as "test", under whatever name they
    come. Of other files every row is scored. Of a folder without training data all files are read.
    """
    trained = tuple(trained)
    parts: list[Part] = []
    notes: list[str] = []
    for name in sources.dataset_names(spec.dataset):
        one = sources.without_subset(replace(spec, dataset=name))
        hub.check_path_exists(one.dataset, "--dataset")
        path = Path(one.dataset).expanduser()
        found = _in_file(path, one, split) if path.is_file() else _in_folder(one, split, notes)
        known = [known for other in trained for known in _known(other, one)]
        for part in found:
            part = replace(part, source=replace(part.source, columns=spec.columns))
            parts.append(_unless_trained_on(part, split, known, notes))
    if len(parts) == 1:
        parts = [replace(parts[0], name="")]
    return Data(spec.dataset, split, tuple(parts), subset_column, notes=tuple(notes)).with_held_out()


def of_training(spec: DataSpec, places: Iterable[tuple[int, int]]) -> Data:
    """Some rows of a training's test split: (index of the test source, row number)."""
    test = sources.find_sources(spec).test
    parts = tuple(Part(source.name if len(test) > 1 else "", source) for source in test)
    chosen = frozenset(places)
    return Data(spec.dataset, "test", parts, None, chosen_rows=chosen, num_rows=len(chosen))


def _in_file(path: Path, spec: DataSpec, split: str) -> list[Part]:
    train, test = (found[0] for found in sources.find_sources(replace(spec, split=None, test_split=None))[:2])
    if split not in (*SPLITS, "all"):
        raise UserError(f"--split {split}: a single file has train, test and all", where=path)
    first = next((row for _, row in itertools.islice(test.rows(), 1)), None)
    if split == "all" or is_of_benchmark(first):  # training never holds out a part of a benchmark
        return [Part(sources.stem(path), replace(test, part="all"))]
    return [Part(sources.stem(path), train if split == "train" else test)]


def _in_folder(spec: DataSpec, split: str, notes: list[str]) -> list[Part]:
    """The parts of a folder, or of a dataset on the hub."""
    path = Path(spec.dataset).expanduser()
    subsets, more = sources.splits_of(spec, roles=SPLITS)
    notes += more
    parts = []
    for subset, splits in subsets.items():
        name, wanted = subset or Path(spec.dataset).name, spec.test_split if split == "test" else spec.split
        named = sources.best_split([name for name in splits if name], split) if split in SPLITS else None
        trains = sources.best_split(splits, "train") is not None
        if split == "all":
            parts += [Part(" ".join(filter(None, (subset, each))), splits[each]) for each in splits]
        elif split not in SPLITS:
            if split not in splits:
                found = ", ".join(filter(None, splits)) or "files without a split's name"
                raise UserError(f"--split {split}: no such split{nearest(split, splits)}", where=path, found=found)
            parts.append(Part(name, splits[split]))
        elif "" in splits and not named and not wanted:  # files whose purpose no name tells, as a benchmark has
            parts.append(Part(name, splits[""]))
        elif trains or wanted:
            train, test, more = sources.train_and_test(subset, splits, spec)
            notes += more
            parts.append(Part(name, test if split == "test" else train))
        elif named:
            parts.append(Part(name, splits[named]))
        else:
            raise UserError(
                f"--dataset has no {split} data", where=path, found=", ".join(splits), next="--split NAME takes one"
            )
    if len(parts) == 1 and len(files := parts[0].source.files) > 1 and "" in next(iter(subsets.values())):
        return [Part(sources.stem(file), replace(parts[0].source, name=str(file), files=(file,))) for file in files]
    return parts


@dataclass(frozen=True)
class _Known:
    """What is known of a training's data: its pairs, and its files as far as they are still here."""

    train: tuple[Source, ...]
    test: tuple[Source, ...]
    pairs: frozenset[int] | None

    def seen(self) -> frozenset[int]:
        """Digests of all pairs that were trained on: the checkpoint's, else those of the files."""
        if self.pairs is not None:
            return self.pairs
        return frozenset(digest for source in self.train for _, digest in _training_pairs(source))


def _known(trained: Trained, evaluated: DataSpec) -> Iterator[_Known]:
    """What is known of a training's data; the hub is only asked about a set that is evaluated."""
    if trained.pairs is not None:
        yield _Known((), (), trained.pairs)
    for name in sources.dataset_names(trained.spec.dataset) if trained.spec else ():
        one = sources.without_subset(replace(trained.spec, dataset=name))
        if hub.looks_like_a_path(one.dataset) or one.dataset == evaluated.dataset:
            with contextlib.suppress(UserError, OSError):  # it may have moved, or changed
                found = sources.find_sources(one)
                yield _Known(found.train, found.test, trained.pairs)


def _unless_trained_on(part: Part, split: str, known: list[_Known], notes: list[str]) -> Part:
    """A part, or those of its rows that no model was trained on, unless "train" or "all" is asked for."""
    source = part.source
    trained = next((found for found in known for other in found.train if other.files_shared_with(source)), None)
    same = trained and next(other for other in trained.train if other.files_shared_with(source))
    held_out = f"1 in {HELD_OUT_IN} is held out, as in train_rm.py"
    if split == "all":
        return part
    if split == "train":
        is_split = same is not None and same.part != "all"
        if is_split:
            notes.append(f"the train split of {source.name}: {held_out}; --split all takes every row")
        return replace(part, source=replace(source, part="train" if is_split else "all")) if same else part
    seen = frozenset().union(*(found.seen() for found in known))
    if same is None:
        if source.part != "all":
            notes.append(f"{source.name}: scored whole, " + ("but for what was trained on" if known else
                         "because no training on it is known"))  # fmt: skip
    elif same.part != "all":
        what = held_out if trained.pairs is None else "what was not trained on"
        notes.append(f"the {split} split of {source.name}: {what}; --split all takes every row")
        if trained.pairs is None:
            # not decided anew: of one file among several, or with other columns, other rows could be drawn
            part = replace(part, seen_rows=_rows_of(same, source))
    # what was held out is a part of the file, the rest is not; elsewhere a row that was trained on is counted
    is_rest_elsewhere = same is not None and same.part != "all"
    return replace(part, source=replace(source, part="all"), seen=seen, drops_seen=is_rest_elsewhere)


def _rows_of(trained: Source, source: Source) -> frozenset[tuple[int, int]]:
    """(file, row) of a source that another, which shares files with it, trains on."""
    found = {trained.position(row) for row, _ in _training_pairs(trained, is_whole_rows=True)}
    return frozenset(
        (mine, number) for mine, yours in source.files_shared_with(trained) for at, number in found if at == yours
    )


def _training_pairs(source: Source, is_whole_rows: bool = False) -> Iterator[tuple[int, int]]:
    """(row, digest) of the pairs that a source trains on; with `is_whole_rows` of rows without a pair too."""
    rows = [(row, row.pair) for row in parsing.read_pairs(source)]
    prompts = ((row.row, row.digests[0]) for row, pair in rows if not isinstance(pair, str))
    shares = source.part != "all" and sampler.shares_prompts(prompts)
    source = replace(source, holds_out_rows=shares)
    for row, pair in rows:
        if source.includes(*row.digests) and (is_whole_rows or not isinstance(pair, str)):
            yield row.row, 0 if isinstance(pair, str) else parsing.pair_digest(pair.chosen, pair.rejected)


def sample(data: Data, size: int) -> Data:
    """`size` rows spread over all of them, the same every time; all of them if there are no more or size is 0."""
    rows = data.places()
    places = [(part, number) for part, number, is_known in rows if not is_known]
    if rows and not places:
        raise UserError(
            "these rows are what the model was trained on, so they cannot test it", where=data.dataset,
            safe="nothing was scored", next="--dataset with its test split, or --split train to score them as such",
        )  # fmt: skip
    if not size or size >= len(places):
        return replace(data, num_rows=len(rows))
    chosen = sampler.fixed_sample(len(places), size, seed=0)
    notes = data.notes
    if known := len(rows) - len(places):
        notes += (f"{utils.counted(known, 'row')} that a model was trained on cannot be drawn",)
    places = frozenset(places[index] for index in chosen)
    return replace(data, chosen_rows=places, num_rows=size, notes=notes)
