"""Train a reward model from human preferences.

    python train_rm.py                 Qwen3-0.6B on Anthropic/hh-rlhf, every parameter
    python train_rm.py --lora          the same, low-rank adapters only
    python train_rm.py --demo          a tiny model and made-up pairs: offline, one to three minutes on a laptop
    python train_rm.py --resume_from ./checkpoints/rm/RUN/step-500
    torchrun --nproc_per_node 4 train_rm.py

Words: a *pair* is one preference; a *micro-batch* is one forward and backward; a *step* is one optimizer update.
Several processes plan the same step, and each computes some of its micro-batches (training/distributed.py).
Letters: N pairs.
"""

from __future__ import annotations

import dataclasses
import datetime
import math
import shlex
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import utils
from checkpointing.run_folder import step_folder
from common.flags import flag
from common.progress import ProgressBar
from training import launch
from training.config import TrainingConfig, read_config
from utils import StopRequest

with utils.lazy_imports():  # --help must not wait for torch
    import numpy as np
    import torch
    from torch import Tensor  # for annotations only

    import data
    import models
    from checkpointing import checkpoint
    from data_pipeline import packing, sampler, sources
    from evaluation import evaluator
    from modeling import devices, speedups, tokenizers
    from training import distributed, logger, setup
    from training import run as runs

MAX_KINDS_SHOWN = 20


@dataclass(frozen=True)
class RewardTrainingConfig(TrainingConfig):
    """What training a reward model has beside the settings of every training; redefined ones keep their place."""

    unit: ClassVar[str] = "pairs"
    lora_settings: ClassVar[dict[str, Any]] = {"lr": 2e-4}
    demo_settings: ClassVar[dict[str, Any]] = {
        "batch_size": 32, "grad_accum": 1, "epochs": 7, "lr": 1e-3, "lr_schedule": "cosine", "warmup_steps": 20,
        "gradient_checkpointing": False, "eval_steps": 50, "eval_num_batches": 0,
    }  # fmt: skip

    # fmt: off
    batch_size: int = flag(32, "most pairs in a micro-batch, if --tokens_per_batch is a number", minimum=1, below=10**6, group="optimization", on_resume="exact")
    grad_accum: int = flag(4, "an optimizer step takes batch_size x grad_accum pairs", minimum=1, below=10**6, group="optimization", on_resume="exact")
    lr: float = flag(1e-5, "learning rate of AdamW; the default with --lora is 2e-4", above=0, group="optimization")
    head_lr: float = flag(0.0, "learning rate of the reward head, which starts from nothing; 0 = that of --lr", minimum=0, group="optimization")
    center_rewards: float = flag(0.0, "weight of the mean of (r_chosen + r_rejected)^2, which keeps rewards around zero (arXiv 2312.09244)", minimum=0, below=1000, group="optimization")
    lora: bool = flag(False, "train low-rank adapters and the head instead of every parameter", group="LoRA", on_resume="fixed")
    eval_num_batches: int = flag(32, "evaluation size in batches, the same pairs every time; 0 = the whole test split", minimum=0, below=10**12, group="evaluation and output")
    output_dir: str = flag("./checkpoints/rm", "checkpoints go to OUTPUT_DIR/RUN_NAME/step-N", group="evaluation and output")
    log_dir: str = flag("./logs/rm", "TensorBoard's files go to LOG_DIR/RUN_NAME", group="evaluation and output")
    report: bool = flag(True, "at the end write a report on the last and the best checkpoint; --no_report skips it", group="evaluation and output")
    # fmt: on


# -- The loss ----------------------------------------------------------------------------------------------------------


def bradley_terry_loss(chosen: Tensor, rejected: Tensor, margins: Tensor, center_rewards: float = 0.0) -> Tensor:
    """The negative log-likelihood of each preference, -log sigmoid(r_chosen - r_rejected - margin), shape (N,).

    Bradley & Terry 1952 (doi:10.2307/2334029); the margin as in Llama 2 (arXiv 2307.09288, eq. 2). Rewards are only
    determined up to a constant; `center_rewards` · (r_chosen + r_rejected)² settles it near 0 (arXiv 2312.09244).
    """
    loss = -torch.nn.functional.logsigmoid(chosen - rejected - margins)
    return loss + center_rewards * (chosen + rejected) ** 2


def score(model: torch.nn.Module, batch: packing.PackedBatch | packing.SeparateBatch) -> Tensor:
    """Rewards (N, 2) of a micro-batch's pairs, chosen and rejected. `model` is a RewardModel, or DDP around one."""
    return model(*batch.inputs()).view(-1, 2)


