"""Micro-batches: planned alike on every rank, built while one is computed, smaller if memory runs out."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from common.prefetch import prefetched
from data_pipeline import packing
from data_pipeline.packing import Examples, MicroBatchPlan
from modeling import devices, speedups
from training.distributed import RankBatch, World, even_budget
from utils import UserError, is_out_of_memory

FIRST_BUDGET = 1024


class MicroBatcher:
    """Cuts steps and evaluations into micro-batches and runs them, in smaller ones if memory runs out.

    Attributes:
        model: the model; `module` is what training calls: the model itself, or DDP or FSDP2 around it.
        tokens_per_batch: the token budget in use; it falls when memory runs out.
        recomputes: whether activations are computed again in the backward pass (gradient checkpointing).
    """

    def __init__(self, model: Any, module: torch.nn.Module, world: World, *, batch_size: int, max_length: int):
        self.model, self.module, self.world = model, module, world
        self.batch_size, self.tokens_per_batch, self.recomputes = batch_size, FIRST_BUDGET, False
        packs = model.packs_up_to(max_length)
        self.crossover_length = model.attention_crossover_length() if packs else None
        self.alone_above = model.alone_above()

    def plan(self, dataset: Examples, indices: np.ndarray, budget: int | None = None) -> list[MicroBatchPlan]:
        """How examples `indices` (N,) are cut into micro-batches, the same on every rank."""
        if budget is None:
            budget = even_budget(int(dataset.lengths[indices].sum()), self.tokens_per_batch, self.world.size)
        return packing.plan_step(dataset, indices, budget, self.batch_size, self.crossover_length, self.alone_above)

    def batches(self, dataset: Examples, assigned: Sequence[RankBatch]) -> Iterator[tuple[RankBatch, Any]]:
        """This rank's micro-batches on the device; the next one is built while the current one is computed."""
        pad_id, device = self.model.tokenizer.pad_token_id, self.model.device

        def build(rank_batch: RankBatch) -> Any:
            batch = self.model.prepared(packing.build(dataset, rank_batch.plan, pad_id))
            if device.type == "cuda":
                torch.cuda.set_device(device)  # this is another thread, which would pin for the first GPU
                batch = batch.pinned()
            return batch

        for rank_batch, batch in zip(assigned, prefetched(assigned, build), strict=True):
            yield rank_batch, batch.to(device)

    def recompute(self, is_on: bool) -> None:
        """Turn gradient checkpointing on or off."""
        speedups.set_gradient_checkpointing(self.model, is_on)
        self.recomputes = is_on

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
