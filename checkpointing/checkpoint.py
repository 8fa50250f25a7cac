"""Checkpoints: what makes a training resumable, written completely or not at all.

A checkpoint is a folder `<output_dir>/<run>/step-N` that any tool can load as a model. Beside the weights and the
tokenizer it holds

    optimizer.safetensors     AdamW's moments, by parameter name
    random_state.safetensors  the random generators' states (dropout) after step N
    training_state.json       the position: step, examples seen, the data's fingerprint
    trained_examples.safetensors  digests of what it was trained on, by which an evaluation leaves it out
    train_config.json         every setting of the run
    manifest.json             size and SHA-256 of every other file; written last (manifest.py)

Nothing in it is a pickle. A `model` here is one of models.py, `world` a `training.distributed.World`.
"""

import contextlib
import dataclasses
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import utils
from checkpointing.manifest import EXAMPLES, OPTIMIZER, RANDOM_STATE, SETTINGS, STATE, write_manifest
from checkpointing.run_folder import best_step, resume_command, step_folder, step_folders, step_of
from common import atomic_files, json_records
from utils import CheckpointError, DiskOrNetworkError

SMALL_FILES_BYTES = 2**18  # random state and JSON files
BYTES_COMPARED_AT_ONCE = 2**27


@dataclass(frozen=True)
class TrainingState:
    """Where a training is after `step`."""

    step: int
    examples_seen: int
    data_fingerprint: str  # SHA-256 of the training examples' token ids
    num_examples: int
    tokens_per_batch: int  # the budget in use, which is smaller than the one asked for if memory ran out
    skipped_steps: int = 0  # steps whose loss or gradient was not finite
    eval_value: float | None = None  # of the run's metric, if this step was evaluated
    eval_count: int | None = None  # how many examples that is over
    base_fingerprint: str | None = None  # of the model under an adapter
    recomputes: bool | None = None  # whether gradient checkpointing was on
    offloads: bool | None = None  # whether AdamW's moments were in main memory


OLD_NAMES = {"num_pairs": "num_examples", "eval_accuracy": "eval_value", "eval_pairs": "eval_count"}


