"""The Rollouts tab: the replies that a policy was trained on, by step and prompt, and how they changed.

Reads the runs' files and nothing else; no model needs to be loaded. What models wrote is only ever shown as text.
"""

import functools
import html
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr

import utils
from chat_app.engine import ChatEngine
from chat_app.events import QUIET, errors_shown
from checkpointing import rollout_file, run_folder
from checkpointing.rollout_file import (
    AT_LIMIT,
    BY_ITSELF,
    HELD_OUT,
    TRAINING,
    CurvePoint,
    KeptReply,
    ReplyFilter,
    RolloutReader,
)
from run_manager.inventory import UNKNOWN, Roots, RunInfo, read_state
from utils import UserError, counted

ALL_PROMPTS = NOTHING = -1  # beside the prompts and steps to choose from
PAGE = 50  # replies shown at first, and with each "Show more"
SORTS = {
    "reward": "reward", "advantage": "advantage", "KL": "kl", "length": "tokens", "reward change": "change",
    "as sampled": "completion",
}  # fmt: skip
CURVES = {"reward": "Mean reward", "kl": "KL from the start (nats)", "tokens": "Tokens a reply",
          "truncated": "Share cut at the limit"}  # fmt: skip
NAMES = {TRAINING: "training", HELD_OUT: "held-out"}


@dataclass(frozen=True)
class View:
    """What the visitor has chosen; None leaves a choice to the tab."""

    run: str | None
    table: str
    step: int | None
    prompt: int | None
    old: int | None  # the step beside which `step` is shown
    sort: str
    is_descending: bool
    text: str
    ended: str
    low: str
    high: str

    def wanted(self, limit: int) -> ReplyFilter:
        """The filter that was chosen; UserError if a reward is no number."""
        rewards = []
        for word, given in (("from", self.low), ("to", self.high)):
            try:
                rewards.append(float(given.replace(",", ".").replace("\N{MINUS SIGN}", "-")) if given.strip() else None)
            except ValueError:
                raise UserError(f"Reward {word}: expected a number, got {given[:40]!r}") from None
        return ReplyFilter(self.text, self.ended, *rewards, self.sort, self.is_descending, limit)


