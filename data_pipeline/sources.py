"""Preference data: find its files or hub splits, and read their rows.

A broken file (invalid JSON, a truncated archive) is an error that names file, line and reason.
"""

import dataclasses
import gzip
import hashlib
import json
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import hub
from common.json_records import reject_repeated_keys
from utils import UserError, sha256_of

SUFFIXES = hub.DATA_SUFFIXES
TEST_NAMES = ("test", "validation", "eval")
FIX = "fix this place in the file, then run the same command again"
HELD_OUT_IN = 20  # without a test split, one prompt in 20 is held out


@dataclass(frozen=True)
class Source:
    """One split of a dataset: a local file, or a split on the hub."""

    name: str
    path: Path | None = None
    part: str = "all"  # "all", or "train" / "test" of a file that is split by the hash of its prompts
    hub_rows: Any = None  # a datasets.Dataset

    def fingerprint(self) -> str:
        """Changes whenever the rows do: the key of the token cache."""
        content = sha256_of(self.path) if self.path else self.hub_rows._fingerprint
        return f"{content}/{self.part}"

    def includes(self, row: Any, prompt: list[dict[str, Any]] | None) -> bool:
        """Whether a row of the file, with this prompt, belongs to this part of it."""
        return self.part == "all" or (self.part == "test") == is_held_out(row, prompt)

    def place(self, row: int) -> str:
        """`file:line`, or the row number where there are no lines."""
        is_lines = self.path is not None and ".jsonl" in self.path.name
        return f"{self.name}:{row}" if is_lines else f"{self.name}, row {row}"


# -- Finding -----------------------------------------------------------------------------------------------------------


def find_sources(dataset: str) -> tuple[Source, Source]:
    """The train and test split of a hub id, a file, or a folder with `train.*` and `test.*`."""
    hub.check_path_exists(dataset, "--dataset")
    path, test = Path(dataset).expanduser(), None
    if path.is_file():
        if not path.name.endswith(SUFFIXES):
            wanted = f"expected: {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}"
            raise UserError("--dataset is not a supported file type", where=path, next=wanted)
        train = Source(str(path), path)
    elif path.is_dir():
        train, test = (source_in(path, stems) for stems in (("train",), TEST_NAMES))
        if train is None:
            found = ", ".join(sorted(p.name for p in path.iterdir())[:8]) or "nothing"
            advice = "name its training file train.jsonl, or pass a single file"
            raise UserError("--dataset is a folder without a train file", where=path, found=found, next=advice)
    else:
        splits = hub_splits(dataset)
        train, test = (_source_on_hub(dataset, splits, stems) for stems in (("train",), TEST_NAMES))
        if train is None:
            raise UserError("--dataset has no train split", where=dataset, found=", ".join(splits))
    if test is None:
        return dataclasses.replace(train, part="train"), dataclasses.replace(train, part="test")
    return train, test


def _source_on_hub(dataset: str, splits: Any, stems: tuple[str, ...]) -> Source | None:
    """The first split whose name starts with one of `stems`, earlier stems first."""
    name = next((name for stem in stems for name in splits if name.startswith(stem)), None)
    return None if name is None else Source(f"{dataset} {name}", hub_rows=splits[name])


def source_in(folder: Path, stems: tuple[str, ...]) -> Source | None:
    """The folder's data file for the first of `stems` that has one; UserError if a stem has two files."""
    for stem in stems:
        found = [folder / f"{stem}{suffix}" for suffix in SUFFIXES if (folder / f"{stem}{suffix}").is_file()]
        if len(found) > 1:
            raise UserError(
                f"--dataset has more than one {stem} file", where=folder, found=", ".join(p.name for p in found),
                next="keep one of them there, or name the file itself",
            )  # fmt: skip
        if found:
            return Source(str(found[0]), found[0])
    return None


