"""AdamW (arXiv 1711.05101) as torch has it, fused, with moments that may stay in main memory between steps."""

from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

import utils
from training.config import TrainingConfig
from utils import UserError, is_out_of_memory

MOMENTS = ("exp_avg", "exp_avg_sq")
NUMBERS_AT_ONCE = 2**24  # of a parameter whose moments pass through the GPU: 64 MiB in fp32


class AdamW(torch.optim.AdamW):
    """Fused AdamW. After `offload` its two moments, 8 bytes a parameter, are kept in pinned main memory.

    A step then brings them to the GPU and back in parts. The arithmetic is the same, and so is every bit of the result.
    """

    is_offloaded = False

    def make_moments(self, may_offload: bool = False) -> None:
        """Take the moments' memory now, where running out of it can be answered, and not in the first step.

        Raises UserError if they do not fit the device, and `may_offload` does not allow to keep them elsewhere.
        """
        try:
            self._make_moments()
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            if not may_offload:
                raise UserError(
                    "the model and AdamW's two moments do not fit the device's memory",
                    found=utils.first_line(error),
                    next="--offload_optimizer, or --lora",
                ) from error
            self.offload()
            self._make_moments()

    def _make_moments(self) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                if not self.state[parameter]:
                    moments = {key: self.kept(torch.zeros_like(parameter)) for key in MOMENTS}
                    step = torch.zeros((), device=parameter.device if group["fused"] else "cpu")
                    self.state[parameter] = {"step": step, **moments}

    def offload(self) -> None:
        """Keep the moments in main memory from now on."""
        self.is_offloaded = True
        for state in filter(None, self.state.values()):
            state |= {key: self.kept(state[key]) for key in MOMENTS}

    def kept(self, moment: Tensor) -> Tensor:
        """A moment where it is kept: as it is, or as a copy in main memory, pinned for CUDA, which copies it faster."""
        if not self.is_offloaded:
            return moment
        return torch.empty(moment.shape, dtype=moment.dtype, pin_memory=moment.is_cuda).copy_(moment)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        if not self.is_offloaded:
            super().step(closure)
            return
        devices = set()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._step_in_parts(group, parameter)
                    devices.add(parameter.device)
        for device in devices:
            if device.type == "cuda":
                torch.cuda.synchronize(device)  # what is on its way back must be whole before anyone reads it

    def _step_in_parts(self, group: dict[str, Any], parameter: Tensor) -> None:
        state = self.state[parameter]
        flat = [
            tensor.view(-1) for tensor in (parameter, parameter.grad.contiguous(), *(state[key] for key in MOMENTS))
        ]
        for weights, gradient, *kept in zip(*(tensor.split(NUMBERS_AT_ONCE) for tensor in flat), strict=True):
            moments = [part.to(parameter.device, non_blocking=True) for part in kept]
            adamw(
                [weights], [gradient], [moments[0]], [moments[1]], [], [state["step"].clone()], fused=True,
                amsgrad=False, beta1=group["betas"][0], beta2=group["betas"][1], lr=group["lr"],
                weight_decay=group["weight_decay"], eps=group["eps"], maximize=False,
            )  # fmt: skip
            for part, moment in zip(kept, moments, strict=True):
                part.copy_(moment, non_blocking=True)
        state["step"] += 1


def make_optimizer(model: Any, config: TrainingConfig) -> AdamW:
    """AdamW over the trained parameters, in fp32 even if the published weights are bf16, as Qwen3's are.

    At a learning rate of 1e-5, bf16 would round most updates to nothing. A head with a rate of its own is a group of
    its own; `lr_scale` is a group's rate relative to that of the schedule.
    """
    trained = model.trained_parameters()
    head_lr = getattr(config, "head_lr", 0.0) or config.lr
    head = [parameter for name, parameter in trained.items() if model.is_of_head(name)]
    others = [parameter for name, parameter in trained.items() if not model.is_of_head(name)]
    groups = [{"params": others, "lr_scale": 1.0}, {"params": head, "lr_scale": head_lr / config.lr}]
    fused = model.device.type in ("cuda", "cpu")
    return AdamW(
        [group for group in groups if group["params"]], lr=config.lr, weight_decay=config.weight_decay, fused=fused
    )
