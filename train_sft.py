"""Fine-tune a language model on good replies (SFT): what a policy starts from where its base cannot talk yet.

    python train_sft.py                Qwen3-0.6B on the chosen replies of Anthropic/hh-rlhf, every parameter
    python train_sft.py --lora         the same, low-rank adapters only
    python train_sft.py --demo         a tiny model learns to speak: offline, one to three minutes on a laptop
    python train_sft.py --resume_from ./checkpoints/sft/RUN/step-500

The loss is that of the replies' tokens only, up to and with the one that ends them. Everything around the loop is
train_rm.py's: packed rows, exact resuming, several processes.

Letters: N dialogues, P tokens of replies.
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

    import models
    from checkpointing import checkpoint
    from data_pipeline import dialogues, packing, sampler, sources
    from modeling import devices, log_probs, speedups, tokenizers
    from training import distributed, logger, setup
    from training import run as runs


@dataclass(frozen=True)
class SupervisedTrainingConfig(TrainingConfig):
    """What supervised fine-tuning has beside the settings of every training."""

    unit: ClassVar[str] = "replies"
    eval_metric: ClassVar[str] = "log_likelihood"
    lora_settings: ClassVar[dict[str, Any]] = {"lr": 2e-4}
    demo_settings: ClassVar[dict[str, Any]] = {
        "replies": "both", "batch_size": 64, "grad_accum": 1, "epochs": 6, "lr": 6e-3, "lr_schedule": "linear",
        "warmup_steps": 10, "max_grad_norm": 1.0, "gradient_checkpointing": False, "eval_steps": 100,
        "eval_num_batches": 4,
    }  # fmt: skip

    # fmt: off
    replies: str = flag("chosen", "of a preference learn the chosen reply, or both, as a start that still has something to learn from a reward model", choices=("chosen", "both"), group="model and data", on_resume="exact")
    lr: float = flag(1e-5, "learning rate of AdamW; the default with --lora is 2e-4", above=0, group="optimization")
    max_grad_norm: float = flag(1.0, "clip the gradient to this norm; 0 disables", minimum=0, below=1e30, group="optimization")
    eval_num_batches: int = flag(8, "evaluation size in batches, the same replies every time; 0 = the whole test split", minimum=0, below=10**12, group="evaluation and output")
    output_dir: str = flag("./checkpoints/sft", "checkpoints go to OUTPUT_DIR/RUN_NAME/step-N", group="evaluation and output")
    log_dir: str = flag("./logs/sft", "TensorBoard's files go to LOG_DIR/RUN_NAME", group="evaluation and output")
    # fmt: on


# -- One step ----------------------------------------------------------------------------------------------------------


def reply_lengths(dataset: dialogues.DialogueDataset, plans: list[packing.MicroBatchPlan]) -> np.ndarray:
    """(N,) tokens of the replies of planned micro-batches, in their order."""
    return dataset.lengths[np.concatenate([plan.indices for plan in plans]), 1]


def accumulate_gradients(
    world: distributed.World,
    model: torch.nn.Module,
    micro_batches: Iterable[tuple[distributed.RankBatch, Any]],
    lengths: np.ndarray,
    stop: StopRequest,
) -> Tensor:
    """Forward and backward of a step's micro-batches; the sum of each reply's log-probabilities, (N,).

    The loss is the mean of -log p over all tokens of the *whole step*'s replies, (N,) of `lengths`, so the gradient
    does not depend on how the step was cut. Replies of other ranks stay 0 in what is returned.
    """
    results = torch.zeros(len(lengths), device=model.device)
    for rank_batch, batch in micro_batches:
        world.check(stop)
        with world.sync_gradients(model, rank_batch):
            logprobs, _ = model(*batch.inputs())  # (P,)
            (-logprobs.sum() * rank_batch.weight / int(lengths.sum())).backward()
        if rank_batch.weight:
            results[rank_batch.positions] = by_reply(logprobs.detach(), lengths[rank_batch.positions])
    return results


def by_reply(values: Tensor, lengths: np.ndarray) -> Tensor:
    """Sums (n,) of values (P,) over the tokens of each of n replies."""
    return torch.stack([part.sum() for part in values.split(lengths.tolist())])


def gradients_of_step(run: runs.Run, step: int, stop: StopRequest) -> tuple[list[packing.MicroBatchPlan], Tensor]:
    """The gradient of a step's replies: its plans, and in their order the log-probability of each reply, (N,)."""

    def compute(plans: list[packing.MicroBatchPlan], micro_batches: Iterable[Any]) -> Tensor:
        run.world.seed_dropout(run.config.seed, step)
        lengths = reply_lengths(run.train_data, plans)
        results = accumulate_gradients(run.world, run.module, micro_batches, lengths, stop)
        speedups.densify_embedding_gradient(run.model)
        return run.world.all_reduce(results, stop)

    def forget_first_try() -> None:
        run.optimizer.zero_grad(set_to_none=True)
        checkpoint.set_random_state(run.random_state)  # the same dropout as in the first try

    indices = run.sampler.indices_for(step)
    return run.batcher.run(run.train_data, indices, compute, is_training=True, before_retry=forget_first_try)


