"""The folder of a run: its step-N folders and its record, run.json.

Standard library only, so that manage_runs.py reads a thousand of them without importing torch.
"""

import contextlib
import dataclasses
import itertools
import json
import math
import os
import platform
import re
import shlex
import shutil
import sys
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import utils
from common import atomic_files, file_locks, json_records

RUN = "run.json"
DEFAULT_SCRIPT = "train_rm.py"  # of runs whose record names none
RUNNING, FINISHED, STOPPED, CRASHED = "running", "finished", "stopped", "crashed"

# -- Steps: RUN/step-N -------------------------------------------------------------------------------------------------


def run_name_problem(name: str) -> str | None:
    """Why a run name cannot be a folder's name on every platform, or None."""
    reserved = {"con", "prn", "aux", "nul", *(f"{port}{i}" for port in ("com", "lpt") for i in range(1, 10))}
    if not re.fullmatch(r"[^\W_][\w.+=@-]*", name) or name.endswith("."):
        return "may hold only letters, digits and _-.+=@, must begin with a letter or digit and not end with '.'"
    if len(name.encode()) > 100:
        return f"may have at most 100 bytes, not {len(name.encode())}"
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


def saved_evaluation(step_folder: Path) -> tuple[float, int | None] | None:
    """The evaluation of a step: (value, examples it is over, if known); None if it was not evaluated when saved."""
    content = json_records.read_own_json(step_folder / "training_state.json")
    if not isinstance(content, dict):
        return None
    value = content.get("eval_value", content.get("eval_accuracy"))  # eval_accuracy, eval_pairs: names of old files
    count = content.get("eval_count", content.get("eval_pairs"))
    if type(value) is not float or not math.isfinite(value):
        return None
    return value, count if type(count) is int and count > 0 else None


def best_step(run_folder: Path) -> Path | None:
    """The step with the highest evaluation, the newest of equals; None if none was evaluated when saved."""
    scored = []
    for path in step_folders(run_folder):
        try:
            evaluation = saved_evaluation(path)
        except (OSError, ValueError):
            continue  # a damaged step cannot be the best
        if evaluation:
            scored.append((evaluation[0], step_of(path) or 0, path))
    return max(scored)[2] if scored else None


def resume_command(folder: Path) -> str:
    """What to type to go on from a run's folder or one of its steps, with the script that trains it."""
    record = record_or_none(folder.parent if step_of(folder) is not None else folder)
    name = f'"{folder}"' if " " in str(folder) else folder  # every shell knows these quotes
    return f"python {record.script if record else DEFAULT_SCRIPT} --resume_from {name}"


def has_begun(folder: Path) -> bool:
    """Whether a run's folder holds anything but a lock, a record and what a killed first save left."""
    bare = (file_locks.RunLock.FILE, RUN)
    return any(path.name not in bare and not path.name.startswith(".tmp-") for path in folder.iterdir())


def remove_unused(folder: Path, log_folder: Path) -> None:
    """Remove the folders of a run in which nothing was trained; one that began once keeps its record."""
    if has_begun(folder) or (folder / RUN).exists():
        return
    shutil.rmtree(folder, ignore_errors=True)  # Windows keeps a folder with an open file, which does no harm
    with contextlib.suppress(OSError):  # it holds logs, or was never made
        log_folder.rmdir()


# -- run.json ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class EvalPoint:
    """One evaluation: a metric's value with its 95 % interval, over `count` examples."""

    step: int
    value: float
    low: float
    high: float
    count: int


@dataclass
class RunRecord:
    """One training, from when it began to how it ended. It is rewritten whole after each evaluation and save.

    "running" beside a lock that nobody holds is a run that was killed: whoever is killed writes nothing.
    """

    state: str  # running, finished, stopped, crashed
    started: str  # the first time it began, ISO 8601 in UTC
    began: str  # the last time: it may have been resumed
    process: int
    host: str
    step: int
    planned_steps: int
    ended: str | None = None
    cause: str | None = None  # of stopped and crashed
    resumed_from: str | None = None  # the step of *another* run, as seen from output_dir
    config: dict[str, Any] = dataclasses.field(default_factory=dict)  # as in train_config.json
    changed: dict[str, Any] = dataclasses.field(default_factory=dict)  # setting -> the default that it departs from
    script: str = DEFAULT_SCRIPT  # that trains it
    evaluations: dict[str, list[EvalPoint]] = dataclasses.field(default_factory=dict)  # by metric: accuracy, reward


