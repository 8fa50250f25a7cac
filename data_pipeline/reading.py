"""A source of rows and how it is read: files of JSON lines, JSON, parquet or CSV, compressed or not, or a hub split.

A broken file (invalid JSON, a truncated archive, a pointer of Git LFS in its place) is an error that names file, line
and reason.
"""

import contextlib
import csv
import gzip
import itertools
import json
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common import hub
from common.json_records import reject_repeated_keys
from utils import UserError, sha256_of

SUFFIXES = hub.DATA_SUFFIXES
FIX = "fix this place in the file, then run the same command again"
AGAIN = "download or write the file again"
LONGEST_CELL = 2**31 - 1  # characters in a cell of a CSV file

HELD_OUT_IN = 20  # without a test split, one prompt in 20 is held out
Rows = Iterator[tuple[int, Any]]
Columns = tuple[tuple[str, str], ...]  # (name that we use, name in the data)


@dataclass(frozen=True)
class Source:
    """One split of a dataset: local files that follow one another, or a split on the hub."""

    name: str
    files: tuple[Path, ...] = ()
    part: str = "all"  # "all", or "train" / "test" of rows that are split by hash
    hub_rows: Any = None  # a datasets.Dataset
    columns: Columns = ()  # what `--columns` renames
    holds_out_rows: bool = False  # the hash is of the row and not of its prompt; see sampler.shares_prompts
    # numbers of rows before each file that was begun; a copy has its own
    starts: list[int] = field(default_factory=list, init=False, compare=False, repr=False)

    def fingerprint(self) -> str:
        """Changes whenever the rows of this part do."""
        return f"{self.cache_key()}/{self.part}/{self.holds_out_rows}"

    def cache_key(self) -> str:
        """Changes whenever the rows do; both parts of a source that is split have the same."""
        files = [sha256_of(path) + path.name.rpartition(".")[2] for path in self.files]
        content = files or [self.hub_rows._fingerprint]
        return "/".join([*content, str(self.columns), "all" if self.part == "all" else "split"])

    def rows(self) -> Iterator[tuple[int, Any]]:
        """Yield (number from 1, row); where there are several files, the numbers go on. UserError: what is broken."""
        if not self.files:
            yield from enumerate(self.hub_rows, start=1)
            return
        number = 0
        self.starts.clear()
        for path in self.files:
            self.starts.append(number)
            for at, row in rows_of(path):
                number = self.starts[-1] + at
                yield number, row

    def position(self, row: int) -> tuple[int, int]:
        """Where a row is that was read: (index into files, number there)."""
        at = max((at for at, start in enumerate(self.starts) if start < row), default=0)
        return at, row - self.starts[at] if self.starts else row

    def place(self, row: int) -> str:
        """`file:line`, or the row number where there are no lines."""
        if not self.files:
            return f"{self.name}, row {row}"
        at, number = self.position(row)
        return f"{self.files[at]}:{number}" if has_lines(self.files[at]) else f"{self.files[at]}, row {number}"

    def files_shared_with(self, other: "Source") -> list[tuple[int, int]]:
        """(index into files, index into the other's) of files of the same content; of one split on the hub, 0 and 0."""
        if not self.files or not other.files:
            is_same = not self.files and not other.files and self.hub_rows._fingerprint == other.hub_rows._fingerprint
            return [(0, 0)] * is_same
        return [
            (mine, yours)
            for mine, path in enumerate(self.files)
            for yours, other_path in enumerate(other.files)
            if _is_same_file(path, other_path)
        ]

    def row_name(self, row: int) -> str:
        """A row's number, with its file where there are several."""
        if len(self.files) < 2:
            return str(row)
        at, number = self.position(row)
        return f"{self.files[at].name}:{number}"

    def includes(self, prompt_digest: int, row_digest: int) -> bool:
        """Whether a row belongs to this part of the data."""
        digest = row_digest if self.holds_out_rows else prompt_digest
        return self.part == "all" or (self.part == "test") == (digest % HELD_OUT_IN == 0)


def _is_same_file(first: Path, second: Path) -> bool:
    if first.stat().st_size != second.stat().st_size:
        return False
    return first.samefile(second) or sha256_of(first) == sha256_of(second)


# -- Formats -----------------------------------------------------------------------------------------------------------


def rows_of(path: Path) -> Rows:
    """Yield (line or row number from 1, row) of a file. UserError names what is broken."""
    name = path.name.removesuffix(".gz")
    try:
        hub.check_no_pointer(path)
        if name.endswith(".jsonl"):
            yield from _json_lines(path)
        elif name.endswith(".json"):
            yield from _json_list(path)
        elif name.endswith(".csv"):
            yield from _csv(path)
        else:
            yield from _parquet(path)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError("the data file is damaged or cut off", where=path, found=error, next=AGAIN) from error


def has_lines(path: Path) -> bool:
    """Whether the numbers of a file's rows are those of its lines."""
    return path.name.endswith((".jsonl", ".jsonl.gz"))


def _open(path: Path) -> Any:
    return gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb")


def _json_lines(path: Path) -> Rows:
    number = 0
    try:
        with _open(path) as file:
            for number, row in parse_json_lines(file, f"{path}:{{}}".format):
                yield number, row
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        where = f"{path}, after line {number}"
        raise UserError("the data file is damaged or cut off", where=where, found=error, next=AGAIN) from error


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


def _json_list(path: Path) -> Rows:
    with _open(path) as file:
        text = file.read().removeprefix(b"\xef\xbb\xbf")
    if text.lstrip()[:1] == b"{" and not _is_one_value(text):  # lines of JSON under another name
        yield from parse_json_lines(text.splitlines(), f"{path}:{{}}".format)
        return
    content = _parse_json(str(path), text)
    if isinstance(content, dict) and len(content) == 1:  # {"data": [...]}
        (content,) = content.values()
    if not isinstance(content, list):
        raise UserError(
            "a .json file must hold one list of rows", where=path, found=type(content).__name__,
            next="for one row per line, name the file .jsonl",
        )  # fmt: skip
    yield from enumerate(content, start=1)


def _is_one_value(text: bytes) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _csv(path: Path) -> Rows:
    """Cells are text, or None where they are empty; a margin is a number."""
    csv.field_size_limit(LONGEST_CELL)
    number = 0
    try:
        with _open(path) as file:
            lines = (line.decode("utf-8-sig" if at == 0 else "utf-8") for at, line in enumerate(file))
            first = next(lines, "")
            separator = max(",;\t", key=first.count)
            reader = csv.reader(itertools.chain([first], lines), delimiter=separator, strict=True)
            columns = next(reader, [])
            if len(set(columns)) < len(columns):
                raise UserError("the data file has two columns of one name", where=path, found=", ".join(columns))
            for number, cells in enumerate(filter(None, reader), start=1):
                if len(cells) != len(columns):
                    found = f"{len(cells)} cells, where the first line has {len(columns)}"
                    raise UserError(
                        "a row of the data is not whole", where=f"{path}, row {number}", found=found, next=FIX
                    )
                row = {column: cell or None for column, cell in zip(columns, cells, strict=True)}
                if row.get("margin"):
                    with contextlib.suppress(ValueError):  # which is for the row to answer for
                        row["margin"] = float(row["margin"])
                yield number, row
    except (csv.Error, UnicodeDecodeError) as error:
        raise UserError(
            "the data is not CSV in UTF-8", where=f"{path}, after row {number}", found=error, next=FIX
        ) from error


def _parquet(path: Path) -> Rows:
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
