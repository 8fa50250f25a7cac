"""Deleting without fear: runs, steps and optimizer states go to a trash folder first, by renaming, and come back.

    <root>/.trash/<when>-<number>/manifest.json    what was taken from where, written before the first renaming
    <root>/.trash/<when>-<number>/files/...        the same paths as in the root

Each root (checkpoints, logs) has its own, so nothing is ever copied and nothing outside the roots is touched. What lies
under files/ is in the trash, what does not is not: a deletion or undoing that was cut off can simply be repeated.
TensorBoard would show event files in hidden folders too, so there they carry another name.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import shutil
import stat
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path

import utils
from checkpointing import manifest
from checkpointing import run_folder as records
from checkpointing.run_folder import step_folders
from common import atomic_files, file_locks, json_records
from run_manager import inventory
from run_manager.deletion_plan import Item, Plan, link_or_mount, mounted_beneath, why_not
from run_manager.inventory import TRASH
from utils import UserError

MANIFEST, FILES, GONE = "manifest.json", "files", "gone-"
ENTRY = re.compile(r"(\d{8}_\d{6})-(\d{3})", re.ASCII)
SHOWN_EVENTS, HIDDEN_EVENTS = "tfevents", "tf-events-in-trash"
LOCK_SECONDS = 5.0  # how long to wait for another manage_runs.py: it renames, which is quick


@dataclass(frozen=True)
class TakenItem:
    """What an entry's manifest.json says of one item; see `Item`."""

    way: tuple[str, ...]
    bytes: int
    began: str | None


@dataclass(frozen=True)
class TakenItems:
    """The manifest.json of an entry in a trash."""

    has_checkpoints: bool  # whether the deletion took checkpoints too, from this root or the other
    items: list[TakenItem]


@dataclass
class Outcome:
    """What became of it: names with bytes, and what is left and why."""

    done: list[Item] = field(default_factory=list)
    left: list[tuple[str, str]] = field(default_factory=list)
    is_disk: bool = False  # the system refused, not we


# ---------------------------------------------------------------------------------------------------------------------
# Into the trash
# ---------------------------------------------------------------------------------------------------------------------


def delete(plan: Plan, roots: inventory.Roots) -> Outcome:
    """Move a plan's items to the trash, run by run; everything is checked again right before."""
    outcome = Outcome()
    touched = list(dict.fromkeys(item.root for item in plan.items))
    with contextlib.ExitStack() as held_roots:
        for root in sorted(touched):  # everybody in the same order, so that two cannot wait for each other
            held_roots.enter_context(trash_lock(root))
        entry = new_entry(roots)
        for root in touched:
            items = [item for item in plan.items if item.root == root]
            (root / TRASH / entry / FILES).mkdir(parents=True)
            taken = TakenItems(roots.output in touched, [TakenItem(item.way, item.bytes, item.began) for item in items])
            text = json.dumps(dataclasses.asdict(taken), indent=2) + "\n"
            atomic_files.replace_text(root / TRASH / entry / MANIFEST, text)
        for items in by_run(plan.items):
            delete_items_of_run(items, entry, outcome)
        for root in touched:
            remove_if_empty(root, entry)
    return outcome


def by_run(items: list[Item]) -> list[list[Item]]:
    """Items of one run together, so that one lock is held over its checkpoints and its logs."""
    groups: dict[str, list[Item]] = {}
    for item in items:
        groups.setdefault(item.way[0], []).append(item)
    return list(groups.values())


def delete_items_of_run(items: list[Item], entry: str, outcome: Outcome) -> None:
    """One run's items, the checkpoints first; after a failure the rest of the run stays as it is."""
    sound = []
    for item in items:
        if why := why_not(item):
            outcome.left.append((item.name, why))
        else:
            sound.append(item)
    try:
        with contextlib.ExitStack() as stack:
            if lock := lock_run(sound):
                stack.callback(lock.release)
                if os.name == "nt":  # Windows renames no folder with an open file in it, ours or a training's
                    lock.release()
            while sound:
                move_in(sound[0], sound[0].root / TRASH / entry / FILES)
                outcome.done.append(sound.pop(0))
    except (OSError, ValueError) as error:
        outcome.is_disk = outcome.is_disk or isinstance(error, OSError)
        outcome.left.append((sound[0].name, reason(error)))
        outcome.left += [(item.name, "not tried after that") for item in sound[1:]]


