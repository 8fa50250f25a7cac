"""evaluation/metrics.py against values worked by hand, and against scikit-learn and scipy where they have them."""

import math

import numpy as np
import pytest
from scipy import stats as scipy_stats
from sklearn.calibration import calibration_curve
from sklearn.metrics import brier_score_loss, log_loss

from evaluation import metrics


def test_accuracy_counts_ties_apart_and_its_interval_is_wilsons():
    found = metrics.accuracy(np.array([1.0, 2.0, 0.5, 0.0, -1.0, 3.0, 1.0, 1.0, 0.0, 1.0]))
    assert (found["n"], found["right"], found["ties"], found["accuracy"]) == (10, 7, 2, 0.7)
    wanted = scipy_stats.binomtest(7, 10).proportion_ci(method="wilson")
    assert (found["low"], found["high"]) == pytest.approx((wanted.low, wanted.high))
    # Wilson by hand: z² = 3.8415, (0.7 + 0.19207) / 1.38415 ± 1.95996 / 1.38415 · √(0.021 + 0.0096037)
    assert (found["low"], found["high"]) == pytest.approx((0.39678, 0.89221), abs=1e-5)


def test_no_pairs_make_no_accuracy():
    found = metrics.accuracy(np.array([]))
    assert (found["n"], found["accuracy"], found["low"], found["high"]) == (0, None, 0.0, 1.0)


def test_breakdown_leaves_out_groups_without_pairs_and_loses_no_pair():
    margin, groups = np.array([1.0, -1.0, 0.0, 2.0]), np.array([0, 0, 2, 2])
    found = metrics.breakdown(margin, groups, ["a", "b", "c"])
    assert list(found) == ["a", "c"]
    assert (found["a"]["accuracy"], found["c"]["accuracy"], found["c"]["ties"]) == (0.5, 0.5, 1)
    assert sum(one["n"] for one in found.values()) == 4


def test_every_length_has_one_bucket():
    indices, names = metrics.length_buckets(np.array([0, 15, 16, 31, 1023, 1024, 10**6]))
    assert [names[i] for i in indices] == [
        "0 to 15", "0 to 15", "16 to 31", "16 to 31", "512 to 1023", "1024 and more", "1024 and more",
    ]  # fmt: skip


# -- Length ------------------------------------------------------------------------------------------------------------


def test_a_model_that_measures_length_is_exposed():
    lengths = np.array([[10, 5], [20, 30], [7, 9], [40, 8], [12, 12], [50, 3]])
    found = metrics.length_bias(lengths.astype(float), lengths)
    assert found["within_prompts"]["pearson"] == pytest.approx(1) == found["across_prompts"]["spearman"]
    assert found["better_is_longer"]["accuracy"] == 1 and found["better_is_shorter"]["accuracy"] == 0
    assert found["equally_long"]["ties"] == 1
    assert found["model_prefers_longer"] == 1 and found["people_prefer_longer"] == pytest.approx(3 / 5)
    assert found["length_controlled"]["accuracy"] == 0.5


def test_length_controlled_accuracy_is_the_mean_over_both_directions():
    # the longer is better in three, of which two are right; the shorter in two, of which one is right
    margin, longer_by = np.array([1.0, 1.0, -1.0, 1.0, -1.0, 1.0]), np.array([5, 5, 5, -5, -5, 0])
    found = metrics.length_controlled(margin, longer_by)
    assert found["accuracy"] == pytest.approx((2 / 3 + 1 / 2) / 2)
    # square and add of Wilson's (0.20766, 0.93851) for 2 of 3 and (0.09453, 0.90547) for 1 of 2
    assert found["low"] == pytest.approx(0.583333 - math.hypot(0.459007, 0.405470) / 2, abs=1e-4)
    assert found["high"] == pytest.approx(0.583333 + math.hypot(0.271843, 0.405470) / 2, abs=1e-4)
    assert metrics.length_controlled(margin[:3], longer_by[:3])["accuracy"] is None


def test_correlation_within_prompts_is_that_of_values_less_their_prompts_mean():
    draw = np.random.default_rng(0)
    rewards, lengths = draw.normal(size=(50, 2)), draw.integers(1, 99, size=(50, 2))
    found = metrics.length_bias(rewards, lengths)["within_prompts"]["pearson"]
    centred = [(a - a.mean(axis=1, keepdims=True)).ravel() for a in (rewards, lengths)]
    assert found == pytest.approx(np.corrcoef(*centred)[0, 1])
    swapped = metrics.length_bias(rewards[:, ::-1], lengths[:, ::-1])["within_prompts"]["pearson"]
    assert swapped == pytest.approx(found), "it depends on which reply is written first"


