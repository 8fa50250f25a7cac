"""The runs of all kinds, such as those in `./checkpoints/rm` and `./logs/rm`: their states, steps and sizes.

Only reads and follows no symbolic link. What vanishes while it is read counts as gone. Standard library only.
"""

import fnmatch
import math
import os
import re
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import utils
from checkpointing import manifest, run_folder
from checkpointing.run_folder import EvalPoint, best_step, step_of
from common import file_locks, json_records
from utils import UserError, printable

TRASH = ".trash"
KINDS = ("rm", "sft", "grpo")  # reward models, and policies: supervised, and against a reward model
ACCURACY = "accuracy"  # what reward models are evaluated by
SORT_KEYS = ("started", "name", "state", "accuracy", "steps", "size")
UNKNOWN = "unknown"  # no record, or none that can be read
STATES = (run_folder.RUNNING, run_folder.FINISHED, run_folder.STOPPED, run_folder.CRASHED, UNKNOWN)


@dataclass(frozen=True)
class Roots:
    """Where runs of one kind are. Nothing outside these two folders and the trash beside each is ever touched."""

    output: Path
    logs: Path
    has_orphans: bool = True  # show logs without checkpoints? Not if only --output_dir was given
    is_one_of_several: bool = False  # then names go with their kind: two kinds may have runs of one name

    @property
    def kind(self) -> str:
        """What is trained there, by the folder's name; "" if that does not say."""
        return self.output.name if self.output.name in KINDS else ""

    @property
    def prefix(self) -> str:
        """What goes before the names of its runs wherever they are printed."""
        return f"{self.kind}/" if self.is_one_of_several else ""


@dataclass(frozen=True)
class Step:
    """One step-N folder."""

    folder: Path
    number: int
    bytes: int
    optimizer_bytes: int  # 0 if it was removed

    def accuracy(self) -> EvalPoint | None:
        """Its evaluation, if it has one that can be read; `count` is 0 if it does not say over how many pairs."""
        try:
            found = run_folder.saved_evaluation(self.folder)
        except (OSError, ValueError):
            return None
        if found is None or not 0 <= found[0] <= 1:
            return None
        value, count = found
        low, high = utils.wilson_interval(round(value * count), count) if count else (0.0, 1.0)
        return EvalPoint(self.number, value, low, high, count or 0)


@dataclass
class RunInfo:
    """One run, or logs without a run (`folder` is None)."""

    roots: Roots
    name: str
    folder: Path | None
    log_folder: Path | None = None
    state: str = UNKNOWN
    cause: str | None = None
    started: datetime | None = None
    record: run_folder.RunRecord | None = None
    config: dict[str, Any] = field(default_factory=dict)
    steps: list[Step] = field(default_factory=list)
    leftovers: list[tuple[Path, int]] = field(default_factory=list)  # superseded-… and .tmp-… with their bytes
    checkpoint_bytes: int = 0
    log_bytes: int = 0
    notes: list[str] = field(default_factory=list)

    @property
    def label(self) -> str:
        """Its name as it is printed, which the flags take: with its kind if there are several."""
        return printable(f"{self.roots.prefix}{self.name}")

    @property
    def names(self) -> tuple[str, str]:
        """What it may be called: RUN and KIND/RUN."""
        return self.name, f"{self.roots.kind}/{self.name}"

    @property
    def kind(self) -> str:
        """What it trains: one of KINDS, by the script that wrote its record, else by its folder."""
        script = self.record.script.removeprefix("train_").removesuffix(".py") if self.record else ""
        return script if script in KINDS else self.roots.kind or KINDS[0]

    @property
    def steps_done(self) -> int | None:
        newest = [step.number for step in self.steps] + ([self.record.step] if self.record else [])
        return max(newest, default=None)

    @property
    def base_model(self) -> str:
        """Hub id or path; a path below the working folder is relative to it."""
        model = self.config.get("model")
        return utils.seen_from_here(model) if type(model) is str else "?"

    @property
    def training(self) -> str:
        lora = self.config.get("lora")
        return ("LoRA" if lora else "full") if type(lora) is bool else "?"

    @property
    def metric(self) -> str:
        """What its evaluations measure; higher is better."""
        return next(iter(self.record.evaluations), ACCURACY) if self.record else ACCURACY

    def best_and_last(self) -> tuple[EvalPoint | None, EvalPoint | None]:
        """The highest evaluation, the newest of equals, and the newest: of the record, or else of the checkpoints."""
        if self.record:
            found = self.record.evaluations.get(self.metric, [])
        else:
            found = [accuracy for step in self.steps if (accuracy := step.accuracy())]
        best = max(found, key=lambda accuracy: (accuracy.value, accuracy.step), default=None)
        return best, found[-1] if found else None


# -- Reading the roots -------------------------------------------------------------------------------------------------


def scan(places: Iterable[Roots]) -> tuple[list[RunInfo], list[str]]:
    """All runs, oldest first, and notes about what else is in the roots and is not touched."""
    notes: list[str] = []
    runs = [run for roots in places for run in scan_roots(roots, notes)]
    return sort_runs(runs, "started"), notes


