"""One training run: its folder and lock, its pairs, model and optimizer, and where it stands.

Opening it, going back to a checkpoint, and saving are here, so that train_rm.py is the training and nothing else.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import data
import models
import utils
from checkpointing import checkpoint
from checkpointing import run_folder as records
from checkpointing.run_folder import step_folder, step_of
from common import atomic_files, file_locks
from data_pipeline import sampler
from modeling import devices, pretrained, speedups
from training import distributed, launch, probe
from training.config import AUTO, NOT_STORED, TrainConfig
from utils import UserError


@dataclass
class Run:
    """All that one training holds. `step` and `random_state` always describe the last completed step."""

    config: TrainConfig
    world: distributed.World
    model: models.RewardModel
    module: torch.nn.Module  # what training calls: the model, or what adds up its gradients over the processes
    optimizer: torch.optim.Optimizer
    train_pairs: data.PairDataset
    test_pairs: data.PairDataset
    plan: sampler.StepSampler
    folder: Path
    step: int
    random_state: dict[str, Tensor]
    saved_step: int
    lock: file_locks.RunLock | None  # the main process holds it
    base_fingerprint: str | None  # of the model under an adapter
    tokens_per_batch: int  # what of config.tokens_per_batch fits the memory, or what was found to fit
    skipped_steps: int = 0
    skipped_in_a_row: int = 0
    eval_accuracy: float | None = None  # of `step`, if it was evaluated
    eval_pairs: int | None = None  # how many pairs that is of
    record: records.RunRecord | None = None  # run.json, from when training begins
    examples_before: int = 0
    is_updating: bool = False  # inside optimizer.step(): the weights are between two steps

    def examples_seen(self, step: int) -> int:
        """Pairs taken up to `step`, those of steps of another size before a change of the data included."""
        return self.examples_before + self.plan.examples_seen(step)

    def save(self) -> Path:
        """Publish the last completed step as a checkpoint. All processes call it: the main one writes."""
        state = checkpoint.gather_state(self.model, self.optimizer, self.world)
        final = step_folder(self.folder, self.step)
        if not self.world.is_main:
            self.saved_step = self.step
            return final
        position = checkpoint.Position(
            self.step,
            self.examples_seen(self.step),
            self.train_pairs.fingerprint,
            len(self.train_pairs),
            self.tokens_per_batch,
            self.skipped_steps,
            self.eval_accuracy,
            self.base_fingerprint,
            None if self.eval_accuracy is None else self.eval_pairs,
        )
        checkpoint.refuse_non_finite_weights(state, self.folder, self.step)
        checkpoint.save(self.folder, self.model, state, self.random_state, position, self.stored_config())
        self.saved_step = self.step
        checkpoint.prune(self.folder, self.config.keep_checkpoints)
        self.write_record()
        return final

    def stored_config(self) -> dict[str, Any]:
        """The settings as a checkpoint and the record keep them."""
        stored = {name: value for name, value in dataclasses.asdict(self.config).items() if name not in NOT_STORED}
        # Resuming works from any folder, and a tree that was moved as a whole keeps its logs beside its checkpoints.
        for name in ("model", "dataset"):
            if Path(stored[name]).exists():
                stored[name] = str(Path(stored[name]).absolute())
        stored["log_dir"] = utils.relative_path(stored["log_dir"], stored["output_dir"])
        return stored

    def begin_record(self, resumed_from: Path | None) -> None:
        """Say in run.json that this process trains now; a run that goes on keeps what it knows up to its step."""
        if not self.world.is_main:
            return
        defaults = dataclasses.asdict(TrainConfig())
        defaults["log_dir"] = utils.relative_path(defaults["log_dir"], defaults["output_dir"])
        self.record = records.new_record(self.step, self.plan.total_steps, self.stored_config(), defaults)
        if resumed_from and resumed_from.parent.resolve() == self.folder.resolve():
            if earlier := self.earlier_record():
                self.record.started, self.record.resumed_from = earlier.started, earlier.resumed_from
                self.record.evaluations = [entry for entry in earlier.evaluations if entry[0] <= self.step]
        elif resumed_from:
            self.record.resumed_from = utils.relative_path(str(resumed_from), self.config.output_dir)
        self.write_record()

    def mend_record(self) -> None:
        """A run that was killed right after its last save still says that it is running."""
        earlier = self.earlier_record() if self.world.is_main else None
        if earlier and earlier.state == records.RUNNING and earlier.step <= self.step:
            self.record = earlier
            self.end_record()

    def earlier_record(self) -> records.RunRecord | None:
        try:
            return records.read_record(self.folder)
        except (OSError, ValueError) as error:
            print(f"{self.folder / records.RUN} is written anew, because it cannot be read: {error}", file=sys.stderr)
            return None

    def note_evaluation(self, correct: int, pairs: int) -> None:
        if self.record is not None:
            self.record.evaluations.append([self.step, correct, pairs])
            self.write_record()

    def end_record(self, cause: BaseException | None = None) -> None:
        """Say in run.json how it ended."""
        if self.record is None:
            return
        self.record.state, self.record.ended = records.FINISHED, records.time_text()
        if cause is not None:
            is_stop = isinstance(cause, (utils.Stopped, KeyboardInterrupt))
            self.record.state = records.STOPPED if is_stop else records.CRASHED
            self.record.cause = str(cause) if is_stop else f"{type(cause).__name__}: {utils.first_line(cause)}"
        self.write_record()

    def write_record(self) -> None:
        if self.record is not None:
            self.record.step = self.step
            records.write_record(self.folder, self.record)

    def release(self) -> None:
        """Let others train this run."""
        if self.lock is not None:
            self.lock.release()


def set_up(config: TrainConfig, resumed_from: Path | None, world: distributed.World) -> Run:
    """Everything that can fail early does so here, cheapest first: names, data, then the model."""
    launch.connect_model(world, config.fsdp)
    folder, lock = claim_run_folder(config, resumed_from) if world.is_main else (None, None)
    folder = world.from_main(lambda: folder)
    config = dataclasses.replace(config, run_name=folder.name)
    if lock is None:
        return open_run(config, folder, None, resumed_from, world)
    log_folder = Path(config.log_dir) / folder.name
    try:
        refuse_strays(folder)
        make_folder(log_folder, "--log_dir")
        atomic_files.remove_dead_saves(folder)
        atomic_files.temporary(folder / records.RUN).unlink(missing_ok=True)
        return open_run(config, folder, lock, resumed_from, world)
    except BaseException:
        # so nothing stays; Windows keeps a folder with an open file, which is no harm
        if not has_begun(folder) and not (folder / records.RUN).exists():
            shutil.rmtree(folder, ignore_errors=True)
            with contextlib.suppress(OSError):  # it holds logs, or was never made
                log_folder.rmdir()
        lock.release()
        raise


def make_folder(folder: Path, flag: str) -> None:
    """Make a folder that a flag named, or raise a UserError that says why it cannot be."""
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
            next=f"another {flag}, or make room for it by moving what stands there",
        ) from error


def refuse_strays(run_folder: Path) -> None:
    """Something that is no folder at a checkpoint's place would stop the training when that step is to be saved."""
    for path in run_folder.iterdir():
        if step_of(path) is not None and not path.is_dir():
            raise UserError(
                "something that is no folder stands where a checkpoint goes",
                where=path,
                safe="nothing was changed",
                next="move it away",
            )


