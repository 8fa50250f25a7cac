"""From pairs of dialogues to token ids: tokenising once, the cache, and the counts of what became of every row.

Letters: N pairs.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import json
import os
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

import utils
from common import atomic_files
from data_pipeline.parsing import LEFT_OUT, NOTED, Pair, Source, find_sources, read_pairs

CACHE_VERSION = 3  # raise it when parsing, tokenising or the files change
ROWS_AT_A_TIME = 500  # those being rendered, encoded and written are in memory
MOST_LEFT_OUT = 0.10
DEAD_AFTER_SECONDS = 24 * 3600

# ---------------------------------------------------------------------------------------------------------------------
# Tokenised pairs
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class Counts:
    """What became of every row of a source, with the numbers of the first few of each sort."""

    rows: int = 0
    count: Counter = field(default_factory=Counter)
    first_rows: dict[str, list[int]] = field(default_factory=dict)

    def add(self, key: str, *rows: int) -> None:
        if rows:
            self.count[key] += len(rows)
            first = self.first_rows.setdefault(key, [])
            first += rows[: 5 - len(first)]

    @property
    def left_out(self) -> int:
        return sum(self.count[key] for key in LEFT_OUT)

    def lines(self) -> list[str]:
        """A line for each sort of row that is not plainly kept."""
        lines = []
        for texts, verb in ((LEFT_OUT, "left out"), (NOTED, "kept")):
            for key, text in texts.items():
                if self.count[key]:
                    rows = ", ".join(str(row) for row in self.first_rows[key])
                    more = ", …" if self.count[key] > len(self.first_rows[key]) else ""
                    plural = "row" if self.count[key] == 1 else "rows"
                    lines.append(f"  {verb} {self.count[key]:,} {text} ({plural} {rows}{more})")
        return lines


class PairDataset:
    """Tokenised pairs, each stored once as `[prefix | chosen tail | rejected tail]`, memory-mapped from the cache.

    The prefix is the longest common prefix of the two token sequences, at most so long that each side keeps a token.
    """

    def __init__(self, folder: Path, name: str, max_length: int | None = None):
        report = utils.read_json(folder / "report.json")
        self.name, self.kind_names = name, report["kinds"]
        self.counts = Counts(report["rows"], Counter(report["count"]), report["first_rows"])
        lengths = np.load(folder / "lengths.npy")  # (N, 3): prefix, chosen tail, rejected tail
        rows = np.load(folder / "rows.npy")  # (N,) line or row number in the source
        starts = np.concatenate([[0], np.cumsum(lengths.sum(axis=1, dtype=np.int64))])
        self._tokens = (
            np.memmap(folder / "tokens.bin", dtype=np.int32, mode="r") if starts[-1] else np.zeros(0, np.int32)
        )
        fits = _longest_sides(lengths) <= (max_length or np.iinfo(np.int32).max)
        self.counts.add("too_long", *rows[~fits].tolist())
        for name, is_noted in zip(NOTED, np.load(folder / "notes.npy").T, strict=True):
            self.counts.add(name, *rows[fits & is_noted].tolist())
        self.lengths, self.rows, self._starts = lengths[fits], rows[fits], starts[:-1][fits]
        self.margins = np.load(folder / "margins.npy")[fits]  # (N,)
        self.kinds = np.load(folder / "kinds.npy")[fits]  # (N,) index into kind_names
        self.packed_lengths = self.lengths.sum(axis=1)  # (N,) tokens when the prefix is shared
        # What the pairs are, wherever they came from: resuming compares it.
        self.fingerprint = hashlib.sha256(report["tokens_sha256"].encode() + self.rows.tobytes()).hexdigest()

    def __len__(self) -> int:
        return len(self.lengths)

    def longest_sides(self) -> np.ndarray:
        """(N,) tokens of the longer of each pair's two sequences."""
        return _longest_sides(self.lengths)

    def tokens(self, index: int) -> np.ndarray:
        """The ids of `[prefix | chosen tail | rejected tail]`."""
        start = self._starts[index]
        return self._tokens[start : start + self.packed_lengths[index]]

    def sequences(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """The pair as two plain sequences of ids: (chosen, rejected)."""
        prefix, chosen, _ = self.lengths[index]
        ids = self.tokens(index)
        return ids[: prefix + chosen], np.concatenate([ids[:prefix], ids[prefix + chosen :]])

    def refuse_if_too_much_is_left_out(self) -> None:
        """Raise UserError if more than a tenth of the rows cannot be used; a vote for neither side is no fault."""
        unusable = self.counts.left_out - self.counts.count["no_preference"]
        if unusable > MOST_LEFT_OUT * self.counts.rows:
            share = unusable / self.counts.rows
            raise utils.UserError(
                f"{share:.0%} of the rows would be left out",
                where=self.name,
                found="\n".join(["", *self.counts.lines()]).replace("\n", "\n  "),
                next="mend the data, raise --max_length, or accept it with --bad_rows skip",
            )


def _longest_sides(lengths: np.ndarray) -> np.ndarray:
    return lengths[:, 0] + lengths[:, 1:].max(axis=1, initial=0)


def load_pairs(dataset: str, tokenizer: Any, max_length: int | None = None) -> tuple[PairDataset, PairDataset]:
    """The train and test pairs of a dataset, tokenised now or read from the cache, up to `max_length` tokens a side."""
    sources = find_sources(dataset)
    tokenizer.backend_tokenizer.no_padding()  # some published tokenizers pad or cut on their own
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer_print = hashlib.sha256(
        (tokenizer.backend_tokenizer.to_str() + str(tokenizer.chat_template)).encode()
    ).hexdigest()
    return tuple(
        PairDataset(_cached(source, tokenizer, tokenizer_print), source.name, max_length) for source in sources
    )


def cache_root() -> Path:
    default = os.environ.get("XDG_CACHE_HOME") or os.environ.get("LOCALAPPDATA") or Path.home() / ".cache"
    return Path(os.environ.get("RL_WITH_RM_CACHE") or Path(default) / "rl-with-rm")


def _cached(source: Source, tokenizer: Any, tokenizer_print: str) -> Path:
    key = hashlib.sha256(f"{CACHE_VERSION}/{source.fingerprint()}/{tokenizer_print}".encode()).hexdigest()[:32]
    folder = cache_root() / key
    if not _is_whole(folder):
        shutil.rmtree(folder, ignore_errors=True)
        _remove_dead_entries()
        try:
            with atomic_files.atomic_folder(folder, f".tmp-{key}-{os.getpid()}") as temporary:
                _tokenise(source, tokenizer, temporary)
        except FileExistsError as error:
            if (folder / "report.json").exists():
                return folder  # another process was faster, with the same result
            raise _cache_unwritable(error) from error
        except OSError as error:
            if source.path is not None and error.filename == str(source.path):
                raise
            raise _cache_unwritable(error) from error
    return folder


def _remove_dead_entries() -> None:
    """Delete what killed tokenisings left: temporary folders into which nobody has written for a day."""
    for path in cache_root().glob(".tmp-*"):
        try:
            last_written = max(file.stat().st_mtime for file in [path, *path.iterdir()])
        except OSError:  # its own process has just renamed or removed it
            continue
        if time.time() - last_written > DEAD_AFTER_SECONDS:
            shutil.rmtree(path, ignore_errors=True)


def _is_whole(folder: Path) -> bool:
    """Whether a cache entry is what was written; one that somebody cut or changed is made anew."""
    try:
        checksums = utils.read_json(folder / "report.json")["sha256"]
        return all(utils.sha256_of(folder / name) == checksum for name, checksum in checksums.items())
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _cache_unwritable(error: OSError) -> utils.DiskOrNetworkError:
    return utils.DiskOrNetworkError(
        "the token cache cannot be written",
        where=cache_root(),
        found=error,
        next="make room there, or set RL_WITH_RM_CACHE to a folder of yours with room",
    )


def _tokenise(source: Source, tokenizer: Any, folder: Path) -> None:
    counts, kind_numbers = Counts(), {"": 0}
    lengths, rows, margins, kinds, notes = [], [], [], [], []
    started, last_shown = time.monotonic(), time.monotonic()
    encode = functools.partial(encode_pairs, backend=tokenizer.backend_tokenizer, cut_tokens=cut_tokens(tokenizer))
    with (
        (folder / "tokens.bin").open("wb") as tokens_file,
        contextlib.closing(_one_ahead(_rendered(source, tokenizer), encode)) as chunks,
    ):
        for chunk, ids in chunks:
            counts.rows += chunk.row_count
            for key, row in chunk.left_out:
                counts.add(key, row)
            packed = []
            for (row, pair), chosen, rejected in zip(chunk.pairs, ids[::2], ids[1::2], strict=True):
                if np.array_equal(chosen, rejected):  # different texts, same tokens
                    counts.add("identical", row)
                    continue
                prefix = shared_prefix(chosen, rejected)
                packed += [chosen, rejected[prefix:]]
                lengths.append((prefix, len(chosen) - prefix, len(rejected) - prefix))
                rows.append(row)
                margins.append(pair.margin)
                kinds.append(kind_numbers.setdefault(pair.kind, len(kind_numbers)))
                notes.append([name in pair.notes for name in NOTED])
            if packed:
                np.concatenate(packed).tofile(tokens_file)
            if time.monotonic() - last_shown > 5:
                last_shown = time.monotonic()
                rate = counts.rows / (last_shown - started)
                print(
                    f"tokenising {source.name}: {counts.rows:,} pairs, {rate:,.0f} pairs/s", file=sys.stderr, flush=True
                )
    np.save(folder / "lengths.npy", np.array(lengths, dtype=np.int32).reshape(-1, 3))
    np.save(folder / "rows.npy", np.array(rows, dtype=np.int64))
    np.save(folder / "margins.npy", np.array(margins, dtype=np.float32))
    np.save(folder / "kinds.npy", np.array(kinds, dtype=np.int32))
    np.save(folder / "notes.npy", np.array(notes, dtype=bool).reshape(-1, len(NOTED)))
    utils.write_json(
        folder / "report.json",
        {"rows": counts.rows, "count": counts.count, "first_rows": counts.first_rows, "kinds": list(kind_numbers),
         "tokens_sha256": utils.sha256_of(folder / "tokens.bin"), "source": source.name,
         "sha256": {path.name: utils.sha256_of(path) for path in folder.iterdir()}},
    )  # fmt: skip


@dataclass
class _Chunk:
    """Some rows of a source: the pairs among them, with their dialogues as the chat template writes them."""

    row_count: int
    left_out: list[tuple[str, int]] = field(default_factory=list)  # (key of LEFT_OUT, row)
    pairs: list[tuple[int, Pair]] = field(default_factory=list)  # (row, pair)
    texts: list[str] = field(default_factory=list)  # two a pair: chosen, rejected


def _rendered(source: Source, tokenizer: Any) -> Iterator[_Chunk]:
    """Read a source's rows and put them through the chat template, a chunk at a time."""
    pairs = read_pairs(source)
    while some := list(itertools.islice(pairs, ROWS_AT_A_TIME)):
        chunk = _Chunk(len(some))
        for row, pair in some:
            if isinstance(pair, str):
                chunk.left_out.append((pair, row))
                continue
            try:
                # One call a pair: a call for many is no faster, and a dialogue that is refused would take them along.
                chunk.texts += tokenizer.apply_chat_template([pair.chosen, pair.rejected], tokenize=False)
            except Exception as error:  # templates raise what they like; their own complaint is jinja2's TemplateError
                if type(error).__name__ != "TemplateError":
                    raise
                chunk.left_out.append(("template", row))
                continue
            chunk.pairs.append((row, pair))
        yield chunk


def _one_ahead(chunks: Iterator[_Chunk], encode: Callable[[list[str]], list[np.ndarray]]) -> Iterator[tuple]:
    """Yield (chunk, ids of its texts) in order, while a second thread encodes the chunk that comes after it.

    The template runs in Python and needs its lock; the tokenizer does not. Whatever the thread raises is raised here.
    """
    thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="encode")
    try:
        waiting = None
        for chunk in chunks:
            encoded = thread.submit(encode, chunk.texts)
            if waiting is not None:
                yield waiting[0], waiting[1].result()
            waiting = chunk, encoded
        if waiting is not None:
            yield waiting[0], waiting[1].result()
    finally:
        thread.shutdown(cancel_futures=True)  # waits for the chunk in hand, a fraction of a second


