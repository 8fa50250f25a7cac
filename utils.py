"""What every script shares and no library gives: errors and exit codes, stopping, run folders, publishing, text.

Standard library only, so that `--help` and listing runs stay instant. Nothing here knows torch, models or losses.
"""

from __future__ import annotations

import contextlib
import difflib
import errno
import hashlib
import importlib
import json
import math
import os
import platform
import re
import shutil
import signal
import stat
import sys
import time
import traceback
import typing
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

EXIT_OUR_FAULT, EXIT_BAD_INPUT, EXIT_BAD_CHECKPOINT, EXIT_DISK_OR_NETWORK = 1, 2, 3, 4
EXIT_CTRL_C, EXIT_SIGTERM = 130, 143

# ---------------------------------------------------------------------------------------------------------------------
# Errors: what happened, where, what is safe, what to type next
# ---------------------------------------------------------------------------------------------------------------------


class UserError(ValueError):
    """Something the user can mend. Shown without a traceback; `exit_code` goes to the shell."""

    exit_code = EXIT_BAD_INPUT

    def __init__(self, what: str, *, where: Any = None, found: Any = None, safe: Any = None, next: Any = None):
        details = {"where": where, "found": found, "safe": safe, "next": next}
        lines = [f"error: {what}"]
        lines += [f"  {name + ':':<7} {value}" for name, value in details.items() if value is not None]
        super().__init__("\n".join(lines))
        self.what = what


class CheckpointError(UserError):
    """A checkpoint is damaged, incomplete or does not fit."""

    exit_code = EXIT_BAD_CHECKPOINT


class DiskOrNetworkError(UserError):
    """The disk or the network did not do what it should."""

    exit_code = EXIT_DISK_OR_NETWORK


class Stopped(BaseException):
    """Ctrl-C or SIGTERM, raised where stopping is safe. Not an Exception, so that nothing swallows it by accident."""

    def __init__(self, signal_number: int):
        super().__init__(signal.Signals(signal_number).name)
        self.exit_code = 128 + signal_number


# SIGHUP is what a closed terminal or a dropped connection sends; Windows has none.
STOP_SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))


class StopRequest:
    """Turns the first Ctrl-C or SIGTERM into a note that `check` reads; a second one leaves at once."""

    def __init__(self) -> None:
        self.signal_number: int | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        for number in STOP_SIGNALS:
            self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: object) -> None:
        if self.signal_number is not None:
            os._exit(128 + number)  # no clean-up: nothing visible on disk is ever half-written, see `published_folder`
        self.signal_number = number
        sys.stderr.write("\nstopping at the next micro-batch; once more to leave without saving\n")

    def check(self) -> None:
        """Raise `Stopped` if somebody asked to stop."""
        if self.signal_number is not None:
            raise Stopped(self.signal_number)


def run_script(main: Callable[[list[str]], None]) -> int:
    """Run a script's `main` and turn whatever leaves it into a message and an exit code."""
    argv = sys.argv[1:]
    try:
        for stream in (sys.stdout, sys.stderr):  # a terminal that lacks a letter must not end a training
            stream.reconfigure(errors="backslashreplace")
        for number in STOP_SIGNALS[1:]:
            signal.signal(number, _stop_now)
        main(argv)
        return 0
    except UserError as error:
        return _report(argv, error, str(error), error.exit_code)
    except (KeyboardInterrupt, Stopped) as error:
        return _report(argv, error, "stopped", getattr(error, "exit_code", EXIT_CTRL_C))
    except ModuleNotFoundError as error:
        message = UserError(f"the package {error.name!r} is not installed", next="pip install -r requirements.txt")
        return _report(argv, error, str(message), EXIT_BAD_INPUT)
    except BrokenPipeError as error:  # `... | head`: the reader has left, and closing stdout must not complain again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _report(argv, error, "stopped: nobody reads the output any more", EXIT_OUR_FAULT)
    except Exception as error:
        if (disk_error := disk_full_cause(error)) is not None:
            message = str(
                DiskOrNetworkError(
                    "the disk did not take it",
                    where=disk_error.filename,
                    found=disk_error.strerror,
                    next="make room there, or name another folder; nothing saved before was touched",
                )
            )
            return _report(argv, error, message, EXIT_DISK_OR_NETWORK)
        frame = traceback.extract_tb(error.__traceback__)[-1]
        message = UserError(
            f"{type(error).__name__}: {str(error).strip() or 'no message'}",
            where=f"{frame.filename}:{frame.lineno}",
            next="this is our fault; the same command with --debug shows the traceback for a bug report",
        )
        return _report(argv, error, str(message), EXIT_OUR_FAULT)


