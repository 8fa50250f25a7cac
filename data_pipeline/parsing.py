"""From rows to pairs of dialogues: checking, parsing, and why a row is skipped.

A *row* is what the file holds; a *pair* is two message lists, chosen and rejected. A row of a wrong form (a missing
column, a wrong type) is an error that names file, line and reason. A row whose content cannot be used (no reply, two
equal sides) is skipped and counted under one of `SKIP_REASONS`.
"""

import itertools
import operator
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from data_pipeline.sources import Source, read_rows
from utils import UserError, nearest

Messages = list[dict[str, str]]
RowError = Callable[[str], UserError]  # what `row_errors` returns

# Every row is either kept or counted under exactly one of these.
SKIP_REASONS = {
    "no_dialogue": "no dialogue (the text does not start with a turn)",
    "no_reply": "no reply (the last turn is empty)",
    "wrong_last_speaker": "last turn not the assistant's",
    "identical": "chosen and rejected are the same",
    "no_text": "half a character in a text (a lone UTF-16 surrogate)",
    "no_preference": "voted a tie, or both bad",
    "template": "refused by the model's chat template",
    "too_long": "too long",
}
EXPECTED_ROW = "chosen and rejected (text or message lists), and optionally prompt and margin"
VOTES_FOR_NEITHER = ("tie", "both_bad")  # the column `vote`, which chat.py writes
# Unusual, but kept.
WARNINGS = {
    "merged": "turns of the same speaker in a row, merged into one",
    "prompts_differ": "the two sides answer different prompts",
}


@dataclass(frozen=True)
class Pair:
    """One preference: two dialogues that each end in an assistant's reply."""

    chosen: Messages
    rejected: Messages
    label_margin: float = 0.0
    kind: str = ""
    warnings: tuple[str, ...] = ()


# A turn starts at the start of the text or after an empty line, nowhere else: "Human:" in a sentence is just a word.
_FIRST_TURN = re.compile(r"\s*(Human|Assistant):(?=\s|\Z)")
_NEXT_TURN = re.compile(r"\n\n(Human|Assistant):(?=\s|\Z)")  # starting with plain characters makes it fast
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")  # JSON can hold one ("\\ud83d"), no tokenizer or UTF-8 file can
_ROLE = {"Human": "user", "Assistant": "assistant"}


def read_pairs(source: Source) -> Iterator[tuple[int, Pair | str]]:
    """Yield (row number, pair), or (row number, a key of `SKIP_REASONS`) for a row that holds no preference."""
    for number, row in read_rows(source):
        row_error = row_errors(source.place, number, EXPECTED_ROW)
        check_columns(row, row_error)
        pair = parse_pair(row, row_error)
        if source.includes(row):
            yield number, pair


def row_errors(place: Callable[[int], str], number: int, expected: str) -> RowError:
    """A function that makes the error about one row from a sentence that says what is wrong with it."""
    return lambda problem: UserError(
        f"a row of the data cannot be used: {problem}", where=place(number), next=f"expected: {expected}"
    )


def check_columns(row: Any, row_error: RowError) -> None:
    if not isinstance(row, dict):
        raise row_error(f"it is of type {type(row).__name__}, not an object")
    for column in ("chosen", "rejected"):
        if row.get(column) is None:
            guess = nearest(column, [name for name in row if name not in ("chosen", "rejected", "prompt")])
            found = f"no column {column!r}{guess}; it has {', '.join(map(repr, row)) or 'none'}"
            raise row_error(f"{column!r} is null{guess}" if column in row else found)


def parse_pair(row: dict[str, Any], row_error: RowError) -> Pair | str:
    """A row as a pair, or the key of `SKIP_REASONS` that says why it is skipped.

    Three forms, told apart by the columns and their types: HH-RLHF's transcripts; message lists; a `prompt` (text,
    transcript or messages) beside replies (text or messages). Consecutive turns of one speaker are merged with an empty
    line between them; sides with different prompts are kept, because two whole dialogues were compared.
    """
    prompt = prompt_messages(row["prompt"], row_error) if row.get("prompt") is not None else None
    sides = [_side_messages(row[column], prompt, column, row_error) for column in ("chosen", "rejected")]
    if None in sides:
        return "no_dialogue"
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
    return Pair(chosen, rejected, _label_margin(row.get("margin"), row_error), kind, warnings)


def skip_reason(messages: Messages) -> str | None:
    """The key of `SKIP_REASONS` for a dialogue that cannot be scored; None if it ends in a reply."""
    if any(_LONE_SURROGATE.search(message["content"]) for message in messages):
        return "no_text"
    if messages[-1]["role"] != "assistant":
        return "wrong_last_speaker"
    return None if messages[-1]["content"].strip() else "no_reply"


def _side_messages(value: Any, prompt: Messages | None, column: str, row_error: RowError) -> Messages | None:
    """The whole dialogue of one side; None for a text that holds none."""
    if not isinstance(value, str):
        messages = checked_messages(value, column, row_error)
        # A list that starts with a reply continues the prompt; any other is the whole dialogue (as in UltraFeedback).
        return prompt + messages if prompt is not None and messages[0]["role"] == "assistant" else messages
    whole = parse_transcript(value)
    if prompt is None or (whole and whole[0]["role"] == "user"):  # some datasets repeat the prompt before each reply
        return whole
    reply = whole[0]["content"] if whole and len(whole) == 1 else value.strip()
    return [*prompt, {"role": "assistant", "content": reply}]


def prompt_messages(value: Any, row_error: RowError) -> Messages:
    return parse_prompt(value) if isinstance(value, str) else checked_messages(value, "prompt", row_error)


def parse_prompt(text: str) -> Messages:
    """A prompt: a transcript, or else one question."""
    messages = parse_transcript(text)
    if messages is None:
        return [{"role": "user", "content": text.strip()}]
    if messages[-1]["role"] == "assistant" and not messages[-1]["content"]:
        messages.pop()  # HH-RLHF's prompts end in an open "\n\nAssistant:"
    return messages


def checked_messages(value: Any, column: str, row_error: RowError) -> Messages:
    """A list of messages, each with role and content alone."""
    if not isinstance(value, list):
        raise row_error(f"{column!r} is a {type(value).__name__}, not text or a list of messages")
    if not value:
        raise row_error(f"{column!r} is an empty list")
    for message in value:
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            raise row_error(f"{column!r} holds {str(message)[:60]!r}, not a message with role and content")
        if message["role"] not in ("system", "user", "assistant"):
            raise row_error(f"{column!r} has the role {message['role']!r}, not system, user or assistant")
        if not isinstance(message["content"], str):
            raise row_error(f"{column!r} has content that is a {type(message['content']).__name__}, not text")
    return [{"role": message["role"], "content": message["content"]} for message in value]


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


def merge_same_speaker(messages: Messages) -> Messages:
    """Join consecutive messages of one speaker, with an empty line between them."""
    return [
        {"role": role, "content": "\n\n".join(message["content"] for message in turns if message["content"])}
        for role, turns in itertools.groupby(messages, key=operator.itemgetter("role"))
    ]


def _label_margin(value: Any, row_error: RowError) -> float:
    if value is None:
        return 0.0
    # above 1e30 a margin would be infinite in fp32; nan compares False
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < 1e30:
        raise row_error(f"'margin' is {value!r}, not a finite number")
    return float(value)