def open_run(
    config: TrainConfig,
    folder: Path,
    lock: file_locks.RunLock | None,
    resumed_from: Path | None,
    world: distributed.World,
) -> Run:
    """Tokenizer, pairs, model and optimizer of a run that has its folder."""
    with world.first_on_each_machine():  # which fills the token cache
        tokenizer = pretrained.load_tokenizer(str(resumed_from or config.model))
        train_pairs, test_pairs = data.load_pairs(config.dataset, tokenizer, config.max_length)
    world.refuse_differences(what_must_be_alike(config, train_pairs, test_pairs))
    for use, pairs in (("train", train_pairs), ("test", test_pairs)):
        if config.bad_rows == "stop":
            pairs.check_skipped()
        kept = f"{use}: {len(pairs):,} of {pairs.counts.rows:,} rows kept of {pairs.name}"
        print("\n".join([kept, *pairs.counts.lines()]))
    if len(test_pairs) == 0:
        print("no pair is held out: this run will say nothing of how good the model is", flush=True)
    if len(train_pairs) == 0:
        raise UserError("no training pair is left", where=train_pairs.name, next="see the counts above")
    plan = sampler.StepSampler(len(train_pairs), config.pairs_per_step, config.epochs, config.seed, config.max_steps)

    if resumed_from:
        model = models.RewardModel.restore(resumed_from, config.model if config.lora else None)
    else:
        targets = tuple(name.strip() for name in config.lora_target_modules.split(","))
        lora = pretrained.LoraSettings(config.lora_r, config.lora_alpha, config.lora_dropout, targets)
        model = models.RewardModel.create(config.model, tokenizer, config.seed, lora if config.lora else None)
        torch.manual_seed(config.seed)
    refuse_too_few_positions(model, train_pairs, test_pairs)
    checkpoint.refuse_full_disk(folder, model)
    model.autocast_dtype = torch.bfloat16 if config.precision == "bf16" else None
    base_fingerprint = model.base_fingerprint()
    model.to(devices.pick_device() if world.is_alone else world.accelerator.device).train()
    devices.keep_heap(model.device)
    if config.lora and model.autocast_dtype and not world.is_sharded:
        speedups.cast_frozen_weights(model, model.autocast_dtype)  # (FSDP wants one dtype)
    if world.is_alone:
        speedups.use_sparse_embedding_gradients(model)
    model.use_attention(config.attention)
    if config.compile:
        speedups.compile_layers(model)
    if config.gradient_checkpointing:
        speedups.enable_gradient_checkpointing(model)
    module = world.prepare(model, model.packs_up_to(config.max_length))
    # Qwen3's published weights are bf16, but they are trained in fp32: at 1e-5, bf16 rounds most updates to nothing.
    trained = list(model.trained_parameters().values())
    fused = model.device.type in ("cuda", "cpu")
    optimizer = torch.optim.AdamW(trained, lr=config.lr, weight_decay=config.weight_decay, fused=fused)
    describe(config, model, trained, plan, world)

    run = Run(
        config, world, model, module, optimizer, train_pairs, test_pairs, plan, folder, step=0,
        random_state=checkpoint.random_state(), saved_step=0, lock=lock, base_fingerprint=base_fingerprint,
        tokens_per_batch=config.tokens_per_batch,
    )  # fmt: skip
    if resumed_from:
        go_back_to(resumed_from, run)
    if run.tokens_per_batch == AUTO:
        run.tokens_per_batch = probe.largest_budget(run)
    return run