def hub_splits(dataset: str) -> Any:
    """All splits of a dataset on the hub, or of its local copy: name -> datasets.Dataset."""
    instead = "python train_rm.py --demo   (offline), or --dataset FILE.jsonl"
    local_only = hub.only_local_copy(dataset, "dataset", "--dataset", instead)
    import datasets

    if local_only:
        datasets.config.HF_HUB_OFFLINE = True  # or it retries for half a minute before looking in its cache
    try:
        return datasets.load_dataset(dataset)
    except Exception as error:  # its errors have no common base class
        raise UserError(
            "--dataset cannot be opened", where=dataset, found=f"{type(error).__name__}: {error}"
        ) from error


def is_held_out(row: Any, prompt: list[dict[str, Any]] | None) -> bool:
    """Decided by the prompt's hash: rows of one prompt stay together, and a file that grows keeps its split.

    Of the prompt as it was parsed, so that it is the same question in whatever form; if it says nothing, of the row.
    """
    content: Any = row
    if any(message["content"].strip() for message in prompt or []):
        content = [[message["role"], " ".join(message["content"].split())] for message in prompt]
    digest = hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).digest()
    return int.from_bytes(digest[:8], "big") % HELD_OUT_IN == 0


# -- Reading -----------------------------------------------------------------------------------------------------------


def read_rows(source: Source) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (line or row number from 1, row) of a source's file or hub split. UserError names what is broken."""
    if source.path is None:
        yield from enumerate(source.hub_rows, start=1)
    elif source.path.name.endswith((".jsonl", ".jsonl.gz")):
        yield from _json_lines(source, source.path)
    elif source.path.suffix == ".json":
        yield from _json_list(source.path)
    else:
        yield from _parquet(source.path)


def _json_lines(source: Source, path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    open_file = gzip.open if path.suffix == ".gz" else open
    number = 0
    try:
        with open_file(path, "rb") as file:
            for number, row in parse_json_lines(file, source.place):
                yield number, row
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(
            "the data file is damaged or cut off", where=f"{source.name}, after line {number}", found=error,
            next="download or write the file again",
        ) from error  # fmt: skip


def parse_json_lines(lines: Iterable[bytes], place: Callable[[int], str]) -> Iterator[tuple[int, Any]]:
    """Yield (line number from 1, content) of JSONL; empty lines are skipped. `place` names a line in errors."""
    for number, line in enumerate(lines, start=1):
        if number == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")  # a byte-order mark is not part of the row
        if line.strip():
            yield number, _parse_json(place(number), line)


def _parse_json(place: str, text: bytes) -> Any:
    """The content of a line, or of a whole file: then the error itself names the line."""
    try:
        return json.loads(text.decode("utf-8"), object_pairs_hook=reject_repeated_keys)
    except UnicodeDecodeError as error:
        line = text.count(b"\n", 0, error.start) + 1
        found = f"byte {text[error.start]:#04x}" + (f" in line {line}" if line > 1 else "")
        raise UserError("the data is not UTF-8 text", where=place, found=found, next=FIX) from error
    except (ValueError, RecursionError) as error:
        raise UserError("the data is not JSON", where=place, found=error, next=FIX) from error


def _json_list(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    text = path.read_bytes().removeprefix(b"\xef\xbb\xbf")
    if text.lstrip()[:1] == b"{" and b"\n" in text.strip():  # lines of JSON under another name
        yield from parse_json_lines(text.splitlines(), f"{path}:{{}}".format)
        return
    content = _parse_json(str(path), text)
    if not isinstance(content, list):
        raise UserError(
            "a .json file must hold one list of rows", where=path, found=type(content).__name__,
            next="for one row per line, name the file .jsonl",
        )  # fmt: skip
    yield from enumerate(content, start=1)


def _parquet(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches(1000):
            for row in batch.to_pylist():
                number += 1
                yield number, row
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise UserError(
            "the data file is damaged, or not a parquet file", where=f"{path}, after row {number}", found=error,
            next="download or write the file again",
        ) from error  # fmt: skip
