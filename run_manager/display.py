"""How runs are shown: as a table or a block of lines each, one run in detail, JSON.

Names are never shortened, and their control characters never reach the terminal.
"""

import logging
import os
import shlex
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import utils
from checkpointing import run_folder
from checkpointing.run_folder import EvalPoint
from run_manager import inventory, layout
from run_manager.inventory import ACCURACY, RunInfo
from utils import printable

TABLE_WIDTH = 130  # a narrower terminal gets a block of lines for each run
HEADS = ["#", "name", "started", "state", "base model", "steps", "best", "last", "on disk"]
STATE_COLOURS = {run_folder.RUNNING: 36, run_folder.FINISHED: 32, run_folder.STOPPED: 33, run_folder.CRASHED: 31}
PLACES = ("run_name", "output_dir", "log_dir")  # settings that differ between any two runs

# -- All runs ----------------------------------------------------------------------------------------------------------


def state_text(run: RunInfo) -> str:
    return run.state if run.folder else "logs only"


def steps_text(run: RunInfo) -> tuple[str, str]:
    """('60', 'of 80'): how many steps are done, and of how many."""
    if run.steps_done is None:
        return "-", ""
    planned = run.record.planned_steps if run.record else None
    return f"{run.steps_done:,}", f"of {'?' if planned is None else f'{planned:,}'}"


def metric_text(run: RunInfo) -> str:
    """What its evaluations measure, in words; nothing if there was none."""
    return run.metric.replace("_", " ") if run.best_and_last()[0] else ""


def local_time(when: datetime | None) -> str:
    return when.astimezone().strftime("%Y-%m-%d %H:%M") if when else "?"


def age_text(when: datetime | None) -> str:
    """'5 days ago', '1h23m ago'; nothing if unknown."""
    if when is None:
        return ""
    seconds = max(0.0, (datetime.now(UTC) - when).total_seconds())
    return f"{seconds / 86400:,.0f} days ago" if seconds > 2 * 86400 else f"{utils.format_duration(seconds)} ago"


def value_text(found: EvalPoint | None, metric: str = ACCURACY) -> str:
    """'71.9% (66.1-77.0)' or '4.213 (3.9 to 4.5)': an evaluation and its 95 % interval, if known."""
    if found is None:
        return "-"
    if metric != ACCURACY:
        return f"{found.value:.3f} ({found.low:.3g} to {found.high:.3g})"
    return f"{found.value:.1%}" + (f" ({100 * found.low:.1f}-{100 * found.high:.1f})" if found.count else "")


def show_runs(runs: list[RunInfo], notes: list[str]) -> None:
    """Print the list: as a table if the output has room for one, else a block of lines for each run."""
    columns = layout.width()
    lines = table_lines(runs, columns) if runs and columns >= TABLE_WIDTH else []
    if not lines:
        numbers = range(1, len(runs) + 1)
        lines = [line for number, run in zip(numbers, runs, strict=True) for line in block_lines(number, run, columns)]
    if sys.stdout.isatty():
        from rich.console import Console
        from rich.text import Text

        Console(highlight=False).print(Text.from_ansi("\n".join(lines)), soft_wrap=True)
    elif lines:
        print("\n".join(lines))
    checkpoints, logs = (sum(getattr(run, name) for run in runs) for name in ("checkpoint_bytes", "log_bytes"))
    count = utils.counted(len(runs), "run")
    total = f"{count}, {utils.format_bytes(checkpoints)} of checkpoints, {utils.format_bytes(logs)} of logs"
    for line in (total, *(f"  {note}" for note in notes)):
        print("\n".join(layout.wrapped(line, columns)))


def table_lines(runs: list[RunInfo], columns: int) -> list[str]:
    """Two lines for each run, and long names and base models on lines of their own; nothing if all that is too wide."""
    for limit in (columns, 24, 16, 8):
        rows = [row for number, run in enumerate(runs, 1) for row in table_rows(number, run, limit)]
        padded = layout.aligned(HEADS, rows)
        if layout.cells("  ".join(padded[0])) <= columns:
            break
    else:
        return []
    lines = [padded[0], ["-" * layout.cells("  ".join(padded[0]))]]
    state = HEADS.index("state")
    for number, run, upper, lower in zip(range(1, len(runs) + 1), runs, padded[1::2], padded[2::2], strict=True):
        is_long_name, is_long_model = not upper[1].strip(), not upper[HEADS.index("base model")].strip()
        above = [[str(number).rjust(layout.cells(upper[0])), run.label]] if is_long_name else []
        below = [[" " * layout.cells(upper[0]), f"from {printable(run.base_model)}"]] if is_long_model else []
        upper[state] = painted(upper[state], run.state)
        lines += [*above, upper, lower, *below]
    return [*("  ".join(line).rstrip() for line in lines), ""]


