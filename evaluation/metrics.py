"""Metrics of a reward model: accuracy, length bias, calibration, and two models compared on the same pairs.

Numbers in, numbers out. `reward_margin` is always r_chosen − r_rejected: the model is right where it is positive; ties
(exactly 0) are neither right nor wrong. What takes a probability or a log of margins wants them in fp64.

Letters: N pairs.
"""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import stats
from scipy.optimize import brentq
from scipy.special import expit

import utils

Array = np.ndarray
CALIBRATION_BINS = 10  # over [0.5, 1]
CALIBRATION_DRAWS = 2000  # of perfectly calibrated outcomes
BOOTSTRAP_SAMPLES = 10_000
EXACT_UP_TO = 1000  # discordant pairs; beyond, chi-squared and the exact test agree to three digits
LENGTH_EDGES = (0, 16, 32, 64, 128, 256, 512, 1024)  # tokens; fixed, so that reports compare
MISLABEL_BELOW = 0.05


def accuracy(reward_margin: Array) -> dict[str, Any]:
    """How many of margins (N,) are right and how many are ties; accuracy = right / n, with Wilson's 95 % interval.

    A tie does not count as right: neither reply was preferred. Without any pair, the accuracy is None.
    """
    n, right, ties = len(reward_margin), int((reward_margin > 0).sum()), int((reward_margin == 0).sum())
    low, high = utils.wilson_interval(right, n)
    return {"n": n, "right": right, "ties": ties, "accuracy": right / n if n else None, "low": low, "high": high}