def new_record(
    script: str, step: int, planned_steps: int, config: dict[str, Any], defaults: dict[str, Any]
) -> RunRecord:
    """The record of a run that begins now in this process."""
    now = time_text()
    changed = {name: defaults[name] for name, value in config.items() if name in defaults and value != defaults[name]}
    record = RunRecord(RUNNING, now, now, os.getpid(), platform.node(), step, planned_steps, script=script)
    record.config, record.changed = config, changed
    return record


def start_command(folder: Path, record: RunRecord) -> str:
    """What to type to start a run again that saved nothing: its settings, where they are not the defaults."""
    words = ["python", record.script, "--run_name", folder.name]
    places = {"output_dir": str(folder.parent), "log_dir": os.path.normpath(folder.parent / record.config["log_dir"])}
    for name, value in ({**record.config, **places}).items():
        if name not in record.changed or name == "run_name" or value is None:
            continue
        if isinstance(value, bool):
            words.append(f"--{name}" if value else f"--no_{name}")
        else:
            words += [f"--{name}", str(value)]
    return shlex.join(words)


def time_text() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def read_record(run_folder: Path) -> RunRecord | None:
    """A run's record, None if it has none; ValueError says what is wrong with the file."""
    content = json_records.read_own_json(run_folder / RUN)
    if content is None:
        return None
    if isinstance(content, dict) and isinstance(content.get("evaluations"), list):
        content["evaluations"] = {"accuracy": [_old_evaluation(entry) for entry in content["evaluations"]]}
    record = json_records.from_json(RunRecord, content)
    for point in itertools.chain.from_iterable(record.evaluations.values()):
        if not point.low <= point.value <= point.high or point.count <= 0:
            raise ValueError(f"{point!r} is not an evaluation")
    for text in (record.started, record.began, record.ended or record.began):
        when = datetime.fromisoformat(text)
        if when.tzinfo is None or not 1970 < when.year < 9999:
            raise ValueError(f"{text!r} is no time with its zone")
    if record.state not in (RUNNING, FINISHED, STOPPED, CRASHED):
        raise ValueError(f"'state' is {record.state!r}")
    return record


def record_or_none(run_folder: Path) -> RunRecord | None:
    """A run's record, None if it has none that can be read."""
    try:
        return read_record(run_folder)
    except (OSError, ValueError):
        return None


def _old_evaluation(entry: Any) -> dict[str, Any]:
    """An evaluation of records before there were other metrics than accuracy: [step, correct, pairs]."""
    is_triple = isinstance(entry, list) and [type(number) for number in entry] == [int] * 3
    if not is_triple or not 0 <= entry[1] <= entry[2] or entry[2] == 0:
        raise ValueError(f"{entry!r} is not an evaluation")
    step, correct, pairs = entry
    low, high = utils.wilson_interval(correct, pairs)
    return {"step": step, "value": correct / pairs, "low": low, "high": high, "count": pairs}


def write_record(run_folder: Path, record: RunRecord) -> None:
    """Replace run.json, all or nothing. If that fails, a line says so, and the training goes on."""
    # one line per key, so that a person can read it too
    lines = (f"  {json.dumps(k)}: {json.dumps(v, ensure_ascii=False)}" for k, v in dataclasses.asdict(record).items())
    try:
        atomic_files.replace_text(run_folder / RUN, "{\n" + ",\n".join(lines) + "\n}\n")
    except OSError as error:
        print(f"{run_folder / RUN} could not be written ({error.strerror}); manage_runs.py will show an older state",
              file=sys.stderr)  # fmt: skip