def lock_run(items: list[Item]) -> file_locks.RunLock | None:
    """The lock of the run that items of a checkpoint root belong to: nobody trains it while they go."""
    for item in items:
        folder = item.root / item.way[0]
        if any((folder / name).exists() for name in (file_locks.RunLock.FILE, records.RUN)) or step_folders(folder):
            refuse_odd_lock(folder)
            return file_locks.RunLock(folder, "manage_runs.py, process")
    return None


def refuse_odd_lock(folder: Path) -> None:
    """A lock is opened for writing, so it must be a file of its own and no way to somewhere else."""
    path = folder / file_locks.RunLock.FILE
    with contextlib.suppress(FileNotFoundError):
        if not stat.S_ISREG(os.lstat(path).st_mode):
            raise UserError(
                "its lock is no ordinary file; left alone", where=path, next="see what it is, and remove it"
            )


def move_in(item: Item, files: Path) -> None:
    """Take one item out of its root. An optimizer state is first struck off its step's manifest, so that the step is
    whole at every moment."""
    target = files.joinpath(*item.way)
    target.parent.mkdir(parents=True, exist_ok=True)
    if item.is_optimizer:
        manifest.move_in_manifest(item.path.parent, manifest.OPTIMIZER, "files", "removed")
    try:
        os.rename(item.path, target)
    except OSError:
        if item.is_optimizer:
            manifest.move_in_manifest(item.path.parent, manifest.OPTIMIZER, "removed", "files")
        raise
    rename_events(target, SHOWN_EVENTS, HIDDEN_EVENTS)


def rename_events(path: Path, old: str, new: str) -> None:
    """Hide event files from TensorBoard, or show them again; a failure only means that they are seen."""
    with contextlib.suppress(OSError):
        for beneath, found in list(inventory.walk(path)):
            folder, name = os.path.split(beneath)
            if stat.S_ISREG(found.st_mode) and old in name:
                os.rename(beneath, os.path.join(folder, name.replace(old, new)))


def new_entry(roots: inventory.Roots) -> str:
    """A name that no trash has: date, time and a number."""
    now = utils.timestamp()
    taken = {name for root in unique(roots) for name in [*entries(root), *entries(root, GONE)]}
    names = (f"{now}-{number:03d}" for number in range(1, 1000))
    return next(name for name in names if name not in taken)


def entries(root: Path, prefix: str = "") -> list[str]:
    """The deletions that lie in a root's trash, oldest first."""
    try:
        names = [entry.name for entry in os.scandir(root / TRASH) if entry.is_dir(follow_symlinks=False)]
    except (FileNotFoundError, NotADirectoryError):
        return []
    return sorted(name.removeprefix(prefix) for name in names if re.fullmatch(prefix + ENTRY.pattern, name, re.ASCII))


@contextlib.contextmanager
def trash_lock(root: Path) -> Iterator[None]:
    """One manage_runs.py at a time moves things in and out of a root."""
    if why := link_or_mount(root):
        raise UserError(f"the root is {why}", where=root, safe="nothing was touched", next="name the real folder")
    folder = root / TRASH
    folder.mkdir(exist_ok=True)
    if why := link_or_mount(folder):
        raise UserError(f"the trash is {why}", where=folder, safe="nothing was touched", next="see what it is")
    refuse_odd_lock(folder)
    try:
        lock = file_locks.RunLock(folder, "manage_runs.py, process", LOCK_SECONDS)
    except UserError as error:
        raise UserError(
            "another manage_runs.py is at work here just now",
            where=root,
            safe="this one touched nothing",
            next="the same again in a moment",
        ) from error
    try:
        yield
    finally:
        lock.release()


