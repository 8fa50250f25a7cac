"""Train a reward model from human preferences.

    python train_rm.py                 Qwen3-0.6B on Anthropic/hh-rlhf, every parameter
    python train_rm.py --lora          the same, low-rank adapters only
    python train_rm.py --demo          a tiny model and made-up pairs: offline, a minute on a laptop
    python train_rm.py --resume_from ./checkpoints/rm/RUN/step-500

Words: a *pair* is one preference; a *micro-batch* is one forward and backward; a *step* is one optimizer update.
Letters: N pairs.
"""

from __future__ import annotations

import dataclasses
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import utils
from train_config import NOT_STORED, TrainConfig, read_config
from utils import UserError

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import Tensor

    import checkpoint
    import data
    import models
    import packing
    import progress
else:  # loaded when first used, so that --help answers at once
    np, torch, checkpoint, data, models, packing, progress = map(
        utils.lazy_import, ("numpy", "torch", "checkpoint", "data", "models", "packing", "progress")
    )


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


def score(model: models.RewardModel, batch: packing.PackedBatch | packing.SeparateBatch) -> Tensor:
    """Rewards (N, 2) of a micro-batch's pairs: chosen, rejected."""
    if isinstance(batch, packing.PackedBatch):
        return model.score_packed(batch.input_ids, batch.position_ids, batch.pair_ids, batch.branch_ids, batch.ends)
    return model.score_rows(batch.input_ids, batch.attention_mask).view(-1, 2)


# ---------------------------------------------------------------------------------------------------------------------
# One step
# ---------------------------------------------------------------------------------------------------------------------


def accumulate_gradients(
    model: models.RewardModel, micro_batches: list[Any], center_rewards: float, between: Callable[[], None]
) -> tuple[Tensor, Tensor]:
    """Forward and backward of a step's micro-batches; returns losses (N,) and rewards (N, 2), on the device.

    Each micro-batch's losses are summed and divided by the pairs in the *whole step*, so the gradient does not depend
    on how the step was cut.
    """
    pairs_in_step = sum(len(batch.margins) for batch in micro_batches)
    losses, rewards = [], []
    for batch in micro_batches:
        between()
        batch = batch.to(model.device)
        pair_rewards = score(model, batch)  # (N, 2)
        loss = bradley_terry_loss(pair_rewards[:, 0], pair_rewards[:, 1], batch.margins, center_rewards)  # (N,)
        (loss.sum() / pairs_in_step).backward()
        losses.append(loss.detach())
        rewards.append(pair_rewards.detach())
    return torch.cat(losses), torch.cat(rewards)


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


def evaluate(
    model: models.RewardModel, dataset: data.PairDataset, indices: Any, config: TrainConfig, between: Callable[[], None]
) -> Evaluation:
    """Loss and accuracy over `indices` of a dataset, without dropout. A tie counts as wrong."""
    was_training = model.training
    model.eval()
    losses, rewards, order = [], [], []
    try:
        with torch.no_grad():
            for batch in micro_batches(model, dataset, indices, config):
                between()
                batch = batch.to(model.device)
                pair_rewards = score(model, batch)
                losses.append(bradley_terry_loss(pair_rewards[:, 0], pair_rewards[:, 1], batch.margins))
                rewards.append(pair_rewards)
                order.append(batch.indices)
    finally:
        model.train(was_training)
    all_rewards = torch.cat(rewards)
    is_right = (all_rewards[:, 0] > all_rewards[:, 1]).cpu().numpy()  # (N,)
    kinds = dataset.kinds[np.concatenate(order)]
    by_kind = {
        dataset.kind_names[kind]: (int(is_right[kinds == kind].sum()), int((kinds == kind).sum()))
        for kind in np.unique(kinds)
        if dataset.kind_names[kind]
    }
    metrics = pair_metrics(torch.cat(losses), all_rewards)
    return Evaluation(metrics, int(is_right.sum()), len(is_right), all_rewards.cpu(), by_kind)


