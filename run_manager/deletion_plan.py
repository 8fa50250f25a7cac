"""What a deletion would take, and what it must not touch: links, mount points, runs that are being trained.

Reads only; trash.py does the moving.
"""

import os
import stat
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

import utils
from checkpointing import manifest, run_folder
from run_manager import inventory
from run_manager.inventory import TRASH, Roots, RunInfo, Step
from utils import printable


@dataclass(frozen=True)
class Item:
    """One thing to delete: a folder or file, by its path from a root."""

    root: Path
    parts: tuple[str, ...]  # ("run",), ("run", "step-5"), ("run", "step-5", "optimizer.safetensors")
    bytes: int
    began: str | None = None  # of the run's record: --undo must not put a step into a run that was resumed since
    prefix: str = ""  # see Roots.prefix

    @property
    def path(self) -> Path:
        return self.root.joinpath(*self.parts)

    @property
    def name(self) -> str:
        return printable(self.prefix + "/".join(self.parts))

    @property
    def is_optimizer(self) -> bool:
        return len(self.parts) == 3 and self.parts[-1] == manifest.OPTIMIZER

    def is_within(self, other: Self) -> bool:
        return self.root == other.root and self.parts[: len(other.parts)] == other.parts


@dataclass
class Plan:
    """What a deletion takes. The methods add to it; what must not be deleted goes to `refused`, with the reason."""

    places: list[Roots]
    runs: list[RunInfo]  # all, to warn about those that were resumed from what is deleted
    items: list[Item] = field(default_factory=list)
    refused: list[tuple[str, str]] = field(default_factory=list)  # (name, why)
    warnings: list[str] = field(default_factory=list)

    @property
    def bytes(self) -> int:
        return sum(item.bytes for item in self.items)

    def add(self, run: RunInfo, parts: tuple[str, ...], size: int, is_log: bool = False) -> None:
        root = run.roots.logs if is_log else run.roots.output
        began = run.record.began if run.record and not is_log else None
        item = Item(root, parts, size, began, run.roots.prefix)
        if why := why_not(item):
            self.refused.append((item.name, why))
        elif not any(item.is_within(other) for other in self.items):
            self.items = [other for other in self.items if not other.is_within(item)] + [item]

    def refuses_running(self, run: RunInfo) -> bool:
        if run.state == run_folder.RUNNING:
            self.refused.append((run.label, "it is being trained right now"))
        return run.state == run_folder.RUNNING

    def warn_of_resumed(self, run: RunInfo, steps: list[Step] | None, also_deleted: list[RunInfo]) -> None:
        """Warn about runs that stay and were resumed from these steps of a run (None: from any step)."""
        for step, resumed in inventory.resumed_by(run, self.runs).items():
            names = [other.label for other in resumed if other not in also_deleted]
            if names and (steps is None or step in [one.folder.name for one in steps]):
                self.warnings.append(f"{', '.join(names)} was resumed from {run.label}/{step}")

    def add_runs(self, chosen: list[RunInfo]) -> None:
        """Whole runs: checkpoints and logs."""
        for run in chosen:
            if self.refuses_running(run):
                continue
            self.warn_of_resumed(run, None, chosen)
            if run.folder:
                self.add(run, (run.folder.name,), run.checkpoint_bytes)
            is_one_folder = run.folder and os.path.realpath(run.folder) == os.path.realpath(run.log_folder or "")
            if run.log_folder and not is_one_folder:
                self.add(run, (run.log_folder.name,), run.log_bytes, is_log=True)
                written = max((found.st_mtime for _, found in inventory.walk(run.log_folder)), default=0.0)
                if run.folder is None and (age := time.time() - written) < 600:
                    self.warnings.append(
                        f"the logs {run.label} were written to {utils.format_duration(age)} ago: "
                        "a run of another --output_dir may be training"
                    )

    def add_steps(self, run: RunInfo, steps: list[Step]) -> None:
        """Single steps of a run."""
        if not steps or self.refuses_running(run):
            return
        for step in steps:
            self.add(run, (run.name, step.folder.name), step.bytes)
        self.warn_of_resumed(run, steps, [])
        if len(steps) == len(run.steps):
            self.warnings.append(f"no checkpoint of {run.label} would be left")

    def add_pruned(self, chosen: list[RunInfo], keep: list[str]) -> None:
        """All steps but those to keep: 'best', 'last', or a number of the newest."""
        for run in chosen:
            best, last = inventory.best_and_last_step(run)
            kept = [step for word in keep for step in (run.steps[-int(word) :] if word.isdecimal() else [])]
            kept += [best] * ("best" in keep) + [last] * ("last" in keep)
            if "best" in keep and best is None and run.steps:
                why = "none of its steps was evaluated when saved, so all are kept"
                self.warnings.append(f"{run.label}: {why}")
                continue
            self.add_steps(run, [step for step in run.steps if step not in kept])

    def add_optimizers(self, chosen: list[RunInfo]) -> None:
        """The optimizer state of finished runs' steps: the model stays, but no training can be resumed from it."""
        for run in chosen:
            for step in run.steps:
                if run.state != run_folder.FINISHED or not step.optimizer_bytes:
                    continue
                parts = (run.name, step.folder.name, manifest.OPTIMIZER)
                try:
                    manifest.read_manifest(step.folder)
                    self.add(run, parts, step.optimizer_bytes)
                except (OSError, ValueError) as error:
                    why = f"the step is damaged: {manifest.MANIFEST}: {error}"
                    self.refused.append((printable(run.roots.prefix + "/".join(parts)), why))

    def add_leftovers(self, chosen: list[RunInfo]) -> None:
        """Steps that were set aside on resuming, and what killed saves left."""
        for run in chosen:
            if run.leftovers and not self.refuses_running(run):
                for path, size in run.leftovers:
                    self.add(run, (run.name, path.name), size)


