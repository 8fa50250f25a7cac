"""The jobs of on_gpu.py, each done in a process of its own. As a script: do one, and write its figures to a file.

A job takes `Inputs` and options, and returns figures that JSON can hold; what went wrong is under the key "failed".
"""

from __future__ import annotations

import copy
import json
import math
import os
import re
import statistics
import subprocess
import sys
import time
import traceback
import xml.etree.ElementTree as ElementTree
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import harness
from common import atomic_files

WARM_UP = 3  # steps that are not counted: kernels compile for new shapes
TIMED = 6


@dataclass(frozen=True)
class Inputs:
    """What every part is given. It travels to the part's process as JSON."""

    work: str  # a folder for whatever is written
    base: str  # a reward model of random weights
    qwen3: str
    dataset: str
    is_quick: bool
    clock: str  # a key of harness.CLOCKS

    def flags(self, name: str, *flags: str) -> list[str]:
        """The flags of a training named `name`, small if this is a quick run."""
        work = Path(self.work)
        small = ["--batch_size", "8", "--grad_accum", "2", "--precision", "fp32"] if self.is_quick else []
        return [
            "--model", self.base, "--dataset", self.dataset, "--output_dir", str(work / "out"), "--log_dir",
            str(work / "logs"), "--run_name", re.sub(r"\W+", "-", name), "--epochs", "4", *small, *flags,
        ]  # fmt: skip


def measure_machine(inputs: Inputs) -> dict[str, Any]:
    import torch

    from modeling import devices

    device, found = devices.pick_device(), harness.machine()
    clock = harness.Clock(device)

    def seconds_of(work: Any, times: int = 1 if inputs.is_quick else 10) -> float:
        work()
        clock.start()
        for _ in range(times):
            work()
        return clock.read()[inputs.clock] / times

    size = 2**20 if inputs.is_quick else 2**30
    block = torch.empty(size, dtype=torch.uint8, device=device)
    found["copy_gb_per_s"] = 2 * size / seconds_of(block.clone) / 1e9
    found["matmul_tflops"] = harness.matmul_tflops(device, torch.bfloat16, *(((64,), 0.01) if inputs.is_quick else ()))
    for rows in (16,) if inputs.is_quick else (4096, 16384):  # the model's own products
        a, b = torch.randn(rows, 1024).to(device, torch.bfloat16), torch.randn(1024, 3072).to(device, torch.bfloat16)
        found[f"product_of_{rows}_tokens_tflops"] = 2 * rows * 1024 * 3072 / seconds_of(lambda a=a, b=b: a @ b) / 1e12
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {
            "capability": list(torch.cuda.get_device_capability(device)),
            "memory_gib": properties.total_memory / 2**30,
            "shared_memory_kib": properties.shared_memory_per_block_optin / 2**10,
        }
    return found


def run_tests(inputs: Inputs) -> dict[str, Any]:
    """The tests marked `cuda`: how each ended, and the figures that it recorded."""
    import torch

    env = dict(os.environ) if torch.cuda.is_available() else {**os.environ, "TEST_DEVICE": "cpu"}
    report = Path(inputs.work) / "tests.xml"
    command = [sys.executable, "-m", "pytest", "-v", "-m", "cuda", "-p", "no:cacheprovider", f"--junitxml={report}"]
    done = subprocess.run([*command, "tests/modeling/test_cuda.py"], cwd=harness.ROOT, env=env)
    if not report.exists():
        return {"failed": f"pytest ended with exit code {done.returncode}, before any test"}
    found: dict[str, Any] = {}
    for case in ElementTree.parse(report).iter("testcase"):
        ends = {child.tag: child.get("message") for child in case if child.tag in ("failure", "error", "skipped")}
        recorded = {entry.get("name"): entry.get("value") for entry in case.iter("property")}
        outcome = next(iter(ends), "passed")
        found[str(case.get("name"))] = {"outcome": outcome, "why": ends.get(outcome), **recorded}
    counts = Counter(test["outcome"] for test in found.values())
    failed = {"failed": f"pytest ended with exit code {done.returncode}"} if done.returncode else {}
    return {**failed, "counts": counts, "tests": found}


