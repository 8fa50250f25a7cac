"""How fast pairs are tokenized the first time, compared with TRL, and how fast they load from the cache.

    QWEN3_DIR=... HH_RLHF_DIR=... python bench/tokenise.py [PAIRS [CACHED_PAIRS]]

QWEN3_DIR is a folder with Qwen3-0.6B's tokenizer and chat template, HH_RLHF_DIR one with `train.jsonl.gz` and
`test.jsonl.gz`. Their pairs are shuffled and repeated until there are PAIRS (default 12,000). Each measurement is a
separate process with its own cache. There are three rounds in which all ways take turns, and the table shows medians.
It also shows CPU seconds, which depend less on how busy the machine is.

The project is timed from a .jsonl.gz file to a PairDataset (`data.load_pairs`), including reading, checking and
parsing. TRL is timed for what its RewardTrainer does with a dataset before it trains (`_prepare_dataset`), once with
its defaults and once with one process per core. It gets rows that are already loaded and parsed; that is not timed.

The cached load is the second `load_pairs` of CACHED_PAIRS (default 161,000, as many as HH-RLHF has), the median of
five. PAIRS or CACHED_PAIRS of 0 skips that half.
"""

from __future__ import annotations

import gzip
import importlib.metadata
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

from modeling import tokenizers

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

MAX_LENGTH = 2048
ROUNDS = 3
WAYS = {"ours": "this project", "trl": "TRL", "trl-cores": f"TRL, {os.cpu_count()} processes"}


def cpu_seconds() -> float:
    """CPU time of this process and of the finished processes it started."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def write_pairs(real: Path, folder: Path, count: int) -> None:
    """Write `count` real pairs, shuffled and repeated as needed, and the same pairs as messages for TRL."""
    from data_pipeline import parsing, reading

    folder.mkdir()
    lines: list[bytes] = []
    for name in ("train", "test"):
        with gzip.open(real / f"{name}.jsonl.gz", "rb") as file:
            lines += file
    draw = random.Random(0)
    chosen_lines = []
    while len(chosen_lines) < count:
        chosen_lines += draw.sample(lines, len(lines))
    with gzip.open(folder / "train.jsonl.gz", "wb", compresslevel=1) as file:
        file.writelines(chosen_lines[:count])
    with gzip.open(folder / "test.jsonl.gz", "wb") as file:
        file.write(lines[0])
    with (folder / "messages.json").open("w", encoding="utf-8") as file:
        for _, pair, _ in parsing.read_pairs(reading.Source("train", (folder / "train.jsonl.gz",))):
            if not isinstance(pair, str):
                file.write(json.dumps({"chosen": pair.chosen, "rejected": pair.rejected}) + "\n")


def measure(way: str, folder: Path) -> tuple[int, float, float]:
    """Tokenize in one way, in this process; returns (pairs, seconds, CPU seconds)."""

    tokenizer = tokenizers.load_tokenizer(os.environ["QWEN3_DIR"])
    if way == "ours":
        import data

        began, cpu_began = time.perf_counter(), cpu_seconds()
        pairs, _ = data.load_pairs(str(folder), tokenizer, MAX_LENGTH)
    else:
        import datasets
        from trl.trainer.reward_trainer import RewardTrainer

        given = datasets.load_dataset("json", data_files=str(folder / "messages.json"), split="train")
        arguments = SimpleNamespace(dataset_num_proc=None if way == "trl" else os.cpu_count(), max_length=MAX_LENGTH)
        began, cpu_began = time.perf_counter(), cpu_seconds()
        pairs = RewardTrainer._prepare_dataset(None, given, tokenizer, arguments, "train")
    return len(pairs), time.perf_counter() - began, cpu_seconds() - cpu_began


def in_a_process(way: str, folder: Path, cache: Path) -> tuple[int, float, float]:
    """`measure` in a separate process, with `cache` as its cache folder."""
    own_cache = {"RL_WITH_RM_CACHE": str(cache), "HF_DATASETS_CACHE": str(cache)}
    environment = {**os.environ, **own_cache, "HF_HUB_OFFLINE": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
    command = [sys.executable, __file__, "--measure", way, str(folder)]
    output = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout
    return tuple(json.loads(output.splitlines()[-1]))


def first_time(real: Path, work: Path, count: int) -> None:
    """Measure the first time in all ways and print a table."""
    write_pairs(real, work / "pairs", count)
    found: dict[str, list[tuple[int, float, float]]] = {way: [] for way in WAYS}
    for number in range(ROUNDS):
        for way in WAYS:
            found[way].append(in_a_process(way, work / "pairs", work / f"cache-{way}-{number}"))
    kept = {pairs for results in found.values() for pairs, _, _ in results}
    assert len(kept) == 1, f"the ways keep different numbers of pairs: {kept}"
    ours = statistics.median(seconds for _, seconds, _ in found["ours"])
    print(f"| {count:,} pairs for the first time | pairs/s | CPU ms a pair | this project is faster by |")
    print("|---|---|---|---|")
    for way, name in WAYS.items():
        seconds = statistics.median(seconds for _, seconds, _ in found[way])
        cpu = statistics.median(cpu for _, _, cpu in found[way])
        faster = "" if way == "ours" else f"{seconds / ours:.1f} times"
        print(f"| {name} | {count / seconds:,.0f} | {1000 * cpu / count:.2f} | {faster} |")


def from_cache(real: Path, work: Path, count: int) -> None:
    """Print a table of the first load and the median of the later ones."""
    write_pairs(real, work / "many", count)
    first, *again = (in_a_process("ours", work / "many", work / "cache-many") for _ in range(6))
    print(f"\n| {count:,} pairs | seconds | CPU seconds |\n|---|---|---|")
    print(f"| for the first time | {first[1]:.1f} | {first[2]:.1f} |")
    seconds, cpu = (statistics.median(result[part] for result in again) for part in (1, 2))
    print(f"| from the cache | {seconds:.2f} | {cpu:.2f} |")


def main() -> None:
    if sys.argv[1:2] == ["--measure"]:
        print(json.dumps(measure(sys.argv[2], Path(sys.argv[3]))))
        return
    if not os.environ.get("QWEN3_DIR") or not os.environ.get("HH_RLHF_DIR"):
        sys.exit("set QWEN3_DIR and HH_RLHF_DIR; see the top of this file")
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 12_000
    cached_count = int(sys.argv[2]) if len(sys.argv) > 2 else 161_000
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("transformers", "tokenizers", "trl"))
    print(f"Python {platform.python_version()}, {versions}; {platform.machine()}, {os.cpu_count()} cores\n")
    with tempfile.TemporaryDirectory() as work_name:
        if count:
            first_time(Path(os.environ["HH_RLHF_DIR"]), Path(work_name), count)
        if cached_count:
            from_cache(Path(os.environ["HH_RLHF_DIR"]), Path(work_name), cached_count)


if __name__ == "__main__":
    main()
