"""One training run: what it holds, where it is, saving it, and recording how it goes and ends.

Nothing here depends on what is trained; setup.py opens a run, and each script brings its own loop.
"""

import contextlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import utils
from checkpointing import checkpoint, run_folder
from checkpointing.run_folder import step_folder
from common import file_locks
from data_pipeline.sampler import StepSampler
from training import launch
from training.config import TrainingConfig
from training.distributed import World
from training.micro_batches import MicroBatcher
from training.optimizer import AdamW
from utils import Stopped, UserError

MAX_SKIPPED_IN_A_ROW = 10


@dataclass
class Run:
    """All that one training holds. `step` and `random_state` always describe the last completed step."""

    config: TrainingConfig
    script: str  # file name of the script that trains it
    world: World
    model: Any
    module: torch.nn.Module  # what training calls: the model itself, or DDP or FSDP2 around it
    optimizer: AdamW
    train_data: Any
    eval_data: Any
    sampler: StepSampler
    batcher: MicroBatcher
    folder: Path
    lock: file_locks.RunLock | None  # held by the main rank
    base_fingerprint: str | None  # of the model under an adapter
    examples: dict[str, Tensor]  # see `checkpoint.State`
    random_state: dict[str, Tensor]
    step: int = 0
    saved_step: int = 0
    skipped_steps: int = 0
    skipped_in_a_row: int = 0
    eval_value: float | None = None  # of `step`, if it was evaluated
    eval_count: int | None = None  # how many examples that is over
    record: run_folder.RunRecord | None = None  # run.json, from when training begins
    examples_before: int = 0
    is_updating: bool = False  # inside optimizer.step(): the weights are between two steps

    # -- where it is ------------------------------------------------------------------------------------------------

    def examples_seen(self, step: int) -> int:
        """Examples taken up to `step`, including those of steps of another size before a change of the data."""
        return self.examples_before + self.sampler.examples_seen(step)

    @property
    def log_folder(self) -> Path | None:
        """Where TensorBoard's files go; None on all ranks but the main one, which logs."""
        return Path(self.config.log_dir) / self.folder.name if self.world.is_main else None

    @property
    def is_evaluation_missing(self) -> bool:
        """Whether the last completed step is one to evaluate after, and has not been evaluated."""
        every = self.config.eval_steps
        is_due = self.step == self.sampler.total_steps or (every and self.step % every == 0)
        return bool(self.step and is_due and len(self.eval_data) and self.eval_value is None)

    @property
    def is_save_due(self) -> bool:
        every = self.config.save_steps
        return self.step == self.sampler.total_steps or bool(every and self.step % every == 0)

    def has_nothing_to_do(self) -> bool:
        """Whether all steps are done; if so, a line says how to train further."""
        # an evaluation that was interrupted is made up for, but only at a run's very end
        is_at_its_end = self.is_evaluation_missing and not checkpoint.later_steps(self.folder, self.step)
        if self.step < self.sampler.total_steps or is_at_its_end:
            return False
        self.correct_record()
        is_limited = self.config.max_steps == self.sampler.total_steps
        more = "a larger --max_steps, or 0 for no limit" if is_limited else "more --epochs"
        print(f"nothing to do: step {self.step} of {self.sampler.total_steps} is done; to train further: {more}")
        if self.lock is not None and self.log_folder is not None:
            run_folder.remove_unused(self.folder, self.log_folder)  # of a new --run_name
            self.lock.release()
        return True

    def complete_step(self, step: int, is_finite: bool) -> None:
        """The optimizer's update, unless loss or gradient is not finite; a stop finds the weights of whole steps."""
        for group in self.optimizer.param_groups:
            group["lr"] = group["lr_scale"] * self.config.learning_rate(step, self.sampler.total_steps)
        self.is_updating = True
        if is_finite:
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step, self.random_state, self.eval_value = step, checkpoint.random_state(), None
        self.is_updating = False
        self.skipped_in_a_row = 0 if is_finite else self.skipped_in_a_row + 1
        self.skipped_steps += not is_finite

    def explain_skipped_step(self, indices: np.ndarray, is_finite: np.ndarray) -> str:
        """A line about a step that was skipped; UserError after too many in a row.

        Args:
            indices: (N,) examples of the step.
            is_finite: (N,) whether the loss of each is finite; if all are, the gradient was not.
        """
        causes = indices[~is_finite]
        rows = ", ".join(str(row) for row in sorted(self.train_data.rows[causes if len(causes) else indices])[:8])
        if self.skipped_in_a_row == MAX_SKIPPED_IN_A_ROW:
            raise UserError(
                f"{self.skipped_in_a_row} steps in a row had a loss or gradient that is not finite",
                found=f"the last one at step {self.step}, rows {rows}",
                safe=f"no such gradient reached the weights: they are those of step {self.step - MAX_SKIPPED_IN_A_ROW}",
                next="resume from an earlier step with a smaller --lr, more --warmup_steps, or --precision fp32",
            )
        count = len(causes) or "all"
        return f"step {self.step} skipped: its loss or gradient is not finite (rows {rows}, {count} of them)"

    # -- saving -----------------------------------------------------------------------------------------------------

    def save(self) -> Path:
        """Save the last completed step as a checkpoint. All ranks call it; the main one writes."""
        state = checkpoint.gather_state(self.model, self.optimizer, self.world, self.examples)
        final = step_folder(self.folder, self.step)
        if not self.world.is_main:
            self.saved_step = self.step
            return final
        training_state = checkpoint.TrainingState(
            self.step, self.examples_seen(self.step), self.train_data.fingerprint, len(self.train_data),
            self.batcher.tokens_per_batch, self.skipped_steps, self.eval_value,
            None if self.eval_value is None else self.eval_count, self.base_fingerprint, self.batcher.recomputes,
            self.optimizer.is_offloaded,
        )  # fmt: skip
        checkpoint.check_weights_are_finite(state, self.folder, self.step)
        checkpoint.save(self.folder, self.model, state, self.random_state, training_state, self.config.stored())
        self.saved_step = self.step
        checkpoint.prune(self.folder, self.config.keep_checkpoints)
        self.write_record()
        return final

    def save_last_completed_step(self, cause: BaseException) -> None:
        """After Ctrl-C or a crash: nothing that was learned is lost, unless the crash was inside the update itself."""
        if self.is_updating or self.step == self.saved_step or isinstance(cause, utils.DiskOrNetworkError):
            return
        if self.world.is_sharded and not isinstance(cause, Stopped):
            return  # the weights are sharded over all processes, and some may be gone
        if not self.world.is_main and not self.world.is_sharded:
            return
        try:
            saved = f"saved {self.save()} (the last completed step)"
        except Exception as error:  # run_script reports the cause; this must not replace it
            saved = f"the last completed step, {self.step}, could not be saved either:\n{error}"
        # standard output may have no reader any more, which may be the cause
        utils.say_if_heard(saved, sys.stderr if isinstance(cause, BrokenPipeError) else sys.stdout)

    def how_to_go_on(self) -> str:
        """What is saved of a run that was stopped, and what to type to go on."""
        steps = run_folder.step_folders(self.folder)
        if not steps:
            return "no step is saved; the same command starts again"
        launcher = "" if self.world.is_alone else "   (started with the launcher, as before)"
        done = f"{steps[-1].name} of {self.sampler.total_steps} is saved; to go on from there:"
        return f"{done}\n  {run_folder.resume_command(self.folder)}{launcher}"

    # -- run.json ---------------------------------------------------------------------------------------------------

    def begin_record(self, resumed_from: Path | None) -> None:
        """Record that this process trains now; a resumed run keeps what it knows up to its step."""
        if not self.world.is_main:
            return
        self.record = run_folder.new_record(
            self.script, self.step, self.sampler.total_steps, self.config.stored(), type(self.config)().stored()
        )
        if resumed_from and resumed_from.parent.resolve() == self.folder.resolve():
            if earlier := self.earlier_record():
                self.record.started, self.record.resumed_from = earlier.started, earlier.resumed_from
                self.record.evaluations = {
                    metric: [point for point in points if point.step <= self.step]
                    for metric, points in earlier.evaluations.items()
                }
        elif resumed_from:
            self.record.resumed_from = utils.relative_path(str(resumed_from), self.config.output_dir)
        self.write_record()

    def correct_record(self) -> None:
        """End the record of a run that was killed right after its last save and so still says it is running."""
        earlier = self.earlier_record() if self.world.is_main else None
        if earlier and earlier.state == run_folder.RUNNING and earlier.step <= self.step:
            self.record = earlier
            self.end_record()

    def earlier_record(self) -> run_folder.RunRecord | None:
        try:
            return run_folder.read_record(self.folder)
        except (OSError, ValueError) as error:
            print(f"{self.folder / run_folder.RUN} cannot be read and is written again: {error}", file=sys.stderr)
            return None

    def record_evaluation(self, value: float, interval: tuple[float, float], count: int) -> None:
        """Record the last completed step's evaluation: the metric, its 95 % interval, over `count` examples."""
        self.eval_value, self.eval_count = value, count
        if self.record is not None:
            points = self.record.evaluations.setdefault(self.config.eval_metric, [])
            points.append(run_folder.EvalPoint(self.step, value, *interval, count))
            self.write_record()

    def end_record(self, cause: BaseException | None = None) -> None:
        """Record how the run ended."""
        if self.record is None:
            return
        self.record.state, self.record.ended = run_folder.FINISHED, run_folder.time_text()
        if cause is not None:
            is_stop = isinstance(cause, (Stopped, KeyboardInterrupt))
            self.record.state = run_folder.STOPPED if is_stop else run_folder.CRASHED
            self.record.cause = str(cause) if is_stop else f"{type(cause).__name__}: {utils.first_line(cause)}"
        self.write_record()

    def write_record(self) -> None:
        if self.record is not None:
            self.record.step = self.step
            run_folder.write_record(self.folder, self.record)


