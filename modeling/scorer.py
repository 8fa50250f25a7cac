"""Rewards for many token sequences, packed as in training, with a token budget that shrinks if memory runs out.

Sequences are scored in pairs that share their beginning, which is computed once. An odd one is paired with itself,
which costs one token more.

Letters: N pairs.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

import utils
from data_pipeline import packing
from data_pipeline.prefetch import prefetched
from data_pipeline.tokenization import longest_sequences, shared_prefix
from modeling import devices, speedups
from utils import UserError


@dataclass
class Scorer:
    """A reward model on its device, and how much it may compute at once."""

    model: Any  # a models.RewardModel, which is built on this folder
    max_length: int
    batch_size: int
    tokens_per_batch: int
    fingerprint: str  # of weights, tokenizer, precision and maximum length

    @classmethod
    def create(cls, model: Any, max_length: int, batch_size: int, tokens_per_batch: int, precision: str) -> Scorer:
        """Prepare a model for scoring: precision, device, attention. An accelerator is used if there is one."""
        model.autocast_dtype = torch.bfloat16 if precision == "bf16" else None
        model.eval()
        tokenizer = model.tokenizer.backend_tokenizer
        tokenizer.no_padding()  # some published tokenizers pad or cut on their own
        tokenizer.no_truncation()
        max_length = min(max_length, model.most_positions() or max_length)
        fingerprint = fingerprint_of(model, precision, max_length)
        if model.device.type == "cpu":
            model.to(devices.pick_device())
        devices.keep_heap(model.device)
        model.use_attention()
        if model.peft_model is not None and model.autocast_dtype:
            speedups.cast_frozen_weights(model, model.autocast_dtype)
        return cls(model, max_length, batch_size, tokens_per_batch, fingerprint)

    def rewards(
        self, jobs: list[list[np.ndarray]], check_stop: Callable[[], None] = lambda: None
    ) -> Iterator[list[tuple[int, list[float]]]]:
        """Yield (job, its sequences' rewards) of the jobs that each batch finished; a job is a list of token sequences.

        The sequences of one job should share their beginning. If the device runs out of memory, scoring goes on with
        half the token budget from then on. UserError if a reward is not finite.
        """
        pairs, owners, places = [], [], []
        for number, job in enumerate(jobs):
            # equal sequences are scored once: at another place in a row, rounding could make their rewards differ
            known: dict[bytes, int] = {}
            places.append([known.setdefault(sequence.tobytes(), len(known)) for sequence in job])
            distinct = [job[places[number].index(place)] for place in range(len(known))]
            for first in range(0, len(distinct), 2):
                second = min(first + 1, len(distinct) - 1)
                pairs.append((distinct[first], distinct[second]))
                owners.append((number, first, second))
        results = [[math.nan] * (max(place) + 1) for place in places]
        missing = [-(-len(result) // 2) for result in results]
        if not pairs:
            return
        for indices, rewards in self._score(TokenPairs(pairs), check_stop):
            finished = []
            for index, values in zip(indices.tolist(), rewards.tolist(), strict=True):
                number, first, second = owners[index]
                results[number][first], results[number][second] = values
                missing[number] -= 1
                check_finite(values)
                if not missing[number]:
                    finished.append((number, [results[number][place] for place in places[number]]))
            yield finished

    def _score(self, dataset: TokenPairs, check_stop: Callable[[], None]) -> Iterator[tuple[np.ndarray, Tensor]]:
        """Yield (indices (N,), rewards (N, 2)) of the pairs of each micro-batch."""
        left = np.arange(len(dataset))
        device, pad_id = self.model.device, self.model.tokenizer.pad_token_id
        packs = self.model.packs_up_to(int(longest_sequences(dataset.lengths).max()))
        crossover_length = self.model.attention_crossover_length() if packs else None
        while len(left):
            plans = packing.plan_step(dataset, left, self.tokens_per_batch, self.batch_size, crossover_length)
            built = prefetched(plans, lambda plan: packing.build(dataset, plan, pad_id))
            launched: tuple[np.ndarray, Tensor] | None = None
            done: list[np.ndarray] = []
            with contextlib.closing(built):
                for plan, batch in zip(plans, built, strict=True):
                    check_stop()
                    try:
                        with torch.inference_mode():
                            rewards = self.model(*batch.to(device).inputs()).view(-1, 2)  # (N, 2)
                    except RuntimeError as error:
                        self.tokens_per_batch = smaller_budget(plan, device, error)
                        break
                    if launched:  # read one batch late, so that the device never idles
                        yield launched
                    launched = plan.indices, rewards
                    done.append(plan.indices)
            if launched:
                yield launched
            left = np.setdiff1d(left, np.concatenate(done)) if done else left
            if len(left):
                devices.free(device)  # not in the `except`, where the traceback still holds activations


def smaller_budget(tried: packing.MicroBatchPlan, device: Any, error: RuntimeError) -> int:
    """The token budget after running out of memory; any other error is raised again."""
    if not utils.is_out_of_memory(error):
        raise error
    if tried.num_examples == 1:
        raise UserError(
            f"a single pair of {tried.computed_tokens:,} tokens does not fit the memory of {device}",
            next="a smaller --max_length",
        ) from error
    utils.say_if_heard(f"out of memory at {tried.computed_tokens:,} tokens a batch; going on with half of it")
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


def check_finite(rewards: Sequence[float]) -> None:
    """UserError if a reward is infinite or not a number."""
    if not all(map(math.isfinite, rewards)):
        raise UserError(
            "the model gave a reward that is not a finite number", found=rewards,
            next="--precision fp32, if the model was not meant for bf16",
        )  # fmt: skip


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
