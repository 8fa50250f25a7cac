"""What the columns of a row mean: preference sets go by many forms, and each becomes one of prompt, chosen, rejected.

A shape is recognised by the names of a row's columns. `recognised` turns a row into *views*: rows with the columns
`prompt`, `chosen`, `rejected` and, where there are any, `system`, `tools`, `margin` and `strength`; a row of several
ranked replies has one view for each pair with the best.
"""

import math
import operator
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from data_pipeline import messages
from utils import nearest

Row = dict[str, Any]

PROMPT_COLUMNS = (
    "prompt", "messages", "conversations", "conversation", "context", "history", "question", "query", "instruction",
    "trajectory", "problem", "user_prompt", "input", "info",
)  # fmt: skip
SYSTEM_COLUMNS = ("system", "system_prompt", "system_message")
# what sets call the scores of the chosen and of the rejected reply
SCORES = (
    ("score_chosen", "score_rejected"), ("chosen_score", "rejected_score"), ("chosen_rating", "rejected_rating"),
    ("chosen_avg_rating", "rejected_avg_rating"), ("chosen-rating", "rejected-rating"),
)  # fmt: skip
# columns of these names look like part of a dialogue
DIALOGUE_COLUMNS = (
    *(name for name in PROMPT_COLUMNS if name != "info"), *SYSTEM_COLUMNS, "tools", "functions", "documents", "turns",
    "dialogue", "dialog", "reasoning", "reasoning_content", "thinking", "response", "reply", "completion", "output",
    "answer", "chat_history", "document", "passage", "article", "post", "title", "system_instruction", "System",
    "additional_context",
)  # fmt: skip
STRENGTH = "strength"  # by how much the chosen reply is better, in `--columns margin=strength`
NAMES = ("prompt", "chosen", "rejected", "margin", "kind", "system", "tools", "messages", "reply", "replies", "subset")

_TAKES_STRENGTH = object()
_TURN = re.compile(r"(?:\A|\n\n)\s*(?:Human|Assistant):")


class NoPreference(Exception):
    """The row compares two replies and prefers neither."""


@dataclass(frozen=True)
class Shape:
    """One form of preference data.

    Attributes:
        name: what it is, and what picks the chosen reply.
        columns: all must be in a row of this shape.
        views: (chosen, rejected, strength) of a row; raises NoPreference, KeyError, TypeError or ValueError.
    """

    name: str
    columns: tuple[str, ...]
    views: Callable[[Row], Iterator[tuple[Any, Any, float | None]]]


def _pair(chosen: str, rejected: str) -> Callable[[Row], Iterator[tuple]]:
    """Two columns; the strength is the difference of the replies' scores where a row has them."""

    def views(row: Row) -> Iterator[tuple[Any, Any, float | None]]:
        names = next((names for names in SCORES if all(row.get(name) is not None for name in names)), None)
        strength = None
        if names is not None and row.get("margin") is _TAKES_STRENGTH:
            strength = _number(row, names[0]) - _number(row, names[1])
        yield row[chosen], row[rejected], strength

    return views


def _number(row: Row, column: str) -> float:
    """A finite number, which may be written as text."""
    value = row[column]
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"{column!r} is {str(value)[:40]!r}, not a finite number")
    return number


def _better(first: Any, second: Any, difference: float) -> Iterator[tuple[Any, Any, float | None]]:
    """`first` is better by `difference`, or worse if that is negative."""
    if difference == 0:
        raise NoPreference
    yield (first, second, difference) if difference > 0 else (second, first, -difference)


def _zero_or_one(row: Row, column: str) -> int:
    if str(row[column]) not in ("0", "1", "0.0", "1.0"):  # tables with nulls in them have 1.0
        raise ValueError(f"{column!r} is {row[column]!r}, not 0 or 1")
    return int(float(row[column]))


def _safe_rlhf(row: Row) -> Iterator[tuple[Any, Any, float | None]]:
    better = _zero_or_one(row, "better_response_id")
    yield row[f"response_{better}"], row[f"response_{1 - better}"], None


def _arena(row: Row) -> Iterator[tuple[Any, Any, float | None]]:
    sides = {"model_a": ("conversation_a", "conversation_b"), "model_b": ("conversation_b", "conversation_a")}
    if not isinstance(row["winner"], str):
        raise ValueError(f"'winner' is {row['winner']!r}, not a text")
    if row["winner"] not in sides:
        if "tie" in row["winner"] or "bad" in row["winner"]:  # tie, tie (bothbad), both_bad
            raise NoPreference
        raise ValueError(f"'winner' is {row['winner']!r}, not model_a, model_b or a tie")
    chosen, rejected = sides[row["winner"]]
    yield row[chosen], row[rejected], None


def _shp(row: Row) -> Iterator[tuple[Any, Any, float | None]]:
    first, second = row["human_ref_A"], row["human_ref_B"]
    yield (first, second, None) if _zero_or_one(row, "labels") else (second, first, None)


