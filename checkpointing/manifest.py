"""The manifest of a checkpoint: size and SHA-256 of every file. Checks it, and finds a run's newest sound step.

Standard library only: manage_runs.py and the list of models read manifests without importing torch.
"""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import utils
from checkpointing import run_folder
from checkpointing.run_folder import resume_command, step_folders, step_of
from common import atomic_files, file_locks, hub, json_records
from utils import CheckpointError

MANIFEST = "manifest.json"
OPTIMIZER, RANDOM_STATE = "optimizer.safetensors", "random_state.safetensors"
STATE, SETTINGS = "training_state.json", "train_config.json"
EXAMPLES = "trained_examples.safetensors"


def write_manifest(folder: Path, step: int) -> None:
    """Sizes and checksums of all files in and below a folder, and a checksum of itself.

    Files are named by their paths from the folder, with slashes on every platform.
    """
    paths = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if not path.is_dir()}
    files = {
        name: {"bytes": path.stat().st_size, "sha256": utils.sha256_of(path)} for name, path in sorted(paths.items())
    }
    manifest = {"step": step, "files": files}
    utils.write_json(folder / MANIFEST, manifest | {"sha256": own_checksum(manifest)})


def own_checksum(manifest: dict[str, Any]) -> str:
    """A manifest's checksum of itself, so that a flipped bit in it is not blamed on a file that it lists."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def read_manifest(folder: Path) -> dict[str, Any]:
    """A step's manifest without its own checksum, which is checked; ValueError if it cannot be trusted."""
    try:
        content = json_records.read_own_json(folder / MANIFEST)
    except ValueError as error:
        raise ValueError(f"no readable manifest ({error})") from error
    if not isinstance(content, dict) or not isinstance(content.get("files"), dict):
        raise ValueError("no readable manifest" if content is not None else "no such file")
    checksum = content.pop("sha256", None)
    if checksum != own_checksum(content):
        raise ValueError("its content changed; its SHA-256 is not the one it names")
    if outside := [name for name in content["files"] if leads_out(name)]:
        raise ValueError(f"it names {outside[0]!r}, which is not a file of the checkpoint")
    return content


def leads_out(name: str) -> bool:
    """Whether a path in a manifest could be of something outside the checkpoint."""
    separators = set("\\:\0") if os.name == "nt" else {"\0"}
    return any(part in ("", ".", "..") or separators & set(part) for part in name.split("/"))


def move_in_manifest(folder: Path, name: str, source: str, target: str) -> None:
    """Move a file's entry between a manifest's "files" and "removed", all or nothing; moving it back is exact."""
    manifest = read_manifest(folder)
    if name not in manifest.get(source, {}):
        return  # done before
    entry = manifest[source].pop(name)
    manifest[target] = dict(sorted({**manifest.get(target, {}), name: entry}.items()))
    manifest = {key: value for key, value in manifest.items() if key != "removed" or value}
    text = json.dumps(manifest | {"sha256": own_checksum(manifest)}, indent=2, ensure_ascii=False) + "\n"
    atomic_files.replace_text(folder / MANIFEST, text)


def has_optimizer(folder: Path) -> bool:
    """Whether a step still has the optimizer's state, as far as its manifest knows."""
    try:
        return OPTIMIZER not in read_manifest(folder).get("removed", {})
    except (OSError, ValueError):
        return True  # a damaged step is reported as damaged


# -- Finding and checking ----------------------------------------------------------------------------------------------


def find(resume_from: str) -> Path:
    """The `step-N` folder that `--resume_from` means: itself, or the newest sound one of a run folder."""
    path = Path(resume_from).expanduser()
    path = path.resolve() if path.name in ("", "..") else path  # "." has no name
    if path.parent.name == "":  # `step-6` typed inside its run's folder
        path = path.absolute()
    if path.is_dir() and (step_of(path) is not None or (path / MANIFEST).exists()):
        verify(path, is_resuming=True)
        return path
    damaged = []
    for step in reversed(step_folders(path)):
        if (trouble := problem(step)) is None:
            for later, file, found in damaged:
                name = file.relative_to(later).as_posix()
                print(f"{later.name} is damaged ({name}: {found}); going on from {step.name}", flush=True)
            return step
        damaged.append((step, *trouble))
    if damaged:
        raise CheckpointError(
            "every checkpoint of this run is damaged",
            where=damaged[0][1],
            found=damaged[0][2],
            next="restore the files from a copy, or start a new run",
        )
    if not path.is_dir():
        raise hub.missing_path(path, "--resume_from")
    raise nothing_to_resume(path)


