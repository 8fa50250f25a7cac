"""A report where people look: report.json, report.html, TensorBoard, and a table in the terminal."""

from __future__ import annotations

import io
import json
import shutil
import sys
from pathlib import Path
from typing import Any

from common import atomic_files
from evaluation import html_report
from evaluation import plots as report_plots
from evaluation import report_figures as figures
from evaluation.analysis import Table
from utils import printable

JSON, PAGE = "report.json", "report.html"
MOST_GROUPS_SHOWN = 20  # of a breakdown in the terminal


def write(folder: Path, content: dict[str, Any], table: Table) -> None:
    """report.json and report.html, each all or nothing."""
    folder.mkdir(parents=True, exist_ok=True)
    plots = _plots(content, table)
    with atomic_files.published_file(folder / JSON) as file:
        file.write(json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
    with atomic_files.published_file(folder / PAGE) as file:
        file.write(html_report.page(content, [(plot, report_plots.svg(plot)) for plot in plots]))


def _plots(content: dict[str, Any], table: Table) -> list[report_plots.Plot]:
    margins = table.rewards[:, 0] - table.rewards[:, 1]
    return report_plots.plots(content, margins, table.lengths[:, 0] - table.lengths[:, 1]) if content["n"] else []


# ---------------------------------------------------------------------------------------------------------------------
# TensorBoard
# ---------------------------------------------------------------------------------------------------------------------


def write_board(folder: Path, content: dict[str, Any], table: Table, step: int) -> None:
    """The report's figures as scalars and its plots as images, in place of what an earlier report of `step` wrote."""
    from torch.utils.tensorboard import SummaryWriter

    suffix = f".step-{step}"
    for path in folder.glob(f"events.out.tfevents.*{suffix}"):
        path.unlink()
    with SummaryWriter(str(folder), filename_suffix=suffix) as writer:
        for tag, value in scalars(content).items():
            writer.add_scalar(tag, value, step)
        for plot in _plots(content, table):
            writer.add_image(f"report/{plot.name}", report_plots.image(plot), step, dataformats="HWC")


def scalars(content: dict[str, Any]) -> dict[str, float]:
    """The figures of a report by TensorBoard tag; what there is none of is left out."""
    length, calibration = content["length"], content["calibration"]
    values = {
        "accuracy": content["accuracy"],
        "ties": content["ties"] / content["n"] if content["n"] else None,
        "length_controlled_accuracy": length["length_controlled"]["accuracy"],
        "length_correlation_within_prompts": length["within_prompts"]["pearson"],
        "model_prefers_longer": length["model_prefers_longer"],
        "mean_margin": content["mean_margin"],
        "ece": calibration["ece"],
        "brier": calibration["brier"],
        "log_loss": calibration["log_loss"],
        "temperature": calibration["temperature"] and calibration["temperature"]["value"],
    }
    found = {f"report/{name}": value for name, value in values.items() if value is not None}
    return found | {f"report_by_subset/{name}": one["accuracy"] for name, one in content["by_subset"].items() if name}


# ---------------------------------------------------------------------------------------------------------------------
# The terminal
# ---------------------------------------------------------------------------------------------------------------------


def show(content: dict[str, Any]) -> None:
    """The report as tables on standard output."""
    from rich.console import Console
    from rich.table import Table as Grid
    from rich.text import Text

    # into memory first: rich would take a pipe that nobody reads any more for the end of the program
    on_terminal = sys.stdout.isatty()
    width = shutil.get_terminal_size().columns if on_terminal else 100
    console = Console(file=io.StringIO(), width=width, force_terminal=on_terminal, highlight=False)

    def grid(title: str, rows: list[tuple[str, ...]], columns: tuple[str, ...]) -> None:
        shown = Grid(title=Text(title, style="bold"), title_justify="left", box=None, pad_edge=False)
        for number, column in enumerate(columns):
            shown.add_column(column, justify="right" if number else "left", overflow="fold")
        for row in rows:
            shown.add_row(*(Text(printable(cell)) for cell in row))  # Text: a subset's name may look like markup
        console.print()
        console.print(shown)

    model = {"n": content["n"], "ties": content["ties"], "accuracy": content["accuracy"]}
    model |= dict(zip(("low", "high"), content["interval"], strict=True))
    columns = ("", "accuracy", "95 % interval", "ties", "of")
    rules = {"this model": model, **content["baselines"]}
    grid("Accuracy", [_share_row(*item) for item in rules.items()], columns)
    for name, title in (("by_subset", "By subset"), ("by_turns", "By turns of the user"),
                        ("by_length", "By tokens of the longest reply")):  # fmt: skip
        if len(shares := content[name]) > 1:
            more = f" (the first {MOST_GROUPS_SHOWN} of {len(shares)}; all in {JSON})"
            grid(
                title + (more if len(shares) > MOST_GROUPS_SHOWN else ""),
                [_share_row(label or "(none)", one) for label, one in list(shares.items())[:MOST_GROUPS_SHOWN]],
                columns,
            )
    grid("Length and calibration", figures.of_model(content), ("", ""))
    if benchmark := content["benchmark"]:
        rows = [(name, figures.percent(value)) for name, value in benchmark["parts"].items()]
        grid(benchmark["name"], [*rows, ("score", figures.percent(benchmark["score"]))], ("", ""))
    if against := content.get("against"):
        grid(f"Against {against['model']}", figures.of_comparison(against), ("", ""))
    console.print()
    for finding in content["findings"]:
        console.print(Text(f"- {printable(finding)}"))
    print(console.file.getvalue(), end="", flush=True)


def _share_row(label: str, one: dict[str, Any]) -> tuple[str, ...]:
    interval = f"{one['low']:.1%} to {one['high']:.1%}" if one["n"] else "–"
    return label, figures.percent(one["accuracy"]), interval, f"{one['ties']:,}", f"{one['n']:,}"
