"""Train a reward model from human preferences.

    python train_rm.py                 Qwen3-0.6B on Anthropic/hh-rlhf, every parameter
    python train_rm.py --lora          the same, low-rank adapters only
    python train_rm.py --demo          a tiny model and made-up pairs: offline, a minute on a laptop
    python train_rm.py --resume_from ./checkpoints/rm/RUN/step-500
    torchrun --nproc_per_node 4 train_rm.py

Words: a *pair* is one preference; a *micro-batch* is one forward and backward; a *step* is one optimizer update.
Several processes plan the same step, and each computes some of its micro-batches (distributed.py); one computes all.
Letters: N pairs.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import utils
from checkpointing.run_folder import step_folder
from common.progress import ProgressBar
from modeling import speedups
from training import launch
from training.config import TrainConfig, read_config
from utils import StopRequest, UserError

with utils.lazy_imports():  # --help must not wait for torch
    import numpy as np
    import torch
    from torch import Tensor  # for annotations only

    import data
    from checkpointing import checkpoint
    from data_pipeline import packing, sampler
    from evaluation import evaluator
    from modeling import devices
    from training import distributed, logger
    from training import micro_batches as batching
    from training import run as runs

MOST_SKIPPED_IN_A_ROW = 10
MOST_KINDS_SHOWN = 20

# ---------------------------------------------------------------------------------------------------------------------
# The loss
# ---------------------------------------------------------------------------------------------------------------------


def bradley_terry_loss(chosen: Tensor, rejected: Tensor, margins: Tensor, center_rewards: float = 0.0) -> Tensor:
    """The negative log-likelihood of each preference, -log sigmoid(r_chosen - r_rejected - margin), shape (N,).

    Bradley & Terry 1952 (doi:10.2307/2334029); the margin as in Llama 2 (arXiv 2307.09288, eq. 2). Rewards are only
    determined up to a constant; `center_rewards` · (r_chosen + r_rejected)² settles it near 0 (arXiv 2312.09244).
    """
    loss = -torch.nn.functional.logsigmoid(chosen - rejected - margins)
    return loss + center_rewards * (chosen + rejected) ** 2


def score(model: torch.nn.Module, batch: packing.PackedBatch | packing.SeparateBatch) -> Tensor:
    """Rewards (N, 2) of a micro-batch's pairs: chosen, rejected. `model` is a RewardModel, or DDP around one."""
    return model(*batch.inputs()).view(-1, 2)


def label_margins(pairs: data.PairDataset, plans: list[packing.MicroBatchPlan], device: torch.device) -> Tensor:
    """The labels' margins (N,) of planned micro-batches, in their order: one transfer to the device per step."""
    return torch.from_numpy(pairs.label_margins[np.concatenate([plan.indices for plan in plans])]).to(device)


# ---------------------------------------------------------------------------------------------------------------------
# One step
# ---------------------------------------------------------------------------------------------------------------------


def accumulate_gradients(
    world: distributed.World,
    model: torch.nn.Module,
    micro_batches: Iterable[tuple[distributed.Turn, Any]],
    label_margins: Tensor,
    center_rewards: float,
    stop: StopRequest,
) -> Tensor:
    """Forward and backward of a step's micro-batches; each pair's loss and two rewards, (N, 3).

    `label_margins` (N,) are those of the whole step's pairs, in the order of the micro-batches' plans.
    Each micro-batch's losses are summed and divided by the pairs in the *whole step*, so the gradient does not depend
    on how the step was cut, nor on who computed which part. Pairs of other processes stay 0 in what is returned.
    """
    results = torch.zeros(len(label_margins), 3, device=model.device)
    for turn, batch in micro_batches:
        world.check(stop)
        with world.adding_up(model, turn):
            rewards = score(model, batch)  # (n, 2)
            margins = label_margins[turn.places]  # (n,)
            losses = bradley_terry_loss(rewards[:, 0], rewards[:, 1], margins, center_rewards)  # (n,)
            (losses.sum() * turn.weight / len(label_margins)).backward()
        if turn.weight:
            results[turn.places] = torch.column_stack([losses, rewards]).detach()
    return results


