"""One model's scores of a dataset: kept on disk as they come, then gathered into a table of numbers.

The log on disk lets a killed evaluation continue where it was. The report's figures are computed from the table alone;
it holds no texts, so a million rows fit in memory.
"""

import contextlib
import hashlib
import json
import math
import sqlite3
import sys
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import utils
from common.atomic_files import database_errors
from common.progress import ProgressBar
from data import Counts
from data_pipeline.parsing import SAME_TOKENS, SKIP_REASONS
from data_pipeline.tokenization import TokenizedGroup, moves_system_turn, tokenize_groups
from evaluation import reward_bench
from evaluation.eval_data import Data, Row
from modeling.scorer import Scorer

ROWS_AT_A_TIME = 2048
SILENT_SECONDS = 10  # before progress is shown

# -- On disk -----------------------------------------------------------------------------------------------------------


class Scored(NamedTuple):
    """The replies of one row, the chosen ones first."""

    rewards: list[float]
    lengths: list[int]  # tokens
    is_whole: bool = True  # whether the chat template wrote every part of the dialogues


Scores = Scored | str  # or why the row is skipped (see parsing.py)
SCHEMA = """
CREATE TABLE evaluation (key TEXT);
CREATE TABLE scores (position INTEGER PRIMARY KEY, content TEXT);
"""
DAMAGED = (sqlite3.SQLITE_ERROR, sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)  # an error: no such table


class ScoreLog:
    """The scores of one model on one set of rows, identified by `key`: an SQLite file, deleted once the report exists.

    What was added survives a killed process. A file that is damaged or holds something else is replaced.
    """

    def __init__(self, folder: Path, key: str):
        self.path = folder / f".partial-{key[:24]}.sqlite"
        with database_errors(self.path):
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
        skipped = self._database.execute("SELECT DISTINCT content FROM scores WHERE content LIKE '\"%'")
        reasons = {json.loads(content).partition(": ")[0] for (content,) in skipped}
        if state != "ok" or keys != [(key,)] or not reasons <= SKIP_REASONS.keys():
            raise ValueError(state)

    def __len__(self) -> int:
        return self._database.execute("SELECT COUNT(*) FROM scores").fetchone()[0]

    def __contains__(self, position: int) -> bool:
        found = self._database.execute("SELECT 1 FROM scores WHERE position = ?", (position,))
        return found.fetchone() is not None

    def __getitem__(self, position: int) -> Scores:
        found = self._database.execute("SELECT content FROM scores WHERE position = ?", (position,))
        return _scores(*found.fetchone())

    def items(self) -> Iterator[tuple[int, Scores]]:
        """(position, scores) of every row, in order."""
        for position, content in self._database.execute("SELECT position, content FROM scores ORDER BY position"):
            yield position, _scores(content)

    def add(self, rows: Iterable[tuple[int, Scores]]) -> None:
        """Keep the scores of some rows, given with their positions."""
        entries = ((position, json.dumps(scores)) for position, scores in rows)
        with database_errors(self.path), self._database:
            self._database.executemany("INSERT OR REPLACE INTO scores VALUES (?, ?)", entries)

    def close(self) -> None:
        self._database.close()

    def delete(self) -> None:
        self.close()
        for path in (self.path, self.path.with_name(f"{self.path.name}-journal")):
            path.unlink(missing_ok=True)


def _scores(content: str) -> Scores:
    scores = json.loads(content)  # Python writes floats so that reading gives the same bits
    return scores if isinstance(scores, str) else Scored(*scores)


# -- In memory ---------------------------------------------------------------------------------------------------------


@dataclass
class ScoreTable:
    """The scores of one model as columns: M comparisons that were scored, N pairs (chosen, rejected) in them."""

    subset_names: list[str]
    positions: np.ndarray  # (M,)
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
    log: ScoreLog  # the same scores row by row


@dataclass
class RowColumns:
    """What the rows are besides their scores, gathered while they are read."""

    # six a row: its part and number, subset, turns, chosen, whether a system turn was moved
    numbers: array = field(default_factory=lambda: array("q"))
    subsets: dict[str, int] = field(default_factory=dict)  # name -> number
    keys: dict[int, str] = field(default_factory=dict)  # by position, of rows with lists of replies only
    unused: Counter = field(default_factory=Counter)  # rows by column, of columns like those of a dialogue
    shapes: Counter = field(default_factory=Counter)  # rows by what they were read as

    def add(self, row: Row, is_moved: bool = False) -> None:
        content = None if isinstance(row.content, str) else row.content
        subset, turns, chosen = (content.subset, content.turns, len(content.chosen)) if content else ("", 0, 0)
        subset = self.subsets.setdefault(subset, len(self.subsets))
        self.numbers.extend((row.part, row.number, subset, turns, chosen, is_moved))
        self.unused.update(content.unused if content else ())
        self.shapes.update([content.shape] if content else [])
        if content and content.key is not None:
            self.keys[row.position] = content.key


