"""Rewards for many token sequences, packed as in training, with a token budget that shrinks if memory runs out.

Sequences are scored in pairs that share their beginning, which is computed once. An odd one is paired with itself,
which costs one token more.

Letters: N pairs.
"""

import contextlib
import functools
import hashlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

import utils
from common.prefetch import prefetched
from data_pipeline import packing
from data_pipeline.tokenization import TokenizedGroup, longest_sequences, shared_prefix
from modeling import devices, fused, speedups
from utils import UserError


class TokenPairs:
    """Pairs of token sequences in memory, with what `packing.Examples` wants."""

    def __init__(self, pairs: list[tuple[np.ndarray, np.ndarray]]):
        self._pairs = pairs
        prefixes = [shared_prefix(first, second) for first, second in pairs]
        completions = [(p, len(a) - p, len(b) - p) for p, (a, b) in zip(prefixes, pairs, strict=True)]
        self.lengths = np.array(completions, dtype=np.int32)  # (N, 3)

    def __len__(self) -> int:
        return len(self._pairs)

    def tokens(self, index: int) -> np.ndarray:
        first, second = self._pairs[index]
        return np.concatenate([first, second[self.lengths[index, 0] :]])


@dataclass(frozen=True)
class ScoringConfig:
    """How to score; the names are those of the flags."""

    max_length: int = 2048
    batch_size: int = 64
    tokens_per_batch: int = 8192
    precision: str = "fp32"


class Scorer:
    """A reward model that is ready for scoring: on an accelerator if there is one, with precision and attention set."""

    def __init__(self, model: Any, config: ScoringConfig):
        self.model = model  # a models.RewardModel, which is built on this folder
        self.batch_size, self.tokens_per_batch = config.batch_size, config.tokens_per_batch
        model.eval()
        tokenizer = model.tokenizer.backend_tokenizer
        tokenizer.no_padding()  # some published tokenizers pad or cut on their own
        tokenizer.no_truncation()
        self.max_length = min(config.max_length, model.most_positions() or config.max_length)
        limit = model.alone_above()
        if limit is not None and self.max_length > limit:
            print(
                f"sequences above {limit:,} tokens are scored one at a time, because the model changes there",
                flush=True,
            )
        self.fingerprint = fingerprint_of(model, config.precision, self.max_length)
        if model.device.type == "cpu":
            model.to(devices.pick_device())
        model.autocast_dtype = devices.autocast_dtype(model.device, config.precision)
        self.precision = model.in_fp32 if model.autocast_dtype is None else contextlib.nullcontext
        devices.keep_heap(model.device)
        model.use_attention(backward=False)
        speedups.narrow_last_layer(model)
        if model.device.type == "cpu":
            fused.fuse_layers(model)
        if model.peft_model is not None and model.autocast_dtype:
            speedups.cast_frozen_weights(model, model.autocast_dtype)

    def rewards(
        self, groups: Sequence[TokenizedGroup | str], check_stop: Callable[[], None] = lambda: None
    ) -> Iterator[list[tuple[int, list[float]]]]:
        """Yield (index of a group, rewards of its sequences) of the groups that each batch completed.

        A string among `groups` stands for one that was skipped, and gets no rewards. The sequences of a group should
        share their beginning. If the device runs out of memory, scoring continues with half the token budget.
        UserError if a reward is not finite.
        """
        pairs: list[tuple[np.ndarray, np.ndarray]] = []
        owners: list[int] = []  # the group of each pair
        keys: dict[int, list[bytes]] = {}  # the sequences of each group, as bytes
        for number, group in enumerate(groups):
            if isinstance(group, str):
                continue
            for ids in group.ids:
                self.model.check_token(int(ids.max()))
            keys[number] = [ids.tobytes() for ids in group.ids]
            # equal sequences are scored once: at another place in a row, rounding could make their rewards differ
            distinct = list(dict(zip(keys[number], group.ids, strict=True)).values())
            for first, second in itertools.zip_longest(distinct[::2], distinct[1::2]):
                pairs.append((first, first if second is None else second))
                owners.append(number)
        if not pairs:
            return
        known: dict[int, dict[bytes, float]] = {number: {} for number in keys}
        for indices, rewards in self._score(TokenPairs(pairs), check_stop):
            completed = []
            for index, values in zip(indices.tolist(), rewards.tolist(), strict=True):
                if not np.isfinite(values).all():
                    raise UserError(
                        "the model gave a reward that is not a finite number", found=values,
                        next="--precision fp32, if the model was not trained in bf16",
                    )  # fmt: skip
                number = owners[index]
                known[number] |= {ids.tobytes(): value for ids, value in zip(pairs[index], values, strict=True)}
                if len(known[number]) == len(set(keys[number])):
                    completed.append((number, [known[number][key] for key in keys[number]]))
            yield completed

    def _score(self, dataset: TokenPairs, check_stop: Callable[[], None]) -> Iterator[tuple[np.ndarray, Tensor]]:
        """Yield (indices (N,), rewards (N, 2)) of the pairs of each micro-batch."""
        left = np.arange(len(dataset))
        device, pad_id = self.model.device, self.model.tokenizer.pad_token_id
        packs = self.model.packs_up_to(int(longest_sequences(dataset.lengths).max()))
        crossover_length = self.model.attention_crossover_length() if packs else None
        while len(left):
            plans = packing.plan_step(
                dataset, left, self.tokens_per_batch, self.batch_size, crossover_length, self.model.alone_above()
            )
            launched: tuple[np.ndarray, Tensor] | None = None
            build = functools.partial(self._build, dataset, pad_id)
            with contextlib.closing(prefetched(plans, build)) as built:
                for plan, batch in zip(plans, built, strict=True):
                    check_stop()
                    try:
                        with torch.inference_mode(), self.precision():
                            rewards = self.model(*batch.to(device).inputs()).view(-1, 2)  # (N, 2)
                    except RuntimeError as error:
                        self.tokens_per_batch = smaller_budget(plan, device, error)
                        break
                    if launched:  # read one batch late, so that the device never idles
                        yield launched
                    launched = plan.indices, rewards
                    left = np.setdiff1d(left, plan.indices)
            if launched:
                yield launched
            if len(left):
                devices.free(device)  # not in the `except`, where the traceback still holds activations

    def _build(self, dataset: TokenPairs, pad_id: int, plan: packing.MicroBatchPlan) -> Any:
        return self.model.prepared(packing.build(dataset, plan, pad_id))


