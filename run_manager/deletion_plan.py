"""What a deletion would take, and what must not be touched: links, mount points, runs that are being trained.

Reads only; trash.py does it.
"""

from __future__ import annotations

import math
import os
import re
import stat
import time
from dataclasses import dataclass, field
from pathlib import Path

import utils
from checkpointing import manifest, run_folder
from run_manager import inventory
from run_manager.inventory import TRASH, RunInfo, Step
from utils import printable


@dataclass(frozen=True)
class Item:
    """One thing to delete: a folder or file by its way from a root."""

    root: Path
    way: tuple[str, ...]  # ("run",), ("run", "step-5"), ("run", "step-5", "optimizer.safetensors")
    bytes: int
    began: str | None = None  # of the run's record: undoing must not mix a step into a run that went on since

    @property
    def path(self) -> Path:
        return self.root.joinpath(*self.way)

    @property
    def name(self) -> str:
        return printable("/".join(self.way))

    @property
    def is_optimizer(self) -> bool:
        return len(self.way) == 3 and self.way[-1] == manifest.OPTIMIZER

    def is_within(self, other: Item) -> bool:
        return self.root == other.root and self.way[: len(other.way)] == other.way


@dataclass
class Plan:
    """What would go, what may not and why, and what to know before."""

    items: list[Item] = field(default_factory=list)
    refused: list[tuple[str, str]] = field(default_factory=list)  # (name, why)
    warnings: list[str] = field(default_factory=list)

    @property
    def bytes(self) -> int:
        return sum(item.bytes for item in self.items)

    def add(self, item: Item) -> None:
        if why := why_not(item):
            self.refused.append((item.name, why))
        elif not any(item.is_within(other) for other in self.items):
            self.items = [other for other in self.items if not other.is_within(item)] + [item]


# ---------------------------------------------------------------------------------------------------------------------
# What may go
# ---------------------------------------------------------------------------------------------------------------------


def why_not(item: Item) -> str | None:
    """Why this must not be touched, or None: links, mount points and ways out of the root."""
    if not item.way or any(part in ("", ".", "..") or "/" in part or os.sep in part for part in item.way):
        return "not a name inside the root"
    if item.way[0] == TRASH:
        return "the trash itself"
    if why := link_or_mount(item.root):
        return f"the root {printable(str(item.root))} is {why}; name the real folder"
    path = item.root
    device = os.lstat(path).st_dev
    for part in item.way:
        path = path / part
        try:
            found = os.lstat(path)
        except FileNotFoundError:
            return "gone already"
        except OSError as error:
            return f"cannot be looked at ({error.strerror})"
        if stat.S_ISLNK(found.st_mode) or inventory.is_junction(path):
            return "a symbolic link; it and what it points to are left alone"
        if found.st_dev != device:
            return "a mount point: another file system"
    return mounted_beneath(item.path, device)


def link_or_mount(root: Path) -> str | None:
    """Whether a root itself is a link. (That it is a mount point is fine: a disk of its own for checkpoints.)"""
    try:
        found = os.lstat(root)
    except OSError as error:
        return f"not there ({error.strerror})"
    if stat.S_ISLNK(found.st_mode) or inventory.is_junction(root):
        return "a symbolic link"
    return None if stat.S_ISDIR(found.st_mode) else "no folder"


def mounted_beneath(path: Path, device: int) -> str | None:
    """Whether something is mounted at or beneath a path: emptying the trash would reach into it."""
    real = os.path.realpath(path)
    for mount in mount_points():
        if mount == real or mount.startswith(real + os.sep):
            return f"something is mounted at {printable(mount)}"
    try:
        for beneath, found in inventory.walk(path):
            if found.st_dev != device:
                return f"something is mounted at {printable(beneath)}"
    except OSError as error:
        return f"cannot be looked through ({error.strerror}: {printable(str(error.filename))})"
    return None


def mount_points() -> list[str]:
    """Where file systems are mounted, as far as the system tells: a folder mounted twice has one device number."""
    try:
        lines = Path("/proc/self/mountinfo").read_bytes().splitlines()
    except OSError:
        return []
    ways = [re.sub(rb"\\([0-7]{3})", lambda m: bytes([int(m.group(1), 8)]), line.split()[4]) for line in lines]
    return [os.fsdecode(way) for way in ways]


