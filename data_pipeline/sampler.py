"""Which examples are for what: those of each optimizer step, and those that are held out where there is no test split.

The examples of a step are a function of (seed, epoch, step) alone, so resuming needs no stored order.

Letters: N examples.
"""

import functools
import hashlib
import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from data_pipeline.reading import HELD_OUT_IN


@dataclass(frozen=True)
class StepSampler:
    """Shuffles the examples again in each epoch and cuts the order into steps.

    Steps count from 1. The last step of an epoch is smaller if the examples do not divide evenly.
    """

    num_examples: int
    examples_per_step: int
    epochs: int
    seed: int
    max_steps: int = 0  # 0: as many as the epochs have

    @property
    def steps_per_epoch(self) -> int:
        return -(-self.num_examples // self.examples_per_step)

    @property
    def total_steps(self) -> int:
        steps = self.steps_per_epoch * self.epochs
        return min(steps, self.max_steps) if self.max_steps else steps

    def indices_for(self, step: int) -> np.ndarray:
        """Indices (N,) of one step's examples."""
        epoch, position = divmod(step - 1, self.steps_per_epoch)
        order = _shuffled(self.num_examples, self.seed, epoch)
        return order[position * self.examples_per_step : (position + 1) * self.examples_per_step]

    def examples_seen(self, step: int) -> int:
        """How many examples steps 1 to `step` take together."""
        epochs, position = divmod(step, self.steps_per_epoch)
        return epochs * self.num_examples + min(position * self.examples_per_step, self.num_examples)


@functools.lru_cache(maxsize=2)
def _shuffled(num_examples: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.Generator(np.random.PCG64([seed, epoch])).permutation(num_examples)


def fixed_sample(num_examples: int, size: int, seed: int) -> np.ndarray:
    """Indices of `size` examples drawn from `seed`, in ascending order; of all examples if `size` is 0."""
    return np.sort(_shuffled(num_examples, seed, 0)[: size or num_examples])


# -- Which rows are held out -------------------------------------------------------------------------------------------


def digests(row: Any, prompt: list[dict[str, Any]] | None) -> tuple[int, int]:
    """Hashes of a row's prompt and of the row: they decide whether it is held out.

    Rows of one prompt stay together, and a file that grows keeps its split. The prompt is hashed as it was parsed, so
    that it is the same question in whatever form; if it says nothing, the row is hashed in its place.
    """
    of_row = _digest(row)
    if not any(message["content"].strip() for message in prompt or []):
        return of_row, of_row
    return _digest([[message["role"], " ".join(message["content"].split())] for message in prompt]), of_row


def _digest(content: Any) -> int:
    digest = hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).digest()
    return int.from_bytes(digest[:8], "big")


def shares_prompts(prompts: Iterable[tuple[int, int]]) -> bool:
    """Whether rows share so few prompts that a hash of these would put nearly all on one side: then rows are drawn.

    `prompts` are (row number, digest of its prompt).
    """
    counts = Counter(digest for _, digest in set(prompts))
    is_repeated = len(counts) < HELD_OUT_IN and counts.total() > len(counts)
    return is_repeated or max(counts.values(), default=0) > max(1, counts.total() // 2)
