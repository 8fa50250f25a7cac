"""The front door to preference data: load_pairs, the tokenized pairs it returns, and their cache on disk.

Run as a script, it looks at data without training on it: what would be read, and what the model would see.

    python data.py --dataset Anthropic/hh-rlhf:harmless-base
    python data.py --dataset pairs.jsonl --model Qwen/Qwen3-0.6B

Letters: N pairs.
"""

import contextlib
import datetime
import functools
import hashlib
import itertools
import os
import shutil
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import utils
from common import atomic_files, flags
from common.flags import flag
from common.progress import ProgressBar
from data_pipeline import inspection, parsing, sampler
from data_pipeline.parsing import SKIP_REASONS, WARNINGS, Counts, Pair, Parsed
from data_pipeline.reading import HELD_OUT_IN, Source
from data_pipeline.shapes import DIALOGUE_COLUMNS, column_problems
from data_pipeline.sources import DataSpec, find_sources
from data_pipeline.tokenization import longest_sequences, shared_prefix, split_sequences, tokenized_chunks

MAX_SKIPPED = 0.10  # of a dataset's rows
DEAD_AFTER_SECONDS = 24 * 3600
DETAILS_KEPT = 100  # rows of a reason whose own words are kept


class SourcePairs:
    """The tokenized pairs of one source, or of the part of it that is trained on or held out."""

    def __init__(self, folder: Path, source: Source, max_length: int | None, trained_on: np.ndarray | None = None):
        """Without the pairs whose digests are in `trained_on` (uint64): those cannot test a model."""
        report = utils.read_json(folder / "report.json")
        source.starts[:] = report["starts"]
        self.name, self.part = source.name, source.part
        self.holds_out_rows = report["holds_out_rows"]
        lengths = np.load(folder / "lengths.npy")  # (M, 3): prompt, chosen, rejected
        rows = np.load(folder / "rows.npy")  # (M,) line or row number in the source
        starts = np.concatenate([[0], np.cumsum(lengths.sum(axis=1, dtype=np.int64))])
        # an empty file cannot be mapped
        self.token_ids = np.memmap(folder / "tokens.bin", np.int32, "r") if starts[-1] else np.zeros(0, np.int32)
        here = self._is_here(np.load(folder / "held_out.npy"))  # (M,)
        is_too_long = longest_sequences(lengths) > (max_length or np.inf)  # (M,)
        digests = np.load(folder / "digests.npy")  # (M,) of `parsing.pair_digest`
        is_known = here & ~is_too_long & np.isin(digests, np.zeros(0) if trained_on is None else trained_on)
        fits = here & ~is_too_long & ~is_known
        skipped = tuple(np.load(folder / f"skipped_{name}.npy") for name in ("rows", "keys", "held_out"))
        self.counts = self._count(report, skipped, rows, here, is_too_long)
        self.counts.add("trained_on", *rows[is_known].tolist())
        for warning, has_it in zip(WARNINGS, np.load(folder / "notes.npy").T, strict=True):
            self.counts.add(warning, *rows[fits & has_it].tolist())
        shapes = np.load(folder / "shapes.npy")  # (M,) index into names
        by_shape = [len(np.unique(rows[fits & (shapes == at)])) for at in range(len(report["shapes"]))]
        self.counts.shapes += Counter(dict(zip(report["shapes"], by_shape, strict=True)))
        self.counts.name_of = source.row_name
        unused = np.load(folder / "unused.npy")[fits].sum(axis=0).tolist()  # of each of DIALOGUE_COLUMNS
        self.counts.unused += Counter(dict(zip(DIALOGUE_COLUMNS, unused, strict=True)))
        # in both parts of a source that is split, for one may be small; votes for neither side do not count, and of a
        # row with several pairs one is enough
        unusable = [skipped[0][skipped[1] != list(SKIP_REASONS).index("no_preference")], rows[is_too_long]]
        total = len(np.unique(np.concatenate([rows, skipped[0]])))
        lost = np.setdiff1d(np.concatenate(unusable), rows[~is_too_long])
        self.unusable_share = len(lost) / max(1, total)  # of the source's rows
        self.lengths, self.rows, self.starts = lengths[fits], rows[fits], starts[:-1][fits]
        self.label_margins = np.load(folder / "margins.npy")[fits]  # (N,)
        self.digests = digests[fits]  # (N,)
        self.kinds, self.kind_names = np.load(folder / "kinds.npy")[fits], report["kinds"]  # (N,) index into names
        # identifies the pairs by content, wherever they came from
        self.fingerprint = report["tokens_sha256"][source.part].encode() + self.rows.tobytes()

    def _is_here(self, held_out: np.ndarray) -> np.ndarray:
        return np.full(len(held_out), True) if self.part == "all" else held_out == (self.part == "test")

    def _count(
        self, report: dict, skipped: tuple[np.ndarray, ...], rows: np.ndarray, here: np.ndarray, is_too_long: np.ndarray
    ) -> Counts:
        """The rows of this part and why some are skipped. `skipped` are their numbers, reasons and sides of a split."""
        numbers, keys = skipped[0][self._is_here(skipped[2])], skipped[1][self._is_here(skipped[2])]
        counts = Counts(len(np.unique(np.concatenate([rows[here], numbers]))))
        for at, key in enumerate(SKIP_REASONS):
            its_rows = numbers[keys == at].tolist()
            detail = report["details"].get(key, {}).get(str(its_rows[0]), "") if its_rows else ""
            counts.add(f"{key}: {detail}", *its_rows)
        counts.add("too_long", *rows[here & is_too_long].tolist())
        return counts

    def __len__(self) -> int:
        return len(self.lengths)


