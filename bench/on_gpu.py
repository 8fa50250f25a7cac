"""What only a GPU can show: correctness, speed, memory and exact resuming on a first NVIDIA card, in ten minutes.

    QWEN3_DIR=... HH_RLHF_DIR=... python bench/on_gpu.py --json on_gpu.json [--minutes 9.5] [--parts train trl]

QWEN3_DIR is a folder with Qwen3-0.6B's config and tokenizer, HH_RLHF_DIR one with `train.jsonl.gz` and `test.jsonl.gz`.
Weights are random, which changes neither memory nor time. Each part is a process of its own with a time limit, and the
file is written again after each, so a part that fails, or a call that is killed, loses nothing measured before:

    machine   rates of copies and matrix products: what the card can do
    train     the real loop for a few steps, in several settings
    trl       bench/against_trl.py at the real shape, with gradient checkpointing on both sides
    tests     pytest -m cuda
    caps      a card with 12 GB, emulated; and a step that runs out of memory and goes on in smaller micro-batches
    resume    killed after a save and resumed: are the files the same, bit by bit, as without the kill?
    chat      time to the first token, tokens per second
    sample    a policy's 16 x 8 completions: train_grpo.py's sampling beside transformers' own

--quick runs every part that a CPU can run, on a tiny model: its figures mean nothing.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

import harness
from gpu_worker import WARM_UP, Inputs
from harness import Goal

CAP_GIB = 11.2  # what a 12 GB card has for tensors, beside CUDA's context
DRILL_TOLERANCE = 0.01  # of losses that were cut into other micro-batches; bf16 has 8 bits
ROWS = 4000  # of the dataset, which are tokenized in seconds; a run here takes 1,152 pairs
PATIENCE = 5  # with --quick limits are so many times longer: a GPU's limits are not meant for a CPU
MIN_SECONDS = 15  # a part is not started with less time left
OUTPUT_KEPT = 4000  # characters of what a part printed

FIXED = ["--tokens_per_batch", "4096", "--gradient_checkpointing"]
SETTINGS: dict[str, list[str]] = {  # by default CUDA compiles, and memory decides the rest
    "default": [],
    "no compile": ["--no_compile"],
    "4,096 tokens, checkpointing": FIXED,
    "4,096 tokens, checkpointing, no compile": [*FIXED, "--no_compile"],
    "sdpa": ["--attention", "sdpa"],
    "lora": ["--lora"],
    "lora, no compile": ["--lora", "--no_compile"],
    "moments in main memory": ["--offload_optimizer"],
    "fp32": ["--precision", "fp32"],
}
FIRST = ("default", "no compile")  # what the goals are about
QUICK = ("default", "lora")  # what a quick run has time for
RESUMED = {"full": [], "lora": ["--lora"], "sdpa": ["--attention", "sdpa"], "no compile": ["--no_compile"]}
# a whole step at once, which wants more than the emulated card has
ONE_STEP = ["--batch_size", "128", "--grad_accum", "1"]
ONE_MICRO_BATCH = [*ONE_STEP, "--tokens_per_batch", "65536", "--gradient_checkpointing"]


@dataclass(frozen=True)
class Part:
    """One part: its name in the JSON file, the job that measures it, and how long that may take."""

    name: str
    job: str
    limit: float  # seconds
    options: dict[str, Any] = field(default_factory=dict)
    skipped: str = ""  # why it is not run


def main() -> None:
    parser = harness.parser(__doc__)
    parser.add_argument("--minutes", type=float, default=9.5, help="time for everything; then parts are cut off (9.5)")
    parser.add_argument("--parts", nargs="+", metavar="PART", help="only parts whose names begin so: train, caps, …")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what was started is ended too
    deadline = time.monotonic() + 60 * arguments.minutes
    qwen3, dataset = harness.inputs()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
        inputs = prepare(Path(name), qwen3, dataset, arguments)
        chosen = [
            part for part in all_parts(arguments.quick)
            if not arguments.parts or any(part.name.startswith(wanted) for wanted in arguments.parts)
        ]  # fmt: skip
        figures = measure(chosen, inputs, deadline, arguments.json)
    print(f"\n{training_table(figures)}\n\n{harness.goal_table(goals_of(figures))}")
    if failed := [name for name, found in figures.items() if "failed" in found]:
        sys.exit(f"failed: {', '.join(failed)}")


def prepare(work: Path, qwen3: str, dataset: str, arguments: Any) -> Inputs:
    """Write the model and the pairs, and have all parts share one cache of token ids and one of compiled kernels."""
    os.environ.setdefault("RL_WITH_RM_CACHE", str(work / "cache"))
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(work / "inductor"))
    few = harness.first_rows(dataset, work / "pairs", 96 if arguments.quick else ROWS)
    shape = harness.Shape(128, 1) if arguments.quick else harness.Shape(1024, 28)
    base = harness.write_base(qwen3, work / "base", shape)
    return Inputs(str(work), str(base), qwen3, few, arguments.quick, harness.CLOCKS[arguments.clock])


def all_parts(is_quick: bool) -> list[Part]:
    """Every part, what matters most first, and why some are not run."""
    import torch

    on_cuda = torch.cuda.is_available()
    needs_cuda = "" if on_cuda else "needs a CUDA device"
    no_trl = "" if importlib.util.find_spec("trl") else "TRL is not installed"

    def trained(name: str) -> Part:
        flags = SETTINGS[name]
        why_not = "too long for a quick run" if is_quick and name not in QUICK else ""
        return Part(f"train: {name}", "train", 120, {"name": name, "flags": flags}, why_not)

    def resumed(name: str) -> Part:
        why_not = "" if name == "full" else needs_cuda
        return Part(f"resume: {name}", "resume", 90, {"name": name, "flags": RESUMED[name]}, why_not)

    def capped(name: str, flags: Sequence[str] = ()) -> Part:
        options = {"name": f"cap {name}", "flags": list(flags), "cap_gib": CAP_GIB}
        return Part(f"caps: {name}", "train", 100, options, needs_cuda)

    return [
        Part("machine", "machine", 60),
        *(trained(name) for name in FIRST),
        capped("12 GB card"),
        capped("out of memory", ONE_MICRO_BATCH),
        Part("trl", "trl", 240, skipped=no_trl),
        Part("tests", "tests", 180),
        *map(resumed, RESUMED),
        *(trained(name) for name in SETTINGS if name not in FIRST),
        Part("chat", "chat", 60),
        Part("sample", "sample", 120),
    ]


def measure(parts: Sequence[Part], inputs: Inputs, deadline: float, file: Path | None) -> dict[str, Any]:
    """The figures of every part by its name, written to `file` after each. `deadline` is in `time.monotonic`'s time."""
    figures: dict[str, Any] = {}
    for part in parts:
        left = deadline - time.monotonic()
        if part.skipped or left < MIN_SECONDS:
            figures[part.name] = {"skipped": part.skipped or "no time left"}
        else:
            figures[part.name] = run_part(part, inputs, min(part.limit * (PATIENCE if inputs.is_quick else 1), left))
        harness.write_json(file, finite({**figures, "goals": [asdict(goal) for goal in goals_of(figures)]}))
        plain = {key: value for key, value in figures[part.name].items() if not isinstance(value, list | dict)}
        plain.pop("output", None)
        print(f"{part.name}: {json.dumps(plain)}", flush=True)
    return figures


