"""The replies of one step: sampled, scored as text by the reward model, and as rows of the file that keeps them.

Letters: N prompts, G completions of each.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

import utils
from checkpointing.rollout_file import AT_LIMIT, BY_ITSELF
from data_pipeline import packing
from data_pipeline.messages import Messages
from data_pipeline.parsing import reason_in_words
from data_pipeline.tokenization import longest_sequences, tokenize_groups
from grpo.sampling import Reply, sample_groups, uniforms
from modeling import devices
from modeling.scorer import Scorer, smaller_budget
from utils import UserError

TRUNCATED = ("lowest", "keep", "mask")
NGRAM = 3  # of `repetition`


class Groups:
    """Prompts with G completions each as `packing.Examples`: `[prompt | completion 1 | … | completion G]`."""

    def __init__(self, sequences: Sequence[Sequence[np.ndarray]]):
        """`sequences` are the prompt's ids and those of each completion, for each prompt."""
        self.sequences = sequences
        self.lengths = np.array([[len(part) for part in parts] for parts in sequences], np.int32)  # (N, 1 + G)

    def __len__(self) -> int:
        return len(self.sequences)

    def tokens(self, index: int) -> np.ndarray:
        return np.concatenate(self.sequences[index])


@dataclass
class Rollouts:
    """N prompts, what the policy replied and what the reward model says of it."""

    prompts: np.ndarray  # (N,) indices of the dataset
    prompt_ids: list[np.ndarray]
    messages: list[Messages]
    replies: list[list[Reply]]  # N lists of G
    texts: list[list[str]]
    rewards: Tensor  # (N, G), on the CPU
    tools: list[Any] = field(default_factory=list)  # what the assistant could call, for each prompt

    @classmethod
    def interleaved(cls, prompts: np.ndarray, parts: Sequence["Rollouts | None"]) -> "Rollouts":
        """The rollouts of several ranks, of which rank r has the prompts r, r + ranks, …"""
        places = [(parts[at % len(parts)], at // len(parts)) for at in range(len(prompts))]
        lists = {
            name: [getattr(part, name)[at] for part, at in places]
            for name in ("prompt_ids", "messages", "replies", "texts", "tools")
        }
        return cls(prompts, **lists, rewards=torch.stack([part.rewards[at] for part, at in places]))

    @property
    def is_finished(self) -> Tensor:
        """(N, G) whether each reply ended by itself."""
        return torch.tensor([[reply.is_finished for reply in group] for group in self.replies])

    @property
    def lengths(self) -> Tensor:
        """(N, G) tokens."""
        return torch.tensor([[len(reply.tokens) for reply in group] for group in self.replies])

    def groups(self) -> Groups:
        return Groups([
            [prompt, *(np.array(reply.tokens, np.int32) for reply in group)]
            for prompt, group in zip(self.prompt_ids, self.replies, strict=True)
        ])  # fmt: skip


class Writer:
    """The policy that writes replies, and the judges that score them."""

    def __init__(
        self, policy: Any, scorer: Scorer, prompts: Any, world: Any, *, seed: int, max_new_tokens: int,
        ends: set[int], keys_at_once: int,
    ):  # fmt: skip
        """`prompts` is a `dialogues.DialogueDataset`, `world` a `distributed.World`; `keys_at_once` bounds the tokens
        whose keys are held at once."""
        self.policy, self.scorer, self.prompts, self.world = policy, scorer, prompts, world
        self.seed, self.max_new_tokens, self.ends, self.keys_at_once = seed, max_new_tokens, ends, keys_at_once

    def write(self, indices: np.ndarray, group_size: int, step: int, check_stop: Callable[[], None]) -> Rollouts:
        """Sample `group_size` replies to each of N prompts, a function of (seed, step, prompt, completion) alone.

        Of several ranks each writes and scores its share of the prompts.
        """
        share = indices[self.world.rank :: self.world.size]
        mine = self._write(share, group_size, step, check_stop) if len(share) else None
        parts = self.world.gather_objects(mine)
        return parts[0] if self.world.is_alone else Rollouts.interleaved(indices, parts)

    def _write(self, indices: np.ndarray, group_size: int, step: int, check_stop: Callable[[], None]) -> Rollouts:
        ids = [self.prompts.tokens(index) for index in indices.tolist()]
        replies: list[list[Reply]] = []
        was_training = self.policy.training
        self.policy.eval()
        try:
            needed = [len(prompt) + group_size * self.max_new_tokens for prompt in ids]
            while len(replies) < len(ids):
                wave = slice(len(replies), self._end_of_wave(needed, len(replies)))
                chosen = indices[wave]

                def numbers(prompts: np.ndarray, completions: np.ndarray, position: int, chosen=chosen) -> np.ndarray:
                    return uniforms(self.seed, step, chosen[prompts], completions, position)

                try:
                    replies += sample_groups(
                        self.policy, ids[wave], group_size, self.max_new_tokens, self.ends, numbers, check_stop
                    )
                    continue
                except RuntimeError as error:
                    self._halve(needed[wave], error)
                devices.free(self.policy.device)  # not in the `except`, where the traceback still holds keys
        finally:
            self.policy.train(was_training)
        decode = self.policy.tokenizer.decode
        texts = [[decode(reply.tokens, skip_special_tokens=True).strip() for reply in group] for group in replies]
        asked = [self.prompts.prompts[index] for index in indices.tolist()]
        tools = [self.prompts.tools[index] for index in indices.tolist()]
        rewards = score(self.scorer, asked, texts, tools, check_stop)
        return Rollouts(indices, ids, asked, replies, texts, rewards, tools)

    def _end_of_wave(self, needed: list[int], start: int) -> int:
        """Where the prompts end whose keys, with those before them from `start` on, fit at once: at least one's."""
        for end in range(start + 1, len(needed)):
            if sum(needed[start : end + 1]) > self.keys_at_once:
                return end
        return len(needed)

    def _halve(self, wave: list[int], error: RuntimeError) -> None:
        """After running out of memory over a wave; any other error is raised again. The replies will be the same."""
        if not utils.is_out_of_memory(error):
            raise error
        if len(wave) == 1:
            raise UserError(
                f"the completions of a single prompt do not fit the memory of {self.policy.device}",
                next="a smaller --group_size or --max_new_tokens",
            ) from error
        self.keys_at_once = sum(wave) // 2
        print(f"out of memory at keys of {sum(wave):,} tokens; going on with {self.keys_at_once:,}", flush=True)


@torch.no_grad()
def score(
    scorer: Scorer, prompts: list[Messages], texts: list[list[str]], tools: list[Any], check_stop: Callable[[], None]
) -> Tensor:
    """Rewards (N, G) of replies as text, through the reward model's own template and tokenizer, in fp32.

    A reply's text, because one in twenty does not consist of the tokens that it would be encoded as.
    """
    model = scorer.model
    dialogues = [
        [[*prompt, {"role": "assistant", "content": text}] for text in group]
        for prompt, group in zip(prompts, texts, strict=True)
    ]
    found = tokenize_groups(dialogues, model.tokenizer, scorer.max_length, tools)
    for prompt, group in zip(prompts, found, strict=True):
        if isinstance(group, str):
            raise UserError(
                "the reward model cannot read a reply",
                where=model.tokenizer.name_or_path,
                found=f"{reason_in_words(group)}; the prompt ends in {prompt[-1]['content'][-60:]!r}",
                next=f"shorter --prompt_max_length and --max_new_tokens: it reads {scorer.max_length:,} tokens"
                if group == "too_long"
                else "prompts that its chat template takes, or another reward model",
            )
    groups = Groups([_shared(group.ids) for group in found])
    rewards = torch.empty(groups.lengths[:, 1:].shape)
    packs = model.packs_up_to(int(longest_sequences(groups.lengths).max()))
    crossover_length = model.attention_crossover_length() if packs else None
    left = np.arange(len(groups))
    while len(left):
        plans = packing.plan_step(
            groups, left, scorer.tokens_per_batch, scorer.batch_size, crossover_length, model.alone_above()
        )
        for plan in plans:
            check_stop()
            batch = model.prepared(packing.build(groups, plan, model.tokenizer.pad_token_id)).to(model.device)
            try:
                with scorer.precision():
                    scores = model(*batch.inputs()).view(len(plan.indices), -1).cpu()
            except RuntimeError as error:
                scorer.tokens_per_batch = smaller_budget(plan, model.device, error)
                break
            rewards[torch.from_numpy(plan.indices)] = scores
            left = np.setdiff1d(left, plan.indices)
        if len(left):
            devices.free(model.device)  # not in the `except`, where the traceback still holds activations
    for at, group in enumerate(found):  # at another place in a row, rounding makes the reward of an equal reply differ
        known: dict[bytes, int] = {}
        firsts = [known.setdefault(ids.tobytes(), number) for number, ids in enumerate(group.ids)]
        rewards[at] = rewards[at, firsts]
    return rewards


def _shared(sequences: list[np.ndarray]) -> list[np.ndarray]:
    """The start that all sequences share, leaving each at least one token, and what follows it in each."""
    shortest = min(map(len, sequences)) - 1
    differ = np.flatnonzero(np.any([ids[:shortest] != sequences[0][:shortest] for ids in sequences], axis=0))
    prefix = int(differ[0]) if len(differ) else shortest
    return [sequences[0][:prefix], *(ids[prefix:] for ids in sequences)]


def judged(rollouts: Rollouts, truncated: str) -> Tensor:
    """(N, G) rewards as they count: with `lowest`, a reply that was cut gets the lowest reward of the step.

    The template puts an end behind a cut reply, so that the reward model would take it for a finished one.
    """
    is_cut = ~rollouts.is_finished
    if truncated != "lowest" or not is_cut.any():
        return rollouts.rewards
    return torch.where(is_cut, rollouts.rewards.min(), rollouts.rewards)


def distinct_ngrams(replies: list[list[Reply]]) -> float:
    """The share of runs of three tokens within a reply that occur in it once: it falls when a policy repeats itself."""
    total, distinct = 0, 0
    for reply in (reply for group in replies for reply in group):
        runs = [tuple(reply.tokens[at : at + NGRAM]) for at in range(len(reply.tokens) - NGRAM + 1)]
        total, distinct = total + len(runs), distinct + len(set(runs))
    return distinct / total if total else 1.0


# -- Kept --------------------------------------------------------------------------------------------------------------


def kept_rows(
    step: int, rollouts: Rollouts, advantages: Tensor | None, kl: Tensor, judged: Tensor | None = None
) -> list[tuple[Any, ...]]:
    """The rows of a `RolloutFile` for the replies that were sampled at a step.

    Advantages and KL divergences are (N, G) each, `judged` what a judge that was not trained on says, (N, G).
    """
    return [
        (
            step, int(prompt), number, rollouts.messages[at][-1]["content"], rollouts.texts[at][number],
            float(rollouts.rewards[at, number]), None if advantages is None else float(advantages[at, number]),
            float(kl[at, number]), len(reply.tokens), BY_ITSELF if reply.is_finished else AT_LIMIT,
            None if judged is None else float(judged[at, number]),
        )
        for at, prompt in enumerate(rollouts.prompts.tolist())
        for number, reply in enumerate(rollouts.replies[at])
    ]  # fmt: skip