def encode_pairs(texts: list[str], backend: Any, cut_tokens: list[str]) -> list[np.ndarray]:
    """The ids of each text, as encoding it alone gives them. Texts come in twos, whose shared start is encoded once."""
    # Wherever a text is cut the ids are the same. The commonest token in the first text is one that ends every turn.
    token = max(cut_tokens, key=texts[0].count, default="") if texts else ""
    has_start, stretches = [], []
    for chosen, rejected in zip(texts[::2], texts[1::2], strict=True):
        cut = _last_cut(chosen, rejected, token) if token else 0
        has_start.append(cut > 0)
        stretches += [chosen[:cut]] if cut else []
        stretches += [chosen[cut:], rejected[cut:]]
    # `encode_batch_fast` skips the offsets into the text, which nothing here needs
    encodings = iter(backend.encode_batch_fast(stretches, add_special_tokens=False))
    ids = []
    for starts_shared in has_start:
        start = next(encodings).ids if starts_shared else []
        ids += [np.array(start + next(encodings).ids, dtype=np.int32) for _ in ("chosen", "rejected")]
    return ids


def _last_cut(chosen: str, rejected: str, token: str) -> int:
    """The end of the last `token` in what two texts share, leaving each something of its own; 0 if there is none."""
    low, high = 0, max(0, min(len(chosen), len(rejected)) - 1)
    while low < high:  # comparing slices takes a twentieth of what comparing letter by letter takes
        middle = (low + high + 1) // 2
        if chosen[low:middle] == rejected[low:middle]:
            low = middle
        else:
            high = middle - 1
    found = chosen.rfind(token, 0, low)
    return found + len(token) if found >= 0 else 0