def train(inputs: Inputs, name: str, flags: list[str], cap_gib: float = 0.0) -> dict[str, Any]:
    """The real loop for a few steps: speed, MFU, memory, and what was compiled. Rates are medians of timed steps."""
    import torch._dynamo.utils

    import needed_arithmetic
    import project_worker
    from modeling import devices

    devices.expect_changing_sizes()  # before CUDA is first used
    device = devices.pick_device()
    if cap_gib:
        emulate_smaller_card(cap_gib)
    clock = harness.Clock(device)
    run = project_worker.open_run(inputs.flags(name, "--eval_steps", "0", "--save_steps", "0", *flags))
    opened = clock.read()["seconds"]
    devices.free(device)  # what probing for the budget left behind is not training's
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    budget = run.batcher.tokens_per_batch
    count = WARM_UP + (1 if inputs.is_quick else TIMED)
    times = project_worker.time_steps(run, clock, count, inputs.clock)
    lengths = [run.train_data.lengths[run.sampler.indices_for(step)] for step in range(1, count + 1)]  # (n, 3) each
    timed = list(zip(times, lengths, strict=True))[WARM_UP:]
    tflops = statistics.median(needed_arithmetic.needed_flops(run.model, n) / s / 1e12 for s, n in timed)
    peak = harness.PEAK_TFLOPS.get(torch.cuda.get_device_name()) if device.type == "cuda" else None
    scalars, counters = project_worker.logged_scalars(run), torch._dynamo.utils.counters
    run.lock.release()
    return {
        "flags": flags, "attention": run.model.attention, "recomputes": run.batcher.recomputes,
        "is_compiled": any(hasattr(module.forward, "_torchdynamo_orig_callable") for module in run.model.modules()),
        "moments_in_main_memory": run.optimizer.is_offloaded,
        "tokens_per_batch": budget, "tokens_per_batch_at_the_end": run.batcher.tokens_per_batch,
        "open_s": opened, "steps_s": times,
        "tokens_per_s": statistics.median(n.sum() / s for s, n in timed),
        "pairs_per_s": statistics.median(len(n) / s for s, n in timed),
        "needed_tflops": tflops, "mfu": tflops / peak if peak else None, **memory_of(device),
        "compiled_forms": counters["stats"]["unique_graphs"], "graph_breaks": sum(counters["graph_break"].values()),
        "loss": scalars["train/loss"], "grad_norm": scalars["train/grad_norm"],
        "useful_tokens": scalars["train/useful_tokens"][-1], "skipped_steps": scalars["train/skipped_steps"][-1],
    }  # fmt: skip


def emulate_smaller_card(gib: float) -> None:
    """Have this process get no more of the GPU's memory than a smaller card has."""
    import torch

    limit = int(gib * 2**30)
    torch.cuda.set_per_process_memory_fraction(min(1.0, limit / torch.cuda.get_device_properties(0).total_memory))
    # the allocator keeps to the limit, but --tokens_per_batch auto asks the driver, which does not know of it
    torch.cuda.mem_get_info = lambda device=None: (limit - torch.cuda.memory_reserved(device), limit)


def memory_of(device: Any) -> dict[str, Any]:
    """The peaks so far in GiB: what tensors took, and on CUDA what the allocator held for them."""
    import torch

    if device.type != "cuda":
        return {"allocated_gib": harness.peak_gib(device), "reserved_gib": None}
    counted = torch.cuda.memory_stats()
    return {
        "allocated_gib": torch.cuda.max_memory_allocated() / 2**30,
        "reserved_gib": torch.cuda.max_memory_reserved() / 2**30,
        "times_out_of_memory": counted["num_ooms"], "allocation_retries": counted["num_alloc_retries"],
    }  # fmt: skip


