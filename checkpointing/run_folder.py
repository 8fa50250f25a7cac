"""What the folders of a run say of themselves: run.json of the run, manifest.json of each step.

Standard library only, so that manage_runs.py reads a thousand of them without importing torch.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import platform
import stat
import sys
import types
import typing
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import utils
from common import atomic_files

RUN, MANIFEST, OPTIMIZER = "run.json", "manifest.json", "optimizer.safetensors"
RUNNING, FINISHED, STOPPED, CRASHED = "running", "finished", "stopped", "crashed"
MOST_JSON_BYTES = 2**26  # a record of a million evaluations is smaller

# ---------------------------------------------------------------------------------------------------------------------
# run.json
# ---------------------------------------------------------------------------------------------------------------------


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
    evaluations: list[list[int]] = dataclasses.field(default_factory=list)  # [step, correct, pairs]


def new_record(step: int, planned_steps: int, config: dict[str, Any], defaults: dict[str, Any]) -> RunRecord:
    """The record of a run that begins now in this process."""
    now = time_text()
    changed = {name: defaults[name] for name, value in config.items() if name in defaults and value != defaults[name]}
    return RunRecord(
        RUNNING, now, now, os.getpid(), platform.node(), step, planned_steps, config=config, changed=changed
    )


@functools.cache
def kinds_of_fields() -> dict[str, tuple[type, ...]]:
    """`cause: str | None` -> (str, NoneType); a list's or dict's own kind only."""
    found = {}
    for name, hint in typing.get_type_hints(RunRecord).items():
        kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
        found[name] = tuple(typing.get_origin(kind) or kind for kind in kinds)
    return found


def time_text() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def read_record(run_folder: Path) -> RunRecord | None:
    """A run's record, None if it has none; ValueError says what is wrong with the file."""
    content = read_own_json(run_folder / RUN)
    if content is None:
        return None
    if not isinstance(content, dict):
        raise ValueError("it is no JSON object")
    known = kinds_of_fields()
    for name, kinds in known.items():
        if name in content and type(content[name]) not in kinds:
            raise ValueError(f"{name!r} is {content[name]!r}")
    try:
        record = RunRecord(**{name: value for name, value in content.items() if name in known})
    except TypeError as error:
        raise ValueError(str(error).removeprefix("RunRecord.__init__() ")) from None
    for entry in record.evaluations:
        fits = isinstance(entry, list) and len(entry) == 3 and all(type(number) is int for number in entry)
        if not fits or not 0 <= entry[1] <= entry[2] or entry[2] == 0:
            raise ValueError(f"{entry!r} is no evaluation")
    for text in (record.started, record.began, record.ended or record.began):
        when = datetime.fromisoformat(text)
        if when.tzinfo is None or not 1970 < when.year < 9999:
            raise ValueError(f"{text!r} is no time with its zone")
    if record.state not in (RUNNING, FINISHED, STOPPED, CRASHED):
        raise ValueError(f"'state' is {record.state!r}")
    return record


def write_record(run_folder: Path, record: RunRecord) -> None:
    """Replace run.json, all or nothing. A disk that does not take it is said, and no reason to end a training."""
    # a line a key, so that a person can read it too
    lines = (f"  {json.dumps(k)}: {json.dumps(v, ensure_ascii=False)}" for k, v in dataclasses.asdict(record).items())
    try:
        replace_text(run_folder / RUN, "{\n" + ",\n".join(lines) + "\n}\n")
    except OSError as error:
        print(f"{run_folder / RUN} could not be written ({error.strerror}); manage_runs.py will miss it",
              file=sys.stderr)  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# manifest.json
# ---------------------------------------------------------------------------------------------------------------------


def write_manifest(folder: Path, step: int) -> None:
    """Sizes and checksums of all files of a folder, and a checksum of itself."""
    files = {
        path.name: {"bytes": path.stat().st_size, "sha256": utils.sha256_of(path)} for path in sorted(folder.iterdir())
    }
    manifest = {"step": step, "files": files}
    utils.write_json(folder / MANIFEST, manifest | {"sha256": own_checksum(manifest)})


def own_checksum(manifest: dict[str, Any]) -> str:
    """What a manifest says of itself, so that a flipped bit in it is not blamed on a file that it lists."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def read_manifest(folder: Path) -> dict[str, Any]:
    """A step's manifest without its own checksum, which is checked; ValueError if it cannot be trusted."""
    content = read_own_json(folder / MANIFEST)
    if not isinstance(content, dict) or not isinstance(content.get("files"), dict):
        raise ValueError("no readable manifest")
    checksum = content.pop("sha256", None)
    if checksum != own_checksum(content):
        raise ValueError("its content changed; its SHA-256 is not the one it names")
    return content


def move_in_manifest(folder: Path, name: str, source: str, target: str) -> None:
    """Move a file's entry between a manifest's "files" and "removed", all or nothing; moving it back is exact."""
    manifest = read_manifest(folder)
    if name not in manifest.get(source, {}):
        return  # done before
    entry = manifest[source].pop(name)
    manifest[target] = dict(sorted({**manifest.get(target, {}), name: entry}.items()))
    manifest = {key: value for key, value in manifest.items() if key != "removed" or value}
    text = json.dumps(manifest | {"sha256": own_checksum(manifest)}, indent=2, ensure_ascii=False) + "\n"
    replace_text(folder / MANIFEST, text)


def has_optimizer(folder: Path) -> bool:
    """Whether a step still has the optimizer's state, as far as its manifest knows."""
    try:
        return OPTIMIZER not in read_manifest(folder).get("removed", {})
    except (OSError, ValueError):
        return True  # a damaged step is reported as damaged


# ---------------------------------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------------------------------


def read_own_json(path: Path) -> Any:
    """A JSON file's content, None if there is no such file; ValueError for anything that no program of ours wrote."""
    try:
        found = path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    if not stat.S_ISREG(found.st_mode):  # a pipe would keep us waiting, a link leads who knows where
        raise ValueError("it is no ordinary file")
    if found.st_size > MOST_JSON_BYTES:
        raise ValueError(f"it has {utils.format_bytes(found.st_size)}")
    try:
        return utils.read_json(path)
    except FileNotFoundError:
        return None
    except RecursionError as error:
        raise ValueError("it is nested without end") from error


def temporary(path: Path) -> Path:
    return path.with_name(f".tmp-{path.name}")


def replace_text(path: Path, text: str) -> None:
    """Write a small file under a temporary name and rename it over the old one."""
    half = temporary(path)
    try:
        try:
            file = half.open("x", encoding="utf-8")  # never through a link that lies there
        except FileExistsError:
            half.unlink()
            file = half.open("x", encoding="utf-8")
        with file:
            file.write(text)
        atomic_files.flush_to_disk(half)
        os.replace(half, path)
    except OSError:
        with contextlib.suppress(OSError):  # the one that matters is on its way
            half.unlink(missing_ok=True)
        raise