def plan_runs(chosen: list[RunInfo], runs: list[RunInfo], roots: inventory.Roots, plan: Plan | None = None) -> Plan:
    """Whole runs: checkpoints and logs."""
    plan = plan or Plan()
    for run in chosen:
        if run.state == run_folder.RUNNING:
            plan.refused.append((printable(run.name), "it is being trained just now"))
            continue
        for step, others in inventory.resumed_by(run, runs, roots).items():
            if others := [name for name in others if name not in {one.name for one in chosen}]:
                names = ", ".join(map(printable, others))
                plan.warnings.append(f"{names} was resumed from {printable(run.name)}/{step}")
        if run.folder:
            plan.add(Item(roots.output, (run.folder.name,), run.checkpoint_bytes, began(run)))
        both_lie_there = run.folder is not None and run.log_folder is not None and samefile(run.folder, run.log_folder)
        if run.log_folder and not both_lie_there:
            plan.add(Item(roots.logs, (run.log_folder.name,), run.log_bytes))
            if run.folder is None and (age := seconds_since_written(run.log_folder)) < 600:
                plan.warnings.append(
                    f"the logs {printable(run.name)} were written to {utils.format_duration(age)} ago: "
                    "a run of another --output_dir may be training"
                )
    return plan


def plan_steps(
    run: RunInfo, steps: list[Step], runs: list[RunInfo], roots: inventory.Roots, plan: Plan | None = None
) -> Plan:
    """Single steps of a run."""
    plan = plan or Plan()
    if run.state == run_folder.RUNNING and steps:
        plan.refused.append((printable(run.name), "it is being trained just now"))
        return plan
    sources = inventory.resumed_by(run, runs, roots)
    for step in steps:
        plan.add(Item(roots.output, (run.name, step.folder.name), step.bytes, began(run)))
        if others := sources.get(step.folder.name):
            names = ", ".join(map(printable, others))
            plan.warnings.append(f"{names} was resumed from {printable(run.name)}/{step.folder.name}")
    if steps and len(steps) == len(run.steps):
        plan.warnings.append(f"no checkpoint of {printable(run.name)} would be left")
    return plan


def plan_prune(chosen: list[RunInfo], keep: list[str], runs: list[RunInfo], roots: inventory.Roots) -> Plan:
    """All steps but those to keep: 'best', 'last', or a number of the newest."""
    plan = Plan()
    for run in chosen:
        best, last = inventory.best_and_last(run)
        kept = [step for word in keep for step in (run.steps[-int(word) :] if word.isdecimal() else [])]
        kept += [best] * ("best" in keep) + [last] * ("last" in keep)
        if "best" in keep and best is None and run.steps:
            plan.warnings.append(f"{printable(run.name)}: none of its steps was evaluated when saved, so all are kept")
            continue
        plan_steps(run, [step for step in run.steps if step not in kept], runs, roots, plan)
    return plan


def plan_shrink(chosen: list[RunInfo], roots: inventory.Roots) -> Plan:
    """The optimizer state of finished runs' steps: what is left is the model, from which no training goes on."""
    plan = Plan()
    for run in chosen:
        for step in run.steps if run.state == run_folder.FINISHED else []:
            if not step.optimizer_bytes:
                continue
            item = Item(
                roots.output, (run.name, step.folder.name, manifest.OPTIMIZER), step.optimizer_bytes, began(run)
            )
            try:
                manifest.read_manifest(step.folder)
                plan.add(item)
            except (OSError, ValueError) as error:
                plan.refused.append((item.name, f"the step is damaged: {manifest.MANIFEST}: {error}"))
    return plan


def plan_leftovers(chosen: list[RunInfo], roots: inventory.Roots) -> Plan:
    """Steps that were set aside on resuming, and what killed saves left."""
    plan = Plan()
    for run in chosen:
        if run.leftovers and run.state == run_folder.RUNNING:
            plan.refused.append((printable(run.name), "it is being trained just now"))
            continue
        for path, size in run.leftovers:
            plan.add(Item(roots.output, (run.name, path.name), size, began(run)))
    return plan


def began(run: RunInfo) -> str | None:
    return run.record.began if run.record else None


# What another deletion has taken in the meantime counts as nothing here: `why_not` says later that it is gone.


def seconds_since_written(folder: Path) -> float:
    try:
        return time.time() - max((found.st_mtime for _, found in inventory.walk(folder)), default=0.0)
    except FileNotFoundError:
        return math.inf


def samefile(one: Path, other: Path) -> bool:
    try:
        return os.path.samestat(os.lstat(one), os.lstat(other))
    except FileNotFoundError:
        return False
