"""What the precision of matrix products does to rewards: their error beside the rewards' own spread, and the time.

    HH_RLHF_DIR=... python bench/precision.py --model CHECKPOINT [--pairs 60]

Scores the first test pairs in fp32, in TF32 (on a CPU emulated: the factors of every linear layer are rounded to TF32's
10 bits) and in bf16. The error is the mean distance from the reward in fp32, divided by the standard deviation of all
fp32 rewards; for pairs the same of the difference of the two rewards. CHECKPOINT is a reward model; a base model gets
the new head of a training.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from typing import Any

import harness

PRECISIONS = ("fp32", "tf32", "bf16")


def tf32_factors() -> Any:
    """Inside this context linear layers round their factors to TF32, to nearest even."""
    import torch
    from torch.nn import functional
    from torch.overrides import TorchFunctionMode

    def rounded(tensor: Any) -> Any:
        bits = tensor.contiguous().view(torch.int32)
        return ((bits + 0xFFF + ((bits >> 13) & 1)) & ~0x1FFF).view(torch.float32)

    class Emulated(TorchFunctionMode):
        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if function is functional.linear:
                args = rounded(args[0]), rounded(args[1]), *args[2:]
            return function(*args, **(kwargs or {}))

    return Emulated()


def rewards(model: Any, pairs: Any, count: int, precision: str) -> tuple[Any, float]:
    """Rewards (N, 2) of the first pairs, and the seconds that took."""
    import numpy as np
    import torch

    from data_pipeline import packing
    from modeling import devices

    model.autocast_dtype = torch.bfloat16 if precision == "bf16" else None
    found = torch.zeros(count, 2)
    contexts = {"tf32": devices.tf32(model.device) if model.device.type == "cuda" else tf32_factors()}
    plans = packing.plan_step(pairs, np.arange(count), 4096, 64, model.attention_crossover_length())
    batches = [packing.build(pairs, plan, model.tokenizer.pad_token_id) for plan in plans]
    clock = harness.Clock(model.device)
    with torch.inference_mode(), contexts.get(precision, contextlib.nullcontext()):
        for plan, batch in zip(plans, batches, strict=True):
            batch = model.prepared(batch).to(model.device)
            found[plan.indices] = model(*batch.inputs()).view(-1, 2).cpu()
    return found.double(), clock.read()["seconds"]


def main() -> None:
    parser = harness.parser(__doc__)
    parser.add_argument("--model", required=True, help="folder of a reward model, or of a base model")
    parser.add_argument("--pairs", type=int, default=60, help="how many test pairs (default 60)")
    arguments = parser.parse_args()
    dataset = os.environ.get("HH_RLHF_DIR") or sys.exit("set HH_RLHF_DIR to the folder of HH-RLHF's files")
    import data
    from modeling.scorer import Scorer, ScoringConfig
    from modeling.tokenizers import load_tokenizer
    from models import RewardModel

    model = RewardModel.create(arguments.model, load_tokenizer(arguments.model), seed=0)
    Scorer(model, ScoringConfig())
    _, pairs = data.load_pairs(dataset, model.tokenizer, ScoringConfig().max_length)
    count = min(len(pairs), 8 if arguments.quick else arguments.pairs)
    where = harness.machine()
    print(f"{harness.describe(where)}\n\n{arguments.model}, {count} pairs", flush=True)
    started = time.perf_counter()
    found = {precision: rewards(model, pairs, count, precision) for precision in PRECISIONS}
    exact = found["fp32"][0]
    spreads = float(exact.std()), float((exact[:, 0] - exact[:, 1]).std())
    lines = [
        f"spread of the rewards {spreads[0]:.3f}, of the differences within a pair {spreads[1]:.3f}\n",
        "| precision | error of a reward | error of a difference | time relative to bf16 |",
        "|---|---|---|---|",
    ]
    measured = {}
    for precision, (values, seconds) in found.items():
        off = values - exact
        errors = float(off.abs().mean()) / spreads[0], float((off[:, 0] - off[:, 1]).abs().mean()) / spreads[1]
        is_emulated = precision == "tf32" and model.device.type != "cuda"
        ratio = "(emulated)" if is_emulated else f"{seconds / found['bf16'][1]:.2f}"
        lines.append(f"| {precision} | {errors[0]:.2%} | {errors[1]:.2%} | {ratio} |")
        measured[precision] = {"reward": errors[0], "difference": errors[1], "seconds": seconds}
    print("\n".join(lines))
    harness.write_json(arguments.json, {"machine": where, "spreads": spreads, "errors": measured,
                                        "seconds": time.perf_counter() - started})  # fmt: skip


if __name__ == "__main__":
    main()
