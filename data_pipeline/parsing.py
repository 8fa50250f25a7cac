"""From rows to pairs of dialogues: checking, parsing, and why a row is skipped.

A *row* is what the file holds; a *pair* is two message lists, chosen and rejected. A row of a wrong form (a missing
column, a wrong type) is an error that names file, line and reason. A row whose content cannot be used (no reply, two
equal sides) is skipped and counted under one of `SKIP_REASONS`. Which columns hold what is in shapes.py, which forms
messages have in messages.py.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from data_pipeline import messages, shapes
from data_pipeline.messages import Messages, RowError, merge_same_speaker
from data_pipeline.sources import Source, read_rows
from utils import UserError, first_line, nearest

# Every row is either kept or counted under exactly one of these.
SKIP_REASONS = {
    "no_dialogue": "no dialogue (the text does not start with a turn)",
    "no_reply": "no reply (the last turn is empty)",
    "wrong_last_speaker": "last turn not the assistant's",
    "identical": "chosen and rejected are the same",
    "no_text": "half a character in a text (a lone UTF-16 surrogate)",
    "no_preference": "no preference: a tie, or both bad",
    "template": "refused by the model's chat template",
    "too_long": "too long",
}
EXPECTED_ROW = "chosen and rejected (text or message lists), and optionally prompt and margin"
VOTES_FOR_NEITHER = ("tie", "both_bad")  # the column `vote`, which chat.py writes
# Unusual, but kept.
WARNINGS = {
    "merged": "turns of the same speaker in a row, merged into one",
    "prompts_differ": "the two sides answer different prompts",
    "not_rendered": "the model's chat template leaves out a part of the dialogue: a tool call, tools or reasoning",
    "system_moved": "system turn put into the first user turn: the model's chat template takes none",
}


@dataclass(frozen=True)
class Pair:
    """One preference: two dialogues that each end in an assistant's reply."""

    chosen: Messages
    rejected: Messages
    label_margin: float = 0.0
    kind: str = ""
    warnings: tuple[str, ...] = ()
    tools: Any = None  # what the assistant could call, for the chat template
    shape: str = field(default="", compare=False)  # what the row was read as, if not as chosen and rejected


# A turn starts at the start of the text or after an empty line, nowhere else: "Human:" in a sentence is just a word.
_FIRST_TURN = re.compile(r"\s*(Human|Assistant):(?=\s|\Z)")
_NEXT_TURN = re.compile(r"\n\n(Human|Assistant):(?=\s|\Z)")  # starting with plain characters makes it fast
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")  # JSON can hold one ("\\ud83d"), no tokenizer or UTF-8 file can
_ROLE = {"Human": "user", "Assistant": "assistant"}


def read_pairs(source: Source) -> Iterator[tuple[int, Pair | str]]:
    """Yield (row number, pair), or (row number, a key of `SKIP_REASONS`) for a row that holds no preference.

    A row of several ranked replies yields several pairs.
    """
    for number, row in read_rows(source):
        row_error = row_errors(source.place, number, EXPECTED_ROW)
        for pair in parse_row(row, row_error):
            if source.includes(row, None if isinstance(pair, str) else pair.chosen[:-1]):
                yield number, pair


def row_errors(place: Callable[[int], str], number: int, expected: str) -> RowError:
    """A function that makes the error about one row from a sentence that says what is wrong with it."""
    return lambda problem: UserError(
        f"a row of the data cannot be used: {problem}", where=place(number), next=f"expected: {expected}"
    )


def parse_row(row: Any, row_error: RowError) -> list[Pair | str]:
    """The pairs of a row of any of `shapes.SHAPES`."""
    shape = recognised(row, row_error)
    try:
        pairs = [parse_pair(view, row_error) for view in shapes.views(row, shape)]
        name = "" if shape is shapes.SHAPES[0] else shape.name
        return [pair if isinstance(pair, str) else replace(pair, shape=name) for pair in pairs]
    except shapes.NoPreference:
        return ["no_preference"]
    except UserError:
        raise
    except (KeyError, TypeError, ValueError) as error:
        raise row_error(f"read as {shape.name}, {first_line(error)}") from error


def recognised(row: Any, row_error: RowError) -> shapes.Shape:
    """The shape of a row; the error names the columns that it has, and the nearest to those that it should have."""
    if not isinstance(row, dict):
        raise row_error(f"it is of type {type(row).__name__}, not an object")
    shape = shapes.shape_of(row)
    if shape is None:
        missing = "chosen" if "chosen" not in row else "rejected"
        guess = nearest(missing, [name for name in row if name not in ("chosen", "rejected", "prompt")])
        raise row_error(f"no column {missing!r}{guess}; it has {', '.join(map(repr, row)) or 'none'}")
    for column in shape.columns:
        if row[column] is None:
            raise row_error(f"{column!r} is null{nearest(column, [name for name in row if name not in shape.columns])}")
    return shape


