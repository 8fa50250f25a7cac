"""Sample groups of replies for training: each prompt is computed once, finished replies leave the batch.

A reply is a function of the model, its prompt and (seed, step, prompt, completion) alone: each token is drawn with a
number that a hash of these and of its position gives, by inverting the cumulative distribution. So the same replies
come however the work is cut, on however many processes, and after resuming.

Letters: N prompts, G completions of each, R replies in the batch, V vocabulary, H query heads, K key heads, D head
size, P tokens of the longest prompt.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from modeling import attention, log_probs

DRAWN_AT_ONCE = 2**23  # logits whose distribution is summed at once
BLOCK = 256  # of the vocabulary: sums of blocks are searched first, then one block
SHARE_TO_COMPACT = 0.125  # of the batch, once so many replies are finished


@dataclass
class Reply:
    """One reply as it was sampled."""

    tokens: list[int] = field(default_factory=list)  # with the one that ended it
    logprobs: list[float] = field(default_factory=list)  # of each, at the temperature of sampling
    is_finished: bool = False  # it ended by itself, and not at the limit


def uniforms(seed: int, step: int, prompts: np.ndarray, completions: np.ndarray, position: int) -> np.ndarray:
    """(R,) numbers in [0, 1), a hash of their arguments; the prompts and completions of R replies are (R,) integers.

    The finalizer of SplitMix64 (Steele et al. 2014, doi:10.1145/2714064.2660195), once for each argument.
    """
    state = np.zeros(len(prompts), np.uint64)
    with np.errstate(over="ignore"):
        for value in (seed, step, prompts, completions, position):
            state = state + np.asarray(value).astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
            state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            state ^= state >> np.uint64(31)
    return (state >> np.uint64(11)).astype(np.float64) * 2.0**-53


@torch.no_grad()
def draw(logits: Tensor, numbers: Tensor) -> tuple[Tensor, Tensor]:
    """One token for each row of fp32 logits (R, V) by the inverse of its distribution function at `numbers` (R,).

    The logits are overwritten.

    Returns ids (R,) and their log-probabilities (R,). Blocks are summed first, and their sums in double precision: a
    running sum of a large vocabulary would be many times slower, and in fp32 not exact enough.
    """
    rows, vocabulary = logits.shape
    ids, logprobs = logits.new_empty(rows, dtype=torch.int64), logits.new_empty(rows)
    size = next(size for size in (BLOCK, BLOCK // 2, BLOCK // 4, vocabulary) if vocabulary % size == 0)
    for start in range(0, rows, step := max(1, DRAWN_AT_ONCE // vocabulary)):
        part = slice(start, start + step)
        weights = logits[part]
        weights.sub_(weights.amax(dim=1, keepdim=True)).exp_()
        blocks = weights.unflatten(1, (-1, size))
        sums = blocks.sum(dim=2).double().cumsum(dim=1)  # (r, blocks)
        wanted = numbers[part, None].to(sums.dtype) * sums[:, -1:]
        block = torch.searchsorted(sums, wanted, right=True).clamp_(max=sums.shape[1] - 1)  # (r, 1)
        before = torch.where(block > 0, sums.gather(1, (block - 1).clamp_(min=0)), 0.0)
        inner = blocks[torch.arange(len(weights), device=weights.device), block[:, 0]].double().cumsum(dim=1)
        # rounding can ask for more than the block holds: then its last token that can occur
        inside = torch.searchsorted(inner, torch.minimum(wanted - before, inner[:, -1:] * (1 - 1e-12)), right=True)
        chosen = block * size + inside.clamp_(max=size - 1)
        ids[part] = chosen[:, 0]
        logprobs[part] = (weights.gather(1, chosen).double().log() - sums[:, -1:].log())[:, 0].float()
    return ids, logprobs


# -- Keys and values ---------------------------------------------------------------------------------------------------


class GroupCache:
    """Keys and values of a batch: those of each prompt once, and those of each reply.

    It is what the attention function finds in its mask; see `attention.packed_attention`.
    """

    def __init__(self, prompt_lengths: list[int], group_size: int, max_new_tokens: int, device: torch.device):
        self.prompt_lengths, self.group_size, self.max_new_tokens = prompt_lengths, group_size, max_new_tokens
        columns = torch.arange(max(prompt_lengths), device=device)
        is_padding = columns >= torch.tensor(prompt_lengths, device=device)[:, None]
        self.prompt_mask = torch.zeros(is_padding.shape, device=device).masked_fill_(is_padding, -torch.inf)  # (N, P)
        self.slots = torch.arange(len(prompt_lengths) * group_size, device=device)  # (R,) N · G places of the batch
        self.length = 0  # tokens that each reply has so far
        self.prompt_keys: dict[int, tuple[Tensor, Tensor]] = {}  # by layer, (N, K, P, D) each
        self.reply_keys: dict[int, tuple[Tensor, Tensor]] = {}  # by layer, (R, K, max_new_tokens, D) each

    def keep_prompts(self, layer: int, keys: Tensor, values: Tensor) -> None:
        """Take the prompts' keys and values (1, K, T, D), one prompt after another."""

        def padded(tensor: Tensor) -> Tensor:
            parts = tensor[0, :, : sum(self.prompt_lengths)].split(self.prompt_lengths, dim=1)
            whole = tensor.new_zeros(len(parts), tensor.shape[1], max(self.prompt_lengths), tensor.shape[3])
            for row, part in zip(whole, parts, strict=True):
                row[:, : part.shape[1]] = part
            return whole

        self.prompt_keys[layer] = padded(keys), padded(values)

    def keep_rows(self, rows: Tensor) -> None:
        """Go on with some of the replies only."""
        self.slots = self.slots[rows]
        self.reply_keys = {layer: (keys[rows], values[rows]) for layer, (keys, values) in self.reply_keys.items()}

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        """Attention of each reply's last token, (1, H, R, D) and (1, K, R, D) -> (1, H, R, D).

        The replies of a prompt look at its keys together, in one product.
        """
        heads, key_heads, size, rows = query.shape[1], key.shape[1], query.shape[3], query.shape[2]
        prompt_keys, prompt_values = self.prompt_keys[layer]
        if layer not in self.reply_keys:
            self.reply_keys[layer] = tuple(
                tensor.new_zeros(rows, key_heads, self.max_new_tokens, tensor.shape[3]) for tensor in (key, value)
            )
        keys, values = self.reply_keys[layer]
        keys[:, :, self.length], values[:, :, self.length] = key[0].transpose(0, 1), value[0].transpose(0, 1)
        keys, values = keys[:, :, : self.length + 1], values[:, :, : self.length + 1]  # (R, K, L, D)
        prompts, group, shared = len(self.prompt_lengths), self.group_size, heads // key_heads
        query = query[0].transpose(0, 1).unflatten(1, (key_heads, shared))  # (R, K, H/K, D)

        def by_prompt(tensor: Tensor) -> Tensor:
            """(R, K, H/K, X) -> (N, K, G · H/K, X), with zeros for replies that are finished"""
            placed = tensor.new_zeros(prompts * group, *tensor.shape[1:])
            placed[self.slots] = tensor
            return placed.unflatten(0, (prompts, group)).transpose(1, 2).flatten(2, 3)

        def by_reply(tensor: Tensor) -> Tensor:
            return tensor.unflatten(2, (group, shared)).transpose(1, 2).flatten(0, 1)[self.slots]

        of_prompt = (by_prompt(query) @ prompt_keys.transpose(2, 3)).float() * scaling
        of_prompt = by_reply(of_prompt + self.prompt_mask[:, None, None])  # (R, K, H/K, P)
        of_reply = (query @ keys.transpose(2, 3)).float() * scaling  # (R, K, H/K, L)
        weights = torch.cat([of_prompt, of_reply], dim=3).softmax(dim=3).to(value.dtype)
        width = of_prompt.shape[3]
        result = by_reply(by_prompt(weights[..., :width]) @ prompt_values) + weights[..., width:] @ values
        return result.reshape(rows, heads, size).transpose(0, 1)[None]


