"""reward_bench.py: both benchmarks' aggregation against values worked by hand."""

import math

import pytest

from evaluation import reward_bench
from evaluation.reward_bench import Group


def accuracies(**values):
    return {name.replace("_", "-"): {"accuracy": value} for name, value in values.items()}


def test_sections_weigh_their_subsets_by_the_prompts_they_count_for():
    found = reward_bench.scores_v1(accuracies(math_prm=0.5, hep_cpp=1.0, hep_go=0.0, alpacaeval_easy=0.9))
    assert found["parts"] == {
        "Chat": pytest.approx(0.9), "Reasoning": pytest.approx((984 * 0.5 + 164) / (984 + 164 + 164)),
    }  # fmt: skip
    assert found["score"] == pytest.approx((0.9 + found["parts"]["Reasoning"]) / 2)
    assert len(found["missing"]) == 23 - 4


def test_all_subsets_of_the_benchmark_are_known():
    assert len(reward_bench.SUBSETS) == 23
    weights = {name: sum(section.values()) for name, section in reward_bench.SECTIONS.items()}
    assert weights == {"Chat": 358, "Chat Hard": 456, "Safety": 740, "Reasoning": 984 + 6 * 164}


def test_other_subsets_are_no_reward_bench():
    assert reward_bench.scores_v1(accuracies(helpful_base=0.9, math_prm=1.0)) is None
    assert reward_bench.scores_v1({}) is None


def test_one_against_several_is_right_at_the_top_and_shares_it():
    groups = [
        Group("Math", "1", (2.0,), (1.0, 0.0, -1.0)),
        Group("Math", "2", (2.0,), (2.0, 0.0, 2.0)),
        Group("Math", "3", (0.0,), (1.0, 0.0, 0.0)),
        Group("Focus", "4", (3.0,), (1.0, 0.0, 0.0)),
    ]
    found = reward_bench.scores_v2(groups)
    assert found["parts"] == {"Focus": 1.0, "Math": pytest.approx((1 + 1 / 3 + 0) / 3)}
    assert found["score"] == pytest.approx((1 + 4 / 9) / 2)
    assert found["missing"] == ["Factuality", "Precise IF", "Safety", "Ties"]


def test_ties_by_hand():
    groups = [
        Group("Ties", "ref:1", (5.0,), (1.0,)),  # gap 4
        Group("Ties", "tied:1", (4.0, 3.0), (1.0, 0.0)),  # gap 2, spread 1
        Group("Ties", "ref:2", (1.0,), (0.5,)),  # gap 0.5
        Group("Ties", "tied:2", (4.0, 3.0), (1.0, 0.0)),  # gap 2, spread 1; the smaller gap is 0.5
        Group("Ties", "ref:3", (1.0,), (2.0,)),  # wrong, gap -1
        Group("Ties", "tied:3", (5.0, 1.0), (0.0, 0.0)),  # gap 1, spread 4
    ]
    wanted = 0.3 * 1 + 0.3 * 2 / 3 + 0.2 * 2 / 3 + 0.2 * 1 / 3
    wanted += 0.01 * (math.tanh(2 - 1) + math.tanh(0.5 - 1) + math.tanh(-0.25 - 1)) / 3
    assert reward_bench.ties_score(groups) == pytest.approx(wanted)
    assert reward_bench.scores_v2(groups)["parts"]["Ties"] == pytest.approx(wanted)


def test_right_answers_that_are_all_equal_do_not_divide_by_zero():
    groups = [Group("Ties", "ref:1", (1.0,), (0.0,)), Group("Ties", "tied:1", (1.0, 1.0), (0.0,))]
    assert reward_bench.ties_score(groups) == pytest.approx(1.01)
    assert reward_bench.ties_score(groups[:1]) is None