def resume(inputs: Inputs, name: str, flags: list[str]) -> dict[str, Any]:
    """Train twice undisturbed and once killed after a save and resumed; compare the files of the last step.

    All run side by side. The token budget is fixed, because what auto finds depends on the memory left. Training twice
    undisturbed tells what resuming changes from what changes anyway; a quick run trains once.
    """
    every, last = (2, 4) if inputs.is_quick else (3, 12)
    small = ["--batch_size", "8", "--grad_accum", "2", "--tokens_per_batch", "1024", "--gradient_checkpointing"]
    steps = ["--max_steps", str(last), "--save_steps", str(every), "--eval_steps", "2", "--eval_num_batches", "1"]
    base = inputs.base
    if not inputs.is_quick:
        base = str(harness.write_base(inputs.qwen3, Path(inputs.work) / f"base of {name}", harness.Shape(256, 4)))

    def start(*words: str) -> subprocess.Popen:
        return subprocess.Popen([sys.executable, str(harness.ROOT / "train_rm.py"), "--no_report", *words])

    def folder(of: str) -> Path:
        return Path(inputs.work) / "out" / f"{name}-{of}"

    compared = ("killed",) if inputs.is_quick else ("again", "killed")
    processes = {
        of: start(*inputs.flags(f"{name}-{of}", *small, *steps, "--model", base, *flags))
        for of in ("straight", *compared)
    }
    killed, saved = processes.pop("killed"), folder("killed") / f"step-{every}"
    while not saved.is_dir() and killed.poll() is None:
        time.sleep(0.005)
    time.sleep(0.05)  # into a later step
    killed.kill()
    killed.wait()
    was_killed_in_time = not (folder("killed") / f"step-{last}").is_dir()
    ends = [process.wait() for process in processes.values()]
    ends.append(start("--resume_from", str(saved)).wait())
    if any(ends):
        return {"failed": f"exit codes of the trainings, the resumed one last: {ends}"}
    found: dict[str, Any] = {"was_killed_in_time": was_killed_in_time}
    for of in compared:
        for what, kind in (("weights", "*model.safetensors"), ("moments", "optimizer.safetensors")):
            one, other = (next((folder(run) / f"step-{last}").glob(kind)) for run in ("straight", of))
            found[f"{of}: {what} differ by"] = largest_difference(one, other)
    return found


def largest_difference(one: Path, other: Path) -> float:
    """Of all numbers in two files of tensors with the same names; 0 only if the files are equal bit by bit."""
    from safetensors.torch import load_file

    if one.read_bytes() == other.read_bytes():
        return 0.0
    a, b = load_file(one), load_file(other)
    largest = float(np.max([float((a[key].double() - b[key].double()).abs().max()) for key in a]))  # nan if any is
    return largest or math.ulp(0.0)  # 0.0 and -0.0 are other bits


def compare_with_trl(inputs: Inputs) -> dict[str, Any]:
    """bench/against_trl.py, whose goals are shown among ours."""
    file = Path(inputs.work) / "trl.json"
    shape = ["--hidden", "1024", "--layers", "28", "--batch_sizes", "4", "8", "16", "--steps", "5"]
    sizes = ["--quick", "--their_best", "2"] if inputs.is_quick else shape
    clock = next(name for name, key in harness.CLOCKS.items() if key == inputs.clock)
    command = [sys.executable, str(harness.BENCH / "against_trl.py"), "--gradient_checkpointing", "--clock", clock]
    done = subprocess.run([*command, "--json", str(file), *sizes])
    found = json.loads(file.read_text()) if file.exists() else {}
    failed = {"failed": f"against_trl.py ended with exit code {done.returncode}"} if done.returncode else {}
    return failed | {key: found.get(key) for key in ("search", "best", "goals", "arithmetic")}