def scan_roots(roots: Roots, notes: list[str]) -> list[RunInfo]:
    """The runs of one kind; adds to `notes`."""
    logs = {path.name: path for path in subfolders(roots.logs, notes) if event_files(path)}
    runs = []
    for folder in subfolders(roots.output, notes):
        try:
            run = read_run(roots, folder)
        except FileNotFoundError:
            continue  # gone since the folder was read
        except OSError as error:
            notes.append(f"{printable(roots.prefix + folder.name)}: cannot be read ({error.strerror})")
            continue
        if run is None:
            if folder != logs.get(folder.name):
                name = printable(roots.prefix + folder.name)
                notes.append(f"{name}: not a run (no training wrote anything in it); left alone")
            continue
        if claims_logs(run, roots):
            run.log_folder = logs.pop(run.name, None)
            note_logs(run)
        runs.append(run)
    if roots.has_orphans:
        for name, folder in logs.items():
            run = RunInfo(roots, name, None, folder, notes=["logs without a run here"])
            note_logs(run)
            runs.append(run)
    return runs


def subfolders(root: Path, notes: list[str]) -> list[Path]:
    """The folders in a root by name, without hidden ones. Links are skipped, with a note."""
    try:
        entries = sorted(os.scandir(root), key=lambda entry: entry.name)
    except FileNotFoundError:
        return []
    except OSError as error:
        kind = utils.DiskOrNetworkError if utils.disk_full_cause(error) else UserError
        advice = "see --output_dir, --log_dir"
        raise kind("a folder of runs cannot be read", where=root, found=error.strerror, next=advice) from error
    entries = [entry for entry in entries if not entry.name.startswith(".")]
    links = [entry.name for entry in entries if entry.is_symlink() or is_junction(entry.path)]
    notes += [f"{printable(name)}: a symbolic link; left alone" for name in links]
    return [root / entry.name for entry in entries if entry.is_dir(follow_symlinks=False) and entry.name not in links]


def is_junction(path: str | Path) -> bool:
    """Whether a path is Windows' other kind of link between folders, which Python does not call a symbolic link."""
    return hasattr(os.path, "isjunction") and os.path.isjunction(path)


def read_run(roots: Roots, folder: Path) -> RunInfo | None:
    """The run in a folder; None if nothing in it comes from a training."""
    run = RunInfo(roots, folder.name, folder)
    has_lock_or_record = False
    for entry in os.scandir(folder):
        path = folder / entry.name
        if entry.is_symlink():
            run.notes.append(f"{printable(entry.name)}: a symbolic link; what it points to is not part of the run")
            continue
        size, number = measure(path), step_of(path)
        run.checkpoint_bytes += size
        if number is not None and entry.is_dir(follow_symlinks=False):
            run.steps.append(Step(path, number, size, measure(os.path.join(path, manifest.OPTIMIZER))))
        elif entry.name.startswith(("superseded-", ".tmp-")):
            run.leftovers.append((path, size))
        has_lock_or_record |= entry.name in (file_locks.RunLock.FILE, run_folder.RUN)
    if not (run.steps or run.leftovers or has_lock_or_record):
        return None
    run.steps.sort(key=lambda step: step.number)
    run.leftovers.sort()
    read_state(run)
    return run


def read_state(run: RunInfo) -> None:
    """Set a run's state, start and settings from its lock and record."""
    try:
        run.record = run_folder.read_record(run.folder)
    except (OSError, ValueError) as error:
        run.notes.append(f"{run_folder.RUN} cannot be read: {error}")
    try:
        is_running = file_locks.is_locked(run.folder / file_locks.RunLock.FILE)
    except OSError as error:
        run.notes.append(f"its lock cannot be read ({error.strerror}): it may be running")
        is_running = False
    if run.record:
        run.started = datetime.fromisoformat(run.record.started)
        run.config, run.state, run.cause = run.record.config, run.record.state, run.record.cause
        if run.state == run_folder.RUNNING and not is_running:
            run.state, run.cause = run_folder.CRASHED, "killed, or the machine went down"
    elif run.steps:
        run.config = read_object(run.steps[-1].folder / "train_config.json")
    if is_running:
        run.state, run.cause = run_folder.RUNNING, None


def claims_logs(run: RunInfo, roots: Roots) -> bool:
    """Whether logs with a run's name are its own, by its settings: another --output_dir may hold a run of that name."""
    log_dir = run.config.get("log_dir")
    if type(log_dir) is not str or "\0" in log_dir:
        return False
    stated = os.path.normpath(os.path.join(os.path.abspath(roots.output), log_dir))
    if os.path.realpath(stated) == os.path.realpath(roots.logs):
        return True
    run.notes.append(f"its logs are in {printable(stated)}, which is not --log_dir; left alone")
    return False


