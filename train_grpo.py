"""Train a policy against a reward model: group-relative policy optimization (GRPO).

    python train_grpo.py --model ./checkpoints/sft/RUN --reward_model ./checkpoints/rm/RUN
    python train_grpo.py --model Qwen/Qwen3-0.6B --reward_model ./checkpoints/rm/RUN --lora
    python train_grpo.py --demo        everything from nothing: offline, some minutes on a laptop
    python train_grpo.py --resume_from ./checkpoints/grpo/RUN/step-20

Words: a *group* is the completions of one prompt; the *reference* is the policy as it was before the first step.
Letters: N prompts of a step, G completions of each, P tokens of completions.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import math
import shlex
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import utils
from checkpointing.rollout_file import ROLLOUTS, TRAINING, RolloutFile
from checkpointing.run_folder import step_folder
from common.flags import flag
from common.progress import ProgressBar
from training import launch
from training.config import TrainingConfig, read_config
from utils import StopRequest, UserError

with utils.lazy_imports():  # --help must not wait for torch
    import numpy as np
    import torch
    from torch import Tensor  # for annotations only

    import models
    from checkpointing import checkpoint
    from data_pipeline import dialogues, packing, sources
    from grpo import evaluation, loss, opening, report, rollouts
    from modeling import devices, log_probs, speedups, tokenizers
    from training import distributed, logger, setup
    from training import run as runs

COLUMNS = ("loss", "kl", "k3", "entropy", "clipped", "gap")  # what a step says of each completion, summed over tokens


@dataclass(frozen=True)
class PolicyTrainingConfig(TrainingConfig):
    """What training a policy has beside the settings of every training; redefined ones keep their place."""

    unit: ClassVar[str] = "prompts"
    eval_metric: ClassVar[str] = "reward"
    lora_settings: ClassVar[dict[str, Any]] = {"lr": 1e-5, "lora_dropout": 0.0}
    demo_settings: ClassVar[dict[str, Any]] = {
        "batch_size": 16, "lr": 4e-4, "warmup_steps": 5, "kl_coef": 0.5, "max_new_tokens": 64, "max_steps": 30,
        "eval_steps": 10, "save_steps": 10, "gradient_checkpointing": False, "eval_num_prompts": 0,
    }  # fmt: skip

    # fmt: off
    reward_model: str | None = flag(None, "reward model: checkpoint, run, folder or hub id", group="model and data", on_resume="exact")
    gold_reward_model: str | None = flag(None, "another reward model that only judges, to see whether replies are better or only please the first", group="model and data")
    model: str = flag("Qwen/Qwen3-0.6B", "policy to start from: hub id, local folder or run", group="model and data", on_resume="exact")
    max_length: int = flag(2048, "longest sequence in tokens: here always --prompt_max_length + --max_new_tokens", minimum=8, below=2**31, group="model and data", on_resume="not stored")
    prompt_max_length: int = flag(512, "longest prompt in tokens; longer ones are skipped and counted", minimum=1, below=2**31, group="model and data", on_resume="exact")

    batch_size: int = flag(16, "prompts a step, if --grad_accum is 1", minimum=1, below=10**6, group="optimization", on_resume="exact")
    grad_accum: int = flag(1, "a step takes batch_size x grad_accum prompts", minimum=1, below=10**6, group="optimization", on_resume="exact")
    group_size: int = flag(8, "completions of each prompt", minimum=2, below=10**4, group="optimization", on_resume="exact")
    max_new_tokens: int = flag(256, "longest completion in tokens", minimum=1, below=2**20, group="optimization", on_resume="exact")
    temperature: float = flag(1.0, "of sampling, and of the log-probabilities that the loss is made of", above=0, below=100, group="optimization", on_resume="exact")
    lr: float = flag(1e-6, "learning rate of AdamW; the default with --lora is 1e-5", above=0, group="optimization")
    loss: str = flag("dapo", "mean over all tokens of a step (dapo), over completions of the mean over their tokens (grpo), or over tokens by the longest possible length (dr_grpo)", choices=("dapo", "grpo", "dr_grpo"), group="optimization")
    scale_rewards: str = flag("group", "divide advantages by the standard deviation of a group's rewards, of the step's, or not", choices=("group", "batch", "none"), group="optimization")
    cliprange: float = flag(0.2, "how far from 1 the probability ratio of a token counts", above=0, below=1e6, group="optimization")
    kl_coef: float = flag(0.05, "weight of the KL divergence from the reference in the loss", minimum=0, below=1e6, group="optimization")
    max_kl: float = flag(0.0, "stop when held-out replies are further than this from the reference, in nats a reply; 0 = never", minimum=0, below=1e9, group="optimization")
    truncated: str = flag("lowest", "a completion that reached --max_new_tokens gets the step's lowest reward, keeps its own, or is left out of the loss (mask)", choices=("lowest", "keep", "mask"), group="optimization", on_resume="exact")
    max_grad_norm: float = flag(1.0, "clip the gradient to this norm; 0 disables", minimum=0, below=1e30, group="optimization")

    generation_tokens: int = flag(65536, "tokens whose keys are held at once while sampling; larger steps are sampled in waves", minimum=1, below=2**40, group="speed and memory")
    lora_dropout: float = flag(0.0, "dropout on the adapters' input; it would make the two passes over a token differ", minimum=0, below=1, group="LoRA", on_resume="fixed")

    eval_num_prompts: int = flag(128, "held-out prompts of an evaluation, the same every time; 0 = all", minimum=0, below=10**12, group="evaluation and output")
    eval_steps: int = flag(10, "evaluate every N steps; 0 = at the end only", minimum=0, below=10**12, group="evaluation and output")
    save_steps: int = flag(20, "save a checkpoint every N steps; 0 = at the end only", minimum=0, below=10**12, group="evaluation and output")
    save_rollouts: bool = flag(True, "keep every completion in the run's rollouts.sqlite", group="evaluation and output")
    output_dir: str = flag("./checkpoints/grpo", "checkpoints go to OUTPUT_DIR/RUN_NAME/step-N", group="evaluation and output")
    log_dir: str = flag("./logs/grpo", "TensorBoard's files go to LOG_DIR/RUN_NAME", group="evaluation and output")
    # fmt: on

    def stored(self) -> dict[str, Any]:
        stored = super().stored()
        names = [name for name in ("reward_model", "gold_reward_model") if stored[name] and Path(stored[name]).exists()]
        return stored | {name: str(Path(stored[name]).absolute()) for name in names}

    def problems(self) -> list[str]:
        found = super().problems()
        if self.reward_model is None and not self.demo and not self.resume_from:
            found.append("--reward_model: expected a reward model, such as ./checkpoints/rm/RUN")
        if self.max_length not in (2048, self.prompt_max_length + self.max_new_tokens):
            found.append("--max_length: here --prompt_max_length and --max_new_tokens say how long a sequence can be")
        if self.fsdp:
            found.append("--fsdp: not for policies, whose sharded weights could not write replies")
        if self.lora_dropout:
            found.append("--lora_dropout: must be 0, or the probability ratio of a token would not be 1 at first")
        return found


# -- One step ----------------------------------------------------------------------------------------------------------


@dataclass
class Policy:
    """What a step needs beside the run: who writes and judges, and the reference."""

    writer: rollouts.Writer
    reference: Any  # a models.PolicyModel, or None if it is the run's own without its adapters

    def reference_logprobs(self, model: Any, inputs: tuple[Tensor, ...]) -> Tensor:
        """(P,) log-probabilities of the completions' tokens under the reference."""
        with torch.no_grad():
            if self.reference is not None:
                return self.reference(*inputs)[0]
            with model.peft_model.disable_adapter():
                return model(*inputs)[0]