def _stop_now(number: int, frame: object) -> typing.NoReturn:
    raise Stopped(number)


def _report(argv: list[str], error: BaseException, message: str, exit_code: int) -> int:
    if any(word in ("--debug", "--debug=True", "--debug=true") for word in argv):
        traceback.print_exception(error)
    print(message, file=sys.stderr)
    return exit_code


def disk_full_cause(error: BaseException | None) -> OSError | None:
    """The OSError about a full or unwritable disk in an exception's chain of causes, or None."""
    names = ["ENOSPC", "EDQUOT", "EFBIG", "EROFS", "EIO", "EACCES", "EPERM", "ENOTDIR", "EISDIR", "ENAMETOOLONG"]
    disk_errors = {getattr(errno, name) for name in names if hasattr(errno, name)}  # Windows lacks some
    while error is not None:
        if isinstance(error, OSError) and error.errno in disk_errors:
            return error
        error = error.__cause__ or error.__context__
    return None


def nearest(name: str, names: Iterable[str]) -> str:
    """`, did you mean 'x'?` for the closest of `names`, or nothing."""
    close = difflib.get_close_matches(name, list(names), n=1, cutoff=0.6)
    return f", did you mean {close[0]!r}?" if close else ""


# ---------------------------------------------------------------------------------------------------------------------
# Run folders: <output_dir>/<run_name>/step-N
# ---------------------------------------------------------------------------------------------------------------------


def run_name_problem(name: str) -> str | None:
    """Why a run name cannot be a folder's name on every platform, or None."""
    reserved = {"con", "prn", "aux", "nul", *(f"{port}{i}" for port in ("com", "lpt") for i in range(1, 10))}
    if not re.fullmatch(r"[^\W_][\w.+=@-]*", name) or name.endswith("."):
        return "wants letters, digits, '_', '-', '.', '+', '=' and '@' only, a letter or digit first, and no '.' last"
    if len(name.encode()) > 100:
        return f"wants at most 100 bytes, got {len(name.encode())}"
    if re.fullmatch(r"step-\d+", name) or name.startswith("superseded-"):
        return "is what folders inside a run are called"
    return "is a device's name on Windows" if name.split(".")[0].lower() in reserved else None


def step_folder(run_folder: Path, step: int) -> Path:
    return run_folder / f"step-{step}"


def step_of(folder: Path) -> int | None:
    """The N of a folder named step-N, else None."""
    match = re.fullmatch(r"step-(\d+)", folder.name, re.ASCII)
    return int(match.group(1)) if match else None


def step_folders(run_folder: Path) -> list[Path]:
    """The complete steps of a run, newest last, by step number (dates lie after a copy)."""
    if not run_folder.is_dir():
        return []
    steps = [path for path in run_folder.iterdir() if step_of(path) is not None and path.is_dir()]
    return sorted(steps, key=lambda path: step_of(path) or 0)


def best_step(run_folder: Path) -> Path | None:
    """The step with the highest evaluation accuracy, the newest of equals; None if none was evaluated when saved."""
    scored = []
    for path in step_folders(run_folder):
        try:
            accuracy = read_json(path / "training_state.json")["eval_accuracy"]
        except (OSError, ValueError, KeyError, TypeError):
            continue  # a damaged step is nobody's best
        if isinstance(accuracy, float) and math.isfinite(accuracy):
            scored.append((accuracy, step_of(path) or 0, path))
    return max(scored)[2] if scored else None


class RunLock:
    """Held by the process that trains a run. The system lets go of it when the process ends, however it ends."""

    FILE = ".lock"

    def __init__(self, run_folder: Path, holder: str = "process"):
        """Raise UserError, naming host and process, if another process trains this run."""
        path = run_folder / self.FILE
        self._file = path.open("a+", encoding="utf-8")
        try:
            _lock_patiently(self._file)
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
            _lock_patiently(file, is_shared=True) if os.name == "nt" else _lock(file, is_shared=True)
        except OSError as error:
            return error.errno in LOCKED_ERRORS  # else this file system has no locks
        return False  # closing lets go of it


