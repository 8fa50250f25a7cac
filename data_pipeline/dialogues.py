"""Dialogues for training a policy: a prompt with a reply to learn from, or a prompt alone.

They come from preference data (the chosen reply, or both), from dialogues that end in a reply, and from prompts. A
reply is encoded by itself behind its prompt, because that is how a policy writes it: the prompt's tokens are given.

Letters: N dialogues.
"""

import hashlib
import itertools
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from common.prefetch import prefetched
from common.progress import ProgressBar
from data_pipeline import messages, parsing, sampler, shapes, sources
from data_pipeline.messages import Messages, RowError
from data_pipeline.parsing import Counts
from data_pipeline.reading import Source
from data_pipeline.sources import DataSpec
from data_pipeline.tokenization import ROWS_AT_A_TIME, moves_system_turn, render
from utils import UserError, first_line

MAX_SKIPPED = 0.10  # of a source's rows
REPLY_COLUMNS = ("completion", "response", "reply", "output", "answer")  # the first that a row has
EXPECTED_ROW = (
    "chosen and rejected, as for train_rm.py, or a prompt with completion or response, or messages;\n          "
    "--columns prompt=NAME,chosen=NAME reads columns of other names"
)


@dataclass(frozen=True)
class Dialogue:
    """A prompt, and the reply to it if there is one."""

    prompt: Messages
    reply: dict[str, Any] | None
    tools: Any = None
    warnings: tuple[str, ...] = ()
    shape: str = ""  # what the row was read as, if not as chosen and rejected
    unused: tuple[str, ...] = ()


# -- Parsing -----------------------------------------------------------------------------------------------------------


def parse_dialogues(
    row: Any, row_error: RowError, columns: tuple[tuple[str, str], ...], both: bool
) -> list[Dialogue | str]:
    """The dialogues of a row, or reasons for skipping it; of a preference the chosen one, or with `both` all."""
    view = parsing.with_columns(row, columns, row_error)
    if shapes.shape_of(view) is None:
        return [_plain(view, row_error)]
    found: dict[int, Dialogue | str] = {}
    for pair in parsing.parse_row(row, row_error, columns):
        if isinstance(pair, str):
            return [pair]
        if not any(message["content"].strip() for message in pair.chosen[:-1]):
            return ["no_dialogue"]
        for side in (pair.chosen, pair.rejected)[: 1 + both]:
            dialogue = Dialogue(side[:-1], side[-1], pair.tools, pair.warnings, pair.shape, pair.unused)
            found.setdefault(parsing.pair_digest(side[:-1], side[-1:]), dialogue)
    return list(found.values())


def _plain(row: dict[str, Any], row_error: RowError) -> Dialogue | str:
    """A row without a preference: a prompt, or a whole dialogue, or a prompt and a reply in columns of their own."""
    prompt = shapes.prompt_of(row)
    used = {name for name in shapes.PROMPT_COLUMNS if row.get(name) is prompt}
    column = next((name for name in REPLY_COLUMNS if row.get(name) not in (None, "") and name not in used), None)
    if prompt is None:
        if nulls := [name for name in shapes.PROMPT_COLUMNS if name in row and row[name] is None]:
            raise row_error(f"{nulls[0]!r} is null", "null")
        raise row_error(f"no prompt or messages; it has {', '.join(map(repr, row)) or 'nothing'}", "no_columns")
    dialogue = parsing.prompt_messages(prompt, row_error)
    if column:
        dialogue = parsing.side_messages(row[column], dialogue, False, column, row_error) or dialogue
    dialogue = parsing.with_system(dialogue, shapes.system_of(row), row_error)
    merged = messages.merge_same_speaker(dialogue)
    warnings = ("merged",) * (len(merged) != len(dialogue))
    has_reply = merged[-1]["role"] == "assistant"
    prompt_part, reply = (merged[:-1], merged[-1]) if has_reply else (merged, None)
    if reason := parsing.skip_reason([*prompt_part, reply or {"role": "assistant", "content": "to come"}]):
        return reason
    if not any(message["content"].strip() for message in prompt_part):
        return "no_dialogue"
    unused = shapes.unused_columns(row, (column or "messages",), [merged])
    tools = messages.checked_tools(row.get("tools"), row_error)
    return Dialogue(prompt_part, reply, tools, warnings, "prompts and replies" if reply else "prompts", unused)


