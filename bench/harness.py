"""Shared by the benchmarks: inputs, the machine's description, tables and goals, and child processes that take turns.

Nothing here knows how the project or TRL train; that is in `project_worker.py` and `trl_worker.py`.
"""

from __future__ import annotations

import argparse
import gzip
import itertools
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

BENCH = Path(__file__).resolve().parent
ROOT = BENCH.parent
sys.path[:0] = [str(ROOT), str(BENCH)]
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # the two folders hold everything needed; no time is lost on the hub

# ---------------------------------------------------------------------------------------------------------------------
# Inputs
# ---------------------------------------------------------------------------------------------------------------------


CLOCKS = {"wall": "seconds", "processor": "cpu_seconds"}  # the key of each clock's time in a side's answers


def parser(doc: str) -> argparse.ArgumentParser:
    """A parser with the flags of every benchmark; `doc` is the help text."""
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument(
        "--quick", action="store_true", help="a tiny run that only shows that everything works; ignore its figures"
    )
    made.add_argument(
        "--clock", choices=sorted(CLOCKS), default="wall",
        help="compare wall time or processor time, which a busy machine disturbs less",
    )  # fmt: skip
    made.add_argument("--json", type=Path, metavar="FILE", help="also write the measurements to FILE")
    return made


def add_model_flags(made: argparse.ArgumentParser) -> None:
    """The flags of benchmarks that work with a model of any size; `base_model` reads them."""
    made.add_argument("--model", help="folder of a pretrained model, instead of one of random weights")
    made.add_argument("--hidden", type=int, default=256, help="width of the model of random weights (default 256)")
    made.add_argument("--layers", type=int, default=4, help="layers of the model of random weights (default 4)")


def base_model(arguments: argparse.Namespace, work: Path) -> tuple[str, str, str]:
    """(folder of the model that both sides start from, HH-RLHF's folder, the model in words)."""
    qwen3, dataset = inputs(arguments.model)
    if arguments.model:
        return str(write_pretrained_base(arguments.model, work / "base")), dataset, arguments.model
    base = write_base(qwen3, work / "base", Shape(arguments.hidden, arguments.layers))
    return str(base), dataset, f"{arguments.layers} layers × {arguments.hidden}"


def inputs(model: str | None = None) -> tuple[str, str]:
    """The folders of Qwen3-0.6B's config and tokenizer, or of the given `model`, and of HH-RLHF's files."""
    folders = [str(Path(model).resolve())] if model else []
    wanted_files = (("QWEN3_DIR", "config.json"), ("HH_RLHF_DIR", "train.jsonl.gz"))
    for name, wanted in wanted_files[len(folders) :]:
        folder = os.environ.get(name)
        if not folder:
            sys.exit(f"set {name} to a folder with {wanted}; the top of bench/real_shape.py says more")
        if not (Path(folder) / wanted).is_file():
            sys.exit(f"{name} is {folder}, and there is no {wanted} in it")
        folders.append(str(Path(folder).resolve()))
    return folders[0], folders[1]