def label_margins(pairs: data.PairDataset, plans: list[packing.MicroBatchPlan], device: torch.device) -> Tensor:
    """The labels' margins (N,) of planned micro-batches, in their order: one transfer to the device per step."""
    return torch.from_numpy(pairs.label_margins[np.concatenate([plan.indices for plan in plans])]).to(device)


# -- One step ----------------------------------------------------------------------------------------------------------


def accumulate_gradients(
    world: distributed.World,
    model: torch.nn.Module,
    micro_batches: Iterable[tuple[distributed.RankBatch, Any]],
    label_margins: Tensor,
    center_rewards: float,
    stop: StopRequest,
) -> Tensor:
    """Forward and backward of a step's micro-batches; each pair's loss and two rewards, (N, 3).

    `label_margins` (N,) are those of the whole step's pairs, in the order of the micro-batches' plans. Each
    micro-batch's losses are summed and divided by the pairs in the *whole step*, so the gradient does not depend on how
    the step was cut, nor on which rank computed which part. Pairs of other ranks stay 0 in what is returned.
    """
    results = torch.zeros(len(label_margins), 3, device=model.device)
    for rank_batch, batch in micro_batches:
        world.check(stop)
        with world.sync_gradients(model, rank_batch):
            rewards = score(model, batch)  # (n, 2)
            margins = label_margins[rank_batch.positions]  # (n,)
            losses = bradley_terry_loss(rewards[:, 0], rewards[:, 1], margins, center_rewards)  # (n,)
            (losses.sum() * rank_batch.weight / len(label_margins)).backward()
        if rank_batch.weight:
            results[rank_batch.positions] = torch.column_stack([losses, rewards]).detach()
    return results


def gradients_of_step(run: runs.Run, step: int, stop: StopRequest) -> tuple[list[packing.MicroBatchPlan], Tensor]:
    """The gradient of a step's pairs: its plans, and in their order each pair's loss and two rewards, (N, 3).

    If the device runs out of memory, the step begins again in smaller micro-batches: the gradient is the same.
    """

    def compute(plans: list[packing.MicroBatchPlan], micro_batches: Iterable[Any]) -> Tensor:
        run.world.seed_dropout(run.config.seed, step)
        margins = label_margins(run.train_data, plans, run.model.device)  # (N,)
        results = accumulate_gradients(run.world, run.module, micro_batches, margins, run.config.center_rewards, stop)
        results = run.world.all_reduce(results, stop)  # (N, 3)
        speedups.densify_embedding_gradient(run.model)
        return results

    def forget_first_try() -> None:
        run.optimizer.zero_grad(set_to_none=True)
        checkpoint.set_random_state(run.random_state)  # the same dropout as in the first try

    indices = run.sampler.indices_for(step)
    return run.batcher.run(run.train_data, indices, compute, is_training=True, before_retry=forget_first_try)


def pair_metrics(results: Tensor) -> dict[str, float]:
    """Means over pairs, from the loss and the two rewards of each, (N, 3), in one transfer from the device."""
    losses, chosen, rejected = results.unbind(dim=1)  # (N,) each
    is_correct = (chosen > rejected).float()
    values = torch.stack([losses, is_correct, chosen - rejected, chosen, rejected]).mean(dim=1).tolist()
    return dict(zip(("loss", "accuracy", "margin", "reward_chosen", "reward_rejected"), values, strict=True))


# -- Evaluation --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Evaluation:
    """What a set of held-out pairs says about the model."""

    metrics: dict[str, float]
    correct: int
    pairs: int
    rewards: Tensor  # (N, 2), on the CPU
    by_kind: dict[str, tuple[int, int]]  # kind -> (correct, pairs), where the data names kinds

    @property
    def interval(self) -> tuple[float, float]:
        """The accuracy's 95 % confidence interval."""
        return utils.wilson_interval(self.correct, self.pairs)

    def warning(self, lr: float) -> str:
        """What to try if the model has learned nothing, or is surer than it is right; "" if neither is seen."""
        lowest, _ = self.interval
        if lowest <= 0.5:
            return (
                f"no better than guessing so far: the accuracy's 95 % interval reaches down to {lowest:.1%}.\n"
                f"  Try more pairs or --epochs, or another --lr than {lr:g} (with --lora ten to twenty times as much "
                "as without)"
            )
        loss = float(bradley_terry_loss(*self.rewards.unbind(dim=1), torch.zeros(())).mean())
        if loss <= math.log(2):
            return ""
        return (
            f"surer than it is right: its loss without margins is {loss:.3f}, and guessing has {math.log(2):.3f}.\n"
            f"  Try a smaller --lr than {lr:g}, or fewer --epochs"
        )

    def line(self) -> str:
        low, high = self.interval
        return (
            f"held-out accuracy {self.correct / self.pairs:.1%} (95 % interval {low:.1%} to {high:.1%}), "
            f"loss {self.metrics['loss']:.4f}, {self.pairs:,} pairs"
        )