class RolloutsTab:
    """The tab's components. Every choice reads the file again, so what a training adds meanwhile is seen."""

    def __init__(self, engine: ChatEngine, tab: gr.Tab, policy_dir: Path):
        self.engine, self.policy_dir = engine, policy_dir
        with gr.Row():
            run = gr.Dropdown([], label="Run", elem_id="rollouts-run", scale=3, min_width=280)
            tables = [("trained on", TRAINING), ("held out", HELD_OUT)]
            table = gr.Radio(tables, value=TRAINING, label="Prompts", elem_id="rollouts-table", scale=2, min_width=240)
            refresh = gr.Button("Refresh", size="md", elem_id="rollouts-refresh", min_width=100)
        with gr.Row():
            step = gr.Dropdown([], label="Step", elem_id="rollouts-step", min_width=120)
            old = gr.Dropdown([], label="Compare with", elem_id="rollouts-old", min_width=120)
            prompt = gr.Dropdown([], label="Prompt", elem_id="rollouts-prompt", scale=3, min_width=280)
            earlier = gr.Button("‹ Earlier step", size="md", elem_id="rollouts-earlier", min_width=100)
            later = gr.Button("Later step ›", size="md", elem_id="rollouts-later", min_width=100)
        with gr.Accordion("Sort and filter", open=False), gr.Row():
            sort = gr.Dropdown(list(SORTS.items()), value="reward", label="Sort by", min_width=140)
            is_descending = gr.Checkbox(True, label="highest first", min_width=140)
            text = gr.Textbox("", label="Reply contains", elem_id="rollouts-text", min_width=180)
            endings = [("in any way", ""), (BY_ITSELF, BY_ITSELF), (AT_LIMIT, AT_LIMIT)]
            ended = gr.Dropdown(endings, value="", label="Ended", min_width=140)
            # not gr.Number, which turns an empty field into 0 when it is opened
            low, high = (
                gr.Textbox("", label=f"Reward {word}", elem_id=f"rollouts-{word}", min_width=110, placeholder="any")
                for word in ("from", "to")
            )
        with gr.Row(elem_classes="rollouts"):
            with gr.Column(scale=3, min_width=320):
                replies = gr.HTML(elem_id="rollouts-replies")
                more = gr.Button("Show more", size="md", visible=False, elem_id="rollouts-more")
            with gr.Column(scale=1, min_width=280):
                curves = gr.HTML(elem_id="rollouts-curves")
        newest, limit = gr.State(), gr.State(PAGE)

        choices = [run, table, step, prompt, old, sort, is_descending, text, ended, low, high]
        shown = [newest, limit, step, prompt, old, replies, more, curves]
        # all of them in one queue, so that the last choice counts
        in_turn = {**QUIET, "trigger_mode": "multiple", "concurrency_id": "rollouts", "concurrency_limit": 1}
        gr.on([tab.select, refresh.click], self.refresh, [newest, limit, *choices], [run, *shown], **in_turn)
        gr.on([run.input, table.input], self.show_other, choices, shown, **in_turn)
        changes = [each.input for each in (step, prompt, old, sort, is_descending, ended)]
        changes += [each.change for each in (text, low, high)]  # their `input` misses what is deleted or pasted
        gr.on(changes, lambda *values: self.show(PAGE, View(*values)), choices, shown, **in_turn)
        for button, distance in ((earlier, -1), (later, 1)):
            button.click(functools.partial(self.move, distance), choices, shown, **in_turn)
        more.click(lambda limit, *values: self.show(limit + PAGE, View(*values)), [limit, *choices], shown, **in_turn)

    # -- What a click does ---------------------------------------------------------------------------------------------

    def refresh(self, newest: int | None, limit: int, *values: Any) -> list[Any]:
        """The runs and the chosen one's replies as they are now; who was at the newest step stays there."""
        view = View(*values)
        with errors_shown(self.engine):
            runs = list_runs(self.policy_dir)
            if not runs:
                none = UserError(
                    "no policy runs here", where=self.policy_dir,
                    next="python train_grpo.py --demo makes one; chat.py --policy_dir names another folder",
                )  # fmt: skip
                return [gr.Dropdown([], value=None), *unreadable(none)]
        labels = [(run_label(run), run.name) for run in runs]
        names = [run.name for run in runs]
        name = view.run if view.run in names else names[0]
        step = None if view.step == newest or name != view.run else view.step
        view = View(name, view.table, step, *values[3:])
        return [gr.Dropdown(labels, value=name), *self.show(limit, view)]

    def show_other(self, run: str, table: str, step: int, prompt: int, old: int, *values: Any) -> list[Any]:
        """Another run, or its other prompts: begin at its newest step."""
        return self.show(PAGE, View(run, table, None, None, None, *values))

    def move(self, distance: int, *values: Any) -> list[Any]:
        """The step before the chosen one, or the one after it."""
        return self.show(PAGE, View(*values), distance)

    def show(self, limit: int, view: View, distance: int = 0) -> list[Any]:
        """New values of everything below the choice of run and prompts."""
        with errors_shown(self.engine):
            try:
                with rollout_file.reading(self.file_of(view.run)) as database:
                    readers = {table: RolloutReader(database, table) for table in NAMES}
                    return page(readers, view, limit, distance)
            except (UserError, OSError) as error:
                return unreadable(error)

    def file_of(self, run: str | None) -> Path:
        """The file of a run in the folder: a visitor's browser may ask for any name."""
        names = {path.name for path in self.policy_dir.iterdir() if not path.is_symlink()}
        if run not in names:
            raise UserError("this run is gone", where=self.policy_dir, next="Refresh")
        return self.policy_dir / run / rollout_file.ROLLOUTS


def list_runs(policy_dir: Path) -> list[RunInfo]:
    """The runs that are being trained, then the others, the newest first. Links and hidden folders are skipped."""
    dated = []
    for path in policy_dir.iterdir() if policy_dir.is_dir() else []:
        kept = [path / name for name in (rollout_file.ROLLOUTS, run_folder.RUN) if (path / name).is_file()]
        if kept and not path.is_symlink() and not path.name.startswith("."):
            run = RunInfo(Roots(policy_dir, policy_dir), path.name, path)
            read_state(run)
            started = run.started.timestamp() if run.started else kept[0].stat().st_mtime
            dated.append((run.state == run_folder.RUNNING, started, run.name, run))
    return [run for *_, run in sorted(dated, key=lambda entry: entry[:3], reverse=True)]


# -- What is shown -----------------------------------------------------------------------------------------------------


def unreadable(error: Exception) -> list[Any]:
    """Values of everything shown, for what cannot be read."""
    nothing = gr.Dropdown([], value=None)
    message = f"<pre>{html.escape(str(error))}</pre>"
    return [None, PAGE, nothing, nothing, nothing, message, gr.Button(visible=False), ""]