@dataclass(frozen=True)
class Shape:
    """A smaller Qwen3 with the proportions of Qwen3-0.6B: 16 heads of 128 for a width of 1,024."""

    hidden: int
    layers: int

    @property
    def heads(self) -> int:
        return max(2, 16 * self.hidden // 1024)

    @property
    def kv_heads(self) -> int:
        return self.heads // 2

    @property
    def head_size(self) -> int:
        return 128

    @property
    def intermediate(self) -> int:
        return 3 * self.hidden

    def settings(self) -> dict[str, Any]:
        """The settings of a Qwen3 configuration that depend on its size."""
        return {
            "hidden_size": self.hidden, "num_hidden_layers": self.layers, "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads, "head_dim": self.head_size, "intermediate_size": self.intermediate,
            "max_window_layers": self.layers,
        }  # fmt: skip

    @property
    def matrix_weights(self) -> int:
        """Weights that every token is multiplied by: all layers' matrices, without embeddings and norms."""
        attention = self.hidden * self.head_size * 2 * (self.heads + self.kv_heads)  # q and o; k and v
        return self.layers * (attention + 3 * self.hidden * self.intermediate)


def write_base(qwen3: str, folder: Path, shape: Shape) -> Path:
    """Write a reward model of `shape` with random fp32 weights and Qwen3's vocabulary and tokenizer.

    Both sides open this folder, so they start from the same weights, including the head.
    """
    import torch
    from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(qwen3)
    fixed = {"num_labels": 1, "pad_token_id": tokenizer.pad_token_id, "torch_dtype": "float32"}
    config = json.loads((Path(qwen3) / "config.json").read_text()) | shape.settings() | fixed
    config.pop("layer_types", None)  # the kind of each of the other model's layers; without it all are alike
    model = AutoModelForSequenceClassification.from_config(AutoConfig.for_model(**config), dtype=torch.float32)
    torch.nn.init.normal_(model.score.weight, std=1 / math.sqrt(shape.hidden + 1))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_pretrained_base(model: str, folder: Path) -> Path:
    """The same of a pretrained model: a reward model with its weights in fp32 and the project's new head."""
    from modeling.tokenizers import load_tokenizer
    from models import RewardModel

    RewardModel.create(model, load_tokenizer(model), seed=0).save(folder)
    return folder


def first_rows(dataset: str, folder: Path, count: int) -> str:
    """Write a dataset of the first `count` training and test rows of another one."""
    folder.mkdir()
    for name in ("train.jsonl.gz", "test.jsonl.gz"):
        with gzip.open(Path(dataset) / name, "rb") as source, gzip.open(folder / name, "wb") as target:
            target.writelines(itertools.islice(source, count))
    return str(folder)


# ---------------------------------------------------------------------------------------------------------------------
# The machine
# ---------------------------------------------------------------------------------------------------------------------

# Dense bf16 peaks in TFLOP/s with fp32 accumulation, by CUDA's name of the device. From NVIDIA's data sheets of A100,
# H100 (SXM), H200 and L4 (half of the figures "with sparsity") and the Ada architecture's white paper.
PEAK_TFLOPS = {
    "NVIDIA A100-SXM4-40GB": 312, "NVIDIA A100-SXM4-80GB": 312, "NVIDIA A100-PCIE-40GB": 312,
    "NVIDIA A100 80GB PCIe": 312, "NVIDIA H100 80GB HBM3": 989, "NVIDIA H200": 989, "NVIDIA L4": 121,
    "NVIDIA GeForce RTX 4090": 165,
}  # fmt: skip


def machine() -> dict[str, Any]:
    """What was measured and where: commit, versions, device."""
    import importlib.metadata

    import torch

    from modeling import devices

    device = devices.pick_device()
    names = ("torch", "transformers", "trl", "accelerate", "numpy")
    found = {name: _version(name, importlib.metadata) for name in names}
    return {
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit(),
        "versions": {"python": platform.python_version(), **found},
        "device": device.type,
        "device_name": torch.cuda.get_device_name(device) if device.type == "cuda" else processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }


def _version(name: str, metadata: Any) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"


def commit() -> str:
    """The measured commit, with a + if files differ from it."""

    def git(*words: str) -> str:
        return subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True).stdout.strip()

    return (git("rev-parse", "--short", "HEAD") or "none") + ("+" if git("status", "--porcelain") else "")


