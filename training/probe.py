"""How many tokens a micro-batch may have: `--tokens_per_batch auto` tries what fits the device's memory.

The budget changes speed and memory, never the result, so what was found is kept with the checkpoint and nothing depends
on when or where it was probed.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import torch

import utils
from data_pipeline import packing
from modeling import devices, speedups
from training import distributed
from utils import UserError

if TYPE_CHECKING:
    from training.run import Run

SHARE_OF_MEMORY = 0.9  # the rest is for fragments, and for whatever else the machine does
FIRST_BUDGET = 1024
LEAST_GAIN = 1.1  # a budget less than so much larger is not worth another try
SECONDS_BETWEEN_SAMPLES = 0.005


def largest_budget(run: Run) -> int:
    """The largest token budget whose forward and backward fit the memory, found by running a few.

    Each try takes the longest training pairs, which need the most. Memory grows linearly with the budget (rows get no
    wider, only more), so two tries foretell the next; none is made that is not foretold to fit. The processes of a run
    try together and agree on what the tightest of them can take. Raises UserError if a single pair does not fit.
    """
    lengths = np.sort(run.train_pairs.packed_lengths)[::-1]
    largest_useful = int(lengths[: run.config.batch_size].sum())  # no micro-batch has more
    devices.free(run.model.device)  # what opening the model left behind is no part of what it holds
    limit = memory_limit(run.model.device, bytes_to_come(run))
    budget = min(largest_useful, max(int(lengths[0]), FIRST_BUDGET))
    tried = [(0, memory_now(run.model.device))]
    while True:
        try:
            tried.append((budget, peak_of(run, budget)))
        except RuntimeError as error:
            if not utils.is_out_of_memory(error):
                raise
            raise UserError(
                f"{budget:,} tokens in a micro-batch do not fit the memory of {run.model.device}",
                next="a smaller --max_length, --gradient_checkpointing, or --lora",
            ) from error
        (budget_before, peak_before), (_, peak) = tried[-2:]
        slope = max(1.0, (peak - peak_before) / (budget - budget_before))  # bytes a token
        fitting = run.world.smallest(int(budget + max(0.0, limit - peak) / slope))
        following = min(2 * budget, fitting, largest_useful)
        if following < LEAST_GAIN * budget:
            budget = following if following == largest_useful else budget
            break
        budget = following
    print(
        f"tokens a batch: {budget:,} (probed: {peak / 2**30:.1f} of {limit / 2**30:.1f} GiB"
        + (", and no step needs more)" if budget == largest_useful else ")"),
        flush=True,
    )
    return budget


def peak_of(run: Run, budget: int) -> int:
    """The most bytes held while the longest pairs that `budget` takes go forward and backward."""
    device = run.model.device
    devices.free(device)
    by_length = np.argsort(-run.train_pairs.packed_lengths, kind="stable")
    count = 1 + int(np.searchsorted(np.cumsum(run.train_pairs.packed_lengths[by_length]), budget))
    packs = run.model.packs_up_to(run.config.max_length)
    crossover_length = run.model.attention_crossover_length() if packs else None
    indices = by_length[: min(count, run.config.batch_size)]
    plan = packing.plan_step(run.train_pairs, indices, budget, run.config.batch_size, crossover_length)[0]
    batch = packing.build(run.train_pairs, plan, run.model.tokenizer.pad_token_id).to(device)
    with watched_memory(device) as peak, run.world.adding_up(run.module, distributed.Turn(plan, 0, is_last=True)):
        run.module(*batch.inputs()).sum().backward()
        speedups.densify_embedding_gradient(run.model)
    run.optimizer.zero_grad(set_to_none=True)
    return peak[0]


def bytes_to_come(run: Run) -> int:
    """What AdamW's two moments will take once it has made its first step; nothing if they are there already."""
    return sum(
        2 * devices.local_bytes(parameter)
        for group in run.optimizer.param_groups
        for parameter in group["params"]
        if parameter not in run.optimizer.state
    )


def memory_now(device: torch.device) -> int:
    return int(devices.in_use_gib(device) * 2**30)


def memory_limit(device: torch.device, to_come: int) -> int:
    """Bytes that training may hold at its peak, what it holds already included."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        room = free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    elif device.type == "mps":
        room = torch.mps.recommended_max_memory() - torch.mps.current_allocated_memory()
    else:
        room = devices.available_bytes()
    return memory_now(device) + int(SHARE_OF_MEMORY * (room - to_come))


@contextlib.contextmanager
def watched_memory(device: torch.device) -> Iterator[list[int]]:
    """A list whose one number is, on leaving, the most bytes that were held meanwhile.

    CUDA keeps a peak. On MPS and the CPU a thread looks every few milliseconds; what a process once had it seldom gives
    back, so a peak that is missed shows up in the next look.
    """
    peak = [memory_now(device)]
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        yield peak
        peak[0] = torch.cuda.max_memory_allocated(device)
        return
    is_over = threading.Event()

    def look() -> None:
        while not is_over.is_set():
            peak[0] = max(peak[0], memory_now(device))
            time.sleep(SECONDS_BETWEEN_SAMPLES)

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        is_over.set()
        thread.join()
    peak[0] = max(peak[0], memory_now(device))