def micro_batches(model: models.RewardModel, dataset: data.PairDataset, indices: Any, config: TrainConfig) -> Any:
    return packing.micro_batches_of(
        dataset,
        indices,
        config.tokens_per_batch,
        config.batch_size,
        model.tokenizer.pad_token_id,
        model.costly_width() if model.packs_up_to(config.max_length) else None,
    )


# ---------------------------------------------------------------------------------------------------------------------
# The run
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class Run:
    """All that one training holds. `step` and `random_state` always describe the last completed step."""

    config: TrainConfig
    model: models.RewardModel
    optimizer: torch.optim.Optimizer
    train_pairs: data.PairDataset
    test_pairs: data.PairDataset
    plan: packing.StepPlan
    folder: Path
    step: int
    random_state: dict[str, Tensor]
    saved_step: int
    is_updating: bool = False  # inside optimizer.step(): the weights are between two steps

    def save(self) -> Path:
        position = checkpoint.Position(
            self.step, self.plan.examples_seen(self.step), self.train_pairs.fingerprint, len(self.train_pairs)
        )
        stored = {name: value for name, value in dataclasses.asdict(self.config).items() if name not in NOT_STORED}
        path = checkpoint.save(self.folder, self.model, self.optimizer, self.random_state, position, stored)
        self.saved_step = self.step
        return path


def main(argv: list[str]) -> None:
    config, resumed_from = read_config(argv)
    run = set_up(config, resumed_from)
    if run.step >= run.plan.total_steps:
        print(f"nothing to do: step {run.step} of {run.plan.total_steps} is done; more with --epochs or --max_steps")
        return
    with utils.StopRequest() as stop:
        try:
            last = train(run, stop.check)
        except BaseException:
            save_last_completed_step(run)
            raise
    print(summary(run, last))


def set_up(config: TrainConfig, resumed_from: Path | None) -> Run:
    """Everything that can fail early does so here, cheapest first: names, data, then the model."""
    folder = claim_run_folder(config, resumed_from)
    utils.remove_dead_saves(folder)
    try:
        return open_run(dataclasses.replace(config, run_name=folder.name), folder, resumed_from)
    except BaseException:
        if not any(folder.iterdir()):
            folder.rmdir()  # nothing began, so nothing stays
        raise


def open_run(config: TrainConfig, folder: Path, resumed_from: Path | None) -> Run:
    """Tokenizer, pairs, model and optimizer of a run that has its folder."""
    tokenizer = models.load_tokenizer(str(resumed_from or config.model))
    train_pairs, test_pairs = data.load_pairs(config.dataset, tokenizer, config.max_length)
    for pairs in (train_pairs, test_pairs):
        if config.bad_rows == "stop":
            pairs.refuse_if_too_much_is_left_out()
        print("\n".join([f"{pairs.name}: {len(pairs):,} of {pairs.counts.rows:,} rows kept", *pairs.counts.lines()]))
    if len(train_pairs) == 0:
        raise UserError("no training pair is left", where=train_pairs.name, next="see the counts above")
    plan = packing.StepPlan(len(train_pairs), config.pairs_per_step, config.epochs, config.seed, config.max_steps)

    if resumed_from:
        model = models.RewardModel.restore(resumed_from)
    else:
        lora = models.LoraSettings(
            config.lora_r, config.lora_alpha, config.lora_dropout, tuple(config.lora_target_modules.split(","))
        )
        model = models.RewardModel.create(config.model, tokenizer, config.seed, lora if config.lora else None)
        torch.manual_seed(config.seed)
    model.autocast_dtype = torch.bfloat16 if config.precision == "bf16" else None
    model.to(models.pick_device()).train()
    if config.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    # Qwen3's published weights are bf16, but they are trained in fp32: at 1e-5, bf16 rounds most updates to nothing.
    trained = list(checkpoint.trained_parameters(model).values())
    fused = model.device.type in ("cuda", "cpu")
    optimizer = torch.optim.AdamW(trained, lr=config.lr, weight_decay=config.weight_decay, fused=fused)
    describe(config, model, trained, plan)

    step, random_state = 0, checkpoint.random_state()
    if resumed_from:
        position = checkpoint.read_position(resumed_from)
        refuse_changed_data(position, train_pairs, config)
        checkpoint.restore_optimizer(resumed_from, model, optimizer)
        step, random_state = position.step, checkpoint.read_random_state(resumed_from)
        print(f"resuming after step {step} of {plan.total_steps} from {resumed_from}")
        if folder == resumed_from.parent and (aside := checkpoint.set_aside_later_steps(folder, step)):
            print(f"  the steps after it now lie in {aside}")
    return Run(config, model, optimizer, train_pairs, test_pairs, plan, folder, step, random_state, saved_step=step)