def run_part(part: Part, inputs: Inputs, limit: float) -> dict[str, Any]:
    """Run a part in a process of its own, which is ended, with all it started, after `limit` seconds."""
    answer, log = (Path(inputs.work) / name for name in ("answer.json", "part.log"))
    answer.unlink(missing_ok=True)
    order = {"job": part.job, "options": part.options, "inputs": asdict(inputs), "answer": str(answer)}
    began, is_late = time.monotonic(), False
    with log.open("w") as output:
        command = [sys.executable, str(harness.BENCH / "gpu_worker.py"), json.dumps(order)]
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            process.wait(limit)
        except subprocess.TimeoutExpired:
            is_late = True
        finally:
            end(process)
    if answer.exists():
        found = finite(json.loads(answer.read_text(encoding="utf-8")))
    elif is_late:
        found = {"failed": f"not done after {limit:.0f} s"}
    else:
        found = {"failed": f"it ended with exit code {process.returncode} and without figures"}
    printed = log.read_text(encoding="utf-8", errors="replace")
    return {**found, "took_s": time.monotonic() - began, "output": printed[-OUTPUT_KEPT:]}


def end(process: subprocess.Popen) -> None:
    """End a process, and where there are process groups those that it started."""
    if hasattr(os, "killpg"):
        with contextlib.suppress(ProcessLookupError):  # all have ended
            os.killpg(process.pid, signal.SIGKILL)
    else:
        process.kill()
    process.wait()