def chat(inputs: Inputs) -> dict[str, Any]:
    """Time to the first token and tokens per second of one reply and of eight at once."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    import models
    from modeling import devices

    device, config = devices.pick_device(), AutoConfig.from_pretrained(inputs.qwen3)
    if inputs.is_quick:
        config.num_hidden_layers, config.layer_types = 1, config.layer_types[:1]
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32 if inputs.is_quick else torch.bfloat16)
    model.generation_config.eos_token_id = None  # random weights would end a reply at any token
    policy = models.PolicyModel(model, models.load_tokenizer(inputs.qwen3)).eval()
    question, length, found = [{"role": "user", "content": "Tell me about bread."}], 8 if inputs.is_quick else 128, {}
    for candidates in (1, 1, 8):  # the first one warms up
        began = time.perf_counter()
        times = [
            time.perf_counter() - began for _ in policy.stream_candidates(question, candidates, max_new_tokens=length)
        ]
        found[f"first_token_s_of_{candidates}"] = times[0]
        found[f"tokens_per_s_of_{candidates}"] = candidates * (length - 1) / (times[length - 1] - times[0])
    return found


def sample(inputs: Inputs) -> dict[str, Any]:
    """Tokens per second of a training step's sampling: ours, and transformers' own in its three ways."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    import models
    from grpo import sampling
    from modeling import devices

    device, config = devices.pick_device(), AutoConfig.from_pretrained(inputs.qwen3)
    count, length, group, new = (2, 8, 2, 4) if inputs.is_quick else (16, 256, 8, 128)
    if inputs.is_quick:
        config.num_hidden_layers, config.layer_types = 1, config.layer_types[:1]
    torch.manual_seed(0)
    with torch.device(device):
        theirs, model = (AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=torch.float32) for _ in range(2))
    policy = models.PolicyModel(model, models.load_tokenizer(inputs.qwen3)).eval()
    policy.temperature, policy.autocast_dtype = 1.0, torch.bfloat16 if device.type == "cuda" else None
    policy.use_attention(backward=False)
    prompts = [np.random.default_rng(prompt).integers(5, 1000, length) for prompt in range(count)]
    repeated = torch.tensor(np.repeat(prompts, group, axis=0), device=device)  # (count · group, length)
    settings = GenerationConfig(
        do_sample=True, top_k=0, top_p=1.0, temperature=1.0, max_new_tokens=new, min_new_tokens=new, eos_token_id=None,
        pad_token_id=0,
    )  # fmt: skip

    def ours() -> None:
        sampling.sample_groups(
            policy, prompts, group, new, set(), lambda *which: sampling.uniforms(0, 0, *which)
        )  # fmt: skip

    def generate(cache: str | None) -> None:
        with torch.no_grad(), policy.autocast(keeps_casts=True):
            written = theirs.generate(repeated, generation_config=settings, cache_implementation=cache)
        assert written.shape[1] == length + new

    def continuous() -> None:
        with torch.no_grad(), policy.autocast(keeps_casts=True):
            written = theirs.generate_batch(inputs=repeated.tolist(), generation_config=settings)
        assert len(written) == count * group

    ways = {
        "ours": ours,
        "dynamic cache": lambda: generate(None),
        "static cache": lambda: generate("static"),
        "continuous batching": continuous,  # last, because it takes what memory is left, on a CPU gigabytes too
    }
    found: dict[str, Any] = {}
    if device.type != "cuda":
        ways.pop("continuous batching")
        found["continuous batching: not run"] = "needs a CUDA device"
    for name, work in ways.items():
        times = []
        try:
            for _ in range(2 if inputs.is_quick else 4):  # the first one warms up
                began = time.perf_counter()
                work()
                if device.type == "cuda":
                    torch.cuda.synchronize()
                times.append(time.perf_counter() - began)
        except Exception as error:  # a way of theirs that does not run here is a finding
            if name == "ours":
                raise
            traceback.print_exc()
            found[f"{name}: not run"] = f"{type(error).__name__}: {error}"[:300]
            continue
        found[f"{name}: tokens_per_s"] = count * group * new / statistics.median(times[1:])
    return found | memory_of(device)


JOBS = {"machine": measure_machine, "tests": run_tests, "train": train, "resume": resume, "trl": compare_with_trl,
        "chat": chat, "sample": sample}  # fmt: skip


def main() -> None:
    """Do the job that the first argument describes."""
    order = json.loads(sys.argv[1])
    try:
        found = JOBS[order["job"]](Inputs(**order["inputs"]), **order["options"])
    except BaseException as error:  # SystemExit too: a benchmark that gives up is a part that failed
        traceback.print_exc()
        found = {"failed": f"{type(error).__name__}: {error}"}
    atomic_files.replace_text(Path(order["answer"]), json.dumps(found, default=float))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # nothing is left to do, and freeing gigabytes takes time


if __name__ == "__main__":
    main()
