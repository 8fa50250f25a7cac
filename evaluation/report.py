"""A report as report.json, in TensorBoard and in the terminal, and the figures that all of them show as text."""

import contextlib
import io
import json
import shutil
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch.utils.tensorboard import SummaryWriter

from common import atomic_files
from common.pages import Plot, number, percent
from evaluation import plots
from utils import printable

JSON = "report.json"
MOST_GROUPS_SHOWN = 20  # of a breakdown in the terminal


def write_json(folder: Path, content: dict[str, Any]) -> None:
    """report.json, all or nothing."""
    with atomic_files.atomic_file(folder / JSON) as file:
        file.write(json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


# -- Figures as text: (what, value) ------------------------------------------------------------------------------------


def correlation(found: dict[str, float | None]) -> str:
    """Pearson's correlation of reward and length, Spearman's in brackets, and what the sign means."""
    r = found["pearson"]
    if r is None:
        return "–"
    side = "longer" if r > 0 else "shorter"
    return f"{r:+.2f} ({found['spearman']:+.2f}): {side} replies get more"


def floor(found: dict[str, float]) -> str:
    return f"about {percent(found['mean'])}, rarely above {percent(found['high'])}"


def temperature(content: dict[str, Any]) -> str:
    """The temperature with its interval and log loss, or in words why there is none."""
    found = content["calibration"]["temperature"]
    if found is None:
        return f"none: {why_no_temperature(content)}"
    return f"{found['value']:.3g} ({temperature_interval(found)}); log loss {found['log_loss']:.4f}"


def temperature_interval(found: dict[str, float | None]) -> str:
    high = found["high"]
    return f"{found['low']:.3g} or more" if high is None else f"{found['low']:.3g} to {high:.3g}"


def why_no_temperature(content: dict[str, Any]) -> str:
    """Why `metrics.temperature` finds none."""
    if content["mean_margin"] <= 0:
        return "on average the chosen reply gets no higher reward, so no scaling of the rewards helps"
    return "no pair is wrong, so any rewards could only be too small; it takes more pairs, or harder ones"


def tables(content: dict[str, Any]) -> list[tuple[str, list[tuple[str, str]], str]]:
    """The tables below the accuracies: (title, rows, note) of each."""
    found = [("Length and calibration", _length_and_calibration(content), "")]
    if benchmark := content["benchmark"]:
        rows = [(name, percent(value)) for name, value in [*benchmark["parts"].items(), ("score", benchmark["score"])]]
        missing = f"not in this data: {', '.join(benchmark['missing'])}" if benchmark["missing"] else ""
        found.append((benchmark["name"], rows, missing))
    if against := content.get("against"):
        found.append((f"Against {against['model']}", _comparison(against), ""))
    return found


def _length_and_calibration(content: dict[str, Any]) -> list[tuple[str, str]]:
    length, calibration = content["length"], content["calibration"]
    controlled = length["length_controlled"]
    interval = "" if controlled["low"] is None else f" ({percent(controlled['low'])} to {percent(controlled['high'])})"

    def accuracy_of(key: str) -> str:
        return f"{percent(length[key]['accuracy'])} of {length[key]['n']:,}"

    return [
        ("length-controlled accuracy", percent(controlled["accuracy"]) + interval),
        ("accuracy, chosen reply longer", accuracy_of("better_is_longer")),
        ("accuracy, chosen reply shorter", accuracy_of("better_is_shorter")),
        ("accuracy, chosen reply equally long", accuracy_of("equally_long")),
        ("the model prefers the longer reply", percent(length["model_prefers_longer"])),
        ("people prefer the longer reply", percent(length["people_prefer_longer"])),
        ("correlation of reward and length within prompts, r (ρ)", correlation(length["within_prompts"])),
        ("correlation of reward and length across prompts, r (ρ)", correlation(length["across_prompts"])),
        ("expected calibration error", percent(calibration["ece"])),
        ("the same of a perfectly calibrated model, by chance", floor(calibration["ece_floor"])),
        ("Brier score (guessing: 0.25)", number(calibration["brier"], ".4f")),
        ("log loss (guessing: 0.6931)", number(calibration["log_loss"], ".4f")),
        ("best temperature", temperature(content)),
        ("suspected mislabels", f"{content['reading']['suspected_mislabels']:,}"),
    ]  # fmt: skip


def _comparison(against: dict[str, Any]) -> list[tuple[str, str]]:
    return [
        ("pairs that both scored", f"{against['n']:,}"),
        ("both right", f"{against['both_right']:,}"),
        ("only this model right", f"{against['only_a_right']:,}"),
        ("only the other model right", f"{against['only_b_right']:,}"),
        ("neither right", f"{against['neither_right']:,}"),
        ("difference in accuracy", f"{number(against['accuracy_difference'], '+.1%')}"
         f" ({number(against['low'], '+.1%')} to {number(against['high'], '+.1%')})"),
        (f"McNemar's test ({against['mcnemar']['test']})", f"p = {against['mcnemar']['p_value']:.3g}"),
        ("correlation of their Δr", number(against["rewards_agree"]["pearson"])),
    ]  # fmt: skip


# -- TensorBoard -------------------------------------------------------------------------------------------------------


def write_tensorboard(folder: Path, content: dict[str, Any], drawn: list[Plot], step: int) -> None:
    """The figures as scalars and the plots as images, replacing those of an earlier report of the same step.

    In a run's own folder: a resumed run drops what is of later steps from these files, as from its own.
    """
    suffix = f".step-{step}"
    of_earlier_versions = folder / "report"  # which TensorBoard took for a run of its own
    for path in [*folder.glob(f"events.out.tfevents.*{suffix}"), *of_earlier_versions.glob(f"*.tfevents.*{suffix}")]:
        path.unlink()
    with contextlib.suppress(OSError):  # there is none, or it holds something else
        of_earlier_versions.rmdir()
    with SummaryWriter(str(folder), filename_suffix=suffix) as writer:
        for tag, value in scalars(content).items():
            writer.add_scalar(tag, value, step)
        for plot in drawn:
            writer.add_image(f"report/{plot.name}", plots.image(plot), step, dataformats="HWC")


def scalars(content: dict[str, Any]) -> dict[str, float]:
    """The figures of a report by TensorBoard tag, without those that are undefined."""
    length, calibration = content["length"], content["calibration"]
    values = {
        "accuracy": content["accuracy"],
        "ties": content["ties"] / content["n"],
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


# -- The terminal ------------------------------------------------------------------------------------------------------


def show(content: dict[str, Any]) -> None:
    """Print the report as tables."""
    # into memory first: rich would end the program if standard output is a pipe that was closed
    on_terminal = sys.stdout.isatty()
    width = shutil.get_terminal_size().columns if on_terminal else 100
    console = Console(file=io.StringIO(), width=width, force_terminal=on_terminal, highlight=False)

    def grid(title: str, rows: list[tuple[str, ...]], columns: tuple[str, ...]) -> None:
        shown = Table(title=Text(title, style="bold"), title_justify="left", box=None, pad_edge=False)
        for place, column in enumerate(columns):
            shown.add_column(column, justify="right" if place else "left", overflow="fold")
        for row in rows:
            shown.add_row(*(Text(printable(cell)) for cell in row))  # Text: a subset's name may look like markup
        console.print()
        console.print(shown)

    columns = ("", "accuracy", "95 % interval", "ties", "of")
    grid("Accuracy", [_accuracy_row(*item) for item in plots.model_and_baselines(content).items()], columns)
    for name, what in plots.BREAKDOWNS.items():
        if len(groups := content[name]) > 1:
            more = f" (the first {MOST_GROUPS_SHOWN} of {len(groups)}; all in {JSON})"
            rows = [_accuracy_row(label or "(none)", one) for label, one in groups.items()][:MOST_GROUPS_SHOWN]
            grid(f"By {what}" + (more if len(groups) > MOST_GROUPS_SHOWN else ""), rows, columns)
    for title, rows, _ in tables(content):
        grid(title, rows, ("", ""))
    console.print()
    for finding in content["findings"]:
        console.print(Text(f"- {printable(finding)}"))
    print(console.file.getvalue(), end="", flush=True)


def _accuracy_row(label: str, one: dict[str, Any]) -> tuple[str, ...]:
    interval = f"{one['low']:.1%} to {one['high']:.1%}" if one["n"] else "–"
    return label, percent(one["accuracy"]), interval, f"{one['ties']:,}", f"{one['n']:,}"