def breakdown(reward_margin: Array, groups: Array, names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """`accuracy` of each group that has pairs; `groups` (N,) are indices into `names`."""
    return {name: accuracy(reward_margin[groups == i]) for i, name in enumerate(names) if (groups == i).any()}


def length_buckets(lengths: Array) -> tuple[Array, list[str]]:
    """(N,) bucket indices of lengths in tokens, and the buckets' names: '0 to 15', '16 to 31' … '1024 and more'."""
    names = [f"{low} to {high - 1}" for low, high in itertools.pairwise(LENGTH_EDGES)]
    return np.searchsorted(LENGTH_EDGES, lengths, side="right") - 1, [*names, f"{LENGTH_EDGES[-1]} and more"]


# -- Length ------------------------------------------------------------------------------------------------------------


def length_bias(rewards: Array, lengths: Array) -> dict[str, Any]:
    """How much of the reward is explained by length.

    Args:
        rewards, lengths: (N, 2), chosen and rejected; lengths are tokens of the last reply.

    "within_prompts" is the correlation of Δreward and Δlength with each pair counted in both orders. It therefore does
    not depend on which reply comes first, and equals the correlation of rewards and lengths after subtracting each
    prompt's mean. "across_prompts" is the correlation over all 2N replies.
    """
    reward_margin, longer_by = rewards[:, 0] - rewards[:, 1], lengths[:, 0] - lengths[:, 1]
    both = np.concatenate([reward_margin, -reward_margin]), np.concatenate([longer_by, -longer_by])
    differ = longer_by != 0
    decided = differ & (reward_margin != 0)
    prefers_longer = (reward_margin > 0) == (longer_by > 0)
    return {
        "within_prompts": correlation(*both),
        "across_prompts": correlation(rewards.reshape(-1), lengths.reshape(-1)),
        "better_is_longer": accuracy(reward_margin[longer_by > 0]),
        "better_is_shorter": accuracy(reward_margin[longer_by < 0]),
        "equally_long": accuracy(reward_margin[longer_by == 0]),
        # of the pairs whose replies differ in length (and which the model does not tie)
        "model_prefers_longer": float(prefers_longer[decided].mean()) if decided.any() else None,
        "people_prefer_longer": float((longer_by[differ] > 0).mean()) if differ.any() else None,
        "length_controlled": length_controlled(reward_margin, longer_by),
        "trend": trend(longer_by, reward_margin),
    }


def trend(x: Array, y: Array) -> dict[str, float] | None:
    """The straight line through points (x, y) with the least squares, and the 95 % interval of its slope.

    None if x or y does not vary, or if fewer than three points leave nothing to tell how certain the line is.
    """
    if len(x) < 3 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return None
    line = stats.linregress(x, y)
    reach = stats.t.ppf(0.975, len(x) - 2) * line.stderr
    slope = {"slope": line.slope, "low": line.slope - reach, "high": line.slope + reach, "intercept": line.intercept}
    return {name: float(value) for name, value in slope.items()}


def correlation(first: Array, second: Array) -> dict[str, float | None]:
    """Pearson's and Spearman's correlation; None if one side does not vary, for which neither is defined."""
    if len(first) < 2 or np.ptp(first) == 0 or np.ptp(second) == 0:
        return {"pearson": None, "spearman": None}
    return {
        "pearson": float(stats.pearsonr(first, second).statistic),
        "spearman": float(stats.spearmanr(first, second).statistic),
    }


def length_controlled(reward_margin: Array, longer_by: Array) -> dict[str, float | None]:
    """The mean of two accuracies: on pairs whose chosen reply is longer, and on pairs whose chosen reply is shorter.

    This is the accuracy on data in which the longer reply is chosen exactly half of the time, all else unchanged. A
    model that only measures length gets 50 %, whether it prefers long or short replies; a perfect one gets 100 %.
    (AlpacaEval's length-controlled win rate, arXiv 2404.04475, removes the effect of length by a regression instead: it
    compares models on prompts without labels, where there are no two accuracies to average.)

    The interval combines the two Wilson intervals by the square-and-add rule (Newcombe 1998,
    doi:10.1002/(SICI)1097-0258(19980430)17:8<873::AID-SIM779>3.0.CO;2-I).
    """
    longer, shorter = accuracy(reward_margin[longer_by > 0]), accuracy(reward_margin[longer_by < 0])
    if longer["accuracy"] is None or shorter["accuracy"] is None:
        return {"accuracy": None, "low": None, "high": None}
    middle = (longer["accuracy"] + shorter["accuracy"]) / 2
    below = math.hypot(longer["accuracy"] - longer["low"], shorter["accuracy"] - shorter["low"]) / 2
    above = math.hypot(longer["high"] - longer["accuracy"], shorter["high"] - shorter["accuracy"]) / 2
    return {"accuracy": middle, "low": middle - below, "high": middle + above}


# -- Calibration -------------------------------------------------------------------------------------------------------


def calibration(reward_margin: Array) -> dict[str, Any]:
    """Whether σ(Δr), the probability that the model gives its choice, matches how often people agree.

    With the chosen reply always first every outcome would be 1, so each pair is seen from the side that the model
    prefers: it claims σ(|Δr|), from 0.5 to 1, and the outcome is 1 if people prefer that side too, 0 if not, and 0.5
    for a tie. (Counting each pair in both orders, in bins over [0, 1], gives the same result.) ECE, the expected
    calibration error, is the mean over pairs of |outcome − claim| of their bin (Guo et al. 2017, arXiv 1706.04599).
    """
    claimed = expit(np.abs(reward_margin))  # (N,)
    happened = np.heaviside(reward_margin, 0.5)  # (N,)
    which = calibration_bin(claimed)  # (N,)
    sums = zip(
        *(np.bincount(which, values).tolist() for values in (claimed, happened, np.ones(len(which)))), strict=True
    )
    bins = [{"claimed": c / count, "happened": h / count, "count": int(count)} for c, h, count in sums if count]
    off = [abs(one["happened"] - one["claimed"]) * one["count"] for one in bins]
    return {
        "bins": bins,
        "ece": sum(off) / len(reward_margin),
        "ece_floor": ece_floor(claimed),
        "brier": float(np.mean((1 - expit(reward_margin)) ** 2)),
        "log_loss": log_loss(reward_margin),
        "temperature": temperature(reward_margin),
    }


def calibration_bin(claimed: Array) -> Array:
    """The index (N,) of each claim's bin; the last one includes 1."""
    return np.minimum((2 * CALIBRATION_BINS * (claimed - 0.5)).astype(int), CALIBRATION_BINS - 1)


def ece_floor(claimed: Array, seed: int = 0) -> dict[str, float]:
    """The ECE that a perfectly calibrated model with these claims (N,) gets by chance: its mean and 95 % quantile.

    It is not 0, because outcomes scatter around their probabilities, more so if there are few. Outcomes are drawn many
    times with the claims as probabilities (consistency resampling, Bröcker & Smith 2007, doi:10.1175/WAF993.1). Claims
    are rounded to 1/1000 and counted, so a million pairs take no longer than a thousand. Ties, which claim exactly a
    half and count as a half, do not scatter.
    """
    claims, counts = np.unique(np.round(claimed[claimed > 0.5], 3), return_counts=True)  # (C,) each
    draw, off = np.random.default_rng(seed), np.zeros(CALIBRATION_DRAWS)
    for number in range(CALIBRATION_BINS):
        is_here = calibration_bin(claims) == number
        p, n = claims[is_here], counts[is_here]
        right = draw.binomial(n, p, size=(CALIBRATION_DRAWS, len(n))).sum(axis=1)  # (draws,)
        off += np.abs(right - n @ p)
    found = off / len(claimed)
    return {"mean": float(found.mean()), "high": float(np.quantile(found, 0.95))}


def log_loss(reward_margin: Array) -> float:
    """Mean of −log σ(Δr), the Bradley-Terry loss; computed from Δr, because σ of a very negative one rounds to 0."""
    return float(np.logaddexp(0.0, -reward_margin).mean())


def temperature(reward_margin: Array) -> dict[str, float | None] | None:
    """The T that minimizes the log loss of σ(Δr / T), its 95 % interval, and that log loss; None if there is none.

    In b = 1/T the log loss is convex, with derivative mean(−Δr · σ(−b · Δr)); T is found at its zero. There is no zero
    if every pair is right (T → 0 would be best) or if Δr carries no signal (its mean is not positive: T → ∞). The
    interval is b ± 1.96 / √information; T has no upper end (None) if that b reaches 0.
    """
    if not len(reward_margin) or reward_margin.mean() <= 0 or not (reward_margin < 0).any():
        return None
    scale = np.abs(reward_margin).max()
    scaled = reward_margin / scale  # so that b is of the order of 1

    def slope(b: float) -> float:
        return float(-(scaled * expit(-b * scaled)).mean())

    high = 1.0
    while slope(high) < 0:
        high *= 2
    b = brentq(slope, 0.0, high, xtol=1e-12) / scale
    p = expit(b * reward_margin)
    reach = stats.norm.ppf(0.975) / math.sqrt(float((reward_margin**2 * p * (1 - p)).sum()))
    return {
        "value": 1 / b,
        "low": 1 / (b + reach),
        "high": 1 / (b - reach) if b > reach else None,
        "log_loss": log_loss(b * reward_margin),
    }


def label_probability(reward_margin: Array) -> Array:
    """The probability (N,) that the model gives the labels: σ(Δr / T), with T = 1 if no temperature can be fitted."""
    found = temperature(reward_margin)
    return expit(reward_margin / found["value"] if found else reward_margin)


# -- Two models on the same pairs --------------------------------------------------------------------------------------


def compare(margin_a: Array, margin_b: Array, seed: int = 0) -> dict[str, Any]:
    """Whether A's accuracy differs from B's on the same N pairs: McNemar's test and a paired bootstrap.

    McNemar's test looks at the pairs that only one of them gets right (a tie is not right). Up to 1000 of them it is
    the exact binomial test, beyond that chi-squared with Edwards' continuity correction.
    """
    right_a, right_b = margin_a > 0, margin_b > 0
    only_a, only_b = int((right_a & ~right_b).sum()), int((right_b & ~right_a).sum())
    discordant = only_a + only_b
    if discordant <= EXACT_UP_TO:
        test, p = "exact", float(stats.binomtest(only_a, discordant).pvalue) if discordant else 1.0
    else:
        statistic = max(abs(only_a - only_b) - 1, 0) ** 2 / discordant
        test, p = "chi-squared", float(stats.chi2.sf(statistic, df=1))
    n = len(margin_a)
    low, high = bootstrap_difference(n, only_a, only_b, seed)
    return {
        "n": n,
        "both_right": int((right_a & right_b).sum()),
        "only_a_right": only_a,
        "only_b_right": only_b,
        "neither_right": int((~right_a & ~right_b).sum()),
        "mcnemar": {"test": test, "p_value": p},
        "accuracy_difference": (only_a - only_b) / n if n else None,
        "low": low,
        "high": high,
        "rewards_agree": correlation(margin_a, margin_b),
    }


def bootstrap_difference(n: int, only_a: int, only_b: int, seed: int) -> tuple[float | None, float | None]:
    """95 % percentile interval of accuracy A − B over resampled pairs.

    A pair contributes +1, −1 or 0, so drawing N pairs with replacement is one draw from a multinomial distribution,
    and a million pairs take no longer than ten.
    """
    if not n:
        return None, None
    chances = [only_a / n, only_b / n, (n - only_a - only_b) / n]
    draws = np.random.default_rng(seed).multinomial(n, chances, size=BOOTSTRAP_SAMPLES)
    low, high = np.quantile((draws[:, 0] - draws[:, 1]) / n, [0.025, 0.975])
    return float(low), float(high)
