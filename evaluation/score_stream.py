"""Rewards as a step of a pipeline: lines of JSON in, the same lines with their rewards out, in the same order.

    {"prompt": …, "reply": …}           -> … "reward": 1.5        (also "response" or "completion")
    {"messages": [ … ]}                 -> … "reward": 1.5
    {"prompt": …, "replies": [ … ]}     -> … "rewards": [ … ]     and with best-of-N "best", "reply", "reward"

A line that cannot be scored keeps its place: its reward is null, and "left_out" says why.
"""

from __future__ import annotations

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

from data_pipeline import parsing, sources
from data_pipeline.parsing import Messages
from data_pipeline.tokenization import tokenize_groups
from modeling.scorer import Scorer
from utils import UserError, nearest

REPLY_COLUMNS = ("reply", "response", "completion")
COLUMNS = (*REPLY_COLUMNS, "replies", "messages", "prompt")
ROWS_AT_A_TIME = 1024
WANTS_FILE = "wants .jsonl, or - for standard input"
WANTS = "wants messages, or a prompt with reply or replies"


@dataclass(frozen=True)
class Line:
    """A row as it came, and its dialogues to score, or the key of SKIP_REASONS that says why there are none."""

    row: dict[str, Any]
    dialogues: list[Messages] | str
    has_replies: bool


def read(name: str) -> Iterator[Line]:
    """The lines of a file, or of standard input for "-". UserError names a line that is broken."""
    if name == "-":
        if sys.stdin is None:
            raise UserError("--score -: standard input is closed", next="... | python eval_rm.py --score -, or a file")
        # a file object of its own: at exit Python needs the lock of sys.stdin, which the reading thread would hold
        with os.fdopen(os.dup(sys.stdin.fileno()), "rb") as lines:
            for number, row in sources.parse_json_lines(lines, lambda number: f"standard input:{number}"):
                yield parse(row, f"standard input:{number}")
        return
    path = Path(name).expanduser()
    if path.exists() and not path.is_file():
        what = "a folder" if path.is_dir() else "no regular file"
        raise UserError(f"--score names {what}", where=path.absolute(), next=WANTS_FILE)
    if not path.is_file():
        siblings = [sibling.name for sibling in path.parent.iterdir()] if path.parent.is_dir() else []
        raise UserError(f"--score names no file{nearest(path.name, siblings)}", where=path.absolute())
    if not path.name.endswith(sources.SUFFIXES):
        raise UserError("--score: a file of this kind is not read here", where=path, next=WANTS_FILE)
    source = sources.Source(str(path), path)
    for number, row in sources.read_rows(source):
        yield parse(row, source.place(number))


def parse(row: Any, place: str) -> Line:
    """One row; UserError if it does not have a form that can be scored, whatever its texts are."""

    def refuse(problem: str) -> UserError:
        return UserError(f"a row cannot be scored: {problem}", where=place, next=WANTS)

    if not isinstance(row, dict):
        raise refuse(f"it is a {type(row).__name__}, not an object")
    try:
        json.dumps(row, allow_nan=False)
    except ValueError:
        raise refuse("it holds a number that is not finite, which JSON does not allow") from None
    if row.get("messages") is not None:
        if not isinstance(row["messages"], list):
            raise refuse(f"'messages' is a {type(row['messages']).__name__}, not a list")
        return _line(
            row, [parsing.merge_same_speaker(parsing.checked_messages(row["messages"], "messages", refuse))], False
        )
    column = next((name for name in REPLY_COLUMNS if row.get(name) is not None), "replies")
    if row.get("prompt") is None or row.get(column) is None:
        guess = "".join(nearest(name, COLUMNS) for name in row if name not in COLUMNS)
        raise refuse(f"it has {', '.join(map(repr, row)) or 'nothing'}{guess}")
    replies = row[column] if column == "replies" else [row[column]]
    if not isinstance(replies, list) or not replies:
        raise refuse("'replies' wants a list with at least one reply")
    if wrong := [reply for reply in replies if not isinstance(reply, str)]:
        raise refuse(f"{column!r} holds a {type(wrong[0]).__name__}, not text")
    prompt = parsing.prompt_messages(row["prompt"], refuse)
    dialogues = [parsing.merge_same_speaker([*prompt, {"role": "assistant", "content": reply}]) for reply in replies]
    return _line(row, dialogues, column == "replies")


def _line(row: dict[str, Any], dialogues: list[Messages], has_replies: bool) -> Line:
    faults = [fault for dialogue in dialogues if (fault := parsing.skip_reason(dialogue))]
    return Line(row, faults[0] if faults else dialogues, has_replies)


def score(scorer: Scorer, lines: Iterator[Line], best_of: bool, waits: bool, out: BinaryIO) -> Counter:
    """Write each line with its rewards; returns how many were scored ("scored") and how many skipped, by reason.

    With `waits` lines are scored a thousand at a time. Without, whatever has arrived is scored at once, so that a
    process that writes one line and waits for its reward gets it.
    """
    counts: Counter = Counter()
    for chunk in _chunks(lines, waits):
        wanted = [line.dialogues for line in chunk if not isinstance(line.dialogues, str)]
        tokenised = iter(tokenize_groups(wanted, scorer.model.tokenizer, scorer.max_length))
        found = [line.dialogues if isinstance(line.dialogues, str) else next(tokenised) for line in chunk]
        jobs = [at for at, one in enumerate(found) if not isinstance(one, str)]
        rewards: dict[int, list[float]] = {}
        for number, values in itertools.chain.from_iterable(scorer.rewards([found[at].ids for at in jobs])):
            rewards[jobs[number]] = values
        for at, line in enumerate(chunk):
            counts["scored" if at in rewards else found[at]] += 1
            out.write(_encoded(_answer(line, rewards.get(at), found[at], best_of)))
        out.flush()
    return counts


def _encoded(answer: dict[str, Any]) -> bytes:
    try:
        return json.dumps(answer, ensure_ascii=False).encode() + b"\n"
    except UnicodeEncodeError:  # half a character (a lone surrogate) can only be written as its escape
        return json.dumps(answer).encode() + b"\n"


def _answer(line: Line, rewards: list[float] | None, found: Any, best_of: bool) -> dict[str, Any]:
    is_choice = line.has_replies and best_of
    if rewards is None:
        nothing = {"rewards": None} if line.has_replies else {"reward": None}
        nothing |= {"best": None, "reply": None, "reward": None} if is_choice else {}
        return {**line.row, **nothing, "left_out": parsing.SKIP_REASONS[found]}
    if not line.has_replies:
        return {**line.row, "reward": rewards[0]}
    best = max(range(len(rewards)), key=rewards.__getitem__)  # the first of equals
    choice = {"best": best, "reply": line.row["replies"][best], "reward": rewards[best]} if is_choice else {}
    return {**line.row, "rewards": rewards, **choice}


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
    end: Any = False
    while end is False:
        chunk: list[Line] = []
        while len(chunk) < ROWS_AT_A_TIME:
            try:
                item = arrived.get(block=waits or not chunk)
            except queue.Empty:
                break
            if not isinstance(item, Line):
                end = item
                break
            chunk.append(item)
        if chunk:
            yield chunk  # lines before a broken one are answered before it is reported
    if end is not None:
        raise end
