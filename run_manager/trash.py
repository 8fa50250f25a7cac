"""The trash: runs, steps and optimizer states are moved there by renaming, and come back the same way.

    .trash-ROOT/DATE_TIME-NUMBER/manifest.json    what a deletion took from this root, written before the first renaming
    .trash-ROOT/DATE_TIME-NUMBER/files/...        the same paths as in the root

Each root (checkpoints, logs) has its own trash beside it: on the same file system, so that nothing is ever copied, and
outside the log folder, because TensorBoard reads hidden folders too. Where that is impossible (the root is a mount
point, its parent is not writable) the trash is ROOT/.trash, as in earlier versions; both places are always read.

What lies under files/ is in the trash, whatever the manifest says, so an interrupted deletion or undo can be repeated.
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
from checkpointing import manifest, run_folder
from common import atomic_files, file_locks, json_records
from run_manager import inventory
from run_manager.deletion_plan import Item, Plan, link_problem, mount_points, mounted_beneath, why_not
from run_manager.inventory import TRASH, Roots
from utils import UserError

MANIFEST, FILES, GONE = "manifest.json", "files", "gone-"
ENTRY = re.compile(r"(\d{8}_\d{6})-(\d{3})", re.ASCII)
HIDDEN_EVENTS = "tf-events-in-trash"  # what earlier versions called the event files in ROOT/.trash
LOCK_SECONDS = 5.0  # how long to wait for another manage_runs.py: it only renames, which is quick


@dataclass(frozen=True)
class TakenItem:
    """One item in an entry's manifest.json; see `Item`."""

    way: tuple[str, ...]
    bytes: int
    began: str | None


@dataclass(frozen=True)
class TakenItems:
    """The manifest.json of an entry: what one deletion took from one root."""

    has_checkpoints: bool  # whether the deletion took checkpoints, from this root or the other
    items: list[TakenItem]


@dataclass
class Outcome:
    """What was moved or deleted, and what was not and why."""

    done: list[Item] = field(default_factory=list)
    left: list[tuple[str, str]] = field(default_factory=list)  # (name, why)
    is_disk: bool = False  # whether the operating system refused something

    @property
    def bytes(self) -> int:
        return sum(item.bytes for item in self.done)

    def add_failure(self, name: str, error: Exception, more: str = "") -> None:
        self.is_disk |= isinstance(error, OSError)
        why = error.strerror if isinstance(error, OSError) else getattr(error, "what", None)
        self.left.append((name, (why or str(error)) + more))


# ---------------------------------------------------------------------------------------------------------------------
# Where the trash is
# ---------------------------------------------------------------------------------------------------------------------


def trash_places(root: Path) -> tuple[Path, Path]:
    """Beside a root, and inside it."""
    parent, name = os.path.split(os.path.realpath(root))
    return Path(parent, f"{TRASH}-{name}"), root / TRASH


def make_trash(root: Path) -> Path:
    """The folder for a root's next deletions: beside it if possible, else inside."""
    beside, inside = trash_places(root)
    real = os.path.realpath(root)
    if real not in mount_points() and os.lstat(real).st_dev == os.lstat(beside.parent).st_dev:
        with contextlib.suppress(OSError):  # the parent is not writable
            beside.mkdir(exist_ok=True)
            return beside
    inside.mkdir(exist_ok=True)
    return inside


@contextlib.contextmanager
def locked_trash(root: Path) -> Iterator[Path]:
    """A root's trash, held so that one manage_runs.py at a time moves things in and out of the root."""
    root.mkdir(parents=True, exist_ok=True)  # to undo after the root itself was removed
    if why := link_problem(root):
        raise UserError(f"the root is {why}", where=root, safe="nothing was changed", next="name the real folder")
    folder = make_trash(root)
    if why := link_problem(folder):
        raise UserError(f"the trash is {why}", where=folder, safe="nothing was changed", next="see what it is")
    check_lock_file(folder)
    try:
        lock = file_locks.RunLock(folder, "manage_runs.py, process", LOCK_SECONDS)
    except UserError as error:
        raise UserError(
            "another manage_runs.py is working on these runs",
            where=root,
            safe="this one changed nothing",
            next="the same command again in a moment",
        ) from error
    try:
        yield folder
    finally:
        lock.release()