def texts_of(dialogue: Dialogue, tokenizer: Any) -> tuple[str, str] | str:
    """The prompt as a policy is given it, and the reply with its end as the template writes it; or why it is skipped.

    A template that writes something else before a finished reply than before an open one gets the reply's own text.
    """
    options = {"tools": dialogue.tools} if dialogue.tools else {}
    prompts: list[str] = []
    whole = None if dialogue.reply is None else render([[*dialogue.prompt, dialogue.reply]], tokenizer, dialogue.tools)
    if isinstance(whole, str):
        return whole
    for thinks in (False, True):  # Qwen3 writes an empty thought before a reply that is to come without one
        try:
            prompts.append(
                tokenizer.apply_chat_template(
                    dialogue.prompt, tokenize=False, add_generation_prompt=True, enable_thinking=thinks, **options
                )
            )
        except Exception as error:  # see `render`
            if all(kind.__name__ != "TemplateError" for kind in type(error).__mro__):
                raise
            return f'template: it says "{first_line(error)}"'
        if whole is None:
            return prompts[0], ""
        if whole[0].startswith(prompts[-1]) and len(whole[0]) > len(prompts[-1]):
            return prompts[-1], whole[0].removeprefix(prompts[-1])
    return prompts[0], dialogue.reply["content"] + (tokenizer.eos_token or "")


# -- A source as tokens ------------------------------------------------------------------------------------------------


@dataclass
class _Row:
    """What became of one dialogue of a row."""

    number: int
    digests: tuple[int, int]
    dialogue: Dialogue | str
    prompt_ids: np.ndarray | None = None
    reply_ids: np.ndarray | None = None


@dataclass
class SourceDialogues:
    """The dialogues of one source, or of the part of it that is trained on or held out."""

    name: str
    counts: Counts
    kept: list[_Row] = field(default_factory=list)
    holds_out_rows: bool = False
    unusable_share: float = 0.0

    def lines(self, split: str, unit: str) -> list[str]:
        rows = len({row.number for row in self.kept})
        lines = [f"{split}: kept {rows:,} of {self.counts.rows:,} rows of {self.name}"]
        lines += [f"  as {len(self.kept):,} {unit}"] * (rows != len(self.kept))
        if split == "test" and self.holds_out_rows:
            lines.append("  held out by row and not by prompt, because the rows share few prompts")
        return [*lines, *self.counts.lines()]


