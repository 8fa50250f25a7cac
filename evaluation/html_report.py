"""report.html: one file that opens anywhere, offline, in light and dark mode; it loads nothing and runs no script.

The page itself is report.html.jinja. It is autoescaped: what a model or a dataset wrote is text there, never markup.
"""

from pathlib import Path
from typing import Any

import jinja2

from common import atomic_files
from evaluation import plots, report

PAGE = "report.html"
READINGS = (  # key in report.json's "reading", heading, what these pairs are
    ("mistakes", "Most confident mistakes", "the model prefers the rejected reply by the widest margin"),
    ("disagreements", "Where the two models disagree most", "only one of them prefers the chosen reply"),
    ("near_ties", "Near-ties", "the two rewards are almost the same"),
)


def write(folder: Path, content: dict[str, Any], drawn: list[plots.Plot]) -> None:
    """Write report.html, all or nothing."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters |= {"percent": report.percent, "number": report.number, "count": "{:,}".format}
    page = environment.get_template("report.html.jinja").render(
        content=content,
        plots=[{"title": plot.title, "svg": plots.svg(plot)} for plot in drawn],
        tables=report.tables(content),
        readings=[
            (heading, explanation, [_pair_view(entry) for entry in entries])
            for key, heading, explanation in READINGS
            if (entries := content["reading"].get(key))
        ],
        settings=[
            *content["settings"].items(),
            *(("rows", line) for line in [*content["notes"], *content["rows"]["in_words"]]),
            ("weights, tokenizer and precision", content["fingerprint"][:16]),
        ],
    )
    with atomic_files.atomic_file(folder / PAGE) as file:
        file.write(page + "\n")


def _pair_view(entry: dict[str, Any]) -> dict[str, Any]:
    """An entry of --scores_out as the page shows it: what the dialogues share, then the replies side by side."""
    is_pair = isinstance(entry["chosen"][0], dict)  # else each side is a list of dialogues
    sides = {side: [entry[side]] if is_pair else entry[side] for side in ("chosen", "rejected")}
    shared = sides["chosen"][0][:-1]
    about = [entry["place"], entry.get("subset"), "suspected mislabel" if entry["suspected_mislabel"] else None]
    if "against" in entry:
        about.append(f"the other model: Δr {entry['against']['margin']:+.3f}")
    replies = []
    for side, dialogues in sides.items():
        rewards = entry[f"reward_{side}"]
        for dialogue, reward in zip(dialogues, [rewards] if is_pair else rewards, strict=True):
            replies.append({"side": side, "reward": reward, "text": _own_text(dialogue, shared)})
    return {"margin": entry["margin"], "about": " · ".join(filter(None, about)), "shared": shared, "replies": replies}


def _own_text(dialogue: list[dict[str, str]], shared: list[dict[str, str]]) -> str:
    """The last message, preceded by all that is not `shared`: the two replies may answer different prompts."""
    *before, last = dialogue
    alike = 0
    while alike < min(len(shared), len(before)) and before[alike] == shared[alike]:
        alike += 1
    return "".join(f"{m['role']}: {m['content']}\n\n" for m in before[alike:]) + last["content"]