def gradients_of_step(
    run: runs.Run, step: int, stop: StopRequest
) -> tuple[list[packing.MicroBatchPlan], Tensor, Tensor]:
    """The gradient of a step's pairs: its plans, and in their order losses (N,) and rewards (N, 2).

    If the device runs out of memory, the step begins again with half the token budget: the gradient is the same, and
    the smaller budget stays.
    """
    world, indices = run.world, run.plan.indices_for(step)
    while True:
        plans = batching.plans_of(run, run.train_pairs, indices)
        micro_batches = batching.built(run, run.train_pairs, world.share(plans, is_training=True))
        world.seed_dropout(run.config.seed, step)
        try:
            margins = label_margins(run.train_pairs, plans, run.model.device)
            results = accumulate_gradients(world, run.module, micro_batches, margins, run.config.center_rewards, stop)
            results = world.combine(results, stop)
            speedups.densify_embedding_gradient(run.model)
            return plans, results[:, 0], results[:, 1:]
        except RuntimeError as error:
            batching.halve_token_budget(run, plans, error)
        devices.free(run.model.device)  # not in the `except`, where the traceback still holds activations
        run.optimizer.zero_grad(set_to_none=True)
        checkpoint.set_random_state(run.random_state)  # the same dropout as in the first try


def learning_rate(step: int, total_steps: int, config: TrainConfig) -> float:
    """The rate of one step (from 1): a linear warm-up, then constant, linear or cosine decay towards 0."""
    if step <= config.warmup_steps:
        return config.lr * step / config.warmup_steps
    done = (step - 1 - config.warmup_steps) / max(1, total_steps - config.warmup_steps)  # 0 ... <1
    shape = {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}
    return config.lr * shape[config.lr_schedule]


def pair_metrics(losses: Tensor, rewards: Tensor) -> dict[str, float]:
    """Means over pairs, in one transfer from the device."""
    chosen, rejected = rewards.unbind(dim=1)  # (N,) each
    right = (chosen > rejected).float()
    values = torch.stack([losses, right, chosen - rejected, chosen, rejected]).mean(dim=1).tolist()
    return dict(zip(("loss", "accuracy", "margin", "reward_chosen", "reward_rejected"), values, strict=True))


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Evaluation:
    """What a set of held-out pairs says about the model."""

    metrics: dict[str, float]
    correct: int
    pairs: int
    rewards: Tensor  # (N, 2), on the CPU
    by_kind: dict[str, tuple[int, int]]  # kind -> (correct, pairs), where the data names kinds

    def line(self) -> str:
        low, high = utils.wilson_interval(self.correct, self.pairs)
        return (
            f"held-out accuracy {self.correct / self.pairs:.1%} (95 % interval {low:.1%} to {high:.1%}), "
            f"loss {self.metrics['loss']:.4f}, {self.pairs:,} pairs"
        )


def evaluate(run: runs.Run, indices: Any, stop: StopRequest) -> Evaluation:
    """Loss and accuracy over `indices` of the test pairs, without dropout. A tie counts as wrong."""
    was_training = run.model.training
    run.model.eval()
    try:
        losses, rewards, order = score_test_pairs(run, indices, stop)
    finally:
        run.model.train(was_training)
    is_right = (rewards[:, 0] > rewards[:, 1]).cpu().numpy()  # (N,)
    kinds = run.test_pairs.kinds[order]
    by_kind = {
        run.test_pairs.kind_names[kind]: (int(is_right[kinds == kind].sum()), int((kinds == kind).sum()))
        for kind in np.unique(kinds)
        if run.test_pairs.kind_names[kind]
    }
    return Evaluation(pair_metrics(losses, rewards), int(is_right.sum()), len(is_right), rewards.cpu(), by_kind)


def score_test_pairs(run: runs.Run, indices: Any, stop: StopRequest) -> tuple[Tensor, Tensor, Any]:
    """Losses (N,), rewards (N, 2) and indices (N,) of test pairs; out of memory as in `gradients_of_step`."""
    while True:
        plans = batching.plans_of(run, run.test_pairs, indices)
        order = np.concatenate([plan.indices for plan in plans])
        margins = label_margins(run.test_pairs, plans, run.model.device)
        results = torch.zeros(len(order), 3, device=run.model.device)
        try:
            for turn, batch in batching.built(run, run.test_pairs, run.world.share(plans, is_training=False)):
                run.world.check(stop)
                with torch.no_grad():
                    rewards = score(run.model, batch)
                    losses = bradley_terry_loss(rewards[:, 0], rewards[:, 1], margins[turn.places])
                if turn.weight:
                    results[turn.places] = torch.column_stack([losses, rewards])
            results = run.world.combine(results, stop)
            return results[:, 0], results[:, 1:], order
        except RuntimeError as error:
            batching.halve_token_budget(run, plans, error)
        devices.free(run.model.device)


# ---------------------------------------------------------------------------------------------------------------------
# The run
# ---------------------------------------------------------------------------------------------------------------------