def read_source(source: Source, tokenizer: Any, both: bool, wants_reply: bool, ends: set[int]) -> list[_Row]:
    """Every dialogue of a source as tokens, or the reason why it is skipped, whatever part of it is wanted."""
    backend = tokenizer.backend_tokenizer

    def parse(row: Any, row_error: RowError) -> list[Dialogue | str]:
        return parse_dialogues(row, row_error, source.columns, both)

    def chunks() -> Iterator[tuple[list[_Row], list[str]]]:
        rows = parsing.parsed(source.rows(), source.place, EXPECTED_ROW, parse)
        while some := list(itertools.islice(rows, ROWS_AT_A_TIME)):
            found, texts = [], []
            for number, row, parsed in some:
                for dialogue in [parsed] if isinstance(parsed, str) else parsed:
                    prompt = None if isinstance(dialogue, str) else dialogue.prompt
                    digests = (0, 0) if source.part == "all" else sampler.digests(row, prompt)
                    if not isinstance(dialogue, str) and wants_reply and dialogue.reply is None:
                        dialogue = "wrong_last_speaker"
                    rendered = dialogue if isinstance(dialogue, str) else texts_of(dialogue, tokenizer)
                    if isinstance(rendered, str):
                        found.append(_Row(number, digests, rendered))
                        continue
                    if moves_system_turn(tokenizer, [dialogue.prompt]):
                        dialogue = replace(dialogue, warnings=(*dialogue.warnings, "system_moved"))
                    if not messages.is_rendered([dialogue.prompt], dialogue.tools, [rendered[0]]):
                        dialogue = replace(dialogue, warnings=(*dialogue.warnings, "not_rendered"))
                    found.append(_Row(number, digests, dialogue))
                    texts += rendered
            yield found, texts

    def encode(chunk: tuple[list[_Row], list[str]]) -> list[_Row]:
        found, texts = chunk
        encodings = iter(backend.encode_batch_fast(texts, add_special_tokens=False))
        for row in found:
            if not isinstance(row.dialogue, str):
                row.prompt_ids = np.array(next(encodings).ids, dtype=np.int32)
                row.reply_ids = up_to_the_end(np.array(next(encodings).ids, dtype=np.int32), ends)
        return found

    rows: list[_Row] = []
    bar = ProgressBar(f"tokenizing {source.name}", None, unit="rows", first_after=5, stream=sys.stderr)
    for found in prefetched(chunks(), encode):
        rows += found
        bar.update(found[-1].number)
    bar.close()
    return rows


def up_to_the_end(ids: np.ndarray, ends: set[int]) -> np.ndarray:
    """A reply's tokens up to the first that ends it; templates write a line break behind that."""
    at = np.flatnonzero(np.isin(ids, list(ends)))
    return ids[: at[0] + 1] if len(at) else ids


def part_of(rows: list[_Row], source: Source, max_length: int, wants_reply: bool, is_unique: bool) -> SourceDialogues:
    """The part of a source that is wanted, without what is too long, and with `is_unique` each prompt once."""
    prompts = [(row.number, row.digests[0]) for row in rows if not isinstance(row.dialogue, str)]
    shares = source.part != "all" and sampler.shares_prompts(prompts)
    source = replace(source, holds_out_rows=shares)
    here = [row for row in rows if source.includes(*row.digests)]
    found = SourceDialogues(source.name, Counts(len({row.number for row in here})), [], shares)
    found.counts.name_of = source.row_name
    unusable, seen, shapes_of = set(), set(), {}
    for row in here:
        if isinstance(row.dialogue, str):
            found.counts.add(row.dialogue, row.number)
            unusable |= set() if row.dialogue == "no_preference" else {row.number}
            continue
        length = len(row.prompt_ids) + (len(row.reply_ids) if wants_reply else 0)
        if length > max_length or (wants_reply and not len(row.reply_ids)):
            reason = "too_long" if length > max_length else "no_reply"
            found.counts.add(reason, row.number)
            unusable.add(row.number)
            continue
        key = parsing.digest_of(row.dialogue.prompt)
        if is_unique and key in seen:
            found.counts.add("repeated", row.number)
            continue
        seen.add(key)
        found.kept.append(row)
        for warning in row.dialogue.warnings:
            if warning in parsing.WARNINGS and warning not in ("margin_is_text", "prompts_differ"):
                found.counts.add(warning, row.number)
        found.counts.unused.update(row.dialogue.unused)
        shapes_of[row.number] = row.dialogue.shape
    found.counts.shapes = Counter(shapes_of.values())
    found.unusable_share = len(unusable) / max(1, found.counts.rows)
    return found


# -- The dataset -------------------------------------------------------------------------------------------------------