def nothing_to_resume(folder: Path) -> utils.UserError:
    """The error about a folder without any step. Nothing is damaged: it is bad input, and no bad checkpoint."""
    record = run_folder.record_or_none(folder)
    if record is None:
        names = sorted(entry.name for entry in folder.iterdir())
        return utils.UserError(
            "--resume_from: no checkpoint there",
            where=folder.absolute(),
            found=f"{folder} holds {', '.join(names[:8]) or 'nothing'}",
            next=f"--resume_from takes {hub.WANTED['--resume_from']}",
        )
    if file_locks.is_locked(folder / file_locks.RunLock.FILE):
        found, advice = "it is being trained right now, before its first checkpoint", "wait until it has saved one"
    else:
        found = f"it was {record.state} before its first checkpoint" + (f" ({record.cause})" if record.cause else "")
        advice = run_folder.start_command(folder, record)
    return utils.UserError(
        "--resume_from: this run has not saved any step, so there is nothing to resume",
        where=folder.absolute(), found=found, safe="nothing was changed", next=advice,
    )  # fmt: skip


def check_resumable(folder: Path) -> None:
    """Raise CheckpointError if a checkpoint, even a sound one, lacks what resuming needs."""
    if not has_optimizer(folder):
        sound = _newest_sound([step for step in step_folders(folder.parent) if has_optimizer(step)])
        raise CheckpointError(
            "this checkpoint no longer has its optimizer state, so training cannot continue from it",
            where=folder,
            found="manage_runs.py removed it: the step was shrunk to its weights",
            safe=f"the weights are whole (chat.py loads them); {sound.name if sound else 'no other step'} still has it",
            next=resume_command(sound) if sound
            else "python manage_runs.py --undo   (if shrinking it was the last deletion)",
        )  # fmt: skip
    for name in (OPTIMIZER, RANDOM_STATE, STATE, SETTINGS):
        if not (folder / name).is_file():
            raise CheckpointError(
                "this checkpoint holds a model but not all of a training",
                where=folder / name,
                found="no such file, and the manifest names none",
                safe="the model itself can be used",
                next="resume from another step, or start a new run with --model and this folder",
            )


def verify(folder: Path, is_resuming: bool = False) -> None:
    """Raise CheckpointError if any file is missing, changed or cut; name the newest sound step before it.

    With `is_resuming` the message ends in the command that resumes from that step.
    """
    if (trouble := problem(folder)) is None:
        return
    earlier = [step for step in step_folders(folder.parent) if (step_of(step) or 0) < (step_of(folder) or 0)]
    safe, advice = "no earlier step of this run is complete", "restore the files from a copy, or start a new run"
    if sound := _newest_sound(earlier):
        safe, advice = f"{sound.name} is complete", resume_command(sound) if is_resuming else f"use {sound} instead"
    raise CheckpointError("the checkpoint is damaged", where=trouble[0], found=trouble[1], safe=safe, next=advice)


def _newest_sound(steps: list[Path]) -> Path | None:
    return next((step for step in reversed(steps) if problem(step) is None), None)


def problem(folder: Path) -> tuple[Path, str] | None:
    """What is wrong with a checkpoint: (file, what was found and expected); None if every file is as it was written."""
    manifest = folder / MANIFEST
    try:
        content = read_manifest(folder)
        expected = {folder / name: (entry["bytes"], entry["sha256"]) for name, entry in content["files"].items()}
    except (OSError, ValueError, KeyError, TypeError) as error:
        return manifest, str(error)
    if step_of(folder) not in (None, content.get("step")):
        return manifest, f"it is of step {content.get('step')}; the folder was renamed"
    for path, (size, checksum) in expected.items():
        if not path.is_file():
            return path, f"no such file; the manifest says {size:,} bytes"
        if path.stat().st_size != size:
            return path, f"{path.stat().st_size:,} bytes; the manifest says {size:,}"
        if utils.sha256_of(path) != checksum:
            return path, "its content changed; its SHA-256 is not the manifest's"
    return None
