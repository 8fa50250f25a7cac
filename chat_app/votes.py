"""Votes from the page, appended to a JSONL file that `train_rm.py --dataset` reads.

A row is {"prompt": messages, "chosen": [reply], "rejected": [reply], "vote": …, "time": …}. "Tie" and "both bad" are
saved too, with A as `chosen`; because of their `vote`, training counts and skips them. The page adds what makes a vote
trustworthy, which training ignores and votes of earlier versions lack:

    "blind": whether the page had not shown rewards or verdict of these texts before the vote
    "swapped": whether the two sides changed places when they were drawn
    "reward_model": the loaded one's name, or null
    "shown": {"a": side, "b": side}, each {"written_by": the policy, null if typed, "ending": "stopped", "cut" (at max
             new tokens), "" for a whole reply, null if typed, "reward": null if there is none}
"""

import contextlib
import errno
import json
import os
import time
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import utils
from chat_app.conversation import with_reply
from common import atomic_files, file_locks
from data_pipeline.messages import Messages

VOTES = {"a": "A is better", "b": "B is better", "tie": "Tie", "both_bad": "Both bad"}


def row_of(prompt: Messages, reply_a: str, reply_b: str, vote: str) -> dict[str, Any]:
    """One vote as a row of preference data. Raises ValueError if nothing can be learned from it."""
    if vote not in VOTES:
        raise ValueError(f"the vote {vote!r} is none of {', '.join(VOTES)}")
    if not any(message["role"] == "user" and message["content"].strip() for message in prompt):
        raise ValueError("there is no prompt yet: a vote needs one that the two replies answer")
    if not reply_a.strip() or not reply_b.strip():
        raise ValueError(f"reply {'B' if reply_a.strip() else 'A'} is empty: a vote needs two replies")
    if reply_a.strip() == reply_b.strip():
        raise ValueError("both replies are the same: there is nothing to prefer")
    chosen, rejected = (reply_b, reply_a) if vote == "b" else (reply_a, reply_b)
    return {
        "prompt": prompt,
        "chosen": with_reply([], chosen.strip()),
        "rejected": with_reply([], rejected.strip()),
        "vote": vote,
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),  # ISO 8601, local time
    }


class Agreement(NamedTuple):
    """How a reward model's rewards compare with blind votes."""

    agreed: int  # of `decided`, the votes for one side whose rewards differ
    decided: int
    no_difference: int  # votes for one side whose rewards are equal
    ties: int  # votes for neither side


def agreement(path: Path, reward_model: str) -> Agreement:
    """Compare the blind votes in a file with the rewards that `reward_model` gave at that time.

    Votes of earlier versions and lines changed by hand that can no longer be read are not counted.
    """
    lines = path.read_bytes().splitlines() if path.exists() else []
    found: Counter[str] = Counter()
    for line in lines:
        try:
            row = json.loads(line)
            if row["blind"] is not True or row["reward_model"] != reward_model:
                continue
            difference = row["shown"]["a"]["reward"] - row["shown"]["b"]["reward"]
            vote = row["vote"]
        except (ValueError, KeyError, TypeError):
            continue
        if vote not in ("a", "b"):
            found["ties"] += 1
        elif difference == 0:
            found["no difference"] += 1
        else:
            found["decided"] += 1
            found["agreed"] += (difference > 0) == (vote == "a")
    return Agreement(found["agreed"], found["decided"], found["no difference"], found["ties"])


def check_file(path: Path) -> None:
    """Raise UserError if votes cannot be appended to a file. Creates nothing: the file and its folder may be new."""
    folder = next((place for place in path.absolute().parents if os.path.exists(place)), path.parent)
    try:
        with contextlib.suppress(FileNotFoundError):
            path.open("r+b", 0).close()
        if not os.access(folder, os.W_OK):
            raise PermissionError(errno.EACCES, f"{folder} is not writable")
    except OSError as error:
        advice = "the name of a file, in a folder that you may write to"
        raise utils.UserError(
            "--votes_file cannot be written", where=path.absolute(), found=error.strerror, next=advice
        ) from error


def append(path: Path, row: dict[str, Any]) -> int:
    """Append a row and flush it to disk; returns the number of rows in the file.

    Threads and processes may append at the same time. If writing fails, the file is truncated to its old length and
    DiskOrNetworkError is raised.
    """
    line = json.dumps(row, ensure_ascii=False).encode("utf-8", "replace") + b"\n"  # a lone surrogate becomes "?"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with file_locks.exclusive(path.with_name(f".{path.name}.lock")), path.open("ab+", 0) as file:
            size = file.seek(0, 2)
            if size:
                file.seek(size - 1)
                line = line if file.read(1) == b"\n" else b"\n" + line  # the file was edited by hand
            try:
                if file.write(line) != len(line):  # unbuffered, so that nothing is written after a failure
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
                atomic_files.fsync_path(path)
            except OSError:
                file.truncate(size)
                raise
            with path.open("rb") as rows:  # buffered: unbuffered, each byte would take a system call
                return sum(1 for text in rows if text.strip())
    except OSError as error:
        raise utils.DiskOrNetworkError(
            "the vote was not saved", where=path, found=error.strerror or error, safe="earlier votes are unchanged",
            next="free some space or fix the folder's permissions, then vote again",
        ) from error  # fmt: skip
