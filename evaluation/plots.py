"""The plots of a report: as SVG that takes its colours from the page, and as pixels for TensorBoard."""

import html
import io
import re
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

import utils

BREAKDOWNS = {"by_subset": "subset", "by_turns": "number of user turns", "by_length": "tokens of the longest reply"}
MOST_ROWS = 40  # of a breakdown
MOST_POINTS = 800  # of a scatter plot: SVG keeps every one of them

Palette = dict[str, str]  # colours for: ink, muted (text), grid, accent, second (accent)
ON_WHITE = {"ink": "#1d2430", "muted": "#5b6472", "grid": "#dfe3e8", "accent": "#2563c9", "second": "#c2410c"}
# Placeholders that `svg` replaces with the page's CSS variables, since matplotlib does not know `var(--ink)`.
PLACEHOLDERS = {"ink": "#010203", "muted": "#040506", "grid": "#070809", "accent": "#0a0b0c", "second": "#0d0e0f"}

Draw = Callable[[Axes, Palette], None]


@dataclass(frozen=True)
class Plot:
    """What draws a plot, and its height in inches."""

    name: str
    title: str
    draw: Draw
    height: float = 3.0


def plots(content: dict[str, Any], rewards: np.ndarray, lengths: np.ndarray) -> list[Plot]:
    """The plots of a report; rewards and lengths (N, 2) are those of its pairs: chosen, rejected."""
    reward_margins, longer_by = (values[:, 0] - values[:, 1] for values in (rewards, lengths))  # (N,) each
    return [
        _intervals("accuracy", "Accuracy, compared with simple rules", model_and_baselines(content)),
        *(
            _intervals(name, f"Accuracy by {what}", content[name])
            for name, what in BREAKDOWNS.items()
            if len(content[name]) > 1
        ),
        Plot("margins", "Δr = chosen reward − rejected reward", lambda a, p: _margins(a, p, reward_margins)),
        Plot("reliability", "Calibration: claimed and actual agreement", lambda a, p: _reliability(a, p, content)),
        Plot("length", "Difference in reward and in length", lambda a, p: _length(a, p, reward_margins, longer_by)),
    ]


def model_and_baselines(content: dict[str, Any]) -> dict[str, Any]:
    """The model's accuracy above those of the baselines, each as `metrics.accuracy` returns it."""
    low, high = content["interval"]
    model = {key: content[key] for key in ("n", "right", "ties", "accuracy")} | {"low": low, "high": high}
    return {"this model": model, **content["baselines"]}


def _intervals(name: str, title: str, groups: dict[str, Any]) -> Plot:
    kept = [(label, one) for label, one in groups.items() if one["accuracy"] is not None][:MOST_ROWS]

    def draw(axes: Axes, palette: Palette) -> None:
        rows = np.arange(len(kept))
        values = np.array([one["accuracy"] for _, one in kept])
        reach = np.abs(np.array([(one["low"], one["high"]) for _, one in kept]).T - values)  # (2, rows)
        axes.axvline(0.5, color=palette["muted"], linewidth=1, linestyle=(0, (4, 3)))
        axes.errorbar(values, rows, xerr=reach, fmt="o", color=palette["accent"], markersize=6, linewidth=2, capsize=0)
        for row, (_, one) in zip(rows, kept, strict=True):
            axes.annotate(
                f"{one['accuracy']:.1%} of {one['n']:,}", (1.03, row), xycoords=("axes fraction", "data"), va="center",
                color=palette["muted"], fontsize=9,
            )  # fmt: skip
        axes.set_yticks(rows, [utils.printable(label[:32]) or "(none)" for label, _ in kept])
        axes.set_ylim(len(kept) - 0.4, -0.6)
        axes.set_xlim(min(0.4, *(one["low"] for _, one in kept)) - 0.02, 1.02)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
        axes.grid(axis="y", visible=False)

    return Plot(name, title, draw, 0.9 + 0.32 * len(kept))


def _margins(axes: Axes, palette: Palette, reward_margins: np.ndarray) -> None:
    low, high = np.quantile(reward_margins, [0.001, 0.999])
    reach = max(abs(low), abs(high)) or 1.0
    edges = np.linspace(-reach, reach, 61 if len(reward_margins) > 2000 else 31)  # 0 is one of them
    shown = np.clip(reward_margins, -reach, reach)
    axes.hist(shown[shown <= 0], edges, color=palette["second"], label="wrong")
    axes.hist(shown[shown > 0], edges, color=palette["accent"], label="right")
    axes.axvline(0, color=palette["ink"], linewidth=1)
    axes.set_xlabel("Δr")
    axes.set_ylabel("pairs")
    axes.legend(frameon=False, labelcolor=palette["ink"])


