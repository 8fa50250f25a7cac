"""What every script shares and no library offers: errors and exit codes, stopping, lazy imports, text.

Standard library only, so that `--help` and listing runs stay instant. Nothing here knows torch, models or losses.
"""

import builtins
import contextlib
import difflib
import errno
import hashlib
import importlib
import itertools
import json
import math
import os
import signal
import subprocess
import sys
import time
import traceback
import types
import typing
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

EXIT_BUG, EXIT_BAD_INPUT, EXIT_BAD_CHECKPOINT, EXIT_DISK_OR_NETWORK = 1, 2, 3, 4
EXIT_CTRL_C = 130

# -- Errors: what happened, where, what is safe, what to type next -----------------------------------------------------


class UserError(ValueError):
    """Something the user can fix. Shown without a traceback; `exit_code` goes to the shell."""

    exit_code = EXIT_BAD_INPUT

    def __init__(self, what: str, *, where: Any = None, found: Any = None, safe: Any = None, next: Any = None):
        details = {"where": where, "found": found, "safe": safe, "next": next}
        lines = [f"error: {what}"]
        lines += [f"  {name + ':':<7} {value}" for name, value in details.items() if value is not None]
        super().__init__("\n".join(lines))
        self.what, self.found = what, found


class CheckpointError(UserError):
    """A checkpoint is damaged, incomplete or does not fit."""

    exit_code = EXIT_BAD_CHECKPOINT


class DiskOrNetworkError(UserError):
    """The disk or the network failed."""

    exit_code = EXIT_DISK_OR_NETWORK


class Stopped(BaseException):
    """Ctrl-C or SIGTERM, raised where stopping is safe. Not an Exception, so that nothing swallows it by accident."""

    def __init__(self, signal_number: int):
        super().__init__(signal.Signals(signal_number).name)
        self.signal_number = signal_number
        self.exit_code = 128 + signal_number


# SIGHUP is what a closed terminal or a dropped connection sends; Windows has none.
STOP_SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))


class StopRequest:
    """Turns the first Ctrl-C or SIGTERM into a request that `check` reports; a second one ends the process at once."""

    def __init__(self, is_silent: bool = False) -> None:
        self.signal_number: int | None = None
        self.is_silent = is_silent
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> typing.Self:
        for number in STOP_SIGNALS:
            if not _is_ignored(number):
                self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: object) -> None:
        if self.signal_number is not None:
            os._exit(128 + number)  # no clean-up is needed: see `atomic_folder`
        self.signal_number = number
        if not self.is_silent:
            say_if_heard("\nstopping at the next micro-batch; press again to leave without saving")

    def check(self) -> None:
        """Raise `Stopped` if a stop was requested."""
        if self.signal_number is not None:
            raise Stopped(self.signal_number)


def _is_ignored(number: int) -> bool:
    """Whether the parent process asked to ignore a signal, as `nohup` does with that of a closed terminal."""
    return signal.getsignal(number) is signal.SIG_IGN


def run_child(command: list[str]) -> int:
    """Run another script to its end; returns its exit code. A stop request goes to the child, which saves what it has.

    Raises `Stopped` then, when the child has ended. The child has a session of its own, so that it hears of a Ctrl-C
    once, whether the terminal sent it to all or someone to this process alone: twice means to leave without saving.
    """
    asked: list[int] = []
    child: subprocess.Popen[bytes] | None = None

    def pass_on(number: int, frame: object) -> None:
        asked.append(number)
        if child is not None and os.name != "nt":  # Windows' console tells the child by itself
            child.send_signal(number)

    previous = {number: signal.signal(number, pass_on) for number in STOP_SIGNALS if not _is_ignored(number)}
    try:
        child = subprocess.Popen(command, start_new_session=os.name != "nt")
        if asked and os.name != "nt":  # while it was started
            child.send_signal(asked[-1])
        code = child.wait()
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    if asked:
        raise Stopped(asked[0])
    return code


def say_if_heard(text: str, stream: typing.TextIO | None = None) -> None:
    """Print, by default to standard error; nothing happens if its reader has gone (a closed terminal)."""
    stream = stream or sys.stderr
    with contextlib.suppress(OSError, ValueError):  # ValueError: the stream is closed
        print(text, file=stream, flush=True)


