"""A run's micro-batches: planned alike in every process, made while one computes, smaller if memory runs out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

import data
import utils
from data_pipeline import packing
from data_pipeline.prefetch import prefetched
from training import distributed
from training.run import Run
from utils import UserError


def plans_of(run: Run, dataset: data.PairDataset, indices: Any) -> list[packing.MicroBatchPlan]:
    """How `indices` are cut into micro-batches, the same in every process."""
    budget = distributed.even_budget(int(dataset.packed_lengths[indices].sum()), run.tokens_per_batch, run.world.size)
    packs = run.model.packs_up_to(run.config.max_length)
    crossover_length = run.model.attention_crossover_length() if packs else None
    return packing.plan_step(dataset, indices, budget, run.config.batch_size, crossover_length)


def built(run: Run, dataset: data.PairDataset, turns: Sequence[distributed.Turn]) -> Iterator[tuple[Any, Any]]:
    """The turns' micro-batches on the device; the next one is made while one is computed."""
    pad_id, device = run.model.tokenizer.pad_token_id, run.model.device

    def build(turn: distributed.Turn) -> Any:
        batch = packing.build(dataset, turn.plan, pad_id)
        if device.type == "cuda":
            torch.cuda.set_device(device)  # this is another thread, which would pin for the first GPU
            batch = batch.pinned()
        return batch

    for turn, batch in zip(turns, prefetched(turns, build), strict=True):
        yield turn, batch.to(device)


def halve_token_budget(run: Run, plans: list[packing.MicroBatchPlan], error: RuntimeError) -> None:
    """After running out of memory over one of `plans`; any other error is raised again."""
    if not utils.is_out_of_memory(error):
        raise error
    used = max(plan.computed_tokens for plan in plans)
    if all(plan.num_examples == 1 for plan in plans):
        raise UserError(
            f"a single pair of {used:,} tokens does not fit the memory of {run.model.device}",
            next="a smaller --max_length, --gradient_checkpointing, or --lora",
        ) from error
    if not run.world.is_alone:  # the others are in the middle of the step, and cannot be asked to begin it again
        raise UserError(
            f"out of memory at {used:,} tokens a batch, in process {run.world.rank} of {run.world.size}",
            next=f"--tokens_per_batch {used // 2}, or auto, which tries what fits before training",
        ) from error
    run.tokens_per_batch = used // 2
    print(f"out of memory at {used:,} tokens a batch; going on with {run.tokens_per_batch:,}", flush=True)
