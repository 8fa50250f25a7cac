"""One process or many: which rank computes which micro-batches, and how gradients and metrics are combined.

    torchrun --nproc_per_node 4 train_rm.py            DDP: every process holds the model
    torchrun --nproc_per_node 4 train_rm.py --fsdp     FSDP2: every process holds a part of it

Every process plans the whole step and computes its share of the micro-batches. Accelerate connects the processes, DDP
or FSDP2 sums the gradients, and the result is that of one process. `World()` is a single process: it neither sums nor
waits, and does not import Accelerate.

As in torch.distributed, *rank* is a process's number and *world size* is how many there are.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import utils
from utils import Stopped, StopRequest, UserError

with utils.lazy_imports():  # the scripts need World before they know whether --help was asked for
    import torch

if TYPE_CHECKING:
    from torch import Tensor, nn

    from data_pipeline import packing


@dataclass(frozen=True)
class RankBatch:
    """One micro-batch that this rank computes, and the positions of its examples among those of the whole step."""

    plan: packing.MicroBatchPlan
    first: int  # position of its first example
    weight: int = 1  # of its losses: the world size, by which DDP and FSDP divide; 0 if computed only to keep in step
    is_last: bool = False

    @property
    def positions(self) -> slice:
        return slice(self.first, self.first + self.plan.num_examples)


def assign_to_ranks(costs: Sequence[float], size: int, in_lockstep: bool = False) -> list[list[int]]:
    """Assign micro-batches to `size` ranks so that the busiest rank has as little work as a greedy rule can give it.

    The most expensive micro-batch goes first, each to the rank with the least work so far (longest processing time
    first, at most 4/3 of the optimum: Graham 1969, doi:10.1137/0117039); ranks may get different numbers of them. With
    `in_lockstep`, where all ranks must start each one together, they are assigned round by round instead, so that those
    of one round cost about the same.

    Returns:
        For each rank the numbers of its micro-batches, most expensive first, so that memory peaks at the start.
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

    With 10 micro-batches on 4 ranks two ranks would wait; 12 smaller ones keep all busy. A few per cent are added for
    rows that do not fill up.
    """
    if size == 1 or total_tokens == 0:
        return tokens_per_batch
    rounds = -(-total_tokens // (tokens_per_batch * size))
    return min(tokens_per_batch, int(1.04 * total_tokens / (rounds * size)) + 1)


@dataclass
class World:
    """The processes of this run, as seen by one of them."""

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
        """One process of each machine runs the block first; the others then find its result (a cache, a file)."""
        if self.local_rank != 0:
            self.barrier()
        yield
        if self.local_rank == 0:
            self.barrier()

    def broadcast(self, value: Any) -> Any:
        """The main rank's `value`, on every rank."""
        if self.is_alone:
            return value
        box = [value]
        torch.distributed.broadcast_object_list(box)
        return box[0]

    def check_same_everywhere(self, settings: Mapping[str, Any]) -> None:
        """Raise UserError if the processes were not all started with the same settings, data and code."""
        if self.is_alone:
            return
        everyone = self.gather_objects(dict(settings))
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
        """The module to train, whose gradients are summed over ranks: DDP around it, or itself sharded (FSDP2).

        Make the optimizer afterwards: sharding replaces the model's parameters.
        """
        if self.is_alone:
            return model
        if not self.is_sharded:
            if not is_packed:  # an encoder's head may not use its pooler
                self.accelerator.ddp_handler.find_unused_parameters = True
            return self.accelerator.prepare_model(model)
        # Accelerate has FSDP for GPUs only, so this is PyTorch's own. Weights are gathered in fp32, as autocast wants
        # them: the numbers are those of one process.
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh(model.device.type, (self.size,))
        blocks = set(model.hf_model._no_split_modules or ())  # transformers says what belongs together
        for module in list(model.modules()):
            if type(module).__name__ in blocks:
                fully_shard(module, mesh=mesh)
        return fully_shard(model, mesh=mesh)

    @contextlib.contextmanager
    def sync_gradients(self, model: nn.Module, rank_batch: RankBatch) -> Iterator[None]:
        """Around a backward pass: DDP sums gradients over the ranks in the last one of a step only.

        FSDP2 does in every one, because a rank has room for its shard of the gradient only.
        """
        if self.is_alone or rank_batch.is_last or self.is_sharded:
            yield
        else:
            with self.accelerator.no_sync(model):
                yield

    def seed_dropout(self, seed: int, step: int) -> None:
        """Seed several processes' dropout with (seed, step, rank), so that resuming needs no stored state."""
        if not self.is_alone:
            import numpy as np

            torch.manual_seed(int(np.random.SeedSequence([seed, step, self.rank]).generate_state(1, np.uint64)[0]))

    def gather_full(self, tensor: Tensor) -> Tensor:
        """A sharded tensor, full and on the CPU; any other as it is. All ranks must call it."""
        return tensor.full_tensor().cpu() if hasattr(tensor, "full_tensor") else tensor

    def shard_like(self, tensor: Tensor, parameter: Tensor) -> Tensor:
        """This rank's shard of a full tensor, sharded as `parameter` is; the opposite of `gather_full`."""
        if not hasattr(parameter, "full_tensor"):
            return tensor.to(parameter.device)
        from torch.distributed.tensor import distribute_tensor

        return distribute_tensor(tensor.to(parameter.device), parameter.device_mesh, parameter.placements)

    # -- sharing work ----------------------------------------------------------------------------------------------

    def assign(self, plans: Sequence[packing.MicroBatchPlan], *, is_training: bool) -> list[RankBatch]:
        """This rank's micro-batches. A rank that must take part in more than it got computes one with weight 0."""
        firsts = list(itertools.accumulate((plan.num_examples for plan in plans), initial=0))
        if self.is_alone:
            return [RankBatch(plan, first) for plan, first in zip(plans, firsts, strict=False)]
        shares = assign_to_ranks([plan.cost for plan in plans], self.size, in_lockstep=self.is_sharded)
        assigned = [RankBatch(plans[number], firsts[number], self.size) for number in shares[self.rank]]
        least = max(map(len, shares)) if self.is_sharded else int(is_training)
        cheapest = min(plans, key=lambda plan: plan.cost)
        assigned += [RankBatch(cheapest, 0, weight=0)] * (least - len(assigned))
        return [*assigned[:-1], replace(assigned[-1], is_last=True)] if assigned else []

    def check(self, stop: StopRequest) -> None:
        """Raise Stopped if a stop was requested; several processes agree on that in `all_reduce` instead."""
        if self.is_alone:
            stop.check()

    def all_reduce(self, results: Tensor, stop: StopRequest) -> Tensor:
        """The sum of `results` over all ranks.

        Raises Stopped on every rank if one of them was asked to stop: a signal reaches some before others, and all must
        stop after the same step, or the slower ones would wait for the others forever.
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

    def gather_objects(self, value: Any) -> list[Any]:
        """The values of all ranks, in their order, on every rank."""
        if self.is_alone:
            return [value]
        everyone: list[Any] = [None] * self.size
        torch.distributed.all_gather_object(everyone, value)
        return everyone

    def smallest(self, number: int) -> int:
        """The minimum of a number over all ranks."""
        if self.is_alone:
            return number
        found = torch.tensor(number, device=self.accelerator.device)
        torch.distributed.all_reduce(found, torch.distributed.ReduceOp.MIN)
        return int(found)