class PairDataset:
    """Tokenized pairs of one or several sources, each `[prompt | chosen | rejected]`, memory-mapped from the cache.

    The prompt is whatever the two token sequences share from the start, leaving each side at least one token.
    """

    def __init__(self, parts: list[SourcePairs], notes: tuple[str, ...] = ()):
        self.parts, self.notes = parts, notes
        self.name = ", ".join(part.name for part in parts)
        self.lengths = np.concatenate([part.lengths for part in parts])  # (N, 3)
        self.label_margins = np.concatenate([part.label_margins for part in parts])  # (N,)
        self.digests = np.concatenate([part.digests for part in parts])  # (N,) uint64 of `parsing.pair_digest`
        self.rows = np.concatenate([part.rows for part in parts])  # (N,) line or row number in its source
        self.sources = np.repeat(np.arange(len(parts)), [len(part) for part in parts])  # (N,) index into parts
        self._starts = np.concatenate([part.starts for part in parts])
        self.kind_names = list(dict.fromkeys(itertools.chain.from_iterable(part.kind_names for part in parts)))
        numbers = {name: number for number, name in enumerate(self.kind_names)}
        kinds = [np.array([numbers[name] for name in part.kind_names])[part.kinds] for part in parts]
        self.kinds = np.concatenate(kinds)  # (N,) index into kind_names
        self.packed_lengths = self.lengths.sum(axis=1)  # (N,) tokens when the prompt is shared
        # resuming compares it
        self.fingerprint = hashlib.sha256(b"".join(part.fingerprint for part in parts)).hexdigest()

    def __len__(self) -> int:
        return len(self.lengths)

    def lines(self, split: str, unit: str) -> list[str]:
        """What was kept of each source, how it was read, and what was skipped."""
        lines = []
        for part in self.parts:
            rows = len(np.unique(part.rows))
            lines.append(f"{split}: kept {rows:,} of {part.counts.rows:,} rows of {part.name}")
            lines += [f"  as {len(part):,} {unit}"] * (rows != len(part))
            if split == "test" and part.part != "all" and part.holds_out_rows:
                lines.append("  held out by row and not by prompt, because the rows share few prompts")
            lines += part.counts.lines()
        return lines

    @property
    def counts(self) -> Counts:
        """Those of all sources together."""
        total = Counts()
        for part in self.parts:
            total.rows += part.counts.rows
            total.unused += part.counts.unused
            for key, count in part.counts.count.items():
                total.count[key] += count
                total.first_rows.setdefault(key, part.counts.first_rows[key])
        return total

    def places(self, indices: np.ndarray) -> list[tuple[int, int]]:
        """Where pairs come from: (index into `parts`, row in that source)."""
        return list(zip(self.sources[indices].tolist(), self.rows[indices].tolist(), strict=True))

    def longest_sides(self) -> np.ndarray:
        """(N,) tokens of the longer of each pair's two sequences."""
        return longest_sequences(self.lengths)

    def largest_token(self) -> int:
        return max(int(part.token_ids.max()) for part in self.parts if len(part.token_ids))

    def tokens(self, index: int) -> np.ndarray:
        """The ids of `[prompt | chosen | rejected]`."""
        start = self._starts[index]
        return self.parts[self.sources[index]].token_ids[start : start + self.packed_lengths[index]]

    def sequences(self, index: int) -> list[np.ndarray]:
        """The pair as two plain sequences of ids: chosen, rejected."""
        return split_sequences(self.tokens(index), self.lengths[index])

    def check_skipped(self) -> None:
        """Raise UserError if more than a tenth of a source's rows are unusable."""
        for part in self.parts:
            if part.unusable_share > MAX_SKIPPED:
                raise utils.UserError(
                    f"{part.unusable_share:.0%} of the rows would be skipped",
                    where=part.name,
                    found="\n".join(["", *part.counts.lines()]).replace("\n", "\n  "),
                    next="fix the data, raise --max_length, or accept it with --bad_rows skip",
                )