# -- Evaluation --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Evaluation:
    """How likely the model finds held-out replies."""

    loss: float  # mean of -log p over all tokens
    interval: tuple[float, float]  # its 95 % confidence interval, over replies
    count: int  # replies

    def line(self) -> str:
        low, high = self.interval
        return (
            f"held-out loss {self.loss:.4f} (95 % interval {low:.4f} to {high:.4f}), "
            f"perplexity {math.exp(min(self.loss, 99)):.2f}, {utils.counted(self.count, 'reply', 'replies')}"
        )


def evaluate(run: runs.Run, indices: Any, stop: StopRequest) -> Evaluation:
    """The loss over `indices` of the test replies, in fp32, without dropout."""

    def compute(plans: list[packing.MicroBatchPlan], micro_batches: Iterable[Any]) -> Tensor:
        lengths = reply_lengths(run.eval_data, plans)
        results = torch.zeros(len(lengths), device=run.model.device)
        for rank_batch, batch in micro_batches:
            run.world.check(stop)
            with torch.no_grad(), run.model.in_fp32():
                logprobs, _ = run.model(*batch.inputs())
            if rank_batch.weight:
                results[rank_batch.positions] = by_reply(logprobs, lengths[rank_batch.positions])
        return run.world.all_reduce(results, stop)

    run.model.eval()
    plans, results = run.batcher.run(run.eval_data, indices, compute, is_training=False)  # (N,)
    run.model.train()
    lengths = reply_lengths(run.eval_data, plans)
    return evaluation_of(-results.cpu().double().numpy(), lengths)


def evaluation_of(losses: np.ndarray, lengths: np.ndarray) -> Evaluation:
    """From the loss (N,) and the tokens (N,) of each reply: the ratio of their sums, and the ratio's standard error."""
    loss, count = losses.sum() / lengths.sum(), len(losses)
    spread = (losses - loss * lengths).std(ddof=1) if count > 1 else math.inf
    error = spread * math.sqrt(count) / lengths.sum()
    return Evaluation(float(loss), (float(loss - 1.96 * error), float(loss + 1.96 * error)), count)


# -- The run -----------------------------------------------------------------------------------------------------------


def main(argv: list[str]) -> None:
    with launch.joined() as world:
        with world.first_on_each_machine():
            config, resumed_from = read_config(SupervisedTrainingConfig, argv, __doc__.split("\n\n")[0])
        run = setup.set_up(config, resumed_from, world, open_parts, Path(__file__).name)
        if not run.has_nothing_to_do():
            with runs.supervised(run, resumed_from) as stop:
                last = train(run, stop)
            print(summary(run, last), flush=True)
        del run