def test_a_constant_model_correlates_with_nothing():
    found = metrics.length_bias(np.zeros((4, 2)), np.arange(8).reshape(4, 2))
    assert found["within_prompts"] == {"pearson": None, "spearman": None}
    assert found["model_prefers_longer"] is None


def test_the_trend_is_the_line_of_least_squares():
    draw = np.random.default_rng(0)
    longer_by = draw.integers(-200, 200, size=300)
    margin = 0.5 - 0.01 * longer_by + draw.normal(size=300)
    found = metrics.trend(longer_by, margin)
    assert (found["slope"], found["intercept"]) == pytest.approx(tuple(np.polyfit(longer_by, margin, 1)))
    # twice the standard error of the slope: the noise's deviation over that of the lengths, over √n
    assert found["high"] - found["slope"] == pytest.approx(1.96 / longer_by.std() / math.sqrt(300), rel=0.1)
    assert found["low"] < -0.01 < found["high"]
    assert metrics.trend(np.array([5, 5, 5]), np.array([1.0, 2.0, 3.0])) is None
    assert metrics.trend(np.array([1, 2, 3]), np.zeros(3)) is None
    assert metrics.trend(np.array([1, 2]), np.array([1.0, 2.0])) is None


# -- Calibration -------------------------------------------------------------------------------------------------------


def test_calibration_of_four_pairs_by_hand():
    # σ(log 3) = 3/4: three right and one wrong is perfectly calibrated
    margin = np.log(3) * np.array([1.0, 1.0, 1.0, -1.0])
    found = metrics.calibration(margin)
    assert found["ece"] == pytest.approx(0, abs=1e-12)
    assert found["brier"] == pytest.approx((3 * (1 / 4) ** 2 + (3 / 4) ** 2) / 4)
    assert found["log_loss"] == pytest.approx(-(3 * math.log(3 / 4) + math.log(1 / 4)) / 4)
    assert found["temperature"]["value"] == pytest.approx(1)
    assert found["bins"] == [{"claimed": pytest.approx(0.75), "happened": 0.75, "count": 4}]


def test_overconfidence_has_its_size():
    # it says 9/10 and is right in half of the cases: off by 0.4
    found = metrics.calibration(np.log(9) * np.array([1.0, -1.0] * 10))
    assert found["ece"] == pytest.approx(0.4)
    assert found["temperature"] is None, "the mean margin is 0: no temperature helps"


def test_calibration_equals_scikit_learns_on_both_orders():
    margin = np.random.default_rng(1).normal(0.7, 1.5, size=500)
    p = 1 / (1 + np.exp(-margin))
    outcomes, said = np.repeat([1, 0], 500), np.concatenate([p, 1 - p])
    found = metrics.calibration(margin)
    assert found["brier"] == pytest.approx(brier_score_loss(outcomes, said))
    assert found["log_loss"] == pytest.approx(log_loss(outcomes, said))
    # ECE once more, from both orders in twice the bins
    happened, claimed = calibration_curve(outcomes, said, n_bins=20)
    counts = np.histogram(said, bins=20, range=(0, 1))[0]
    assert found["ece"] == pytest.approx((np.abs(happened - claimed) * counts[counts > 0]).sum() / 1000)
    assert sum(one["count"] for one in found["bins"]) == 500


def test_ties_claim_a_half_and_half_happens():
    found = metrics.calibration(np.zeros(7))
    assert found["bins"] == [{"claimed": 0.5, "happened": 0.5, "count": 7}]
    assert (found["ece"], found["brier"], found["log_loss"]) == (0, 0.25, pytest.approx(math.log(2)))


def test_a_perfectly_calibrated_model_has_an_error_by_chance():
    # one pair at 3/4 is off by 1/4 or 3/4; of four, the number of right ones is off by 3, 2, 1, 0 or 1
    one, four = (metrics.ece_floor(np.full(n, 0.75)) for n in (1, 4))
    assert one["mean"] == pytest.approx(2 * 0.75 * 0.25, rel=0.05)
    assert four["mean"] == pytest.approx((3 + 2 * 12 + 54 + 81) / 256 / 4, rel=0.05)
    assert one["high"] == 0.75
    assert metrics.ece_floor(np.full(9, 0.5)) == {"mean": 0, "high": 0}, "ties do not scatter"