# -- Sampling ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def sample_groups(
    policy: Any,
    prompts: Sequence[np.ndarray],
    group_size: int,
    max_new_tokens: int,
    ends: set[int],
    numbers: Callable[[np.ndarray, np.ndarray, int], np.ndarray],
    check_stop: Callable[[], None] = lambda: None,
) -> list[list[Reply]]:
    """`group_size` replies to each prompt, at the policy's temperature.

    Args:
        policy: a models.PolicyModel, in evaluation mode.
        prompts: the token ids of each.
        ends: tokens that end a reply.
        numbers: gives the uniform numbers (R,) of the prompts (R,), completions (R,) and position that it is called
            with; prompts are counted from 0.
        check_stop: called before each token.
    """
    head, device = log_probs.head_of(policy.hf_model), policy.device
    count = len(prompts) * group_size
    replies = [Reply() for _ in range(count)]
    owners = np.repeat(np.arange(len(prompts)), group_size)  # (R,) of each reply, its prompt
    completions = np.tile(np.arange(group_size), len(prompts))
    lengths = np.array([len(prompt) for prompt in prompts])
    stepper = _shared_steps if policy.attention != "sdpa" and policy.packs_up_to(int(lengths.max())) else _plain_steps
    steps = stepper(policy, prompts, group_size, max_new_tokens)
    is_end = torch.zeros(len(head.weight), dtype=torch.bool, device=device)
    is_end[[end for end in ends if end < len(head.weight)]] = True
    live = np.arange(count)
    with policy.autocast(keeps_casts=True):
        hidden = next(steps)  # (R, hidden size), of the token before the next one
        for position in range(max_new_tokens):
            check_stop()
            logits = log_probs.logits_of(head, hidden.float(), policy.autocast_dtype)
            if policy.temperature != 1:
                logits /= policy.temperature
            drawn_with = torch.from_numpy(numbers(owners[live], completions[live], position)).to(device)
            ids, logprobs = draw(logits, drawn_with)
            finished = is_end[ids].cpu().numpy()
            for at, token, logprob, ended in zip(live, ids.tolist(), logprobs.tolist(), finished, strict=True):
                if not replies[at].is_finished:
                    replies[at].tokens.append(token)
                    replies[at].logprobs.append(logprob)
                    replies[at].is_finished = bool(ended)
            done = np.array([replies[at].is_finished for at in live])
            if done.all() or position == max_new_tokens - 1:
                break
            rows = None
            if done.mean() > SHARE_TO_COMPACT:
                rows = torch.from_numpy(np.flatnonzero(~done)).to(device)
                live, ids = live[~done], ids[rows]
            positions = torch.from_numpy(lengths[owners[live]] + position).to(device)
            hidden = steps.send((ids, positions, rows))
    return [replies[start : start + group_size] for start in range(0, count, group_size)]