def _reliability(axes: Axes, palette: Palette, content: dict[str, Any]) -> None:
    bins = content["calibration"]["bins"]
    claimed, happened, counts = (np.array([one[key] for one in bins]) for key in ("claimed", "happened", "count"))
    ends = np.array([utils.wilson_interval(round(h * n), int(n)) for h, n in zip(happened, counts, strict=True)])
    reach = np.abs(ends.T - happened)  # (2, bins)
    axes.plot([0.5, 1], [0.5, 1], color=palette["muted"], linewidth=1, linestyle=(0, (4, 3)))
    axes.errorbar(claimed, happened, yerr=reach, fmt="none", ecolor=palette["accent"], linewidth=1.5)
    axes.scatter(claimed, happened, s=25 + 200 * counts / counts.max(), color=palette["accent"], linewidth=0, zorder=3)
    axes.set_xlim(0.48, 1.03)
    axes.set_ylim(min(0.45, ends.min() - 0.03), 1.05)
    axes.set_xlabel("claimed: σ(|Δr|); larger points have more pairs")
    axes.set_ylabel("people agree")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(lambda value, _: f"{value:.0%}")


def _length(axes: Axes, palette: Palette, reward_margins: np.ndarray, longer_by: np.ndarray) -> None:
    chosen = np.random.default_rng(0).permutation(len(reward_margins))[:MOST_POINTS]
    axes.axhline(0, color=palette["grid"], linewidth=1)
    axes.axvline(0, color=palette["grid"], linewidth=1)
    axes.scatter(longer_by[chosen], reward_margins[chosen], s=10, color=palette["accent"], alpha=0.45, linewidth=0)
    axes.set_xlabel("tokens by which the chosen reply is longer")
    axes.set_ylabel("Δr")


# -- Drawing -----------------------------------------------------------------------------------------------------------


def svg(plot: Plot) -> str:
    """A plot as an SVG element for a page: texts stay text, colours are the page's variables."""
    written = io.BytesIO()
    with _style(PLACEHOLDERS, plot):
        _figure(plot, PLACEHOLDERS).savefig(written, format="svg", transparent=True, metadata={"Date": None})
    text = written.getvalue().decode("utf-8")
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'<g id="[a-z]+_?\w*">', "<g>", text)  # several plots in one page would repeat these names
    for name, placeholder in PLACEHOLDERS.items():
        text = text.replace(placeholder, f"var(--{name})")
    opening = rf'<svg viewBox="\1" role="img" aria-label="{html.escape(plot.title)}">'
    text = re.sub(r'<svg[^>]*viewBox="([^"]+)"[^>]*>', opening, text, count=1)
    return re.sub(r"font: ([\d.]+px) [^;\"]*", r"font-size: \1", text)  # the page's font


def image(plot: Plot) -> np.ndarray:
    """A plot as (height, width, 3) bytes for TensorBoard."""
    with _style(ON_WHITE, plot):
        figure = _figure(plot, ON_WHITE)
        figure.axes[0].set_title(plot.title, fontsize=11, loc="left")
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def _style(palette: Palette, plot: Plot) -> AbstractContextManager:
    return matplotlib.rc_context({
        "svg.fonttype": "none", "svg.hashsalt": plot.name, "font.size": 10, "text.color": palette["ink"],
        "axes.edgecolor": palette["grid"], "axes.labelcolor": palette["muted"], "xtick.color": palette["muted"],
        "ytick.color": palette["muted"], "ytick.labelcolor": palette["ink"], "grid.color": palette["grid"],
        "axes.spines.top": False, "axes.spines.right": False, "axes.spines.left": False, "axes.axisbelow": True,
        "xtick.major.size": 0, "ytick.major.size": 0, "figure.facecolor": "white", "axes.facecolor": "none",
        "axes.grid": True,
    })  # fmt: skip


def _figure(plot: Plot, palette: Palette) -> Figure:
    figure = Figure(figsize=(5.6, plot.height), dpi=110, layout="constrained")
    plot.draw(figure.add_subplot(), palette)
    return figure