def parse_pair(row: dict[str, Any], row_error: RowError) -> Pair | str:
    """A view of a row as a pair, or the key of `SKIP_REASONS` that says why it is skipped.

    Sides are whole dialogues (HH-RLHF's transcripts, or messages), or replies to the `prompt` (text, transcript or
    messages), which may repeat it. Consecutive turns of one speaker are merged with an empty line between them; sides
    with different prompts are kept, because two whole dialogues were compared.
    """
    prompt = None if row.get("prompt") in (None, "") else prompt_messages(row["prompt"], row_error)
    is_prompt_empty = row.get("prompt") == ""
    sides = [
        _side_messages(row[column], prompt, is_prompt_empty, column, row_error) for column in ("chosen", "rejected")
    ]
    if None in sides:
        return "no_dialogue"
    sides = [with_system(side, row.get("system"), row_error) for side in sides]
    chosen, rejected = map(merge_same_speaker, sides)
    if reason := skip_reason(chosen) or skip_reason(rejected):
        return reason
    if row.get("vote") in VOTES_FOR_NEITHER:
        return "no_preference"
    if chosen == rejected:
        return "identical"
    kind = str(row.get("kind") or "").encode("utf-8", "replace").decode()
    was_merged = [len(chosen), len(rejected)] != [len(side) for side in sides]
    warnings = ("merged",) * was_merged + ("prompts_differ",) * (chosen[:-1] != rejected[:-1])
    tools = messages.checked_tools(row.get("tools"), row_error)
    return Pair(chosen, rejected, _label_margin(row.get("margin"), row_error), kind, warnings, tools)


def with_system(side: Messages, system: Any, row_error: RowError) -> Messages:
    """A dialogue with the text of a `system` column as its first turn, unless it has that already."""
    if system is None:
        return side
    if not isinstance(system, str):
        raise row_error(f"'system' is a {type(system).__name__}, not text")
    return messages.joined([{"role": "system", "content": system}], side) if system.strip() else side


def skip_reason(dialogue: Messages) -> str | None:
    """The key of `SKIP_REASONS` for a dialogue that cannot be scored; None if it ends in a reply."""
    if any(_LONE_SURROGATE.search(text) for text in messages.texts_of(dialogue)):
        return "no_text"
    if dialogue[-1]["role"] != "assistant":
        return "wrong_last_speaker"
    return None if dialogue[-1]["content"].strip() or dialogue[-1].get("tool_calls") else "no_reply"


def _side_messages(
    value: Any, prompt: Messages | None, is_prompt_empty: bool, column: str, row_error: RowError
) -> Messages | None:
    """The whole dialogue of one side; None for a text that holds none."""
    if not isinstance(value, str):
        side = messages.normalized(value, column, row_error)
        return side if prompt is None else messages.joined(prompt, side)
    whole = _read_back(value, column, row_error) or parse_transcript(value)
    if prompt is None and whole is None and is_prompt_empty:
        prompt = [{"role": "user", "content": ""}]
    if prompt is None:
        return whole
    if whole and whole[0]["role"] != "assistant":  # some datasets repeat the prompt before each reply
        return messages.joined(prompt, whole)
    reply = whole[0]["content"] if whole and len(whole) == 1 else messages.without_end_of_turn(value).strip()
    return [*prompt, {"role": "assistant", "content": reply}]


def prompt_messages(value: Any, row_error: RowError) -> Messages:
    if not isinstance(value, str):
        return messages.normalized(value, "prompt", row_error)
    return _read_back(value, "prompt", row_error) or parse_prompt(value)


def _read_back(text: str, column: str, row_error: RowError) -> Messages | None:
    """Text that a chat template has rendered already, as messages; None for other text."""
    found = messages.parse_chatml(text)
    if found is None and (marker := messages.template_marker(text)):
        raise row_error(f"{column!r} is text that a chat template has rendered already: it begins with {marker}")
    return found


def parse_prompt(text: str) -> Messages:
    """A prompt: a transcript, or else one question."""
    found = parse_transcript(text)
    if found is None:
        return [{"role": "user", "content": text.strip()}]
    if found[-1]["role"] == "assistant" and not found[-1]["content"]:
        found.pop()  # HH-RLHF's prompts end in an open "\n\nAssistant:"
    return found


def parse_transcript(text: str) -> Messages | None:
    """HH-RLHF's form, `"\\n\\nHuman: …\\n\\nAssistant: …"`, as messages; None if it does not start with a turn."""
    first = _FIRST_TURN.match(text)
    if first is None:
        return None
    turns = [first, *_NEXT_TURN.finditer(text, first.end())]
    ends = [turn.start() for turn in turns[1:]] + [len(text)]
    return [
        {"role": _ROLE[turn.group(1)], "content": text[turn.end() : end].strip()}
        for turn, end in zip(turns, ends, strict=True)
    ]


def _label_margin(value: Any, row_error: RowError) -> float:
    if value is None:
        return 0.0
    # above 1e30 a margin would be infinite in fp32; nan compares False
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < 1e30:
        raise row_error(f"'margin' is {value!r}, not a finite number")
    return float(value)
