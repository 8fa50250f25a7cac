"""FlexAttention (arXiv 2412.05496) over packed rows on CUDA: its map of blocks, and always compiled, never dense.

Letters: B rows, T tokens per row, H query heads, K key heads, D head size, n = T / `BLOCK` rounded up, S segments.
"""

import dataclasses
import functools
import types
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from data_pipeline.packing import PackedBatch
from utils import round_up

MIN_WIDTH = 384  # tokens; it compiles separately for one block, for two, and for fewer than 128 tokens
BLOCK = 128  # tokens; blocks of BLOCK × BLOCK in which no query sees a key are skipped
MAX_FORMS = 64  # of one compiled function; a few are needed, one for each new kind of shape
FP32_SHARED_BYTES = 160 * 1024  # PyTorch's fp32 kernel for heads of 128 asks for 128 KiB: A100 and H100 have it
SMALL_FP32_KERNEL = {"fwd_BLOCK_M": 64, "fwd_BLOCK_N": 32, "fwd_num_stages": 1}  # for all other cards


def prepared(batch: PackedBatch) -> PackedBatch:
    """A micro-batch of a single row, padded to whole blocks, with the counts from which their map is made."""
    rows, width = batch.input_ids.shape
    missing = max(MIN_WIDTH, round_up(width, BLOCK)) - width if rows == 1 else 0
    padded = {
        name: torch.nn.functional.pad(getattr(batch, name), (0, missing), value=value)
        for name, value in (("input_ids", 0), ("position_ids", 0), ("example_index", -1), ("completion_index", 0))
    }
    counts = count_visible(padded["example_index"].numpy(), padded["completion_index"].numpy())
    return dataclasses.replace(batch, **padded, block_counts=torch.from_numpy(counts))


def count_visible(example_index: np.ndarray, completion_index: np.ndarray) -> np.ndarray:
    """How many pairs of a query and a key that it sees are in each block, (B, n, n) with queries on the second axis.

    Both arguments are (B, T); see `attention.packed_attention_mask`. Counted from the segments of a row, the stretches
    that are one prompt or one completion, and never token by token: T² of a wide row would be gigabytes.
    """
    rows, width = example_index.shape
    edges = np.arange(0, width, BLOCK)
    counts = np.zeros((rows, len(edges), len(edges)), dtype=np.int32)
    for row in range(rows):
        examples, completions = example_index[row], completion_index[row]
        is_start = (np.diff(examples, prepend=-2) != 0) | (np.diff(completions, prepend=0) != 0)
        starts = np.flatnonzero(is_start)  # (S,)
        ends = np.append(starts[1:], width)
        # how many tokens of each segment are in each block
        overlap = np.minimum(ends[:, None], edges + BLOCK) - np.maximum(starts[:, None], edges)
        overlap = np.maximum(overlap, 0).astype(np.float64)  # (S, n), exact: fp64 products of integers are fast
        prompts = {int(examples[start]): number for number, start in enumerate(starts) if completions[start] == 0}
        own_prompt = np.zeros_like(overlap)  # (S, n), of the prompt that a completion sees; 0 for prompts themselves
        for number, start in enumerate(starts):
            prompt = prompts.get(int(examples[start]))
            if completions[start] and prompt is not None:
                own_prompt[number] = overlap[prompt]
        seen = np.tril(overlap.T @ overlap, -1) + overlap.T @ own_prompt  # (n, n): whole rectangles
        seen[np.diag_indices(len(edges))] += (overlap * (overlap + 1) / 2).sum(axis=0)  # and triangles
        counts[row] = seen
    return counts


def block_map(counts: Tensor, example_index: Tensor, completion_index: Tensor) -> BlockMask:
    """FlexAttention's map of empty, full and partly visible blocks, from `count_visible`'s (B, n, n) counts."""

    def is_visible(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        completion = completion_index[row, key]
        is_own = (completion == 0) | (completion == completion_index[row, query])
        return (query >= key) & (example_index[row, query] == example_index[row, key]) & is_own

    def listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
        """(B, n, n) flags -> how many each row of blocks has, (B, 1, n), and which, first of all, (B, 1, n, n)."""
        columns = torch.argsort(blocks.int(), dim=-1, descending=True, stable=True)
        return blocks.sum(dim=-1, dtype=torch.int32)[:, None], columns.int()[:, None]

    is_full = counts == BLOCK * BLOCK
    width = example_index.shape[1]
    return BlockMask.from_kv_blocks(
        *listed((counts > 0) & ~is_full), *listed(is_full), BLOCK_SIZE=BLOCK, mask_mod=is_visible,
        seq_lengths=(width, width),
    )  # fmt: skip


def _compile(mode: str) -> Callable[..., Tensor]:
    """FlexAttention, compiled. Each mode has a function of its own: compiled forms are kept, and limited, by code."""

    def attend(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        return flex_attention(query, key, value, **options)

    code = attend.__code__.replace(co_name=f"attend_in_{mode}")
    own = types.FunctionType(code, attend.__globals__, code.co_name)
    own.__kwdefaults__ = attend.__kwdefaults__
    # without `dynamic`, each new width of a micro-batch would be compiled separately
    return torch.compile(own, dynamic=True)


_compiled = functools.cache(_compile)


def attend(query: Tensor, key: Tensor, value: Tensor, blocks: BlockMask, scaling: float) -> Tensor:
    """softmax(q k' · scaling) v where `blocks` lets a query see a key: (B, H, T, D) and (B, K, T, D) -> (B, H, T, D).

    On a CPU it runs uncompiled, for tests: forward only, and computing every block. On CUDA it raises RuntimeError
    where PyTorch would give up compiling and compute densely, which takes gigabytes.
    """
    options: dict[str, Any] = {
        "block_mask": blocks, "scale": scaling, "enable_gqa": query.shape[1] != key.shape[1],
        "kernel_options": kernel_options(query),
    }  # fmt: skip
    if not query.is_cuda:
        return flex_attention(query, key, value, **options)
    return run_compiled(_compiled(current_mode()), query, key, value, **options)


def run_compiled(function: Callable[..., Tensor], *inputs: Tensor, **options: Any) -> Tensor:
    """Call a compiled function with room for its forms; RuntimeError if it cannot get one more."""
    # Set at every call: recomputing under gradient checkpointing happens in a thread of autograd, and torch's settings
    # belong to a thread.
    limits = {"recompile_limit": MAX_FORMS, "fail_on_recompile_limit_hit": True}
    try:
        with torch._dynamo.config.patch(limits):
            return function(*inputs, **options)
    except torch._dynamo.exc.FailOnRecompileLimitHit as error:
        raise RuntimeError(f"FlexAttention has no compiled form left for {tuple(inputs[0].shape)}") from error


def current_mode() -> str:
    """Training, evaluating and scoring differ in what autograd notes, and need compiled forms of their own."""
    if torch.is_inference_mode_enabled():
        return "inference"
    return "training" if torch.is_grad_enabled() else "evaluation"


def kernel_options(query: Tensor) -> dict[str, Any] | None:
    """A smaller kernel where PyTorch's own choice needs more shared memory than the card has.

    https://github.com/pytorch/pytorch/issues/133254
    """
    if not query.is_cuda or query.dtype != torch.float32:
        return None
    properties = torch.cuda.get_device_properties(query.device)
    return None if properties.shared_memory_per_block_optin >= FP32_SHARED_BYTES else dict(SMALL_FP32_KERNEL)