def finite(content: Any) -> Any:
    """The same JSON value with text in place of nan and infinity, which JSON does not have."""
    if isinstance(content, dict):
        return {key: finite(value) for key, value in content.items()}
    if isinstance(content, list):
        return [finite(value) for value in content]
    return str(content) if isinstance(content, float) and not math.isfinite(content) else content


def goals_of(figures: dict[str, Any]) -> list[Goal]:
    """What was measured so far beside what is wanted of it."""
    goals = [Goal(**goal) for goal in figures.get("trl", {}).get("goals") or []]
    compiled = figures.get("train: default", {})
    if compiled.get("mfu") and compiled["is_compiled"]:
        rate = f"{compiled['tokens_per_s']:,.0f} tokens/s"
        goals.append(Goal("MFU, compiled", rate, "–", compiled["mfu"], 0.5, form="{:.3f}"))
    default, drill = (figures.get(name, {}).get("loss") for name in ("train: default", "caps: out of memory"))
    if default and drill:
        name, pairs = "losses after running out of memory differ by", zip(default[:WARM_UP], drill, strict=False)
        difference = float(np.max([abs(float(a) - float(b)) for a, b in pairs]))  # nan, which is text here, if any is
        goals.append(Goal(name, "–", "–", difference, DRILL_TOLERANCE, at_least=False, form="{:.4f}"))
    sampled = {name: rate for name, rate in figures.get("sample", {}).items() if name.endswith("tokens_per_s")}
    if (ours := sampled.pop("ours: tokens_per_s", None)) and sampled:
        name, best = max(sampled.items(), key=lambda item: item[1])
        ours_in_words, theirs = f"{ours:,.0f} tokens/s", f"{best:,.0f} tokens/s, {name.partition(':')[0]}"
        goals.append(Goal("sampling against transformers", ours_in_words, theirs, ours / best, 1.0))
    for part, found in figures.items():
        for what in ("weights", "moments"):
            if (difference := found.get(f"killed: {what} differ by")) is not None:
                name = f"{part}: {what} after a kill differ by"
                goals.append(Goal(name, "–", "–", float(difference), 0, at_least=False, form="{:.1e}"))
    return goals


def training_table(figures: dict[str, Any]) -> str:
    """A Markdown table of the trainings, as docs/benchmarks.md has it."""
    rows = []
    for name, found in figures.items():
        if "tokens_per_s" not in found:
            continue
        budget = f"{found['tokens_per_batch']:,}{', checkpointing' if found['recomputes'] else ''}"
        mfu, reserved = found["mfu"], found["reserved_gib"]
        rows.append([
            name, f"{found['tokens_per_s']:,.0f}", f"{found['pairs_per_s']:.1f}", f"{mfu:.1%}" if mfu else "–",
            f"{found['allocated_gib']:.1f}", f"{reserved:.1f}" if reserved else "–", budget,
            f"{found['compiled_forms']}{'' if found['is_compiled'] else ', of attention only'}",
        ])  # fmt: skip
    columns = ("training", "needed tokens/s", "pairs/s", "MFU", "allocated, GiB", "reserved, GiB",
               "tokens a micro-batch", "compiled forms")  # fmt: skip
    return harness.table(columns, rows)


if __name__ == "__main__":
    main()