def random_state() -> dict[str, Tensor]:
    """The states of every generator that training draws from."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    if torch.backends.mps.is_available():
        states["mps"] = torch.mps.get_rng_state()
    return states


def set_random_state(states: dict[str, Tensor]) -> None:
    torch.set_rng_state(states["cpu"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
    if "mps" in states and torch.backends.mps.is_available():
        torch.mps.set_rng_state(states["mps"])


@dataclass(frozen=True)
class State:
    """What a checkpoint holds of the model, the optimizer and the data, as full tensors."""

    model: dict[str, Tensor]  # by the module's names
    optimizer: dict[str, Tensor]
    examples: dict[str, Tensor]  # "digests" (N,) int64 of what is trained on; empty if that is not known


def gather_state(
    model: Any, optimizer: torch.optim.Optimizer, world: Any, examples: dict[str, Tensor] | None = None
) -> State:
    """Full tensors of model and optimizer; sharded ones are gathered on the CPU of the main rank.

    All ranks must call it where the weights are sharded; the others get an empty state.
    """
    state = State({}, {}, examples or {})
    for tensors, found in ((model.state(), state.model), (_optimizer_tensors(model, optimizer), state.optimizer)):
        for name, tensor in tensors.items():
            full = world.gather_full(tensor)
            if world.is_main:
                found[name] = full
    return state


def save(
    run_folder: Path,
    model: Any,
    state: State,
    states: dict[str, Tensor],
    training_state: TrainingState,
    config: dict[str, Any],
) -> Path:
    """Write `step-N` under a temporary name, then rename it; returns its path once it is on disk.

    Before the renaming every tensor is read back and compared with the one in memory, one at a time. Raises
    DiskOrNetworkError if the disk is full, or would be; whatever was saved before stays as it was.
    """
    final = step_folder(run_folder, training_state.step)
    try:
        run_folder.mkdir(parents=True, exist_ok=True)
        check_free_space(run_folder, model, state.examples)
        with atomic_files.atomic_folder(final) as folder:
            write_files(folder, model, state, states, training_state, config)
    except (OSError, SafetensorError) as error:
        raise_if_of_disk(error, f"step {training_state.step} could not be saved", final)
        raise
    return final


def write_files(
    folder: Path,
    model: Any,
    state: State,
    states: dict[str, Tensor],
    training_state: TrainingState,
    config: dict[str, Any],
) -> None:
    """Write all files of a checkpoint into a folder; an exception carries a note that says what could not be saved."""
    with _noted("the model"):
        model.save_weights(folder, state.model)
    with _noted("the tokenizer"):
        model.save_tokenizer(folder)
    with _noted("the state of the training"):
        save_file(state.optimizer, folder / OPTIMIZER)
        save_file(states, folder / RANDOM_STATE)
        if state.examples:
            save_file(state.examples, folder / EXAMPLES)
        utils.write_json(folder / STATE, dataclasses.asdict(training_state))
        utils.write_json(folder / SETTINGS, config)
    _compare_with_memory(folder, model.names_in_file(state.model) | state.optimizer | states | state.examples)
    write_manifest(folder, training_state.step)


@contextlib.contextmanager
def _noted(part: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        error.add_note(part)
        raise


def raise_if_of_disk(error: Exception, what: str, where: Path) -> None:
    """Raise DiskOrNetworkError if it was the operating system that failed a save; its advice fits the error."""
    if isinstance(error, FileExistsError):
        return
    # safetensors wraps the system's own error in one of its own, as text
    in_text = re.search(r"os error (\d+)", str(error))
    cause = utils.disk_full_cause(error) or error
    number = int(in_text[1]) if in_text else getattr(cause, "errno", None)
    if number is None:
        return
    run_folder = where.parent if step_of(where) is not None else where
    free = _free_space(run_folder) if number in utils.FULL_DISK_ERRORS else ""
    advice = _advice(run_folder, utils.disk_advice(number))
    raise DiskOrNetworkError(what, where=where, found=f"{error}{free}", **advice) from error


def _free_space(folder: Path) -> str:
    try:
        return f" ({utils.format_bytes(shutil.disk_usage(folder).free)} free)"
    except OSError:  # the folder may be what is wrong
        return ""


def check_free_space(run_folder: Path, model: Any, examples: dict[str, Tensor]) -> None:
    """Raise before anything is written if a checkpoint of this model will not fit."""
    # AdamW keeps two moments for each parameter that is trained
    tensors = [*model.names_in_file(shapes(model)).values(), *2 * list(model.trained_parameters().values())]
    tensors += examples.values()
    needed = sum(tensor.numel() * tensor.element_size() for tensor in tensors) + SMALL_FILES_BYTES
    needed += len(model.tokenizer.backend_tokenizer.to_str().encode())
    free = shutil.disk_usage(run_folder).free
    if needed > free:
        raise DiskOrNetworkError(
            "the disk has no room for the next checkpoint",
            where=run_folder,
            found=f"{needed:,} bytes needed, {free:,} free",
            **_advice(run_folder, "free some space"),
        )


def shapes(model: Any) -> dict[str, Tensor]:
    """A `state()` of tensors without values: transformers would copy some real ones to tell what it writes."""
    state = model.state()
    return {name: torch.empty(state[name].shape, dtype=state[name].dtype, device="meta") for name in state}


def _advice(run_folder: Path, first: str) -> dict[str, str]:
    """What is safe and what to type next when a step could not be saved, once the cause is removed."""
    if steps := step_folders(run_folder):
        return {"safe": f"{steps[-1].name} is untouched", "next": f"{first}, then {resume_command(run_folder)}"}
    return {"safe": "no step of this run was saved before", "next": f"{first}, then start again"}


def _compare_with_memory(folder: Path, expected: dict[str, Tensor]) -> None:
    """Read every tensor back and compare; only `BYTES_COMPARED_AT_ONCE` and one tensor are in memory twice."""
    found = set()
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            names = list(file.keys())
        while names:
            compared = 0
            with safe_open(path, "pt") as file:  # anew, because what was read stays in memory until it is closed
                while names and compared < BYTES_COMPARED_AT_ONCE:
                    name = names.pop()
                    wanted, got = expected.get(name), file.get_tensor(name)
                    if wanted is None or not _is_same(wanted.cpu(), got):
                        raise DiskOrNetworkError("what was written is not what is in memory", where=path, found=name)
                    compared += got.nbytes
                    found.add(name)
                    del got
    if lost := expected.keys() - found:
        raise DiskOrNetworkError("the checkpoint lacks what is in memory", where=folder, found=sorted(lost)[0])


def _is_same(first: Tensor, second: Tensor) -> bool:
    """Bit by bit, because NaN is not equal to itself."""
    if first.dtype != second.dtype or first.shape != second.shape:
        return False
    return torch.equal(*(tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (first, second)))


def check_weights_are_finite(state: State, run_folder: Path, step: int) -> None:
    """Raise before non-finite weights become a checkpoint: a huge learning rate can produce them."""
    for name, weights in state.model.items():
        if not weights.isfinite().all():
            raise utils.UserError(
                f"the weights are not finite after step {step}, so it is not saved",
                found=name,
                safe=_advice(run_folder, "")["safe"],
                next="a smaller --lr or --weight_decay, or more --warmup_steps",
            )


def prune(run_folder: Path, keep: int) -> list[Path]:
    """Delete all but the newest `keep` steps and the best one; 0 keeps all. Returns what was deleted."""
    steps = step_folders(run_folder)
    kept = {*steps[-keep:], best_step(run_folder)} if keep else set(steps)
    pruned = [path for path in steps if path not in kept and not path.is_symlink()]  # links are left alone
    for path in pruned:
        # hidden first: a kill in the middle must not leave half a step
        hidden = path.with_name(f".tmp-pruned-{path.name}")
        path.rename(hidden)
        shutil.rmtree(hidden)
    return pruned


def later_steps(run_folder: Path, step: int) -> list[Path]:
    return [path for path in step_folders(run_folder) if (step_of(path) or 0) > step]


def set_aside_later_steps(run_folder: Path, step: int) -> Path | None:
    """Move the steps after `step` into a folder superseded-DATE; returns it, or None if there are none."""
    later = later_steps(run_folder, step)
    if not later:
        return None
    aside = run_folder / f"superseded-{utils.timestamp()}"
    aside.mkdir(exist_ok=True)
    for path in later:
        path.rename(aside / path.name)
    return aside


def _optimizer_tensors(model: Any, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    return {
        f"{key}/{name}": value.contiguous()
        for name, parameter in model.trained_parameters().items()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def restore_optimizer(folder: Path, model: Any, optimizer: Any, world: Any) -> None:
    """Put AdamW's moments back (training/optimizer.py). Raises CheckpointError if they are of other parameters."""
    tensors, parameters = load_file(folder / OPTIMIZER), model.trained_parameters()
    keys = ("step", "exp_avg", "exp_avg_sq")
    wrong = sorted(tensors.keys() ^ {f"{key}/{name}" for key in keys for name in parameters})
    wrong = wrong or [name for name in parameters if tensors[f"exp_avg/{name}"].shape != parameters[name].shape]
    if wrong:
        raise CheckpointError("the optimizer's state does not fit the model", where=folder / OPTIMIZER, found=wrong[0])
    for name, parameter in parameters.items():
        # Adam's step counters belong on the device when fused, else on the CPU
        on_device = optimizer.defaults.get("fused") or parameter.device.type == "cpu"
        state = {key: tensors.pop(f"{key}/{name}") for key in keys}
        state["step"] = state["step"].to(parameter.device if on_device else "cpu")
        for key in ("exp_avg", "exp_avg_sq"):
            # on a CPU they are mapped from the file still, which Windows would then not let go
            state[key] = optimizer.kept(world.shard_like(state[key].clone(), parameter))
        optimizer.state[parameter] = state