def _summaries(row: Row) -> Iterator[tuple[Any, Any, float | None]]:
    better = _zero_or_one(row, "choice")
    texts = [summary["text"] for summary in row["summaries"]]
    if len(texts) != 2:
        raise ValueError(f"'summaries' holds {len(texts)}, not two")
    yield texts[better], texts[1 - better], None


def _offset_bias(row: Row) -> Iterator[tuple[Any, Any, float | None]]:
    if str(row["label"]) not in ("1", "2", "1.0", "2.0"):
        raise ValueError(f"'label' is {row['label']!r}, not 1 or 2")
    better = int(float(row["label"]))
    yield row[f"output_{better}"], row[f"output_{3 - better}"], None


def _votes(row: Row) -> Iterator[tuple[Any, Any, float | None]]:
    first, second = (_zero_or_one(row, f"winner_model_{side}") for side in "ab")
    if first and second:
        raise ValueError("both sides have won")
    yield from _better(row["response_a"], row["response_b"], first - second)


def _ranked(column: str, *keys: tuple[str, str, bool]) -> Callable[[Row], Iterator[tuple]]:
    """The best of several replies against each other one that is worse.

    `keys` are what sets call a reply's text and its rank, and whether the lowest rank is the best.
    """

    def views(row: Row) -> Iterator[tuple[Any, Any, float | None]]:
        if not isinstance(row[column], list) or not row[column]:
            raise ValueError(f"{column!r} is not a list with replies")
        first = row[column][0]
        text, rank, is_best_first = next(
            (key for key in keys if isinstance(first, dict) and {*key[:2]} <= {*first}), keys[0]
        )
        if any(not isinstance(reply, dict) or not {text, rank} <= reply.keys() for reply in row[column]):
            raise ValueError(f"{column!r} holds something that is not a reply with {text!r} and {rank!r}")
        # as numbers: the text "10" would come before "9"
        replies = [(_number(reply, rank), reply[text]) for reply in row[column]]
        replies.sort(key=operator.itemgetter(0), reverse=not is_best_first)
        best_rank, best = replies[0]
        worse = [reply for reply in replies[1:] if reply[0] != best_rank]
        if not worse:
            raise NoPreference
        for reply_rank, reply in worse:
            yield best, reply, abs(reply_rank - best_rank)

    return views


SHAPES = (
    Shape("chosen and rejected replies", ("chosen", "rejected"), _pair("chosen", "rejected")),
    *(
        Shape(f"{chosen} and {rejected}", (chosen, rejected), _pair(chosen, rejected))
        for chosen, rejected in (
            ("chosen_response", "rejected_response"), ("response_chosen", "response_rejected"),
            ("preferred", "dispreferred"), ("accepted", "rejected"),
        )
    ),
    Shape(
        "PKU-SafeRLHF: better_response_id picks chosen", ("response_0", "response_1", "better_response_id"), _safe_rlhf
    ),
    Shape(
        "HelpSteer3: the sign of overall_preference picks chosen",
        ("response1", "response2", "overall_preference"),
        lambda row: _better(row["response2"], row["response1"], _number(row, "overall_preference")),
    ),
    Shape(
        "HelpSteer2: the sign of preference_strength picks chosen",
        ("response_1", "response_2", "preference_strength"),
        lambda row: _better(row["response_2"], row["response_1"], _number(row, "preference_strength")),
    ),
    Shape("OffsetBias: label picks chosen", ("output_1", "output_2", "label"), _offset_bias),
    Shape(
        "Arena of votes: winner_model_a, winner_model_b or winner_tie picks chosen",
        ("response_a", "response_b", "winner_model_a", "winner_model_b"), _votes,
    ),
    Shape("Summaries from feedback: choice picks chosen", ("summaries", "choice"), _summaries),
    Shape("Chatbot Arena: winner picks chosen", ("conversation_a", "conversation_b", "winner"), _arena),
    Shape("SHP: labels picks chosen", ("human_ref_A", "human_ref_B", "labels"), _shp),
    Shape(
        "WebGPT: the higher score picks chosen",
        ("answer_0", "answer_1", "score_0", "score_1"),
        lambda row: _better(
            row["answer_0"], row["answer_1"], _number(row, "score_0") - _number(row, "score_1")
        ),
    ),
    Shape(
        "Nectar and Stack Exchange: the best ranked of answers against each worse one", ("answers",),
        _ranked("answers", ("answer", "rank", True), ("text", "pm_score", False), ("text", "score", False)),
    ),
    Shape(
        "UltraFeedback: the best scored of completions against each worse one", ("completions",),
        _ranked("completions", ("response", "overall_score", False)),
    ),
)  # fmt: skip

KNOWN_NAMES = {*NAMES, *(column for shape in SHAPES for column in shape.columns)}  # that `--columns` may give


def shape_of(row: Row) -> Shape | None:
    """The first shape whose columns a row has; None if it has none."""
    return next((shape for shape in SHAPES if all(column in row for column in shape.columns)), None)


