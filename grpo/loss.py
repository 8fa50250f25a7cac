"""Advantages and the loss of a policy: tensors in, tensors out.

Group-relative policy optimization is arXiv 2402.03300; the token mean over a whole step is DAPO's (2503.14476), the
mean over a fixed length Dr. GRPO's (2503.20783).

Letters: N prompts, G completions of each, P tokens of completions.
"""

import torch
from torch import Tensor

LOSSES = ("dapo", "grpo", "dr_grpo")
SCALES = ("group", "batch", "none")
EPSILON = 1e-4  # beside a standard deviation, as TRL has it
NO_SPREAD = 1e-6  # rewards of a group that differ by less, relative to their size, are one reward


def advantages(rewards: Tensor, scale: str) -> tuple[Tensor, Tensor]:
    """How much better each completion is than its group's mean, (N, G), and which groups have any spread, (N,).

    `scale` divides by the standard deviation of the group's rewards, of all rewards, or by nothing. A group without
    spread has advantages of exactly 0: dividing by its rounding would make large ones of nothing.
    """
    centered = rewards - rewards.mean(dim=1, keepdim=True)
    has_spread = centered.abs().amax(dim=1) > NO_SPREAD * (1 + rewards.abs().amax(dim=1))  # (N,)
    if scale == "group":
        centered = centered / (rewards.std(dim=1, keepdim=True) + EPSILON)
    elif scale == "batch":
        centered = centered / (rewards.std() + EPSILON)
    return centered * has_spread[:, None], has_spread


def token_weights(lengths: Tensor, loss: str, max_new_tokens: int) -> Tensor:
    """What a token of each completion counts in the loss, of the shape of `lengths`; 0 for one without tokens.

    dapo: all tokens of the step alike. grpo: all completions alike, whatever their length. dr_grpo: all tokens alike,
    by what the completions could have had.
    """
    if loss == "dapo":
        return (lengths > 0).float() / lengths.sum().clamp(min=1)
    if loss == "grpo":
        return (lengths > 0).float() / lengths.clamp(min=1) / lengths.numel()
    return (lengths > 0).float() / (lengths.numel() * max_new_tokens)


def token_loss(
    logprobs: Tensor, old: Tensor, reference: Tensor, advantage: Tensor, cliprange: float, kl_coef: float
) -> tuple[Tensor, Tensor]:
    """The loss of each token (P,), and which were clipped; all arguments are (P,).

    The clipped surrogate of PPO (arXiv 1707.06347) with the token's probability ratio to the policy that sampled it,
    plus kl_coef · k3 · ratio, k3 = exp(d) - d - 1 with d = log p_ref - log p. Without the ratio, k3 as a loss is a
    biased gradient of the KL divergence (arXiv 2506.09477, 2510.01555).
    """
    ratio = (logprobs - old).exp()
    clipped = ratio.clamp(1 - cliprange, 1 + cliprange)
    loss = -torch.minimum(ratio * advantage, clipped * advantage)
    if kl_coef:
        loss = loss + kl_coef * k3(logprobs, reference) * ratio
    return loss, (clipped * advantage < ratio * advantage).detach()


def k3(logprobs: Tensor, reference: Tensor) -> Tensor:
    """Schulman's estimate of KL(policy | reference) of each token, never negative (joschu.net/blog/kl-approx.html)."""
    difference = reference - logprobs
    return difference.exp() - difference - 1
