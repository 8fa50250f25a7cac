"""What --model and similar flags may name: a checkpoint, a run, a folder or a hub id; which kind it is; its base model.

Without torch: a folder's files say what kind of model it holds.
"""

from pathlib import Path
from typing import Any

import utils
from checkpointing import manifest
from checkpointing.run_folder import step_folders
from common import hub
from utils import UserError

NOT_MODEL_FILES = ("*.gguf", "*.onnx", "*.msgpack", "*.h5", "*.ot", "optimizer*", "original/*")  # of hub repositories


def find_model(name: str, flag: str = "--model") -> Path:
    """The folder of a reward model: a checkpoint (verified), a run's newest sound one, any model's, or a hub id's copy.

    UserError if it is not a reward model with one label; CheckpointError if a checkpoint is damaged.
    """
    hub.check_path_exists(name, flag)
    is_local = Path(name).expanduser().exists()
    folder = sound_checkpoint(name) if is_local else _copy_from_hub(name, flag)
    kind = kind_of(folder)
    if kind != "reward":
        found = "a language model without a reward head" if kind else "no config.json of a model in it"
        raise UserError(
            f"{flag} does not name a reward model", where=folder, found=found,
            next="expected: a checkpoint of train_rm.py, or a model for sequence classification with one label",
        )  # fmt: skip
    if (folder / "adapter_config.json").exists():  # its head is checked when it is opened
        return folder
    # transformers stores the labels unless there are two, its default
    labels = read_settings(folder / "config.json").get("id2label") or ["LABEL_0", "LABEL_1"]
    if len(labels) != 1:
        names = list(labels.values()) if isinstance(labels, dict) else labels
        raise UserError(
            f"{flag} has {len(labels)} labels, but a reward model has one",
            where=folder, found=", ".join(map(str, names[:6])),
        )  # fmt: skip
    return folder


def _copy_from_hub(name: str, flag: str) -> Path:
    instead = "python train_rm.py --demo   (offline), or a folder with a downloaded model"
    local_only = hub.only_local_copy(name, "model", flag, instead)
    import huggingface_hub

    try:
        found = huggingface_hub.snapshot_download(
            name, ignore_patterns=list(NOT_MODEL_FILES), local_files_only=local_only
        )
    except Exception as error:  # which class depends on the HTTP library underneath
        raise utils.DiskOrNetworkError(
            f"{name} cannot be downloaded", found=f"{type(error).__name__}: {error}", next="try again, or name a folder"
        ) from error
    return Path(found)


def kind_of(folder: Path) -> str | None:
    """'reward' or 'policy', for whole models and for adapters alike; None if a folder holds no model."""
    if adapter := read_settings(folder / "adapter_config.json"):
        return "reward" if adapter.get("task_type") == "SEQ_CLS" else "policy"
    config = read_settings(folder / "config.json")
    if not config:
        return None
    architectures = config.get("architectures") or [""]
    return "reward" if architectures[0].endswith("ForSequenceClassification") else "policy"


def sound_checkpoint(name: str) -> Path:
    """A model's folder, verified where it has a manifest; a run's folder means its newest sound step."""
    folder = Path(name).expanduser()
    if step_folders(folder):
        return manifest.find(str(folder))
    if (folder / "manifest.json").exists():
        manifest.verify(folder)
    return folder


def base_model_of(folder: Path) -> str:
    """The base model that a reward checkpoint was trained from."""
    known = base_models_named_by(folder)
    if not known:
        raise UserError(
            "nothing says which base model this reward checkpoint was trained from",
            where=folder.absolute(),
            found="no train_config.json with a 'model' in it",
            next=f"python chat.py --model POLICY --reward_model {folder}",
        )
    # a relative path holds only where the training was started; an adapter's is absolute
    base = next((name for name in known if Path(name).exists()), known[0])
    hub.check_path_exists(base, "--model")
    return base


def base_models_named_by(folder: Path) -> list[str]:
    names = [
        training_settings(folder).get("model"),
        read_settings(folder / "adapter_config.json").get("base_model_name_or_path"),
    ]
    return [name for name in names if name]


def training_settings(folder: Path) -> dict[str, Any]:
    """The settings of the training that wrote a checkpoint; {} for any other model."""
    return read_settings(folder / "train_config.json")


def read_settings(path: Path) -> dict[str, Any]:
    """A JSON file's object, {} if there is no such file."""
    try:
        return dict(utils.read_json(path)) if path.exists() else {}
    except (OSError, ValueError, TypeError) as error:
        raise UserError("a model's settings cannot be read", where=path, found=error) from error
