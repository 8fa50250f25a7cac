"""Opening a run, new or resumed: its folder and lock, its data, model and optimizer, back to where a checkpoint was.

What depends on the training, its data and model, comes from an opener that each script brings.
"""

import dataclasses
import errno
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

import utils
from checkpointing import checkpoint, rehearsal, resolve, run_folder
from checkpointing.run_folder import resume_command, step_of
from common import atomic_files, file_locks
from data_pipeline.sampler import StepSampler
from modeling import devices, fused, speedups
from modeling.pretrained import LoraSettings
from training import launch, memory, optimizer
from training.config import AUTO, TrainingConfig
from training.distributed import World
from training.micro_batches import MicroBatcher
from training.run import Run
from utils import Stopped, UserError


class Parts(NamedTuple):
    """What a script's opener returns: the model, and its data as `data.PairDataset` has it."""

    model: Any  # of models.py, on the CPU
    train_data: Any
    eval_data: Any
    widest: Any = None  # examples as large as any that a step makes, if those are not of `train_data`


Opener = Callable[[Any, Path | None, World], Parts]  # (config, checkpoint resumed from, world) -> Parts


def set_up(config: TrainingConfig, resumed_from: Path | None, world: World, open_parts: Opener, script: str) -> Run:
    """A run, new or resumed. What can fail early fails here, cheapest first: names, data, then the model."""
    devices.expect_changing_sizes()
    launch.connect_model(world, config.fsdp)
    folder, lock = claim_run_folder(config, resumed_from) if world.is_main else (None, None)
    folder = world.broadcast(folder)
    config = dataclasses.replace(config, run_name=folder.name)
    if not resumed_from and Path(config.model).is_dir():  # a run's folder stands for its newest sound step
        config = dataclasses.replace(config, model=str(resolve.sound_checkpoint(config.model)))
    if config.precision == AUTO:  # a resumed run goes on in what was chosen, on other hardware too
        config = dataclasses.replace(config, precision=devices.fastest_precision(device_of(world)))
    log_folder = Path(config.log_dir) / folder.name
    try:
        if world.is_main:
            check_no_strays(folder)
            make_folder(log_folder, "--log_dir")
            atomic_files.remove_dead_saves(folder)
            atomic_files.temporary(folder / run_folder.RUN).unlink(missing_ok=True)
        model, train_data, eval_data, widest = open_parts(config, resumed_from, world)
        if not resumed_from:
            torch.manual_seed(config.seed)
        check_sequences(model, world, train_data, eval_data)
        examples = trained_examples(config, train_data, resumed_from)
        checkpoint.check_free_space(folder, model, examples)
        base_fingerprint = model.base_fingerprint()
        if world.is_main:
            rehearse_save(folder, model, train_data, config, base_fingerprint, examples)
        module = prepare_model(model, config, world)
        adamw = optimizer.make_optimizer(model, config)
        sampler = StepSampler(len(train_data), config.examples_per_step, config.epochs, config.seed, config.max_steps)
        describe(config, model, sampler, world)
        # with auto, memory alone limits how many examples a micro-batch has
        most = config.examples_per_step if config.tokens_per_batch == AUTO else config.batch_size
        batcher = MicroBatcher(model, module, world, batch_size=most, max_length=config.max_length)
        run = Run(
            config, script, world, model, module, adamw, train_data, eval_data, sampler, batcher, folder, lock,
            base_fingerprint, examples, checkpoint.random_state(),
        )  # fmt: skip
        devices.free(model.device)  # what opening the model left behind is not part of what training holds
        may_offload = memory.can_offload(batcher) and config.offload_optimizer is not False
        if may_offload and config.offload_optimizer is True:
            adamw.offload()
        choices = go_back_to(resumed_from, run) if resumed_from else memory.Choices.of(config)
        adamw.make_moments(may_offload)
        memory.choose(batcher, train_data if widest is None else widest, adamw, choices)
        return run
    except BaseException as error:
        if isinstance(error, (Stopped, KeyboardInterrupt)) and world.is_main:
            utils.say_if_heard("stopped before the first step: there is nothing to save; the same command starts again")
        if lock is not None:
            run_folder.remove_unused(folder, log_folder)
            lock.release()
        raise


