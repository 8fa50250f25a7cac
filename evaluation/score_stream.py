"""Rewards as a step of a pipeline: lines of JSON in, the same lines with their rewards out, in the same order.

    {"prompt": …, "reply": …}           -> … "reward": 1.5        (also "response" or "completion")
    {"messages": [ … ]}                 -> … "reward": 1.5
    {"prompt": …, "replies": [ … ]}     -> … "rewards": [ … ]     and with best-of-N "best", "reply", "reward"

A line that cannot be scored keeps its place: its reward is null, and "left_out" says why.
"""

import contextlib
import functools
import itertools
import json
import math
import os
import queue
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from data_pipeline import messages, parsing, reading, shapes, sources
from data_pipeline.messages import Messages, RowError
from data_pipeline.reading import Columns
from data_pipeline.tokenization import TokenizedGroup, moves_system_turn, tokenize_groups
from modeling.scorer import Scorer
from utils import UserError, nearest

REPLY_COLUMNS = ("reply", "response", "completion")
COLUMNS = (*REPLY_COLUMNS, "replies", "messages", "prompt")
ROWS_AT_A_TIME = 1024
EXPECTED_ROW = "messages, or a prompt with reply or replies; --columns prompt=NAME,reply=NAME reads other names"
WANTS_FILE = "expected: .jsonl, or - for standard input"


@dataclass(frozen=True)
class Line:
    """A row as it came, and its dialogues to score, or the reason (see parsing.py) why there are none."""

    row: Any
    dialogues: list[Messages] | str
    replies: list[Any] | None = None  # if there may be several
    tools: Any = None  # what the assistant could call
    unused: tuple[str, ...] = ()  # columns like those of a dialogue that are not in it


def read(name: str, columns: Columns = ()) -> Iterator[Line]:
    """The lines of a file, or of standard input for "-". UserError for a file or, later, a line that is not JSON.

    UserError too if there is no line at all: for a file now, for standard input when it ends.
    """
    if name == "-":
        if sys.stdin is None:
            raise UserError("--score -: standard input is closed", next="... | python eval_rm.py --score -, or a file")
        place = "standard input:{}".format
        # a file object of its own: at exit Python needs the lock of sys.stdin, which the reading thread would hold
        rows = reading.parse_json_lines(os.fdopen(os.dup(sys.stdin.fileno()), "rb"), place)
    else:
        source = _source(Path(name).expanduser())
        rows, place = source.rows(), source.place
    parse_line = functools.partial(parse, columns=columns)
    # the answer to a line must not wait for the next one, so the first one already says whether the columns are known
    parsed = parsing.parsed(rows, place, EXPECTED_ROW, parse_line, unknown_rows=1)
    lines = _at_least_one((line if isinstance(line, Line) else Line(row, line) for _, row, line in parsed), name)
    if name == "-":
        return lines
    # what is wrong with a file's beginning is reported before a model is loaded
    return itertools.chain([next(lines)], lines)


def _at_least_one(lines: Iterator[Line], name: str) -> Iterator[Line]:
    """The lines; UserError if there are none: whatever should have written them has failed."""
    first = next(lines, None)
    if first is None:
        raise UserError(
            "--score found nothing to score", where="standard input" if name == "-" else Path(name).absolute(),
            found="not one line of JSON", safe="nothing was written", next="check what writes these lines",
        )  # fmt: skip
    yield first
    yield from lines


def _source(path: Path) -> reading.Source:
    if not path.exists():
        siblings = [sibling.name for sibling in path.parent.iterdir()] if path.parent.is_dir() else []
        raise UserError(f"--score names no file{nearest(path.name, siblings)}", where=path.absolute(), next=WANTS_FILE)
    if not path.is_file():
        found = "a folder" if path.is_dir() else "not a regular file"
        raise UserError(f"--score is {found}", where=path.absolute(), next=WANTS_FILE)
    sources.check_is_data(path, "--score")
    return reading.Source(str(path), (path,))


def parse(row: Any, row_error: RowError, columns: Columns = ()) -> Line:
    """One row; a bad row's error if it has none of the forms above."""
    view = parsing.with_columns(row, columns, row_error)
    try:
        json.dumps(row, allow_nan=False, default=str)
    except ValueError:
        raise row_error("it holds a number that is not finite, which JSON does not allow") from None
    column = next((name for name in (*REPLY_COLUMNS, "replies") if view.get(name) is not None), None)
    if column is None and view.get("messages") is not None:
        dialogues, replies = [messages.normalized(view["messages"], "messages", row_error)], None
    else:
        dialogues = _prompt_with_replies(view, column, row_error)
        replies = view["replies"] if column == "replies" else None
    dialogues = [parsing.with_system(dialogue, shapes.system_of(view), row_error) for dialogue in dialogues]
    dialogues = [messages.merge_same_speaker(dialogue) for dialogue in dialogues]
    faults = [fault for dialogue in dialogues if (fault := parsing.skip_reason(dialogue))]
    tools = messages.checked_tools(view.get("tools"), row_error)
    unused = shapes.unused_columns(view, (column or "messages",), dialogues)
    return Line(row, faults[0] if faults else dialogues, replies, tools, unused)