def build_table(
    log: ScoreLog, columns: RowColumns, fingerprint: str, name_of: Callable[[Any], str] = str
) -> ScoreTable:
    """The log's rewards and lengths beside what was noted of its rows; `name_of` names one by (part, number)."""
    rows, names = np.array(columns.numbers, dtype=np.int64).reshape(-1, 6), list(columns.subsets)
    counts, groups, guessing = Counts(len(rows), unused=columns.unused, shapes=columns.shapes), [], 0.0
    counts.name_of = name_of
    scored, margins, longest, longer_by = array("q"), array("d"), array("i"), array("i")
    rewards, lengths = array("f"), array("i")
    for position, found in log.items():
        part, number, subset, _, n, is_moved = rows[position].tolist()
        if isinstance(found, str):
            counts.add(found, (part, number))
            continue
        values, tokens, is_whole = found
        counts.add("system_moved", *[(part, number)] * is_moved)
        counts.add("not_rendered", *[(part, number)] * (not is_whole))
        scored.append(position)
        margins.append(min(values[:n]) - max(values[n:]))
        longest.append(max(tokens))
        longer_by.extend((min(tokens[:n]) - max(tokens[n:]), min(tokens[n:]) - max(tokens[:n])))
        guessing += 1 / math.comb(len(values), n)
        for value, length in zip(values[n:], tokens[n:], strict=True):
            rewards.extend((values[0], value))
            lengths.extend((tokens[0], length))
        if position in columns.keys:
            right, wrong = tuple(values[:n]), tuple(values[n:])
            groups.append(reward_bench.Group(names[subset], columns.keys[position], right, wrong))
    at = np.array(scored, dtype=np.int64)
    return ScoreTable(
        names, at, rows[at, 2], rows[at, 3], np.array(margins), np.array(longest),
        np.array(rewards).reshape(-1, 2), np.array(lengths).reshape(-1, 2), np.array(longer_by).reshape(-1, 2),
        guessing / len(at) if len(at) else 0.5, groups, counts, fingerprint, log,
    )  # fmt: skip


# -- Scoring -----------------------------------------------------------------------------------------------------------


def score_dataset(scorer: Scorer, data: Data, folder: Path, check_stop: Callable[[], None], name: str) -> ScoreTable:
    """Score all rows of `data`, skipping those that a killed evaluation has left in `folder`.

    The table's log is still on disk when this returns: delete it once the report is written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    key = hashlib.sha256(json.dumps([scorer.fingerprint, data.fingerprint()]).encode()).hexdigest()
    log, columns = ScoreLog(folder, key), RowColumns()
    if log.found:
        print(f"{name}: {log.found:,} rows were scored before; continuing after them", file=sys.stderr, flush=True)
    bar = ProgressBar(name, data.num_rows, done=log.found, unit="rows", first_after=SILENT_SECONDS, stream=sys.stderr)
    try:
        score_rows(scorer, data.read(), log, columns, bar, check_stop)
    except BaseException:
        with contextlib.suppress(sqlite3.Error):  # the error that matters is already on its way
            if kept := len(log):
                utils.say_if_heard(
                    f"{name}: the scores of {kept:,} rows are kept; the same command continues from there"
                )
            log.close()
        raise
    finally:
        bar.close()
    return build_table(log, columns, scorer.fingerprint, data.row_name)


def score_rows(
    scorer: Scorer, rows: Iterator[Row], log: ScoreLog, columns: RowColumns, bar: ProgressBar,
    check_stop: Callable[[], None],
) -> None:  # fmt: skip
    """Score every row that is not in the log yet. Meanwhile a second thread reads and tokenizes the next rows."""
    tokenizer = scorer.model.tokenizer

    def next_chunk() -> list[tuple[int, TokenizedGroup | str]]:
        """(position, tokens or the reason for skipping) of the next unknown rows; [] at the end."""
        chunk: list[Row] = []
        for row in rows:
            columns.add(row, not isinstance(row.content, str) and moves_system_turn(tokenizer, row.dialogues))
            if row.position not in log:
                chunk.append(row)
            if len(chunk) == ROWS_AT_A_TIME:
                break
        tools = [None if isinstance(row.content, str) else row.content.tools for row in chunk]
        found = tokenize_groups([row.dialogues for row in chunk], tokenizer, scorer.max_length, tools)
        return [(row.position, _unless_identical(row, tokens)) for row, tokens in zip(chunk, found, strict=True)]

    with ThreadPoolExecutor(1) as reader:
        ahead, done = reader.submit(next_chunk), log.found
        while chunk := ahead.result():
            ahead = reader.submit(next_chunk)
            positions, groups = zip(*chunk, strict=True)
            skipped = [(position, group) for position, group in chunk if isinstance(group, str)]
            log.add(skipped)
            done += len(skipped)
            for batch in scorer.rewards(groups, check_stop):
                log.add(
                    (positions[at], Scored(rewards, groups[at].reply_lengths, groups[at].is_whole))
                    for at, rewards in batch
                )
                done += len(batch)
                bar.update(done)


def _unless_identical(row: Row, found: TokenizedGroup | str) -> TokenizedGroup | str:
    """Different texts may be the same tokens, and then there is nothing to compare."""
    if isinstance(found, str):
        return found
    chosen, rejected = found.ids[: len(row.content.chosen)], found.ids[len(row.content.chosen) :]
    return SAME_TOKENS if any(np.array_equal(a, b) for a in chosen for b in rejected) else found
