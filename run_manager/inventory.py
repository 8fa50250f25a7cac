"""What lies in the two roots: every run of `./checkpoints/rm` and `./logs/rm`, its state, steps and sizes.

Reads only, follows no symbolic link, and takes whatever vanishes meanwhile as gone. Standard library only.
"""

from __future__ import annotations

import fnmatch
import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import utils
from checkpointing import manifest, run_folder
from checkpointing.run_folder import best_step, step_of
from common import file_locks, json_records
from utils import UserError, printable

TRASH = ".trash"
SORT_KEYS = ("started", "name", "state", "accuracy", "steps", "size")
UNKNOWN = "unknown"  # no record, or none that can be read
STATES = (run_folder.RUNNING, run_folder.FINISHED, run_folder.STOPPED, run_folder.CRASHED, UNKNOWN)


@dataclass(frozen=True)
class Roots:
    """Where runs lie. Nothing outside of these two folders is ever touched."""

    output: Path
    logs: Path
    has_orphans: bool = True  # whether logs without a run here are ours to show: not if only --output_dir was given


@dataclass(frozen=True)
class Accuracy:
    """An evaluation: how many pairs of how many were right after `step`. Old checkpoints do not say of how many."""

    step: int
    value: float
    pairs: int | None

    @property
    def interval(self) -> tuple[float, float] | None:
        return utils.wilson_interval(round(self.value * self.pairs), self.pairs) if self.pairs else None


@dataclass(frozen=True)
class Step:
    """One step-N folder."""

    folder: Path
    number: int
    bytes: int
    optimizer_bytes: int  # 0 if it was removed

    def accuracy(self) -> Accuracy | None:
        """Its evaluation, as far as it says."""
        content = read_object(self.folder / "training_state.json")
        value, pairs = content.get("eval_accuracy"), content.get("eval_pairs")
        if type(value) is not float or not 0 <= value <= 1:
            return None
        return Accuracy(self.number, value, pairs if type(pairs) is int and pairs > 0 else None)


@dataclass
class RunInfo:
    """One run, or logs that no run here claims (`folder` is None)."""

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
    def steps_done(self) -> int | None:
        newest = [step.number for step in self.steps] + ([self.record.step] if self.record else [])
        return max(newest, default=None)

    @property
    def planned_steps(self) -> int | None:
        return self.record.planned_steps if self.record else None

    @property
    def base_model(self) -> str:
        """Hub id or path; a path beneath the working folder as seen from there."""
        model = self.config.get("model")
        return utils.seen_from_here(model) if type(model) is str else "?"

    @property
    def training(self) -> str:
        lora = self.config.get("lora")
        return {True: "LoRA", False: "full"}.get(lora, "?") if type(lora) is bool else "?"

    def evaluations(self) -> list[Accuracy]:
        """All evaluations by step: of the record, or of the checkpoints of a run that has none."""
        if self.record:
            return [Accuracy(step, correct / pairs, pairs) for step, correct, pairs in self.record.evaluations]
        return [found for step in self.steps if (found := step.accuracy())]

    def last_and_best(self) -> tuple[Accuracy | None, Accuracy | None]:
        """The newest evaluation and the highest, the newest of equals."""
        found = self.evaluations()
        if not found:
            return None, None
        return found[-1], max(found, key=lambda one: (one.value, one.step))


# ---------------------------------------------------------------------------------------------------------------------
# Looking
# ---------------------------------------------------------------------------------------------------------------------


def scan(roots: Roots) -> tuple[list[RunInfo], list[str]]:
    """All runs, oldest first, and notes about what else lies in the roots and is left alone."""
    notes: list[str] = []
    logs = {path.name: path for path in subfolders(roots.logs, notes) if event_files(path)}
    runs = []
    for folder in subfolders(roots.output, notes):
        try:
            run = look_at(folder, roots)
        except FileNotFoundError:
            continue  # gone since the folder was read
        except OSError as error:
            notes.append(f"{printable(folder.name)}: cannot be read ({error.strerror})")
            continue
        if run is None:
            if not (folder.name in logs and folder == logs[folder.name]):
                notes.append(f"{printable(folder.name)}: no run (nothing in it was written by train_rm.py); left alone")
            continue
        if claims_logs(run, roots):
            run.log_folder = logs.pop(run.name, None)
            note_logs(run)
        runs.append(run)
    if roots.has_orphans:
        for name, folder in logs.items():
            run = RunInfo(name, None, folder, notes=["logs without a run here"])
            note_logs(run)
            runs.append(run)
    return sort_runs(runs, "started"), notes