def trained_examples(config: TrainingConfig, train_data: Any, resumed_from: Path | None) -> dict[str, torch.Tensor]:
    """What a run's checkpoints say they were trained on: its data, and what the checkpoint it began from was."""
    before = checkpoint.read_examples(resumed_from or Path(config.model))
    if resumed_from and not before:
        return {}  # written before checkpoints said so
    digests = np.union1d(train_data.digests, checkpoint.digests_of(before))
    return {"digests": torch.from_numpy(digests.view(np.int64))}


def rehearse_save(
    folder: Path,
    model: Any,
    train_data: Any,
    config: TrainingConfig,
    base_fingerprint: str | None,
    examples: dict[str, torch.Tensor],
) -> None:
    """Raise UserError now, and not after hours, if no step of this run could be saved."""
    state = checkpoint.TrainingState(
        0, 0, train_data.fingerprint, len(train_data), 0, base_fingerprint=base_fingerprint
    )
    rehearsal.rehearse(folder, model, state, config.stored(), examples)


def device_of(world: World) -> torch.device:
    return devices.pick_device() if world.is_alone else world.accelerator.device


def prepare_model(model: Any, config: TrainingConfig, world: World) -> torch.nn.Module:
    """Put a model on its device, ready to train; returns what training calls: itself, or DDP or FSDP2 around it."""
    model.to(device_of(world)).train()
    model.autocast_dtype = devices.autocast_dtype(model.device, config.precision)
    devices.keep_heap(model.device)
    model.use_attention(config.attention)
    speedups.narrow_last_layer(model)
    if config.lora and model.autocast_dtype and not world.is_sharded:
        speedups.cast_frozen_weights(model, model.autocast_dtype)  # (FSDP wants one dtype)
    if world.is_alone:
        speedups.use_sparse_embedding_gradients(model)
    if config.compile is True:
        speedups.compile_layers(model)
    elif config.compile == AUTO and model.device.type == "cuda" and world.is_alone:
        if why_not := speedups.try_compiling(model):
            print(f"not compiled: {why_not}", flush=True)
    elif model.device.type == "cpu":
        fused.fuse_layers(model)
    return world.prepare(model, model.packs_up_to(config.max_length))


def lora_settings(config: TrainingConfig) -> LoraSettings | None:
    targets = tuple(name.strip() for name in config.lora_target_modules.split(","))
    settings = LoraSettings(config.lora_r, config.lora_alpha, config.lora_dropout, targets)
    return settings if config.lora else None


def check_data(config: TrainingConfig, world: World, train_data: Any, eval_data: Any) -> None:
    """Print what was kept of the data; UserError if ranks differ, too many rows are skipped or none is left."""
    settings = {name: getattr(config, name) for name in config.stored()}
    prints = {"the training data": train_data.fingerprint, "the test data": eval_data.fingerprint}
    world.check_same_everywhere(settings | prints | {"the version of torch": torch.__version__})
    for line in train_data.notes:
        print(line)
    for split, dataset in (("train", train_data), ("test", eval_data)):
        if config.bad_rows == "stop":
            dataset.check_skipped()
        print("\n".join(dataset.lines(split, config.unit)))
    if len(eval_data) == 0:
        print("nothing is held out: this run cannot say how good the model is", flush=True)
    if len(train_data) == 0:
        found = f"{train_data.counts.rows:,} rows, of which none can be used"
        looks = "python data.py --dataset with the same settings shows what was read"
        advice = looks if config.unit == "pairs" else "what was read, and why it was skipped, is above"
        raise UserError("no training data is left", where=train_data.name, found=found, next=advice)


def go_back_to(folder: Path, run: Run) -> memory.Choices:
    """Put a new run where a checkpoint was; returns how to go on using the memory."""
    state = checkpoint.read_training_state(folder)
    if state.data_fingerprint != run.train_data.fingerprint and not run.config.allow_data_change:
        count, before = len(run.train_data), state.num_examples
        is_same_count = count == before
        raise UserError(
            "the training data is not what this run was started with",
            where=run.train_data.name,
            found=f"{count:,} {run.config.unit}, " + ("with other tokens" if is_same_count else f"was {before:,}"),
            next="restore the old data, or add --allow_data_change to go on with this",
        )
    checkpoint.restore_optimizer(folder, run.model, run.optimizer, run.world)
    run.step = run.saved_step = state.step
    run.random_state, run.skipped_steps = checkpoint.read_random_state(folder), state.skipped_steps
    run.eval_value, run.eval_count = state.eval_value, state.eval_count
    run.examples_before = state.examples_seen - run.sampler.examples_seen(run.step)
    print(f"resuming after step {run.step} of {run.sampler.total_steps} from {folder}")
    # what auto found, and the smaller budget if memory ran out before; what is asked for anew is found anew
    stored, wanted = resolve.training_settings(folder), memory.Choices.of(run.config)
    found = memory.Choices(state.tokens_per_batch, state.recomputes, state.offloads)._asdict()
    keeps = {name: value for name, value in found.items() if getattr(wanted, name) == stored.get(name)}
    return wanted._replace(**{name: value for name, value in keeps.items() if value is not None})


