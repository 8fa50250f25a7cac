"""The scores of one model, kept on disk as they come, so that an evaluation that was killed goes on where it was."""

from __future__ import annotations

import contextlib
import errno
import sqlite3
from array import array
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from data_pipeline.parsing import LEFT_OUT

# rewards and reply lengths, the chosen replies first; or why the row is skipped, a key of LEFT_OUT
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
        if state != "ok" or keys != [(key,)] or not {reason for (reason,) in reasons} <= LEFT_OUT.keys():
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
        for position, *found in self._database.execute(
            "SELECT position, rewards, lengths, skipped FROM scores ORDER BY position"
        ):
            yield position, _scores(*found)

    def add(self, rows: Iterable[tuple[int, Sequence[float], Sequence[int]]]) -> None:
        """Keep (position, rewards, reply lengths) of some rows."""
        self._insert(
            (position, array("f", rewards).tobytes(), array("i", lengths).tobytes(), None)
            for position, rewards, lengths in rows
        )

    def skip(self, rows: Iterable[tuple[int, str]]) -> None:
        """Keep (position, a key of LEFT_OUT) of rows that cannot be scored."""
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