def page(readers: dict[str, RolloutReader], view: View, limit: int, distance: int = 0) -> list[Any]:
    """Values of everything shown, for the choices that there are: what is not there is replaced."""
    reader = readers[view.table]
    steps = reader.steps()
    curves = {table: each.curve(steps if each is reader else each.steps()) for table, each in readers.items()}
    if not steps:
        return [*unreadable(UserError(*nothing_yet(view.table)))[:-1], drawn_curves(curves, None)]
    at = steps.index(view.step) if view.step in steps else len(steps) - 1
    step = steps[min(max(at + distance, 0), len(steps) - 1)]
    is_held_out = view.table == HELD_OUT

    prompts = reader.prompts(step)
    known = {each.prompt for each in prompts} | {ALL_PROMPTS}
    default = ALL_PROMPTS if is_held_out else prompts[0].prompt
    prompt = view.prompt if view.prompt in known else default
    labels = [(prompt_label(each), each.prompt) for each in prompts]
    offered = [(f"all {len(prompts):,} prompts of this step", ALL_PROMPTS), *labels]

    if prompt == ALL_PROMPTS:  # training takes other prompts at each step: two steps of all have nothing in common
        others = steps if is_held_out else []
    else:
        others = reader.steps_of(prompt, steps)
    default = others[0] if is_held_out else NOTHING
    old = default if view.old is None else view.old if view.old in others else NOTHING
    beside = [("nothing", NOTHING), *((f"step {other}", other) for other in others if other != step or other == old)]

    wanted = view.wanted(limit)
    compared_with = old if old not in (NOTHING, step) else None
    if prompt == ALL_PROMPTS:
        content, is_more = of_all_prompts(reader, step, compared_with, wanted)
    else:
        content, is_more = of_one_prompt(reader, step, compared_with, prompt, wanted)
        if len(others) > 1 and compared_with is None:
            times = ", ".join(str(other) for other in others if other != step)
            content = f"<p>Also sampled at step {times}, see “Compare with”.</p>" + content
    return [
        steps[-1], limit, gr.Dropdown([(f"{each} of {steps[-1]}", each) for each in steps], value=step),
        gr.Dropdown(offered, value=prompt), gr.Dropdown(beside, value=old), content, gr.Button(visible=is_more),
        drawn_curves(curves, step),
    ]  # fmt: skip


def nothing_yet(table: str) -> tuple[str]:
    if table == TRAINING:
        return ("no step is complete yet: Refresh shows the first as soon as it is",)
    return ("no replies to held-out prompts are kept yet: the run's next evaluation keeps them",)


def run_label(run: RunInfo) -> str:
    name = utils.printable(run.name)
    return name if run.state == UNKNOWN else f"{name} ({run.state})"


def prompt_label(prompt: rollout_file.KeptPrompt) -> str:
    mean = "" if prompt.reward is None else f" · mean reward {prompt.reward:+.2f}"
    return f"{utils.printable(' '.join(prompt.first_words.split()))[:80]}{mean}"


def of_one_prompt(
    reader: RolloutReader, step: int, old: int | None, prompt: int, wanted: ReplyFilter
) -> tuple[str, bool]:  # fmt: skip
    """A prompt's replies at one step, or at two side by side, as HTML; and whether there are more."""
    columns, is_more, question = [], False, ""
    for each in sorted({step, step if old is None else old}):
        replies, count = reader.replies(each, prompt, wanted, old if each == step else None)
        everything = reader.replies_to(each, [prompt])[prompt]
        question, is_more = everything[0].question, is_more or count > len(replies)
        cards = "".join(card(reply, number) for number, reply in enumerate(replies, 1))
        columns.append(f"<section><h4>Step {each}: {group_figures(everything, count)}</h4>{cards}</section>")
    return f'{prompt_text(question)}<div class="columns">{"".join(columns)}</div>', is_more


def of_all_prompts(
    reader: RolloutReader, step: int, old: int | None, wanted: ReplyFilter
) -> tuple[str, bool]:  # fmt: skip
    """A step's replies to all prompts, each under its prompt and beside the prompt's older reply, as HTML."""
    replies, count = reader.replies(step, None, wanted, old)
    before = reader.replies_to(old, [reply.prompt for reply in replies]) if old is not None else {}
    entries = []
    for reply in replies:
        if old is None:
            content = card(reply)
        else:
            sides = sorted([(step, [reply]), (old, before[reply.prompt])], key=lambda side: side[0])
            columns = (f"<section><h4>Step {at}</h4>{''.join(map(card, found))}</section>" for at, found in sides)
            content = f'<div class="columns">{"".join(columns)}</div>'
        entries.append(f"<li>{prompt_text(reply.question)}{content}</li>")
    what = f"the first {len(replies):,} of {count:,}" if count > len(replies) else f"{count:,}"
    return f"<h4>Step {step}: {what} replies</h4><ol>{''.join(entries)}</ol>", count > len(replies)


def group_figures(replies: Sequence[KeptReply], count: int) -> str:
    """What a group's replies have in common."""
    rewards = [reply.reward for reply in replies if reply.reward is not None]
    parts = [counted(len(replies), "reply", "replies")]
    if count < len(replies):
        parts = [f"{count} of {parts[0]}"]
    if len(rewards) > 1:
        parts.append(f"mean reward {sum(rewards) / len(rewards):+.3f}")
    if len(replies) > 1 and all(reply.advantage == 0 for reply in replies):
        parts.append("equal rewards, so nothing was learned from them")
    return ", ".join(parts)


