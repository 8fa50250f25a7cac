"""A policy run's report.html: how good it became, drawn against how far it went, and replies before and after.

The judge that was not trained on shows where a policy pleases its reward model and nobody else (Gao et al. 2022, arXiv
2210.10760). The page itself is policy_report.html.jinja.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes

import utils
from checkpointing.rollout_file import HELD_OUT, ROLLOUTS, KeptReply, RolloutReader, reading
from checkpointing.run_folder import step_folders
from common import pages
from common.pages import Palette, Plot
from grpo.evaluation import Evaluation
from utils import UserError

FOLDER, PAGE, PLOT = "reports", "report.html", "overoptimization.svg"
CLEAR_FALL = 0.02  # of the judge's win rate from its peak, from which the sentence speaks of overoptimization
CLEAR_CHANGE = 0.2  # of the length of replies, from which it is named
MOST_READ = 5  # prompts of each kind
FIRST_WORDS = 90  # characters of a prompt beside a folded pair


def conclusion(run: Any, history: Sequence[Evaluation]) -> list[str]:
    """How good the policy became, and where its judge liked it best, in lines; the main process writes the page."""
    if not history:
        return ["nothing is held out: this run cannot say how good the policy is"]
    saved = {path.name for path in step_folders(run.folder)}
    lines = [history[-1].line()]
    if run.world.is_main:
        folder = run.folder / FOLDER
        folder.mkdir(exist_ok=True)
        write(folder, run.folder, history, findings(history, saved))
        lines.append(f"report: {utils.seen_from_here(str(folder / PAGE))}")
    if sentence := peak(history, saved):
        lines.append(sentence)
    return lines


def peak(history: Sequence[Evaluation], saved: set[str]) -> str:
    """A sentence about the evaluation that the judge liked best; `saved` are the names of the steps that are there."""
    known = [one for one in history if one.judge_win_rate is not None and one.step]
    if not known:
        return ""
    best, last = max(known, key=lambda one: one.judge_win_rate), known[-1]
    if best.judge_win_rate < 0.5:
        rate = f"{last.judge_win_rate:.1%}"
        return f"the judge that was not trained on likes the start better: win rate {rate} after step {last.step}"
    name = f"step-{best.step}"
    is_saved = name in saved
    if best.judge_win_rate - last.judge_win_rate < CLEAR_FALL:
        unless = "" if is_saved else ", which was not saved"
        return f"the judge that was not trained on likes {name} best: win rate {best.judge_win_rate:.1%}{unless}"
    advice = f"Use {name}, or try a larger --kl_coef" if is_saved else "Try a larger --kl_coef, or --save_steps"
    return (
        f"overoptimized: the judge's win rate fell from {best.judge_win_rate:.1%} at {name} to "
        f"{last.judge_win_rate:.1%}, while the reward went from {best.reward:.3f} to {last.reward:.3f}.\n  {advice}"
    )


def findings(history: Sequence[Evaluation], saved: set[str]) -> list[str]:
    """What stands out, in sentences."""
    first, last, found = history[0], history[-1], []
    if first.step == last.step:
        return ["It was evaluated once: there is nothing to compare."]
    if last.reward_low > first.reward_high:
        found.append(f"The reward rose from {first.reward:.3f} to {last.reward:.3f}, by more than the intervals.")
    elif last.reward_high < first.reward_low:
        found.append(f"The reward fell from {first.reward:.3f} to {last.reward:.3f}, by more than the intervals.")
    else:
        found.append(
            f"The reward went from {first.reward:.3f} to {last.reward:.3f}, which is within the intervals of "
            f"{last.count:,} prompts: more of them (--eval_num_prompts) or more steps would tell."
        )
    if first.tokens and abs(change := last.tokens / first.tokens - 1) > CLEAR_CHANGE:
        found.append(
            f"Replies became {'longer' if change > 0 else 'shorter'}, from {first.tokens:.0f} to {last.tokens:.0f} "
            "tokens: read some below, since reward models often like one length."
        )
    if last.judge_win_rate is None:
        found.append("No judge that was not trained on saw the replies (--gold_reward_model): read them yourself.")
    elif sentence := peak(history, saved):
        found.append(sentence[0].upper() + sentence[1:].replace("\n ", "") + ("" if sentence.endswith(".") else "."))
    return found


def write(folder: Path, run_folder: Path, history: Sequence[Evaluation], found: list[str]) -> None:
    """Write report.html, and the plot of it that documents use, each all or nothing."""
    drawn = plots(history)
    with pages.style(pages.ON_WHITE, drawn[0]):
        pages.figure(drawn[0], pages.ON_WHITE).savefig(folder / PLOT, metadata={"Date": None})
    texts, note = replies(run_folder / ROLLOUTS, history)
    pages.write(
        folder / PAGE, Path(__file__).with_name("policy_report.html.jinja"), drawn, {},
        run=run_folder.name, history=history, findings=found, readings=texts, note=note,
    )  # fmt: skip


# -- Plots -------------------------------------------------------------------------------------------------------------


def plots(history: Sequence[Evaluation]) -> list[Plot]:
    return [
        Plot(
            "overoptimization", "Win rate against the distance from the start",
            "To the right the policy is further from its start. As long as both lines rise the replies become better; "
            "where the reward model’s goes on and the other falls, the policy has learned to please it only.",
            lambda axes, palette: _win_rates(axes, palette, history),
        ),
        Plot(
            "reward", "Held-out reward",
            "The mean over prompts that it is not trained on, with its 95 % interval.",
            lambda axes, palette: _rewards(axes, palette, history),
        ),
        Plot(
            "length", "Length of the replies",
            "A length that moves on and on is the commonest way to please a reward model.",
            lambda axes, palette: _lengths(axes, palette, history),
        ),
    ]  # fmt: skip


def _win_rates(axes: Axes, palette: Palette, history: Sequence[Evaluation]) -> None:
    distances = [math.sqrt(max(0.0, one.kl)) for one in history]
    sides = [("", "o-", "accent", "under the reward model, which was trained on")]
    if all(one.judge_win_rate is not None for one in history):
        sides.append(("judge_", "s--", "second", "under a judge that was not"))
    for side, form, colour, label in sides:
        rates, low, high = (
            [getattr(one, f"{side}{name}") for one in history] for name in ("win_rate", "win_low", "win_high")
        )
        axes.plot(distances, rates, form, color=palette[colour], label=label)
        for at, below, above in zip(distances, low, high, strict=True):
            axes.plot([at, at], [below, above], color=palette[colour], linewidth=1, alpha=0.5)
    axes.axhline(0.5, color=palette["muted"], linewidth=1, linestyle=":")
    axes.set(xlabel="√KL from the start (nats a reply)", ylabel="win rate against the start", ylim=(0, 1))
    axes.legend(frameon=False, labelcolor=palette["ink"])


def _rewards(axes: Axes, palette: Palette, history: Sequence[Evaluation]) -> None:
    steps = [one.step for one in history]
    axes.plot(steps, [one.reward for one in history], "o-", color=palette["accent"])
    for one in history:
        if math.isfinite(one.reward_low):
            axes.plot([one.step] * 2, [one.reward_low, one.reward_high], color=palette["accent"], alpha=0.5)
    axes.set(xlabel="step", ylabel="reward")


def _lengths(axes: Axes, palette: Palette, history: Sequence[Evaluation]) -> None:
    axes.plot([one.step for one in history], [one.tokens for one in history], "o-", color=palette["accent"])
    axes.set(xlabel="step", ylabel="tokens a reply", ylim=(0, 1.1 * max(1, *(one.tokens for one in history))))


# -- Replies -----------------------------------------------------------------------------------------------------------


def replies(path: Path, history: Sequence[Evaluation]) -> tuple[list[tuple[str, list[dict[str, Any]]]], str]:
    """Held-out replies before and after, by kind: those whose reward rose most, fell most, and some in between.

    Returns them, and why there are none.
    """
    first, last = history[0].step, history[-1].step
    if first == last:
        return [], ""
    try:
        with reading(path) as database:
            reader = RolloutReader(database, HELD_OUT)
            prompts = [one.prompt for one in reader.prompts(last)] if reader.exists else []
            before, after = (reader.replies_to(step, prompts) for step in (first, last))
    except UserError as error:
        return [], f"Replies cannot be shown: {error.what}."
    pairs = [
        _pair(before[prompt][0], after[prompt][0])
        for prompt in prompts
        if before[prompt] and after[prompt] and None not in (before[prompt][0].reward, after[prompt][0].reward)
    ]
    if not pairs:
        return [], "No replies to held-out prompts were kept (--save_rollouts)."
    pairs.sort(key=lambda pair: pair["change"])
    ends = min(MOST_READ, len(pairs) // 2)
    middle = pairs[ends : len(pairs) - ends]
    step = max(1, len(middle) // MOST_READ)
    kinds = [
        ("Whose reward rose most", pairs[len(pairs) - ends :][::-1]),
        ("In between", middle[step // 2 :: step][:MOST_READ]),
        ("Whose reward fell most", pairs[:ends]),
    ]
    return [(kind, found) for kind, found in kinds if found], ""


def _pair(before: KeptReply, after: KeptReply) -> dict[str, Any]:
    asked = " ".join(after.question.split())
    return {
        "question": after.question, "first_words": asked if len(asked) <= FIRST_WORDS else asked[:FIRST_WORDS] + "…",
        "change": after.reward - before.reward, "before": before, "after": after,
    }  # fmt: skip
