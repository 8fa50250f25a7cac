"""The trash: runs, steps and optimizer states are moved there by renaming, and come back the same way.

    .trash-ROOT/DATE_TIME-NUMBER/manifest.json    what a deletion took from this root, written before the first renaming
    .trash-ROOT/DATE_TIME-NUMBER/files/...        the same paths as in the root

Each root (checkpoints, logs) has its trash beside it: on the same file system, so that nothing is ever copied, and
outside the log folder, because TensorBoard reads hidden folders too. Where that is impossible (the root is a mount
point, its parent is not writable) the trash is ROOT/.trash, as in earlier versions; both places are always read.

What is under files/ is in the trash, whatever the manifest says, so an interrupted deletion or undo can be repeated.
"""

import contextlib
import dataclasses
import itertools
import json
import os
import re
import shutil
import stat
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path

import utils
from checkpointing import manifest, run_folder
from common import atomic_files, file_locks, json_records
from run_manager import inventory
from run_manager.deletion_plan import Item, Plan, leads_elsewhere, link_problem, mount_points, mounted_beneath, why_not
from run_manager.inventory import TRASH, Roots
from utils import UserError

MANIFEST, FILES = "manifest.json", "files"
GONE = "gone-"  # before the name of an entry that is being deleted for good
ENTRY = r"\d{8}_\d{6}-\d{3}"
HIDDEN_EVENTS = "tf-events-in-trash"  # what earlier versions called the event files in ROOT/.trash
HOLDER = "manage_runs.py, process"
LOCK_SECONDS = 5.0  # how long to wait for another manage_runs.py: it only renames, which is quick


@dataclass(frozen=True)
class TakenItem:
    """One item in an entry's manifest.json; see `Item`."""

    way: tuple[str, ...]  # Item.parts
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


# -- Where the trash is ------------------------------------------------------------------------------------------------


def trash_places(root: Path) -> tuple[Path, Path]:
    """Beside a root, and inside it."""
    parent, name = os.path.split(os.path.realpath(root))
    return Path(parent, f"{TRASH}-{name}"), root / TRASH


def is_used(roots: Roots) -> bool:
    """Whether there is a trash beside or in these roots, with something in it or not."""
    return any(place.is_dir() for root in (roots.output, roots.logs) for place in trash_places(root))


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


def check_folder(folder: Path, kind: str, advice: str) -> None:
    """Raise UserError unless a root or trash is a real folder."""
    if why := link_problem(folder):
        raise UserError(f"the {kind} is {why}", where=folder, safe="nothing was changed", next=advice)


@contextlib.contextmanager
def locked_trashes(roots: Iterable[Path]) -> Iterator[dict[Path, Path]]:
    """The trash of each root, held so that one manage_runs.py at a time moves things in and out of the roots."""
    with contextlib.ExitStack() as locks:
        places = {}
        for root in sorted(set(roots)):  # always in this order, so no two processes block each other
            root.mkdir(parents=True, exist_ok=True)  # to undo after the root itself was removed
            check_folder(root, "root", "name the real folder")
            places[root] = make_trash(root)
            check_folder(places[root], "trash", "see what it is")
            busy, advice = "another manage_runs.py is working on these runs", "the same command again in a moment"
            locks.callback(file_locks.RunLock(places[root], HOLDER, LOCK_SECONDS, busy, advice).release)
        yield places


def entries(places: list[Roots], prefix: str = "") -> dict[str, dict[Path, Path]]:
    """The deletions in the trash, oldest first: name -> {root: folder of what it took from that root}."""
    found: dict[str, dict[Path, Path]] = {}
    all_roots = [root for roots in places for root in (roots.logs, roots.output)]
    for root in {os.path.realpath(root): root for root in all_roots}.values():  # may be one folder
        for place in trash_places(root):
            for entry in os.scandir(place) if link_problem(place) is None else ():
                if re.fullmatch(prefix + ENTRY, entry.name, re.ASCII) and entry.is_dir(follow_symlinks=False):
                    found.setdefault(entry.name.removeprefix(prefix), {})[root] = place / entry.name
    return dict(sorted(found.items()))


def summary(places: list[Roots]) -> str | None:
    """What the trash holds, in one line; None if it is empty."""
    found = entries(places)
    size = sum(inventory.measure(folder / FILES) for folders in found.values() for folder in folders.values())
    deletions = utils.counted(len(found), "deletion")
    return f"in the trash: {utils.format_bytes(size)}, {deletions} (--undo, --empty_trash)" if found else None


# -- Into the trash ----------------------------------------------------------------------------------------------------


def delete(plan: Plan) -> Outcome:
    """Move a plan's items to the trash, run by run; each is checked again right before."""
    outcome, logs = Outcome(), [roots.logs for roots in plan.places]
    with locked_trashes({item.root for item in plan.items}) as trashes:
        now, taken = utils.timestamp(), {*entries(plan.places), *entries(plan.places, GONE)}
        names = (f"{now}-{number:03d}" for number in range(1, 1000))
        name = next(name for name in names if name not in taken)
        folders = {root: place / name for root, place in trashes.items()}
        for root, folder in folders.items():
            items = [TakenItem(item.parts, item.bytes, item.began) for item in plan.items if item.root == root]
            (folder / FILES).mkdir(parents=True)
            has_checkpoints = any(
                roots.output in trashes for roots in plan.places if root in (roots.output, roots.logs)
            )
            text = json.dumps(dataclasses.asdict(TakenItems(has_checkpoints, items)), indent=2) + "\n"
            atomic_files.replace_text(folder / MANIFEST, text)
        for run in dict.fromkeys(run_of(item) for item in plan.items):
            delete_items_of_run([item for item in plan.items if run_of(item) == run], folders, outcome)
        for root, folder in folders.items():
            remove_if_empty(root, folder)
    for root in (root for root, place in trashes.items() if root in logs and place.name == TRASH):
        print(f"warning: {root} has no room for a trash beside it: TensorBoard shows deleted logs until "
              "--empty_trash", file=sys.stderr)  # fmt: skip
    return outcome