def accumulate_gradients(
    run: runs.Run, policy: Policy, groups: rollouts.Groups, micro_batches: Iterable[Any], order: np.ndarray,
    advantages: Tensor, weights: Tensor, sampled: list[np.ndarray], stop: StopRequest,
) -> Tensor:  # fmt: skip
    """Forward and backward of a step's micro-batches; `COLUMNS` of each completion, (N, G, 6), in planned order.

    Args:
        order: (N,) the examples of `groups` in the order of the plans.
        advantages, weights: (N, G) of each completion, in the order of `groups`; a token's loss counts its
            completion's weight, so the gradient does not depend on how the step was cut.
        sampled: for each example the log-probabilities of its completions' tokens, as they were sampled.
    """
    config, device = run.config, run.model.device
    results = torch.zeros(len(order), groups.lengths.shape[1] - 1, len(COLUMNS), device=device)
    for rank_batch, batch in micro_batches:
        run.world.check(stop)
        examples = order[rank_batch.positions]
        lengths = torch.from_numpy(groups.lengths[examples, 1:].astype(np.int64)).flatten().to(device)  # (n · G,)
        advantage, weight = (
            values[torch.from_numpy(examples)].flatten().to(device).repeat_interleave(lengths)
            for values in (advantages, weights)
        )  # (P,) each
        inputs = batch.inputs()
        reference = policy.reference_logprobs(run.model, inputs)
        with run.world.sync_gradients(run.module, rank_batch):
            logprobs, entropy = run.module(*inputs)  # (P,) each
            # one update a batch: this forward pass is that of the policy that sampled
            old = logprobs.detach()
            losses, clipped = loss.token_loss(logprobs, old, reference, advantage, config.cliprange, config.kl_coef)
            (losses * weight).sum().mul(rank_batch.weight).backward()
        if rank_batch.weight:
            written = torch.from_numpy(np.concatenate([sampled[example] for example in examples.tolist()])).to(device)
            of_tokens = [losses.detach() * weight, old - reference, loss.k3(old, reference), entropy.detach(), clipped,
                         (old - written).abs()]  # fmt: skip
            parts = torch.stack([values.float() for values in of_tokens]).split(lengths.tolist(), dim=1)
            sums = torch.stack([part.sum(dim=1) for part in parts])  # (n · G, 6)
            results[rank_batch.positions] = sums.unflatten(0, (len(examples), -1))
    return results