# -- What must not be touched ------------------------------------------------------------------------------------------


def leads_elsewhere(parts: tuple[str, ...]) -> bool:
    """Whether a path could name anything but a run, or something in one: something outside the root, or the trash."""
    separators = set("/\\:\0") if os.name == "nt" else set("/\0")
    return not parts or any(part in ("", ".", "..", TRASH) or separators & set(part) for part in parts)


def why_not(item: Item) -> str | None:
    """Why an item must not be touched (a link or mount point, a path out of the root), or None."""
    if leads_elsewhere(item.parts):
        return "not a name inside the root"
    if why := link_problem(item.root):
        return f"the root {printable(str(item.root))} is {why}; name the real folder"
    path, device = item.root, os.lstat(item.root).st_dev
    for part in item.parts:
        path = path / part
        try:
            found = os.lstat(path)
        except FileNotFoundError:
            return "gone already"
        except OSError as error:
            return f"cannot be read ({error.strerror})"
        if stat.S_ISLNK(found.st_mode) or inventory.is_junction(path):
            return "a symbolic link; neither it nor what it points to is touched"
        if found.st_dev != device:
            return "a mount point: another file system"
    return mounted_beneath(item.path, device)


def link_problem(folder: Path) -> str | None:
    """Why a root or trash cannot be used, or None. (A mount point can: checkpoints may be on a separate disk.)"""
    try:
        found = os.lstat(folder)
    except OSError as error:
        return f"not there ({error.strerror})"
    if stat.S_ISLNK(found.st_mode) or inventory.is_junction(folder):
        return "a symbolic link"
    return None if stat.S_ISDIR(found.st_mode) else "not a folder"


def mounted_beneath(path: Path, device: int) -> str | None:
    """What is mounted at or beneath a path, so that emptying the trash would delete its content; None if nothing."""
    real = os.path.realpath(path)
    mounted = [mount for mount in mount_points() if mount == real or mount.startswith(real + os.sep)]
    try:
        mounted += [beneath for beneath, found in inventory.walk(path) if found.st_dev != device]
    except OSError as error:
        return f"cannot be read ({error.strerror}: {printable(str(error.filename))})"
    return f"something is mounted at {printable(mounted[0])}" if mounted else None


def mount_points() -> list[str]:
    """Where file systems are mounted, as far as known. Needed for bind mounts, which have the same device number."""
    import psutil  # not needed for the list

    try:
        return [partition.mountpoint for partition in psutil.disk_partitions(all=True)]
    except OSError:  # no /proc
        return []
