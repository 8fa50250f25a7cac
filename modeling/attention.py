"""Attention over packed rows: which token may attend to which, and three implementations of it.

    sdpa       transformers' own with a (B, 1, T, T) mask: works everywhere, computes masked positions too
    pieces     on a CPU: a tile of queries at a time, with only the stretches of keys that it can see
    flex       on CUDA: FlexAttention (arXiv 2412.05496), compiled, which skips masked blocks of 128 × 128

Transformers passes a 4-D mask to the attention function unchanged, so ours finds what it needs in an attribute of it.

Letters: B rows, T tokens per row, H query heads, K key heads, G = H / K, D head size, M queries and L keys of a tile.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from utils import round_up

NAME = "packed_rows"  # under which transformers knows our attention function
IMPLEMENTATIONS = ("sdpa", "pieces", "flex")
TILE_QUERIES = 128  # fewer waste less on masked keys, more keep the matrix units busy
KEY_BLOCK = 64  # stretches of keys begin and end at multiples of this
MAX_KEPT_KEYS = 2048  # weights of tiles with more keys are not kept for the backward pass, but computed again


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

    @property
    def is_kept(self) -> bool:
        return self.mask.shape[1] <= MAX_KEPT_KEYS


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

    The backward pass computes the weights of tiles with many keys again.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, tiles: list[Tile], scaling: float) -> Tensor:
        rows, heads, width, _ = query.shape
        result = query.new_zeros(rows, width, heads, value.shape[-1]).transpose(1, 2)  # (B, H, T, D)
        kept: list[Tensor] = []
        with torch.autocast("cpu", enabled=False):
            scaled32, key32 = query.float() * scaling, key.float()
            for tile in tiles:
                weights = _weights(scaled32, key32, tile).to(value.dtype)  # (K, G·M, L)
                if tile.is_kept:
                    kept.append(weights)
                mixed = torch.bmm(weights, _keys(value, tile))  # (K, G·M, D)
                result[tile.row, :, tile.queries] = mixed.view(heads, -1, mixed.shape[-1])
        ctx.save_for_backward(query, key, value, result, *kept)
        ctx.tiles, ctx.scaling = tiles, scaling
        return result

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, result, *kept = ctx.saved_tensors
        heads, key_heads, still_kept = query.shape[1], key.shape[1], iter(kept)
        grad_query = torch.zeros_like(query)
        # a key serves several tiles: its gradients are summed in fp32
        grad_key = torch.zeros_like(key, dtype=torch.float32)
        grad_value = torch.zeros_like(value, dtype=torch.float32)
        with torch.autocast("cpu", enabled=False):
            scaled32, key32 = query.float() * ctx.scaling, key.float()
            mean = (grad.float() * result).sum(dim=-1, keepdim=True)  # (B, H, T, 1)
            for tile in ctx.tiles:
                weights = next(still_kept) if tile.is_kept else _weights(scaled32, key32, tile).to(value.dtype)
                # d softmax = weights · (d weights - its weighted mean)
                grad_weights = torch.bmm(_queries(grad, tile, key_heads), _keys(value, tile).transpose(1, 2))
                grad_scores = grad_weights.float().sub_(_queries(mean, tile, key_heads)).mul_(weights).to(query.dtype)
                of_query = torch.bmm(grad_scores, _keys(key, tile))  # (K, G·M, D)
                grad_query[tile.row, :, tile.queries] = of_query.view(heads, -1, of_query.shape[-1])
                of_key = torch.bmm(grad_scores.transpose(1, 2), _queries(query, tile, key_heads))  # (K, L, D)
                of_value = torch.bmm(weights.transpose(1, 2), _queries(grad, tile, key_heads))
                _add_to_keys(grad_key, tile, of_key)
                _add_to_keys(grad_value, tile, of_value)
            grad_query.mul_(ctx.scaling)
            grad_key.mul_(ctx.scaling)
        return grad_query, grad_key.to(key.dtype), grad_value.to(value.dtype), None, None


def _queries(tensor: Tensor, tile: Tile, key_heads: int) -> Tensor:
    """(B, H, T, D) -> (K, G·M, D): heads that share keys are adjacent."""
    return tensor[tile.row, :, tile.queries].reshape(key_heads, -1, tensor.shape[-1])


def _keys(tensor: Tensor, tile: Tile) -> Tensor:
    """(B, K, T, D) -> (K, L, D)"""
    stretches = [tensor[tile.row, :, keys] for keys in tile.keys]
    return stretches[0] if len(stretches) == 1 else torch.cat(stretches, dim=1)


def _add_to_keys(total: Tensor, tile: Tile, grad: Tensor) -> None:
    parts = grad.split([keys.stop - keys.start for keys in tile.keys], dim=1)
    for keys, part in zip(tile.keys, parts, strict=True):
        total[tile.row, :, keys] += part


def _weights(scaled_query: Tensor, key: Tensor, tile: Tile) -> Tensor:
    """(K, G·M, L) attention weights of a tile; all fp32."""
    queries = _queries(scaled_query, tile, key.shape[1])
    scores = torch.bmm(queries, _keys(key, tile).transpose(1, 2))  # (K, G·M, L)
    scores.view(len(scores), -1, *tile.mask.shape).add_(tile.mask)
    return torch.softmax(scores, dim=-1)


# -- The function that transformers calls ------------------------------------------------------------------------------


class PackedMask:
    """The mask of one micro-batch in the form that each implementation needs, made when first asked for."""

    def __init__(self, example_index: Tensor, completion_index: Tensor, implementation: str):
        self.example_index, self.completion_index = example_index, completion_index
        self.implementation = implementation

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
        examples, completions = self.example_index, self.completion_index

        def is_visible(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            is_own = (completions[row, key] == 0) | (completions[row, key] == completions[row, query])
            return (query >= key) & (examples[row, query] == examples[row, key]) & is_own

        rows, width = examples.shape
        return create_block_mask(is_visible, rows, None, width, width, device=examples.device)


@functools.cache
def _flex_attention(is_cuda: bool) -> Callable[..., Tensor]:
    """FlexAttention, compiled on CUDA. On a CPU it runs uncompiled, for tests: forward only, computing every block."""
    # without `dynamic`, each new shape of a micro-batch would be compiled separately
    return torch.compile(flex_attention, dynamic=True) if is_cuda else flex_attention


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
    if packed is None or packed.implementation == "sdpa" or dropout:
        mask = attention_mask if packed is None else packed.dense
        return sdpa_attention_forward(module, query, key, value, mask, dropout, scaling, **options)
    if unknown := [name for name in ("softcap", "s_aux", "position_bias") if options.get(name) is not None]:
        raise ValueError(f"attention with {', '.join(unknown)} is not supported here")
    if torch.is_autocast_enabled(query.device.type):  # autocast does the same to the arguments of sdpa
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    if packed.implementation == "flex":
        is_grouped = query.shape[1] != key.shape[1]
        attend = _flex_attention(query.is_cuda)
        result = attend(query, key, value, block_mask=packed.blocks, scale=scaling, enable_gqa=is_grouped)
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
    if device.type == "cuda":
        return "flex"
    return "pieces" if device.type == "cpu" and torch.get_num_threads() <= 8 else "sdpa"
