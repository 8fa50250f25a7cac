"""Locks on files: one process trains a run, one writer appends at a time.

The operating system holds them (through `filelock`) and releases them when a process ends, however it ends.
"""

import contextlib
import os
import platform
import time
import typing
from pathlib import Path
from typing import Any

from utils import UserError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

PROBE_SECONDS = 0.06  # `is_locked` may hold a lock this long: wait before concluding that another process has it


class RunLock:
    """Held by the process that trains a run, or by manage_runs.py while it moves parts of it."""

    FILE = ".lock"

    def __init__(
        self,
        run_folder: Path,
        holder: str = "process",
        patience_seconds: float = PROBE_SECONDS,
        busy: str = "this run is being trained right now",
        next: str = "wait until it ends, or use another --run_name",
    ):
        """Raise UserError (`busy`, with host and process) if another process still holds the lock after
        `patience_seconds`, or if the lock is not an ordinary file. On a file system without locks, print a warning.
        """
        path = run_folder / self.FILE
        if _is_special(path):  # it is opened for writing, which would follow a link and wait for a pipe
            raise UserError("its lock is not an ordinary file", where=path, next="see what it is, and remove it")
        self._file = path.open("a+", encoding="utf-8")
        try:
            has_lock = _lock_within(patience_seconds, self._file)
        except OSError as error:
            why = error.strerror
            print(f"this file system has no locks ({why}): make sure that no two processes train {run_folder}")
            return
        if not has_lock:
            self._file.seek(1 if os.name == "nt" else 0)  # Windows locks the first byte, a newline, against reading
            found = self._file.read().strip() or "another process"
            self._file.close()
            raise UserError(busy, where=run_folder, found=f"held by {found}", safe="nothing was changed", next=next)
        try:
            is_same_file = os.path.samestat(path.stat(), os.fstat(self._file.fileno()))
        except OSError:
            is_same_file = False
        if not is_same_file:  # manage_runs.py moved the folder to the trash between opening and locking
            self._file.close()
            raise UserError("this run is being deleted right now", where=run_folder)
        self._file.truncate(0)
        self._file.write(f"\n{holder} {os.getpid()} on {platform.node()}\n")
        self._file.flush()

    def release(self) -> None:
        self._file.close()


def is_locked(path: Path) -> bool:
    """Whether another process holds the lock on a file. The file is neither created nor changed."""
    if _is_special(path):
        return False  # nobody locks a link or a pipe
    try:
        file = path.open("rb")
    except (FileNotFoundError, NotADirectoryError):
        return False
    with file:
        try:
            return not _lock_within(PROBE_SECONDS, file) if fcntl is None else _is_held(file)
        except OSError:
            return False  # this file system has no locks


def _is_special(path: Path) -> bool:
    """Whether something other than an ordinary file is there: a link, a pipe, a folder."""
    return path.is_symlink() or (path.exists() and not path.is_file())


def _is_held(file: typing.IO[Any]) -> bool:
    """Whether another process holds an open file's lock. All who ask may hold a shared one at once, on NFS too."""
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return True
    fcntl.flock(file, fcntl.LOCK_UN)
    return False


def _lock_within(seconds: float, file: typing.IO[Any]) -> bool:
    """Lock an open file, retrying for a while; False if another process keeps it."""
    import filelock  # listing runs does without it

    give_up = time.monotonic() + seconds
    while not filelock.lock_descriptor(file.fileno(), blocking=False):
        if time.monotonic() > give_up and (fcntl is None or _is_held(file)):
            return False
        time.sleep(0.02)
    return True


def exclusive(lock_file: Path, patience_seconds: float = 30) -> contextlib.AbstractContextManager[Any]:
    """`with exclusive(path):` keeps other threads and processes out; TimeoutError if it takes too long to get in."""
    import filelock

    return filelock.FileLock(lock_file, patience_seconds, fallback_to_soft=False, preserve_lock_file=True)