def table_rows(number: int, run: RunInfo, limit: int) -> list[list[str]]:
    """The cells of a run's two lines; a name or base model above `limit` columns is left to a line of its own."""
    best, last = (value_text(found, run.metric).partition(" ") for found in run.best_and_last())
    done, planned = steps_text(run)
    metric = metric_text(run)
    model = printable(run.base_model)
    size = f"{utils.format_bytes(run.checkpoint_bytes)} in {len(run.steps)}" if run.folder else "-"
    logs = f"{utils.format_bytes(run.log_bytes)} logs" if run.log_folder else "no logs"
    is_long_name = layout.cells(run.label) > limit
    return [
        ["" if is_long_name else str(number), "" if is_long_name else run.label, local_time(run.started),
         state_text(run), "" if layout.cells(model) > limit else model, done, best[0], last[0], size],
        ["", f"{run.kind}, {metric}" if metric else run.kind, age_text(run.started), "", run.training, planned,
         best[2], last[2], logs],
    ]  # fmt: skip


def block_lines(number: int, run: RunInfo, columns: int) -> list[str]:
    """One run: its name, then kind, state, steps and age, its evaluations, its base model, its sizes, an empty line."""
    state, done, planned, age = state_text(run), *steps_text(run), age_text(run.started)
    doing = [run.kind, state] + ([f"{done} {planned} steps"] if planned else [])
    doing += [f"started {local_time(run.started)}", age] if age else []
    sizes = [f"{utils.format_bytes(run.checkpoint_bytes)} in {utils.counted(len(run.steps), 'checkpoint')}"]
    sizes = (sizes if run.folder else []) + ([f"logs {utils.format_bytes(run.log_bytes)}"] if run.log_folder else [])
    indent = "    "
    lines = layout.filled(doing, columns, indent)
    lines[0] = painted(lines[0], run.state)
    lines += layout.filled(evaluation_phrases(run), columns, indent)
    if run.base_model != "?":
        lines += layout.filled([f"from {printable(run.base_model)}", run.training], columns, indent)
    return [f"{number:<3} {run.label}", *lines, *layout.filled(sizes, columns, indent), ""]


def evaluation_phrases(run: RunInfo) -> list[str]:
    """'best accuracy 79.7% (71.9-85.7) at step 60', and the last one if it is another."""
    best, last = run.best_and_last()
    if best is None or last is None:
        return ["not evaluated yet"] if run.folder else []
    titles = {"best": best, "last": last} if best != last else {"best and last": best}
    return [f"{title} {metric_text(run)} {value_text(found, run.metric)} at step {found.step:,}"
            for title, found in titles.items()]  # fmt: skip


def painted(text: str, state: str) -> str:
    """A text with the state's name in its colour, on a terminal."""
    if state not in STATE_COLOURS or not sys.stdout.isatty():
        return text
    return text.replace(state, f"\x1b[{STATE_COLOURS[state]}m{state}\x1b[0m", 1)


def value_object(found: EvalPoint | None, metric: str) -> dict[str, Any] | None:
    if found is None:
        return None
    interval = (found.low, found.high) if found.count else None
    return {"step": found.step, metric: found.value, "pairs": found.count or None, "interval": interval}


def as_object(run: RunInfo) -> dict[str, Any]:
    """A run for --json; what is unknown is null."""
    best, last = (value_object(found, run.metric) for found in run.best_and_last())
    model = run.config.get("model")
    return {
        "name": run.name,
        "kind": run.kind,
        "state": run.state,
        "cause": run.cause,
        "started": run.started.isoformat() if run.started else None,
        "ended": run.record.ended if run.record else None,
        "base_model": model if type(model) is str else None,
        "training": None if run.training == "?" else run.training.lower(),
        "steps_done": run.steps_done,
        "planned_steps": run.record.planned_steps if run.record else None,
        "best": best,
        "last": last,
        "checkpoints": [step.folder.name for step in run.steps],
        "checkpoint_bytes": run.checkpoint_bytes,
        "log_bytes": run.log_bytes,
        "folder": os.fspath(run.folder) if run.folder else None,
        "log_folder": os.fspath(run.log_folder) if run.log_folder else None,
        "resumed_from": run.record.resumed_from if run.record else None,
        "notes": run.notes,
    }