def what_must_be_alike(config: TrainConfig, *datasets: data.PairDataset) -> dict[str, Any]:
    """What the processes of one run must agree on, for each to plan the same steps."""
    settings = {name: value for name, value in dataclasses.asdict(config).items() if name not in NOT_STORED}
    prints = {f"the {use} pairs": pairs.fingerprint for use, pairs in zip(("training", "test"), datasets, strict=True)}
    return settings | prints | {"the version of torch": torch.__version__}


def go_back_to(folder: Path, run: Run) -> None:
    """Put a new run where a checkpoint was."""
    position = checkpoint.read_position(folder)
    refuse_changed_data(position, run.train_pairs, run.config)
    if position.base_fingerprint != run.base_fingerprint:
        raise utils.CheckpointError(
            "the adapter was trained on another base model",
            where=folder,
            found=f"{run.config.model} is not what it was: its weights differ",
            next="bring the old base model back to that place, or name its new one with --model",
        )
    checkpoint.restore_optimizer(folder, run.model, run.optimizer, run.world)
    run.step = run.saved_step = position.step
    run.random_state, run.skipped_steps = checkpoint.read_random_state(folder), position.skipped_steps
    run.eval_accuracy, run.eval_pairs = position.eval_accuracy, position.eval_pairs
    if run.config.tokens_per_batch == checkpoint.read_config(folder)["tokens_per_batch"]:
        run.tokens_per_batch = position.tokens_per_batch  # the smaller one if memory ran out before
    run.examples_before = position.examples_seen - run.plan.examples_seen(run.step)
    print(f"resuming after step {run.step} of {run.plan.total_steps} from {folder}")


