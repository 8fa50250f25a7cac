"""How good a policy is on held-out prompts: its reward, how often it beats its start, and how far it moved from it.

The reward model that is trained against is a proxy: a policy learns to please it. A judge that was not trained on,
another reward model or the demo's own rules, says whether the replies are better; plotted against the square root of
the KL divergence, proxy and judge part where overoptimization begins (Gao et al. 2022, arXiv 2210.10760).

Letters: N held-out prompts.
"""

import contextlib
import dataclasses
import math
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import utils
from checkpointing.rollout_file import HELD_OUT, RolloutFile
from checkpointing.run_folder import FINISHED, record_or_none, step_folders
from common import atomic_files, json_records
from data_pipeline import demo, sampler
from grpo import rollouts
from utils import StopRequest, UserError

SAME_DRAWS = 2**40  # in place of a step's number: the same draws in every evaluation
HISTORY = "evaluations.json"
MOST_KEPT = 256  # held-out replies of each evaluation that are kept


@dataclass(frozen=True)
class Evaluation:
    """One evaluation; intervals are of 95 %."""

    step: int
    count: int
    reward: float
    reward_low: float
    reward_high: float
    win_rate: float  # against the replies of the start to the same prompts, ties as half
    win_low: float
    win_high: float
    kl: float  # from the start, nats a reply
    tokens: float  # a reply
    truncated: float  # share of replies
    judge: float | None = None  # mean of the judge that was not trained on: its reward, or the share that keeps rules
    judge_win_rate: float | None = None
    judge_win_low: float | None = None
    judge_win_high: float | None = None

    def line(self) -> str:
        judged = ""
        if self.judge_win_rate is not None:
            judged = f", judge {self.judge:.3f}, its win rate {self.judge_win_rate:.1%}"
        return (
            f"held-out reward {self.reward:.3f} (95 % interval {self.reward_low:.3f} to {self.reward_high:.3f}), "
            f"win rate {self.win_rate:.1%} ({self.win_low:.1%} to {self.win_high:.1%}){judged}, "
            f"KL {self.kl:.2f}, {self.count:,} prompts"
        )