# ---------------------------------------------------------------------------------------------------------------------
# Out of the trash
# ---------------------------------------------------------------------------------------------------------------------


def last_entry(roots: inventory.Roots) -> str | None:
    """The newest deletion, but for logs whose checkpoints were deleted from another --output_dir."""
    of_checkpoints = entries(roots.output)
    of_logs = [
        entry
        for entry in entries(roots.logs)
        if entry in of_checkpoints
        or inventory.read_object(roots.logs / TRASH / entry / MANIFEST).get("has_checkpoints") is not True
    ]
    return max([*of_checkpoints, *of_logs], default=None)


def held(roots: inventory.Roots) -> str | None:
    """What lies in the trash, in one line; None if nothing does."""
    found = {entry for root in unique(roots) for entry in entries(root)}
    size = sum(inventory.measure(root / TRASH / entry / FILES) for root in unique(roots) for entry in entries(root))
    count = "1 deletion" if len(found) == 1 else f"{len(found):,} deletions"
    return f"in the trash: {utils.format_bytes(size)}, {count} (--undo, --empty_trash)" if found else None


def read_entry(root: Path, entry: str) -> list[Item]:
    """What a deletion took from one root; UserError if its manifest was not written by us."""
    folder = root / TRASH / entry
    try:
        taken = json_records.load(TakenItems, folder / MANIFEST)
        items = [Item(root, one.way, one.bytes, one.began) for one in taken.items] if taken else []
        outward = ("/", "\0", "\\", ":") if os.name == "nt" else ("/", "\0")
        for way in (item.way for item in items):
            if not way or any(part in ("", ".", "..", TRASH) or any(sign in part for sign in outward) for part in way):
                raise ValueError(f"{way!r} leads out of the root")
    except (OSError, ValueError) as error:
        raise UserError(
            "what the last deletion took cannot be read",
            where=folder / MANIFEST,
            found=error,
            safe=f"it all lies in {folder / FILES}",
            next="move it back by hand",
        ) from error
    return items


def undo(roots: inventory.Roots, is_dry: bool = False) -> tuple[str, Outcome]:
    """Bring the last deletion back where it came from; refuses, before anything moves, what would be in the way."""
    existing = [root for root in unique(roots) if entries(root)]
    outcome = Outcome()
    with contextlib.ExitStack() as held_roots:
        for root in existing if not is_dry else []:
            held_roots.enter_context(trash_lock(root))
        tried: set[str] = set()
        items: list[Item] = []
        while not items:
            entry = last_entry(roots)
            if entry is None or entry in tried:
                raise UserError("the trash is empty: there is nothing to bring back", where=roots.output / TRASH)
            tried.add(entry)
            items = [item for root in existing for item in read_entry(root, entry)]
            for root in existing if not items and not is_dry else []:  # killed before it took anything
                remove_if_empty(root, entry)
        waiting = [item for item in items if in_trash(item, entry)]
        if problems := [f"{item.name}: {why}" for item in waiting if (why := in_the_way(item, waiting))]:
            more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
            raise UserError(
                "the last deletion cannot come back",
                where=roots.output,
                found="; ".join(problems[:3]) + more,
                safe="nothing was touched; it still lies in the trash",
                next="move away what is in the way, then python manage_runs.py --undo",
            )
        outcome.done += waiting if is_dry else []
        for item in items if not is_dry else []:
            bring_back(item, entry, outcome)
        if not is_dry and not outcome.left:
            for root in existing:
                remove_if_empty(root, entry)
    return entry, outcome


def unique(roots: inventory.Roots) -> list[Path]:
    """Both roots, or the one that is both."""
    return list({os.path.realpath(root): root for root in (roots.logs, roots.output)}.values())


def in_trash(item: Item, entry: str) -> Path | None:
    path = (item.root / TRASH / entry / FILES).joinpath(*item.way)
    return path if os.path.lexists(path) else None