def refuse_too_few_positions(model: models.RewardModel, *datasets: data.PairDataset) -> None:
    """A sequence longer than the model's positions would fail in the middle of training, on a GPU beyond rescue."""
    limit = model.most_positions()
    longest = max((int(pairs.longest_sides().max()) for pairs in datasets if len(pairs)), default=0)
    if limit is not None and longest > limit:
        raise UserError(
            f"the model has {limit:,} positions, and the longest sequence has {longest:,} tokens",
            next=f"--max_length {limit} leaves longer ones out",
        )


def refuse_changed_data(position: Any, train_pairs: data.PairDataset, config: TrainConfig) -> None:
    if position.data_fingerprint != train_pairs.fingerprint and not config.allow_data_change:
        raise UserError(
            "the training pairs are not the ones this run was started with",
            where=train_pairs.name,
            found=f"{len(train_pairs):,} pairs, then {position.num_pairs:,}",
            next="bring the old data back, or add --allow_data_change to go on with these",
        )


def claim_run_folder(config: TrainConfig, resumed_from: Path | None) -> tuple[Path, file_locks.RunLock]:
    """The run's folder, which no other run has, and its lock; a resumed run goes on in its own."""
    root = Path(config.output_dir)
    if resumed_from and (root / str(config.run_name)).resolve() == resumed_from.resolve().parent:
        return resumed_from.parent, file_locks.RunLock(resumed_from.parent)
    if config.run_name:
        names = [config.run_name]
    else:  # several runs may begin in one second
        now = utils.timestamp()
        names = [now, *(f"{now}-{number}" for number in range(2, 100))]
    for name in names:
        folder = root / name
        make_folder(folder, "--output_dir with --run_name")
        if has_begun(folder):
            continue
        try:
            return folder, file_locks.RunLock(folder)
        except UserError:
            if config.run_name:
                raise
    raise UserError(
        f"there is a run named {name!r} already",
        where=folder,
        safe="nothing of it was touched",
        next=f"another --run_name, or go on with it: python train_rm.py --resume_from {folder}",
    )


def has_begun(run_folder: Path) -> bool:
    """Whether a run's folder holds anything but a lock, a record and what a killed first save left."""
    bare = (file_locks.RunLock.FILE, records.RUN)
    return any(path.name not in bare and not path.name.startswith(".tmp-") for path in run_folder.iterdir())


def describe(
    config: TrainConfig,
    model: models.RewardModel,
    trained: list[Any],
    plan: sampler.StepSampler,
    world: distributed.World,
) -> None:
    total = sum(parameter.numel() for parameter in model.hf_model.parameters())
    count = sum(parameter.numel() for parameter in trained)
    print(f"model: {config.model}, {total:,} parameters, {count:,} trained, {config.precision} on {model.device}")
    if not model.packs_up_to(config.max_length):
        print(
            f"  one sequence per row, because {model.why_not or 'its attention window is below --max_length'}: slower"
        )
    if not world.is_alone:
        print(f"processes: {world.size}, {'FSDP2' if world.is_sharded else 'DDP'}")
    print(f"plan: {plan.total_steps:,} steps of {config.pairs_per_step} pairs", flush=True)


def end_early(run: Run, cause: BaseException, stop: utils.StopRequest) -> BaseException:
    """After Ctrl-C or a crash: save what was learned, record how it ended; returns what the user is to hear of it."""
    save_last_completed_step(run, cause)
    if isinstance(cause, OSError) and stop.signal_number is not None:
        cause = utils.Stopped(stop.signal_number)  # a closed terminal asks to stop, and breaks what is printed next
    run.end_record(cause)
    return cause


def save_last_completed_step(run: Run, cause: BaseException) -> None:
    """After Ctrl-C or a crash: nothing that was learned is lost, unless the crash was inside the update itself."""
    if run.is_updating or run.step == run.saved_step or isinstance(cause, utils.DiskOrNetworkError):
        return
    if run.world.is_sharded and not isinstance(cause, utils.Stopped):
        return  # the weights lie in all processes, and those may be gone
    if not run.world.is_main and not run.world.is_sharded:
        return
    try:
        saved = f"saved {run.save()} (the last completed step)"
    except Exception as error:  # the cause is what run_script reports; this must not replace it
        saved = f"the last completed step, {run.step}, could not be saved either:\n{error}"
    # nobody may read standard output any more, which may be the cause
    utils.say_if_heard(saved, sys.stderr if isinstance(cause, BrokenPipeError) else sys.stdout)