def run_of(item: Item) -> tuple[str, str]:
    """The run that an item belongs to, among runs of several kinds."""
    return item.prefix, item.parts[0]


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
    with contextlib.ExitStack() as locks:
        for folder in dict.fromkeys(item.root / item.parts[0] for item in items):
            has_lock_or_record = any((folder / name).exists() for name in (file_locks.RunLock.FILE, run_folder.RUN))
            if has_lock_or_record or run_folder.step_folders(folder):
                locks.callback(file_locks.RunLock(folder, HOLDER).release)
                break
        if os.name == "nt":  # Windows renames no folder that holds an open file, ours or a training's
            locks.close()
        yield


def in_trash(item: Item, folders: dict[Path, Path]) -> Path:
    """An item's path in the entry whose folders by root are given."""
    return (folders[item.root] / FILES).joinpath(*item.parts)


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
        print(f"{folder} could not be removed: {error.strerror}", file=sys.stderr)


# -- Out of the trash --------------------------------------------------------------------------------------------------


def undo(places: list[Roots], is_dry: bool = False) -> tuple[str, Outcome]:
    """Move the last deletion back to where it came from; returns its name. UserError, before anything moves, if
    something is in the way."""
    outcome = Outcome()
    with contextlib.nullcontext() if is_dry else locked_trashes(itertools.chain(*entries(places).values())):
        name, folders, items = last_deletion(places, is_dry)
        waiting = [item for item in items if os.path.lexists(in_trash(item, folders))]
        if problems := [f"{item.name}: {why}" for item in waiting if (why := in_the_way(item, waiting))]:
            more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
            raise UserError(
                "the last deletion cannot be undone",
                where=", ".join(dict.fromkeys(str(item.root) for item in waiting)),
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


def last_deletion(places: list[Roots], is_dry: bool) -> tuple[str, dict[Path, Path], list[Item]]:
    """The newest deletion that took something: name, folders by root, items. Removes newer ones that took nothing."""
    prefixes = {root: roots.prefix for roots in places for root in (roots.output, roots.logs)}
    for name, found in reversed(entries(places).items()):
        folders = {root: folder for root, folder in found.items() if not is_part_of_another(root, found, places)}
        if items := [item for root, folder in folders.items() for item in read_entry(root, folder, prefixes[root])]:
            return name, folders, items
        for root, folder in folders.items() if not is_dry else ():  # killed before it took anything
            remove_if_empty(root, folder)
    raise UserError("the trash is empty: nothing to undo", where=trash_places(places[0].output)[0])


def is_part_of_another(root: Path, found: dict[Path, Path], places: list[Roots]) -> bool:
    """Whether a deletion took only logs from these roots: its checkpoints are in the trash of another --output_dir."""
    if not any(root == roots.logs and roots.output not in found for roots in places):
        return False
    return bool(inventory.read_object(found[root] / MANIFEST).get("has_checkpoints"))


def read_entry(root: Path, folder: Path, prefix: str = "") -> list[Item]:
    """What a deletion took from one root; UserError if its manifest cannot be used."""
    try:
        taken = json_records.load(TakenItems, folder / MANIFEST)
        items = [Item(root, one.way, one.bytes, one.began, prefix) for one in taken.items] if taken else []
        if outside := [item.name for item in items if leads_elsewhere(item.parts)]:
            raise ValueError(f"{outside[0]!r} leads out of the root")
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
    run = item.root / item.parts[0]
    if len(item.parts) == 1 or any(other.path == run for other in waiting):
        return None
    if why := why_not(Item(item.root, item.parts[:-1], 0)):
        return f"the folder it belongs to: {why}"
    record = run_folder.record_or_none(run)
    if item.began and record and record.began != item.began:
        return "the run was resumed since"
    return "the run is being trained" if file_locks.is_locked(run / file_locks.RunLock.FILE) else None


def move_out(item: Item, source: Path, outcome: Outcome) -> None:
    """Put one item back. If an earlier undo put it back already, only its step's manifest is corrected."""
    try:
        with held_run([item] if len(item.parts) > 1 and item.path.parent.is_dir() else []):
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
        for event_file in [Path(beneath) for beneath, found in inventory.walk(path) if stat.S_ISREG(found.st_mode)]:
            if HIDDEN_EVENTS in event_file.name:
                event_file.rename(event_file.with_name(event_file.name.replace(HIDDEN_EVENTS, "tfevents")))


def empty(places: list[Roots], older_than: timedelta | None, is_dry: bool = False) -> Outcome:
    """Delete for good what is in the trash, or has been there long enough."""
    outcome = Outcome()
    limit = "" if older_than is None else f"{datetime.now() - older_than:%Y%m%d_%H%M%S}".zfill(15)  # year 110: 0110
    touched = itertools.chain(*entries(places, GONE).values(), *entries(places).values())
    with contextlib.nullcontext() if is_dry else locked_trashes(touched):
        old = [folders for name, folders in entries(places).items() if not limit or name[:15] <= limit]
        for folders in [*entries(places, GONE).values(), *old]:
            for folder in folders.values():
                remove_entry(folder, is_dry, outcome)
    return outcome


def remove_entry(folder: Path, is_dry: bool, outcome: Outcome) -> None:
    size, place = inventory.measure(folder / FILES), folder.parent
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
