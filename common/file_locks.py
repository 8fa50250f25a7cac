"""Locks on files: one process trains a run, one writer appends at a time.

The system lets go of them when a process ends, however it ends. Standard library only.
"""

from __future__ import annotations

import contextlib
import errno
import os
import platform
import stat
import time
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from utils import UserError


class RunLock:
    """Held by the process that trains a run. The system lets go of it when the process ends, however it ends."""

    FILE = ".lock"

    def __init__(self, run_folder: Path, holder: str = "process", patience_seconds: float | None = None):
        """Raise UserError, naming host and process, if another process trains this run (and goes on doing so)."""
        path = run_folder / self.FILE
        self._file = path.open("a+", encoding="utf-8")
        try:
            _lock_patiently(self._file, MOMENT if patience_seconds is None else patience_seconds)
        except OSError as error:
            if error.errno not in LOCKED_ERRORS:
                print(f"this file system has no locks ({error.strerror}): see that no two runs share {run_folder}")
                return
            self._file.seek(0)
            holder = self._file.read().strip() or "another process"
            self._file.close()
            raise UserError(
                "this run is being trained just now",
                where=run_folder,
                found=f"held by {holder}",
                safe="nothing of it was touched",
                next="another --run_name, or wait until it ends",
            ) from error
        try:
            is_the_same = os.path.samestat(path.stat(), os.fstat(self._file.fileno()))
        except OSError:
            is_the_same = False
        if not is_the_same:  # manage_runs.py took the folder away between opening and locking
            self._file.close()
            raise UserError("this run is being deleted just now", where=run_folder)
        self._file.truncate(0)
        self._file.write(f"{holder} {os.getpid()} on {platform.node()}\n")
        self._file.flush()

    def release(self) -> None:
        self._file.close()


def is_locked(path: Path) -> bool:
    """Whether somebody holds the lock on a file, which is neither made nor changed; False if there is no such file."""
    flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    try:
        descriptor = os.open(path, flags)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENXIO):
            return False  # none, or a link or pipe, which nobody locks
        raise
    with os.fdopen(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            return False
        try:
            _lock_patiently(file, MOMENT, is_shared=True) if os.name == "nt" else _lock(file, is_shared=True)
        except OSError as error:
            return error.errno in LOCKED_ERRORS  # else this file system has no locks
        return False  # closing lets go of it


def _lock_patiently(file: typing.IO[Any], seconds: float, is_shared: bool = False) -> None:
    """Lock, trying again for a while; the last OSError if somebody else keeps it."""
    give_up = time.monotonic() + seconds
    while True:
        try:
            return _lock(file, is_shared)
        except OSError as error:
            if error.errno not in LOCKED_ERRORS or time.monotonic() > give_up:
                raise
            time.sleep(0.02)


def _lock(file: typing.IO[Any], is_shared: bool = False) -> None:
    """A lock on an open file; OSError if somebody else has it. On Windows every lock is exclusive."""
    if os.name == "nt":
        import msvcrt

        file.seek(LOCKED_BYTE)
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
    else:
        import fcntl

        fcntl.flock(file, (fcntl.LOCK_SH if is_shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)


@contextlib.contextmanager
def exclusive(lock_file: Path, patience_seconds: float = 30) -> Iterator[None]:
    """Hold a lock file against other threads and processes; they wait, and TimeoutError says that it took too long."""
    with lock_file.open("a+", encoding="utf-8") as file:
        try:
            _lock_patiently(file, patience_seconds)
        except OSError as error:
            if error.errno not in LOCKED_ERRORS:
                raise
            raise TimeoutError(f"somebody holds {lock_file}") from error
        yield


MOMENT = 0.06  # seconds for which somebody may hold a lock who only asks whether it is held
LOCKED_ERRORS = (errno.EWOULDBLOCK, errno.EACCES, errno.EDEADLK)
LOCKED_BYTE = 1024  # Windows forbids reading a locked byte, so it is one behind the text
