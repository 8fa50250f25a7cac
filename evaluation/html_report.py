"""report.html: one file that opens anywhere, offline, in the light and in the dark; it loads nothing, runs nothing."""

from __future__ import annotations

import html
from pathlib import Path
from typing import Any

from common import atomic_files
from evaluation import plots
from evaluation import report as figures

PAGE = "report.html"
# No address may be loaded and no script run, whatever a reply says.
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
STYLE = """
:root { color-scheme: light dark; --page: #f6f7f9; --card: #ffffff; --ink: #1d2430; --muted: #5b6472; --grid: #dfe3e8;
  --accent: #2563c9; --second: #c2410c; }
@media (prefers-color-scheme: dark) { :root { --page: #12161c; --card: #1b2129; --ink: #e6e9ee; --muted: #a3adba;
  --grid: #333c48; --accent: #6ea8fe; --second: #fb923c; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); line-height: 1.5; overflow-wrap: anywhere;
  font-family: system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
main { max-width: 72rem; margin: 0 auto; padding: 2rem 1.25rem 4rem; }
h1 { font-size: 1.55rem; margin: 0; } h2 { font-size: 1.15rem; margin: 2.5rem 0 .75rem; }
h3 { font-size: .95rem; margin: 0 0 .5rem; font-weight: 600; }
p { margin: .4rem 0; } .muted, figcaption, summary span { color: var(--muted); } code { font-size: .9em; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(10.5rem, 1fr)); gap: .75rem;
  margin-top: 1.25rem; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(27rem, 100%), 1fr)); gap: .75rem; }
.card, figure, .panel, details { background: var(--card); border: 1px solid var(--grid); border-radius: .6rem; }
.card { padding: .8rem 1rem; } .card b { display: block; font-size: 1.6rem; line-height: 1.3; }
.card small { color: var(--muted); display: block; line-height: 1.35; }
figure { margin: 0; padding: .9rem 1rem .6rem; } figure svg { width: 100%; height: auto; display: block; }
.panel { padding: .6rem 1rem; } .findings li { margin: .25rem 0; } .findings { padding-left: 1.2rem; margin: 0; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
td { padding: .25rem 0; border-top: 1px solid var(--grid); vertical-align: top; } tr:first-child td { border: 0; }
td + td { text-align: right; padding-left: 1rem; }
details { margin: .5rem 0; padding: 0 1rem; } details[open] { padding-bottom: .8rem; }
summary { cursor: pointer; padding: .55rem 0; }
.turn { white-space: pre-wrap; margin: .3rem 0; }
.turn b { color: var(--muted); font-weight: 600; margin-right: .4rem; }
.sides { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(20rem, 100%), 1fr)); gap: .75rem; }
.reply { border-left: 3px solid var(--accent); padding-left: .75rem; white-space: pre-wrap; }
.reply.wrong { border-color: var(--second); }
"""


def write(folder: Path, content: dict[str, Any], drawn: list[plots.Plot]) -> None:
    """report.html, all or nothing."""
    with atomic_files.published_file(folder / PAGE) as file:
        file.write(page(content, [(plot, plots.svg(plot)) for plot in drawn]))


def page(content: dict[str, Any], drawn: list[tuple[plots.Plot, str]]) -> str:
    """The whole page; every text of the data is escaped."""
    title = f"How good is {content['model']}?"
    reading = content["reading"]
    sorts = [
        ("mistakes", "Most confident mistakes", "the highest reward for the reply that people found worse"),
        ("disagreements", "Where the two models disagree most", "one is right, the other is not"),
        ("near_ties", "Near-ties", "the model can hardly tell the two replies apart"),
    ]
    stands_out = content["findings"] or ["Nothing: no bias or weakness that these figures would show."]
    parts = [
        f"<h1>{_text(title)}</h1>",
        f'<p class="muted">{_text(_subtitle(content))}</p>',
        f'<div class="cards">{"".join(_card(*card) for card in _cards(content))}</div>',
        "<h2>What stands out</h2>",
        f'<div class="panel"><ul class="findings">{"".join(f"<li>{_text(one)}</li>" for one in stands_out)}</ul></div>',
        '<h2>In pictures</h2><div class="plots">',
        *(f"<figure><h3>{_text(plot.title)}</h3>{svg}</figure>" for plot, svg in drawn),
        "</div>",
    ]
    tables = [("Length and calibration", figures.length_and_calibration(content), "")]
    if benchmark := content["benchmark"]:
        lines = [(name, figures.percent(value)) for name, value in benchmark["parts"].items()]
        lack = f"not in this data: {', '.join(benchmark['missing'])}" if benchmark["missing"] else ""
        tables.append((benchmark["name"], [*lines, ("score", figures.percent(benchmark["score"]))], lack))
    if against := content.get("against"):
        tables.append((f"Against {against['model']}", figures.comparison(against), ""))
    parts += ['<h2>In figures</h2><div class="plots">', *(_panel(*one) for one in tables), "</div>"]
    for key, heading, what in sorts:
        if entries := reading.get(key):
            parts += [
                f"<h2>{heading}</h2>",
                f'<p class="muted">{what}</p>',
                *(_reading(one, key == sorts[0][0] and one is entries[0]) for one in entries),
            ]
    parts += ["<h2>How this was made</h2>", _panel("", _made(content), DEFINITIONS)]
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{_text(title)}</title>\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<style>{STYLE}</style></head>\n'
        f"<body><main>\n{chr(10).join(parts)}\n</main></body></html>\n"
    )