def test_the_floor_is_what_perfectly_calibrated_models_show():
    draw = np.random.default_rng(3)
    size = np.abs(draw.normal(0, 2, size=200))

    def ece(p):
        return metrics.calibration(np.where(draw.random(200) < p, size, -size))["ece"]

    claimed = 1 / (1 + np.exp(-size))
    floor = metrics.ece_floor(claimed)
    found = np.array([ece(claimed) for _ in range(400)])
    assert floor["mean"] == pytest.approx(found.mean(), rel=0.05)
    assert (found > floor["high"]).mean() == pytest.approx(0.05, abs=0.035)
    assert ece(0.5 + (claimed - 0.5) / 3) > floor["high"], "an overconfident one shows more"
    more = metrics.ece_floor(np.tile(claimed, 16))
    assert more["mean"] == pytest.approx(floor["mean"] / 4, rel=0.15), "and with more pairs it shrinks"


@pytest.mark.parametrize("wanted", [0.25, 1.0, 4.0, 300.0])
def test_a_known_temperature_is_recovered(wanted):
    draw = np.random.default_rng(int(wanted * 4))
    true_margin = draw.normal(0, 2, size=40_000)
    is_first = draw.random(40_000) < 1 / (1 + np.exp(-true_margin))  # people choose by σ(true margin)
    margin = wanted * np.where(is_first, true_margin, -true_margin)  # the model says T times that
    found = metrics.temperature(margin)
    assert found["low"] < wanted < found["high"]
    assert found["value"] == pytest.approx(wanted, rel=0.05)
    assert found["log_loss"] <= metrics.log_loss(margin) + 1e-12
    for other in (0.9, 1.1):
        assert found["log_loss"] < metrics.log_loss(margin / found["value"] * other), "not the minimum"


def test_no_temperature_where_every_pair_is_right_or_nothing_is_said():
    assert metrics.temperature(np.array([1.0, 2.0])) is None
    assert metrics.temperature(np.zeros(3)) is None
    assert metrics.temperature(np.array([-1.0, -2.0, 0.5])) is None
    assert metrics.temperature(np.array([])) is None


def test_huge_margins_overflow_nowhere():
    with np.errstate(over="raise", invalid="raise", divide="raise"):
        found = metrics.calibration(np.array([1e4, -1e4, 1e4], dtype=np.float32))
    assert found["log_loss"] == pytest.approx(1e4 / 3) and found["brier"] == pytest.approx(1 / 3)
    assert found["temperature"]["value"] == pytest.approx(1e4 / math.log(2))


# -- Two models --------------------------------------------------------------------------------------------------------


def margins_with(both, only_a, only_b, neither):
    a = [1.0] * both + [1.0] * only_a + [-1.0] * only_b + [0.0] * neither
    b = [2.0] * both + [0.0] * only_a + [2.0] * only_b + [-2.0] * neither
    return np.array(a), np.array(b)


def test_mcnemars_exact_test_by_hand():
    found = metrics.compare(*margins_with(10, 8, 2, 5))
    assert (found["both_right"], found["only_a_right"], found["only_b_right"], found["neither_right"]) == (10, 8, 2, 5)
    # 2 · (1 + 10 + 45) / 2^10
    assert found["mcnemar"] == {"test": "exact", "p_value": pytest.approx(0.109375)}
    assert found["accuracy_difference"] == pytest.approx(6 / 25)


def test_mcnemars_chi_squared_agrees_with_the_exact_test():
    found = metrics.compare(*margins_with(3000, 560, 490, 900))
    assert found["mcnemar"]["test"] == "chi-squared"
    # (|560 − 490| − 1)² / 1050 = 4.5343
    assert found["mcnemar"]["p_value"] == pytest.approx(scipy_stats.chi2.sf(4.534286, 1), abs=1e-6)
    assert found["mcnemar"]["p_value"] == pytest.approx(scipy_stats.binomtest(560, 1050).pvalue, abs=1e-3)


def test_the_bootstrap_is_scipys_over_pairs():
    a, b = margins_with(60, 25, 10, 5)
    found = metrics.compare(a, b)
    right = (a > 0).astype(float), (b > 0).astype(float)
    wanted = scipy_stats.bootstrap(
        right, lambda x, y, axis: x.mean(axis=axis) - y.mean(axis=axis), paired=True, method="percentile",
        n_resamples=10_000, rng=np.random.default_rng(7),
    ).confidence_interval  # fmt: skip
    assert (found["low"], found["high"]) == pytest.approx((wanted.low, wanted.high), abs=0.011)


def test_a_model_does_not_differ_from_itself():
    margin = np.array([1.0, -1.0, 0.0, 3.0])
    found = metrics.compare(margin, margin)
    assert found["mcnemar"]["p_value"] == 1 and (found["low"], found["high"]) == (0, 0)
