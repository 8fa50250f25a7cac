"""Micro-batches: planned alike on every rank, built while one is computed, smaller if memory runs out.

`--tokens_per_batch auto` is found here too: it tries which token budget fits the device's memory. The budget changes
speed and memory, never the result, so what was found is kept with the checkpoint, and nothing depends on when or where
it was probed.
"""

import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data_pipeline import packing
from data_pipeline.packing import Examples, MicroBatchPlan
from data_pipeline.prefetch import prefetched
from modeling import devices, speedups
from training.distributed import RankBatch, World, even_budget
from utils import UserError, is_out_of_memory

SHARE_OF_MEMORY = 0.9  # the rest is for fragmentation, and for whatever else the machine does
FIRST_BUDGET = 1024
MIN_GAIN = 1.1  # a budget that is larger by less than this factor is not worth another try
SECONDS_BETWEEN_SAMPLES = 0.005


class MicroBatcher:
    """Cuts steps and evaluations into micro-batches and runs them, in smaller ones if memory runs out.

    Attributes:
        model: the model; `module` is what training calls: the model itself, or DDP or FSDP2 around it.
        tokens_per_batch: the token budget in use; it falls when memory runs out.
    """

    def __init__(self, model: Any, module: torch.nn.Module, world: World, *, batch_size: int, max_length: int):
        self.model, self.module, self.world = model, module, world
        self.batch_size, self.tokens_per_batch = batch_size, FIRST_BUDGET
        packs = model.packs_up_to(max_length)
        self.crossover_length = model.attention_crossover_length() if packs else None

    def plan(self, dataset: Examples, indices: np.ndarray, budget: int | None = None) -> list[MicroBatchPlan]:
        """How examples `indices` (N,) are cut into micro-batches, the same on every rank."""
        if budget is None:
            budget = even_budget(int(dataset.lengths[indices].sum()), self.tokens_per_batch, self.world.size)
        return packing.plan_step(dataset, indices, budget, self.batch_size, self.crossover_length)

    def batches(self, dataset: Examples, assigned: Sequence[RankBatch]) -> Iterator[tuple[RankBatch, Any]]:
        """This rank's micro-batches on the device; the next one is built while the current one is computed."""
        pad_id, device = self.model.tokenizer.pad_token_id, self.model.device

        def build(rank_batch: RankBatch) -> Any:
            batch = packing.build(dataset, rank_batch.plan, pad_id)
            if device.type == "cuda":
                torch.cuda.set_device(device)  # this is another thread, which would pin for the first GPU
                batch = batch.pinned()
            return batch

        for rank_batch, batch in zip(assigned, prefetched(assigned, build), strict=True):
            yield rank_batch, batch.to(device)

    def run(
        self,
        dataset: Examples,
        indices: np.ndarray,
        compute: Callable[[list[MicroBatchPlan], Iterable[tuple[RankBatch, Any]]], Tensor],
        *,
        is_training: bool,
        before_retry: Callable[[], None] = lambda: None,
    ) -> tuple[list[MicroBatchPlan], Tensor]:
        """The plans of examples `indices`, and what `compute(plans, this rank's micro-batches)` returns.

        If the device runs out of memory, all of it is computed again with half the token budget, which stays:
        `before_retry` undoes what the first try changed. Raises UserError where that is impossible.
        """
        while True:
            plans = self.plan(dataset, indices)
            try:
                assigned = self.world.assign(plans, is_training=is_training)
                return plans, compute(plans, self.batches(dataset, assigned))
            except RuntimeError as error:
                self.halve_budget(plans, error)
            before_retry()  # not in the `except`, where the traceback still holds activations
            devices.free(self.model.device)

    def halve_budget(self, plans: list[MicroBatchPlan], error: RuntimeError) -> None:
        """After running out of memory over one of `plans`; any other error is raised again."""
        if not is_out_of_memory(error):
            raise error
        used = max(plan.computed_tokens for plan in plans)
        if all(plan.num_examples == 1 for plan in plans):
            raise UserError(
                f"a single example of {used:,} tokens does not fit the memory of {self.model.device}",
                next="a smaller --max_length, --gradient_checkpointing, or --lora",
            ) from error
        if not self.world.is_alone:  # the other ranks are in the middle of the step and cannot start it again
            raise UserError(
                f"out of memory at {used:,} tokens a batch, on rank {self.world.rank} of {self.world.size}",
                next=f"--tokens_per_batch {used // 2}, or auto, which tries what fits before training",
            ) from error
        self.tokens_per_batch = used // 2
        print(f"out of memory at {used:,} tokens a batch; going on with {self.tokens_per_batch:,}", flush=True)