def check_lock_file(folder: Path) -> None:
    """Raise UserError unless a folder's lock is an ordinary file: it is opened for writing, so a link is dangerous."""
    path = folder / file_locks.RunLock.FILE
    with contextlib.suppress(FileNotFoundError):
        if not stat.S_ISREG(os.lstat(path).st_mode):
            raise UserError("its lock is not an ordinary file", where=path, next="see what it is, and remove it")


def entries(root: Path, prefix: str = "") -> dict[str, Path]:
    """The deletions in a root's trash: name -> folder, oldest first."""
    found = {}
    for place in trash_places(root):
        if link_problem(place) is None:
            names = (entry.name for entry in os.scandir(place) if entry.is_dir(follow_symlinks=False))
            names = (name for name in names if re.fullmatch(prefix + ENTRY.pattern, name, re.ASCII))
            found |= {name.removeprefix(prefix): place / name for name in names}
    return dict(sorted(found.items()))


def unique(roots: Roots) -> list[Path]:
    """Both roots, or one if they are the same folder."""
    return list({os.path.realpath(root): root for root in (roots.logs, roots.output)}.values())


def summary(roots: Roots) -> str | None:
    """What the trash holds, in one line; None if it is empty."""
    found = [entries(root) for root in unique(roots)]
    count = len({name for of_root in found for name in of_root})
    size = sum(inventory.measure(folder / FILES) for of_root in found for folder in of_root.values())
    deletions = "1 deletion" if count == 1 else f"{count:,} deletions"
    return f"in the trash: {utils.format_bytes(size)}, {deletions} (--undo, --empty_trash)" if count else None


# ---------------------------------------------------------------------------------------------------------------------
# Into the trash
# ---------------------------------------------------------------------------------------------------------------------


def delete(plan: Plan) -> Outcome:
    """Move a plan's items to the trash, run by run; each is checked again right before."""
    outcome, roots = Outcome(), plan.roots
    touched = sorted({item.root for item in plan.items})  # always in this order, so no two processes block each other
    with contextlib.ExitStack() as locks:
        places = {root: locks.enter_context(locked_trash(root)) for root in touched}
        name = new_entry_name(roots)
        folders = {root: place / name for root, place in places.items()}
        for root, folder in folders.items():
            items = [TakenItem(item.way, item.bytes, item.began) for item in plan.items if item.root == root]
            (folder / FILES).mkdir(parents=True)
            text = json.dumps(dataclasses.asdict(TakenItems(roots.output in touched, items)), indent=2) + "\n"
            atomic_files.replace_text(folder / MANIFEST, text)
        for run in dict.fromkeys(item.way[0] for item in plan.items):
            delete_items_of_run([item for item in plan.items if item.way[0] == run], folders, outcome)
        for root, folder in folders.items():
            remove_if_empty(root, folder)
    if roots.logs in places and places[roots.logs].name == TRASH:
        print(f"warning: {roots.logs} has no room for a trash beside it: TensorBoard shows deleted logs until "
              "--empty_trash", file=sys.stderr)  # fmt: skip
    return outcome


def new_entry_name(roots: Roots) -> str:
    """A name that no trash has: date, time and a number."""
    now = utils.timestamp()
    taken = {name for root in unique(roots) for prefix in ("", GONE) for name in entries(root, prefix)}
    names = (f"{now}-{number:03d}" for number in range(1, 1000))
    return next(name for name in names if name not in taken)


def delete_items_of_run(items: list[Item], folders: dict[Path, Path], outcome: Outcome) -> None:
    """One run's items, checkpoints first; after a failure the rest of the run stays as it is."""
    outcome.left += [(item.name, why) for item in items if (why := why_not(item))]
    waiting = [item for item in items if not why_not(item)]
    try:
        with held_run(waiting):
            while waiting:
                move_in(waiting[0], in_trash(waiting[0], folders))
                outcome.done.append(waiting.pop(0))
    except (OSError, ValueError) as error:
        outcome.add_failure(waiting[0].name, error)
        outcome.left += [(item.name, "not tried after that") for item in waiting[1:]]