def run_script(main: Callable[[list[str]], None]) -> int:
    """Run a script's `main` and turn whatever leaves it into a message and an exit code."""
    argv = sys.argv[1:]
    stop_signals: list[int] = []

    def stop_now(number: int, frame: object) -> typing.NoReturn:
        stop_signals.append(number)
        raise Stopped(number)

    try:
        for name in ("stdout", "stderr"):
            if getattr(sys, name) is None:  # started with it closed
                setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
            # a character the terminal can't encode must not crash training
            getattr(sys, name).reconfigure(errors="backslashreplace")
        for number in STOP_SIGNALS:
            if not _is_ignored(number):
                signal.signal(number, stop_now)
        check_working_folder()
        main(argv)
        return 0
    except (Exception, KeyboardInterrupt, Stopped) as error:
        explained, exit_code = explain(error, stop_signals)
        if wants_debug(argv):
            traceback.print_exception(error)
        say_if_heard(explained)
        return exit_code


def explain(error: BaseException, stop_signals: list[int]) -> tuple[str, int]:
    """What to tell the user of whatever ended a script, and the exit code."""
    if isinstance(error, (KeyboardInterrupt, Stopped)):
        return "stopped", getattr(error, "exit_code", EXIT_CTRL_C)
    if isinstance(error, BrokenPipeError):  # `... | head`: closing stdout must not fail again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return "stopped: the reader of the output has gone", EXIT_BUG
    if isinstance(error, ModuleNotFoundError):
        error = UserError(f"the package {error.name!r} is not installed", next="pip install -r requirements.txt")
    elif isinstance(error, UserError):
        if stop_signals and not isinstance(error, DiskOrNetworkError):
            return "stopped", 128 + stop_signals[0]
    elif disk_error := disk_full_cause(error):
        error = _explain_disk_error(disk_error)
    elif is_out_of_memory(error):
        error = UserError(
            "out of memory",
            found=(str(error).strip() or "MemoryError").splitlines()[0],
            safe="everything saved before is untouched",
            next="a smaller model, a smaller --max_length or --tokens_per_batch, or --lora",
        )
    elif stop_signals:  # an interrupted import may report something else
        return "stopped", 128 + stop_signals[0]
    if isinstance(error, UserError):
        return str(error), error.exit_code
    frame = traceback.extract_tb(error.__traceback__)[-1]
    bug = UserError(
        f"{type(error).__name__}: {str(error).strip() or 'no message'}",
        where=f"{frame.filename}:{frame.lineno}",
        next="this is a bug: rerun with --debug and include the traceback in a report",
    )
    return str(bug), EXIT_BUG


def check_working_folder() -> None:
    try:
        os.getcwd()
    except OSError as error:
        raise UserError(
            "the working folder was deleted", found=error.strerror, next="cd to an existing folder"
        ) from error


def wants_debug(argv: list[str]) -> bool:
    """Whether a command line has --debug, in any of the forms of a switch."""
    for word, following in itertools.zip_longest(argv, argv[1:], fillvalue=""):
        if word == "--debug":
            return following.lower() not in ("false", "0", "no")
        if word.startswith("--debug="):
            return word.lower() not in ("--debug=false", "--debug=0", "--debug=no")
    return False


def _explain_disk_error(error: OSError) -> UserError:
    details = {"where": error.filename, "found": error.strerror, "safe": "everything saved before is untouched"}
    if error.errno in PATH_ERRORS:
        return UserError("a path cannot be used", **details, next="another name or folder")
    advice = f"{disk_advice(error.errno)}, or name another folder"
    return DiskOrNetworkError("writing to disk failed", **details, next=advice)


def disk_advice(number: int | None) -> str:
    """What to do about an error of the operating system while writing, by its number."""
    if number in FULL_DISK_ERRORS:
        return "free some space"
    if number == errno.EFBIG:
        return "raise the limit on file sizes (ulimit -f)"
    if number in (errno.EACCES, errno.EPERM, errno.EROFS):
        return "make the folder writable"
    if number in PATH_ERRORS:
        return "see what is in the way"
    return "check the folder and its disk"


