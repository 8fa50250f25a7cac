"""From dialogues to token ids, by chat template and tokenizer; what two texts share is encoded once."""

import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from common.prefetch import prefetched
from data_pipeline import messages
from data_pipeline.messages import Messages
from data_pipeline.parsing import Pair, Parsed, read_pairs
from data_pipeline.sources import Source

ROWS_AT_A_TIME = 500  # rows of a chunk; two or three chunks are in memory at once
INDEPENDENT_PRE_TOKENIZERS = ("Split", "ByteLevel", "Digits", "Punctuation", "Whitespace", "WhitespaceSplit")


@dataclass
class Chunk:
    """Some rows of a source: the pairs among them, their dialogues rendered by the chat template."""

    rows: list[Parsed]  # all of them; what is no pair is a reason for skipping
    skipped: list[tuple[int, str]] = field(default_factory=list)  # (index in rows, reason)
    pairs: list[tuple[int, Pair]] = field(default_factory=list)  # (index in rows, pair)
    texts: list[list[str]] = field(default_factory=list)  # of each pair: chosen, rejected


def tokenized_chunks(source: Source, tokenizer: Any) -> Iterator[tuple[Chunk, list[list[np.ndarray]]]]:
    """Yield a source's rows a chunk at a time, with the token ids of each chunk's texts."""
    backend, tokens = tokenizer.backend_tokenizer, cut_tokens(tokenizer)
    # The template runs in Python and needs its lock, the tokenizer does not: one chunk is rendered while a thread
    # encodes the chunk before it.
    return prefetched(_rendered(source, tokenizer), lambda chunk: (chunk, encode_groups(chunk.texts, backend, tokens)))


def _rendered(source: Source, tokenizer: Any) -> Iterator[Chunk]:
    """Read a source's rows and put them through the chat template, a chunk at a time."""
    rows = read_pairs(source)
    while some := list(itertools.islice(rows, ROWS_AT_A_TIME)):
        chunk = Chunk(some)
        for at, (_, pair, _) in enumerate(some):
            if isinstance(pair, str):
                chunk.skipped.append((at, pair))
                continue
            # one call per pair: a call for many is no faster, and one refused dialogue would take the others along
            texts = render([pair.chosen, pair.rejected], tokenizer, pair.tools)
            if texts is None:
                chunk.skipped.append((at, "template"))
                continue
            if not messages.is_rendered([pair.chosen, pair.rejected], pair.tools, texts):
                pair = replace(pair, warnings=(*pair.warnings, "not_rendered"))
            chunk.texts.append(texts)
            chunk.pairs.append((at, pair))
        yield chunk


def render(dialogues: list[Messages], tokenizer: Any, tools: Any = None) -> list[str] | None:
    """Dialogues as the chat template writes them; None if the template itself rejects one (`raise_exception`)."""
    try:
        return tokenizer.apply_chat_template(dialogues, tokenize=False, **({"tools": tools} if tools else {}))
    except Exception as error:  # templates raise anything; only their own complaint is about the dialogue
        # jinja2's and those derived from it, which need not be imported for this
        if all(kind.__name__ != "TemplateError" for kind in type(error).__mro__):
            raise
        return None


def encode_groups(groups: list[list[str]], backend: Any, cut_tokens: list[str]) -> list[list[np.ndarray]]:
    """The ids of each text, as if encoded alone. The start that all texts of a group share is encoded once."""
    # A cut behind any of them gives the same ids; the most frequent one in the first text ends every turn.
    token = max(cut_tokens, key=groups[0][0].count, default="") if groups else ""
    cuts = [_last_cut(texts, token) if token else 0 for texts in groups]
    stretches = []
    for texts, cut in zip(groups, cuts, strict=True):
        stretches += [texts[0][:cut]] if cut else []
        stretches += [text[cut:] for text in texts]
    # `encode_batch_fast` skips the offsets into the text, which nothing here needs
    encodings = iter(backend.encode_batch_fast(stretches, add_special_tokens=False))
    ids = []
    for texts, cut in zip(groups, cuts, strict=True):
        start = next(encodings).ids if cut else []
        ids.append([np.array(start + next(encodings).ids, dtype=np.int32) for _ in texts])
    return ids


def _last_cut(texts: list[str], token: str) -> int:
    """Where the last `token` in the shared start of some texts ends, leaving each some text; 0 if there is none."""
    end = min(map(len, texts)) - 1
    while (found := texts[0].rfind(token, 0, end)) >= 0:
        end = found + len(token)
        if all(text.startswith(texts[0][:end]) for text in texts):
            return end
        end -= 1
    return 0