def learn(
    run: runs.Run, policy: Policy, found: rollouts.Rollouts, step: int, stop: StopRequest
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradient of a step's completions.

    Returns `COLUMNS` of each completion (N, G, 6), the advantages (N, G) and which groups had spread (N,).
    """
    config, groups = run.config, found.groups()
    advantages, has_spread = loss.advantages(rollouts.judged(found, config.truncated), config.scale_rewards)
    counted = torch.where(found.is_finished, found.lengths, 0) if config.truncated == "mask" else found.lengths
    weights = loss.token_weights(counted, config.loss, config.max_new_tokens)
    sampled = [np.concatenate([np.array(reply.logprobs, np.float32) for reply in group]) for group in found.replies]

    def compute(plans: list[packing.MicroBatchPlan], micro_batches: Iterable[Any]) -> Tensor:
        order = np.concatenate([plan.indices for plan in plans])
        results = accumulate_gradients(run, policy, groups, micro_batches, order, advantages, weights, sampled, stop)
        results = run.world.all_reduce(results, stop)
        speedups.densify_embedding_gradient(run.model)
        return results[torch.from_numpy(np.argsort(order))]

    def forget_first_try() -> None:
        run.optimizer.zero_grad(set_to_none=True)

    _, results = run.batcher.run(
        groups, np.arange(len(groups)), compute, is_training=True, before_retry=forget_first_try
    )
    return results.cpu(), advantages, has_spread


def step_metrics(found: rollouts.Rollouts, results: Tensor, has_spread: Tensor) -> dict[str, float]:
    """What a step's completions say, from `COLUMNS` of each, (N, G, 6)."""
    sums = dict(zip(COLUMNS, results.double().sum(dim=(0, 1)).tolist(), strict=True))
    tokens, replies = int(found.lengths.sum()), found.rewards.numel()
    return {
        "train/loss": sums["loss"],
        "train/reward": float(found.rewards.mean()),
        "train/reward_std_in_group": float(found.rewards.std(dim=1).mean()),
        "train/kl": sums["kl"] / replies,
        "train/kl_k3": sums["k3"] / replies,
        "train/entropy": sums["entropy"] / tokens,
        "train/clip_fraction": sums["clipped"] / tokens,
        "train/logprob_gap": sums["gap"] / tokens,
        "train/reply_tokens": tokens / replies,
        "train/truncated": float((~found.is_finished).float().mean()),
        "train/groups_without_spread": float((~has_spread).float().mean()),
        "train/distinct_3": rollouts.distinct_ngrams(found.replies),
    }


# -- The run -----------------------------------------------------------------------------------------------------------


def main(argv: list[str]) -> None:
    with launch.joined() as world:
        with world.first_on_each_machine():
            config, resumed_from = read_config(PolicyTrainingConfig, argv, __doc__.split("\n\n")[0])
            if config.demo:
                config = dataclasses.replace(config, **evaluation.demo_models(config))
        config = opening.with_fixed_models(config, resumed_from)
        judges: dict[str, Any] = {}

        def open_parts(*arguments: Any) -> setup.Parts:
            judges.update(opening.open_judges(config))
            parts = open_policy(*arguments)
            opening.check_positions(judges, config, parts)
            return parts

        run = setup.set_up(config, resumed_from, world, open_parts, Path(__file__).name)
        if not run.has_nothing_to_do():
            with runs.supervised(run, resumed_from) as stop:
                trained = train(run, judges, stop)
            print(trained, flush=True)
        del run


def open_policy(config: PolicyTrainingConfig, resumed_from: Path | None, world: distributed.World) -> setup.Parts:
    """The prompts and the policy of a run; everything else of it is the same for every training."""
    date = tokenizers.UNKNOWN_DATE if resumed_from else world.broadcast(datetime.datetime.now())
    tokenizer = tokenizers.load_tokenizer(str(resumed_from or config.model), date)
    train, test = dialogues.load_prompts(sources.DataSpec.of(config), tokenizer, config.prompt_max_length)
    setup.check_data(config, world, train, test)
    if resumed_from:
        policy = models.PolicyModel.restore(resumed_from, config.model if config.lora else None, tokenizer)
    else:
        policy = models.PolicyModel.create(config.model, setup.lora_settings(config), config.seed, tokenizer)
    log_probs.check_head(policy)
    speedups.remove_dropout(policy)
    policy.temperature = config.temperature
    policy.hf_model.generation_config.eos_token_id = sorted(tokenizers.end_ids(config.model, tokenizer))
    longest = max(int(each.lengths.max(initial=0)) for each in (train, test)) + config.max_new_tokens
    if (limit := policy.most_positions()) is not None and longest > limit:
        raise UserError(
            f"the model has {limit:,} positions, and a prompt with its completion can have {longest:,} tokens",
            next="a smaller --prompt_max_length or --max_new_tokens",
        )
    widest = np.zeros(int(train.lengths.max()), np.int32), np.zeros(config.max_new_tokens, np.int32)
    group = [widest[0], *[widest[1]] * config.group_size]
    return setup.Parts(policy, train, test, rollouts.Groups([group] * config.examples_per_step))


def train(run: runs.Run, judges: dict[str, Any], stop: StopRequest) -> str:
    """From the step after the last completed one to the end; returns what to print then."""
    config, total_steps, world = run.config, run.sampler.total_steps, run.world
    ends = set(run.model.hf_model.generation_config.eos_token_id)
    policy = Policy(
        rollouts.Writer(
            run.model, judges["reward_model"], run.train_data, world, seed=config.seed,
            max_new_tokens=config.max_new_tokens, ends=ends, keys_at_once=config.generation_tokens,
        ),
        opening.open_reference(run),
    )  # fmt: skip
    log = logger.TensorBoardLogger(run.log_folder, run.step, run.examples_seen(run.step))
    log.table("config", dataclasses.asdict(config), run.step)
    kept = RolloutFile(run.folder / ROLLOUTS if config.save_rollouts and world.is_main else None, run.step)
    shown = ProgressBar("step", total_steps, done=run.step, is_shown=world.is_main)
    parameters = list(run.model.trained_parameters().values())
    checkpoint.set_random_state(run.random_state)
    judge = evaluation.Judge(run, policy, judges, kept, lambda: world.check(stop))
    try:
        with contextlib.closing(kept):
            if run.step == 0 or run.is_evaluation_missing:
                judge.evaluate_and_show(log, shown, stop)
            if run.step and judge.is_too_far(config.max_kl):
                shown.say(f"step {run.step} is further from the reference than --max_kl {config.max_kl:g}: raise it")
                total_steps = run.step
            for step in range(run.step + 1, total_steps + 1):
                clock = Clock()

                # prompts, completions, rewards
                indices = run.sampler.indices_for(step)
                found = policy.writer.write(indices, config.group_size, step, lambda: world.check(stop))
                clock.lap("rollout")

                # advantages, log-probabilities, loss, gradient
                results, advantages, has_spread = learn(run, policy, found, step, stop)
                grad_norm = torch.nn.utils.clip_grad_norm_(parameters, config.max_grad_norm or math.inf)
                grad_norm = float(world.gather_full(grad_norm))
                metrics = step_metrics(found, results, has_spread)
                is_finite = math.isfinite(metrics["train/loss"]) and math.isfinite(grad_norm)

                # update, once the replies that it comes from are kept
                kept.add(TRAINING, rollouts.kept_rows(step, found, advantages, results[..., 1]))
                run.complete_step(step, is_finite)
                if not is_finite:
                    is_fine = results[..., 0].isfinite().all(dim=1).numpy()
                    shown.say(run.explain_skipped_step(indices, is_fine))
                clock.lap("update")

                # log
                tokens = int(found.lengths.sum())
                metrics |= {
                    "train/grad_norm": grad_norm,
                    "train/lr": run.optimizer.param_groups[0]["lr"],
                    "train/skipped_steps": run.skipped_steps,
                    "train/step_time": clock.total(),
                    "train/tokens_per_second": tokens / clock.total(),
                    **{f"train/{phase}_seconds": seconds for phase, seconds in clock.laps.items()},
                    "train/peak_memory_gib": devices.peak_gib(run.model.device),
                }
                log.scalars(metrics, step, run.examples_seen(step))
                shown.update(step, *figures(metrics))

                # evaluate
                if run.is_evaluation_missing:
                    judge.evaluate_and_show(log, shown, stop)

                # save
                if run.is_save_due:
                    shown.say(f"saved {run.save()}")
                world.check(stop)
                if judge.is_too_far(config.max_kl):
                    shown.say(f"stopped: held-out replies are {judge.last.kl:.2f} nats from the reference, --max_kl is "
                              f"{config.max_kl:g}. Try a larger --kl_coef, or a smaller --lr")  # fmt: skip
                    if run.saved_step != run.step:
                        shown.say(f"saved {run.save()}")
                    break
    finally:
        shown.close()
        log.close()
    return summary(run, judge)


class Clock:
    """Seconds of the phases of one step."""

    def __init__(self) -> None:
        self.started = self.last = time.perf_counter()
        self.laps: dict[str, float] = {}

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.laps[name], self.last = now - self.last, now

    def total(self) -> float:
        return self.last - self.started


# -- Around the loop ---------------------------------------------------------------------------------------------------


def figures(metrics: dict[str, float]) -> Iterator[str]:
    """A step's metrics as the progress bar shows them."""
    yield f"reward {metrics['train/reward']:.3f}"
    yield f"KL {metrics['train/kl']:.2f}"
    yield f"{metrics['train/reply_tokens']:.0f} tokens a reply"
    yield f"{metrics['train/tokens_per_second']:.0f} tokens/s"


def summary(run: runs.Run, judge: evaluation.Judge) -> str:
    """The end of a run: how good the policy became, where it was saved, what to type next."""
    prompts = utils.counted(run.examples_seen(run.step), "prompt")
    lines = [f"done: {utils.counted(run.step, 'step')}, {prompts} with {run.config.group_size} completions each"]
    if run.skipped_steps:
        lines.append(f"{run.skipped_steps:,} of these steps were skipped: their loss or gradient was not finite")
    lines += report.conclusion(run, judge.history)
    saved = step_folder(run.folder, run.step)
    logs, policy, judge_folder = (
        shlex.quote(str(each)) for each in (run.config.log_dir, saved, run.config.reward_model)
    )
    lines += [f"checkpoint: {saved}", "next:", f"  tensorboard --logdir {logs}"]
    lines.append(f"  python chat.py --model {policy} --reward_model {judge_folder}")
    return "\n".join(lines)


if __name__ == "__main__":
    launch.leave(utils.run_script(main))