def evaluate(run: runs.Run, indices: Any, stop: StopRequest) -> Evaluation:
    """Loss and accuracy over `indices` of the test pairs, in fp32, without dropout. A tie counts as wrong."""

    def compute(plans: list[packing.MicroBatchPlan], micro_batches: Iterable[Any]) -> Tensor:
        margins = label_margins(run.eval_data, plans, run.model.device)  # (N,)
        results = torch.zeros(len(margins), 3, device=run.model.device)
        for rank_batch, batch in micro_batches:
            run.world.check(stop)
            with torch.no_grad(), run.model.in_fp32():
                rewards = score(run.model, batch)  # (n, 2)
                losses = bradley_terry_loss(rewards[:, 0], rewards[:, 1], margins[rank_batch.positions])
            if rank_batch.weight:
                results[rank_batch.positions] = torch.column_stack([losses, rewards])
        return run.world.all_reduce(results, stop)

    run.model.eval()
    plans, results = run.batcher.run(run.eval_data, indices, compute, is_training=False)  # (N, 3)
    run.model.train()
    rewards = results[:, 1:].cpu()
    is_correct = (rewards[:, 0] > rewards[:, 1]).numpy()  # (N,)
    kinds = run.eval_data.kinds[np.concatenate([plan.indices for plan in plans])]
    by_kind = {
        run.eval_data.kind_names[kind]: (int(is_correct[kinds == kind].sum()), int((kinds == kind).sum()))
        for kind in np.unique(kinds)
        if run.eval_data.kind_names[kind]
    }
    return Evaluation(pair_metrics(results), int(is_correct.sum()), len(is_correct), rewards, by_kind)


# -- The run -----------------------------------------------------------------------------------------------------------


def main(argv: list[str]) -> None:
    with launch.joined() as world:
        with world.first_on_each_machine():
            config, resumed_from = read_config(RewardTrainingConfig, argv, __doc__.split("\n\n")[0])
        run = setup.set_up(config, resumed_from, world, open_parts, Path(__file__).name)
        to_report_on = train_to_the_end(run, resumed_from)
        del run
    if to_report_on is not None:  # when the run's memory is free again
        evaluator.report_run(*to_report_on)


def open_parts(config: RewardTrainingConfig, resumed_from: Path | None, world: distributed.World) -> setup.Parts:
    """The pairs and the reward model of a run; everything else of it is the same for every training."""
    # what a chat template writes as today's date is fixed when a run begins, and then in its checkpoints' own templates
    date = tokenizers.UNKNOWN_DATE if resumed_from else world.broadcast(datetime.datetime.now())
    with world.first_on_each_machine():  # it fills the token cache
        tokenizer = tokenizers.load_tokenizer(str(resumed_from or config.model), date)
        before = checkpoint.digests_of(checkpoint.read_examples(resumed_from or Path(config.model)))
        train_pairs, test_pairs = data.load_pairs(sources.DataSpec.of(config), tokenizer, config.max_length, before)
    setup.check_data(config, world, train_pairs, test_pairs)
    if resumed_from:
        model = models.RewardModel.restore(resumed_from, config.model if config.lora else None)
    else:
        model = models.RewardModel.create(config.model, tokenizer, config.seed, setup.lora_settings(config))
    return setup.Parts(model, train_pairs, test_pairs)


def train_to_the_end(run: runs.Run, resumed_from: Path | None) -> tuple[Path, Any, list] | None:
    """Train and print how it went; returns what to report on: the run, its data, places in the test split."""
    if run.has_nothing_to_do():
        return None
    with runs.supervised(run, resumed_from) as stop:
        last = train(run, stop)
    print(summary(run, last), flush=True)
    if last is None or not run.world.is_main or not run.config.report:
        return None
    return run.folder, sources.DataSpec.of(run.config), run.eval_data.places(evaluated_pairs(run))


