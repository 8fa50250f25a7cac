"""report.html: what `measure` and `readings` found, as a page. The page itself is report.html.jinja."""

from pathlib import Path
from typing import Any

from common import pages
from evaluation import report

PAGE = "report.html"
FIRST_WORDS = 90  # characters of a prompt beside a folded pair
READINGS = (  # key in report.json's "reading", heading, what these pairs are
    ("mistakes", "Most confident mistakes", "the model prefers the rejected reply by the widest margin"),
    ("disagreements", "Where the two models disagree most", "only one of them prefers the chosen reply"),
    ("near_ties", "Near-ties", "the model gives either reply about half"),
)


def write(folder: Path, content: dict[str, Any], drawn: list[pages.Plot]) -> None:
    """Write report.html, all or nothing."""
    pages.write(
        folder / PAGE, Path(__file__).with_name("report.html.jinja"), drawn,
        content=content,
        temperature=report.temperature(content),
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
    asked = " ".join(shared[-1]["content"].split()) if shared else ""
    first_words = asked if len(asked) <= FIRST_WORDS else asked[:FIRST_WORDS] + "…"
    return {
        "margin": entry["margin"], "first_words": first_words, "about": " · ".join(filter(None, about)),
        "shared": shared, "replies": replies,
    }  # fmt: skip


def _own_text(dialogue: list[dict[str, str]], shared: list[dict[str, str]]) -> str:
    """The last message, preceded by all that is not `shared`: the two replies may answer different prompts."""
    *before, last = dialogue
    alike = 0
    while alike < min(len(shared), len(before)) and before[alike] == shared[alike]:
        alike += 1
    return "".join(f"{m['role']}: {m['content']}\n\n" for m in before[alike:]) + last["content"]
