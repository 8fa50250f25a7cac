"""Attention over packed pairs: who may look at whom, and three ways to compute it.

    sdpa       transformers' own, with a (B, 1, T, T) mask: works everywhere, computes what is hidden as well
    pieces     on a CPU: a stretch of a row at a time, with only the keys among which it sees any
    flex       on CUDA: FlexAttention (arXiv 2412.05496), compiled, which skips hidden blocks of 128 × 128

Transformers lets a 4-D mask through to the attention function untouched; ours hangs what it needs on one.

Letters: B rows, T tokens per row, H query heads, K key heads, G = H / K, D head size, M queries and L keys of a piece.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

NAME = "packed_pairs"  # of our attention function among those of transformers
WAYS = ("sdpa", "pieces", "flex")
QUERIES = 128  # of a row computed at once: fewer see less that is hidden, more fill the matrix units
KEYS = 64  # stretches of keys begin and end at multiples of this
MOST_KEPT = 2048  # keys of a piece whose weights are kept for the backward pass; of longer ones they would fill memory


def pair_attention_mask(pair_ids: Tensor, branch_ids: Tensor) -> Tensor:
    """Who may look at whom when pairs share rows: causal, same pair, and the key in the prefix or in one's own branch.

    Args:
        pair_ids: (B, T), which pair a token belongs to; -1 is padding (it sees padding only, so no row is empty).
        branch_ids: (B, T), 0 for the shared prefix, 1 and 2 for the two tails.

    Returns:
        (B, 1, T, T), True where the query (third axis) may attend to the key (fourth axis).

    Example, one row `[p c r]` (prefix, chosen tail, rejected tail): c sees p and c; r sees p and r, never c.
    """
    same_pair = pair_ids[:, :, None] == pair_ids[:, None, :]
    key_branch, query_branch = branch_ids[:, None, :], branch_ids[:, :, None]
    visible = (key_branch == 0) | (key_branch == query_branch)
    causal = torch.ones(pair_ids.shape[1], pair_ids.shape[1], dtype=torch.bool, device=pair_ids.device).tril()
    return (same_pair & visible & causal)[:, None]  # (B, 1, T, T)


class PackedMask:
    """What one micro-batch's attention layers need to know, each form made once, when it is first asked for."""

    def __init__(self, pair_ids: Tensor, branch_ids: Tensor, way: str):
        self.pair_ids, self.branch_ids, self.way = pair_ids, branch_ids, way

    def carrier(self) -> Tensor:
        """The `attention_mask` to hand to a model whose attention function is ours."""
        # Empty, so that an architecture that computes with its mask fails (and gets a dense one) rather than errs.
        mask = torch.empty((len(self.pair_ids), 1, 0, 0), dtype=torch.bool, device=self.pair_ids.device)
        mask.packed = self
        return mask

    @functools.cached_property
    def dense(self) -> Tensor:
        return pair_attention_mask(self.pair_ids, self.branch_ids)

    @functools.cached_property
    def pieces(self) -> list[Piece]:
        return pieces_of(self.pair_ids, self.branch_ids)

    @functools.cached_property
    def blocks(self) -> Any:
        """Flex's map of 128 × 128 blocks: empty, full, or to be masked one by one."""
        from torch.nn.attention.flex_attention import create_block_mask

        pair_ids, branch_ids = self.pair_ids, self.branch_ids

        def is_visible(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            key_branch = branch_ids[row, key]
            own_branch = (key_branch == 0) | (key_branch == branch_ids[row, query])
            return (query >= key) & (pair_ids[row, query] == pair_ids[row, key]) & own_branch

        rows, width = pair_ids.shape
        return create_block_mask(is_visible, rows, None, width, width, device=pair_ids.device)


# ---------------------------------------------------------------------------------------------------------------------
# In pieces, on a CPU
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Piece:
    """Some queries of one row, and the keys among which all lie that they see."""

    row: int
    queries: slice  # M columns
    keys: tuple[slice, ...]  # L columns: one stretch, or two with a chosen tail between them left out
    hidden: Tensor  # (M, L), 0 where the query sees the key, else -inf

    @property
    def is_kept(self) -> bool:
        return self.hidden.shape[1] <= MOST_KEPT


def pieces_of(pair_ids: Tensor, branch_ids: Tensor) -> list[Piece]:
    """The pieces of a micro-batch: `QUERIES` columns of a row, with the keys from their first pair's start on.

    Stretches of keys begin and end at multiples of `KEYS`, so that there are few shapes: oneDNN compiles a kernel for
    each new one, which takes longer than running it, and keeps hundreds of them. Where all is padding, no piece is.
    """
    pieces = []
    for row, (pairs, branches) in enumerate(zip(pair_ids.cpu().numpy(), branch_ids.cpu().numpy(), strict=True)):
        columns = np.arange(len(pairs))
        is_start = np.diff(pairs, prepend=-2) != 0
        starts = np.maximum.accumulate(np.where(is_start, columns, 0))  # (T,) where each token's pair begins
        for first in range(0, len(pairs), QUERIES):
            queries = slice(first, min(first + QUERIES, len(pairs)))
            if pairs[first] < 0:  # padding is at the end of a row
                break
            start = int(starts[first])
            keys: tuple[slice, ...] = (slice(start - start % KEYS, queries.stop),)
            if starts[queries.stop - 1] == start and branches[first] == 2:
                prefix, chosen = np.searchsorted(branches[start : queries.stop], (1, 2))
                hole = slice(_up(start + int(prefix)), (start + int(chosen)) // KEYS * KEYS)
                if hole.start < hole.stop:
                    keys = (slice(keys[0].start, hole.start), slice(hole.stop, queries.stop))
            seen = np.concatenate([columns[stretch] for stretch in keys])  # (L,)
            visible = (pairs[queries, None] == pairs[seen]) & (columns[queries, None] >= seen)
            visible &= (branches[seen] == 0) | (branches[queries, None] == branches[seen])
            hidden = torch.zeros(visible.shape).masked_fill_(torch.from_numpy(~visible), -torch.inf)
            pieces.append(Piece(row, queries, keys, hidden))
    return pieces


def _up(column: int) -> int:
    return -(-column // KEYS) * KEYS


class _PieceAttention(torch.autograd.Function):
    """softmax(q k' · scaling) v over pieces, in the dtype of its arguments but for scores and softmax, which are fp32.

    The backward pass computes the weights of long pieces anew.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, pieces: list[Piece], scaling: float) -> Tensor:
        rows, heads, width, _ = query.shape
        result = query.new_zeros(rows, width, heads, value.shape[-1]).transpose(1, 2)  # (B, H, T, D)
        kept: list[Tensor] = []
        with torch.autocast("cpu", enabled=False):
            scaled32, key32 = query.float() * scaling, key.float()
            for piece in pieces:
                weights = _weights(scaled32, key32, piece).to(value.dtype)  # (K, G·M, L)
                if piece.is_kept:
                    kept.append(weights)
                mixed = torch.bmm(weights, _keys(value, piece))  # (K, G·M, D)
                result[piece.row, :, piece.queries] = mixed.view(heads, -1, mixed.shape[-1])
        ctx.save_for_backward(query, key, value, result, *kept)
        ctx.pieces, ctx.scaling = pieces, scaling
        return result

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, result, *kept = ctx.saved_tensors
        heads, key_heads, still_kept = query.shape[1], key.shape[1], iter(kept)
        grad_query = torch.zeros_like(query)
        # a key serves several pieces: its gradients are summed in fp32
        grad_key = torch.zeros_like(key, dtype=torch.float32)
        grad_value = torch.zeros_like(value, dtype=torch.float32)
        with torch.autocast("cpu", enabled=False):
            scaled32, key32 = query.float() * ctx.scaling, key.float()
            mean = (grad.float() * result).sum(dim=-1, keepdim=True)  # (B, H, T, 1)
            for piece in ctx.pieces:
                weights = next(still_kept) if piece.is_kept else _weights(scaled32, key32, piece).to(value.dtype)
                # d softmax = weights · (d weights - its weighted mean)
                grad_weights = torch.bmm(_queries(grad, piece, key_heads), _keys(value, piece).transpose(1, 2))
                grad_scores = grad_weights.float().sub_(_queries(mean, piece, key_heads)).mul_(weights).to(query.dtype)
                of_query = torch.bmm(grad_scores, _keys(key, piece))  # (K, G·M, D)
                grad_query[piece.row, :, piece.queries] = of_query.view(heads, -1, of_query.shape[-1])
                of_key = torch.bmm(grad_scores.transpose(1, 2), _queries(query, piece, key_heads))  # (K, L, D)
                of_value = torch.bmm(weights.transpose(1, 2), _queries(grad, piece, key_heads))
                _add_to_keys(grad_key, piece, of_key)
                _add_to_keys(grad_value, piece, of_value)
            grad_query.mul_(ctx.scaling)
            grad_key.mul_(ctx.scaling)
        return grad_query, grad_key.to(key.dtype), grad_value.to(value.dtype), None, None


def _queries(tensor: Tensor, piece: Piece, key_heads: int) -> Tensor:
    """(B, H, T, D) -> (K, G·M, D): heads that share keys lie one after another."""
    return tensor[piece.row, :, piece.queries].reshape(key_heads, -1, tensor.shape[-1])


def _keys(tensor: Tensor, piece: Piece) -> Tensor:
    """(B, K, T, D) -> (K, L, D)"""
    stretches = [tensor[piece.row, :, keys] for keys in piece.keys]
    return stretches[0] if len(stretches) == 1 else torch.cat(stretches, dim=1)


def _add_to_keys(total: Tensor, piece: Piece, grad: Tensor) -> None:
    done = 0
    for keys in piece.keys:
        length = keys.stop - keys.start
        total[piece.row, :, keys] += grad[:, done : done + length]
        done += length


def _weights(scaled_query: Tensor, key: Tensor, piece: Piece) -> Tensor:
    """(K, G·M, L) attention weights of a piece; all fp32."""
    queries = _queries(scaled_query, piece, key.shape[1])
    scores = torch.bmm(queries, _keys(key, piece).transpose(1, 2))  # (K, G·M, L)
    scores.view(len(scores), -1, *piece.hidden.shape).add_(piece.hidden)
    return torch.softmax(scores, dim=-1)


# ---------------------------------------------------------------------------------------------------------------------
# The function that transformers calls
# ---------------------------------------------------------------------------------------------------------------------


@functools.cache
def _compiled_flex() -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    # eager flex computes every block; and without `dynamic` each new shape of a micro-batch would compile again
    return torch.compile(flex_attention, dynamic=True)


def flex(query: Tensor, key: Tensor, value: Tensor, blocks: Any, scaling: float) -> Tensor:
    """(B, H, T, D), skipping blocks in which nothing is visible. On a CPU uncompiled, for tests: forward only."""
    from torch.nn.attention.flex_attention import flex_attention

    run = _compiled_flex() if query.is_cuda else flex_attention
    return run(query, key, value, block_mask=blocks, scale=scaling, enable_gqa=query.shape[1] != key.shape[1])


@torch.compiler.disable
def packed_pairs_attention(
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
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    packed = getattr(attention_mask, "packed", None)
    # neither way has dropout of attention weights
    if packed is None or packed.way == "sdpa" or dropout:
        mask = attention_mask if packed is None else packed.dense
        return sdpa_attention_forward(module, query, key, value, mask, dropout, scaling, **options)
    if unknown := [name for name in ("softcap", "s_aux", "position_bias") if options.get(name) is not None]:
        raise ValueError(f"attention with {', '.join(unknown)} is not computed here")
    if torch.is_autocast_enabled(query.device.type):  # as sdpa's arguments are
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    if packed.way == "flex":
        result = flex(query, key, value, packed.blocks, scaling)
    else:
        result = _PieceAttention.apply(query, key, value, packed.pieces, scaling)
    return result.transpose(1, 2).contiguous(), None  # (B, T, H, D)


def install(classifier: nn.Module) -> bool:
    """Have a transformers model call our attention function; False if its architecture does not ask which to call.

    Saved configurations never name an attention function, so files stay the stock ones.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, packed_pairs_attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)  # for masks that are not ours
    if classifier.config._attn_implementation != "sdpa" or not classifier._can_set_attn_implementation():
        return classifier.config._attn_implementation == NAME
    classifier.set_attn_implementation(NAME)
    return True


def way_for(device: torch.device) -> str:
    """What pays on a device. Pieces are small, and more than a few threads would wait for one another."""
    if device.type == "cuda":
        return "flex"
    return "pieces" if device.type == "cpu" and torch.get_num_threads() <= 8 else "sdpa"