def _prompt_with_replies(row: dict[str, Any], column: str | None, row_error: RowError) -> list[Messages]:
    """A dialogue for each reply of a row."""
    prompt = shapes.prompt_of(row)
    if prompt is None or column is None:
        guess = "".join(nearest(name, COLUMNS) for name in row if name not in COLUMNS)
        nulls = [name for name in row if name in COLUMNS and row[name] is None]
        if nulls:
            raise row_error(f"{nulls[0]!r} is null", "null")
        raise row_error(f"it has {', '.join(map(repr, row)) or 'nothing'}{guess}", "no_columns")
    replies = row[column] if column == "replies" else [row[column]]
    if not isinstance(replies, list) or not replies:
        raise row_error("'replies' must be a list with at least one reply")
    if wrong := [reply for reply in replies if not isinstance(reply, str | dict | list)]:
        raise row_error(f"{column!r} holds {messages.kind_of(wrong[0])}, not text or messages")
    before = parsing.prompt_messages(prompt, row_error)
    return [parsing.side_messages(reply, before, False, column, row_error) for reply in replies]


@dataclass
class ScoreCounts:
    """What became of the lines."""

    scored: int = 0
    skipped: Counter = field(default_factory=Counter)  # by key of SKIP_REASONS
    warnings: Counter = field(default_factory=Counter)  # by key of WARNINGS
    unused: Counter = field(default_factory=Counter)  # by column that looks like part of a dialogue


def score(scorer: Scorer, lines: Iterator[Line], best_of: bool, waits: bool, out: BinaryIO) -> ScoreCounts:
    """Write each line with its rewards; returns what became of them.

    With `waits`, lines are scored a thousand at a time. Without, whatever has arrived is scored immediately, so that a
    process can write one line and wait for its reward.
    """
    counts = ScoreCounts()
    for chunk in _chunks(lines, waits):
        tools = [line.tools for line in chunk]
        found = tokenize_groups([line.dialogues for line in chunk], scorer.model.tokenizer, scorer.max_length, tools)
        rewards = dict(itertools.chain.from_iterable(scorer.rewards(found)))
        for at, line in enumerate(chunk):
            if at in rewards:
                counts.scored += 1
                counts.warnings["system_moved"] += moves_system_turn(scorer.model.tokenizer, line.dialogues)
                counts.warnings["not_rendered"] += not found[at].is_whole
            else:
                counts.skipped[found[at].partition(": ")[0]] += 1
            counts.unused.update(line.unused)
            answer = _finite(_answer(line, rewards.get(at), found[at], best_of))
            text = json.dumps(answer, ensure_ascii=False, allow_nan=False, default=str)
            # half a character (a lone surrogate) can only be written as its JSON escape, \ud800
            out.write(text.encode(errors="backslashreplace") + b"\n")
        out.flush()
    return counts


def _answer(line: Line, rewards: list[float] | None, found: TokenizedGroup | str, best_of: bool) -> dict[str, Any]:
    """The row with its rewards, or without any and with the reason, which `found` is then."""
    answer = dict(line.row) if isinstance(line.row, dict) else {"row": line.row}
    answer.pop("left_out", None)  # of an earlier pass
    best = rewards and rewards.index(max(rewards))  # the first of equals
    if line.replies is not None:
        answer["rewards"] = rewards
    if line.replies is not None and best_of:
        answer |= {"best": best, "reply": None if best is None else line.replies[best]}
    if best_of or not line.replies is not None:
        answer["reward"] = rewards and rewards[best]
    return answer if rewards else answer | {"left_out": parsing.reason_in_words(found)}


def _finite(value: Any) -> Any:
    """A value as JSON can hold it: what is no finite number as text."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _chunks(lines: Iterator[Line], waits: bool) -> Iterator[list[Line]]:
    """Lists of lines, read by a second thread into a queue that holds at most two lists."""
    arrived: queue.Queue = queue.Queue(2 * ROWS_AT_A_TIME)

    def read_all() -> None:
        try:
            for line in lines:
                arrived.put(line)
            arrived.put(None)
        except BaseException as error:  # raised again in the main thread
            arrived.put(error)

    threading.Thread(target=read_all, daemon=True).start()  # a daemon, because it may wait for input forever
    item: Line | BaseException | None
    while True:
        chunk: list[Line] = []
        with contextlib.suppress(queue.Empty):
            while len(chunk) < ROWS_AT_A_TIME and isinstance(item := arrived.get(block=waits or not chunk), Line):
                chunk.append(item)
        if chunk:
            yield chunk  # lines before a broken one are answered before it is reported
        if item is None:
            return
        if isinstance(item, BaseException):
            raise item