class Judge:
    """Evaluates one run, always on the same prompts with the same draws."""

    def __init__(
        self, run: Any, policy: Any, judges: dict[str, Any], kept: RolloutFile, check_stop: Callable[[], None]
    ):  # fmt: skip
        """`policy` is train_grpo.py's: a writer, and the reference, None for the run's own without adapters."""
        self.run, self.policy, self.kept, self.check_stop = run, policy, kept, check_stop
        self.scorer, self.gold = judges["reward_model"], judges.get("gold_reward_model")
        self.knows_rules = self.gold is None and demo.is_demo(run.config.dataset)
        self.history: list[Evaluation] = []
        path = run.folder / HISTORY
        if run.step and path.is_file():
            try:
                found = [json_records.from_json(Evaluation, entry) for entry in utils.read_json(path)]
                self.history = [one for one in found if one.step <= run.step]
            except (ValueError, TypeError) as error:  # it is only drawn
                print(f"{path} cannot be read, so earlier evaluations are not drawn: {error}", flush=True)
        self._start: tuple[list[list[str]], Tensor, Tensor | None] | None = None

    @property
    def last(self) -> Evaluation:
        return self.history[-1]

    def is_too_far(self, max_kl: float) -> bool:
        return bool(max_kl and self.history and self.last.step == self.run.step and abs(self.last.kl) > max_kl)

    def evaluate_and_show(self, log: Any, shown: Any, stop: StopRequest) -> None:
        """Evaluate after the last completed step; record, log and print the result."""
        if not len(self.run.eval_data):
            return
        run, found = self.run, self.evaluate(stop)
        self.history = [one for one in self.history if one.step < run.step] + [found]
        run.record_evaluation(found.reward, (found.reward_low, found.reward_high), found.count)
        named = dataclasses.asdict(found)
        wanted = ("reward", "win_rate", "kl", "tokens", "truncated", "judge", "judge_win_rate")
        log.scalars(
            {f"eval/{name}": named[name] for name in wanted if named[name] is not None}, run.step,
            run.examples_seen(run.step),
        )  # fmt: skip
        if run.world.is_main:
            with atomic_files.atomic_file(run.folder / HISTORY) as file:
                file.write(utils.json_text([dataclasses.asdict(one) for one in self.history]))
        shown.say(f"step {run.step}: {found.line()}")

    def evaluate(self, stop: StopRequest) -> Evaluation:
        run, config = self.run, self.run.config
        indices = sampler.fixed_sample(len(run.eval_data), config.eval_num_prompts, config.seed)
        writer = rollouts.Writer(
            run.model, self.scorer, run.eval_data, run.world, seed=config.seed, max_new_tokens=config.max_new_tokens,
            ends=self.policy.writer.ends, keys_at_once=self.policy.writer.keys_at_once,
        )  # fmt: skip
        found = writer.write(indices, 1, SAME_DRAWS, self.check_stop)
        judged = self.judged(found)
        if self._start is None:
            with self.as_reference(writer):
                start = writer.write(indices, 1, SAME_DRAWS, self.check_stop)
            self._start = start.texts, start.rewards[:, 0], self.judged(start)
        start_texts, start_rewards, start_judged = self._start
        is_same = torch.tensor([one == other for one, other in zip(found.texts, start_texts, strict=True)])
        rewards = found.rewards[:, 0].double()
        error = 1.96 * float(rewards.std()) / math.sqrt(len(rewards)) if len(rewards) > 1 else math.inf
        mean = float(rewards.mean())
        wins = win_rate(found.rewards[:, 0], start_rewards, is_same)
        of_judge: dict[str, float] = {}
        if judged is not None:
            values = win_rate(judged, start_judged, is_same)
            names = ("judge_win_rate", "judge_win_low", "judge_win_high")
            of_judge = {"judge": float(judged.double().mean()), **dict(zip(names, values, strict=True))}
        kl = self.kl(found, stop)
        rows = rollouts.kept_rows(run.step, found, None, kl[:, None], None if judged is None else judged[:, None])
        self.kept.add(HELD_OUT, rows[:MOST_KEPT])
        return Evaluation(
            run.step, len(rewards), mean, mean - error, mean + error, *wins, float(kl.double().mean()),
            float(found.lengths.double().mean()), float((~found.is_finished).double().mean()), **of_judge,
        )  # fmt: skip

    def judged(self, found: rollouts.Rollouts) -> Tensor | None:
        """(N,) what the judge that was not trained on says of each reply; None without one."""
        if self.gold is not None:
            return rollouts.score(
                self.gold, found.messages, found.texts, found.tools, self.check_stop
            )[:, 0]  # fmt: skip
        if not self.knows_rules:
            return None
        return torch.tensor([
            float(demo.keeps_rules(messages, texts[0]))
            for messages, texts in zip(found.messages, found.texts, strict=True)
        ])  # fmt: skip

    @contextlib.contextmanager
    def as_reference(self, writer: rollouts.Writer) -> Iterable[None]:
        """The writer writes as the reference does."""
        if self.policy.reference is not None:
            writer.policy = self.policy.reference
            yield
        else:
            with self.run.model.peft_model.disable_adapter():
                yield

    def kl(self, found: rollouts.Rollouts, stop: StopRequest) -> Tensor:
        """(N,) log p - log p_ref of each reply, summed over its tokens."""
        run, groups = self.run, found.groups()

        def compute(plans: list[Any], micro_batches: Iterable[Any]) -> Tensor:
            order = np.concatenate([plan.indices for plan in plans])
            results = torch.zeros(len(order), device=run.model.device)
            for rank_batch, batch in micro_batches:
                run.world.check(stop)
                inputs = batch.inputs()
                with torch.no_grad():
                    difference = run.model(*inputs)[0] - self.policy.reference_logprobs(run.model, inputs)
                if rank_batch.weight:
                    lengths = groups.lengths[order[rank_batch.positions], 1].tolist()
                    results[rank_batch.positions] = torch.stack([part.sum() for part in difference.split(lengths)])
            return run.world.all_reduce(results, stop)[torch.from_numpy(np.argsort(order))]

        _, results = run.batcher.run(groups, np.arange(len(groups)), compute, is_training=False)
        return results.cpu()


def win_rate(rewards: Tensor, start: Tensor, is_same: Tensor) -> tuple[float, float, float]:
    """The share of replies that beat the start's, ties as half, with its 95 % interval.

    `is_same` (N,) says which are the same text: a tie, even where rounding gave it another reward.
    """
    start = torch.where(is_same, rewards, start)
    wins = float((rewards > start).double().sum() + 0.5 * (rewards == start).double().sum())
    low, high = utils.wilson_interval(wins, len(rewards))
    return wins / len(rewards), low, high


# -- The demo ----------------------------------------------------------------------------------------------------------


def demo_models(config: Any) -> dict[str, str]:
    """The reward model and the start of the demo, unless others are named; trained now if they are not there."""
    found = {}
    if not config.reward_model:
        found["reward_model"] = _trained("train_rm.py", Path("checkpoints/rm/demo"), "--no_report")
    if Path(config.model).resolve() == Path("demo/model").resolve():
        found["model"] = _trained("train_sft.py", Path("checkpoints/sft/demo"))
    return found


def _trained(script: str, folder: Path, *more: str) -> str:
    """A run of the demo, begun or resumed if it is not finished."""
    record = record_or_none(folder)
    if record and record.state == FINISHED and step_folders(folder):
        return str(folder)
    words = ["--resume_from", str(folder)] if step_folders(folder) else ["--demo", "--run_name", folder.name, *more]
    print(f"python {script} {' '.join(words)}", flush=True)
    code = utils.run_child([sys.executable, str(Path(__file__).resolve().parent.parent / script), *words])
    if code:
        raise UserError(f"{script} ended with {code}, so the demo cannot go on", next="the same command goes on")
    return str(folder)