def load_pairs(
    dataset: str | DataSpec, tokenizer: Any, max_length: int | None = None, trained_on: np.ndarray | None = None
) -> tuple[PairDataset, PairDataset]:
    """The train and test pairs of a dataset, tokenized now or read from the cache; `max_length` in tokens a side.

    A test pair that is also a training pair, or one of `trained_on` (digests of what was trained on before), is skipped.
    """
    found = find_sources(DataSpec(dataset) if isinstance(dataset, str) else dataset)
    backend = tokenizer.backend_tokenizer
    backend.no_padding()  # some published tokenizers pad and truncate by default
    backend.no_truncation()
    tokenizer_hash = hashlib.sha256((backend.to_str() + str(tokenizer.chat_template)).encode()).hexdigest()

    def load(chosen: tuple[Source, ...], *more: Any) -> list[SourcePairs]:
        return [SourcePairs(_cached(each, tokenizer, tokenizer_hash), each, max_length, *more) for each in chosen]

    train = PairDataset(load(found.train), found.notes)
    known = np.union1d(train.digests, np.zeros(0, np.uint64) if trained_on is None else trained_on)
    return train, PairDataset(load(found.test, known))


def cache_root() -> Path:
    default = os.environ.get("XDG_CACHE_HOME") or os.environ.get("LOCALAPPDATA") or Path.home() / ".cache"
    return Path(os.environ.get("RL_WITH_RM_CACHE") or Path(default) / "rl-with-rm")


def _cached(source: Source, tokenizer: Any, tokenizer_hash: str) -> Path:
    key = hashlib.sha256(f"{_code_hash()}/{source.cache_key()}/{tokenizer_hash}".encode()).hexdigest()[:32]
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
            if error.filename in map(str, source.files):
                raise
            raise utils.DiskOrNetworkError(
                "the token cache cannot be written", where=cache_root(), found=error,
                next=f"{utils.disk_advice(error.errno)}, or set RL_WITH_RM_CACHE to another folder",
            ) from error  # fmt: skip
    return folder


@functools.cache
def _code_hash() -> str:
    """Of the code that makes the entries: what an older version of it made is made again."""
    files = [Path(__file__), *sorted((Path(__file__).parent / "data_pipeline").glob("*.py"))]
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()


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


