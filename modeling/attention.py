"""Attention over packed rows: which token may attend to which, and three implementations of it.

    sdpa       transformers' own with a (B, 1, T, T) mask: works everywhere, computes masked positions too
    pieces     on a CPU: a tile of queries at a time, with only the stretches of keys that it can see
    flex       on CUDA: FlexAttention (arXiv 2412.05496), compiled, which skips masked blocks of 128 × 128

Transformers passes a 4-D mask to the attention function unchanged, so ours finds what it needs in an attribute of it.

Letters: B rows, T tokens per row, H query heads, K key heads, G = H / K, D head size, M queries and L keys of a tile.
"""

import functools
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from modeling import devices, flex
from utils import first_line, round_up

NAME = "packed_rows"  # under which transformers knows our attention function
IMPLEMENTATIONS = ("sdpa", "pieces", "flex")
TILE_QUERIES = 128  # fewer waste less on masked keys, more keep the matrix units busy
KEY_BLOCK = 64  # stretches of keys begin and end at multiples of this
FLEX_TRIAL_WIDTHS = (flex.MIN_WIDTH, 640)  # tokens, as in training
FLEX_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 1.5e-2}  # relative to the norm; bf16 itself rounds by 0.4 %
TF32_TOLERANCE = 3e-3
SMALLEST_EXPONENT = -50.0  # of a weight, which is 2e-22 then: below 1e-38 processors compute ten times slower


def packed_attention_mask(example_index: Tensor, completion_index: Tensor) -> Tensor:
    """A token sees the earlier tokens of its example's prompt and of its own completion, and itself.

    Args:
        example_index: (B, T), which example a token belongs to; -1 is padding (it sees padding, so no row is empty).
        completion_index: (B, T), 0 in the shared prompt, 1 to k in the completions.

    Returns:
        (B, 1, T, T), True where the query (third axis) may attend to the key (fourth axis).

    Example, one row `[p c r]` (a prompt and two completions): c sees p and c; r sees p and r, never c.
    """
    same_example = example_index[:, :, None] == example_index[:, None, :]
    key, query = completion_index[:, None, :], completion_index[:, :, None]
    causal = torch.ones(example_index.shape[1:] * 2, dtype=torch.bool, device=example_index.device).tril()
    return (same_example & ((key == 0) | (key == query)) & causal)[:, None]  # (B, 1, T, T)


# -- In tiles, on a CPU ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tile:
    """Some queries of one row, and stretches of keys that hold all the keys they see."""

    row: int
    queries: slice  # M columns
    keys: tuple[slice, ...]  # L columns: one stretch, or two with skipped completions between them
    mask: Tensor  # (M, L), 0 where the query sees the key, else -inf
    _masks: dict[torch.dtype, Tensor] = field(default_factory=dict)

    def mask_in(self, dtype: torch.dtype) -> Tensor:
        return self._masks.setdefault(dtype, self.mask.to(dtype))