def processor() -> str:
    """The processor's name on Linux, with the vector instructions that decide how fast bf16 is."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    values = dict(line.split(":", 1) for line in lines if ":" in line)
    values = {key.strip(): value.strip() for key, value in values.items()}
    told = [name for name in ("amx_bf16", "avx512_bf16") if name in values.get("flags", "").split()]
    return ", ".join([values.get("model name", platform.machine()), *told])


def describe(where: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in where["versions"].items())
    return (
        f"{where['date']}, commit {where['commit']}, {where['device_name']}, {where['cores']} cores, "
        f"{where['threads']} torch threads; {versions}"
    )


def synchronize(device: Any) -> None:
    """Wait until the device has finished its queued work."""
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def peak_gib(device: Any) -> float:
    """The most memory this process held: on a GPU its tensors, on a CPU everything resident."""
    from modeling import devices

    try:
        # ru_maxrss is inherited across exec: a child of a large process would start with its parent's peak
        status = Path("/proc/self/status").read_text() if device.type == "cpu" else ""
    except OSError:
        status = ""
    for line in status.splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 2**20
    return devices.peak_gib(device)


def matmul_tflops(
    device: Any, dtype: Any, sizes: Sequence[int] = (2048, 3072, 4096), seconds: float = 1.0, key: str = "seconds"
) -> float:
    """The rate of this machine's fastest matrix product in TFLOP/s: the best of squares and of a layer's own shape.

    Each shape runs for about `seconds` after a warm-up, and its fastest repetition counts. `key` is as in `CLOCKS`.
    """
    import torch

    best = 0.0
    shapes = [(size, size, size) for size in sizes] + [(max(sizes), 1024, 3072)]
    for m, k, n in shapes:
        a, b = torch.randn(m, k).to(device, dtype), torch.randn(k, n).to(device, dtype)
        repetitions = 10 if device.type == "cuda" else 1  # a GPU is only fully busy with several products queued
        a @ b
        times, clock, began = [], Clock(device), time.perf_counter()
        while len(times) < 3 or time.perf_counter() - began < seconds:
            clock.start()
            for _ in range(repetitions):
                a @ b
            times.append(clock.read()[key] / repetitions)
        best = max(best, 2 * m * k * n / min(times) / 1e12)
    return best


# ---------------------------------------------------------------------------------------------------------------------
# Child processes that take turns
# ---------------------------------------------------------------------------------------------------------------------


class Side:
    """One side of a comparison: a separate process that works only when it gets a message.

    Its memory can be measured separately, and sides that take turns run under the same load of a busy machine.
    """

    def __init__(self, script: str, **settings: Any):
        self.name = f"{script} {settings.get('job', '')}"
        self.process = subprocess.Popen(
            [sys.executable, str(BENCH / script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.opened = self.ask(**settings)

    def ask(self, **message: Any) -> dict[str, Any]:
        """Send a message and wait for the answer."""
        assert self.process.stdin and self.process.stdout
        try:
            self.process.stdin.write(json.dumps(message) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # it has ended, so its answer is missing too, which is reported below
        answer = self.process.stdout.readline()
        if not answer:
            raise SystemExit(f"{self.name} ended with exit code {self.process.wait()}; see its message above")
        return json.loads(answer)

    def end(self) -> dict[str, Any]:
        """Ask for the final answer and wait for the process to end."""
        last = self.ask(do="end")
        self.process.wait()
        return last

    def __enter__(self) -> Side:
        return self

    def __exit__(self, *exc: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()


class Channel:
    """The child's end of `Side`. It uses standard output; what libraries print goes to standard error instead."""

    def __init__(self) -> None:
        self.answers = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)

    def receive(self) -> dict[str, Any]:
        line = sys.stdin.readline()
        return json.loads(line) if line else {"do": "end"}  # the parent is gone

    def answer(self, **message: Any) -> None:
        self.answers.write(json.dumps(message) + "\n")
        self.answers.flush()


class Clock:
    """Wall and processor seconds since `start`, including work on the device."""

    def __init__(self, device: Any):
        self.device = device
        self.start()

    def start(self) -> None:
        synchronize(self.device)
        self.wall, self.cpu = time.perf_counter(), time.process_time()

    def read(self) -> dict[str, float]:
        synchronize(self.device)
        now, cpu = time.perf_counter(), time.process_time()
        return {"seconds": now - self.wall, "cpu_seconds": cpu - self.cpu}


def in_turn(sides: dict[str, Side], rounds: int, **message: Any) -> dict[str, list[dict[str, Any]]]:
    """Ask each side once per round, A B A B ...; returns the answers by side."""
    answers: dict[str, list[dict[str, Any]]] = {name: [] for name in sides}
    for number in range(rounds):
        for name, side in sides.items():
            answers[name].append(side.ask(**message))
            took = ", ".join(f"{answers[name][-1][key]:.2f} s {clock}" for clock, key in CLOCKS.items())
            print(f"round {number + 1} of {rounds}: {name} {took}", file=sys.stderr, flush=True)
    return answers


def median(answers: list[dict[str, Any]], key: str = "seconds") -> float:
    return statistics.median(answer[key] for answer in answers)


# ---------------------------------------------------------------------------------------------------------------------
# Tables and goals
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class Goal:
    """A goal and what was measured; with `wanted` None it is only shown for comparison."""

    name: str
    ours: str
    theirs: str
    measured: float
    wanted: float | None
    at_least: bool = True
    form: str = "{:.2f}"

    @property
    def is_met(self) -> bool:
        assert self.wanted is not None
        return self.measured >= self.wanted if self.at_least else self.measured <= self.wanted

    def row(self) -> list[str]:
        row = [self.name, self.ours, self.theirs, self.form.format(self.measured)]
        if self.wanted is None:
            return [*row, "–", "–"]
        sign = "≥" if self.at_least else "≤"
        return [*row, f"{sign} {self.form.format(self.wanted)}", "yes" if self.is_met else "NO"]


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def goal_table(goals: Sequence[Goal]) -> str:
    return table(("goal", "measured", "TRL", "ratio", "wanted", "met"), [goal.row() for goal in goals])


def write_json(path: Path | None, content: dict[str, Any]) -> None:
    """Write figures, all or nothing: a kill leaves what was there before."""
    from common import atomic_files

    if path is not None:
        plain = json.dumps(content, indent=1, default=lambda value: asdict(value), allow_nan=False)
        atomic_files.replace_text(path, plain + "\n")
