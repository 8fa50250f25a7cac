"""From files and the hub to pairs of dialogues: finding, reading, checking and parsing preference rows.

A *row* is what the file holds; a *pair* is two message lists, chosen and rejected. What is wrong with a file (a missing
column, a wrong type, broken JSON) stops with file, line and reason. What is wrong with a row's content (no reply, two
equal sides) leaves that row out, counted, under one of `LEFT_OUT`.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import hub
from utils import UserError, nearest, sha256_of

SUFFIXES = hub.DATA_SUFFIXES
TEST_NAMES = ("test", "validation", "eval")
MEND = "mend that place of the file, then the same command again"
HELD_OUT_IN = 20  # without a test split, one prompt in 20 is held out
Messages = list[dict[str, str]]

# Why a row is left out. Every row is either kept or counted under exactly one of these.
LEFT_OUT = {
    "no_dialogue": "no dialogue (the text does not start with a turn)",
    "no_reply": "no reply (the last turn is empty)",
    "wrong_last_speaker": "last turn not the assistant's",
    "identical": "chosen and rejected are the same",
    "no_text": "half a character in a text (a lone UTF-16 surrogate)",
    "no_preference": "voted a tie, or both bad",
    "template": "refused by the model's chat template",
    "too_long": "too long",
}
VOTES_FOR_NEITHER = ("tie", "both_bad")  # the column `vote`, which chat.py writes
# What is unusual about a row that is kept.
NOTED = {
    "merged": "with turns of the same speaker in a row, merged into one",
    "prompts_differ": "whose two sides answer different prompts",
}


@dataclass(frozen=True)
class Pair:
    """One preference: two dialogues that each end in an assistant's reply."""

    chosen: Messages
    rejected: Messages
    margin: float = 0.0
    kind: str = ""
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Source:
    """One split of a dataset: a local file, or a split on the hub."""

    name: str
    path: Path | None = None
    hub_split: str = ""
    part: str = "all"  # "all", or "train" / "test" of a file that is split by the hash of its prompts
    hub_rows: Any = None  # a datasets.Dataset

    def fingerprint(self) -> str:
        """Changes whenever the rows do; what the token cache is keyed by."""
        content = sha256_of(self.path) if self.path else self.hub_rows._fingerprint
        return f"{content}/{self.part}"

    def place(self, row: int) -> str:
        """`file:line`, or the row number where there are no lines."""
        is_lines = self.path is not None and ".jsonl" in self.path.name
        return f"{self.name}:{row}" if is_lines else f"{self.name}, row {row}"


# ---------------------------------------------------------------------------------------------------------------------
# Finding
# ---------------------------------------------------------------------------------------------------------------------


def find_sources(dataset: str) -> tuple[Source, Source]:
    """The train and test split of a hub id, a file, or a folder with `train.*` and `test.*`."""
    hub.check_path_exists(dataset, "--dataset")
    path = Path(dataset).expanduser()
    if path.is_file():
        if not path.name.endswith(SUFFIXES):
            raise UserError("--dataset is of a kind that is not read here", where=path, next=f"wants {_or(SUFFIXES)}")
        return Source(str(path), path, part="train"), Source(str(path), path, part="test")
    if path.is_dir():
        train, test = file_in(path, ("train",)), file_in(path, TEST_NAMES)
        if train is None:
            found = ", ".join(sorted(p.name for p in path.iterdir())[:8]) or "nothing"
            raise UserError("--dataset is a folder without a train file", where=path, found=found, next="wants train.*")
        if test is None:
            return Source(str(train), train, part="train"), Source(str(train), train, part="test")
        return Source(str(train), train), Source(str(test), test)
    return _hub_sources(dataset)


def _or(words: tuple[str, ...]) -> str:
    return ", ".join(words[:-1]) + " or " + words[-1]