def main(argv: list[str]) -> None:
    with launch.joined() as world:
        with world.first_on_each_machine():
            config, resumed_from = read_config(argv, __doc__.split("\n\n")[0])
        rows_to_report_on = train_to_the_end(runs.set_up(config, resumed_from, world), resumed_from)
    if rows_to_report_on is not None:  # when the run's memory is free again
        evaluator.report_run(*rows_to_report_on)


def train_to_the_end(run: runs.Run, resumed_from: Path | None) -> tuple[Path, str, Any] | None:
    """Train and say how it went; returns what the report is to be on: run, dataset, rows of its test split."""
    config = run.config
    # an evaluation that was interrupted is made up for, but only at a run's very end
    is_at_its_end = evaluation_is_missing(run) and not checkpoint.later_steps(run.folder, run.step)
    if run.step >= run.plan.total_steps and not is_at_its_end:
        run.mend_record()
        more = "a larger --max_steps, or 0 for none" if config.max_steps else "more --epochs"
        print(f"nothing to do: step {run.step} of {run.plan.total_steps} is done; to go on: {more}")
        return None
    run.world.barrier()  # all have looked at the later steps
    if run.world.is_main and (aside := checkpoint.set_aside_later_steps(run.folder, run.step)):
        print(f"the steps after step {run.step} now lie in {aside}")
    with StopRequest(is_silent=not run.world.is_main) as stop:
        run.begin_record(resumed_from)
        try:
            last = train(run, stop)
            run.end_record()
        except BaseException as cause:
            raise runs.end_early(run, launch.explained(cause, run.world), stop)  # noqa: B904
        finally:
            run.release()
    print(summary(run, last), flush=True)
    if last is None or not run.world.is_main or not config.report:
        return None
    return run.folder, config.dataset, run.test_pairs.rows[evaluated_pairs(run)]


def train(run: runs.Run, stop: StopRequest) -> Evaluation | None:
    """From the step after the last completed one to the end; returns the last evaluation."""
    config, model, optimizer, plan = run.config, run.model, run.optimizer, run.plan
    logs = Path(config.log_dir) / run.folder.name if run.world.is_main else None
    log = logger.TensorBoardLogger(logs, run.step, run.examples_seen(run.step))
    log.table("config", dataclasses.asdict(config), run.step)
    shown = ProgressBar("step", plan.total_steps, done=run.step, is_shown=run.world.is_main)
    parameters = list(model.trained_parameters().values())
    checkpoint.set_random_state(run.random_state)
    evaluation = None
    try:
        if evaluation_is_missing(run):  # the run was stopped in the middle of it
            evaluation = evaluate_and_show(run, log, shown, stop)
        for step in range(run.step + 1, plan.total_steps + 1):
            started = time.perf_counter()
            is_last = step == plan.total_steps

            # choose pairs, forward and backward
            plans, losses, rewards = gradients_of_step(run, step, stop)

            # clip; max_norm infinity measures without clipping
            grad_norm = run.world.whole(torch.nn.utils.clip_grad_norm_(parameters, config.max_grad_norm or math.inf))

            # the step's only wait for the device: .item() in the inner loop would stall a GPU
            metrics = {f"train/{name}": value for name, value in pair_metrics(losses, rewards).items()}
            metrics["train/grad_norm"] = float(grad_norm)
            is_finite = math.isfinite(metrics["train/loss"]) and math.isfinite(metrics["train/grad_norm"])

            # update, fenced: an interruption on either side finds whole weights
            metrics["train/lr"] = optimizer.param_groups[0]["lr"] = learning_rate(step, plan.total_steps, config)
            run.is_updating = True
            if is_finite:
                optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            run.step, run.random_state, run.eval_accuracy = step, checkpoint.random_state(), None
            run.is_updating = False
            if not is_finite:
                shown.say(note_skipped_step(run, plans, losses))
            run.skipped_in_a_row = 0 if is_finite else run.skipped_in_a_row
            metrics["train/skipped_steps"] = run.skipped_steps

            # log
            examples = run.examples_seen(step)
            metrics |= speed(plans, time.perf_counter() - started, model.device)
            log.scalars(metrics, step, examples)
            shown.update(step, *figures(metrics))

            # evaluate
            if evaluation_is_missing(run):
                log.histogram("train/rewards", rewards, step)
                evaluation = evaluate_and_show(run, log, shown, stop)

            # save
            if is_last or (config.save_steps and step % config.save_steps == 0):
                shown.say(f"saved {run.save()}")
            run.world.check(stop)
    finally:
        shown.close()
        log.close()
    return evaluation


# ---------------------------------------------------------------------------------------------------------------------
# Around the loop
# ---------------------------------------------------------------------------------------------------------------------


