"""analysis.py: a report's figures are computed from numbers alone, of which each pair leaves few."""

import tracemalloc
from types import SimpleNamespace

import numpy as np
import scipy.optimize
import scipy.special
import scipy.stats  # noqa: F401 - modules are no figures of a pair

from evaluation import analysis, scores
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