def in_the_way(item: Item, waiting: list[Item]) -> str | None:
    """Why an item cannot go back: something new has its name, or where it belongs is gone or went on."""
    if os.path.lexists(item.path):
        return "something of that name is there again"
    run_folder = item.root / item.way[0]
    if len(item.way) == 1 or any(other.path == run_folder for other in waiting):
        return None
    if why := why_not(Item(item.root, item.way[:-1], 0)):
        return f"where it belongs is {why}"
    try:
        record = records.read_record(run_folder)
    except (OSError, ValueError):
        record = None
    if item.began and record and record.began != item.began:
        return "the run was resumed since"
    return "the run is being trained" if file_locks.is_locked(run_folder / file_locks.RunLock.FILE) else None


def bring_back(item: Item, entry: str, outcome: Outcome) -> None:
    """Put one item where it was; what is there already only has its step's manifest set right."""
    source = in_trash(item, entry)
    try:
        lock = lock_run([item]) if len(item.way) > 1 and item.path.parent.is_dir() else None
        try:
            if source:
                rename_events(source, HIDDEN_EVENTS, SHOWN_EVENTS)
                os.rename(source, item.path)
                outcome.done.append(item)
            if item.is_optimizer and item.path.exists():
                manifest.move_in_manifest(item.path.parent, manifest.OPTIMIZER, "removed", "files")
        finally:
            if lock:
                lock.release()
    except (OSError, ValueError) as error:
        outcome.is_disk = outcome.is_disk or isinstance(error, OSError)
        outcome.left.append((item.name, reason(error)))


def empty(roots: inventory.Roots, older_than: timedelta | None, is_dry: bool = False) -> Outcome:
    """Really delete what lies in the trash, or what has lain there for long enough. There is no way back."""
    outcome = Outcome()
    for root in unique(roots):
        if not entries(root) and not entries(root, GONE):
            continue
        with contextlib.nullcontext() if is_dry else trash_lock(root):
            for prefix in (GONE, ""):
                for entry in entries(root, prefix):
                    deleted = datetime.strptime(ENTRY.fullmatch(entry).group(1), "%Y%m%d_%H%M%S")
                    if prefix == "" and older_than is not None and deleted > datetime.now() - older_than:
                        continue
                    remove_entry(root, prefix, entry, is_dry, outcome)
    return outcome


def remove_entry(root: Path, prefix: str, entry: str, is_dry: bool, outcome: Outcome) -> None:
    folder = root / TRASH / f"{prefix}{entry}"
    size = inventory.measure(folder / FILES)
    item = Item(root, (TRASH, folder.name), size)
    if why := mounted_beneath(folder, os.lstat(root).st_dev):
        outcome.left.append((item.name, why))
        return
    if is_dry:
        outcome.done.append(item)
        return
    gone = folder.with_name(f"{GONE}{entry}")  # half of it could not be brought back
    try:
        if folder != gone:
            os.rename(folder, gone)
        shutil.rmtree(gone)
        outcome.done.append(item)
    except OSError as error:
        outcome.is_disk = True
        with contextlib.suppress(OSError):
            freed = size - inventory.measure(gone / FILES)
            outcome.left.append((item.name, f"{reason(error)}; {utils.format_bytes(freed)} of it were freed"))
            return
        outcome.left.append((item.name, reason(error)))


def remove_if_empty(root: Path, entry: str) -> None:
    """Take away a deletion's folder once nothing lies in it any more."""
    folder = root / TRASH / entry
    if not folder.is_dir() or any(in_trash(item, entry) for item in read_entry(root, entry)):
        return
    try:
        for beneath, _, _ in os.walk(folder / FILES, topdown=False):
            os.rmdir(beneath)
        for left in (folder / MANIFEST, atomic_files.temporary(folder / MANIFEST)):
            left.unlink(missing_ok=True)
        os.rmdir(folder)
    except OSError as error:
        print(f"{folder} stays: {reason(error)}", file=sys.stderr)


def reason(error: BaseException) -> str:
    if isinstance(error, OSError):
        return error.strerror or str(error)
    return error.what if isinstance(error, UserError) else str(error)