@contextlib.contextmanager
def held_run(items: list[Item]) -> Iterator[None]:
    """Hold the lock of the run that items belong to, so that no training starts on it meanwhile. Logs have no lock."""
    lock = None
    for folder in dict.fromkeys(item.root / item.way[0] for item in items):
        is_run = any((folder / name).exists() for name in (file_locks.RunLock.FILE, run_folder.RUN))
        if lock is None and (is_run or run_folder.step_folders(folder)):
            check_lock_file(folder)
            lock = file_locks.RunLock(folder, "manage_runs.py, process")
    if lock and os.name == "nt":  # Windows renames no folder that holds an open file, ours or a training's
        lock.release()
    try:
        yield
    finally:
        if lock:
            lock.release()


def in_trash(item: Item, folders: dict[Path, Path]) -> Path:
    """Where an item lies in the entry whose folders by root are given."""
    return (folders[item.root] / FILES).joinpath(*item.way)


def move_in(item: Item, target: Path) -> None:
    """Take one item out of its root. An optimizer state leaves its step's manifest first, so that the step is valid at
    every moment."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if item.is_optimizer:
        manifest.move_in_manifest(item.path.parent, manifest.OPTIMIZER, "files", "removed")
    try:
        os.rename(item.path, target)
    except OSError:
        if item.is_optimizer:
            manifest.move_in_manifest(item.path.parent, manifest.OPTIMIZER, "removed", "files")
        raise


def remove_if_empty(root: Path, folder: Path) -> None:
    """Remove an entry from which everything is gone."""
    if any(os.path.lexists(in_trash(item, {root: folder})) for item in read_entry(root, folder)):
        return
    try:
        for beneath, _, _ in os.walk(folder / FILES, topdown=False):
            os.rmdir(beneath)
        for path in (folder / MANIFEST, atomic_files.temporary(folder / MANIFEST)):
            path.unlink(missing_ok=True)
        os.rmdir(folder)
    except OSError as error:
        print(f"{folder} stays: {error.strerror}", file=sys.stderr)


# ---------------------------------------------------------------------------------------------------------------------
# Out of the trash
# ---------------------------------------------------------------------------------------------------------------------


def undo(roots: Roots, is_dry: bool = False) -> tuple[str, Outcome]:
    """Move the last deletion back to where it came from; returns its name. UserError, before anything moves, if
    something is in the way."""
    outcome = Outcome()
    with contextlib.ExitStack() as locks:
        for root in [root for root in unique(roots) if entries(root)] if not is_dry else []:
            locks.enter_context(locked_trash(root))
        found = {root: entries(root) for root in unique(roots)}
        for name in undoable(roots):
            folders = {root: of_root[name] for root, of_root in found.items() if name in of_root}
            if items := [item for root, folder in folders.items() for item in read_entry(root, folder)]:
                break
            for root, folder in folders.items() if not is_dry else ():  # killed before it took anything
                remove_if_empty(root, folder)
        else:
            raise UserError("the trash is empty: nothing to undo", where=trash_places(roots.output)[0])
        waiting = [item for item in items if os.path.lexists(in_trash(item, folders))]
        if problems := [f"{item.name}: {why}" for item in waiting if (why := in_the_way(item, waiting))]:
            more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
            raise UserError(
                "the last deletion cannot be undone",
                where=roots.output,
                found="; ".join(problems[:3]) + more,
                safe="nothing was changed; it is still in the trash",
                next="move away what is in the way, then python manage_runs.py --undo",
            )
        if is_dry:
            outcome.done += waiting
            return name, outcome
        for item in items:
            move_out(item, in_trash(item, folders), outcome)
        for root, folder in folders.items() if not outcome.left else ():
            remove_if_empty(root, folder)
    return name, outcome


def undoable(roots: Roots) -> list[str]:
    """The deletions, newest first, without logs whose checkpoints were deleted from another --output_dir."""
    of_checkpoints, of_logs = entries(roots.output), entries(roots.logs)
    own_logs = [
        name
        for name, folder in of_logs.items()
        if inventory.read_object(folder / MANIFEST).get("has_checkpoints") is not True
    ]
    return sorted({*of_checkpoints, *own_logs}, reverse=True)


def read_entry(root: Path, folder: Path) -> list[Item]:
    """What a deletion took from one root; UserError if its manifest cannot be used."""
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
            safe=f"all of it is in {folder / FILES}",
            next="move it back by hand",
        ) from error
    return items


def in_the_way(item: Item, waiting: list[Item]) -> str | None:
    """Why an item cannot go back: its name is taken, or the run it belongs to is gone or was resumed."""
    if os.path.lexists(item.path):
        return "something of that name is there again"
    run = item.root / item.way[0]
    if len(item.way) == 1 or any(other.path == run for other in waiting):
        return None
    if why := why_not(Item(item.root, item.way[:-1], 0)):
        return f"where it belongs is {why}"
    try:
        record = run_folder.read_record(run)
    except (OSError, ValueError):
        record = None
    if item.began and record and record.began != item.began:
        return "the run was resumed since"
    return "the run is being trained" if file_locks.is_locked(run / file_locks.RunLock.FILE) else None


def move_out(item: Item, source: Path, outcome: Outcome) -> None:
    """Put one item back. If an earlier undo put it back already, only its step's manifest is corrected."""
    try:
        with held_run([item] if len(item.way) > 1 and item.path.parent.is_dir() else []):
            if os.path.lexists(source):
                restore_event_names(source)
                os.rename(source, item.path)
                outcome.done.append(item)
            if item.is_optimizer and item.path.exists():
                manifest.move_in_manifest(item.path.parent, manifest.OPTIMIZER, "removed", "files")
    except (OSError, ValueError) as error:
        outcome.add_failure(item.name, error)


