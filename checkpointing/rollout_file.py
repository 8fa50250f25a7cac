"""A policy run's `rollouts.sqlite`: every reply that it was trained on, and those to held-out prompts.

Read while the run goes on, by short queries that a training waits for at most, never the other way round.
Standard library only.
"""

import contextlib
import math
import sqlite3
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from common.atomic_files import database_errors
from utils import UserError

ROLLOUTS = "rollouts.sqlite"
TRAINING, HELD_OUT = "rollouts", "held_out"  # the tables
BY_ITSELF, AT_LIMIT = "by itself", "at the limit"  # how a reply ended
COLUMNS = """
    step INTEGER, prompt INTEGER, completion INTEGER, question TEXT, reply TEXT, reward REAL, advantage REAL, kl REAL,
    tokens INTEGER, ended TEXT"""
SCHEMA = f"""
CREATE TABLE IF NOT EXISTS {TRAINING} ({COLUMNS}, PRIMARY KEY (step, prompt, completion));
CREATE TABLE IF NOT EXISTS {HELD_OUT} ({COLUMNS}, judge REAL, PRIMARY KEY (step, prompt, completion));
CREATE INDEX IF NOT EXISTS {TRAINING}_numbers ON {TRAINING} (step, reward, kl, tokens, ended);
CREATE INDEX IF NOT EXISTS {HELD_OUT}_numbers ON {HELD_OUT} (step, reward, kl, tokens, ended);
"""  # the indexes are for curves: whoever sums rewards need not read texts
WRITER_PATIENCE, READER_PATIENCE = 60, 2  # seconds that each waits for the other
LONGEST_READING = 5  # seconds, far below the writer's patience
MOST_POINTS = 200  # of a curve: a file of a million replies is not read whole for it
FIRST_WORDS = 160  # characters of a prompt in a list


class RolloutFile:
    """Written step by step: a killed process loses at most its last step."""

    def __init__(self, path: Path | None, resumed_step: int):
        """None keeps nothing. What a resumed run is about to write again is removed."""
        self.path = path
        if path is None:
            return
        if resumed_step and not path.exists():
            print(f"{path} is gone: replies are kept from step {resumed_step + 1} on", flush=True)
        try:
            self._database = sqlite3.connect(path, timeout=WRITER_PATIENCE)
            self._database.executescript(SCHEMA)
            with self._database:
                for table in (TRAINING, HELD_OUT):
                    self._database.execute(f"DELETE FROM {table} WHERE step > ?", (resumed_step,))
        except sqlite3.DatabaseError as error:
            raise UserError(
                "the file of replies is damaged", where=path, found=error, safe="the checkpoints are untouched",
                next="rename or remove it, then give the same command",
            ) from error  # fmt: skip

    def add(self, table: str, rows: Sequence[tuple[Any, ...]]) -> None:
        """Keep a step's replies: rows of `COLUMNS`, with the judge's opinion behind."""
        if self.path is None:
            return
        count = 10 if table == TRAINING else 11
        with database_errors(self.path), self._database:
            self._database.executemany(
                f"INSERT OR REPLACE INTO {table} VALUES ({','.join('?' * count)})", [row[:count] for row in rows]
            )

    def close(self) -> None:
        if self.path is not None:
            self._database.close()


# -- Reading -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class KeptReply:
    """A row. A number that is not finite, or that an old file lacks, is None."""

    step: int
    prompt: int  # its place in the data
    completion: int
    question: str
    reply: str
    reward: float | None
    advantage: float | None
    kl: float | None
    tokens: int
    ended: str
    judge: float | None = None
    change: float | None = None  # of the reward, since the step it is compared with


@dataclass(frozen=True)
class KeptPrompt:
    """A prompt of a step."""

    prompt: int
    first_words: str
    replies: int
    reward: float | None  # mean


@dataclass(frozen=True)
class CurvePoint:
    """The means of a step's replies."""

    step: int
    reward: float | None
    kl: float | None
    tokens: float | None
    truncated: float  # share of replies that reached the limit


SORT_KEYS = ("reward", "advantage", "kl", "tokens", "change", "judge", "completion")


@dataclass(frozen=True)
class ReplyFilter:
    """Which replies of a step to show, and in which order."""

    text: str = ""  # that the reply contains, in any case
    ended: str = ""
    low: float | None = None  # reward
    high: float | None = None
    sort: str = "reward"
    is_descending: bool = True
    limit: int = 50