FULL_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT)
PATH_ERRORS = (errno.ENAMETOOLONG, errno.ENOTDIR, errno.EISDIR, errno.EEXIST)
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.EACCES, errno.EPERM)


def disk_full_cause(error: BaseException | None) -> OSError | None:
    """The OSError about a full or unwritable disk in an exception's chain of causes, or None."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in PATH_ERRORS + DISK_ERRORS:
            return error
        error = error.__cause__ or error.__context__
    return None


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out: CUDA has a class for it, MPS and the CPU only a message."""
    words = (
        "out of memory", "can't allocate memory", "not enough memory",
        "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED", "CUDNN_STATUS_NOT_INITIALIZED",
    )  # fmt: skip
    is_named_so = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return is_named_so or any(word in str(error) for word in words)


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type if it has none."""
    text = error.what if isinstance(error, UserError) else str(error)
    return (text.strip().splitlines() or [type(error).__name__])[0][:300]


def printable(text: str) -> str:
    """A name as one line without control characters, which are shown as escapes."""
    return "".join(sign if sign.isprintable() else sign.encode("unicode_escape").decode() for sign in text)


def nearest(name: str, names: Iterable[str]) -> str:
    """`, did you mean 'x'?` for the closest of `names`, or nothing."""
    close = difflib.get_close_matches(name, list(names), n=1, cutoff=0.6)
    return f", did you mean {close[0]!r}?" if close else ""


def near_matches(name: str, names: Iterable[str]) -> list[str]:
    """Up to three of `names` that somebody who typed `name` may have meant, the likeliest first."""

    def likeness(other: str) -> float:
        if len(name) > 2 and other.casefold().startswith(name.casefold()):
            return 1.0
        return difflib.SequenceMatcher(None, name.casefold(), other.casefold()).ratio()

    scores = {other: likeness(other) for other in names}
    return sorted((other for other, score in scores.items() if score >= 0.5), key=lambda other: -scores[other])[:3]


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def json_text(content: Any) -> str:
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


def write_json(path: Path, content: Any) -> None:
    path.write_text(json_text(content), encoding="utf-8")


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


# -- Lazy imports and text ---------------------------------------------------------------------------------------------


class _LazyModule:
    """Stands for a module, which is imported when something in it is first asked for."""

    def __init__(self, name: str):
        self._name = name

    def __getattr__(self, attribute: str) -> Any:
        return getattr(importlib.import_module(self._name), attribute)


@contextlib.contextmanager
def lazy_imports() -> Iterator[None]:
    """Modules named by `import` and `from package import module` in this block load when first used.

    For the scripts at the root, whose `--help` must not wait for torch. Type checkers see plain imports. Python 3.15
    has such imports of its own (PEP 810). Not importlib's LazyLoader: it leaves a half-made module in `sys.modules`,
    which breaks torch's circular imports. Classes and functions cannot be imported this way.
    """

    def import_later(name: str, globals: Any = None, locals: Any = None, names: Any = (), level: int = 0) -> Any:
        if not names:
            return _LazyModule(name)
        return types.SimpleNamespace(**{each: _LazyModule(f"{name}.{each}") for each in names})

    eager, builtins.__import__ = builtins.__import__, import_later
    try:
        yield
    finally:
        builtins.__import__ = eager


def relative_path(path: str, start: str) -> str:
    """`path` relative to the folder `start`; absolute if that is impossible (another drive of Windows)."""
    try:
        return os.path.relpath(path, start)
    except ValueError:
        return os.path.abspath(path)


def seen_from_here(path: str) -> str:
    """A path below the working folder, relative to it; anything else, a hub id too, unchanged."""
    return path.removeprefix(os.getcwd() + os.sep)


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


def counted(count: int, noun: str, plural: str = "") -> str:
    """(1, 'run') -> '1 run'; (2000, 'run') -> '2,000 runs'; (2, 'reply', 'replies') -> '2 replies'."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {plural or f'{noun}s'}"


def timestamp() -> str:
    return time.strftime("%Y%m%d_%H%M%S")


def round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


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