def open_parts(config: SupervisedTrainingConfig, resumed_from: Path | None, world: distributed.World) -> setup.Parts:
    """The replies and the policy of a run; everything else of it is the same for every training."""
    date = tokenizers.UNKNOWN_DATE if resumed_from else world.broadcast(datetime.datetime.now())
    name = str(resumed_from or config.model)
    tokenizer = tokenizers.load_tokenizer(name, date)
    ends = tokenizers.end_ids(name if not config.lora else config.model, tokenizer)
    train, test = dialogues.load_dialogues(
        sources.DataSpec.of(config), tokenizer, config.max_length, ends, config.replies == "both"
    )
    setup.check_data(config, world, train, test)
    if resumed_from:
        base = config.model if config.lora else None
        model = models.PolicyModel.restore(resumed_from, base, tokenizer)
    else:
        model = models.PolicyModel.create(config.model, setup.lora_settings(config), config.seed, tokenizer)
    log_probs.check_head(model)
    model.hf_model.generation_config.eos_token_id = sorted(ends)  # where chat.py, and any other program, stops
    return setup.Parts(model, train, test)


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

            # choose replies, forward and backward
            plans, results = gradients_of_step(run, step, stop)
            tokens = int(reply_lengths(run.train_data, plans).sum())

            # clip; max_norm infinity measures without clipping
            grad_norm = torch.nn.utils.clip_grad_norm_(parameters, config.max_grad_norm or math.inf)
            grad_norm = float(run.world.gather_full(grad_norm))
            loss = float(-results.sum()) / tokens
            is_finite = math.isfinite(loss) and math.isfinite(grad_norm)

            # update
            run.complete_step(step, is_finite)
            if not is_finite:
                indices = np.concatenate([plan.indices for plan in plans])
                shown.say(run.explain_skipped_step(indices, results.isfinite().cpu().numpy()))

            # log
            seconds = time.perf_counter() - started
            metrics = {
                "train/loss": loss,
                "train/grad_norm": grad_norm,
                "train/lr": run.optimizer.param_groups[0]["lr"],
                "train/skipped_steps": run.skipped_steps,
                "train/step_time": seconds,
                "train/reply_tokens_per_second": tokens / seconds,
                "train/useful_tokens": sum(p.needed_tokens for p in plans) / sum(p.computed_tokens for p in plans),
                "train/peak_memory_gib": devices.peak_gib(run.model.device),
            }
            log.scalars(metrics, step, run.examples_seen(step))
            shown.update(step, f"loss {loss:.4f}", f"{len(results) / seconds:.1f} replies/s")

            # evaluate
            if run.is_evaluation_missing:
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


def evaluate_and_show(
    run: runs.Run, log: logger.TensorBoardLogger, shown: ProgressBar, stop: StopRequest
) -> Evaluation:
    """Evaluate after the last completed step, always on the same replies; record, log and print the result."""
    config = run.config
    indices = sampler.fixed_sample(len(run.eval_data), config.eval_num_batches * config.batch_size, config.seed)
    evaluation = evaluate(run, indices, stop)
    low, high = evaluation.interval
    run.record_evaluation(-evaluation.loss, (-high, -low), evaluation.count)
    log.scalars({"eval/loss": evaluation.loss}, run.step, run.examples_seen(run.step))
    shown.say(f"step {run.step}: {evaluation.line()}")
    return evaluation


def summary(run: runs.Run, evaluation: Evaluation | None) -> str:
    """The end of a run: how good the model is, where it was saved, what to type next."""
    replies = utils.counted(run.examples_seen(run.step), "reply", "replies")
    lines = [f"done: {utils.counted(run.step, 'step')}, {replies}"]
    if run.skipped_steps:
        lines.append(f"{run.skipped_steps:,} of these steps were skipped: their loss or gradient was not finite")
    if evaluation:
        lines.append(evaluation.line())
    saved = step_folder(run.folder, run.step)
    lines += [f"checkpoint: {saved}", "next:"]
    logs, model = shlex.quote(run.config.log_dir), shlex.quote(str(saved))
    lines += [f"  tensorboard --logdir {logs}", f"  python chat.py --model {model}"]
    return "\n".join(lines)


if __name__ == "__main__":
    launch.leave(utils.run_script(main))
