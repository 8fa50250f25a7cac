"""The plots of a report, and as pixels for TensorBoard."""

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg

import utils
from common import pages
from common.pages import Palette, Plot

HOW_TO_READ = {
    "accuracy": "A dot is a share of right pairs, its line the range in which the true share lies (95 %); dashed: "
    "guessing. A useful model's line lies clearly to the right of those of the simple rules.",
    "by": "Pairs in groups: a dot is a group's accuracy, its line the range in which the true one lies (95 %). Groups "
    "whose lines overlap widely may not differ at all.",
    "margins": "How much higher the chosen reply's reward is. Right of 0 the model agrees with people; the further "
    "from 0, the surer it is. Bars far to the left are confident mistakes.",
    "reliability": "Pairs in groups by how sure the model is; the numbers count them. On the dashed line the model is "
    "right as often as it claims: below it is overconfident, above underconfident. Vertical lines: 95 % intervals.",
}
BREAKDOWNS = {"by_subset": "subset", "by_turns": "number of user turns", "by_length": "tokens of the longest reply"}
MOST_ROWS = 40  # of a breakdown
MOST_POINTS = 800  # of a scatter plot: SVG keeps every one of them


def plots(content: dict[str, Any], rewards: np.ndarray, lengths: np.ndarray) -> list[Plot]:
    """The plots of a report; rewards and lengths (N, 2) are those of its pairs: chosen, rejected."""
    reward_margins, longer_by = (values[:, 0] - values[:, 1] for values in (rewards, lengths))  # (N,) each
    trend, read = content["length"]["trend"], HOW_TO_READ
    return [
        _intervals("accuracy", "Accuracy, compared with simple rules", read["accuracy"], model_and_baselines(content)),
        *(
            _intervals(name, f"Accuracy by {what}", read["by"], content[name])
            for name, what in BREAKDOWNS.items()
            if len(content[name]) > 1
        ),
        Plot(
            "margins", "Δr = chosen reward − rejected reward", read["margins"],
            lambda a, p: _margins(a, p, reward_margins),
        ),
        Plot(
            "reliability", "Calibration: how sure the model is, and how often right", read["reliability"],
            lambda a, p: _reliability(a, p, content),
        ),
        Plot(
            "length", "Does length decide? Differences in reward and in length", length_in_words(trend),
            lambda a, p: _length(a, p, reward_margins, longer_by, trend),
        ),
    ]  # fmt: skip


def length_in_words(trend: dict[str, float] | None) -> str:
    """How to read the plot of length, and what its trend line says."""
    read = "A dot is a pair; right of 0 its chosen reply is the longer. If length did not matter, all would be level."
    if trend is None:
        return f"{read} There is no trend line: too few pairs differ in both."
    slope, low, high = (f"{100 * trend[name]:+.3g}" for name in ("slope", "low", "high"))
    gain = f"{slope} for 100 tokens more (95 % interval {low} to {high})"
    if trend["low"] <= 0 <= trend["high"]:
        return f"{read} Here the trend is level within its error: {gain}."
    direction, side = ("rises", "longer") if trend["slope"] > 0 else ("falls", "shorter")
    return f"{read} Here the trend {direction}, so {side} replies get higher rewards: {gain}."


def model_and_baselines(content: dict[str, Any]) -> dict[str, Any]:
    """The model's accuracy above those of the baselines, each as `metrics.accuracy` returns it."""
    low, high = content["interval"]
    model = {key: content[key] for key in ("n", "right", "ties", "accuracy")} | {"low": low, "high": high}
    return {"this model": model, **content["baselines"]}


def _intervals(name: str, title: str, how_to_read: str, groups: dict[str, Any]) -> Plot:
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

    return Plot(name, title, how_to_read, draw, 0.9 + 0.32 * len(kept))


def _margins(axes: Axes, palette: Palette, reward_margins: np.ndarray) -> None:
    low, high = np.quantile(reward_margins, [0.001, 0.999])
    reach = max(abs(low), abs(high)) or 1.0
    edges = np.linspace(-reach, reach, 61 if len(reward_margins) > 2000 else 31)  # 0 is one of them
    shown = np.clip(reward_margins, -reach, reach)
    axes.hist(shown[shown <= 0], edges, color=palette["second"], label="wrong or tie")
    axes.hist(shown[shown > 0], edges, color=palette["accent"], label="right")
    axes.axvline(0, color=palette["ink"], linewidth=1)
    axes.set_xlabel("Δr")
    axes.set_ylabel("pairs")
    axes.yaxis.get_major_locator().set_params(integer=True)
    axes.legend(frameon=False, labelcolor=palette["ink"])


def _reliability(axes: Axes, palette: Palette, content: dict[str, Any]) -> None:
    bins = content["calibration"]["bins"]
    claimed, happened, counts = (np.array([one[key] for one in bins]) for key in ("claimed", "happened", "count"))
    ends = np.array([utils.wilson_interval(round(h * n), int(n)) for h, n in zip(happened, counts, strict=True)])
    reach = np.abs(ends.T - happened)  # (2, bins)
    axes.plot([0.5, 1], [0.5, 1], color=palette["muted"], linewidth=1, linestyle=(0, (4, 3)))
    axes.errorbar(
        claimed, happened, yerr=reach, fmt="o", color=palette["accent"], markersize=5, linewidth=1.5, capsize=0
    )
    for x, y, count in zip(claimed, happened, counts, strict=True):
        axes.annotate(
            f"{count:,}", (x, y), (4, -7), textcoords="offset points", va="center", color=palette["muted"], fontsize=8.5
        )
    axes.set_xlim(0.48, 1.05)
    axes.set_ylim(min(0.45, ends.min() - 0.03), 1.05)
    axes.set_xlabel("how sure the model is of its choice: σ(|Δr|)")
    axes.set_ylabel("how often it is right")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(lambda value, _: f"{value:.0%}")


def _length(
    axes: Axes, palette: Palette, reward_margins: np.ndarray, longer_by: np.ndarray, trend: dict[str, float] | None
) -> None:
    chosen = np.random.default_rng(0).permutation(len(reward_margins))[:MOST_POINTS]
    axes.axhline(0, color=palette["muted"], linewidth=1)
    axes.axvline(0, color=palette["muted"], linewidth=1)
    axes.scatter(longer_by[chosen], reward_margins[chosen], s=10, color=palette["accent"], alpha=0.45, linewidth=0)
    if trend:
        ends = np.array([longer_by[chosen].min(), longer_by[chosen].max()])
        line = trend["intercept"] + trend["slope"] * ends
        axes.plot(ends, line, color=palette["second"], linewidth=2, label="trend")
        axes.legend(frameon=False, labelcolor=palette["ink"])
    axes.set_xlabel("tokens by which the chosen reply is longer")
    axes.set_ylabel("Δr: right above 0")


def image(plot: Plot) -> np.ndarray:
    """A plot as (height, width, 3) bytes for TensorBoard."""
    with pages.style(pages.ON_WHITE, plot):
        figure = pages.figure(plot, pages.ON_WHITE)
        figure.axes[0].set_title(plot.title, fontsize=11, loc="left")
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        return np.asarray(canvas.buffer_rgba())[..., :3].copy()