def file_in(folder: Path, stems: tuple[str, ...]) -> Path | None:
    """The folder's data file of the first of `stems` that has one; UserError if two files have the same stem."""
    for stem in stems:
        found = [folder / f"{stem}{suffix}" for suffix in SUFFIXES if (folder / f"{stem}{suffix}").is_file()]
        if len(found) > 1:
            raise UserError(
                f"--dataset has more than one {stem} file", where=folder, found=", ".join(p.name for p in found),
                next="keep one of them there, or name the file itself",
            )  # fmt: skip
        if found:
            return found[0]
    return None


def hub_splits(dataset: str) -> Any:
    """All splits of a dataset on the hub, or of its local copy: name -> datasets.Dataset."""
    instead = "python train_rm.py --demo   (offline), or --dataset FILE.jsonl"
    local_only = hub.only_local_copy(dataset, "dataset", "--dataset", instead)
    import datasets

    if local_only:
        datasets.config.HF_HUB_OFFLINE = True  # otherwise it retries for half a minute before it looks in its cache
    try:
        return datasets.load_dataset(dataset)
    except Exception as error:  # its errors share no base; whatever it is, the dataset did not open
        raise UserError(
            "--dataset cannot be opened", where=dataset, found=f"{type(error).__name__}: {error}"
        ) from error


def _hub_sources(dataset: str) -> tuple[Source, Source]:
    splits = hub_splits(dataset)
    train = next((name for name in splits if name.startswith("train")), None)
    if train is None:
        raise UserError("--dataset has no train split", where=dataset, found=", ".join(splits))
    test = next((name for stem in TEST_NAMES for name in splits if name.startswith(stem)), None)
    if test is None:
        parts = [
            Source(f"{dataset} {train}", hub_split=train, hub_rows=splits[train], part=p) for p in ("train", "test")
        ]
        return parts[0], parts[1]
    return tuple(Source(f"{dataset} {name}", hub_split=name, hub_rows=splits[name]) for name in (train, test))


# ---------------------------------------------------------------------------------------------------------------------
# Reading
# ---------------------------------------------------------------------------------------------------------------------


def read_rows(source: Source) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (line or row number from 1, row) of a source's file or hub split. UserError says what is broken where."""
    if source.path is None:
        yield from enumerate(source.hub_rows, start=1)
    elif source.path.name.endswith((".jsonl", ".jsonl.gz")):
        yield from _json_lines(source)
    elif source.path.suffix == ".json":
        yield from _json_list(source)
    else:
        yield from _parquet(source)


def _json_lines(source: Source) -> Iterator[tuple[int, dict[str, Any]]]:
    assert source.path is not None
    open_file = gzip.open if source.path.suffix == ".gz" else open
    number = 0
    try:
        with open_file(source.path, "rb") as file:
            for number, row in parse_json_lines(file, source.place):
                yield number, row
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(
            "the data file is damaged or cut off", where=f"{source.name}, after line {number}", found=error,
            next="fetch or write the file again",
        ) from error  # fmt: skip


def parse_json_lines(lines: Iterable[bytes], place: Callable[[int], str]) -> Iterator[tuple[int, Any]]:
    """Yield (line number from 1, content) of JSONL; empty lines are skipped. `place` names a line in errors."""
    for number, line in enumerate(lines, start=1):
        if number == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")  # a byte-order mark says nothing about the rows
        if line.strip():
            yield number, _parse_json(place(number), line)


def _parse_json(place: str, text: bytes) -> Any:
    """The content of a line, or of a whole file (then the errors count its lines themselves)."""
    try:
        return json.loads(text.decode("utf-8"), object_pairs_hook=_row_without_repeats)
    except UnicodeDecodeError as error:
        line = text.count(b"\n", 0, error.start) + 1
        found = f"byte {text[error.start]:#04x}" + (f" in line {line}" if line > 1 else "")
        raise UserError("the data is not UTF-8 text", where=place, found=found, next=MEND) from error
    except (ValueError, RecursionError) as error:
        raise UserError("the data is not JSON", where=place, found=error, next=MEND) from error


def _row_without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) != len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)!r} stands there twice")
    return row


