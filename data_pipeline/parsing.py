"""From rows to pairs of dialogues: checking, parsing, and why a row is skipped.

A *row* is what the file holds; a *pair* is two message lists, chosen and rejected. A row that cannot be used (no reply,
two equal sides, a null, a wrong type) is skipped and counted under one of `SKIP_REASONS`; a reason is such a key, or
`KEY: DETAIL` where the row's own words help. Only if no row has columns that are known, that is an error. Which columns
hold what is in shapes.py, which forms messages have in messages.py.
"""

import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from data_pipeline import messages, shapes
from data_pipeline.messages import Messages, RowError, merge_same_speaker
from data_pipeline.reading import Columns, Source
from data_pipeline.sampler import digests
from utils import UserError, counted, first_line, nearest

# Every row is either kept or counted under exactly one of these.
SKIP_REASONS = {
    "no_dialogue": "no dialogue (the text does not start with a turn)",
    "no_reply": "no reply (the last turn is empty)",
    "wrong_last_speaker": "last turn not the assistant's",
    "identical": "chosen and rejected are the same",
    "no_text": "half a character in a text (a lone UTF-16 surrogate)",
    "no_preference": "no preference: a tie, or both bad",
    "null": "a null in place of a text",
    "wrong_type": "a value of a wrong type",
    "unknown_role": "a message whose speaker is not known",
    "not_text": "content other than text",
    "rendered": "text that another chat template has rendered already",
    "no_choice": "which reply is better, or by how much, cannot be read",
    "no_columns": "other columns than a preference has",
    "template": "refused by the model's chat template",
    "too_long": "too long",
    "repeated": "a prompt that came before",
    "trained_on": "a model was trained on it",
}
EXPECTED_ROW = (
    "chosen and rejected (text or messages), often with prompt;\n          "
    "--columns prompt=NAME,chosen=NAME,rejected=NAME reads columns of other names"
)
READ_BY_MODELS = ("tool_calls", "reasoning_content", "thinking")  # of what messages carry besides texts
UNKNOWN_ROWS = 10  # so many rows of unknown columns at the start, and the data is refused
SAME_TOKENS = "identical: the chat template or the tokenizer leaves out where they differ"
VOTES_FOR_NEITHER = ("tie", "both_bad")  # the column `vote`, which chat.py writes
# Unusual, but kept.
WARNINGS = {
    "merged": "turns of the same speaker in a row, merged into one",
    "prompts_differ": "the two sides answer different prompts",
    "margin_is_text": "the margin is text, and was read as a number",
    "not_rendered": "the model's chat template leaves out a part: a turn, a tool call, tools or reasoning",
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
    unused: tuple[str, ...] = field(default=(), compare=False)  # columns like those of a dialogue that are in neither


@dataclass
class Counts:
    """How many rows of a source were read and skipped, with the numbers of the first few per reason."""

    rows: int = 0
    count: Counter = field(default_factory=Counter)  # by keys of SKIP_REASONS and WARNINGS
    first_rows: dict[str, list[Any]] = field(default_factory=dict)
    details: dict[str, str] = field(default_factory=dict)  # what is wrong with the first row of a reason
    unused: Counter = field(default_factory=Counter)  # rows by column, of columns like those of a dialogue
    shapes: Counter = field(default_factory=Counter)  # rows by what they were read as, "" for chosen and rejected
    name_of: Callable[[Any], str] = str  # of a row in `first_rows`

    def add(self, reason: str, *rows: Any) -> None:
        """Count rows under a reason, a key or `KEY: DETAIL`."""
        key, _, detail = reason.partition(": ")
        if rows:
            self.count[key] += len(rows)
            first = self.first_rows.setdefault(key, [])
            first += rows[: 5 - len(first)]
            if detail:
                self.details.setdefault(key, detail)

    @property
    def skipped(self) -> int:
        return sum(self.count[key] for key in SKIP_REASONS)

    def lines(self) -> list[str]:
        """What the rows were read as, and one line for each reason and warning that occurred."""
        lines = [
            f"  {'rows' if count == self.shapes.total() else counted(count, 'row')} read as {shape}"
            for shape, count in self.shapes.items()
            if shape
        ]
        for texts, verb in ((SKIP_REASONS, "skipped"), (WARNINGS, "kept")):
            for key, text in texts.items():
                if self.count[key]:
                    rows = ", ".join(self.name_of(row) for row in self.first_rows[key])
                    more = ", …" if self.count[key] > len(self.first_rows[key]) else ""
                    plural = "row" if self.count[key] == 1 else "rows"
                    detail = f"; the first: {self.details[key]}" if key in self.details else ""
                    lines.append(f"  {verb} {self.count[key]:,}: {text} ({plural} {rows}{more}{detail})")
        for column, count in sorted(self.unused.items()):
            what = f"column {column!r} of {counted(count, 'row')} looks like part of the dialogue"
            lines.append(f"  not used: {what} (--columns says what columns are)")
        return lines


# A turn starts at the start of the text or after an empty line, nowhere else: "Human:" in a sentence is just a word.
_FIRST_TURN = re.compile(r"\s*(Human|Assistant):(?=\s|\Z)")
_NEXT_TURN = re.compile(r"\n\n(Human|Assistant):(?=\s|\Z)")  # starting with plain characters makes it fast
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")  # JSON can hold one ("\\ud83d"), no tokenizer or UTF-8 file can
_ROLE = {"Human": "user", "Assistant": "assistant"}


class Parsed(NamedTuple):
    """A pair of a row, or the reason for skipping it, and what decides whether the row is held out."""

    row: int  # line or row number in the source
    pair: Pair | str
    digests: tuple[int, int]  # see `sampler.digests`


class BadRow(UserError):
    """One row cannot be read. `reason` is a `KEY: DETAIL` for counting it."""

    def __init__(self, key: str, problem: str, place: str, expected: str):
        super().__init__(f"a row of the data cannot be used: {problem}", where=place, next=f"expected: {expected}")
        self.key, self.problem, self.reason = key, problem, f"{key}: {problem}"


def read_pairs(source: Source) -> Iterator[Parsed]:
    """Every row of a source, whatever part of it is wanted. A row of several ranked replies yields several pairs."""

    def parse(row: Any, row_error: RowError) -> list[Pair | str]:
        return parse_row(row, row_error, source.columns)

    for number, row, pairs in parsed(source.rows(), source.place, EXPECTED_ROW, parse):
        pairs = [pairs] if isinstance(pairs, str) else pairs
        prompt = next((pair.chosen[:-1] for pair in pairs if not isinstance(pair, str)), None)
        of_row = (0, 0) if source.part == "all" else digests(row, prompt)  # the same for all that the row yields
        yield from (Parsed(number, pair, of_row) for pair in pairs)


def parsed(
    rows: Iterable[tuple[int, Any]], place: Callable[[int], str], expected: str,
    parse: Callable[[Any, RowError], Any], unknown_rows: int = UNKNOWN_ROWS,
) -> Iterator[tuple[int, Any, Any]]:  # fmt: skip
    """Yield (number, row, what `parse` returns) of each row; for a bad row its reason in place of that.

    UserError if none of the first rows has columns that are known.
    """
    waiting: list[tuple[int, Any, Any]] = []
    first: BadRow | None = None
    for number, row in rows:
        try:
            content = parse(row, row_errors(place, number, expected))
        except BadRow as error:
            content = error.reason
            if waiting is not None and error.key == "no_columns":
                first = first or error
                waiting.append((number, row, content))
                if len(waiting) >= unknown_rows:
                    raise first from None
                continue
        yield from waiting or ()
        waiting = None
        yield number, row, content
    if waiting and first:
        raise first


def row_errors(place: Callable[[int], str], number: int, expected: str) -> RowError:
    """A function that makes the error about one row from what is wrong with it, and a key of `SKIP_REASONS`."""
    return lambda problem, key="wrong_type": BadRow(key, problem, place(number), expected)


def reason_in_words(reason: str) -> str:
    """A reason for skipping, in words."""
    key, colon, detail = reason.partition(": ")
    return SKIP_REASONS[key] + colon + detail


def parse_row(row: Any, row_error: RowError, columns: Columns = ()) -> list[Pair | str]:
    """The pairs of a row of any of `shapes.SHAPES`, its columns renamed. Raises a bad row's error."""
    row = with_columns(row, columns, row_error)
    shape = recognised(row, row_error)
    try:
        pairs = [parse_pair(view, row_error) for view in shapes.views(row, shape)]
    except shapes.NoPreference:
        return ["no_preference"]
    except BadRow as error:
        if shape is shapes.SHAPES[0]:
            raise
        raise row_error(f"read as {shape.name}, {error.problem}", error.key) from error
    except (KeyError, TypeError, ValueError) as error:
        raise row_error(f"read as {shape.name}, {first_line(error)}", "no_choice") from error
    name = "" if shape is shapes.SHAPES[0] else shape.name
    if empty := [name for name in shapes.PROMPT_COLUMNS if name in row and row[name] is None]:
        pairs = [f"null: {empty[0]!r} is null" if pair == "no_dialogue" else pair for pair in pairs]
    dialogues = [[pair.chosen, pair.rejected] for pair in pairs if not isinstance(pair, str)]
    unused = shapes.unused_columns(row, shape.columns, dialogues)
    return [pair if isinstance(pair, str) else replace(pair, shape=name, unused=unused) for pair in pairs]


def with_columns(row: Any, columns: Columns, row_error: RowError) -> dict[str, Any]:
    """A row under the names that `--columns` gives its columns."""
    if not isinstance(row, dict):
        raise row_error(f"it is {messages.kind_of(row)}, not an object", "no_columns")
    try:
        return shapes.mapped(row, columns)
    except KeyError as error:
        (name,) = error.args
        has = ", ".join(map(repr, row)) or "none"
        raise row_error(f"no column {name!r} (--columns){nearest(name, row)}; it has {has}", "no_columns") from None


def recognised(row: dict[str, Any], row_error: RowError) -> shapes.Shape:
    """The shape of a row; the error names the columns that it has, and the nearest to those that it should have."""
    shape = shapes.shape_of(row)
    if shape is None:
        missing = "chosen" if "chosen" not in row else "rejected"
        guess = nearest(missing, [name for name in row if name not in ("chosen", "rejected", "prompt")])
        problem = f"no column {missing!r}{guess}; it has {', '.join(map(repr, row)) or 'none'}"
        raise row_error(problem, "no_columns")
    for column in shape.columns:
        if row[column] is None:
            others = [name for name in row if name not in shape.columns]
            raise row_error(f"{column!r} is null{nearest(column, others)}", "null")
    return shape


def parse_pair(row: dict[str, Any], row_error: RowError) -> Pair | str:
    """A view of a row as a pair, or the key of `SKIP_REASONS` that says why it is skipped.

    Sides are whole dialogues (HH-RLHF's transcripts, or messages), or replies to the `prompt` (text, transcript or
    messages), which may repeat it. Consecutive turns of one speaker are merged with an empty line between them; sides
    with different prompts are kept, because two whole dialogues were compared.
    """
    prompt = None if row.get("prompt") in (None, "") else prompt_messages(row["prompt"], row_error)
    if prompt and prompt[-1]["role"] == "assistant" and prompt[-1]["content"] in map(_reply_of, _sides(row)):
        prompt.pop()  # it is the whole dialogue, up to one of the replies
    is_prompt_empty = row.get("prompt") == ""
    sides = [
        side_messages(value, prompt, is_prompt_empty, column, row_error)
        for column, value in zip(("chosen", "rejected"), _sides(row), strict=True)
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
    margin, is_margin_text = _label_margin(row.get("margin"), row_error)
    warnings = ("merged",) * was_merged + ("prompts_differ",) * (chosen[:-1] != rejected[:-1])
    warnings += ("margin_is_text",) * is_margin_text
    return Pair(chosen, rejected, margin, kind, warnings, messages.checked_tools(row.get("tools"), row_error))


def digest_of(dialogue: Messages) -> bytes:
    """Identifies a dialogue by speakers and texts, however they are spaced, and the calls and thoughts in them.

    Not by what a table may add to each message (an id, a weight), nor by an empty system turn.
    """
    content = [
        [message["role"], " ".join(message["content"].split()), [message.get(key) for key in READ_BY_MODELS]]
        for message in dialogue
        if message["role"] != "system" or message["content"].strip()
    ]
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).digest()[:16]


def pair_digest(chosen: Messages, rejected: Messages) -> int:
    """Identifies two dialogues as `digest_of` does one, in 64 bits, whichever of them is the chosen one."""
    both = b"".join(sorted((digest_of(chosen), digest_of(rejected))))
    return int.from_bytes(hashlib.sha256(both).digest()[:8], "big")


def with_system(side: Messages, system: Any, row_error: RowError) -> Messages:
    """A dialogue with the text of a `system` column as its first turn, unless it has that already."""
    if system is None:
        return side
    if not isinstance(system, str):
        raise row_error(f"'system' is {messages.kind_of(system)}, not text")
    return messages.joined([{"role": "system", "content": system}], side) if system.strip() else side


def skip_reason(dialogue: Messages) -> str | None:
    """The key of `SKIP_REASONS` for a dialogue that cannot be scored; None if it ends in a reply."""
    if any(_LONE_SURROGATE.search(text) for text in messages.texts_of(dialogue)):
        return "no_text"
    if dialogue[-1]["role"] != "assistant":
        return "wrong_last_speaker"
    return None if dialogue[-1]["content"].strip() or dialogue[-1].get("tool_calls") else "no_reply"


def _sides(row: dict[str, Any]) -> tuple[Any, Any]:
    return row["chosen"], row["rejected"]


def _reply_of(side: Any) -> str | None:
    """The reply that a side is or ends in: a text, or the last of its messages."""
    if isinstance(side, list) and side:
        side = side[-1]
    if isinstance(side, dict):
        side = next((side[key] for key in messages.CONTENT_KEYS if key in side), None)
    return messages.without_end_of_turn(side).strip() if isinstance(side, str) else None


def side_messages(
    value: Any, prompt: Messages | None, is_prompt_empty: bool, column: str, row_error: RowError
) -> Messages | None:
    """The whole dialogue of one side; None for a text that holds none."""
    if not isinstance(value, str):
        side = messages.normalized(value, column, row_error)
        return side if prompt is None else messages.joined(prompt, side)
    whole = _read_back(value, column, row_error, is_reply=prompt is not None) or parse_transcript(value)
    if prompt is None and whole is None and is_prompt_empty:
        prompt = [{"role": "user", "content": ""}]
    if prompt is None:
        return whole
    is_one_turn = bool(whole) and len(whole) == 1
    if whole and not is_one_turn:  # it goes on from the prompt, or repeats it before the reply
        return messages.joined(prompt, whole)
    if is_one_turn and whole[0]["role"] != "assistant":
        if messages.joined(prompt, whole) == prompt:  # the prompt again, and no reply
            return prompt
        is_one_turn = False  # a reply that begins with "Human:"
    reply = whole[0]["content"] if is_one_turn else _stripped(messages.without_end_of_turn(value))
    return [*prompt, {"role": "assistant", "content": reply}]


def _stripped(text: str) -> str:
    """A reply without the space around it, but for the indentation of its first line."""
    lines = text.strip("\r\n").rstrip()
    return lines if lines.startswith(("  ", "\t")) else lines.strip()


def prompt_messages(value: Any, row_error: RowError) -> Messages:
    if not isinstance(value, str):
        return messages.normalized(value, "prompt", row_error)
    return _read_back(value, "prompt", row_error) or messages.parse_helpsteer(value) or parse_prompt(value)


def _read_back(text: str, column: str, row_error: RowError, is_reply: bool = False) -> Messages | None:
    """Text that a chat template has rendered already, as messages; None for other text.

    A reply to a prompt may itself be JSON: it is read as messages only if it is a whole dialogue.
    """
    listed = messages.parse_list(text)
    if listed and (not is_reply or messages.is_dialogue(listed)):
        return messages.normalized(listed, column, row_error)
    if messages.is_list_of_numpy(text):
        raise row_error(f"{column!r} is a list of messages as numpy prints it, which has lost its commas")
    found = messages.parse_chatml(text)
    if found is None and (marker := messages.template_marker(text)):
        raise row_error(
            f"{column!r} is text that a chat template has rendered already: it begins with {marker}", "rendered"
        )
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
    if "\r\n\r\nHuman:" in text or "\r\n\r\nAssistant:" in text:
        text = text.replace("\r\n", "\n")
    first = _FIRST_TURN.match(text)
    if first is None:
        return None
    turns = [first, *_NEXT_TURN.finditer(text, first.end())]
    ends = [turn.start() for turn in turns[1:]] + [len(text)]
    return [
        {"role": _ROLE[turn.group(1)], "content": text[turn.end() : end].strip()}
        for turn, end in zip(turns, ends, strict=True)
    ]


def _label_margin(value: Any, row_error: RowError) -> tuple[float, bool]:
    """A margin, and whether it was text."""
    if value is None:
        return 0.0, False
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    # above 1e30 a margin would be infinite in fp32; nan compares False
    if not abs(number) < 1e30:
        raise row_error(f"'margin' is {value!r}, not a finite number", "no_choice")
    return number, isinstance(value, str)