class RolloutReader:
    """Queries on one table of an open file. Each is over one step, or over the steps alone."""

    def __init__(self, database: sqlite3.Connection, table: str):
        self._database, self.table = database, table
        names = [name for _, name, *_ in database.execute(f"PRAGMA table_info({table})")]
        self.exists = bool(
            names
        )  # a file has no table before the run's first moment, nor older ones of held-out replies
        wanted = [field.name for field in fields(KeptReply)][:11]
        self._columns = ", ".join(name if name in names else f"NULL AS {name}" for name in wanted)

    def steps(self) -> list[int]:
        """The steps that have replies, ascending. Jumps from one to the next in the primary key."""
        if not self.exists:
            return []
        next_step = f"SELECT min(step) FROM {self.table}"
        query = f"""
            WITH RECURSIVE steps(step) AS (
                {next_step} UNION ALL SELECT ({next_step} WHERE step > steps.step) FROM steps WHERE step IS NOT NULL
            ) SELECT step FROM steps WHERE step IS NOT NULL"""
        return [step for (step,) in self._database.execute(query)]

    def steps_of(self, prompt: int, steps: Iterable[int]) -> list[int]:
        """Those of the steps at which a prompt was sampled."""
        query = f"SELECT 1 FROM {self.table} WHERE step = ? AND prompt = ? LIMIT 1"
        return [step for step in steps if self._database.execute(query, (step, prompt)).fetchone()]

    def prompts(self, step: int) -> list[KeptPrompt]:
        query = f"""
            SELECT prompt, substr(min(question), 1, {FIRST_WORDS}), count(*), avg(reward)
            FROM {self.table} WHERE step = ? GROUP BY prompt ORDER BY prompt"""
        return [KeptPrompt(*row[:3], finite(row[3])) for row in self._database.execute(query, (step,))]

    def replies(
        self, step: int, prompt: int | None, wanted: ReplyFilter, compared_with: int | None = None
    ) -> tuple[list[KeptReply], int]:
        """The first `limit` replies of a step that pass the filter, to one prompt or to all, and how many pass it.

        `change` is the reward minus the prompt's mean reward at the step `compared_with`.
        """
        assert wanted.sort in SORT_KEYS
        order = "DESC" if wanted.is_descending else "ASC"
        query = f"""
            SELECT {self._columns}, reward - (
                SELECT avg(old.reward) FROM {self.table} old WHERE old.step = :old AND old.prompt = {self.table}.prompt
            ) AS change, count(*) OVER ()
            FROM {self.table}
            WHERE step = :step AND (:prompt IS NULL OR prompt = :prompt) AND contains(reply, :text)
                AND (:ended = '' OR ended = :ended) AND (:low IS NULL OR reward >= :low)
                AND (:high IS NULL OR reward <= :high)
            ORDER BY {wanted.sort} {order} NULLS LAST, prompt, completion LIMIT :limit"""
        values = {"step": step, "prompt": prompt, "old": compared_with, **vars(wanted)}
        values["text"] = wanted.text.strip().casefold()
        rows = self._database.execute(query, values).fetchall()
        return [kept_reply(row[:-1]) for row in rows], rows[0][-1] if rows else 0

    def replies_to(self, step: int, prompts: Sequence[int]) -> dict[int, list[KeptReply]]:
        """All replies of a step to some prompts, by prompt, the highest reward first."""
        found: dict[int, list[KeptReply]] = {}
        query = f"""
            SELECT {self._columns} FROM {self.table} WHERE step = ? AND prompt = ?
            ORDER BY reward DESC NULLS LAST, completion"""
        for prompt in prompts:
            found[prompt] = [kept_reply(row) for row in self._database.execute(query, (step, prompt))]
        return found

    def curve(self, steps: list[int]) -> list[CurvePoint]:
        """The means of up to `MOST_POINTS` of the steps, evenly spread, first and last included."""
        if not steps:
            return []
        if len(steps) > MOST_POINTS:
            last = len(steps) - 1
            steps = [steps[round(point * last / (MOST_POINTS - 1))] for point in range(MOST_POINTS)]
        query = f"""
            SELECT step, avg(reward), avg(kl), avg(tokens), avg(ended <> '{BY_ITSELF}') FROM {self.table}
            WHERE step IN ({",".join("?" * len(steps))}) GROUP BY step ORDER BY step"""
        return [
            CurvePoint(step, *map(finite, means), share)
            for step, *means, share in self._database.execute(query, steps)
        ]  # fmt: skip


def kept_reply(row: Sequence[Any]) -> KeptReply:
    values = dict(zip((field.name for field in fields(KeptReply)), row, strict=False))
    for name in ("reward", "advantage", "kl", "judge", "change"):
        values[name] = finite(values.get(name))
    return KeptReply(**values)


def finite(value: Any) -> float | None:
    """A number, or None: SQLite keeps NaN as NULL, and any column may hold anything."""
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else None


@contextlib.contextmanager
def reading(path: Path) -> Iterator[sqlite3.Connection]:
    """An open file of replies to read from, for seconds at most.

    Raises UserError that says what is wrong, also with what is read inside.
    """
    if not path.is_file():
        raise UserError(
            "no replies are kept here", where=path,
            next="train_grpo.py keeps them as it begins its first step, unless --no_save_rollouts was given",
        )  # fmt: skip
    deadline = time.monotonic() + LONGEST_READING
    try:
        # not mode=ro: what a killed writer left half done could not be rolled back
        with contextlib.closing(
            sqlite3.connect(f"{path.resolve().as_uri()}?mode=rw", uri=True, timeout=READER_PATIENCE)
        ) as database:
            database.text_factory = lambda raw: raw.decode("utf-8", "replace")
            database.execute("PRAGMA query_only = ON")
            database.execute("PRAGMA trusted_schema = OFF")  # the file may be somebody else's
            database.create_function("contains", 2, lambda text, part: part in str(text).casefold())
            database.set_progress_handler(lambda: time.monotonic() > deadline, 10_000)
            yield database
    except sqlite3.Error as error:
        raise _explained(path, error) from error


def _explained(path: Path, error: sqlite3.Error) -> UserError:
    name = getattr(error, "sqlite_errorname", "")
    if name.startswith(("SQLITE_BUSY", "SQLITE_LOCKED")):
        what, advice = "the file of replies is locked by another program", "try again in a moment"
    elif name == "SQLITE_INTERRUPT":
        what, advice = f"reading the file of replies took over {LONGEST_READING} seconds", "a filter, or one prompt"
    elif name.startswith(("SQLITE_CANTOPEN", "SQLITE_READONLY", "SQLITE_PERM", "SQLITE_IOERR")):
        what, advice = "the file of replies cannot be read", "see its permissions, and those of its folder"
    else:
        what, advice = "the file of replies is damaged", "the checkpoints are untouched; another run"
    return UserError(what, where=path, found=error, next=advice)