class _Columns:
    """What is known of each row of a source, while it is tokenized; `arrays` are the files of a cache entry."""

    def __init__(self) -> None:
        self.kinds, self.shapes, self.details = {"": 0}, {"": 0}, {}
        names = ("lengths", "rows", "margins", "digests", "kinds", "shapes", "notes", "unused")
        self.pairs: dict[str, list] = {name: [] for name in names}
        self.skipped: dict[str, list] = {"rows": [], "keys": []}
        self.digests: dict[str, list] = {"pairs": [], "skipped": []}  # of prompts and rows
        self.prompts: list[tuple[int, int]] = []  # (row, digest of its prompt) of all that could be parsed

    def add_pair(self, row: Parsed, pair: Pair, lengths: tuple[int, int, int]) -> None:
        values = {
            "lengths": lengths, "rows": row.row, "margins": pair.label_margin,
            "digests": parsing.pair_digest(pair.chosen, pair.rejected),
            "kinds": self.kinds.setdefault(pair.kind, len(self.kinds)),
            "shapes": self.shapes.setdefault(pair.shape, len(self.shapes)),
            "notes": [name in pair.warnings for name in WARNINGS],
            "unused": [name in pair.unused for name in DIALOGUE_COLUMNS],
        }  # fmt: skip
        for name, value in values.items():
            self.pairs[name].append(value)
        self.digests["pairs"].append(row.digests)

    def add_skipped(self, row: Parsed, reason: str) -> None:
        key, _, detail = reason.partition(": ")
        self.skipped["rows"].append(row.row)
        self.skipped["keys"].append(list(SKIP_REASONS).index(key))
        self.digests["skipped"].append(row.digests)
        if detail and len(details := self.details.setdefault(key, {})) < DETAILS_KEPT:
            details[str(row.row)] = detail

    def arrays(self) -> tuple[dict[str, np.ndarray], bool]:
        """The columns, and whether rows and not prompts decide what is held out."""
        digests = {name: np.array(found, np.uint64).reshape(-1, 2) for name, found in self.digests.items()}
        holds_out_rows = sampler.shares_prompts(self.prompts)
        held_out = {name: found[:, int(holds_out_rows)] % HELD_OUT_IN == 0 for name, found in digests.items()}
        return {
            "lengths": np.array(self.pairs["lengths"], np.int32).reshape(-1, 3),
            "rows": np.array(self.pairs["rows"], np.int64),
            "margins": np.array(self.pairs["margins"], np.float32),
            "digests": np.array(self.pairs["digests"], np.uint64),
            "kinds": np.array(self.pairs["kinds"], np.int32),
            "shapes": np.array(self.pairs["shapes"], np.int32),
            "notes": np.array(self.pairs["notes"], bool).reshape(-1, len(WARNINGS)),
            "unused": np.array(self.pairs["unused"], bool).reshape(-1, len(DIALOGUE_COLUMNS)),
            "held_out": held_out["pairs"],
            "skipped_rows": np.array(self.skipped["rows"], np.int64),
            "skipped_keys": np.array(self.skipped["keys"], np.int32),
            "skipped_held_out": held_out["skipped"],
        }, holds_out_rows


def _tokenize(source: Source, tokenizer: Any, folder: Path) -> None:
    columns, last_row = _Columns(), 0
    bar = ProgressBar(f"tokenizing {source.name}", None, unit="rows", first_after=5, stream=sys.stderr)
    with (
        contextlib.closing(bar),
        (folder / "tokens.bin").open("wb") as tokens_file,
        contextlib.closing(tokenized_chunks(source, tokenizer)) as chunks,
    ):
        for chunk, ids in chunks:
            columns.prompts += [(row.row, row.digests[0]) for row in chunk.rows if not isinstance(row.pair, str)]
            for at, reason in chunk.skipped:
                columns.add_skipped(chunk.rows[at], reason)
            packed = []
            for (at, pair), (chosen, rejected) in zip(chunk.pairs, ids, strict=True):
                row = chunk.rows[at]
                if np.array_equal(chosen, rejected):  # different texts, same tokens
                    columns.add_skipped(row, parsing.SAME_TOKENS)
                    continue
                prompt = shared_prefix(chosen, rejected)
                packed += [chosen, rejected[prompt:]]
                columns.add_pair(row, pair, (prompt, len(chosen) - prompt, len(rejected) - prompt))
            if packed:
                np.concatenate(packed).tofile(tokens_file)
            last_row = chunk.rows[-1].row
            bar.update(last_row)
    arrays, holds_out_rows = columns.arrays()
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array)
    utils.write_json(
        folder / "report.json",
        {"shapes": list(columns.shapes), "starts": source.starts, "holds_out_rows": holds_out_rows, "details": columns.details,
         "kinds": list(columns.kinds), "source": source.name,
         "tokens_sha256": _token_hashes(folder / "tokens.bin", arrays["lengths"], arrays["held_out"]),
         "sha256": {path.name: utils.sha256_of(path) for path in folder.iterdir()}},
    )  # fmt: skip


