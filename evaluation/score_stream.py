"""Rewards as a step of a pipeline: lines of JSON in, the same lines with their rewards out, in the same order.

    {"prompt": …, "reply": …}           -> … "reward": 1.5        (also "response" or "completion")
    {"messages": [ … ]}                 -> … "reward": 1.5
    {"prompt": …, "replies": [ … ]}     -> … "rewards": [ … ]     and with best-of-N "best", "reply", "reward"

A line that cannot be scored keeps its place: its reward is null, and "left_out" says why.
"""

import contextlib
import itertools
import json
import os
import queue
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from data_pipeline import messages, parsing, shapes, sources
from data_pipeline.messages import Messages, RowError
from data_pipeline.tokenization import moves_system_turn, refusal, tokenize_groups
from modeling.scorer import Scorer
from utils import UserError, nearest

REPLY_COLUMNS = ("reply", "response", "completion")
COLUMNS = (*REPLY_COLUMNS, "replies", "messages", "prompt")
ROWS_AT_A_TIME = 1024
EXPECTED_ROW = "messages, or a prompt with reply or replies"
WANTS_FILE = "expected: .jsonl, or - for standard input"


@dataclass(frozen=True)
class Line:
    """A row as it came, and its dialogues to score, or the key of SKIP_REASONS that says why there are none."""

    row: dict[str, Any]
    dialogues: list[Messages] | str
    has_replies: bool
    tools: Any = None  # what the assistant could call


def read(name: str) -> Iterator[Line]:
    """The lines of a file, or of standard input for "-". UserError for a file or, later, a line that cannot be read."""
    if name == "-":
        if sys.stdin is None:
            raise UserError("--score -: standard input is closed", next="... | python eval_rm.py --score -, or a file")
        place = "standard input:{}".format
        # a file object of its own: at exit Python needs the lock of sys.stdin, which the reading thread would hold
        rows = sources.parse_json_lines(os.fdopen(os.dup(sys.stdin.fileno()), "rb"), place)
    else:
        source = _source(Path(name).expanduser())
        rows, place = sources.read_rows(source), source.place
    return (parse(row, parsing.row_errors(place, number, EXPECTED_ROW)) for number, row in rows)


def _source(path: Path) -> sources.Source:
    if not path.exists():
        siblings = [sibling.name for sibling in path.parent.iterdir()] if path.parent.is_dir() else []
        raise UserError(f"--score names no file{nearest(path.name, siblings)}", where=path.absolute(), next=WANTS_FILE)
    if not path.is_file():
        found = "a folder" if path.is_dir() else "not a regular file"
        raise UserError(f"--score is {found}", where=path.absolute(), next=WANTS_FILE)
    if not path.name.endswith(sources.SUFFIXES):
        raise UserError("--score is not a supported file type", where=path, next=WANTS_FILE)
    return sources.Source(str(path), path)


def parse(row: Any, row_error: RowError) -> Line:
    """One row; UserError if it has none of the forms above."""
    if not isinstance(row, dict):
        raise row_error(f"it is of type {type(row).__name__}, not an object")
    try:
        json.dumps(row, allow_nan=False, default=str)
    except ValueError:
        raise row_error("it holds a number that is not finite, which JSON does not allow") from None
    column = next((name for name in (*REPLY_COLUMNS, "replies") if row.get(name) is not None), None)
    if column is None and row.get("messages") is not None:
        dialogues, has_replies = [messages.normalized(row["messages"], "messages", row_error)], False
    else:
        dialogues, has_replies = _prompt_with_replies(row, column, row_error), column == "replies"
    dialogues = [parsing.with_system(dialogue, shapes.system_of(row), row_error) for dialogue in dialogues]
    dialogues = [messages.merge_same_speaker(dialogue) for dialogue in dialogues]
    faults = [fault for dialogue in dialogues if (fault := parsing.skip_reason(dialogue))]
    return Line(
        row, faults[0] if faults else dialogues, has_replies, messages.checked_tools(row.get("tools"), row_error)
    )


def _prompt_with_replies(row: dict[str, Any], column: str | None, row_error: RowError) -> list[Messages]:
    """A dialogue for each reply of a row."""
    prompt = shapes.prompt_of(row)
    if prompt is None or column is None:
        guess = "".join(nearest(name, COLUMNS) for name in row if name not in COLUMNS)
        raise row_error(f"it has {', '.join(map(repr, row)) or 'nothing'}{guess}")
    replies = row[column] if column == "replies" else [row[column]]
    if not isinstance(replies, list) or not replies:
        raise row_error("'replies' must be a list with at least one reply")
    if wrong := [reply for reply in replies if not isinstance(reply, str | dict | list)]:
        raise row_error(f"{column!r} holds a {type(wrong[0]).__name__}, not text or messages")
    before = parsing.prompt_messages(prompt, row_error)
    return [
        [*before, {"role": "assistant", "content": reply}]
        if isinstance(reply, str)
        else messages.joined(before, messages.normalized(reply, column, row_error))
        for reply in replies
    ]


def score(scorer: Scorer, lines: Iterator[Line], best_of: bool, waits: bool, out: BinaryIO) -> Counter:
    """Write each line with its rewards; returns how many were scored ("scored"), skipped, and changed, by reason.

    With `waits`, lines are scored a thousand at a time. Without, whatever has arrived is scored immediately, so that a
    process can write one line and wait for its reward.
    """
    counts: Counter = Counter()
    for chunk in _chunks(lines, waits):
        tools = [line.tools for line in chunk]
        found = tokenize_groups([line.dialogues for line in chunk], scorer.model.tokenizer, scorer.max_length, tools)
        rewards = dict(itertools.chain.from_iterable(scorer.rewards(found)))
        for at, line in enumerate(chunk):
            counts["scored" if at in rewards else found[at]] += 1
            tokenizer = scorer.model.tokenizer
            counts["system_moved"] += at in rewards and moves_system_turn(tokenizer, line.dialogues)
            why_not = "" if at in rewards else parsing.SKIP_REASONS[found[at]]
            if found[at] == "template":
                why_not += f", which said: {refusal(line.dialogues, tokenizer, line.tools)}"
            answer = json.dumps(_answer(line, rewards.get(at), why_not, best_of), ensure_ascii=False, default=str)
            # half a character (a lone surrogate) can only be written as its JSON escape, \ud800
            out.write(answer.encode(errors="backslashreplace") + b"\n")
        out.flush()
    return counts


def _answer(line: Line, rewards: list[float] | None, why_not: str, best_of: bool) -> dict[str, Any]:
    """The row with its rewards, or without any and with the reason."""
    answer = dict(line.row)
    answer.pop("left_out", None)  # of an earlier pass
    best = rewards and rewards.index(max(rewards))  # the first of equals
    if line.has_replies:
        answer["rewards"] = rewards
    if line.has_replies and best_of:
        answer |= {"best": best, "reply": None if best is None else line.row["replies"][best]}
    if best_of or not line.has_replies:
        answer["reward"] = rewards and rewards[best]
    return answer if rewards else answer | {"left_out": why_not}


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