# -- One run -----------------------------------------------------------------------------------------------------------


def show_run(run: RunInfo, runs: list[RunInfo], other: RunInfo | None) -> None:
    """Print everything about one run."""
    parts = [summary_lines(run), config_lines(run, other)]
    if run.folder:
        parts.append(step_lines(run, runs))
    if run.log_folder:
        parts.append(curve_lines(run.log_folder))
    if commands := command_lines(run):
        parts.append(["next:", *commands])  # not wrapped: they are there to be copied
    print("\n\n".join("\n".join(lines) for lines in parts))


def summary_lines(run: RunInfo) -> list[str]:
    rows = [("kind", run.kind), ("started", ", ".join(filter(None, [local_time(run.started), age_text(run.started)])))]
    if run.record and run.record.ended:
        rows.append(("ended", local_time(datetime.fromisoformat(run.record.ended))))
    if run.record and run.state == run_folder.RUNNING:
        rows.append(("process", f"{run.record.process} on {printable(run.record.host)}"))
    if run.record and run.record.resumed_from:
        rows.append(("resumed from", printable(run.record.resumed_from)))
    rows += [("model", f"{printable(run.base_model)}, {run.training}"), ("steps", " ".join(steps_text(run)).strip())]
    for title, found in zip(("best", "last"), run.best_and_last(), strict=True):
        text = value_text(found, run.metric)
        if found:
            what = {"accuracy": "pair", "reward": "prompt"}.get(run.metric, "example")
            pairs = f", {utils.counted(found.count, what)}" if found.count else ""
            text = f"{metric_text(run)} {text} at step {found.step:,}{pairs}"
        rows.append((title, text))
    for title, folder, size in (
        ("checkpoints", run.folder, run.checkpoint_bytes),
        ("logs", run.log_folder, run.log_bytes),
    ):
        rows.append((title, f"{utils.format_bytes(size)} in {printable(str(folder))}" if folder else "-"))
    rows += [("note", note) for note in run.notes]
    lines = [f"{run.label}: {state_text(run)}" + (f" ({printable(run.cause)})" if run.cause else "")]
    lines += [f"  {title:<12} {text}" for title, text in rows]
    return [part for line in lines for part in layout.wrapped(line, layout.width(), " " * 15)]


def config_lines(run: RunInfo, other: RunInfo | None) -> list[str]:
    """The settings that differ from another run's, or from the defaults at the time of its training."""
    mine = run.config
    if not mine:
        return ["configuration: unknown"]
    if other is not None:
        title, heads = f"configuration against {other.label}:", [run.label, other.label]
        compared = [mine, other.config]
    elif run.record:
        title, heads = "configuration against the defaults:", ["here", "default"]
        compared = [mine, {**mine, **run.record.changed}]
    else:
        title, heads, compared = "configuration (the defaults at that time are unknown):", ["here"], [mine]
    names = [name for name in {**mine, **compared[-1]} if name not in PLACES]
    rows = [[name, *(as_text(config.get(name)) for config in compared)] for name in names]
    rows = [row for row in rows if len(compared) == 1 or row[1] != row[2]]
    return [title, *layout.columns_or_blocks(["setting", *heads], rows)] if rows else [title + " no difference"]


def as_text(value: Any) -> str:
    return "-" if value is None else printable(str(value))


