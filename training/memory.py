"""What `auto` means for `--tokens_per_batch`, `--gradient_checkpointing` and `--offload_optimizer`: what is fastest in
the memory there is.

They change speed and memory, never the result, so what was found is kept with the checkpoint, and nothing depends on
when or where it was probed.
"""

import contextlib
import threading
from collections.abc import Iterator
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from torch import Tensor

from data_pipeline import packing
from data_pipeline.packing import Examples, MicroBatchPlan
from data_pipeline.tokenization import longest_sequences
from modeling import devices, speedups
from training.config import AUTO, TrainingConfig
from training.distributed import RankBatch
from training.micro_batches import FIRST_BUDGET, MicroBatcher
from training.optimizer import AdamW
from utils import UserError, is_out_of_memory

SHARE_OF_MEMORY = 0.9  # the rest is for fragmentation, and for whatever else the machine does
BYTES_TO_LEAVE = 2**30  # at least, on a GPU that may also show a desktop
MIN_GAIN = 1.1  # a budget that is larger by less than this factor is not worth another try
SECONDS_BETWEEN_SAMPLES = 0.005
CPU_BUDGET = 1536  # on a CPU, larger micro-batches are hardly faster and need more memory
ENOUGH_TOKENS = 2048  # with room for this many, keeping activations is faster than computing them again for more
SHARE_TO_KEEP = 0.5  # of the memory left on a CPU; one layer's backward pass, and other programs, need the rest


class Choices(NamedTuple):
    """Settings that change how memory is used, and never the result; AUTO, or what the user asked for."""

    tokens_per_batch: int | str
    gradient_checkpointing: bool | str
    offload_optimizer: bool | str

    @classmethod
    def of(cls, config: TrainingConfig) -> Self:
        return cls(config.tokens_per_batch, config.gradient_checkpointing, config.offload_optimizer)


def choose(batcher: MicroBatcher, dataset: Examples, optimizer: AdamW, choices: Choices) -> None:
    """Set token budget, gradient checkpointing and where moments are kept; for AUTO, the fastest that fits the memory.

    Raises UserError if a single example does not fit.
    """
    device = batcher.model.device
    if device.type == "cpu":
        choose_on_cpu(batcher, dataset, optimizer, choices)
        return
    budget, recompute, offload = choices
    can_offload = device.type == "cuda" and not batcher.world.is_sharded
    tries = [
        (offload is True and can_offload, is_on) for is_on in ((False, True) if recompute == AUTO else (recompute,))
    ]
    if offload == AUTO and can_offload:
        tries.append((True, tries[-1][1]))
    for must_offload, must_recompute in tries:
        if must_offload and not optimizer.is_offloaded:
            optimizer.offload()
        batcher.recompute(bool(must_recompute))
        is_last = (must_offload, must_recompute) == tries[-1]
        if budget == AUTO:
            batcher.tokens_per_batch, is_all = find_max_tokens_per_batch(batcher, dataset, optimizer)
            if is_all or batcher.tokens_per_batch >= ENOUGH_TOKENS:
                break
        else:
            batcher.tokens_per_batch = int(budget)
            if is_last or fits(batcher, dataset, optimizer, int(budget)):
                break
    devices.forget_peak(device)  # the log is to show training's peak, not that of these tries
    if not batcher.tokens_per_batch:
        raise UserError(
            f"a micro-batch of the longest example does not fit the memory of {device}",
            next="a smaller --max_length, --gradient_checkpointing, or --lora",
        )


def can_offload(batcher: MicroBatcher) -> bool:
    """Whether AdamW's moments can be kept anywhere but where they are."""
    return batcher.model.device.type == "cuda" and not batcher.world.is_sharded


def choose_on_cpu(batcher: MicroBatcher, dataset: Examples, optimizer: AdamW, choices: Choices) -> None:
    """The same where the moments are in main memory anyway."""
    recompute = choices.gradient_checkpointing
    batcher.tokens_per_batch = CPU_BUDGET if choices.tokens_per_batch == AUTO else int(choices.tokens_per_batch)
    if recompute == AUTO:
        recompute = not activations_fit(batcher, dataset, optimizer)
        devices.free(batcher.model.device)
        print(f"gradient checkpointing: {'on' if recompute else 'off, there is memory enough'}", flush=True)
    batcher.recompute(bool(recompute))


def activations_fit(batcher: MicroBatcher, dataset: Examples, optimizer: AdamW) -> bool:
    """Whether a CPU's memory can hold what a forward pass keeps for the backward pass: one is made, and counted."""
    if batcher.world.is_sharded:
        return False  # ranks cannot stop in the middle of a forward pass
    room = devices.available_bytes() - bytes_of_gradients_to_come(optimizer)
    counted = {parameter.untyped_storage().data_ptr() for parameter in batcher.model.parameters()}
    kept = 0

    def count(tensor: Tensor) -> Tensor:
        nonlocal kept
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in counted:
            counted.add(storage.data_ptr())
            kept += storage.nbytes()
            if kept > SHARE_TO_KEEP * room:
                raise MemoryError
        return tensor.detach()  # itself, it would keep its own graph alive

    _, batch = largest_micro_batch(batcher, dataset, batcher.tokens_per_batch)
    try:
        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            batcher.model(*batch.inputs())
    except MemoryError:
        return bool(batcher.world.smallest(0))
    return bool(batcher.world.smallest(1))