@contextlib.contextmanager
def supervised(run: Run, resumed_from: Path | None) -> Iterator[utils.StopRequest]:
    """Around a training loop: sets later steps aside, notes stop requests, records how it ends, saves what was learned.

    Yields the stop request that the loop checks.
    """
    run.world.barrier()  # every rank has looked at the later steps
    if run.world.is_main and (aside := checkpoint.set_aside_later_steps(run.folder, run.step)):
        print(f"the steps after step {run.step} were moved to {aside}")
    with contextlib.ExitStack() as stack:
        stop = stack.enter_context(utils.StopRequest(is_silent=not run.world.is_main))
        if not run.world.is_alone:
            stack.enter_context(launch.ended_if_stuck(stop))
        run.begin_record(resumed_from)
        try:
            yield stop
            run.end_record()
        except BaseException as error:
            cause = launch.explained(error, run.world)
            run.save_last_completed_step(cause)
            if isinstance(cause, OSError) and stop.signal_number is not None:
                cause = Stopped(stop.signal_number)  # a closed terminal asks to stop and breaks what is printed next
            run.end_record(cause)
            if isinstance(cause, (Stopped, KeyboardInterrupt)) and run.world.is_main:
                utils.say_if_heard(run.how_to_go_on())
            raise cause  # noqa: B904
        finally:
            if run.lock is not None:
                run.lock.release()
