"""One model's scores of a dataset: kept on disk as they come, then gathered into a table of numbers.

The log on disk is why an evaluation that was killed goes on where it was. The table is all that the figures of a report
are computed from; texts never enter it, so a million rows fit in memory.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import sqlite3
import sys
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

import utils
from common.progress import ProgressBar
from data import Counts
from data_pipeline.parsing import SKIP_REASONS
from data_pipeline.tokenization import TokenizedGroup, tokenize_groups
from evaluation import reward_bench
from evaluation.eval_data import Comparison, Data, Row
from modeling.scorer import Scorer

ROWS_AT_A_TIME = 2048
SILENT_SECONDS = 10  # before progress is shown

# ---------------------------------------------------------------------------------------------------------------------
# On disk
# ---------------------------------------------------------------------------------------------------------------------

# rewards and reply lengths, the chosen replies first; or why the row is skipped, a key of SKIP_REASONS
Scores = tuple[list[float], list[int]] | str
SCHEMA = """
CREATE TABLE evaluation (key TEXT);
CREATE TABLE scores (position INTEGER PRIMARY KEY, rewards BLOB, lengths BLOB, skipped TEXT);
"""
DAMAGED = (sqlite3.SQLITE_ERROR, sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)  # an error: no such table


class ScoreLog:
    """The scores of one model on one set of rows, which `key` names: an SQLite file, deleted once the report is there.

    What was added survives a killed process. A file that is damaged or holds something else is replaced.
    """

    def __init__(self, folder: Path, key: str):
        self.path = folder / f".partial-{key[:24]}.sqlite"
        with self._disk_errors():
            try:
                self._connect(key)
            except (sqlite3.Error, ValueError) as error:
                if isinstance(error, sqlite3.Error) and error.sqlite_errorcode & 0xFF not in DAMAGED:
                    raise
                self.delete()
                self._connect(key)
        self.found = len(self)  # rows that were there when it was opened

    def _connect(self, key: str) -> None:
        """Open the file; ValueError or sqlite3.Error if it is damaged or not ours."""
        is_new = not self.path.exists() or not self.path.stat().st_size
        # the thread that reads the rows asks which of them are known, while this one adds
        self._database = sqlite3.connect(self.path, check_same_thread=False)
        self._database.execute("PRAGMA synchronous = OFF")  # a power cut may cost the file, but not a killed process
        if is_new:
            self._database.executescript(SCHEMA)
            with self._database:
                self._database.execute("INSERT INTO evaluation VALUES (?)", (key,))
        (state,) = self._database.execute("PRAGMA quick_check(1)").fetchone()
        keys = self._database.execute("SELECT key FROM evaluation").fetchall()
        reasons = self._database.execute("SELECT DISTINCT skipped FROM scores WHERE skipped NOT NULL").fetchall()
        if state != "ok" or keys != [(key,)] or not {reason for (reason,) in reasons} <= SKIP_REASONS.keys():
            raise ValueError(state)

    @contextlib.contextmanager
    def _disk_errors(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise OSError(errno.EIO, str(error), str(self.path)) from error

    def __len__(self) -> int:
        return self._database.execute("SELECT COUNT(*) FROM scores").fetchone()[0]

    def __contains__(self, position: int) -> bool:
        found = self._database.execute("SELECT 1 FROM scores WHERE position = ?", (position,))
        return found.fetchone() is not None

    def __getitem__(self, position: int) -> Scores:
        found = self._database.execute("SELECT rewards, lengths, skipped FROM scores WHERE position = ?", (position,))
        return _scores(*found.fetchone())

    def items(self) -> Iterator[tuple[int, Scores]]:
        """(position, scores) of every row, in order."""
        rows = self._database.execute("SELECT position, rewards, lengths, skipped FROM scores ORDER BY position")
        for position, *found in rows:
            yield position, _scores(*found)

    def add(self, rows: Iterable[tuple[int, Sequence[float], Sequence[int]]]) -> None:
        """Keep (position, rewards, reply lengths) of some rows."""
        self._insert(
            (position, array("f", rewards).tobytes(), array("i", lengths).tobytes(), None)
            for position, rewards, lengths in rows
        )

    def skip(self, rows: Iterable[tuple[int, str]]) -> None:
        """Keep (position, a key of SKIP_REASONS) of rows that cannot be scored."""
        self._insert((position, None, None, reason) for position, reason in rows)

    def _insert(self, rows: Iterable[tuple]) -> None:
        with self._disk_errors(), self._database:
            self._database.executemany("INSERT OR REPLACE INTO scores VALUES (?, ?, ?, ?)", rows)

    def close(self) -> None:
        self._database.close()

    def delete(self) -> None:
        self.close()
        for path in (self.path, self.path.with_name(f"{self.path.name}-journal")):
            path.unlink(missing_ok=True)


def _scores(rewards: bytes | None, lengths: bytes | None, skipped: str | None) -> Scores:
    return skipped or (array("f", rewards).tolist(), array("i", lengths).tolist())


# ---------------------------------------------------------------------------------------------------------------------
# Scoring
# ---------------------------------------------------------------------------------------------------------------------


def score_dataset(
    scorer: Scorer, data: Data, folder: Path, check_stop: Callable[[], None], name: str
) -> tuple[ScoreTable, ScoreLog]:
    """Score all rows of `data`, going on from what a killed evaluation left in `folder`.

    The log still exists when this returns; whoever writes the report deletes it after that.
    """
    folder.mkdir(parents=True, exist_ok=True)
    key = hashlib.sha256(json.dumps([scorer.fingerprint, data.fingerprint()]).encode()).hexdigest()
    log, columns = ScoreLog(folder, key), RowColumns()
    if log.found:
        print(f"{name}: going on after {log.found:,} rows that were scored before", file=sys.stderr, flush=True)
    bar = ProgressBar(name, data.num_rows, done=log.found, unit="rows", first_after=SILENT_SECONDS, stream=sys.stderr)
    try:
        score_rows(scorer, data.read(), log, columns, bar, check_stop)
    except BaseException:
        with contextlib.suppress(sqlite3.Error):  # the error that matters is already on its way
            if kept := len(log):
                utils.say_if_heard(f"{name}: the scores of {kept:,} rows are kept; the same command goes on from there")
            log.close()
        raise
    finally:
        bar.close()
    return build_table(log, columns, scorer.fingerprint), log


def score_rows(
    scorer: Scorer, rows: Iterator[Row], log: ScoreLog, columns: RowColumns, bar: ProgressBar,
    check_stop: Callable[[], None],
) -> None:  # fmt: skip
    """Score every row that the log does not hold yet. A second thread reads and tokenizes the next rows meanwhile."""

    def next_chunk() -> list[tuple[int, TokenizedGroup | str]]:
        """(position, tokens or the reason for skipping) of the next unknown rows; [] at the end."""
        chunk: list[Row] = []
        for row in rows:
            columns.add(row)
            if row.position not in log:
                chunk.append(row)
            if len(chunk) == ROWS_AT_A_TIME:
                break
        jobs = [row.content.dialogues for row in chunk if not isinstance(row.content, str)]
        tokenized = iter(tokenize_groups(jobs, scorer.model.tokenizer, scorer.max_length))
        return [
            (row.position, row.content if isinstance(row.content, str) else _checked(row.content, next(tokenized)))
            for row in chunk
        ]

    with ThreadPoolExecutor(1) as reader:
        ahead, done = reader.submit(next_chunk), log.found
        while chunk := ahead.result():
            ahead = reader.submit(next_chunk)
            skipped = [(position, found) for position, found in chunk if isinstance(found, str)]
            jobs = [(position, found) for position, found in chunk if not isinstance(found, str)]
            log.skip(skipped)
            done += len(skipped)
            for batch in scorer.rewards([found.ids for _, found in jobs], check_stop):
                scored = [(*jobs[number], rewards) for number, rewards in batch]
                log.add((position, rewards, found.reply_lengths) for position, found, rewards in scored)
                done += len(batch)
                bar.update(done)


def _checked(content: Comparison, found: TokenizedGroup | str) -> TokenizedGroup | str:
    """Different texts may be the same tokens, and then there is nothing to compare."""
    if isinstance(found, str):
        return found
    chosen, rejected = found.ids[: len(content.chosen)], found.ids[len(content.chosen) :]
    return "identical" if any(np.array_equal(a, b) for a in chosen for b in rejected) else found


# ---------------------------------------------------------------------------------------------------------------------
# In memory
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class ScoreTable:
    """The scores of one model as columns: M comparisons that were scored, N pairs (chosen, rejected) in them."""

    subset_names: list[str]
    positions: np.ndarray  # (M,)
    places: np.ndarray  # (M, 2) part and row number
    subsets: np.ndarray  # (M,) index into subset_names
    turns: np.ndarray  # (M,)
    reward_margins: np.ndarray  # (M,) lowest reward of a chosen reply − highest of a rejected one
    longest: np.ndarray  # (M,) tokens of the longest reply
    rewards: np.ndarray  # (N, 2) chosen, rejected: the first chosen reply against each rejected one
    lengths: np.ndarray  # (N, 2) tokens
    longer_by: np.ndarray  # (M, 2) tokens by which every chosen reply is longer than every rejected one, and shorter
    guessing: float  # the accuracy of guessing: with c chosen and r rejected replies, 1 in (c + r choose c)
    groups: list[reward_bench.Group]  # of rows with lists of replies; else empty
    counts: Counts
    fingerprint: str


@dataclass
class RowColumns:
    """What the rows are besides their scores, gathered while they are read; a number or two per row."""

    places: array = field(default_factory=lambda: array("q"))
    subsets: array = field(default_factory=lambda: array("i"))
    turns: array = field(default_factory=lambda: array("i"))
    chosen: array = field(default_factory=lambda: array("i"))  # how many chosen replies
    keys: dict[int, str] = field(default_factory=dict)  # of rows with lists of replies only
    names: dict[str, int] = field(default_factory=dict)

    def add(self, row: Row) -> None:
        content = None if isinstance(row.content, str) else row.content
        self.places.extend((row.part, row.number))
        self.subsets.append(self.names.setdefault(content.subset if content else "", len(self.names)))
        self.turns.append(content.turns if content else 0)
        self.chosen.append(len(content.chosen) if content else 0)
        if content and content.is_listed:
            self.keys[row.position] = content.key


def build_table(log: ScoreLog, columns: RowColumns, fingerprint: str) -> ScoreTable:
    """The log's rewards and lengths beside what was noted of its rows."""
    counts, names = Counts(len(columns.turns)), list(columns.names)
    places = np.array(columns.places, dtype=np.int64).reshape(-1, 2)
    scored, groups = array("q"), []
    margins, longest, rewards, lengths = array("d"), array("i"), array("f"), array("i")
    longer_by, chances = array("i"), 0.0
    for position, found in log.items():
        if isinstance(found, str):
            counts.add(found, int(places[position, 1]))
            continue
        values, tokens = found
        n = columns.chosen[position]
        scored.append(position)
        margins.append(min(values[:n]) - max(values[n:]))
        longest.append(max(tokens))
        longer_by.extend((min(tokens[:n]) - max(tokens[n:]), min(tokens[n:]) - max(tokens[:n])))
        chances += 1 / math.comb(len(values), n)
        for value, length in zip(values[n:], tokens[n:], strict=True):
            rewards.extend((values[0], value))
            lengths.extend((tokens[0], length))
        if position in columns.keys:
            name = names[columns.subsets[position]]
            groups.append(reward_bench.Group(name, columns.keys[position], tuple(values[:n]), tuple(values[n:])))
    at = np.array(scored, dtype=np.int64)
    return ScoreTable(
        names, at, places[at], np.array(columns.subsets)[at], np.array(columns.turns)[at], np.array(margins),
        np.array(longest), np.array(rewards).reshape(-1, 2), np.array(lengths).reshape(-1, 2),
        np.array(longer_by).reshape(-1, 2), chances / len(scored) if scored else 0.5, groups, counts, fingerprint,
    )  # fmt: skip