def evaluation_is_missing(run: runs.Run) -> bool:
    """Whether the last completed step is one to evaluate after, and has not been."""
    config = run.config
    is_due = run.step == run.plan.total_steps or (config.eval_steps and run.step % config.eval_steps == 0)
    return bool(run.step and is_due and len(run.test_pairs) and run.eval_accuracy is None)


def evaluated_pairs(run: runs.Run) -> Any:
    """Indices (N,) of the test pairs that every evaluation of a run is on."""
    config = run.config
    return sampler.fixed_sample(len(run.test_pairs), config.eval_num_batches * config.batch_size, config.seed)


def evaluate_and_show(
    run: runs.Run, log: logger.TensorBoardLogger, shown: ProgressBar, stop: StopRequest
) -> Evaluation:
    """Evaluate after the last completed step, always on the same pairs, and write it where people look."""
    step = run.step
    evaluation = evaluate(run, evaluated_pairs(run), stop)
    run.eval_accuracy, run.eval_pairs = evaluation.metrics["accuracy"], evaluation.pairs
    run.note_evaluation(evaluation.correct, evaluation.pairs)
    values = {f"eval/{name}": value for name, value in evaluation.metrics.items()}
    log.scalars(values, step, run.examples_seen(step))
    log.histogram("eval/rewards_chosen", evaluation.rewards[:, 0], step)
    log.histogram("eval/rewards_rejected", evaluation.rewards[:, 1], step)
    shown.say(f"step {step}: {evaluation.line()}")
    return evaluation


def note_skipped_step(run: runs.Run, plans: list[packing.MicroBatchPlan], losses: Tensor) -> str:
    """Count a step whose loss or gradient is not finite and say which rows; too many in a row end the run."""
    run.skipped_steps += 1
    run.skipped_in_a_row += 1
    indices = np.concatenate([plan.indices for plan in plans])
    guilty = indices[~losses.isfinite().cpu().numpy()]
    rows = ", ".join(str(row) for row in sorted(run.train_pairs.rows[guilty if len(guilty) else indices])[:8])
    if run.skipped_in_a_row == MOST_SKIPPED_IN_A_ROW:
        raise UserError(
            f"{run.skipped_in_a_row} steps in a row had a loss or gradient that is not finite",
            found=f"the last one at step {run.step}, rows {rows}",
            safe=f"no such gradient reached the weights; they are those of step {run.step - run.skipped_in_a_row}",
            next="resume from an earlier step with a smaller --lr, more --warmup_steps, or --precision fp32",
        )
    return f"step {run.step} skipped: its loss or gradient is not finite (rows {rows}, {len(guilty) or 'all'} of them)"


def speed(plans: list[packing.MicroBatchPlan], seconds: float, device: Any) -> dict[str, float]:
    """How fast one step was, and which share of the tokens it computed was needed."""
    pairs = sum(plan.num_examples for plan in plans)
    needed = sum(plan.needed_tokens for plan in plans)
    computed = sum(plan.computed_tokens for plan in plans)
    return {
        "train/step_time": seconds,
        "train/pairs_per_second": pairs / seconds,
        "train/tokens_per_second": computed / seconds,
        "train/useful_tokens": needed / computed,
        "train/peak_memory_gib": devices.peak_gib(device),
    }


def figures(metrics: dict[str, float]) -> tuple[str, ...]:
    """A step's metrics as the progress bar shows them."""
    loss, accuracy, rate = (metrics[f"train/{name}"] for name in ("loss", "accuracy", "pairs_per_second"))
    return f"loss {loss:.4f}", f"accuracy {accuracy:.1%}", f"{rate:.1f} pairs/s"


def summary(run: runs.Run, evaluation: Evaluation | None) -> str:
    """The end of a run: how good, where it lies, what to type next."""
    lines = [f"done: {run.step:,} steps, {run.examples_seen(run.step):,} pairs"]
    if run.skipped_steps:
        lines.append(f"{run.skipped_steps:,} of these steps were skipped: their loss or gradient was not finite")
    if evaluation:
        lines.append(evaluation.line())
        width = max(map(len, evaluation.by_kind), default=0)
        for kind, (correct, pairs) in sorted(evaluation.by_kind.items())[:MOST_KINDS_SHOWN]:
            lines.append(f"  {kind:<{width}}  {correct / pairs:6.1%} of {pairs}")
    saved = step_folder(run.folder, run.step)
    return "\n".join(
        [
            *lines,
            f"checkpoint: {saved}",
            "next:",
            f"  tensorboard --logdir {run.config.log_dir}",
            f"  python chat.py --model {saved}",
        ]
    )


if __name__ == "__main__":
    launch.leave(utils.run_script(main))
