"""From dialogues to token ids, by chat template and tokenizer; what two texts share is encoded once."""

import itertools
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any

import numpy as np

from common.prefetch import prefetched
from data_pipeline import messages
from data_pipeline.messages import Messages
from data_pipeline.parsing import Pair, Parsed, read_pairs
from data_pipeline.reading import Source
from utils import UserError, first_line

ROWS_AT_A_TIME = 500  # rows of a chunk; two or three chunks are in memory at once
# For base models that come without a chat template: ChatML, which Qwen uses too, where its markers are tokens,
CHATML_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# and else plain words. The line break behind <eos> leaves <eos> itself free to be the padding; see `choose_pad_token`.
PLAIN_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] | capitalize }}: {{ message['content'] }}"
    "{{ eos_token ~ '\n' if message['role'] == 'assistant' else '\n\n' }}{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)
# In front of a template that takes no system turn: it becomes the beginning of the first user turn.
SYSTEM_INTO_USER = (
    "{% if messages and messages[0]['role'] == 'system' and messages[0]['content'] is string %}"
    "{% set system, rest = messages[0]['content'], messages[1:] %}"
    "{% if not system | trim %}{% set messages = rest %}"
    "{% elif rest and rest[0]['role'] == 'user' and rest[0]['content'] is string %}"
    "{% set messages = [dict(rest[0], content=system ~ '\n\n' ~ rest[0]['content'])] + rest[1:] %}"
    "{% else %}{% set messages = [{'role': 'user', 'content': system}] + rest %}{% endif %}{% endif %}"
)
_DATE = re.compile(r"""strftime_now\(\s*(?:format\s*=\s*)?(["'])(?P<format>.*?)\1\s*\)""")
_OTHER_DATE = re.compile(r"strftime_now(?!\s+is\s+(?:not\s+)?defined)")
_TEMPLATE_COMMENT = re.compile(r"\{#.*?#\}", re.DOTALL)
INDEPENDENT_PRE_TOKENIZERS = ("Split", "ByteLevel", "Digits", "Punctuation", "Whitespace", "WhitespaceSplit")


@dataclass
class Chunk:
    """Some rows of a source: the pairs among them, their dialogues rendered by the chat template."""

    rows: list[Parsed]  # all of them; what is no pair is a reason for skipping
    skipped: list[tuple[int, str]] = field(default_factory=list)  # (index in rows, reason)
    pairs: list[tuple[int, Pair]] = field(default_factory=list)  # (index in rows, pair)
    texts: list[list[str]] = field(default_factory=list)  # of each pair: chosen, rejected


# -- Chat templates ----------------------------------------------------------------------------------------------------


def change_templates(tokenizer: Any, change: Callable[[str], str]) -> None:
    """Change a tokenizer's chat template, or each of several."""
    given = tokenizer.chat_template
    tokenizer.chat_template = (
        {name: change(given[name]) for name in given} if isinstance(given, dict) else change(given)
    )


def fix_date(tokenizer: Any, date: datetime) -> bool:
    """Have a chat template that writes today's date write this one; returns whether it does write one.

    `strftime_now("%d %b %Y")` in the template becomes the text that it would give, so a saved tokenizer keeps the date.
    UserError if the template asks for the date in another way.
    """
    before = tokenizer.chat_template
    change_templates(tokenizer, lambda text: _DATE.sub(lambda call: json.dumps(date.strftime(call["format"])), text))
    texts = tokenizer.chat_template.values() if isinstance(before, dict) else [tokenizer.chat_template]
    for text in texts:
        text = _TEMPLATE_COMMENT.sub("", text)
        if found := _OTHER_DATE.search(text):
            raise UserError(
                "the chat template writes today's date in a way that cannot be fixed, so rewards would change daily",
                where=tokenizer.name_or_path,
                found=text[found.start() : found.start() + 60].splitlines()[0],
                next="write a date in its place in the model's chat_template.jinja",
            )
    return tokenizer.chat_template != before