def read_training_state(folder: Path) -> TrainingState:
    """A checkpoint's position. Raises CheckpointError if its file is not what a training wrote."""
    content = utils.read_json(folder / STATE)
    try:
        return json_records.from_json(TrainingState, {OLD_NAMES.get(name, name): content[name] for name in content})
    except (TypeError, ValueError) as error:
        raise CheckpointError(
            "the checkpoint does not hold what a training wrote",
            where=folder / STATE,
            found=f"{type(error).__name__}: {error}",
            next="restore the file from a copy, or resume from another step",
        ) from error


def read_random_state(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / RANDOM_STATE)


def read_examples(folder: Path) -> dict[str, Tensor]:
    """`State.examples` of a checkpoint; empty if it does not say. CheckpointError if the file is damaged."""
    if not (folder / EXAMPLES).is_file():
        return {}
    try:
        return {"digests": load_file(folder / EXAMPLES)["digests"].view(torch.int64)}
    except (SafetensorError, KeyError, RuntimeError) as error:
        raise CheckpointError(
            "the checkpoint is damaged", where=folder / EXAMPLES, found=error, next="restore the file from a copy"
        ) from error


def digests_of(examples: dict[str, Tensor]) -> np.ndarray:
    """(N,) uint64, of which torch can do little."""
    return examples["digests"].numpy().view(np.uint64) if examples else np.zeros(0, np.uint64)