def subfolders(root: Path, notes: list[str]) -> list[Path]:
    """The real folders in a root but for hidden ones, by name; links are noted and left alone."""
    try:
        entries = sorted(os.scandir(root), key=lambda entry: entry.name)
    except FileNotFoundError:
        return []
    except OSError as error:
        kind = utils.DiskOrNetworkError if utils.disk_full_cause(error) else UserError
        raise kind("a root cannot be read", where=root, found=error.strerror, next="see --output_dir, --log_dir") from (
            error
        )
    found = []
    for entry in entries:
        if entry.name.startswith("."):
            continue
        if entry.is_symlink():
            notes.append(f"{printable(entry.name)}: a symbolic link; left alone")
        elif is_junction(Path(entry.path)):
            notes.append(f"{printable(entry.name)}: a junction; left alone")
        elif entry.is_dir(follow_symlinks=False):
            found.append(root / entry.name)
    return found


def is_junction(path: Path) -> bool:
    """Windows' other kind of link between folders, which is no symbolic link to Python."""
    return hasattr(os.path, "isjunction") and os.path.isjunction(path)


def look_at(folder: Path, roots: Roots) -> RunInfo | None:
    """One run's folder; None if no training of ours ever was in it."""
    run = RunInfo(folder.name, folder)
    is_ours = False
    for entry in os.scandir(folder):
        path = folder / entry.name
        number = step_of(path)
        if entry.is_symlink():
            run.notes.append(f"{printable(entry.name)}: a symbolic link; what it points to is not part of the run")
        elif number is not None and entry.is_dir(follow_symlinks=False):
            sizes = file_sizes(path)
            optimizer = sizes.get(manifest.OPTIMIZER, 0)
            run.steps.append(Step(path, number, sum(sizes.values()), optimizer))
            run.checkpoint_bytes += run.steps[-1].bytes
            is_ours = True
        elif entry.name.startswith(("superseded-", ".tmp-")):
            size = measure(path)
            run.leftovers.append((path, size))
            run.checkpoint_bytes += size
            is_ours = True
        else:
            is_ours = is_ours or entry.name in (file_locks.RunLock.FILE, run_folder.RUN)
            run.checkpoint_bytes += measure(path)
    if not is_ours:
        return None
    run.steps.sort(key=lambda step: step.number)
    run.leftovers.sort()
    read_state(run)
    return run


def read_state(run: RunInfo) -> None:
    """State, start and settings, from the run's own lock and record."""
    try:
        run.record = run_folder.read_record(run.folder)
    except (OSError, ValueError) as error:
        run.notes.append(f"{run_folder.RUN} cannot be read: {error}")
    try:
        is_running = file_locks.is_locked(run.folder / file_locks.RunLock.FILE)
    except OSError as error:
        run.notes.append(f"its lock cannot be read ({error.strerror}): nobody knows whether it is running")
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
    """Whether logs of this run's name in the log root are this run's: its settings must say so.

    Another --output_dir may hold a run of the same name, and its logs are not ours to take.
    """
    log_dir = run.config.get("log_dir")
    if type(log_dir) is not str or "\0" in log_dir:
        return False
    told = os.path.normpath(os.path.join(os.path.abspath(roots.output), log_dir))
    if os.path.realpath(told) == os.path.realpath(roots.logs):
        return True
    run.notes.append(f"its logs lie in {printable(told)}, which is not --log_dir; left alone")
    return False


def note_logs(run: RunInfo) -> None:
    """Size of a run's logs, and when they began if the run does not say."""
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


def file_sizes(folder: Path) -> dict[str, int]:
    """Bytes by name of what lies in a folder, whole subfolders as one."""
    try:
        return {
            entry.name: measure(Path(entry.path))
            if entry.is_dir(follow_symlinks=False)
            else entry.stat(follow_symlinks=False).st_size
            for entry in os.scandir(folder)
        }
    except FileNotFoundError:
        return {}


