"""Pages that open anywhere, offline, in light and dark mode, with plots as SVG that takes its colours from the page.

A page extends page.html.jinja. It is autoescaped: what a model or a dataset wrote is text there, never markup. It loads
nothing and runs no script.
"""

import html
import io
import re
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from common import atomic_files

Palette = dict[str, str]  # colours for: ink, muted (text), grid, accent, second (accent)
ON_WHITE = {"ink": "#1d2430", "muted": "#5b6472", "grid": "#dfe3e8", "accent": "#2563c9", "second": "#c2410c"}
# Placeholders that `svg` replaces with the page's CSS variables, since matplotlib does not know `var(--ink)`.
PLACEHOLDERS = {"ink": "#010203", "muted": "#040506", "grid": "#070809", "accent": "#0a0b0c", "second": "#0d0e0f"}

Draw = Callable[[Axes, Palette], None]


@dataclass(frozen=True)
class Plot:
    """What draws a plot, its height in inches, and how to read it."""

    name: str
    title: str
    how_to_read: str
    draw: Draw
    height: float = 3.0


def percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.1%}"


def number(value: float | None, form: str = ".3f") -> str:
    return "–" if value is None else format(value, form)


def write(
    path: Path, template: Path, plots: Sequence[Plot], filters: dict[str, Callable[..., str]], **values: Any
) -> None:
    """Write a page, all or nothing: a template, which has `filters` of its own, `values`, and the plots as `plots`."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([template.parent, Path(__file__).parent]), autoescape=True,
        undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters |= {"percent": percent, "number": number, "count": "{:,}".format, **filters}
    drawn = [{"title": plot.title, "how_to_read": plot.how_to_read, "svg": svg(plot)} for plot in plots]
    page = environment.get_template(template.name).render(plots=drawn, **values)
    with atomic_files.atomic_file(path) as file:
        file.write(page + "\n")


def svg(plot: Plot) -> str:
    """A plot as an SVG element for a page: texts stay text, colours are the page's variables."""
    written = io.BytesIO()
    with style(PLACEHOLDERS, plot):
        figure(plot, PLACEHOLDERS).savefig(written, format="svg", transparent=True, metadata={"Date": None})
    text = written.getvalue().decode("utf-8")
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'<g id="[a-z]+_?\w*">', "<g>", text)  # several plots in one page would repeat these names
    for name, placeholder in PLACEHOLDERS.items():
        text = text.replace(placeholder, f"var(--{name})")
    opening = rf'<svg viewBox="\1" role="img" aria-label="{html.escape(plot.title)}">'
    text = re.sub(r'<svg[^>]*viewBox="([^"]+)"[^>]*>', opening, text, count=1)
    return re.sub(r"font: ([\d.]+px) [^;\"]*", r"font-size: \1", text)  # the page's font


def style(palette: Palette, plot: Plot) -> AbstractContextManager:
    return matplotlib.rc_context({
        "svg.fonttype": "none", "svg.hashsalt": plot.name, "font.size": 10, "text.color": palette["ink"],
        "axes.edgecolor": palette["grid"], "axes.labelcolor": palette["muted"], "xtick.color": palette["muted"],
        "ytick.color": palette["muted"], "ytick.labelcolor": palette["ink"], "grid.color": palette["grid"],
        "axes.spines.top": False, "axes.spines.right": False, "axes.spines.left": False, "axes.axisbelow": True,
        "xtick.major.size": 0, "ytick.major.size": 0, "figure.facecolor": "white", "axes.facecolor": "none",
        "axes.grid": True,
    })  # fmt: skip


def figure(plot: Plot, palette: Palette) -> Figure:
    figure = Figure(figsize=(5.0, plot.height), dpi=110, layout="constrained")
    plot.draw(figure.add_subplot(), palette)
    figure.draw_without_rendering()  # a first layout settles the ticks, which the second one makes room for
    return figure