DEFINITIONS = (
    "A pair is right if the better reply has the higher reward; equal rewards are ties, and not right. Intervals are "
    "Wilson’s, 95 %. Length is the tokens of the last reply. Length-controlled accuracy is the mean of the accuracy "
    "where the better reply is longer and where it is shorter: what is left when length decides nothing. The "
    "calibration error compares σ(|Δr|), the probability that the model claims for its own choice, with how often "
    "people agree. A suspected mislabel is a label to which the model, its temperature mended, gives less than 5 %."
)


def _text(value: Any) -> str:
    return html.escape(str(value))


def _subtitle(content: dict[str, Any]) -> str:
    rows = content["rows"]
    left_out = f", {rows['left_out']:,} left out" if rows["left_out"] else ""
    return f"{content['dataset']}, {content['split']}: {content['n']:,} of {rows['read']:,} rows{left_out}"


def _cards(content: dict[str, Any]) -> list[tuple[str, str, str]]:
    percent, number = figures.percent, figures.number
    length, calibration = content["length"], content["calibration"]
    temperature = calibration["temperature"]
    low, high = content["interval"]
    return [
        ("accuracy", percent(content["accuracy"]), f"95 % interval {low:.1%} to {high:.1%}"),
        ("ties", f"{content['ties']:,}", f"of {content['n']:,}; {content['wrong']:,} wrong"),
        ("length-controlled", percent(length["length_controlled"]["accuracy"]), "accuracy without length’s help"),
        ("prefers the longer reply", percent(length["model_prefers_longer"]),
         f"people: {percent(length['people_prefer_longer'])}"),
        ("calibration error", percent(calibration["ece"]), "0 % is perfect"),
        ("temperature", number(temperature and temperature["value"], ".3g"), "divide rewards by it; 1 is perfect"),
    ]  # fmt: skip


def _card(label: str, value: str, note: str) -> str:
    return f'<div class="card"><small>{_text(label)}</small><b>{_text(value)}</b><small>{_text(note)}</small></div>'


def _panel(title: str, rows: list[tuple[str, str]], note: str) -> str:
    cells = "".join(f"<tr><td>{_text(what)}</td><td>{_text(value)}</td></tr>" for what, value in rows)
    heading = f"<h3>{_text(title)}</h3>" if title else ""
    return f'<div class="panel">{heading}<table>{cells}</table><p class="muted">{_text(note)}</p></div>'


def _made(content: dict[str, Any]) -> list[tuple[str, str]]:
    return [
        *((name, str(value)) for name, value in content["settings"].items()),
        *(("rows", line) for line in [*content["notes"], *content["rows"]["in_words"]]),
        ("weights, tokenizer and precision", content["fingerprint"][:16]),
    ]


def _reading(entry: dict[str, Any], is_open: bool) -> str:
    """One pair: rewards in the summary; what the two dialogues share, then the two replies side by side."""
    chosen, rejected = entry["chosen"], entry["rejected"]
    rights, wrongs = ([chosen], [rejected]) if isinstance(chosen[0], dict) else (chosen, rejected)
    shared = rights[0][:-1]
    about = [entry["place"], *([entry["subset"]] if "subset" in entry else [])]
    about += ["suspected mislabel"] * entry["suspected_mislabel"]
    if "against" in entry:
        about.append(f"the other model: Δr {entry['against']['margin']:+.3f}")
    summary = f"<summary>Δr {entry['margin']:+.3f} <span>{_text(' · '.join(about))}</span></summary>"
    turns = "".join(f'<p class="turn"><b>{_text(m["role"])}</b>{_text(m["content"])}</p>' for m in shared)
    sides = [
        _reply(dialogue, reward, shared, css, label)
        for dialogues, rewards, css, label in (
            (rights, entry["reward_chosen"], "reply", "people prefer"),
            (wrongs, entry["reward_rejected"], "reply wrong", "people do not"),
        )
        for dialogue, reward in zip(dialogues, rewards if isinstance(rewards, list) else [rewards], strict=True)
    ]
    return f'<details{" open" if is_open else ""}>{summary}{turns}<div class="sides">{"".join(sides)}</div></details>'


def _reply(dialogue: list[dict[str, str]], reward: float, shared: list[dict[str, str]], css: str, label: str) -> str:
    """The last message; all that differs from the other side's dialogue where they answer different prompts."""
    alike = 0
    while alike < min(len(shared), len(dialogue) - 1) and dialogue[alike] == shared[alike]:
        alike += 1
    own = dialogue[alike:-1] if alike < len(shared) or len(dialogue) - 1 > len(shared) else []
    before = "".join(f"{m['role']}: {m['content']}\n\n" for m in own)
    head = f'<small class="muted">{label} · reward {reward:+.3f}</small>'
    return f'<div>{head}<div class="{css}">{_text(before + dialogue[-1]["content"])}</div></div>'