def take_system_turns(tokenizer: Any) -> None:
    """If a tokenizer's chat template rejects a system turn, have it put the text into the first user turn."""
    dialogue = [{"role": role, "content": role} for role in ("system", "user", "assistant")]
    if isinstance(render([dialogue], tokenizer), str):
        before = tokenizer.chat_template
        change_templates(tokenizer, lambda text: SYSTEM_INTO_USER + text)
        if isinstance(render([dialogue], tokenizer), str):
            tokenizer.chat_template = before


def moves_system_turn(tokenizer: Any, dialogues: Sequence[Messages]) -> bool:
    """Whether the chat template puts a system turn of these dialogues into the first user turn."""
    given = tokenizer.chat_template
    texts = given.values() if isinstance(given, dict) else [given]
    if not any(str(text).startswith(SYSTEM_INTO_USER) for text in texts):
        return False
    return any(dialogue[0]["role"] == "system" and dialogue[0]["content"].strip() for dialogue in dialogues)


# -- Dialogues as tokens -----------------------------------------------------------------------------------------------


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
            if isinstance(texts, str):
                chunk.skipped.append((at, texts))
                continue
            if not messages.is_rendered([pair.chosen, pair.rejected], pair.tools, texts):
                pair = replace(pair, warnings=(*pair.warnings, "not_rendered"))
            if moves_system_turn(tokenizer, [pair.chosen, pair.rejected]):
                pair = replace(pair, warnings=(*pair.warnings, "system_moved"))
            chunk.texts.append(texts)
            chunk.pairs.append((at, pair))
        yield chunk


def render(dialogues: list[Messages], tokenizer: Any, tools: Any = None) -> list[str] | str:
    """Dialogues as the chat template writes them, or the reason for skipping them if it rejects one."""
    try:
        texts = tokenizer.apply_chat_template(dialogues, tokenize=False, **({"tools": tools} if tools else {}))
    except TypeError:  # DeepSeek's templates want the arguments of tool calls as text
        as_text = messages.with_arguments_as_text(dialogues)
        if as_text == dialogues:
            raise
        return render(as_text, tokenizer, tools)
    except Exception as error:  # templates raise anything; only their own complaint is about the dialogue
        # jinja2's and those derived from it, which need not be imported for this
        if all(kind.__name__ != "TemplateError" for kind in type(error).__mro__):
            raise
        return f'template: it says "{first_line(error)}"'
    for dialogue, text in zip(dialogues, texts, strict=True):
        if dialogue[-1].get("tool_calls") and not dialogue[-1]["content"].strip():
            without = [*dialogue[:-1], {"role": dialogue[-1]["role"], "content": dialogue[-1]["content"]}]
            if render([without], tokenizer, tools) == [text]:
                return "no_reply: the chat template leaves out the tool call that is all of it"
    return texts


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
    is_whole: bool = True  # whether the chat template wrote every part of the dialogues


def tokenize_groups(
    groups: Sequence[list[Messages] | str], tokenizer: Any, max_length: int, tools: Sequence[Any] | None = None
) -> list[TokenizedGroup | str]:
    """Render and tokenize groups of dialogues; for a group that cannot be scored, the reason (see parsing.py) instead.

    What is such a reason already is returned as it is. `tools` has for each group what the assistant could call.
    """
    tools = tools or [None] * len(groups)
    texts = [
        group if isinstance(group, str) else render(group, tokenizer, tools[at]) for at, group in enumerate(groups)
    ]
    rendered = {at: found for at, found in enumerate(texts) if not isinstance(found, str)}
    nothing = "template: it writes nothing"
    results: list[TokenizedGroup | str] = [found if isinstance(found, str) else nothing for found in texts]
    backend = tokenizer.backend_tokenizer
    encoded = encode_groups(list(rendered.values()), backend, cut_tokens(tokenizer))
    replies = [dialogue[-1]["content"] for at in rendered for dialogue in groups[at]]
    reply_encodings = iter(backend.encode_batch_fast(replies, add_special_tokens=False))
    for at, ids in zip(rendered, encoded, strict=True):
        reply_lengths = [len(next(reply_encodings).ids) for _ in ids]
        if all(map(len, ids)):  # a template may write nothing
            is_too_long = max(map(len, ids)) > max_length
            is_whole = messages.is_rendered(groups[at], tools[at], rendered[at])
            results[at] = "too_long" if is_too_long else TokenizedGroup(ids, reply_lengths, is_whole)
    return results