def train(run: runs.Run, stop: StopRequest) -> Evaluation | None:
    """From the step after the last completed one to the end; returns the last evaluation."""
    config, total_steps = run.config, run.sampler.total_steps
    log = logger.TensorBoardLogger(run.log_folder, run.step, run.examples_seen(run.step))
    log.table("config", dataclasses.asdict(config), run.step)
    shown = ProgressBar("step", total_steps, done=run.step, is_shown=run.world.is_main)
    parameters = list(run.model.trained_parameters().values())
    checkpoint.set_random_state(run.random_state)
    evaluation = None
    try:
        if run.is_evaluation_missing:  # the run was stopped in the middle of it
            evaluation = evaluate_and_show(run, log, shown, stop)
        for step in range(run.step + 1, total_steps + 1):
            started = time.perf_counter()

            # choose pairs, forward and backward
            plans, results = gradients_of_step(run, step, stop)

            # clip; max_norm infinity measures without clipping
            grad_norm = torch.nn.utils.clip_grad_norm_(parameters, config.max_grad_norm or math.inf)
            grad_norm = float(run.world.gather_full(grad_norm))

            # the step's only wait for the device: .item() in the inner loop would stall a GPU
            metrics = {f"train/{name}": value for name, value in pair_metrics(results).items()}
            is_finite = math.isfinite(metrics["train/loss"]) and math.isfinite(grad_norm)

            # update
            run.complete_step(step, is_finite)
            if not is_finite:
                indices = np.concatenate([plan.indices for plan in plans])
                shown.say(run.explain_skipped_step(indices, results[:, 0].isfinite().cpu().numpy()))

            # log
            metrics |= {
                "train/grad_norm": grad_norm,
                "train/lr": run.optimizer.param_groups[0]["lr"],
                "train/skipped_steps": run.skipped_steps,
                **speed(plans, time.perf_counter() - started, run.model.device),
            }
            log.scalars(metrics, step, run.examples_seen(step))
            shown.update(step, *figures(metrics))

            # evaluate
            if run.is_evaluation_missing:
                log.histogram("train/rewards", results[:, 1:], step)
                evaluation = evaluate_and_show(run, log, shown, stop)

            # save
            if run.is_save_due:
                shown.say(f"saved {run.save()}")
            run.world.check(stop)
    finally:
        shown.close()
        log.close()
    return evaluation


# -- Around the loop ---------------------------------------------------------------------------------------------------


def evaluated_pairs(run: runs.Run) -> Any:
    """Indices (N,) of the test pairs that every evaluation of a run uses."""
    config = run.config
    return sampler.fixed_sample(len(run.eval_data), config.eval_num_batches * config.batch_size, config.seed)


def evaluate_and_show(
    run: runs.Run, log: logger.TensorBoardLogger, shown: ProgressBar, stop: StopRequest
) -> Evaluation:
    """Evaluate after the last completed step, always on the same pairs; record, log and print the result."""
    step = run.step
    evaluation = evaluate(run, evaluated_pairs(run), stop)
    run.record_evaluation(evaluation.correct / evaluation.pairs, evaluation.interval, evaluation.pairs)
    values = {f"eval/{name}": value for name, value in evaluation.metrics.items()}
    log.scalars(values, step, run.examples_seen(step))
    log.histogram("eval/rewards_chosen", evaluation.rewards[:, 0], step)
    log.histogram("eval/rewards_rejected", evaluation.rewards[:, 1], step)
    shown.say(f"step {step}: {evaluation.line()}")
    return evaluation


def speed(plans: list[packing.MicroBatchPlan], seconds: float, device: Any) -> dict[str, float]:
    """How fast one step was, and which share of the tokens it computed was needed."""
    pairs = sum(plan.num_examples for plan in plans)
    needed = sum(plan.needed_tokens for plan in plans)
    computed = sum(plan.computed_tokens for plan in plans)
    reserved = {"train/reserved_memory_gib": devices.reserved_gib()} if device.type == "cuda" else {}
    return {
        **reserved,
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
    """The end of a run: how good the model is, where it was saved, what to type next."""
    lines = [f"done: {utils.counted(run.step, 'step')}, {utils.counted(run.examples_seen(run.step), 'pair')}"]
    if run.skipped_steps:
        lines.append(f"{run.skipped_steps:,} of these steps were skipped: their loss or gradient was not finite")
    if evaluation:
        lines.append(evaluation.line())
        width = max(map(len, evaluation.by_kind), default=0)
        for kind, (correct, pairs) in sorted(evaluation.by_kind.items())[:MAX_KINDS_SHOWN]:
            lines.append(f"  {kind:<{width}}  {correct / pairs:6.1%} of {pairs}")
        if warning := evaluation.warning(run.config.lr):
            lines.append(warning)
    saved = step_folder(run.folder, run.step)
    lines += [f"checkpoint: {saved}", "next:"]
    logs, model = shlex.quote(run.config.log_dir), shlex.quote(str(saved))
    lines += [f"  tensorboard --logdir {logs}", f"  python chat.py --model {model}"]
    return "\n".join(lines)


if __name__ == "__main__":
    launch.leave(utils.run_script(main))
