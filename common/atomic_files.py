"""Files and folders that are written completely or not at all: under a temporary name, flushed to disk, then renamed.

Standard library only.
"""

import contextlib
import errno
import os
import shutil
import sqlite3
import typing
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def atomic_folder(final: Path, temporary_name: str | None = None) -> Iterator[Path]:
    """Yield a temporary folder beside `final`; on leaving, flush it to disk and rename it to `final`.

    Raises FileExistsError if `final` exists: it is never written into. A failure removes the temporary folder; a kill
    leaves it for `remove_dead_saves`. Processes that may write the same `final` at once need a `temporary_name` each;
    the first one wins, the others get FileExistsError.
    """
    if final.exists():
        raise FileExistsError(errno.EEXIST, "already exists", str(final))
    final.parent.mkdir(parents=True, exist_ok=True)
    temporary = final.with_name(temporary_name or f".tmp-{final.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        mode = temporary.stat().st_mode & 0o666  # as the umask wants; safetensors writes 0600, but groups share runs
        for path in sorted(temporary.rglob("*"), reverse=True):  # what is in a folder before the folder
            if not path.is_dir():
                path.chmod(mode)
            fsync_path(path)
        fsync_path(temporary)
        try:
            temporary.rename(final)
        except OSError as error:
            if error.errno in (errno.EEXIST, errno.ENOTEMPTY):
                raise FileExistsError(errno.EEXIST, "already exists", str(final)) from error
            raise
        fsync_path(final.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


@contextlib.contextmanager
def atomic_file(final: Path | None, temporary_name: str | None = None) -> Iterator[typing.TextIO]:
    """Yield a text file under a temporary name beside `final`; on leaving, flush it to disk and rename it over `final`.

    A failure removes it and leaves `final` as it was. Without a `final`, what is written is discarded.
    """
    if final is None:
        with open(os.devnull, "w", encoding="utf-8") as nowhere:
            yield nowhere
        return
    final.parent.mkdir(parents=True, exist_ok=True)
    temporary = final.with_name(temporary_name or f".tmp-{final.name}-{os.getpid()}")
    try:
        temporary.unlink(missing_ok=True)
        with temporary.open("x", encoding="utf-8", newline="\n") as file:  # "x": never through a link of that name
            yield file
        fsync_path(temporary)
        os.replace(temporary, final)
    except BaseException:
        with contextlib.suppress(OSError):  # the first error matters, not this one
            temporary.unlink(missing_ok=True)
        raise


def remove_dead_saves(folder: Path) -> list[Path]:
    """Delete the temporary folders that killed saves left in `folder`; returns what was removed."""
    dead = [path for path in folder.glob(".tmp-*") if path.is_dir() and not path.is_symlink()]
    for path in dead:
        shutil.rmtree(path, ignore_errors=True)
    return dead


def fsync_path(path: Path) -> None:
    """fsync a file, or a folder where the platform can (Windows cannot open one)."""
    if path.is_dir() and os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY if os.name != "nt" else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def temporary(path: Path) -> Path:
    return path.with_name(f".tmp-{path.name}")


def replace_text(path: Path, text: str) -> None:
    """Replace a small file, all or nothing. The temporary name is always the same, so kills leave at most one file."""
    with atomic_file(path, temporary(path).name) as file:
        file.write(text)


@contextlib.contextmanager
def database_errors(path: Path) -> Iterator[None]:
    """What goes wrong while an SQLite file is read or written, as an OSError that names it."""
    try:
        yield
    except sqlite3.Error as error:
        raise OSError(errno.EIO, str(error), str(path)) from error
