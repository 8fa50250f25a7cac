"""The rehearsal of a save, before the hours of training that a failing one would lose.

All that a save writes is written by the same code into a temporary folder of the run, but with a single number for each
tensor. It is verified, opened again and deleted.
"""

import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

import utils
from checkpointing import checkpoint, manifest, resolve
from checkpointing.checkpoint import State, TrainingState
from utils import UserError

FOLDER = ".tmp-rehearsal"  # a name that `remove_dead_saves` knows


def rehearse(
    run_folder: Path, model: Any, training_state: TrainingState, config: dict[str, Any], examples: dict[str, Tensor]
) -> None:
    """Raise UserError if no step of this training could be saved: DiskOrNetworkError if that is the disk's fault."""
    folder = run_folder / FOLDER
    try:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        state = State(stand_ins(model), {}, examples)
        checkpoint.write_files(folder, model, state, checkpoint.random_state(), training_state, config)
        check(folder, model, training_state, config)
    except Exception as error:  # each library has its own errors, and a tokenizer may be of any kind
        is_path = getattr(error, "errno", None) in utils.PATH_ERRORS  # a name that comes from the tokenizer, not a disk
        if isinstance(error, (OSError, SafetensorError)) and not is_path:
            checkpoint.raise_if_of_disk(error, "no step of this training could be saved", run_folder)
        parts = [f": {part} cannot be written" for part in getattr(error, "__notes__", [])]
        raise UserError(
            f"no step of this training could be saved{''.join(parts[:1])}",
            where=model.tokenizer.name_or_path,
            found=explained(error),
            safe="nothing was computed yet",
            next="repair the model's files, or name another --model (--debug shows where it failed)",
        ) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def stand_ins(model: Any) -> dict[str, Tensor]:
    """A `state()` with a single number for each tensor that is written as it is in memory.

    Left out are those that transformers converts while it writes, because it needs their shapes: a mixture's experts.
    """
    state = checkpoint.shapes(model)
    written = {id(tensor) for tensor in model.names_in_file(state).values()}
    return {name: torch.zeros(1) for name, tensor in state.items() if id(tensor) in written}


def check(folder: Path, model: Any, training_state: TrainingState, config: dict[str, Any]) -> None:
    """Raise unless a training could go on from what was saved, as far as that can be told without its tensors."""
    if trouble := manifest.problem(folder):
        raise ValueError(f"{trouble[0].relative_to(folder).as_posix()}: {trouble[1]}")
    manifest.check_resumable(folder)
    checkpoint.read_random_state(folder)
    if checkpoint.read_training_state(folder) != training_state:
        raise ValueError(f"{manifest.STATE} does not hold what was written")
    if resolve.training_settings(folder) != config:
        raise ValueError(f"{manifest.SETTINGS} does not hold what was written")
    model.check_saved(folder)


def explained(error: Exception) -> str:
    """An error in one line, with what a UserError found."""
    if isinstance(error, UserError):
        return error.what if error.found is None else f"{error.what}: {error.found}"
    return f"{type(error).__name__}: {utils.first_line(error)}"
