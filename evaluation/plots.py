"""The plots of a report, and as pixels for TensorBoard."""

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg

import utils
from common import pages
from common.pages import Palette, Plot

BREAKDOWNS = {"by_subset": "subset", "by_turns": "number of user turns", "by_length": "tokens of the longest reply"}
MOST_ROWS = 40  # of a breakdown
MOST_POINTS = 800  # of a scatter plot: SVG keeps every one of them


def plots(content: dict[str, Any], rewards: np.ndarray, lengths: np.ndarray) -> list[Plot]:
    """The plots of a report; rewards and lengths (N, 2) are those of its pairs: chosen, rejected."""
    reward_margins, longer_by = (values[:, 0] - values[:, 1] for values in (rewards, lengths))  # (N,) each
    return [
        _intervals(
            "accuracy", "Accuracy, compared with simple rules", model_and_baselines(content),
            "The dot is the accuracy, the line its 95 % interval. Left of the dashed line is worse than guessing. A "
            "model whose line reaches the dot of a rule has not shown that it knows more than the rule.",
        ),
        *(
            _intervals(
                name, f"Accuracy by {what}", content[name],
                "The same for parts of the pairs. A long line means few pairs; parts whose lines meet may be equal.",
            )
            for name, what in BREAKDOWNS.items()
            if len(content[name]) > 1
        ),
        Plot(
            "margins", "Δr = chosen reward − rejected reward",
            "How many pairs have which Δr. Right of zero the model agrees with people; far left are its confident "
            "mistakes, which stand below.",
            lambda a, p: _margins(a, p, reward_margins),
        ),
        Plot(
            "reliability", "Calibration: claimed and actual agreement",
            "Of the pairs in which the model claims 80 %, people should agree in 80 %: then a dot lies on the dashed "
            "line. Below it the model is too sure of itself. The numbers count pairs; of few, a dot strays by chance.",
            lambda a, p: _reliability(a, p, content),
        ),
        Plot(
            "length", "Difference in reward and in length",
            "Each dot is a pair. A trend that rises means that longer replies get more reward, one that falls that "
            "shorter ones do; a level one, that length decides nothing.",
            lambda a, p: _length(a, p, reward_margins, longer_by),
        ),
    ]  # fmt: skip


def model_and_baselines(content: dict[str, Any]) -> dict[str, Any]:
    """The model's accuracy above those of the baselines, each as `metrics.accuracy` returns it."""
    low, high = content["interval"]
    model = {key: content[key] for key in ("n", "right", "ties", "accuracy")} | {"low": low, "high": high}
    return {"this model": model, **content["baselines"]}


def _intervals(name: str, title: str, groups: dict[str, Any], reading: str) -> Plot:
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

    return Plot(name, title, reading, draw, 0.9 + 0.32 * len(kept))


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
    for at, height, count in zip(claimed, ends[:, 1], counts, strict=True):
        axes.annotate(
            f"{count:,}", (at, height), xytext=(0, 2), textcoords="offset points", ha="center", va="bottom",
            color=palette["muted"], fontsize=8,
        )  # fmt: skip
    axes.set_xlim(0.48, 1.03)
    axes.set_ylim(min(0.45, ends.min() - 0.03), 1.09)
    axes.set_xlabel("claimed: σ(|Δr|)")
    axes.set_ylabel("people agree")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(lambda value, _: f"{value:.0%}")


def _length(axes: Axes, palette: Palette, reward_margins: np.ndarray, longer_by: np.ndarray) -> None:
    chosen = np.random.default_rng(0).permutation(len(reward_margins))[:MOST_POINTS]
    axes.axhline(0, color=palette["grid"], linewidth=1)
    axes.axvline(0, color=palette["grid"], linewidth=1)
    axes.scatter(longer_by[chosen], reward_margins[chosen], s=10, color=palette["accent"], alpha=0.45, linewidth=0)
    if longer_by.any():  # through the origin, since a pair is one in either order
        slope = float(longer_by @ reward_margins) / float(longer_by @ longer_by)
        ends = np.array([longer_by.min(), longer_by.max()])
        axes.plot(ends, slope * ends, color=palette["second"], linewidth=1.5, label="trend")
        axes.legend(frameon=False, labelcolor=palette["ink"])
    axes.set_xlabel("tokens by which the chosen reply is longer")
    axes.set_ylabel("Δr")


def image(plot: pages.Plot) -> np.ndarray:
    """A plot as (height, width, 3) bytes for TensorBoard."""
    with pages.style(pages.ON_WHITE, plot):
        figure = pages.figure(plot, pages.ON_WHITE)
        figure.axes[0].set_title(plot.title, fontsize=11, loc="left")
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        return np.asarray(canvas.buffer_rgba())[..., :3].copy()
