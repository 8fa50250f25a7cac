"""How runs are shown: a table, plain lines, one run in detail, JSON.

A terminal that is wide enough gets a table; narrow terminals, pipes and very long lists get plain lines. Names are
never shortened, and their control characters never reach the terminal.
"""

import logging
import os
import shlex
import shutil
import sys
from datetime import datetime
from pathlib import Path
from typing import Any

import utils
from checkpointing import run_folder
from checkpointing.run_folder import EvalPoint
from run_manager import inventory
from run_manager.inventory import ACCURACY, Roots, RunInfo
from utils import printable

MAX_TABLE_ROWS = 200  # rich takes a second for a thousand
STATE_STYLES = {
    run_folder.RUNNING: "cyan",
    run_folder.FINISHED: "green",
    run_folder.STOPPED: "yellow",
    run_folder.CRASHED: "red",
}
HEADS = ["#", "name", "started", "state", "base model", "training", "steps", "best {}", "last {}",
         "checkpoints", "size", "logs"]  # fmt: skip
RIGHT_ALIGNED = {"#", "steps", "checkpoints", "size", "logs", "on disk"}
PLACES = ("run_name", "output_dir", "log_dir")  # settings that differ between any two runs

# -- All runs ----------------------------------------------------------------------------------------------------------


def cells_of(number: int, run: RunInfo) -> list[str]:
    """A run's row: one text for each of HEADS."""
    best, last = run.best_and_last()
    done = run.steps_done
    planned = run.record.planned_steps if run.record else None
    steps = "-" if done is None else f"{done:,} of {'?' if planned is None else f'{planned:,}'}"
    has_folder = run.folder is not None
    return [
        str(number),
        printable(run.name),
        local_time(run.started),
        run.state if has_folder else "logs only",
        printable(run.base_model),
        run.training,
        steps,
        value_text(best, run.metric),
        value_text(last, run.metric),
        str(len(run.steps)) if has_folder else "-",
        utils.format_bytes(run.checkpoint_bytes) if has_folder else "-",
        utils.format_bytes(run.log_bytes) if run.log_folder else "-",
    ]


def local_time(when: datetime | None) -> str:
    return when.astimezone().strftime("%Y-%m-%d %H:%M") if when else "?"


def value_text(found: EvalPoint | None, metric: str = ACCURACY) -> str:
    """'71.9% (66.1-77.0)' or '4.213 (3.9 to 4.5)': an evaluation and its 95 % interval, if known."""
    if found is None:
        return "-"
    if metric != ACCURACY:
        return f"{found.value:.3f} ({found.low:.3g} to {found.high:.3g})"
    return f"{found.value:.1%}" + (f" ({100 * found.low:.1f}-{100 * found.high:.1f})" if found.count else "")


def show_runs(runs: list[RunInfo], notes: list[str]) -> None:
    """Print the list."""
    rows = [cells_of(number, run) for number, run in enumerate(runs, 1)]
    metric = next((run.metric for run in runs if run.record), ACCURACY).replace("_", " ")
    heads = [head.format(metric) for head in HEADS]
    if not (sys.stdout.isatty() and len(rows) <= MAX_TABLE_ROWS and show_table(rows)):
        print("\n".join(plain_lines(heads, rows)))
    checkpoints, logs = (sum(getattr(run, name) for run in runs) for name in ("checkpoint_bytes", "log_bytes"))
    count = utils.counted(len(runs), "run")
    print(f"{count}, {utils.format_bytes(checkpoints)} of checkpoints, {utils.format_bytes(logs)} of logs")
    for note in notes:
        print(f"  {note}")


