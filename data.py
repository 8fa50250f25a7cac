"""The front door to preference data: load_pairs, the tokenized pairs it returns, and their cache on disk.

Letters: N pairs.
"""

import contextlib
import hashlib
import os
import shutil
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

import utils
from common import atomic_files
from common.progress import ProgressBar
from data_pipeline.parsing import SKIP_REASONS, WARNINGS
from data_pipeline.sources import Source, find_sources
from data_pipeline.tokenization import longest_sequences, shared_prefix, split_sequences, tokenized_chunks

CACHE_VERSION = 5  # increase it when parsing, tokenizing or the files change
MAX_SKIPPED = 0.10  # of a dataset's rows
DEAD_AFTER_SECONDS = 24 * 3600


@dataclass
class Counts:
    """How many rows of a source were read and skipped, with the numbers of the first few per reason."""

    rows: int = 0
    count: Counter = field(default_factory=Counter)  # by keys of SKIP_REASONS and WARNINGS
    first_rows: dict[str, list[int]] = field(default_factory=dict)
    refusal: str = ""  # what the chat template said of the first row that it rejected

    def add(self, key: str, *rows: int) -> None:
        if rows:
            self.count[key] += len(rows)
            first = self.first_rows.setdefault(key, [])
            first += rows[: 5 - len(first)]

    @property
    def skipped(self) -> int:
        return sum(self.count[key] for key in SKIP_REASONS)

    def lines(self) -> list[str]:
        """One line for each reason and warning that occurred."""
        lines = []
        for texts, verb in ((SKIP_REASONS, "skipped"), (WARNINGS, "kept")):
            for key, text in texts.items():
                if self.count[key]:
                    rows = ", ".join(str(row) for row in self.first_rows[key])
                    more = ", …" if self.count[key] > len(self.first_rows[key]) else ""
                    said = f', which said "{self.refusal}"' if key == "template" and self.refusal else ""
                    plural = "row" if self.count[key] == 1 else "rows"
                    lines.append(f"  {verb} {self.count[key]:,}: {text}{said} ({plural} {rows}{more})")
        return lines


class PairDataset:
    """Tokenized pairs, each stored as `[prompt | chosen | rejected]`, memory-mapped from the cache.

    The prompt is whatever the two token sequences share from the start, leaving each side at least one token.
    """

    def __init__(self, folder: Path, name: str, max_length: int | None = None):
        report = utils.read_json(folder / "report.json")
        self.name, self.kind_names, self.shape = name, report["kinds"], report.get("shape", "")
        counted = Counter(report["count"]), report["first_rows"], report.get("refusal", "")
        self.counts = Counts(report["rows"], *counted)
        lengths = np.load(folder / "lengths.npy")  # (N, 3): prompt, chosen, rejected
        rows = np.load(folder / "rows.npy")  # (N,) line or row number in the source
        starts = np.concatenate([[0], np.cumsum(lengths.sum(axis=1, dtype=np.int64))])
        # an empty file cannot be mapped
        self._tokens = np.memmap(folder / "tokens.bin", np.int32, "r") if starts[-1] else np.zeros(0, np.int32)
        fits = longest_sequences(lengths) <= (max_length or np.iinfo(np.int32).max)
        self.counts.add("too_long", *rows[~fits].tolist())
        for warning, has_it in zip(WARNINGS, np.load(folder / "notes.npy").T, strict=True):
            self.counts.add(warning, *rows[fits & has_it].tolist())
        self.lengths, self.rows, self._starts = lengths[fits], rows[fits], starts[:-1][fits]
        self.label_margins = np.load(folder / "margins.npy")[fits]  # (N,)
        self.kinds = np.load(folder / "kinds.npy")[fits]  # (N,) index into kind_names
        self.packed_lengths = self.lengths.sum(axis=1)  # (N,) tokens when the prompt is shared
        # identifies the pairs by content, wherever they came from: resuming compares it
        self.fingerprint = hashlib.sha256(report["tokens_sha256"].encode() + self.rows.tobytes()).hexdigest()

    def __len__(self) -> int:
        return len(self.lengths)

    def longest_sides(self) -> np.ndarray:
        """(N,) tokens of the longer of each pair's two sequences."""
        return longest_sequences(self.lengths)

    def largest_token(self) -> int:
        return int(self._tokens.max())

    def tokens(self, index: int) -> np.ndarray:
        """The ids of `[prompt | chosen | rejected]`."""
        start = self._starts[index]
        return self._tokens[start : start + self.packed_lengths[index]]

    def sequences(self, index: int) -> list[np.ndarray]:
        """The pair as two plain sequences of ids: chosen, rejected."""
        return split_sequences(self.tokens(index), self.lengths[index])

    def check_skipped(self) -> None:
        """Raise UserError if more than a tenth of the rows cannot be used; votes for neither side do not count."""
        unusable = self.counts.skipped - self.counts.count["no_preference"]
        if unusable > MAX_SKIPPED * self.counts.rows:
            share = unusable / self.counts.rows
            raise utils.UserError(
                f"{share:.0%} of the rows would be skipped",
                where=self.name,
                found="\n".join(["", *self.counts.lines()]).replace("\n", "\n  "),
                next="fix the data, raise --max_length, or accept it with --bad_rows skip",
            )