def train(run: Run, check_for_stop: Callable[[], None]) -> Evaluation | None:
    """From the step after the last completed one to the end; returns the last evaluation."""
    config, model, optimizer, plan = run.config, run.model, run.optimizer, run.plan
    board = progress.Board(Path(config.log_dir) / run.folder.name, run.step, plan.examples_seen(run.step))
    board.table("config", dataclasses.asdict(config), run.step)
    shown = progress.Progress(plan.total_steps, run.step)
    eval_indices = packing.fixed_sample(len(run.test_pairs), config.eval_num_batches * config.batch_size, config.seed)
    parameters = list(checkpoint.trained_parameters(model).values())
    checkpoint.set_random_state(run.random_state)
    evaluation = None
    try:
        for step in range(run.step + 1, plan.total_steps + 1):
            started = time.perf_counter()
            is_last = step == plan.total_steps

            # choose: the whole step's micro-batches first, so that the true count of pairs is known
            step_batches = list(micro_batches(model, run.train_pairs, plan.pairs_of(step), config))

            # forward and backward
            losses, rewards = accumulate_gradients(model, step_batches, config.center_rewards, check_for_stop)

            # clip; max_norm infinity measures without clipping
            grad_norm = torch.nn.utils.clip_grad_norm_(parameters, config.max_grad_norm or math.inf)

            # the step's only wait for the device: .item() in the inner loop would stall a GPU
            metrics = {f"train/{name}": value for name, value in pair_metrics(losses, rewards).items()}
            metrics["train/grad_norm"] = float(grad_norm)
            refuse_non_finite(step, metrics, run)

            # update, fenced: an interruption on either side finds whole weights
            metrics["train/lr"] = optimizer.param_groups[0]["lr"] = learning_rate(step, plan.total_steps, config)
            run.is_updating = True
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            run.step, run.random_state, run.is_updating = step, checkpoint.random_state(), False

            # log
            examples = plan.examples_seen(step)
            metrics |= speed(step_batches, time.perf_counter() - started, model.device)
            board.scalars(metrics, step, examples)
            shown.step(step, metrics)

            # evaluate
            if len(eval_indices) and (is_last or (config.eval_steps and step % config.eval_steps == 0)):
                evaluation = evaluate(model, run.test_pairs, eval_indices, config, check_for_stop)
                board.scalars({f"eval/{name}": value for name, value in evaluation.metrics.items()}, step, examples)
                board.histogram("eval/rewards_chosen", evaluation.rewards[:, 0], step)
                board.histogram("eval/rewards_rejected", evaluation.rewards[:, 1], step)
                board.histogram("train/rewards", rewards, step)
                shown.say(f"step {step}: {evaluation.line()}")

            # save
            if is_last or (config.save_steps and step % config.save_steps == 0):
                shown.say(f"saved {run.save()}")
            check_for_stop()
    finally:
        shown.close()
        board.close()
    return evaluation


# ---------------------------------------------------------------------------------------------------------------------
# Around the loop
# ---------------------------------------------------------------------------------------------------------------------