def show_table(rows: list[list[str]]) -> bool:
    """Print a table; False if the terminal is too narrow for whole names."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False, markup=False, emoji=False, soft_wrap=False)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1))
    for head in ("#", "name", "started", "state", "base model", "steps", "best", "last", "checkpoints", "on disk"):
        table.add_column(head, no_wrap=True, justify="right" if head in RIGHT_ALIGNED else "left")
    for number, name, started, state, model, training, steps, best, last, count, size, logs in rows:
        table.add_row(
            number, name, started.replace(" ", "\n"), Text(state, STATE_STYLES.get(state, "")), f"{model}\n{training}",
            steps.replace(" of ", "\nof "), best.replace(" ", "\n"), last.replace(" ", "\n"), count,
            f"{size}\n{logs} logs",
        )  # fmt: skip
    if console.measure(table, options=console.options.update(max_width=10_000)).maximum > console.width:
        return False
    console.print(table)
    return True


def plain_lines(heads: list[str], rows: list[list[str]]) -> list[str]:
    """Aligned columns, two spaces apart."""
    from rich.cells import cell_len  # a character may be two columns wide on a terminal

    columns = []
    for column in zip(heads, *rows, strict=True):
        width = max(map(cell_len, column))
        padding = [" " * (width - cell_len(text)) for text in column]
        pairs = zip(padding, column) if column[0] in RIGHT_ALIGNED else zip(column, padding)  # noqa: B905
        columns.append(["".join(pair) for pair in pairs])
    return ["  ".join(row).rstrip() for row in zip(*columns, strict=True)]


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


def show_run(run: RunInfo, runs: list[RunInfo], roots: Roots, other: RunInfo | None) -> None:
    """Print everything about one run."""
    parts = [summary_lines(run), config_lines(run, other)]
    if run.folder:
        parts.append(step_lines(run, runs, roots))
    if run.log_folder:
        parts.append(curve_lines(run.log_folder))
    if commands := command_lines(run):
        parts.append(["next:", *commands])
    print("\n\n".join("\n".join(lines) for lines in parts))


def summary_lines(run: RunInfo) -> list[str]:
    _, name, started, state, model, training, steps, best, last, _, size, logs = cells_of(0, run)
    lines = [f"{name}: {state}" + (f" ({printable(run.cause)})" if run.cause else "")]
    lines.append(f"  started      {started}")
    if run.record and run.record.ended:
        lines.append(f"  ended        {local_time(datetime.fromisoformat(run.record.ended))}")
    if run.record and run.state == run_folder.RUNNING:
        lines.append(f"  process      {run.record.process} on {printable(run.record.host)}")
    if run.record and run.record.resumed_from:
        lines.append(f"  resumed from {printable(run.record.resumed_from)}")
    lines += [f"  model        {model}, {training}", f"  steps        {steps}"]
    for title, text, found in zip(("best", "last"), (best, last), run.best_and_last(), strict=True):
        what = {"accuracy": "pair", "reward": "prompt"}.get(run.metric, "example")
        pairs = f", {utils.counted(found.count, what)}" if found and found.count else ""
        lines.append(f"  {title:<12} {text}" + (f" at step {found.step:,}{pairs}" if found else ""))
    lines += [f"  checkpoints  {size}" + (f" in {printable(str(run.folder))}" if run.folder else "")]
    lines += [f"  logs         {logs}" + (f" in {printable(str(run.log_folder))}" if run.log_folder else "")]
    return lines + [f"  note         {note}" for note in run.notes]


def config_lines(run: RunInfo, other: RunInfo | None) -> list[str]:
    """The settings that differ from another run's, or from the defaults at the time of its training."""
    mine = run.config
    if not mine:
        return ["configuration: unknown"]
    if other is not None:
        title, heads = f"configuration against {printable(other.name)}:", [printable(run.name), printable(other.name)]
        compared = [mine, other.config]
    elif run.record:
        title, heads = "configuration against the defaults:", ["here", "default"]
        compared = [mine, {**mine, **run.record.changed}]
    else:
        title, heads, compared = "configuration (the defaults at that time are unknown):", ["here"], [mine]
    names = [name for name in {**mine, **compared[-1]} if name not in PLACES]
    rows = [[f"  {name}", *(as_text(config.get(name)) for config in compared)] for name in names]
    rows = [row for row in rows if len(compared) == 1 or row[1] != row[2]]
    return [title, *plain_lines(["  setting", *heads], rows)] if rows else [title + " no difference"]


def as_text(value: Any) -> str:
    return "-" if value is None else printable(str(value))


def step_lines(run: RunInfo, runs: list[RunInfo], roots: Roots) -> list[str]:
    best, last = inventory.best_and_last_step(run)
    sources = inventory.resumed_by(run, runs, roots)
    rows = []
    for step in run.steps:
        marks = ["best"] * (step is best) + ["last"] * (step is last)
        if others := sources.get(step.folder.name):
            marks.append(f"{', '.join(map(printable, others))} was resumed from here")
        if (run.folder / "reports" / step.folder.name / "report.html").is_file():
            marks.append(f"reports/{step.folder.name}/report.html")
        optimizer = utils.format_bytes(step.optimizer_bytes) if step.optimizer_bytes else "removed"
        row = [f"  {step.folder.name}", utils.format_bytes(step.bytes), optimizer, value_text(step.accuracy())]
        rows.append([*row, ", ".join(marks)])
    heads = ["  step", "size", "of which optimizer", "accuracy", ""]
    lines = ["checkpoints:", *plain_lines(heads, rows)] if rows else ["checkpoints: none"]
    for path, size in run.leftovers:
        what = "set aside on resuming" if path.name.startswith("superseded-") else "left by a killed save"
        lines.append(f"  {printable(path.name)}: {what}, {utils.format_bytes(size)}")
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
    plotext.plotsize(min(100, shutil.get_terminal_size((80, 24)).columns), 14)
    for tag, points in curves.items():
        steps, values = zip(*points, strict=True)
        draw = plotext.plot if tag == "train/loss" and len(points) > 1 else plotext.scatter
        draw(list(steps), list(values), marker=markers[tag])
    plot = plotext.uncolorize(plotext.build())
    if markers["train/loss"] == ".":
        plot = plot.translate(str.maketrans("─│┌┐└┘├┤┬┴", "-|++++++++"))
    legend = ", ".join(f"{tag} {'line' if tag == 'train/loss' else markers[tag]}" for tag in curves)
    return [f"loss by step ({legend}):", *(line.rstrip() for line in plot.splitlines())]


def command_lines(run: RunInfo) -> list[str]:
    """What to type next: resume, chat, evaluate, look at the curves."""
    best, last = inventory.best_and_last_step(run)
    lines = []
    with_optimizer = [step for step in run.steps if step.optimizer_bytes]
    if with_optimizer and run.state != run_folder.RUNNING:
        source = run.folder if with_optimizer[-1] is last else with_optimizer[-1].folder
        epochs = run.record.config.get("epochs") if run.record and run.state == run_folder.FINISHED else None
        more = f" --epochs {epochs + 1} --max_steps 0" if isinstance(epochs, int) else ""  # it is at its end
        lines.append(f"  python train_rm.py --resume_from {quoted(source)}{more}")
    if chosen := best or last:
        lines.append(f"  python chat.py --model {quoted(chosen.folder)}")
        lines.append(f"  python eval_rm.py --model {quoted(chosen.folder)}")
    if run.log_folder:
        lines.append(f"  tensorboard --logdir {quoted(run.log_folder)}")
    return lines


def quoted(path: Path) -> str:
    """A path as a shell takes it. Control characters appear as codes: such a path cannot be typed."""
    return shlex.quote(printable(str(path)))