def cut_tokens(tokenizer: Any) -> list[str]:
    """The added tokens behind which a text may be cut, so that its parts' ids, one after the other, are the whole's.

    `tokenizers` first takes the added tokens that are not normalised out of the raw text (leftmost first, then
    longest); what is left between them is normalised, split and encoded stretch by stretch, and no stretch sees another
    (`AddedVocabulary::extract_and_normalize`, then `PreTokenizedString`). So behind such a token is a place to cut if
    wherever its letters stand it is this token that is found, whatever stands around it; and if nothing asks where in
    the whole a stretch stood, as some pre-tokenizers do. Whatever is not known to be so is not cut.
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
    """Whether there is a text in which `other` takes letters of `token`: it holds it, or one ends as the other starts.

    "<|a|>" and "<|a|>b" may, "xa" and "ab" may, and "aba" may overlap itself; "<|a|>" and "<|b|>" may not.
    """
    if token in other and token != other:
        return True
    most = min(len(token), len(other))
    return any(token[-n:] == other[:n] or other[-n:] == token[:n] for n in range(1, most + (token != other)))


def _reads_stretches_alone(pre_tokenizer: Any) -> bool:
    if pre_tokenizer is None:
        return True
    parts = [json.loads(pre_tokenizer.__getstate__())]
    while parts:
        part = parts.pop()
        if part["type"] == "Sequence":
            parts += part["pretokenizers"]
        elif part["type"] == "Metaspace":
            if part["prepend_scheme"] == "first":  # a space before the text's first word only
                return False
        elif part["type"] not in ("Split", "ByteLevel", "Digits", "Punctuation", "Whitespace", "WhitespaceSplit"):
            return False
    return True


def shared_prefix(chosen: np.ndarray, rejected: np.ndarray) -> int:
    """Tokens that two sequences share from the start, leaving each at least one of its own.

    [a b c] and [a b d e] -> 2; [a b c] and [a b c d] -> 2, so that c is read in both branches.
    """
    shortest = min(len(chosen), len(rejected))
    differ = np.flatnonzero(chosen[:shortest] != rejected[:shortest])
    return min(int(differ[0]) if len(differ) else shortest, shortest - 1)