def make_tiles(example_index: Tensor, completion_index: Tensor) -> list[Tile]:
    """The tiles of a micro-batch: `TILE_QUERIES` columns of a row, with the keys from their first example's start on.

    A tile that begins in completion j skips the keys of completions 1 to j - 1. Stretches of keys begin and end at
    multiples of `KEY_BLOCK`, so there are few shapes: oneDNN compiles a kernel for each new one, which takes longer
    than running it, and keeps hundreds of them. Tiles of padding alone are skipped.
    """
    tiles = []
    rows = zip(example_index.cpu().numpy(), completion_index.cpu().numpy(), strict=True)
    for row, (examples, completions) in enumerate(rows):  # (T,) each
        columns = np.arange(len(examples))
        is_start = np.diff(examples, prepend=-2) != 0
        starts = np.maximum.accumulate(np.where(is_start, columns, 0))  # (T,) where each token's example begins
        for first in range(0, len(examples), TILE_QUERIES):
            if examples[first] < 0:  # padding is at the end of a row
                break
            queries = slice(first, min(first + TILE_QUERIES, len(examples)))
            start = int(starts[first])
            keys: tuple[slice, ...] = (slice(start - start % KEY_BLOCK, queries.stop),)
            # the completion indices of an example ascend, 0 in its prompt
            ends = start + np.searchsorted(completions[start : first + 1], (1, completions[first]))
            prompt_end, own_start = (int(end) for end in ends)
            skipped = slice(round_up(prompt_end, KEY_BLOCK), own_start // KEY_BLOCK * KEY_BLOCK)
            if skipped.start < skipped.stop:
                keys = (slice(keys[0].start, skipped.start), slice(skipped.stop, queries.stop))
            seen = np.concatenate([columns[stretch] for stretch in keys])  # (L,)
            visible = (examples[queries, None] == examples[seen]) & (columns[queries, None] >= seen)
            visible &= (completions[seen] == 0) | (completions[queries, None] == completions[seen])
            mask = torch.zeros(visible.shape).masked_fill_(torch.from_numpy(~visible), -torch.inf)
            tiles.append(Tile(row, queries, keys, mask))
    return tiles


class _TileAttention(torch.autograd.Function):
    """softmax(q k' · scaling) v over tiles, in the dtype of its arguments except scores and softmax, which are fp32.

    Forward is PyTorch's flash attention for CPUs, tile by tile. Its backward pass would take twice the time of this
    one, which computes the weights again from the kept logarithms of their sums.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, tiles: list[Tile], scaling: float) -> Tensor:
        rows, heads, width, _ = query.shape
        key_heads = key.shape[1]
        result = query.new_zeros(rows, width, heads, value.shape[-1]).transpose(1, 2)  # (B, H, T, D)
        log_sums = []  # of each tile, (K, G, M) in fp32
        for tile in tiles:
            keys, values = (_keys(tensor, tile)[:, None] for tensor in (key, value))  # (K, 1, L, D)
            group = heads // key_heads
            part, log_sum = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                _queries(query, tile, key_heads), keys.expand(-1, group, -1, -1), values.expand(-1, group, -1, -1),
                attn_mask=tile.mask_in(query.dtype)[None, None], scale=scaling,
            )  # fmt: skip
            _queries(result, tile, key_heads).copy_(part)
            log_sums.append(log_sum)
        ctx.save_for_backward(query, key, value, result, *log_sums)
        ctx.tiles, ctx.scaling = tiles, scaling
        return result

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, result, *log_sums = ctx.saved_tensors
        key_heads, dtype = key.shape[1], query.dtype
        grad_query = torch.zeros_like(query)
        # a key serves several tiles: its gradients are summed in fp32
        grad_key = torch.zeros_like(key, dtype=torch.float32)
        grad_value = torch.zeros_like(value, dtype=torch.float32)
        with torch.autocast("cpu", enabled=False), devices.products_in(dtype):  # loses nothing: they are bf16
            for tile, log_sum in zip(ctx.tiles, log_sums, strict=True):
                queries, grads, results = (
                    _queries(tensor, tile, key_heads).flatten(1, 2) for tensor in (query, grad, result)
                )  # (K, G·M, D)
                keys, values = _keys(key, tile), _keys(value, tile)  # (K, L, D)
                grads32 = grads.float()
                mean = (grads32 * results.float()).sum(dim=-1, keepdim=True)  # (K, G·M, 1)
                # scaled afterwards: scaled queries would be more than bf16 holds
                weights = torch.bmm(queries.float(), keys.float().transpose(1, 2)).mul_(ctx.scaling)  # (K, G·M, L)
                weights.view(*log_sum.shape, -1).add_(tile.mask).sub_(log_sum[..., None])
                weights.clamp_(min=SMALLEST_EXPONENT).exp_()
                # d softmax = weights · (d weights - its weighted mean)
                grad_scores = torch.bmm(grads32, values.float().transpose(1, 2)).sub_(mean).mul_(weights).to(dtype)
                of_query = torch.bmm(grad_scores, keys)  # (K, G·M, D)
                _queries(grad_query, tile, key_heads).copy_(of_query.view(*log_sum.shape, -1))
                _add_to_keys(grad_key, tile, torch.bmm(grad_scores.transpose(1, 2), queries))  # (K, L, D)
                _add_to_keys(grad_value, tile, torch.bmm(weights.to(dtype).transpose(1, 2), grads))
            grad_query.mul_(ctx.scaling)
            grad_key.mul_(ctx.scaling)
        return grad_query, grad_key.to(key.dtype), grad_value.to(value.dtype), None, None


def _queries(tensor: Tensor, tile: Tile, key_heads: int) -> Tensor:
    """(B, H, T, D) -> (K, G, M, D), a view: heads that share keys are adjacent."""
    return tensor[tile.row, :, tile.queries].unflatten(0, (key_heads, -1))


def _keys(tensor: Tensor, tile: Tile) -> Tensor:
    """(B, K, T, D) -> (K, L, D), contiguous"""
    return torch.cat([tensor[tile.row, :, keys] for keys in tile.keys], dim=1)


def _add_to_keys(total: Tensor, tile: Tile, grad: Tensor) -> None:
    parts = grad.split([keys.stop - keys.start for keys in tile.keys], dim=1)
    for keys, part in zip(tile.keys, parts, strict=True):
        total[tile.row, :, keys] += part


# -- The function that transformers calls ------------------------------------------------------------------------------


class PackedMask:
    """The mask of one micro-batch in the form that each implementation needs, made when first asked for."""

    def __init__(
        self, example_index: Tensor, completion_index: Tensor, implementation: str, block_counts: Tensor | None = None
    ):
        """`example_index` and `completion_index` are (B, T); `block_counts` is what `flex.count_visible` gives."""
        self.example_index, self.completion_index = example_index, completion_index
        self.implementation, self.block_counts = implementation, block_counts
        self.cache: Any = None  # a sampling.GroupCache, which takes the keys of prompts
        self.is_decoding = False  # and once it has them answers each reply's next token

    def placeholder(self) -> Tensor:
        """The `attention_mask` to hand to a model whose attention function is ours."""
        # It is empty so that an architecture that computes with its mask fails, and gets a dense one, instead of
        # computing something wrong.
        mask = torch.empty((len(self.example_index), 1, 0, 0), dtype=torch.bool, device=self.example_index.device)
        mask.packed = self
        return mask

    @functools.cached_property
    def dense(self) -> Tensor:
        return packed_attention_mask(self.example_index, self.completion_index)

    @functools.cached_property
    def tiles(self) -> list[Tile]:
        return make_tiles(self.example_index, self.completion_index)

    @functools.cached_property
    def blocks(self) -> Any:
        """FlexAttention's map of 128 × 128 blocks: empty, full, or partly masked."""
        counts = self.block_counts
        if counts is None:
            indices = (self.example_index.cpu().numpy(), self.completion_index.cpu().numpy())
            counts = torch.from_numpy(flex.count_visible(*indices)).to(self.example_index.device)
        return flex.block_map(counts, self.example_index, self.completion_index)


@torch.compiler.disable
def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **options: Any,
) -> tuple[Tensor, None]:
    """An attention function of transformers: (B, H, T, D) and (B, K, T, D) -> (B, T, H, D)."""
    packed = getattr(attention_mask, "packed", None)
    # our own implementations have no dropout of attention weights
    if packed is None or packed.implementation in ("sdpa", "dense") or dropout:
        mask = attention_mask if packed is None else packed.dense
        return sdpa_attention_forward(module, query, key, value, mask, dropout, scaling, **options)
    if unknown := [name for name in ("softcap", "s_aux", "position_bias") if options.get(name) is not None]:
        raise ValueError(f"attention with {', '.join(unknown)} is not supported here")
    if torch.is_autocast_enabled(query.device.type):  # autocast does the same to the arguments of sdpa
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    if packed.cache is not None and not packed.is_decoding:
        packed.cache.keep_prompts(module.layer_idx, key, value)
    if packed.is_decoding:
        result = packed.cache.attend(module.layer_idx, query, key, value, scaling)
    elif packed.implementation == "flex":
        result = flex.attend(query, key, value, packed.blocks, scaling)
    else:
        result = _TileAttention.apply(query, key, value, packed.tiles, scaling)
    return result.transpose(1, 2).contiguous(), None  # (B, T, H, D)