def _json_list(source: Source) -> Iterator[tuple[int, dict[str, Any]]]:
    assert source.path is not None
    text = source.path.read_bytes().removeprefix(b"\xef\xbb\xbf")
    content = _parse_json(source.name, text)
    if not isinstance(content, list):
        raise UserError(
            "a .json file wants one list of rows", where=source.name, found=type(content).__name__,
            next="one row per line goes into a .jsonl file",
        )  # fmt: skip
    yield from enumerate(content, start=1)


def _parquet(source: Source) -> Iterator[tuple[int, dict[str, Any]]]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        for batch in pyarrow.parquet.ParquetFile(source.path).iter_batches(1000):
            for row in batch.to_pylist():
                number += 1
                yield number, row
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise UserError(
            "the data file is damaged, or no parquet file", where=f"{source.name}, after row {number}", found=error,
            next="fetch or write the file again",
        ) from error  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# Parsing
# ---------------------------------------------------------------------------------------------------------------------

# A turn starts where the text does or after an empty line, and nowhere else: "Human:" in a sentence is a word.
_FIRST_TURN = re.compile(r"\s*(Human|Assistant):(?=\s|\Z)")
_NEXT_TURN = re.compile(r"\n\n(Human|Assistant):(?=\s|\Z)")  # one that opens with plain letters is found quickly
_ROLE = {"Human": "user", "Assistant": "assistant"}


def read_pairs(source: Source) -> Iterator[tuple[int, Pair | str]]:
    """Yield (row number, pair), or (row number, a key of `LEFT_OUT`) for a row whose content is no preference."""
    for number, row in read_rows(source):
        check_columns(source, number, row)
        pair = parse_pair(row, lambda problem, number=number: _refuse(source, number, problem))
        if source.part != "all" and (source.part == "test") != is_held_out(row):
            continue
        yield number, pair


def _refuse(source: Source, number: int, problem: str) -> UserError:
    return UserError(
        f"a row of the data cannot be used: {problem}", where=source.place(number),
        next="wants chosen and rejected (text or message lists), and if you like prompt and margin",
    )  # fmt: skip


def check_columns(source: Source, number: int, row: Any) -> None:
    if not isinstance(row, dict):
        raise _refuse(source, number, f"it is a {type(row).__name__}, not an object")
    for column in ("chosen", "rejected"):
        if row.get(column) is None:
            guess = nearest(column, [name for name in row if name not in ("chosen", "rejected", "prompt")])
            found = f"no column {column!r}{guess}; it has {', '.join(map(repr, row)) or 'none'}"
            raise _refuse(source, number, f"{column!r} is null{guess}" if column in row else found)


def is_held_out(row: dict[str, Any]) -> bool:
    """By the prompt's hash: rows of one prompt stay together, and a file that grows keeps its split."""
    prompt = row.get("prompt")
    if prompt is None:
        chosen = row["chosen"]
        prompt = chosen[:-1] if isinstance(chosen, list) else chosen.rpartition("\n\nAssistant:")[0] or chosen
    digest = hashlib.sha256(json.dumps(prompt, sort_keys=True, default=str).encode()).digest()
    return int.from_bytes(digest[:8], "big") % HELD_OUT_IN == 0


def parse_pair(row: dict[str, Any], refuse: Any) -> Pair | str:
    """A row as a pair, or the key of `LEFT_OUT` it belongs under.

    Three forms, told apart by the columns and their types: HH-RLHF's transcripts; message lists; a `prompt` (text,
    transcript or messages) beside replies (text or messages). Policies: turns of one speaker in a row are merged
    with an empty line between; sides with different prompts are kept, because two whole dialogues were compared.
    `refuse` makes the error for a wrong type.
    """
    merged = False
    sides: list[Messages] = []
    prompt = prompt_messages(row["prompt"], refuse) if row.get("prompt") is not None else None
    for column in ("chosen", "rejected"):
        messages = _side_messages(row[column], prompt, column, refuse)
        if messages is None:
            return "no_dialogue"
        joined = merge_same_speaker(messages)
        merged |= len(joined) != len(messages)
        sides.append(joined)
    chosen, rejected = sides
    for messages in sides:
        if fault := fault_of(messages):
            return fault
    if row.get("vote") in VOTES_FOR_NEITHER:
        return "no_preference"
    if chosen == rejected:
        return "identical"
    kind = str(row.get("kind") or "").encode("utf-8", "replace").decode()
    notes = ("merged",) * merged + ("prompts_differ",) * (chosen[:-1] != rejected[:-1])
    return Pair(chosen, rejected, _margin(row.get("margin"), refuse), kind, notes)