class DialogueDataset:
    """Tokenized dialogues of one or several sources, each `[prompt | reply]`, in memory; without replies `[prompt]`."""

    def __init__(self, parts: list[SourceDialogues], wants_reply: bool, notes: tuple[str, ...] = ()):
        self.parts, self.notes = parts, notes
        self.name = ", ".join(part.name for part in parts)
        kept = [row for part in parts for row in part.kept]
        self.rows = np.array([row.number for row in kept], dtype=np.int64)  # (N,) in its source
        self.prompts = [row.dialogue.prompt for row in kept]  # as messages
        self.tools = [row.dialogue.tools for row in kept]
        ids = [[row.prompt_ids, row.reply_ids] if wants_reply else [row.prompt_ids] for row in kept]
        self.lengths = np.array([[len(part) for part in each] for each in ids], np.int32)  # (N, 2), or (N, 1)
        self.lengths = self.lengths.reshape(-1, 1 + wants_reply)
        self._ids = [np.concatenate(each) for each in ids]
        replies = [[row.dialogue.reply] if wants_reply else [] for row in kept]
        digests = [parsing.pair_digest(*both) for both in zip(self.prompts, replies, strict=True)]
        self.digests = np.array(digests, np.uint64)  # (N,)
        digest = hashlib.sha256(self.rows.tobytes() + self.lengths.tobytes())
        for each in self._ids:
            digest.update(each.tobytes())
        self.fingerprint = digest.hexdigest()

    def __len__(self) -> int:
        return len(self.lengths)

    def tokens(self, index: int) -> np.ndarray:
        """The ids of `[prompt | reply]`."""
        return self._ids[index]

    def longest_sides(self) -> np.ndarray:
        """(N,) tokens of each dialogue."""
        return self.lengths.sum(axis=1)

    def largest_token(self) -> int:
        return max(int(ids.max()) for ids in self._ids)

    @property
    def counts(self) -> Counts:
        return Counts(sum(part.counts.rows for part in self.parts))

    def lines(self, split: str, unit: str) -> list[str]:
        """What was kept of each source, how it was read, and what was skipped."""
        return [line for part in self.parts for line in part.lines(split, unit)]

    def check_skipped(self) -> None:
        """Raise UserError if more than a tenth of a source's rows are unusable."""
        for part in self.parts:
            if part.unusable_share > MAX_SKIPPED:
                raise UserError(
                    f"{part.unusable_share:.0%} of the rows would be skipped",
                    where=part.name,
                    found="\n".join(["", *part.counts.lines()]).replace("\n", "\n  "),
                    next="fix the data, raise --max_length (of prompts --prompt_max_length), or accept it with "
                    "--bad_rows skip",
                )


def load_dialogues(
    spec: DataSpec, tokenizer: Any, max_length: int, ends: set[int], both: bool = False
) -> tuple[DialogueDataset, DialogueDataset]:
    """The train and test dialogues of a dataset, with replies that end in one of the tokens `ends`."""
    return _load(spec, tokenizer, max_length, ends, both, wants_reply=True)


def load_prompts(spec: DataSpec, tokenizer: Any, max_length: int) -> tuple[DialogueDataset, DialogueDataset]:
    """The train and test prompts of a dataset, each once."""
    return _load(spec, tokenizer, max_length, set(), False, wants_reply=False)


def _load(
    spec: DataSpec, tokenizer: Any, max_length: int, ends: set[int], both: bool, wants_reply: bool
) -> tuple[DialogueDataset, DialogueDataset]:
    found = sources.find_sources(spec)
    tokenizer.backend_tokenizer.no_padding()
    tokenizer.backend_tokenizer.no_truncation()
    read: dict[str, list[_Row]] = {}

    def load(chosen: tuple[Source, ...], notes: tuple[str, ...] = ()) -> DialogueDataset:
        parts = []
        for source in chosen:
            key = source.cache_key()
            if key not in read:
                read[key] = read_source(source, tokenizer, both, wants_reply, ends)
            parts.append(part_of(read[key], source, max_length, wants_reply, is_unique=not wants_reply))
        return DialogueDataset(parts, wants_reply, notes)

    return load(found.train, found.notes), load(found.test)