def install(classifier: nn.Module) -> bool:
    """Make a transformers model call our attention function; False if its architecture does not allow that.

    Saved configurations never name an attention function, so files do not change.
    """
    AttentionInterface.register(NAME, packed_attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)  # for masks that are not ours
    if classifier.config._attn_implementation != "sdpa" or not classifier._can_set_attn_implementation():
        return classifier.config._attn_implementation == NAME
    classifier.set_attn_implementation(NAME)
    return True


def best_implementation(device: torch.device) -> str:
    """The fastest on a device. Tiles are too small to keep more than a few CPU threads busy."""
    if device.type == "cuda":  # before Ampere, PyTorch would not compile it for bf16, and compute densely instead
        return "flex" if torch.cuda.get_device_capability(device) >= devices.AMPERE else "sdpa"
    return "pieces" if device.type == "cpu" and torch.get_num_threads() <= 8 else "sdpa"


def try_flex(
    heads: int, key_heads: int, head_size: int, device: torch.device, dtype: torch.dtype, backward: bool
) -> str:
    """Why FlexAttention does not compute what sdpa does under the dense mask, "" if it does: tried, not assumed.

    Of one row, in `dtype`, as training uses it; with `backward` its gradients too. Each combination of card, head size
    and dtype has a kernel of its own, and may fail to compile, or to fit the card, in a way of its own.
    """
    draw = torch.Generator().manual_seed(0)
    is_tf32 = dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32
    tolerance, differences = TF32_TOLERANCE if is_tf32 else FLEX_TOLERANCE[dtype], {}
    try:
        for width in FLEX_TRIAL_WIDTHS:
            lengths = torch.tensor([40, 70, width - 110 - width // 4, 30, width // 4 - 30])  # a prompt and four
            completion_index = torch.repeat_interleave(torch.tensor([0, 1, 2, 0, 1]), lengths)[None].to(device)
            example_index = torch.repeat_interleave(torch.tensor([0, 0, 0, 1, 1]), lengths)[None].to(device)
            packed = PackedMask(example_index, completion_index, "flex")
            inputs = [
                torch.randn(1, width, count, head_size, generator=draw).to(device, dtype).transpose(1, 2)
                for count in (heads, key_heads, key_heads, heads)
            ]
            *inputs, grad = (tensor.requires_grad_(backward) for tensor in inputs)  # as transformers hands them over
            exact = [tensor.detach().float().requires_grad_(backward) for tensor in inputs]
            with torch.set_grad_enabled(backward), torch.autocast(device.type, enabled=False):
                got = [flex.attend(*inputs, packed.blocks, head_size**-0.5)]
                wanted = [scaled_dot_product_attention(*exact, packed.dense, enable_gqa=True)]
            if backward:
                got += torch.autograd.grad(got[0], inputs, grad)
                wanted += torch.autograd.grad(wanted[0], exact, grad.float())
            for name, ours, theirs in zip(("result", "dq", "dk", "dv"), got, wanted, strict=False):
                difference = float((ours.float() - theirs).norm() / theirs.norm())
                differences[name] = max(differences.get(name, 0.0), difference)
    except Exception as error:  # the errors of compilers, of dynamo and of drivers have no common class
        return f"it does not run here ({type(error).__name__}: {first_line(error)})"
    worst = max(differences, key=lambda name: differences[name])
    if differences[worst] <= tolerance:
        return ""
    return f"its {worst} differs from sdpa's by {differences[worst]:.2g} of the norm, {tolerance:g} is allowed"