def cut_tokens(tokenizer: Any) -> list[str]:
    """The added tokens behind which a text may be cut: encoding the two parts gives the ids of the whole text.

    `tokenizers` first finds the added tokens that are not normalized in the raw text (leftmost first, then longest).
    The stretches between them are normalized, split and encoded independently of one another
    (`AddedVocabulary::extract_and_normalize`, then `PreTokenizedString`). So a text may be cut behind such a token if
    its characters are always read as this token, whatever surrounds them, and if no pre-tokenizer depends on where in
    the text a stretch is. A tokenizer for which this is not certain is never cut.
    """
    backend = tokenizer.backend_tokenizer
    added = {number: token for number, token in backend.get_added_tokens_decoder().items() if not token.normalized}
    if (
        backend.encode_special_tokens
        or getattr(backend.model, "dropout", None)
        or any(token.single_word or token.lstrip or token.rstrip for token in added.values())
        or not _reads_stretches_alone(backend.pre_tokenizer)
    ):
        return []
    contents = [token.content for token in added.values()]
    return [
        token.content
        for number, token in added.items()
        if not any(_may_overlap(token.content, other) for other in contents)
        # also false if the post-processor adds or repeats something
        and backend.encode(token.content, add_special_tokens=False).ids == [number]
    ]


def _may_overlap(token: str, other: str) -> bool:
    """Whether in some text `other` could take characters of `token`: it contains it, or one's end is the other's start.

    "<|a|>" and "<|a|>b" may, "xa" and "ab" may, and "aba" may overlap itself; "<|a|>" and "<|b|>" may not.
    """
    if token in other and token != other:
        return True
    most = min(len(token), len(other))
    return any(token[-n:] == other[:n] or other[-n:] == token[:n] for n in range(1, most + (token != other)))


def _reads_stretches_alone(pre_tokenizer: Any) -> bool:
    """Whether a pre-tokenizer is known to split each stretch in the same way, wherever in the text it is."""
    if pre_tokenizer is None:
        return True
    state = json.loads(pre_tokenizer.__getstate__())
    parts = state["pretokenizers"] if state["type"] == "Sequence" else [state]
    # Metaspace can put a space before the text's first word only
    return all(
        part["type"] in INDEPENDENT_PRE_TOKENIZERS
        or (part["type"] == "Metaspace" and part["prepend_scheme"] != "first")
        for part in parts
    )


def split_sequences(ids: np.ndarray, lengths: np.ndarray) -> list[np.ndarray]:
    """The k plain sequences of `[prompt | completion 1 | … | completion k]`, given these (1 + k,) lengths.

    [p p c c r] of lengths [2 2 1] -> [p p c c] and [p p r]
    """
    prompt, *completions = np.split(ids, np.cumsum(lengths)[:-1])
    return [np.concatenate([prompt, completion]) for completion in completions]


def longest_sequences(lengths: np.ndarray) -> np.ndarray:
    """(N,) tokens of each example's longest sequence, prompt and completion, of its (N, 1 + k) lengths."""
    return lengths[:, 0] + lengths[:, 1:].max(axis=1)


def shared_prefix(chosen: np.ndarray, rejected: np.ndarray) -> int:
    """How many tokens two sequences share from the start, leaving each at least one token that is not shared.

    [a b c] and [a b d e] -> 2; [a b c] and [a b c d] -> 2, so that c is in both completions.
    """
    shortest = min(len(chosen), len(rejected))
    differ = np.flatnonzero(chosen[:shortest] != rejected[:shortest])
    return min(int(differ[0]) if len(differ) else shortest, shortest - 1)


@dataclass(frozen=True)
class TokenizedGroup:
    """Dialogues as token ids, and how many tokens each last reply alone has."""

    ids: list[np.ndarray]
    reply_lengths: list[int]


def tokenize_groups(
    groups: Sequence[list[Messages] | str], tokenizer: Any, max_length: int, tools: Sequence[Any] | None = None
) -> list[TokenizedGroup | str]:
    """Render and tokenize groups of dialogues; for a group that cannot be scored, the key of `SKIP_REASONS` instead.

    What is such a key already is returned as it is. `tools` has for each group what the assistant could call.
    """
    tools = tools or [None] * len(groups)
    results: list[TokenizedGroup | str] = [group if isinstance(group, str) else "template" for group in groups]
    rendered = {
        at: texts
        for at, group in enumerate(groups)
        if not isinstance(group, str) and (texts := render(group, tokenizer, tools[at])) is not None
    }
    backend = tokenizer.backend_tokenizer
    encoded = encode_groups(list(rendered.values()), backend, cut_tokens(tokenizer))
    replies = [messages[-1]["content"] for at in rendered for messages in groups[at]]
    reply_encodings = iter(backend.encode_batch_fast(replies, add_special_tokens=False))
    for at, ids in zip(rendered, encoded, strict=True):
        reply_lengths = [len(next(reply_encodings).ids) for _ in ids]
        if all(map(len, ids)):  # a template may write nothing
            is_too_long = max(map(len, ids)) > max_length
            results[at] = "too_long" if is_too_long else TokenizedGroup(ids, reply_lengths)
    return results