def check_sequences(model: Any, world: World, *datasets: Any) -> None:
    """What has no position or no embedding would fail in the middle of training, on a GPU beyond recovery.

    And the ranks of FSDP2 must make equally many forward passes, which they do not where some sequences get their own.
    """
    for dataset in datasets:
        if len(dataset):
            model.check_token(dataset.largest_token())
    limit = model.most_positions()
    longest = max((int(dataset.longest_sides().max()) for dataset in datasets if len(dataset)), default=0)
    if limit is not None and longest > limit:
        raise UserError(
            f"the model has {limit:,} positions, and the longest sequence has {longest:,} tokens",
            next=f"--max_length {limit} skips longer ones",
        )
    limit = model.alone_above()
    if world.is_sharded and limit is not None and longest > limit:
        raise UserError(
            f"--fsdp cannot train this model on sequences above {limit:,} tokens, because it changes there",
            found=f"the longest sequence has {longest:,} tokens",
            next=f"--max_length {limit}, or leave out --fsdp",
        )


def describe(config: TrainingConfig, model: Any, sampler: StepSampler, world: World) -> None:
    total = sum(parameter.numel() for parameter in model.hf_model.parameters())
    count = sum(parameter.numel() for parameter in model.trained_parameters().values())
    print(f"model: {config.model}, {total:,} parameters, {count:,} trained, {config.precision} on {model.device}")
    if not model.packs_up_to(config.max_length):
        why_not = model.why_not or "its attention window is below --max_length"
        print(f"  one sequence per row, because {why_not}: slower")
    limit = model.alone_above()
    if limit is not None and config.max_length > limit:
        print(f"  sequences above {limit:,} tokens are computed one at a time, because the model changes there: slower")
    if not world.is_alone:
        print(f"processes: {world.size}, {'FSDP2' if world.is_sharded else 'DDP'}")
    steps = f"{utils.counted(sampler.total_steps, 'step')} of {config.examples_per_step} {config.unit}"
    of_head = f", of the head {config.head_lr:g}" if getattr(config, "head_lr", 0.0) else ""
    print(f"plan: {steps}, learning rate {config.lr:g}{of_head}", flush=True)


# -- The run's folder --------------------------------------------------------------------------------------------------


def claim_run_folder(config: TrainingConfig, resumed_from: Path | None) -> tuple[Path, file_locks.RunLock]:
    """The run's folder, which no other run has, and its lock; a resumed run goes on in its own."""
    root = Path(config.output_dir)
    if resumed_from and (root / str(config.run_name)).resolve() == resumed_from.resolve().parent:
        return resumed_from.parent, file_locks.RunLock(resumed_from.parent)
    now = utils.timestamp()  # of several runs, if they begin in one second
    names = [config.run_name] if config.run_name else [now, *(f"{now}-{number}" for number in range(2, 100))]
    for name in names:
        folder = root / name
        make_folder(folder, "--output_dir with --run_name")
        if run_folder.has_begun(folder):
            continue
        try:
            return folder, file_locks.RunLock(folder)
        except UserError:
            if config.run_name:
                raise
    raise UserError(
        f"there is a run named {name!r} already",
        where=folder,
        safe="nothing in it was touched",
        next=f"another --run_name, or resume it: {resume_command(folder)}",
    )


def make_folder(folder: Path, flag: str) -> None:
    """Make a folder that a flag named; UserError says why that is impossible."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
            raise
        raise UserError(
            f"{flag} names a folder that cannot be made",
            where=folder.absolute(),
            found=error.strerror,
            safe="nothing was changed",
            next=f"another {flag}, or move away what is in its place",
        ) from error


def check_no_strays(folder: Path) -> None:
    """A file in the place of a checkpoint's folder would stop the training when that step is saved."""
    for path in folder.iterdir():
        if step_of(path) is not None and not path.is_dir():
            raise UserError(
                "something that is not a folder is in the place of a checkpoint",
                where=path,
                safe="nothing was changed",
                next="move it away",
            )
