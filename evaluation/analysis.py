"""From scores to the content of report.json: figures, findings in sentences, and the pairs worth reading.

`measure` computes everything from numbers; `readings` goes over the data once more for the texts of a few pairs.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
from scipy.special import expit

import utils
from common import atomic_files
from data import MAX_SKIPPED
from evaluation import metrics, reward_bench
from evaluation.eval_data import Comparison, Data, Row
from evaluation.scores import Scored, ScoreLog, ScoreTable

MOST_READ = 10  # pairs worth reading, of each kind
NEAR_TIE = 0.55  # the model is less sure of its choice than this
REPORT_VERSION = 1


def measure(table: ScoreTable) -> dict[str, Any]:
    """The content of report.json about one model, without names and texts; the table is not empty."""
    bucket, bucket_names = metrics.length_buckets(table.longest)
    turn_counts = sorted(set(table.turns.tolist()))
    headline = metrics.accuracy(table.reward_margins)
    by_subset = metrics.breakdown(table.reward_margins, table.subsets, table.subset_names)
    reward_margin = (table.rewards[:, 0] - table.rewards[:, 1]).astype(np.float64)  # (N,)
    content: dict[str, Any] = {
        "version": REPORT_VERSION,
        "n": headline["n"],
        "accuracy": headline["accuracy"],
        "interval": [headline["low"], headline["high"]],
        "right": headline["right"],
        "ties": headline["ties"],
        "wrong": headline["n"] - headline["right"] - headline["ties"],
        "guessing": table.guessing,
        "rows": {
            "read": table.counts.rows, "left_out": table.counts.skipped, "why": dict(table.counts.count),
            "in_words": [line.strip() for line in table.counts.lines()],
        },
        "mean_margin": float(reward_margin.mean()),
        "mean_reward": dict(zip(("right", "wrong"), table.rewards.mean(axis=0).tolist(), strict=True)),
        "reward_percentiles": np.percentile(table.rewards, range(101)).tolist(),  # of all replies
        "pairs": len(reward_margin),
        "by_subset": {} if set(by_subset) == {""} else dict(sorted(by_subset.items())),
        "by_turns": metrics.breakdown(
            table.reward_margins, np.searchsorted(turn_counts, table.turns), [str(count) for count in turn_counts]
        ),
        "by_length": metrics.breakdown(table.reward_margins, bucket, bucket_names),
        "baselines": {  # simple rules on the same comparisons
            f"{rule} wins": metrics.accuracy(by)
            for rule, by in zip(("longer", "shorter"), table.longer_by.T, strict=True)
        },
        "length": metrics.length_bias(table.rewards, table.lengths),
        "calibration": metrics.calibration(reward_margin),
        "benchmark": benchmark(table, by_subset),
        "fingerprint": table.fingerprint,
    }  # fmt: skip
    content["findings"] = findings(content)
    return content


def benchmark(table: ScoreTable, by_subset: dict[str, Any]) -> dict[str, Any] | None:
    """RewardBench's or RewardBench 2's own score, if the data is theirs."""
    if table.groups:
        return reward_bench.scores_v2(table.groups) if len(table.groups) == len(table.reward_margins) else None
    return reward_bench.scores_v1(by_subset)


def findings(content: dict[str, Any]) -> list[str]:
    """What stands out, in sentences. The thresholds are where not knowing would mislead a reader."""
    found = []
    n, accuracy, length = content["n"], content["accuracy"], content["length"]
    if content["ties"] == n:
        return ["Every pair is a tie: the model gives all replies the same reward, and has learned nothing."]
    rows = content["rows"]
    if rows["left_out"] > MAX_SKIPPED * rows["read"]:
        found.append(f"{rows['left_out'] / rows['read']:.0%} of the rows were skipped: this report covers the others.")
    if content["ties"] > 0.01 * n:
        found.append(f"{content['ties'] / n:.1%} of the pairs are ties: the model gives both replies the same reward.")
    low, high = content["interval"]
    guessing, is_of_pairs = content["guessing"], content["pairs"] == n
    if low <= guessing <= high:
        found.append(f"On this many rows the accuracy is indistinguishable from guessing ({guessing:.0%}).")
    elif high < guessing and is_of_pairs:
        found.append("The model prefers the rejected reply more often than the chosen one.")
    elif high < guessing:
        found.append(f"The model does worse than guessing ({guessing:.0%}).")
    controlled = length["length_controlled"]["accuracy"]
    found += filter(None, [length_preference(length)])
    rule, best = max(content["baselines"].items(), key=lambda item: item[1]["accuracy"] or 0)
    if best["accuracy"] is not None and low <= best["accuracy"]:
        found.append(f"The rule “{rule}” alone reaches {best['accuracy']:.1%}: the model is not clearly better.")
    if is_of_pairs and controlled is not None and accuracy - controlled > 0.05:
        found.append(
            f"{100 * (accuracy - controlled):.1f} points of the accuracy are due to length: if the longer reply were "
            f"chosen exactly half of the time, it would be {controlled:.1%}."
        )
    temperature, ece = content["calibration"]["temperature"], content["calibration"]["ece"]
    by_chance = content["calibration"]["ece_floor"]
    if temperature and temperature["low"] > 1.25:
        found.append(
            "It is overconfident: it is right less often than its rewards claim. "
            f"Dividing them by {temperature['value']:.2g} corrects that."
        )
    elif temperature and temperature["high"] is not None and temperature["high"] < 0.8:
        found.append(
            "It is underconfident: it is right more often than its rewards claim. "
            f"Dividing them by {temperature['value']:.2g} corrects that."
        )
    elif ece > by_chance["high"]:
        found.append(
            f"How sure it is and how often it is right differ by {ece:.1%} on average; by chance it would be "
            f"{by_chance['mean']:.1%}, and rarely more than {by_chance['high']:.1%}."
        )
    worst = [(name, one) for name, one in content["by_subset"].items() if one["high"] < low]
    for name, one in sorted(worst, key=lambda item: item[1]["accuracy"])[:3]:
        found.append(f"Weak at “{name}”: {one['accuracy']:.1%} of {one['n']:,}, against {accuracy:.1%} over all.")
    return found


def length_preference(length: dict[str, Any]) -> str | None:
    """Which replies the model prefers, the longer or the shorter ones, and what that costs; None if it hardly does."""
    longer, within = length["model_prefers_longer"], length["within_prompts"]["pearson"]
    if longer is None:
        return None
    accuracies = {"longer": length["better_is_longer"], "shorter": length["better_is_shorter"]}
    side, other = ("longer", "shorter") if longer > 0.5 else ("shorter", "longer")
    share, people = max(longer, 1 - longer), length["people_prefer_longer"]
    on_its_side, on_the_other = accuracies[side], accuracies[other]
    if share <= 0.95 and abs(within or 0) <= 0.5 and on_its_side["low"] <= on_the_other["high"]:
        return None
    found = (
        f"{'Its reward is length: it' if share > 0.95 else 'It'} prefers the {side} reply in {share:.0%} of the pairs "
        f"whose replies differ in length (people do in {people if side == 'longer' else 1 - people:.0%})"
    )
    if not on_its_side["n"] or not on_the_other["n"]:
        return f"{found}."
    return (
        f"{found}. It is right in {on_its_side['accuracy']:.0%} where the better reply is {side}, "
        f"in {on_the_other['accuracy']:.0%} where it is {other}."
    )


def compare(table: ScoreTable, other: ScoreTable) -> dict[str, Any]:
    """Two models on the comparisons that both could score."""
    ours, theirs = _scored_by_both(table, other)
    found = metrics.compare(table.reward_margins[ours], other.reward_margins[theirs])
    return found | {"only_scored_by_one": len(table.positions) + len(other.positions) - 2 * len(ours)}


def _scored_by_both(table: ScoreTable, other: ScoreTable) -> tuple[np.ndarray, np.ndarray]:
    """The same comparisons as indices into either table."""
    return np.intersect1d(table.positions, other.positions, return_indices=True)[1:]


# -- Pairs worth reading -----------------------------------------------------------------------------------------------


def worth_reading(table: ScoreTable, other: ScoreTable | None) -> dict[str, list[int]]:
    """Positions of the pairs worth reading, by kind, the most telling first."""
    order = np.argsort(table.reward_margins, kind="stable")
    wrong = order[table.reward_margins[order] < 0][:MOST_READ]
    size = np.abs(table.reward_margins)
    near = np.argsort(size, kind="stable")[: min(MOST_READ, int((expit(size) < NEAR_TIE).sum()))]
    found = {"mistakes": table.positions[wrong].tolist(), "near_ties": table.positions[near].tolist()}
    if other is not None:
        ours, theirs = _scored_by_both(table, other)
        apart = table.reward_margins[ours] - other.reward_margins[theirs]
        differ = np.flatnonzero((table.reward_margins[ours] > 0) != (other.reward_margins[theirs] > 0))
        furthest = differ[np.argsort(-np.abs(apart[differ]), kind="stable")][:MOST_READ]
        found["disagreements"] = table.positions[ours[furthest]].tolist()
    return found


def suspected_mislabels(table: ScoreTable, other: ScoreTable | None) -> set[int]:
    """Positions whose label is probably wrong: after temperature scaling the model gives it less than 5 %.

    With a second model both must agree.
    """
    found = [
        set(one.positions[metrics.label_probability(one.reward_margins) < metrics.MISLABEL_BELOW].tolist())
        for one in ([table, other] if other else [table])
    ]
    return set.intersection(*found)


def readings(data: Data, table: ScoreTable, other: ScoreTable | None, out: Path | None) -> dict[str, Any]:
    """The texts of the pairs worth reading. With `out`, also every comparison as a line of JSON, all or nothing."""
    wanted, suspects = worth_reading(table, other), suspected_mislabels(table, other)
    chances = metrics.label_probability(table.reward_margins)
    positions = {position for found in wanted.values() for position in found}
    texts: dict[int, dict[str, Any]] = {}
    with atomic_files.atomic_file(out) as file:
        for row in data.read():
            if not out and row.position not in positions:
                continue
            entry = _entry(data, row, table.log, other and other.log)
            if "left_out" not in entry:
                entry["suspected_mislabel"] = row.position in suspects
                if out:
                    entry["p_label"] = float(chances[np.searchsorted(table.positions, row.position)])
            file.write(json.dumps(entry, ensure_ascii=False) + "\n")  # without `out`, nowhere
            if row.position in positions:
                texts[row.position] = entry
    return {
        "suspected_mislabels": len(suspects),
        **{kind: [texts[position] for position in found] for kind, found in wanted.items()},
    }


def _entry(data: Data, row: Row, log: ScoreLog, other: ScoreLog | None) -> dict[str, Any]:
    """One row as a line of --scores_out."""
    place = data.parts[row.part].source.place(row.number)
    entry: dict[str, Any] = {"row": row.number, "place": utils.seen_from_here(place)}
    found, content = log[row.position], row.content
    if isinstance(found, str):
        return entry | {"left_out": found}
    if content.subset:
        entry["subset"] = content.subset
    entry |= _scores(content, found)
    if other is not None and not isinstance(theirs := other[row.position], str):
        entry["against"] = _scores(content, theirs)
    replies = {"chosen": list(content.chosen), "rejected": list(content.rejected)}
    return entry | ({side: found[0] for side, found in replies.items()} if content.is_pair else replies)


def _scores(content: Comparison, scored: Scored) -> dict[str, Any]:
    # the shortest text that is the same number in fp32
    rewards, lengths = [float(str(np.float32(reward))) for reward in scored.rewards], scored.lengths
    n = len(content.chosen)
    sides: dict[str, Any] = {"reward_chosen": rewards[:n], "reward_rejected": rewards[n:]}
    sides |= {"tokens_chosen": lengths[:n], "tokens_rejected": lengths[n:]}
    if content.is_pair:
        sides = {name: values[0] for name, values in sides.items()}
    margin = np.float32(min(rewards[:n])) - np.float32(max(rewards[n:]))
    return {**sides, "margin": float(str(margin))}
