"""One process or many: who computes which micro-batches, and how gradients and figures come together.

    torchrun --nproc_per_node 4 train_rm.py            DDP: every process holds the model
    torchrun --nproc_per_node 4 train_rm.py --fsdp     FSDP2: every process holds a part of it

Every process plans the whole step and computes its share of the micro-batches; Accelerate connects the processes, DDP
or FSDP2 adds up, and the gradient is that of one process. `World()` is that one process: nothing is added up, nothing
waits, and Accelerate is not imported.

Words, as in torch.distributed: *rank* is a process's number, *world size* how many there are.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import utils
from utils import Stopped, StopRequest, UserError

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from data_pipeline import packing
else:  # --help must not wait for it
    torch = utils.lazy_import("torch")


@dataclass(frozen=True)
class Turn:
    """One micro-batch that a process computes, and where its pairs stand among those of all micro-batches."""

    plan: packing.MicroBatchPlan
    first: int  # the place of its first pair
    weight: int = 1  # of its losses: the world size, by which DDP and FSDP divide; 0 if it only keeps others company
    is_last: bool = False

    @property
    def places(self) -> slice:
        return slice(self.first, self.first + self.plan.num_examples)


def deal(costs: Sequence[float], size: int, in_lockstep: bool = False) -> list[list[int]]:
    """Deal micro-batches to `size` processes so that the busiest has as little to do as can be had quickly.

    The dearest goes first and always to who has least so far (longest processing time first, at most 4/3 of the best
    possible: Graham 1969, doi:10.1137/0117039); how many each gets may differ. `in_lockstep`, where all must start each
    one together, deals round by round instead, so that those of one round cost about the same.

    Returns:
        For each process the numbers of its micro-batches, dearest first: memory peaks at once, and what is added up
        over the processes last is the smallest.
    """
    shares: list[list[int]] = [[] for _ in range(size)]
    loads = [0.0] * size
    for place, number in enumerate(sorted(range(len(costs)), key=lambda number: (-costs[number], number))):
        rank = place % size if in_lockstep else min(range(size), key=lambda rank: (loads[rank], rank))
        shares[rank].append(number)
        loads[rank] += costs[number]
    return shares


def even_budget(total_tokens: int, tokens_per_batch: int, size: int) -> int:
    """The token budget that cuts a step into a multiple of `size` micro-batches, never above the one given.

    10 micro-batches on 4 processes would keep two of them waiting: 12 smaller ones do not. A few per cent are left for
    rows that do not fill up.
    """
    if size == 1 or total_tokens == 0:
        return tokens_per_batch
    rounds = -(-total_tokens // (tokens_per_batch * size))
    return min(tokens_per_batch, int(1.04 * total_tokens / (rounds * size)) + 1)


@dataclass
class World:
    """The processes of this run as one of them sees it."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    is_sharded: bool = False  # FSDP2
    accelerator: Any = None

    @property
    def is_alone(self) -> bool:
        return self.size == 1

    @property
    def is_main(self) -> bool:
        """Whether this is the process that logs, prints and saves."""
        return self.rank == 0

    # -- waiting and agreeing ---------------------------------------------------------------------------------------

    def barrier(self) -> None:
        if not self.is_alone:
            torch.distributed.barrier()

    @contextlib.contextmanager
    def first_on_each_machine(self) -> Iterator[None]:
        """One process of each machine does it, then the others, who find it done (a cache, a file)."""
        if self.local_rank != 0:
            self.barrier()
        yield
        if self.local_rank == 0:
            self.barrier()

    def from_main(self, make: Callable[[], Any]) -> Any:
        """What `make` returns in the main process, everywhere."""
        if self.is_alone:
            return make()
        box = [make() if self.is_main else None]
        torch.distributed.broadcast_object_list(box)
        return box[0]

    def refuse_differences(self, settings: Mapping[str, Any]) -> None:
        """Raise UserError if the processes were not all started with the same settings, data and code."""
        if self.is_alone:
            return
        everyone: list[Any] = [None] * self.size
        torch.distributed.all_gather_object(everyone, dict(settings))
        for rank, other in enumerate(everyone):
            if names := [name for name in everyone[0] if other.get(name) != everyone[0][name]]:
                name = names[0]
                raise UserError(
                    "the processes of this run were not started alike",
                    found=f"{name}: {everyone[0][name]!r} in process 0, {other.get(name)!r} in process {rank}",
                    safe="nothing was trained",
                    next="the same command, the same files and the same versions on every machine",
                )

    # -- the model --------------------------------------------------------------------------------------------------

    def prepare(self, model: nn.Module, is_packed: bool) -> nn.Module:
        """The model whose gradients come out added up: DDP around it, or itself with its weights spread (FSDP2).

        The optimizer is made afterwards, of the parameters that the model has then.
        """
        if self.is_alone:
            return model
        if not self.is_sharded:
            if not is_packed:  # an encoder's pooler may be left out by its head
                self.accelerator.ddp_handler.find_unused_parameters = True
            return self.accelerator.prepare_model(model)
        # Accelerate has FSDP for GPUs only, so this is PyTorch's own, on every device. Weights travel in fp32, as
        # autocast wants them: the numbers are those of one process.
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh(model.device.type, (self.size,))
        blocks = set(model.hf_model._no_split_modules or ())  # transformers says what belongs together
        for module in list(model.modules()):
            if type(module).__name__ in blocks:
                fully_shard(module, mesh=mesh)
        return fully_shard(model, mesh=mesh)

    @contextlib.contextmanager
    def adding_up(self, model: nn.Module, turn: Turn) -> Iterator[None]:
        """Around a backward pass: DDP adds up gradients over the processes in the last one only.

        FSDP2 in every one: a process has room for its own part of the gradient, not for all of it.
        """
        if self.is_alone or turn.is_last or self.is_sharded:
            yield
        else:
            with self.accelerator.no_sync(model):
                yield

    def seed_dropout(self, seed: int, step: int) -> None:
        """Several processes draw each step's dropout from (seed, step, rank): nothing needs to be kept to resume."""
        if not self.is_alone:
            import numpy as np

            torch.manual_seed(int(np.random.SeedSequence([seed, step, self.rank]).generate_state(1, np.uint64)[0]))

    def whole(self, tensor: Tensor) -> Tensor:
        """A tensor that lies spread over the processes, whole and on the CPU; others as they are. All must call it."""
        return tensor.full_tensor().cpu() if hasattr(tensor, "full_tensor") else tensor

    def spread_like(self, tensor: Tensor, parameter: Tensor) -> Tensor:
        """The part of a whole tensor that this process holds of `parameter`; the opposite of `whole`."""
        if not hasattr(parameter, "full_tensor"):
            return tensor.to(parameter.device)
        from torch.distributed.tensor import distribute_tensor

        return distribute_tensor(tensor.to(parameter.device), parameter.device_mesh, parameter.placements)

    # -- sharing work ----------------------------------------------------------------------------------------------

    def share(self, plans: Sequence[packing.MicroBatchPlan], *, is_training: bool) -> list[Turn]:
        """This process's micro-batches. Where all must take part in each one, or in the last, none has too few."""
        firsts = list(itertools.accumulate((plan.num_examples for plan in plans), initial=0))
        if self.is_alone:
            return [Turn(plan, first) for plan, first in zip(plans, firsts, strict=False)]
        shares = deal([plan.cost for plan in plans], self.size, in_lockstep=self.is_sharded)
        turns = [Turn(plans[number], firsts[number], self.size) for number in shares[self.rank]]
        least = max(map(len, shares)) if self.is_sharded else int(is_training)
        cheapest = min(plans, key=lambda plan: plan.cost)
        turns += [Turn(cheapest, 0, weight=0)] * (least - len(turns))
        return [*turns[:-1], replace(turns[-1], is_last=True)] if turns else []

    def check(self, stop: StopRequest) -> None:
        """Raise Stopped if somebody asked to stop; several processes agree on it in `combine` instead."""
        if self.is_alone:
            stop.check()

    def combine(self, results: Tensor, stop: StopRequest) -> Tensor:
        """Add up `results` over all processes.

        Raises Stopped in every process if one of them was asked to stop: a signal reaches some before others, and all
        must stop after the same step, or the slower ones would wait for the others for ever.
        """
        if self.is_alone:
            return results
        signals = torch.zeros(self.size, dtype=results.dtype, device=results.device)
        signals[self.rank] = stop.signal_number or 0
        everything = torch.cat([results.flatten(), signals])
        torch.distributed.all_reduce(everything)
        if number := int(everything[-self.size :].max()):
            raise Stopped(number)
        return everything[: -self.size].view_as(results)

    def smallest(self, number: int) -> int:
        """The smallest of a number over all processes."""
        if self.is_alone:
            return number
        found = torch.tensor(number, device=self.accelerator.device)
        torch.distributed.all_reduce(found, torch.distributed.ReduceOp.MIN)
        return int(found)
