"""Which examples each optimizer step takes: a function of (seed, epoch, step) alone, so resuming needs no stored order.

Letters: N examples.
"""

import functools
from dataclasses import dataclass

import numpy as np


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