def note_logs(run: RunInfo) -> None:
    """Set the size of a run's logs, and its start from them if the run has no record."""
    if run.log_folder is None:
        run.notes.append("no logs here")
        return
    run.log_bytes = measure(run.log_folder)
    if run.started is None:  # TensorBoard puts the second of its creation into an event file's name
        stamps = [re.search(r"tfevents\.(\d{9,11})\.", name, re.ASCII) for name in event_files(run.log_folder)]
        if seconds := [int(stamp.group(1)) for stamp in stamps if stamp]:
            run.started = datetime.fromtimestamp(min(seconds), UTC)


def event_files(folder: Path) -> list[str]:
    try:
        return [name for name in os.listdir(folder) if "tfevents" in name]
    except OSError:
        return []


def measure(path: str | Path) -> int:
    """Bytes of a file, or of all files below a folder; 0 if there is none. Links are not followed."""
    return sum(found.st_size for _, found in walk(path) if not stat.S_ISDIR(found.st_mode))


def walk(path: str | Path) -> Iterator[tuple[str, os.stat_result]]:
    """A path and everything below it with their lstat, following no link and skipping what vanishes meanwhile."""
    waiting = [os.fspath(path)]
    while waiting:
        current = waiting.pop()
        try:
            found = os.lstat(current)
            yield current, found
            if stat.S_ISDIR(found.st_mode) and not is_junction(current):
                waiting += [entry.path for entry in os.scandir(current)]
        except FileNotFoundError:
            continue


def read_object(path: Path) -> dict[str, Any]:
    """A JSON file's object; {} for anything else, which training or chat.py reports when it loads the file."""
    try:
        content = json_records.read_own_json(path)
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def best_and_last_step(run: RunInfo) -> tuple[Step | None, Step | None]:
    """A run's best checkpoint, as chat.py and training choose it, and its newest."""
    best = best_step(run.folder) if run.folder else None
    return next((step for step in run.steps if step.folder == best), None), (run.steps or [None])[-1]


def resumed_by(run: RunInfo, runs: list[RunInfo]) -> dict[str, list[RunInfo]]:
    """The steps of this run that other runs were resumed from: step name -> those runs."""
    found: dict[str, list[RunInfo]] = {}
    for other in runs:
        source = other.record.resumed_from if other.record else None
        if not source or other is run or run.folder is None:
            continue
        path = Path(os.path.normpath(os.path.join(os.path.abspath(other.roots.output), source)))
        if path.parent == Path(os.path.abspath(run.folder)):
            found.setdefault(path.name, []).append(other)
    return found


# -- Choosing ----------------------------------------------------------------------------------------------------------


def sort_runs(runs: list[RunInfo], key: str) -> list[RunInfo]:
    """Ascending by one of SORT_KEYS, unknown values first: the newest, best or largest is last, next to the prompt.

    What evaluations measure differs from kind to kind, so sorting by it puts one kind after another.
    """

    def value(run: RunInfo) -> Any:
        if key == "accuracy":
            best, _ = run.best_and_last()
            return KINDS.index(run.kind), best.value if best else -math.inf
        started = run.started.timestamp() if run.started else 0.0
        size = run.checkpoint_bytes + run.log_bytes
        steps = -1 if run.steps_done is None else run.steps_done
        return {"started": started, "name": "", "state": STATES.index(run.state), "steps": steps, "size": size}[key]

    return sorted(runs, key=lambda run: (value(run), run.name, run.folder is None, run.kind))


def passes(run: RunInfo, state: str | None, older_than: timedelta | None, pattern: str | None) -> bool:
    """Whether a run is in a state, started longer ago than an age (not if unknown), and has a name like `lr-*`."""
    if older_than is not None and (run.started is None or run.started >= datetime.now(UTC) - older_than):
        return False
    has_name = pattern is None or any(fnmatch.fnmatchcase(name, pattern) for name in run.names)
    return state in (None, run.state) and has_name


def parse_age(text: str) -> timedelta:
    """'7d' -> seven days; ValueError says what is wanted."""
    units = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}
    match = re.fullmatch(r"(\d{1,5})([smhdw])", text, re.ASCII)
    if not match:
        raise ValueError("an age as 90s, 30m, 12h, 7d or 2w")
    return timedelta(seconds=int(match.group(1)) * units[match.group(2)])


def find_run(name: str, runs: list[RunInfo]) -> RunInfo:
    """The run with exactly this name, RUN or KIND/RUN; logs with this name only if there is no such run."""
    found = [run for run in runs if name in run.names]
    found = [run for run in found if run.folder] or found
    if not found:
        names = [run.names["/" in name] for run in runs]
        raise UserError(
            f"there is no run named '{printable(name)}'{utils.nearest(printable(name), map(printable, names))}",
            safe="nothing was changed",
            next="python manage_runs.py --list shows the names",
        )
    if len(found) > 1:
        raise UserError(
            f"there are {len(found)} runs named '{printable(name)}'",
            where=", ".join(str(run.folder or run.log_folder) for run in found),
            safe="nothing was changed",
            next=f"the same command with {' or '.join(printable(run.names[1]) for run in found)}",
        )
    return found[0]