def _shared_steps(policy: Any, prompts: Sequence[np.ndarray], group_size: int, max_new_tokens: int) -> Any:
    """A coroutine: yields hidden states (R, hidden size); is sent the drawn ids (R,), their positions (R,), and which
    rows to go on with, or None for all. Prompts are computed once, end to end in one packed row."""
    device = policy.device
    lengths = [len(prompt) for prompt in prompts]
    cache = GroupCache(lengths, group_size, max_new_tokens, device)
    ids = torch.from_numpy(np.concatenate(prompts).astype(np.int64))[None].to(device)
    places = torch.from_numpy(np.concatenate([np.arange(length) for length in lengths]))[None].to(device)
    numbers = torch.repeat_interleave(torch.arange(len(prompts)), torch.tensor(lengths))[None].to(device)
    packed = attention.PackedMask(numbers, torch.zeros_like(numbers), policy.attention)
    packed.cache, mask = cache, packed.placeholder()
    hidden = policy.backbone(input_ids=ids, attention_mask=mask, position_ids=places, use_cache=False)
    last = torch.tensor(np.cumsum(lengths) - 1, device=device)
    hidden = hidden.last_hidden_state[0, last].repeat_interleave(group_size, dim=0)
    packed.is_decoding = True
    while True:
        ids, positions, rows = yield hidden
        if rows is not None:
            cache.keep_rows(rows)
        output = policy.backbone(
            input_ids=ids[None], attention_mask=mask, position_ids=positions[None], use_cache=False
        )
        cache.length += 1
        hidden = output.last_hidden_state[0]


def _plain_steps(policy: Any, prompts: Sequence[np.ndarray], group_size: int, max_new_tokens: int) -> Any:
    """The same for architectures that cannot share prompts: transformers' own cache, of one prompt after another."""
    from transformers import DynamicCache

    caches, hidden = [], []
    for prompt in prompts:
        ids = torch.from_numpy(prompt.astype(np.int64))[None].to(policy.device).expand(group_size, -1)
        output = policy.backbone(input_ids=ids, use_cache=True, past_key_values=DynamicCache(config=policy.text_config))
        caches.append(output.past_key_values)
        hidden.append(output.last_hidden_state[:, -1])
    slots = torch.arange(len(prompts) * group_size, device=policy.device)
    last = torch.zeros(len(slots), dtype=torch.int64, device=policy.device)
    while True:
        ids, _, rows = yield torch.cat(hidden)[slots]
        slots = slots if rows is None else slots[rows]
        last[slots] = ids
        for number, cache in enumerate(caches):  # finished replies stay in the batch of their prompt
            mine = slice(number * group_size, (number + 1) * group_size)
            if not ((slots >= mine.start) & (slots < mine.stop)).any():
                continue
            output = policy.backbone(input_ids=last[mine, None], use_cache=True, past_key_values=cache)
            hidden[number] = output.last_hidden_state[:, -1]
