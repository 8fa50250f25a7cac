"""report.html: what `measure` and `readings` found, as a page. The page itself is report.html.jinja."""

from pathlib import Path
from typing import Any

import utils
from common import pages
from evaluation import analysis, report

PAGE = "report.html"
MOST_OF_PROMPT = 90  # characters of it that a folded pair shows
READINGS = (  # key in report.json's "reading", heading, what these pairs are
    ("mistakes", "Most confident mistakes", "The model prefers the rejected reply by the widest margin."),
    ("disagreements", "Where the two models disagree most", "Only one of them prefers the chosen reply."),
    ("near_ties", "Near-ties", f"The model is less than {analysis.NEAR_TIE:.0%} sure of its choice."),
)


def write(folder: Path, content: dict[str, Any], drawn: list[pages.Plot]) -> None:
    """Write report.html, all or nothing."""
    filters = {"counted": utils.counted, "as_floor": report.floor, "as_interval": report.temperature_interval}
    pages.write(
        folder / PAGE, Path(__file__).with_name("report.html.jinja"), drawn, filters,
        content=content,
        tables=report.tables(content),
        why_no_temperature=report.why_no_temperature(content),
        readings=[
            (heading, explanation, [_pair_view(entry) for entry in entries])
            for key, heading, explanation in READINGS
            if (entries := content["reading"].get(key))
        ],
        settings=[
            *content["settings"].items(),
            *(("rows", line) for line in [*content["notes"], *content["rows"]["in_words"]]),
            ("fingerprint of weights, tokenizer and precision", content["fingerprint"][:16]),
        ],
    )  # fmt: skip


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
    return {
        "margin": entry["margin"], "prompt": _first_words(shared or sides["chosen"][0]),
        "about": " · ".join(filter(None, about)), "shared": shared, "replies": replies,
    }  # fmt: skip


def _first_words(dialogue: list[dict[str, str]]) -> str:
    """The beginning of the prompt that is answered, on one line."""
    asked = next((message["content"] for message in reversed(dialogue) if message["role"] == "user"), "")
    words = " ".join(asked.split())
    return words if len(words) <= MOST_OF_PROMPT else words[:MOST_OF_PROMPT].rstrip() + "…"


def _own_text(dialogue: list[dict[str, str]], shared: list[dict[str, str]]) -> str:
    """The last message, preceded by all that is not `shared`: the two replies may answer different prompts."""
    *before, last = dialogue
    alike = 0
    while alike < min(len(shared), len(before)) and before[alike] == shared[alike]:
        alike += 1
    return "".join(f"{m['role']}: {m['content']}\n\n" for m in before[alike:]) + last["content"]