def restore_event_names(path: Path) -> None:
    """Earlier versions renamed event files in the trash; a failure only leaves them invisible to TensorBoard."""
    with contextlib.suppress(OSError):
        for beneath, found in list(inventory.walk(path)):
            folder, name = os.path.split(beneath)
            if stat.S_ISREG(found.st_mode) and HIDDEN_EVENTS in name:
                os.rename(beneath, os.path.join(folder, name.replace(HIDDEN_EVENTS, "tfevents")))


def empty(roots: Roots, older_than: timedelta | None, is_dry: bool = False) -> Outcome:
    """Delete for good what is in the trash, or has been there long enough."""
    outcome = Outcome()
    for root in unique(roots):
        if not entries(root) and not entries(root, GONE):
            continue
        with contextlib.nullcontext() if is_dry else locked_trash(root):
            for folder in entries(root, GONE).values():
                remove_entry(folder, is_dry, outcome)
            for name, folder in entries(root).items():
                deleted = datetime.strptime(name[:15], "%Y%m%d_%H%M%S")
                if older_than is None or deleted <= datetime.now() - older_than:
                    remove_entry(folder, is_dry, outcome)
    return outcome


def remove_entry(folder: Path, is_dry: bool, outcome: Outcome) -> None:
    size = inventory.measure(folder / FILES)
    place = folder.parent
    item = Item(place.parent, (place.name, folder.name), size)
    if why := mounted_beneath(folder, os.lstat(place).st_dev):
        outcome.left.append((item.name, why))
        return
    if is_dry:
        outcome.done.append(item)
        return
    gone = place / f"{GONE}{folder.name.removeprefix(GONE)}"  # no longer offered by --undo: half of it is no use
    try:
        if folder != gone:
            os.rename(folder, gone)
        shutil.rmtree(gone)
        outcome.done.append(item)
    except OSError as error:
        freed = ""
        with contextlib.suppress(OSError):
            freed = f"; {utils.format_bytes(size - inventory.measure(gone / FILES))} of it were freed"
        outcome.add_failure(item.name, error, freed)