def _token_hashes(path: Path, lengths: np.ndarray, held_out: np.ndarray) -> dict[str, str]:
    """SHA-256 of the token ids of all pairs (N), of those that are held out and of the others."""
    hashes = {name: hashlib.sha256() for name in ("all", "train", "test")}
    with path.open("rb") as file:
        for size, is_held_out in zip(lengths.sum(axis=1).tolist(), held_out.tolist(), strict=True):
            ids = file.read(size * np.dtype(np.int32).itemsize)
            hashes["all"].update(ids)
            hashes["test" if is_held_out else "train"].update(ids)
    return {name: digest.hexdigest() for name, digest in hashes.items()}


# -- Looking at data ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LookConfig:
    """What to look at."""

    # fmt: off
    dataset: str = flag("Anthropic/hh-rlhf", "hub id, file or folder, or several, as for train_rm.py", is_list=True, group="data")
    subset: str | None = flag(None, "a configuration or folder of the dataset", group="data")
    split: str | None = flag(None, "the split that would be trained on", group="data")
    test_split: str | None = flag(None, "the split that would be evaluated on", group="data")
    columns: str | None = flag(None, "names of the data's columns, as prompt=NAME,chosen=NAME,rejected=NAME,margin=NAME", group="data")
    model: str = flag("Qwen/Qwen3-0.6B", "whose chat template and tokenizer: hub id or local folder", group="data")
    max_length: int = flag(2048, "longest sequence in tokens", minimum=8, below=2**31, group="data")
    show: int = flag(3, "how many dialogues to show", minimum=0, below=1000, group="data")

    debug: bool = flag(False, "show the traceback of an error", group="other")
    # fmt: on

    def problems(self) -> list[str]:
        """Settings that cannot be read."""
        return column_problems(self.columns)


def main(argv: list[str]) -> None:
    given, problems = flags.read_flags(LookConfig, argv, "Look at preference data before training on it.")
    config = flags.build_config(LookConfig, given, problems)
    from modeling.tokenizers import load_tokenizer

    tokenizer = load_tokenizer(config.model, datetime.datetime.now())
    spec = DataSpec.of(config)
    train, test = load_pairs(spec, tokenizer, config.max_length)
    print("\n".join([*train.notes, *train.lines("train", "pairs"), *test.lines("test", "pairs")]))
    found = find_sources(spec)
    texts = [inspection.texts_of(chosen, pairs) for chosen, pairs in ((found.train, train), (found.test, test))]
    repeated = inspection.repetitions(*texts, test.counts.count["trained_on"])
    print("\n".join([*repeated, "", *inspection.lengths(train, config.max_length)]))
    for lines in inspection.dialogues(found.train, train, tokenizer, config.show, sys.stdout.isatty()):
        print("\n".join(["", *lines]))
    for name, pairs in (("train", train), ("test", test)):
        try:
            pairs.check_skipped()
        except utils.UserError as error:
            print(f"\n{name}: {error.what}: train_rm.py stops, unless --bad_rows skip is given")
            break  # the two parts of a file have one share
    if not len(train):
        raise utils.UserError(
            "no training data is left", where=train.name, next="mend the rows, or --columns names other columns",
            found=f"{utils.counted(train.counts.rows, 'row')}, of which none can be used",
        )  # fmt: skip
    if not len(test):
        print("\nnothing is held out: a training on this cannot say how good the model is")


if __name__ == "__main__":
    sys.exit(utils.run_script(main))