def views(row: Row, shape: Shape) -> list[Row]:
    """A row of `shape` as rows with prompt, chosen and rejected. Raises what `Shape.views` does."""
    shared = {key: row.get(key) for key in ("margin", "kind", "vote", "tools")}
    shared |= {"prompt": prompt_of(row), "system": system_of(row)}
    found = []
    for chosen, rejected, strength in shape.views(row):
        if shared["margin"] is _TAKES_STRENGTH and strength is None:
            raise ValueError("--columns margin=strength: this form has no strength")
        margin = strength if shared["margin"] is _TAKES_STRENGTH else shared["margin"]
        found.append({**shared, "margin": margin, "chosen": chosen, "rejected": rejected})
    return found


def prompt_of(row: Row) -> Any:
    """The prompt of a row, by whatever name; "" if all that it has are empty, None if it has none."""
    name = _prompt_column(row)
    if name is None:
        return "" if any(row.get(name) == "" for name in PROMPT_COLUMNS) else None
    prompt = row[name]
    if isinstance(prompt, dict):  # WebGPT's, and that of the summaries from feedback
        texts = [prompt[key] for key in ("title", "full_text", "post", "article") if isinstance(prompt.get(key), str)]
        prompt = "\n\n".join(texts) if prompt.keys() & {"full_text", "post", "article"} else prompt
    return f"{prompt}\n\n{row['input']}" if _takes_input(row, name) else prompt


def _takes_input(row: Row, prompt: str | None) -> bool:
    """Whether a row has an `input` beside an `instruction`, as alpaca's kin have."""
    texts = row.get("instruction"), row.get("input")
    return prompt == "instruction" and all(isinstance(text, str) and text.strip() for text in texts)


def _prompt_column(row: Row) -> str | None:
    name = _filled(row, PROMPT_COLUMNS)
    return None if name == "info" and not isinstance(row["info"], dict) else name


def system_of(row: Row) -> Any:
    """What a row's own column says as the dialogue's system turn; None if nothing."""
    name = _filled(row, SYSTEM_COLUMNS)
    return None if name is None else row[name]


def _filled(row: Row, names: tuple[str, ...]) -> str | None:
    """The first of some columns that has anything in it."""
    return next((name for name in names if row.get(name) not in (None, "", [], {})), None)


def unused_columns(row: Row, read: tuple[str, ...], dialogues: list[Any]) -> tuple[str, ...]:
    """The columns of a row that look like part of its dialogue, and whose texts are not in each of some dialogues.

    `read` are columns that were read, beside those of the prompt and of the system turn.
    """
    prompt = _prompt_column(row)
    used = {*read, prompt, _filled(row, SYSTEM_COLUMNS), "tools", *(["input"] * _takes_input(row, prompt))}
    unused = [name for name in DIALOGUE_COLUMNS if name in row and name not in used and _texts(row[name])]
    if not unused or not dialogues:
        return ()
    known = [" ".join(" ".join(_texts(dialogue)).split()) for dialogue in dialogues]
    return tuple(
        name for name in unused if any(text not in dialogue for text in _texts(row[name]) for dialogue in known)
    )


def _texts(value: Any) -> list[str]:
    """The texts in a value, without the names of speakers, spaces as they come from `split`."""
    texts = messages.texts_of(messages.without_keys(value, (*messages.ROLE_KEYS, *messages.NOT_TEXT_OF_A_MESSAGE)))
    parts = [" ".join(part.split()) for text in texts for part in _TURN.split(text)]
    return [part for part in parts if part]


def mapped(row: Row, columns: tuple[tuple[str, str], ...]) -> Row:
    """A row under the names that `--columns` gives its columns; raises KeyError with a column that it lacks."""
    if not columns:
        return row
    renamed = {}
    for wanted, name in columns:
        takes_strength = (wanted, name) == ("margin", STRENGTH) and name not in row
        renamed[wanted] = _TAKES_STRENGTH if takes_strength else row[name]
    taken = {name for _, name in columns}
    return {key: value for key, value in row.items() if key not in taken} | renamed


def column_problems(text: str | None) -> list[str]:
    """What is wrong with `--columns`, for the list of all problems with flags."""
    try:
        parse_columns(text)
    except ValueError as error:
        return [f"--columns: {error}"]
    return []


def parse_columns(text: str | None) -> tuple[tuple[str, str], ...]:
    """`prompt=question,chosen=good` as pairs of our name and the data's; ValueError says what is wrong."""
    pairs = [tuple(part.strip() for part in item.split("=", 1)) for item in (text or "").split(",") if item.strip()]
    for pair in pairs:
        if len(pair) < 2 or not all(pair):
            raise ValueError(f"{'='.join(pair)!r} is not NAME=COLUMN")
        if pair[0] not in KNOWN_NAMES:
            raise ValueError(f"{pair[0]!r} is not one of {', '.join(NAMES)}{nearest(pair[0], NAMES)}")
    if len({name for name, _ in pairs}) < len(pairs):
        raise ValueError("a name is given twice")
    return tuple(pairs)
