"""The models that the page offers: those of the flags, the default, and the checkpoints in the output folder."""

from pathlib import Path

import utils
from checkpointing import resolve
from checkpointing.run_folder import best_step, step_folders
from common import hub
from utils import UserError

DEFAULT_MODEL = "Qwen/Qwen3-0.6B"
NONE = ""  # the name of no reward model


def choose_models(model: str, reward_model: str | None) -> tuple[str, Path | None]:
    """What the two flags mean: (folder or hub id of the policy, folder of the reward model or None).

    If --model is a reward model, the policy is its base model. Raises UserError or CheckpointError if a path is wrong.
    """
    hub.check_path_exists(model, "--model")
    reward_folder = None
    if reward_model:  # always a folder; an absolute path, so that a mistyped "runs/a" is not taken for a hub id
        reward_folder = resolve.find_model(str(Path(reward_model).expanduser().absolute()), "--reward_model")
    if not Path(model).expanduser().exists():
        return model, reward_folder
    folder = resolve.sound_checkpoint(model)
    if resolve.kind_of(folder) != "reward":
        return str(folder), reward_folder
    return resolve.base_model_of(folder), reward_folder or folder


def stamp(name: str) -> str:
    """A text that changes when a folder's content is replaced under the same name; "" for a hub id."""
    for file in ("manifest.json", "config.json", "adapter_config.json"):
        path = Path(name) / file
        if name and path.is_file():
            return f"{path.stat().st_mtime_ns} {path.read_text(encoding='utf-8', errors='replace')}"
    return ""


def list_models(output_dir: Path, policy: str, reward_folder: Path | None) -> tuple[dict[str, str], dict[str, str]]:
    """(policies, reward models) on offer: those of the flags, the default, and each run's complete checkpoints.

    Both map names (folders or hub ids) to labels for the page. Unreadable checkpoints are skipped. Checkpoints are
    verified only when they are loaded.
    """
    policies = {policy: utils.seen_from_here(policy), DEFAULT_MODEL: f"{DEFAULT_MODEL} (default)"}
    reward_models = {NONE: "none"}
    for run in _runs(output_dir):
        steps = [step for step in step_folders(run) if (step / "manifest.json").is_file()]
        best = best_step(run)
        for step in reversed(steps):
            marks = [mark for mark, marked in (("newest", steps[-1]), ("best", best)) if step == marked]
            label = f"{run.name} / {step.name}" + (f" ({', '.join(marks)})" if marks else "")
            try:
                kind, bases = resolve.kind_of(step), resolve.base_models_named_by(step)
            except UserError:
                continue
            name = str(step.resolve())
            if kind == "policy":
                policies.setdefault(name, label)
            elif kind == "reward":
                reward_models.setdefault(name, label)
                for base in bases[:1]:
                    policies.setdefault(base, f"{utils.seen_from_here(base)} (base of {run.name})")
    if reward_folder:
        reward_models.setdefault(str(reward_folder.resolve()), f"{reward_folder.parent.name} / {reward_folder.name}")
    return policies, reward_models


def _runs(output_dir: Path) -> list[Path]:
    """The run folders, most recently written first; links are skipped."""
    try:
        folders = [path for path in output_dir.iterdir() if not path.is_symlink() and not path.name.startswith(".")]
        dated = [(steps[-1].stat().st_mtime, folder) for folder in folders if (steps := step_folders(folder))]
    except OSError:  # no such folder, or a run was deleted at this moment
        return []
    return [folder for _, folder in sorted(dated, reverse=True)]
