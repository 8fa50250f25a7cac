"""Norms and gated MLPs of decoder layers with fewer passes over memory, and less of it kept for the backward pass.

Autograd keeps every intermediate result of a norm, in fp32, and under autocast each of the matrix products behind it
casts the norm's output anew. Here a norm keeps its input only and casts its output once; a gated MLP keeps its two
halves. Results are the same up to the order of rounding.

On a CPU. On CUDA `--compile` does more, and that is where the time is spent.

Letters: B rows, T tokens per row, D hidden size, I intermediate size.
"""

import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

NUMBERS_IN_CACHE = 2**20  # of 2 or 4 bytes, in the second-level caches of a few cores
TOLERANCE = 1e-5  # of a layer's own results and gradients, in fp32, relative to the norm


class _RMSNorm(torch.autograd.Function):
    """x / sqrt(mean(x²) + eps) · weight over the last dimension (arXiv 1910.07467), computed in fp32."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)  # (B, T, 1)
        scale = torch.rsqrt(norm.square_().div_(x.shape[-1]).add_(eps))
        ctx.save_for_backward(x, weight, scale)
        return (x * scale).mul_(weight).to(dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, scale = ctx.saved_tensors
        grad, normed = grad.float(), x * scale
        of_product = grad * normed  # (B, T, D)
        of_weight = of_product.sum(dim=tuple(range(x.dim() - 1))) if ctx.needs_input_grad[1] else None
        mean = (of_product @ weight).div_(x.shape[-1])[..., None]  # (B, T, 1)
        grad = (grad * weight).addcmul_(normed, mean, value=-1).mul_(scale)
        return grad.to(x.dtype), of_weight, None, None


class _GatedSilu(torch.autograd.Function):
    """silu(gate) · up (SwiGLU, arXiv 2002.05202); silu is computed again for the backward pass."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        result = torch.empty_like(gate)
        for part in _parts(gate):
            torch.mul(silu(gate[part]), up[part], out=result[part])
        return result

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        of_gate, of_up = torch.empty_like(gate), torch.empty_like(up)
        for part in _parts(gate):
            torch.ops.aten.silu_backward.grad_input(grad[part] * up[part], gate[part], grad_input=of_gate[part])
            torch.mul(silu(gate[part]), grad[part], out=of_up[part])
        return of_gate, of_up


def _parts(tensor: Tensor) -> list[tuple[slice, slice]]:
    """Parts of (B, T, I) that stay in a processor's cache from one operation to the next."""
    rows, width, size = tensor.shape
    step = max(1, NUMBERS_IN_CACHE // size)  # columns
    return [(slice(row, row + 1), slice(first, first + step)) for row in range(rows) for first in range(0, width, step)]


def rms_norm(norm: Any, x: Tensor) -> Tensor:
    """Instead of the forward of a norm whose output goes to matrix products only."""
    is_cast = torch.is_autocast_enabled(x.device.type)
    dtype = torch.get_autocast_dtype(x.device.type) if is_cast else x.dtype
    return _RMSNorm.apply(x, norm.weight, norm.variance_epsilon, dtype)


def gated_mlp(mlp: Any, x: Tensor) -> Tensor:
    """Instead of the forward of an MLP with a gate."""
    return mlp.down_proj(_GatedSilu.apply(mlp.gate_proj(x), mlp.up_proj(x)))


def fuse_layers(model: Any) -> int:
    """Use these in the decoder layers of a model where they compute what the layer does; returns in how many.

    Those of Llama, Mistral, Qwen 2 and 3 and their like: `x + attention(norm(x))`, then `x + mlp(norm(x))`.
    """
    kinds = model.hf_model._no_split_modules or ()
    layers = [module for module in model.backbone.modules() if type(module).__name__ in kinds]
    count = 0
    for layer in layers:
        replaced = {}
        for name in ("input_layernorm", "post_attention_layernorm"):
            if is_rms_norm(norm := getattr(layer, name, None)):
                replaced[norm] = functools.partial(rms_norm, norm)
        if is_gated_mlp(mlp := getattr(layer, "mlp", None)):
            replaced[mlp] = functools.partial(gated_mlp, mlp)
        if len(replaced) < 3 or hasattr(layer, "pre_feedforward_layernorm"):
            continue
        for module, forward in replaced.items():
            module.forward = forward
        count += 1
    return count


def is_rms_norm(module: Any) -> bool:
    """Whether a module computes what `_RMSNorm` does: tried, because some add 1 to their weight or cast before it."""
    if not all(hasattr(module, name) for name in ("weight", "variance_epsilon")):
        return False
    return _agree(module, functools.partial(rms_norm, module), module.weight)


def is_gated_mlp(module: Any) -> bool:
    """The same of an MLP."""
    if not all(hasattr(module, name) for name in ("gate_proj", "up_proj", "down_proj")):
        return False
    return _agree(module, functools.partial(gated_mlp, module), next(module.down_proj.parameters()))


@torch.no_grad()
def _agree(module: nn.Module, ours: Any, weight: Tensor) -> bool:
    # the last dimension of a norm's weight, or of the output of an MLP, is the hidden size
    width = weight.shape[0]
    x = torch.linspace(-2, 2, 3 * width, device=weight.device, dtype=torch.float32).sin_().view(1, 3, width)
    was_training = module.training
    module.eval()  # dropout in adapters of an MLP would make any two results differ
    try:
        wanted, got = module(x), ours(x)
    except (RuntimeError, TypeError, ValueError, AttributeError):
        return False
    finally:
        module.train(was_training)
    return bool((got - wanted).norm() <= TOLERANCE * wanted.norm())