# -- --tokens_per_batch auto -------------------------------------------------------------------------------------------


def find_max_tokens_per_batch(batcher: MicroBatcher, dataset: Examples, optimizer: torch.optim.Optimizer) -> int:
    """The largest token budget whose forward and backward fit the memory, found by running a few.

    Each try takes the longest examples, which need the most. Memory grows linearly with the budget (rows do not get
    wider, there are more of them), so two tries predict the next, and only what is predicted to fit is tried. The ranks
    of a run try together and agree on what the one with the least memory can take. Raises UserError if a single example
    does not fit.
    """
    device = batcher.model.device
    lengths = np.sort(dataset.lengths.sum(axis=1))[::-1]
    largest_useful = int(lengths[: batcher.batch_size].sum())  # no micro-batch has more
    devices.free(device)  # what opening the model left behind is not part of what it holds
    limit = memory_limit(device, bytes_of_optimizer_to_come(optimizer))
    budget = min(largest_useful, max(int(lengths[0]), FIRST_BUDGET))
    budget_before, peak_before = 0, memory_now(device)
    while True:
        try:
            peak = peak_bytes(batcher, dataset, optimizer, budget)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            raise UserError(
                f"{budget:,} tokens in a micro-batch do not fit the memory of {device}",
                next="a smaller --max_length, --gradient_checkpointing, or --lora",
            ) from error
        slope = max(1.0, (peak - peak_before) / (budget - budget_before))  # bytes a token
        fitting = batcher.world.smallest(int(budget + max(0.0, limit - peak) / slope))
        following = min(2 * budget, fitting, largest_useful)
        if following < MIN_GAIN * budget:
            budget = following if following == largest_useful else budget
            break
        budget_before, peak_before, budget = budget, peak, following
    enough = ", and no step needs more" if budget == largest_useful else ""
    print(f"tokens a batch: {budget:,} (probed: {peak / 2**30:.1f} of {limit / 2**30:.1f} GiB{enough})", flush=True)
    return budget


def peak_bytes(batcher: MicroBatcher, dataset: Examples, optimizer: torch.optim.Optimizer, budget: int) -> int:
    """The most bytes held while the longest examples that `budget` takes go forward and backward."""
    device = batcher.model.device
    devices.free(device)
    lengths = dataset.lengths.sum(axis=1)  # (N,)
    by_length = np.argsort(-lengths, kind="stable")
    count = 1 + int(np.searchsorted(np.cumsum(lengths[by_length]), budget))
    plan = batcher.plan(dataset, by_length[: min(count, batcher.batch_size)], budget)[0]
    batch = packing.build(dataset, plan, batcher.model.tokenizer.pad_token_id).to(device)
    with watched_memory(device) as peak, batcher.world.sync_gradients(batcher.module, RankBatch(plan, 0, is_last=True)):
        batcher.module(*batch.inputs()).sum().backward()
        speedups.densify_embedding_gradient(batcher.model)
    optimizer.zero_grad(set_to_none=True)
    return peak[0]


def bytes_of_optimizer_to_come(optimizer: torch.optim.Optimizer) -> int:
    """What AdamW's two moments will take once it has made its first step; 0 if they are there already."""
    return sum(
        2 * devices.local_bytes(parameter)
        for group in optimizer.param_groups
        for parameter in group["params"]
        if parameter not in optimizer.state
    )


def memory_now(device: torch.device) -> int:
    return int(devices.in_use_gib(device) * 2**30)


def memory_limit(device: torch.device, to_come: int) -> int:
    """Bytes that training may hold at its peak, including what it holds already."""
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
    """A list whose one number is, after the block, the most bytes that were held in it.

    CUDA keeps a peak. On MPS and the CPU a thread looks every few milliseconds; a process seldom gives memory back, so
    a peak that one look misses shows in the next.
    """
    peak = [memory_now(device)]
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        yield peak
        peak[0] = torch.cuda.max_memory_allocated(device)
        return
    is_over = threading.Event()

    def look() -> None:
        while not is_over.wait(SECONDS_BETWEEN_SAMPLES):
            peak[0] = max(peak[0], memory_now(device))

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        is_over.set()
        thread.join()
    peak[0] = max(peak[0], memory_now(device))