def claim_run_folder(config: TrainConfig, resumed_from: Path | None) -> Path:
    """Make the run's folder, which no other run has; a resumed run goes on in its own."""
    root = Path(config.output_dir)
    if resumed_from and (root / config.run_name).resolve() == resumed_from.resolve().parent:
        return resumed_from.parent
    root.mkdir(parents=True, exist_ok=True)
    now = utils.timestamp()
    names = [config.run_name] if config.run_name else [now, *(f"{now}-{number}" for number in range(2, 100))]
    for name in names:
        folder = root / name
        try:
            folder.mkdir()
            return folder
        except FileExistsError:
            if folder.is_dir() and not any(folder.iterdir()):  # of a run that never began
                return folder
    raise UserError(
        f"there is a run named {name!r} already",
        where=folder,
        safe="nothing of it was touched",
        next=f"another --run_name, or go on with it: python train_rm.py --resume_from {folder}",
    )


def describe(config: TrainConfig, model: models.RewardModel, trained: list[Any], plan: packing.StepPlan) -> None:
    total = sum(parameter.numel() for parameter in model.classifier.parameters())
    count = sum(parameter.numel() for parameter in trained)
    print(f"model: {config.model}, {total:,} parameters, {count:,} trained, {config.precision} on {model.device}")
    if not model.packs_up_to(config.max_length):
        print(
            f"  one sequence per row, because {model.why_not or 'its attention window is below --max_length'}: slower"
        )
    print(f"plan: {plan.total_steps:,} steps of {config.pairs_per_step} pairs", flush=True)


def refuse_changed_data(position: Any, train_pairs: data.PairDataset, config: TrainConfig) -> None:
    if position.data_fingerprint != train_pairs.fingerprint and not config.allow_data_change:
        raise UserError(
            "the training pairs are not the ones this run was started with",
            where=train_pairs.name,
            found=f"{len(train_pairs):,} pairs, then {position.num_pairs:,}",
            next="bring the old data back, or add --allow_data_change to go on with these",
        )


def refuse_non_finite(step: int, metrics: dict[str, float], run: Run) -> None:
    if not all(math.isfinite(metrics[name]) for name in ("train/loss", "train/grad_norm")):
        raise UserError(
            f"the loss or its gradient is not finite at step {step}",
            found=f"loss {metrics['train/loss']}, gradient norm {metrics['train/grad_norm']}",
            safe=f"the weights are those of step {run.step}",
            next="a smaller --lr, --warmup_steps, or --precision fp32",
        )


def speed(step_batches: list[Any], seconds: float, device: Any) -> dict[str, float]:
    """How fast one step was, and which share of the tokens it computed was needed."""
    pairs = sum(len(batch.margins) for batch in step_batches)
    needed = sum(batch.needed_tokens for batch in step_batches)
    computed = sum(batch.computed_tokens for batch in step_batches)
    return {
        "train/step_time": seconds,
        "train/pairs_per_second": pairs / seconds,
        "train/tokens_per_second": computed / seconds,
        "train/useful_tokens": needed / computed,
        "train/peak_memory_gib": progress.peak_memory_gib(device),
    }


def save_last_completed_step(run: Run) -> None:
    """After Ctrl-C or a crash: nothing that was learned is lost, unless the crash was inside the update itself."""
    if run.is_updating or run.step == run.saved_step:
        return
    print(f"saved {run.save()} (the last completed step)", flush=True)


def summary(run: Run, evaluation: Evaluation | None) -> str:
    """The end of a run: how good, where it lies, what to type next."""
    lines = [f"done: {run.step:,} steps, {run.plan.examples_seen(run.step):,} pairs"]
    if evaluation:
        lines.append(evaluation.line())
        width = max(map(len, evaluation.by_kind), default=0)
        for kind, (correct, pairs) in evaluation.by_kind.items():
            lines.append(f"  {kind:<{width}}  {correct / pairs:6.1%} of {pairs}")
    saved = utils.step_folder(run.folder, run.step)
    return "\n".join([*lines, f"checkpoint: {saved}", "next:", f"  tensorboard --logdir {run.config.log_dir}"])


if __name__ == "__main__":
    sys.exit(utils.run_script(main))