def measure(path: Path) -> int:
    """Bytes of a file, or of all files beneath a folder. Links count as themselves."""
    return sum(found.st_size for _, found in walk(path) if not stat.S_ISDIR(found.st_mode))


def walk(path: Path) -> Iterator[tuple[str, os.stat_result]]:
    """A path and all beneath it with their lstat, through no link; what vanishes meanwhile is left out."""
    waiting = [os.fspath(path)]
    while waiting:
        current = waiting.pop()
        try:
            found = os.lstat(current)
            yield current, found
            if stat.S_ISDIR(found.st_mode) and not is_junction(Path(current)):
                waiting += [entry.path for entry in os.scandir(current)]
        except FileNotFoundError:
            continue


def read_object(path: Path) -> dict[str, Any]:
    """A JSON file's object; {} for anything else, which is reported where it matters: on loading."""
    try:
        content = json_records.read_own_json(path)
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def best_and_last(run: RunInfo) -> tuple[Step | None, Step | None]:
    """A run's best checkpoint, as chat.py and training mean it, and its newest."""
    best = best_step(run.folder) if run.folder else None
    return next((step for step in run.steps if step.folder == best), None), (run.steps or [None])[-1]


def resumed_by(run: RunInfo, runs: list[RunInfo], roots: Roots) -> dict[str, list[str]]:
    """Names of this run's steps that other runs were resumed from -> those runs."""
    found: dict[str, list[str]] = {}
    for other in runs:
        source = other.record.resumed_from if other.record else None
        if not source or other is run or run.folder is None:
            continue
        path = Path(os.path.normpath(os.path.join(os.path.abspath(roots.output), source)))
        if path.parent == Path(os.path.abspath(run.folder)):
            found.setdefault(path.name, []).append(other.name)
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Choosing
# ---------------------------------------------------------------------------------------------------------------------


def sort_runs(runs: list[RunInfo], key: str) -> list[RunInfo]:
    """By one of SORT_KEYS, growing, what is unknown first: so the newest, best or largest stand last, by the prompt."""

    def value(run: RunInfo) -> Any:
        if key == "accuracy":
            best = run.last_and_best()[1]
            return best.value if best else -1.0
        started = run.started.timestamp() if run.started else 0.0
        size = run.checkpoint_bytes + run.log_bytes
        steps = -1 if run.steps_done is None else run.steps_done
        return {"started": started, "name": "", "state": STATES.index(run.state), "steps": steps, "size": size}[key]

    return sorted(runs, key=lambda run: (value(run), run.name, run.folder is None))


def filter_runs(
    runs: list[RunInfo], state: str | None, older_than: timedelta | None, pattern: str | None
) -> list[RunInfo]:
    """Those in a state, begun longer ago than an age, with a name like `lr-*`; a run of unknown age is not old."""
    limit = datetime.now(UTC) - older_than if older_than is not None else None
    return [
        run
        for run in runs
        if (state is None or run.state == state)
        and (limit is None or (run.started is not None and run.started < limit))
        and (pattern is None or fnmatch.fnmatchcase(run.name, pattern))
    ]


def parse_age(text: str) -> timedelta:
    """'7d' -> seven days; ValueError says what is wanted."""
    units = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}
    match = re.fullmatch(r"(\d{1,5})([smhdw])", text, re.ASCII)
    if not match:
        raise ValueError("an age as 90s, 30m, 12h, 7d or 2w")
    return timedelta(seconds=int(match.group(1)) * units[match.group(2)])


def find_run(name: str, runs: list[RunInfo]) -> RunInfo:
    """The run that is called exactly so; logs of that name only if there is no such run."""
    found = sorted((run for run in runs if run.name == name), key=lambda run: run.folder is None)
    if not found:
        guess = utils.nearest(printable(name), [printable(run.name) for run in runs])
        raise UserError(
            f"there is no run named '{printable(name)}'{guess}",
            safe="nothing was touched",
            next="python manage_runs.py --list shows the names",
        )
    return found[0]
