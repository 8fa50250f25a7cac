"""analysis.py: a report's figures are computed from numbers alone, of which each pair leaves few."""

import tracemalloc
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.optimize
import scipy.special
import scipy.stats  # noqa: F401 - modules are no figures of a pair

from evaluation import analysis, metrics, report, scores
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


def table_of(folder, rewards, lengths):
    """The table of pairs with these rewards (chosen, rejected) and lengths."""
    log, columns = scores.ScoreLog(folder, "key"), scores.RowColumns()
    for position in range(len(rewards)):
        columns.add(Row(position, 0, position, CONTENT))
    log.add((position, both) for position, both in enumerate(zip(rewards, lengths, strict=True)))
    return scores.build_table(log, columns, "fingerprint")


def length_of(longer, shorter, sign):
    """`metrics.length_bias` of pairs of which (right, n) have the longer, and the shorter, reply chosen."""
    longer_by = np.repeat([40 * sign, -40 * sign], [longer[1], shorter[1]])
    is_right = np.concatenate([np.arange(n) < right for right, n in (longer, shorter)])
    margin = np.where(is_right, 1.0, -1.0)
    pairs = np.stack([margin, np.zeros(len(margin))], axis=1), np.stack([100 + longer_by, np.full(len(margin), 100)], 1)
    return metrics.length_bias(*pairs)


@pytest.mark.parametrize(("sign", "side", "other"), [(1, "shorter", "longer"), (-1, "longer", "shorter")])
def test_a_preference_for_short_or_long_replies_is_named_with_what_it_costs(sign, side, other):
    # right in 39 of 100 where the better reply is of the one kind, in 84 of 100 where it is of the other: so in
    # 61 + 84 of 200 the model prefers that other kind
    found = analysis.length_preference(length_of((39, 100), (84, 100), sign))
    assert found == (
        f"It prefers the {side} reply in 72% of the pairs whose replies differ in length (people do in 50%). "
        f"It is right in 84% where the better reply is {side}, in 39% where it is {other}."
    )


def test_a_model_that_hardly_cares_for_length_is_not_accused():
    assert analysis.length_preference(length_of((70, 100), (74, 100), 1)) is None
    only_longer = analysis.length_preference(length_of((98, 100), (0, 0), 1))
    assert only_longer.startswith("Its reward is length: it prefers the longer reply in 98%")
    assert "None" not in only_longer and only_longer.endswith("(people do in 100%).")


def test_only_small_differences_are_near_ties(tmp_path):
    rewards = [[4.26, 1.0], [0.05, 0.0], [0.0, 0.15], [0.0, 0.25], [-2.0, 1.0]]
    table = table_of(tmp_path, rewards, [[20, 20]] * 5)
    found = analysis.worth_reading(table, None)
    assert found["near_ties"] == [1, 2]
    assert found["mistakes"] == [4, 3, 2]


def test_a_temperature_that_cannot_be_fitted_is_explained(tmp_path):
    for name, rewards, words in (
        ("perfect", [[3.0, 1.0], [2.0, 1.0]], "no pair is wrong"),
        ("useless", [[1.0, 2.0], [1.0, 0.5]], "the chosen reply gets no higher reward"),
    ):
        (tmp_path / name).mkdir()
        content = analysis.measure(table_of(tmp_path / name, rewards, [[20, 30], [30, 20]]))
        content["reading"] = {"suspected_mislabels": 0}
        shown = dict(report.tables(content)[0][1])
        assert shown["best temperature"].startswith("none: ") and words in shown["best temperature"]
        assert shown["the same of a perfectly calibrated model, by chance"].startswith("about ")


def test_the_correlation_says_which_replies_get_more(tmp_path):
    content = analysis.measure(table_of(tmp_path, [[3.0, 1.0], [2.0, 1.0], [0.0, 1.5]], [[5, 30], [10, 20], [30, 12]]))
    content["reading"] = {"suspected_mislabels": 0}
    shown = dict(report.tables(content)[0][1])
    words = shown["correlation of reward and length within prompts, r (ρ)"]
    assert words == "-1.00 (-1.00): shorter replies get more"