def step_lines(run: RunInfo, runs: list[RunInfo]) -> list[str]:
    best, last = inventory.best_and_last_step(run)
    sources = inventory.resumed_by(run, runs)
    points = run.record.evaluations.get(run.metric, []) if run.record else []
    evaluated = {point.step: point for point in points}
    rows = []
    for step in run.steps:
        marks = ["best"] * (step is best) + ["last"] * (step is last)
        if others := sources.get(step.folder.name):
            marks.append(f"{', '.join(other.label for other in others)} was resumed from here")
        if (run.folder / "reports" / step.folder.name / "report.html").is_file():
            marks.append(f"reports/{step.folder.name}/report.html")
        optimizer = utils.format_bytes(step.optimizer_bytes) if step.optimizer_bytes else "removed"
        value = value_text(evaluated.get(step.number) or step.accuracy(), run.metric)
        rows.append([step.folder.name, utils.format_bytes(step.bytes), optimizer, value, ", ".join(marks)])
    heads = ["step", "size", "of which optimizer", run.metric.replace("_", " "), ""]
    lines = ["checkpoints:", *layout.columns_or_blocks(heads, rows)] if rows else ["checkpoints: none"]
    for path, size in run.leftovers:
        what = "set aside on resuming" if path.name.startswith("superseded-") else "left by a killed save"
        lines += layout.wrapped(f"  {printable(path.name)}: {what}, {utils.format_bytes(size)}", layout.width(), "    ")
    return lines


def curve_lines(log_folder: Path) -> list[str]:
    """The loss by step as a small plot, from TensorBoard's event files."""
    import plotext
    from tensorboard.backend.event_processing import event_accumulator

    logging.getLogger("tensorboard").setLevel(logging.CRITICAL)  # it warns about a truncated last record
    if any(not (log_folder / name).is_file() for name in inventory.event_files(log_folder)):
        return ["loss: the logs hold something that is not an ordinary file"]
    try:
        events = event_accumulator.EventAccumulator(str(log_folder), size_guidance={"scalars": 2000}).Reload()
        tags = [tag for tag in ("train/loss", "eval/loss") if tag in events.Tags()["scalars"]]
        curves = {tag: [(point.step, point.value) for point in events.Scalars(tag)] for tag in tags}
    except Exception as error:  # whatever is in a foreign or truncated file, the rest is still worth showing
        return [f"loss: the logs cannot be read ({type(error).__name__}: {printable(str(error))})"]
    if not any(curves.values()):
        return ["loss: nothing was logged"]
    try:
        "⠿●─".encode(sys.stdout.encoding or "ascii")
        markers = {"train/loss": "braille", "eval/loss": "●"}
    except UnicodeEncodeError:
        markers = {"train/loss": ".", "eval/loss": "o"}
    plotext.clear_figure()
    plotext.theme("clear")
    plotext.plotsize(min(100, layout.width()), 14)
    for tag, points in curves.items():
        steps, values = zip(*points, strict=True)
        draw = plotext.plot if tag == "train/loss" and len(points) > 1 else plotext.scatter
        draw(list(steps), list(values), marker=markers[tag])
    plot = plotext.uncolorize(plotext.build())
    if markers["train/loss"] == ".":
        plot = plot.translate(str.maketrans("─│┌┐└┘├┤┬┴", "-|++++++++"))
    legend = ", ".join(f"{tag} {'line' if tag == 'train/loss' else markers[tag]}" for tag in curves)
    title = layout.wrapped(f"loss by step ({legend}):", layout.width())
    return [*title, *(line.rstrip() for line in plot.splitlines())]


def command_lines(run: RunInfo) -> list[str]:
    """What to type next: resume, chat, evaluate, look at the curves."""
    best, last = inventory.best_and_last_step(run)
    lines = []
    with_optimizer = [step for step in run.steps if step.optimizer_bytes]
    if with_optimizer and run.state != run_folder.RUNNING:
        source = run.folder if with_optimizer[-1] is last else with_optimizer[-1].folder
        epochs = run.record.config.get("epochs") if run.record and run.state == run_folder.FINISHED else None
        more = f" --epochs {epochs + 1} --max_steps 0" if isinstance(epochs, int) else ""  # it is at its end
        lines.append(f"  python train_{run.kind}.py --resume_from {quoted(source)}{more}")
    if chosen := best or last:
        lines.append(f"  python chat.py --model {quoted(chosen.folder)}")
        if run.kind == "rm":
            lines.append(f"  python eval_rm.py --model {quoted(chosen.folder)}")
    if run.log_folder:
        lines.append(f"  tensorboard --logdir {quoted(run.log_folder)}")
    return lines


def quoted(path: Path) -> str:
    """A path as a shell takes it. Control characters appear as codes: such a path cannot be typed."""
    return shlex.quote(printable(str(path)))
