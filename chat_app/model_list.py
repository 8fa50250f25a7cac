"""Which models there are: what a folder holds, told from its files, and the checkpoints under the output folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import utils
from common import hub
from utils import UserError

if TYPE_CHECKING:
    from checkpointing import checkpoint
else:  # it brings torch, which --help must not wait for
    checkpoint = utils.lazy_import("checkpointing.checkpoint")

DEFAULT_MODEL = "Qwen/Qwen3-0.6B"
NOBODY = ""  # who scores if there is no reward model


@dataclass(frozen=True)
class Choice:
    """A model that one may pick: what the page calls it, and its folder or hub id."""

    label: str
    name: str


def kind_of(folder: Path) -> str | None:
    """'reward' or 'policy', for whole models and for adapters alike; None if a folder holds no model."""
    if adapter := read_settings(folder / "adapter_config.json"):
        return "reward" if adapter.get("task_type") == "SEQ_CLS" else "policy"
    config = read_settings(folder / "config.json")
    if not config:
        return None
    architectures = config.get("architectures") or [""]
    return "reward" if architectures[0].endswith("ForSequenceClassification") else "policy"


def choose_models(model: str, reward_model: str | None) -> tuple[str, Path | None]:
    """(who talks: folder or hub id, who scores: folder); UserError or CheckpointError if the flags' files are wrong."""
    hub.refuse_missing_path(model, "--model")
    scorer = None
    if reward_model:
        # only folders can score; as it stands, a mistyped "runs/a" would pass for a hub id
        hub.refuse_missing_path(str(Path(reward_model).expanduser().absolute()), "--reward_model")
        scorer = sound_checkpoint(reward_model)
        if kind_of(scorer) != "reward":
            raise UserError("--reward_model names no reward checkpoint", where=scorer.absolute())
    if not Path(model).expanduser().exists():
        return model, scorer
    folder = sound_checkpoint(model)
    if kind_of(folder) != "reward":
        return str(folder), scorer
    return base_model_of(folder), scorer or folder


def sound_checkpoint(name: str) -> Path:
    """A model's folder, verified where it has a manifest; a run's folder means its newest sound step."""
    folder = Path(name).expanduser()
    if utils.step_folders(folder):
        return checkpoint.find(str(folder))
    if (folder / "manifest.json").exists():
        checkpoint.verify(folder)
    return folder


def base_model_of(folder: Path) -> str:
    """The model that a reward checkpoint was trained from: the one that talks."""
    known = _bases_named_by(folder)
    if not known:
        raise UserError(
            "nothing says which base model this reward checkpoint came from, so nobody could talk",
            where=folder.absolute(),
            found="no train_config.json with a 'model' in it",
            next=f"python chat.py --model TALKER --reward_model {folder}",
        )
    # a relative path holds only where the training was started; an adapter's is absolute
    base = next((name for name in known if Path(name).exists()), known[0])
    hub.refuse_missing_path(base, "--model")
    return base


def _bases_named_by(folder: Path) -> list[str]:
    names = [
        read_settings(folder / "train_config.json").get("model"),
        read_settings(folder / "adapter_config.json").get("base_model_name_or_path"),
    ]
    return [name for name in names if name]


def read_settings(path: Path) -> dict[str, Any]:
    """A JSON file's object, {} if there is no such file."""
    try:
        return dict(utils.read_json(path)) if path.exists() else {}
    except (OSError, ValueError, TypeError) as error:
        raise UserError("a model's settings cannot be read", where=path, found=error) from error


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
        steps = [step for step in utils.step_folders(run) if (step / "manifest.json").is_file()]
        best = utils.best_step(run)
        for step in reversed(steps):
            marks = [word for word, is_it in (("newest", step == steps[-1]), ("best", step == best)) if is_it]
            label = f"{run.name} / {step.name}" + (f" ({', '.join(marks)})" if marks else "")
            try:
                kind, bases = kind_of(step), _bases_named_by(step)
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
        steps = [(utils.step_folders(folder), folder) for folder in folders if not folder.name.startswith(".")]
        dated = [(found[-1].stat().st_mtime, folder.name, folder) for found, folder in steps if found]
    except OSError:  # no such folder, or a run was deleted this moment
        return []
    return [folder for _, _, folder in sorted(dated, reverse=True)]