def _lock_patiently(file: typing.IO[Any], is_shared: bool = False) -> None:
    """Lock, trying a few times: who only asks whether a lock is held, holds it for a moment."""
    for is_last in (False, False, False, True):
        try:
            return _lock(file, is_shared)
        except OSError as error:
            if is_last or error.errno not in LOCKED_ERRORS:
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


LOCKED_ERRORS = (errno.EWOULDBLOCK, errno.EACCES, errno.EDEADLK)
LOCKED_BYTE = 1024  # Windows forbids reading a locked byte, so it is one behind the text


@contextlib.contextmanager
def published_folder(final: Path, temporary_name: str | None = None) -> Iterator[Path]:
    """Yield a temporary folder beside `final`; on leaving, flush and rename it, so that `final` is all or nothing.

    Raises FileExistsError if `final` is there: what is published is never written into. A failure removes the
    temporary folder; a kill leaves it, and `remove_dead_saves` clears it later. Where several processes may publish the
    same thing, each wants a `temporary_name` of its own; the first one wins, the others get FileExistsError.
    """
    if final.exists():
        raise FileExistsError(errno.EEXIST, "already published", str(final))
    final.parent.mkdir(parents=True, exist_ok=True)
    temporary = final.with_name(temporary_name or f".tmp-{final.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        for path in temporary.rglob("*"):
            if path.is_file():
                path.chmod(_file_mode())  # safetensors writes 0600, and a group shares its checkpoints
                flush_to_disk(path)
        flush_to_disk(temporary)
        try:
            temporary.rename(final)
        except OSError as error:
            if error.errno in (errno.EEXIST, errno.ENOTEMPTY):
                raise FileExistsError(errno.EEXIST, "already published", str(final)) from error
            raise
        flush_to_disk(final.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _file_mode() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return 0o666 & ~mask


def remove_dead_saves(folder: Path) -> list[Path]:
    """Delete the temporary folders that killed saves left in `folder`; returns what was removed."""
    dead = [path for path in folder.glob(".tmp-*") if path.is_dir() and not path.is_symlink()]
    for path in dead:
        shutil.rmtree(path, ignore_errors=True)
    return dead


def flush_to_disk(path: Path) -> None:
    """fsync a file, or a folder where the platform can (Windows cannot open one)."""
    if path.is_dir() and os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY if os.name != "nt" else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


# ---------------------------------------------------------------------------------------------------------------------
# Small things
# ---------------------------------------------------------------------------------------------------------------------


class lazy_import:
    """`torch = lazy_import("torch")`: the module, imported when first used, because `--help` must not wait for it.

    Not importlib's LazyLoader: that leaves a half-made module in `sys.modules`, and torch's own circular imports trip
    over it.
    """

    def __init__(self, name: str):
        self._name = name

    def __getattr__(self, attribute: str) -> Any:
        return getattr(importlib.import_module(self._name), attribute)


def relative_path(path: str, start: str) -> str:
    """`path` as seen from the folder `start`; as it is where no way leads there (another drive of Windows)."""
    try:
        return os.path.relpath(path, start)
    except ValueError:
        return os.path.abspath(path)


def format_bytes(count: float) -> str:
    """1536 -> '1.5 KiB'."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def format_duration(seconds: float) -> str:
    """75 -> '1m15s'; 5000 -> '1h23m'."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    minutes, rest = divmod(whole, 60)
    return f"{minutes}m{rest:02d}s" if minutes < 60 else f"{minutes // 60}h{minutes % 60:02d}m"


def timestamp() -> str:
    return time.strftime("%Y%m%d_%H%M%S")


def wilson_interval(successes: int, trials: int) -> tuple[float, float]:
    """95 % confidence interval of a proportion, as (low, high).

    Wilson's score interval (Wilson 1927, doi:10.1080/01621459.1927.10502953): unlike p ± 1.96·s it stays inside
    [0, 1] and is sensible at 0 and 1. No trials give (0, 1).
    """
    if trials == 0:
        return 0.0, 1.0
    z = 1.959963984540054  # the normal distribution's 97.5 % quantile
    share, z2n = successes / trials, z * z / trials
    middle = (share + z2n / 2) / (1 + z2n)
    reach = z / (1 + z2n) * math.sqrt(share * (1 - share) / trials + z2n / (4 * trials))
    return max(0.0, middle - reach), min(1.0, middle + reach)
