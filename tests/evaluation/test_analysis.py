"""analysis.py: figures from numbers alone, of which each pair leaves few; what is said of them, and what is shown."""

import tracemalloc
from types import SimpleNamespace

import numpy as np
import scipy.optimize
import scipy.special
import scipy.stats  # noqa: F401 - modules are no figures of a pair

from evaluation import analysis, report, scores
from evaluation.eval_data import Row

PAIRS = 30_000
CONTENT = SimpleNamespace(subset="one of two", turns=1, chosen=("a dialogue",), key=None, unused=(), shape="")


def test_a_pair_leaves_numbers_only_and_few_of_them(tmp_path):
    rewards = np.random.default_rng(0).normal(size=(PAIRS, 2)).astype(np.float32)
    tracemalloc.start()
    try:
        log, columns = scores.ScoreLog(tmp_path, "key"), scores.RowColumns()
        for position in range(PAIRS):
            columns.add(Row(position, 0, position, CONTENT))
        log.add((position, (rewards[position].tolist(), [position % 300, 150])) for position in range(PAIRS))
        kept, _ = tracemalloc.get_traced_memory()
        table = scores.build_table(log, columns, "fingerprint")
        content = analysis.measure(table)
        analysis.worth_reading(table, table)
        analysis.compare(table, table)
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert content["n"] == content["pairs"] == PAIRS
    assert content["right"] == int((rewards[:, 0] > rewards[:, 1]).sum())
    assert kept / PAIRS < 100 and most / PAIRS < 500, (kept / PAIRS, most / PAIRS)


def table_of(margins, longer_by, tmp_path):
    """Pairs with these differences of reward and length between the chosen and the rejected reply."""
    tmp_path.mkdir(exist_ok=True)
    log, columns = scores.ScoreLog(tmp_path, "key"), scores.RowColumns()
    for position in range(len(margins)):
        columns.add(Row(position, 0, position, CONTENT))
    log.add(
        (position, ([float(margin), 0.0], [100 + int(length), 100]))
        for position, (margin, length) in enumerate(zip(margins, longer_by, strict=True))
    )
    return scores.build_table(log, columns, "fingerprint")


def test_a_liking_for_one_length_is_said_with_its_direction(tmp_path):
    draw = np.random.default_rng(0)
    longer_by = draw.integers(1, 50, 300) * draw.choice([-1, 1], 300)
    for side, sign in (("shorter", -1), ("longer", 1)):
        margins = sign * 0.02 * longer_by + draw.normal(0.2, 0.5, 300)
        content = analysis.measure(table_of(margins, longer_by, tmp_path / side))
        [found] = [finding for finding in content["findings"] if "differ in length" in finding]
        assert found.startswith(f"It prefers the {side} reply in ")
        right = [content["length"][f"better_is_{each}"]["accuracy"] for each in ("longer", "shorter")]
        better, worse = max(right), min(right)
        assert f"right in {better:.0%} where the chosen reply is {side}, but in {worse:.0%}" in found
        [row] = [value for what, value in report.tables(content | NO_READING)[0][1] if "length within prompts" in what]
        assert row.endswith(f"{side} replies get more")
    fair = analysis.measure(table_of(draw.normal(0.2, 0.5, 300), longer_by, tmp_path / "fair"))
    assert not any("differ in length" in finding for finding in fair["findings"])


NO_READING = {"reading": {"suspected_mislabels": 0}, "against": None}


def test_near_ties_are_near(tmp_path):
    margins = np.array([3.0, -2.5, 0.02, 4.0, -0.01, 2.0, 3.5, 2.2])
    near = analysis.worth_reading(table_of(margins, np.ones(8), tmp_path), None)["near_ties"]
    assert near == [4, 2]


def test_a_missing_temperature_is_said_in_words(tmp_path):
    for margins, words in (([1.0, 2.0], "no pair is wrong"), ([-1.0, 0.5, -2.0], "say nothing about these labels")):
        content = analysis.measure(table_of(margins, np.ones(len(margins)), tmp_path / words))
        assert report.temperature(content)[0] == "none" and words in report.temperature(content)[1]
        [row] = [value for what, value in report.tables(content | NO_READING)[0][1] if what == "best temperature"]
        assert words in row