def prompt_text(question: str) -> str:
    return f'<div class="question"><b>Prompt</b>{as_text(question)}</div>'


def card(reply: KeptReply, number: int | None = None) -> str:
    """One reply with its numbers."""
    change = "" if reply.change is None else f" ({reply.change:+.3f})"
    named = [("reward", f"{figure(reply.reward, '+.3f')}{change}")]
    named += [("advantage", figure(reply.advantage, "+.2f"))] if reply.advantage is not None else []
    named += [("judge", figure(reply.judge, "+.2f"))] if reply.judge is not None else []
    named += [("KL", figure(reply.kl, ".2f")), ("tokens", str(reply.tokens)), ("ended", str(reply.ended))]
    first = "" if number is None else f"<b>{number}.</b> "
    numbers = "".join(f"<span>{name} <b>{html.escape(value)}</b></span> " for name, value in named)
    text = as_text(reply.reply) if reply.reply.strip() else '<p class="empty">(an empty reply)</p>'
    return f"<article><header>{first}{numbers}</header>{text}</article>"


def as_text(text: str) -> str:
    """What anybody may have written, as text; long ones scroll, with the keyboard too."""
    return f'<div class="text" dir="auto"{" tabindex=0" * (len(text) > 1200)}>{html.escape(text)}</div>'


def figure(value: float | None, form: str) -> str:
    return "not finite" if value is None else format(value, form)


# -- Curves ------------------------------------------------------------------------------------------------------------

WIDTH, HEIGHT, MARGIN = 300, 90, 4  # of a curve in its own units
MOST_DOTS = 40  # in a curve; of more, only their numbers are shown, under the mouse


def drawn_curves(curves: dict[str, list[CurvePoint]], step: int | None) -> str:
    """Each of `CURVES` by step, of training and of held-out replies, with the chosen step marked."""
    points = [point.step for table in curves.values() for point in table]
    if not points:
        return ""
    legend = '<p><svg viewBox="0 0 24 8"><path d="M0 4H24"/></svg> training '
    if curves[HELD_OUT]:
        legend += '<svg viewBox="0 0 24 8"><path d="M0 4H24" class="held_out"/></svg> held-out'
    found = []
    for name, title in CURVES.items():
        lines = {
            table: [(point.step, value) for point in kept if (value := getattr(point, name)) is not None]
            for table, kept in curves.items()
        }
        if any(lines.values()):
            found.append(drawn_curve(title, lines, min(points), max(points), step))
    return f'{legend}</p><div class="curves">{"".join(found)}</div>'


def drawn_curve(
    title: str, lines: dict[str, list[tuple[int, float]]], first: int, last: int, step: int | None
) -> str:  # fmt: skip
    """One curve of each table as SVG, which takes its colours from the page."""
    values = [value for line in lines.values() for _, value in line]
    low, high = min(values), max(values)
    spread = f"{low:.3g} to {high:.3g}" if high > low else f"{low:.3g}"

    def x(step: int) -> float:
        return MARGIN + (WIDTH - 2 * MARGIN) * (step - first) / max(last - first, 1)

    def y(value: float) -> float:
        return MARGIN + (HEIGHT - 2 * MARGIN) * ((high - value) / (high - low) if high > low else 0.5)

    parts, said = [], []
    if step is not None:
        parts.append(f'<path class="marked" d="M{x(step):.1f} 0V{HEIGHT}"/>')
    for table, line in lines.items():
        if line:
            dots = table if len(line) <= MOST_DOTS else "unseen"
            path = "L".join(f"{x(at):.1f} {y(value):.1f}" for at, value in line)
            parts.append(f'<path class="{table}" d="M{path}"/>')
            parts += [
                f'<circle class="{dots}" cx="{x(at):.1f}" cy="{y(value):.1f}" r="2.5"><title>step {at}, '
                f"{NAMES[table]}: {value:.3g}</title></circle>"
                for at, value in line
            ]
            said.append(f"{NAMES[table]} {line[0][1]:.3g} at step {line[0][0]}, {line[-1][1]:.3g} at {line[-1][0]}")
    words = f"{title}: {'; '.join(said)}"
    return (
        f'<figure><figcaption>{title} <span>{spread}</span></figcaption><svg role="img" '
        f'aria-label="{html.escape(words)}" viewBox="0 0 {WIDTH} {HEIGHT}">{"".join(parts)}</svg>'
        f'<div class="steps"><span>step {first}</span><span>{last}</span></div></figure>'
    )