def smaller_budget(tried: packing.MicroBatchPlan, device: Any, error: RuntimeError) -> int:
    """The token budget after running out of memory; any other error is raised again."""
    if not utils.is_out_of_memory(error):
        raise error
    if tried.num_examples == 1:
        raise UserError(
            f"a single pair of {tried.computed_tokens:,} tokens does not fit the memory of {device}",
            next="a smaller --max_length",
        ) from error
    utils.say_if_heard(f"out of memory at {tried.computed_tokens:,} tokens a batch; continuing with half of that")
    return tried.computed_tokens // 2


def fingerprint_of(model: Any, *settings: Any) -> str:
    """A hash of a model's weights, tokenizer and chat template, and of settings that change its rewards."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.hf_model.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    digest.update(model.tokenizer.backend_tokenizer.to_str().encode())
    digest.update(f"{model.tokenizer.chat_template} {settings}".encode())
    return digest.hexdigest()


# -- One reply, token by token -----------------------------------------------------------------------------------------


@torch.no_grad()
def token_rewards(model: Any, dialogue: list[dict[str, str]]) -> tuple[list[str], list[float]]:
    """The reward as the last message grows: the text of each of its tokens, and the fp32 reward after it.

    The last reward is the dialogue's own; those before it are what the head of a models.RewardModel says of an
    unfinished reply, which training never looks at. Raises ValueError if earlier rewards would depend on later tokens.
    """
    if not model.can_pack:
        raise ValueError(f"no reward token by token: {model.why_not}")
    text = model.tokenizer.apply_chat_template(dialogue, tokenize=False)
    # a reply with a different first letter shows where the template puts the last message
    other = "\ue001" if dialogue[-1]["content"].lstrip().startswith("\ue000") else "\ue000"
    another = model.tokenizer.apply_chat_template([*dialogue[:-1], dialogue[-1] | {"content": other}], tokenize=False)
    start = next(place for place, (a, b) in enumerate(zip(text, another, strict=False)) if a != b)
    encoding = model.tokenizer.backend_tokenizer.encode(text, add_special_tokens=False)
    first = next(index for index, (_, end) in enumerate(encoding.offsets) if end > start)
    limit = model.alone_above()
    if limit is not None and len(encoding.ids) > limit:
        raise ValueError(f"no reward token by token above {limit:,} tokens, where the model changes")
    ids = torch.tensor([encoding.ids], device=model.device)  # (1, T)
    with model.in_fp32():
        output = model.backbone(input_ids=ids, attention_mask=torch.ones_like(ids))
    rewards = model.head(output.last_hidden_state[0, first:])
    shown, texts = start, []
    for _, end in encoding.offsets[first:]:  # the tokens of one character all end at the same place
        texts.append(text[shown:end])
        shown = max(shown, end)
    return texts, rewards.tolist()