def fault_of(messages: Messages) -> str | None:
    """The key of `LEFT_OUT` under which a dialogue belongs; None if it ends in a reply that can be scored."""
    if any(_is_no_text(message["content"]) for message in messages):
        return "no_text"
    if messages[-1]["role"] != "assistant":
        return "wrong_last_speaker"
    return None if messages[-1]["content"].strip() else "no_reply"


def _side_messages(value: Any, prompt: Messages | None, column: str, refuse: Any) -> Messages | None:
    if isinstance(value, list):
        messages = checked_messages(value, column, refuse)
        # A list that starts with a reply continues the prompt; any other is the whole dialogue (as in UltraFeedback).
        return prompt + messages if prompt is not None and messages[0]["role"] == "assistant" else messages
    if not isinstance(value, str):
        raise refuse(f"{column!r} is a {type(value).__name__}, not text or a list of messages")
    if prompt is None:
        return parse_transcript(value)
    whole = parse_transcript(value)  # some sets repeat the prompt in front of each reply
    if whole is not None and whole[0]["role"] == "user":
        return whole
    reply = whole[0]["content"] if whole is not None and len(whole) == 1 else value.strip()
    return [*prompt, {"role": "assistant", "content": reply}]


def prompt_messages(value: Any, refuse: Any) -> Messages:
    if isinstance(value, list):
        return checked_messages(value, "prompt", refuse)
    if not isinstance(value, str):
        raise refuse(f"'prompt' is a {type(value).__name__}, not text or a list of messages")
    return parse_prompt(value)


def parse_prompt(text: str) -> Messages:
    """What two replies answer: a transcript, or else one question."""
    messages = parse_transcript(text)
    if messages is None:
        return [{"role": "user", "content": text.strip()}]
    if messages[-1]["role"] == "assistant" and not messages[-1]["content"]:
        messages.pop()  # HH-RLHF's prompts end in an open "\n\nAssistant:"
    return messages


def checked_messages(value: list[Any], column: str, refuse: Any) -> Messages:
    if not value:
        raise refuse(f"{column!r} is an empty list")
    for message in value:
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            raise refuse(f"{column!r} holds {str(message)[:60]!r}, not a message with role and content")
        if message["role"] not in ("system", "user", "assistant"):
            raise refuse(f"{column!r} has the role {message['role']!r}, not system, user or assistant")
        if not isinstance(message["content"], str):
            raise refuse(f"{column!r} has content that is a {type(message['content']).__name__}, not text")
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


def _is_no_text(content: str) -> bool:
    """JSON can say "\\ud83d" alone, which no tokenizer and no file can take."""
    try:
        content.encode("utf-8")  # fails for lone surrogates and for nothing else
    except UnicodeEncodeError:
        return True
    return False


def merge_same_speaker(messages: Messages) -> Messages:
    joined: Messages = []
    for message in messages:
        if joined and joined[-1]["role"] == message["role"]:
            contents = [content for content in (joined[-1]["content"], message["content"]) if content]
            joined[-1] = {"role": message["role"], "content": "\n\n".join(contents)}
        else:
            joined.append(message)
    return joined


def _margin(value: Any, refuse: Any) -> float:
    if value is None:
        return 0.0
    # beyond 1e30 a margin would be infinite in fp32; nan compares False
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < 1e30:
        raise refuse(f"'margin' is {value!r}, not a finite number")
    return float(value)