def find_max_tokens_per_batch(batcher: MicroBatcher, dataset: Examples, optimizer: AdamW) -> tuple[int, bool]:
    """(the largest token budget that fits the memory, whether that holds a whole step), found by running a few.

    Each try takes the longest examples, which need the most. Memory grows linearly with the budget, so two tries
    predict the next, and only what is predicted to fit is tried. The ranks of a run try together and agree on what the
    one with the least memory can take. The budget is 0 if not even the longest example fits.
    """
    device = batcher.model.device
    lengths = np.sort(dataset.lengths.sum(axis=1))[::-1]
    largest_useful = int(lengths[: batcher.batch_size].sum())  # no micro-batch has more
    devices.free(device)  # what opening the model left behind is not part of what it holds
    limit = memory_limit(device)
    budget = min(largest_useful, max(int(lengths[0]), FIRST_BUDGET))
    budget_before, peak_before = 0, memory_now(device)
    while True:
        peak = peak_bytes(batcher, dataset, optimizer, budget)
        if peak is None:
            budget = budget_before
            break
        slope = max(1.0, (peak - peak_before) / (budget - budget_before))  # bytes a token
        fitting = batcher.world.smallest(int(budget + max(0.0, limit - peak) / slope))
        following = min(2 * budget, fitting, largest_useful)
        if following < MIN_GAIN * budget:
            budget = following if following == largest_useful else budget
            break
        budget_before, peak_before, budget = budget, peak, following
    if budget:
        enough = ", and no step needs more" if budget == largest_useful else ""
        how = "with" if batcher.recomputes else "without"
        print(f"tokens a batch {how} gradient checkpointing: {budget:,} of {limit / 2**30:.1f} GiB{enough}", flush=True)
    return budget, budget == largest_useful


def fits(batcher: MicroBatcher, dataset: Examples, optimizer: AdamW, budget: int) -> bool:
    limit = memory_limit(batcher.model.device)
    peak = peak_bytes(batcher, dataset, optimizer, budget)
    return bool(batcher.world.smallest(int(peak is not None and peak <= limit)))


def largest_micro_batch(batcher: MicroBatcher, dataset: Examples, budget: int) -> tuple[MicroBatchPlan, Any]:
    """The longest examples that `budget` takes: how they are cut, and their tensors on the device."""
    lengths = dataset.lengths.sum(axis=1)  # (N,)
    by_length = np.argsort(-lengths, kind="stable")
    # those that are computed alone do not grow with the budget, and may still be the largest
    longest = longest_sequences(dataset.lengths)  # (N,)
    is_alone = longest > (batcher.alone_above or np.inf)
    together = by_length[~is_alone[by_length]]
    count = 1 + int(np.searchsorted(np.cumsum(lengths[together]), budget))
    indices = together[: min(count, batcher.batch_size)]
    if is_alone.any():
        indices = np.append(indices, longest.argmax())
    plans = batcher.plan(dataset, indices, budget)
    plan = max(plans, key=lambda plan: plan.computed_tokens)
    batch = batcher.model.prepared(packing.build(dataset, plan, batcher.model.tokenizer.pad_token_id))
    return plan, batch.to(batcher.model.device)


def peak_bytes(batcher: MicroBatcher, dataset: Examples, optimizer: AdamW, budget: int) -> int | None:
    """The most bytes held while a micro-batch of `budget` tokens goes forward and backward, the gradients of another
    one beside it; None if memory runs out. (Several ranks cannot go on from that: they are in the middle of it.)
    """
    device = batcher.model.device
    devices.free(device)
    plan, batch = largest_micro_batch(batcher, dataset, budget)
    whole_step = RankBatch(plan, 0, is_last=True)
    try:
        for _ in range(2):
            with watched_memory(device) as peak, batcher.world.sync_gradients(batcher.module, whole_step):
                batcher.module(*batch.inputs()).sum().backward()
                speedups.densify_embedding_gradient(batcher.model)
    except RuntimeError as error:
        if not is_out_of_memory(error) or not batcher.world.is_alone:
            raise
        peak = None
    optimizer.zero_grad(set_to_none=True)  # not in the `except`, where the traceback still holds activations
    return peak[0] if peak else None


def bytes_of_gradients_to_come(optimizer: AdamW) -> int:
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    return sum(devices.local_bytes(parameter) for parameter in parameters if parameter.grad is None)


def memory_now(device: torch.device) -> int:
    return int(devices.in_use_gib(device) * 2**30)


def memory_limit(device: torch.device) -> int:
    """Bytes that training may hold at its peak, including what it holds already."""
    to_leave = 0
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        room = free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        to_leave = BYTES_TO_LEAVE
    elif device.type == "mps":
        room = torch.mps.recommended_max_memory() - torch.mps.current_allocated_memory()
    else:
        room = devices.available_bytes()
    return memory_now(device) + max(0, int(min(SHARE_OF_MEMORY * room, room - to_leave)))


@contextlib.contextmanager
def watched_memory(device: torch.device) -> Iterator[list[int]]:
    """A list whose one number is, after the block, the most bytes that were held in it.

    CUDA keeps a peak. On MPS and the CPU a thread looks every few milliseconds; a process seldom gives memory back, so
    a peak that one look misses shows in the next.
    """
    peak = [memory_now(device)]
    if device.type == "cuda":
        devices.forget_peak(device)
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