def load_pairs(dataset: str, tokenizer: Any, max_length: int | None = None) -> tuple[PairDataset, PairDataset]:
    """The train and test pairs of a dataset, tokenized now or read from the cache; `max_length` in tokens a side."""
    sources = find_sources(dataset)
    backend = tokenizer.backend_tokenizer
    backend.no_padding()  # some published tokenizers pad and truncate by default
    backend.no_truncation()
    tokenizer_hash = hashlib.sha256((backend.to_str() + str(tokenizer.chat_template)).encode()).hexdigest()
    return tuple(PairDataset(_cached(source, tokenizer, tokenizer_hash), source.name, max_length) for source in sources)


def cache_root() -> Path:
    default = os.environ.get("XDG_CACHE_HOME") or os.environ.get("LOCALAPPDATA") or Path.home() / ".cache"
    return Path(os.environ.get("RL_WITH_RM_CACHE") or Path(default) / "rl-with-rm")


def _cached(source: Source, tokenizer: Any, tokenizer_hash: str) -> Path:
    key = hashlib.sha256(f"{CACHE_VERSION}/{source.fingerprint()}/{tokenizer_hash}".encode()).hexdigest()[:32]
    folder = cache_root() / key
    if not _is_intact(folder):
        shutil.rmtree(folder, ignore_errors=True)
        _remove_dead_entries()
        try:
            with atomic_files.atomic_folder(folder, f".tmp-{key}-{os.getpid()}") as temporary:
                _tokenize(source, tokenizer, temporary)
        except OSError as error:
            if isinstance(error, FileExistsError) and (folder / "report.json").exists():
                return folder  # another process wrote the same entry first
            if source.path is not None and error.filename == str(source.path):
                raise
            raise utils.DiskOrNetworkError(
                "the token cache cannot be written", where=cache_root(), found=error,
                next="free some disk space there, or set RL_WITH_RM_CACHE to another folder",
            ) from error  # fmt: skip
    return folder


def _remove_dead_entries() -> None:
    """Delete what killed processes left: temporary folders that have not changed for a day."""
    for path in cache_root().glob(".tmp-*"):
        try:
            last_written = max(file.stat().st_mtime for file in [path, *path.iterdir()])
        except OSError:  # another process has just renamed or removed it
            continue
        if time.time() - last_written > DEAD_AFTER_SECONDS:
            shutil.rmtree(path, ignore_errors=True)


def _is_intact(folder: Path) -> bool:
    """Whether a cache entry is as it was written; a damaged or changed one is written again."""
    try:
        checksums = utils.read_json(folder / "report.json")["sha256"]
        return all(utils.sha256_of(folder / name) == checksum for name, checksum in checksums.items())
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _tokenize(source: Source, tokenizer: Any, folder: Path) -> None:
    counts, kind_numbers, shape = Counts(), {"": 0}, ""
    lengths, rows, margins, kinds, notes = [], [], [], [], []
    bar = ProgressBar(f"tokenizing {source.name}", None, unit="pairs", first_after=5, stream=sys.stderr)
    with (
        contextlib.closing(bar),
        (folder / "tokens.bin").open("wb") as tokens_file,
        contextlib.closing(tokenized_chunks(source, tokenizer)) as chunks,
    ):
        for chunk, ids in chunks:
            counts.rows += chunk.row_count
            counts.refusal = counts.refusal or chunk.refusal
            for key, row in chunk.skipped:
                counts.add(key, row)
            packed = []
            for (row, pair), (chosen, rejected) in zip(chunk.pairs, ids, strict=True):
                if np.array_equal(chosen, rejected):  # different texts, same tokens
                    counts.add("identical", row)
                    continue
                shape = shape or pair.shape
                prompt = shared_prefix(chosen, rejected)
                packed += [chosen, rejected[prompt:]]
                lengths.append((prompt, len(chosen) - prompt, len(rejected) - prompt))
                rows.append(row)
                margins.append(pair.label_margin)
                kinds.append(kind_numbers.setdefault(pair.kind, len(kind_numbers)))
                notes.append([name in pair.warnings for name in WARNINGS])
            if packed:
                np.concatenate(packed).tofile(tokens_file)
            bar.update(counts.rows)
    np.save(folder / "lengths.npy", np.array(lengths, dtype=np.int32).reshape(-1, 3))
    np.save(folder / "rows.npy", np.array(rows, dtype=np.int64))
    np.save(folder / "margins.npy", np.array(margins, dtype=np.float32))
    np.save(folder / "kinds.npy", np.array(kinds, dtype=np.int32))
    np.save(folder / "notes.npy", np.array(notes, dtype=bool).reshape(-1, len(WARNINGS)))
    utils.write_json(
        folder / "report.json",
        {"rows": counts.rows, "shape": shape, "count": counts.count, "first_rows": counts.first_rows,
         "refusal": counts.refusal, "kinds": list(kind_numbers), "source": source.name,
         "tokens_sha256": utils.sha256_of(folder / "tokens.bin"),
         "sha256": {path.name: utils.sha256_of(path) for path in folder.iterdir()}},
    )  # fmt: skip
