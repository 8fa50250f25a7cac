"""Which models there are: what a folder holds, told from its files, and the checkpoints under the output folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import utils
from checkpointing import resolve
from checkpointing.run_folder import best_step, step_folders
from common import hub
from utils import UserError

DEFAULT_MODEL = "Qwen/Qwen3-0.6B"
NOBODY = ""  # who scores if there is no reward model


@dataclass(frozen=True)
class Choice:
    """A model that one may pick: what the page calls it, and its folder or hub id."""

    label: str
    name: str


def choose_models(model: str, reward_model: str | None) -> tuple[str, Path | None]:
    """(who talks: folder or hub id, who scores: folder); UserError or CheckpointError if the flags' files are wrong."""
    hub.check_path_exists(model, "--model")
    scorer = None
    if reward_model:
        # only folders can score; as it stands, a mistyped "runs/a" would pass for a hub id
        hub.check_path_exists(str(Path(reward_model).expanduser().absolute()), "--reward_model")
        scorer = resolve.sound_checkpoint(reward_model)
        if resolve.kind_of(scorer) != "reward":
            raise UserError("--reward_model names no reward checkpoint", where=scorer.absolute())
    if not Path(model).expanduser().exists():
        return model, scorer
    folder = resolve.sound_checkpoint(model)
    if resolve.kind_of(folder) != "reward":
        return str(folder), scorer
    return resolve.base_model_of(folder), scorer or folder


def stamp(name: str) -> str:
    """What tells a folder's content from another's under the same name; nothing for a hub id."""
    for file in ("manifest.json", "config.json", "adapter_config.json"):
        path = Path(name) / file
        if name and path.is_file():
            return f"{path.stat().st_mtime_ns} {path.read_text(encoding='utf-8', errors='replace')}"
    return ""


# ---------------------------------------------------------------------------------------------------------------------
# What one may pick
# ---------------------------------------------------------------------------------------------------------------------


def list_models(output_dir: Path, talker: str, scorer: Path | None) -> tuple[list[Choice], list[Choice]]:
    """(who may talk, who may score): what the flags named, the default, and every complete checkpoint of every run.

    A checkpoint that cannot be read is left out; choosing one verifies it.
    """
    talkers = {talker: utils.seen_from_here(talker), DEFAULT_MODEL: f"{DEFAULT_MODEL} (default)"}
    scorers = {NOBODY: "nobody"}
    for run in _runs(output_dir):
        steps = [step for step in step_folders(run) if (step / "manifest.json").is_file()]
        best = best_step(run)
        for step in reversed(steps):
            marks = [word for word, is_it in (("newest", step == steps[-1]), ("best", step == best)) if is_it]
            label = f"{run.name} / {step.name}" + (f" ({', '.join(marks)})" if marks else "")
            try:
                kind, bases = resolve.kind_of(step), resolve.base_models_named_by(step)
            except UserError:
                continue
            name = str(step.resolve())
            if kind == "policy":
                talkers.setdefault(name, label)
            elif kind == "reward":
                scorers.setdefault(name, label)
                for base in bases[:1]:
                    talkers.setdefault(base, f"{utils.seen_from_here(base)} (base of {run.name})")
    if scorer:
        scorers.setdefault(str(scorer.resolve()), f"{scorer.parent.name} / {scorer.name}")
    return tuple([Choice(label, name) for name, label in found.items()] for found in (talkers, scorers))


def _runs(output_dir: Path) -> list[Path]:
    """The run folders, newest first by their newest step; links are left alone."""
    try:
        folders = [path for path in output_dir.iterdir() if path.is_dir() and not path.is_symlink()]
        steps = [(step_folders(folder), folder) for folder in folders if not folder.name.startswith(".")]
        dated = [(found[-1].stat().st_mtime, folder.name, folder) for found, folder in steps if found]
    except OSError:  # no such folder, or a run was deleted this moment
        return []
    return [folder for _, _, folder in sorted(dated, reverse=True)]
