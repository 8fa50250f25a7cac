"""sampler.py: which examples each step takes."""

import numpy as np
import pytest

from data_pipeline import sampler


def steps_of(plan, epoch):
    first = epoch * plan.steps_per_epoch + 1
    return [plan.indices_for(step).tolist() for step in range(first, first + plan.steps_per_epoch)]


def order_of(plan, epoch):
    return [index for step in steps_of(plan, epoch) for index in step]


@pytest.mark.parametrize("num_examples, examples_per_step", [(100, 32), (96, 32), (5, 32), (7, 1), (1, 1)])
def test_each_epoch_takes_every_example_once(num_examples, examples_per_step):
    plan = sampler.StepSampler(num_examples, examples_per_step, epochs=3, seed=0)
    assert plan.total_steps == 3 * plan.steps_per_epoch
    for epoch in range(3):
        steps = steps_of(plan, epoch)
        assert sorted(order_of(plan, epoch)) == list(range(num_examples))
        assert all(len(step) == examples_per_step for step in steps[:-1])
        assert len(steps[-1]) == (num_examples - 1) % examples_per_step + 1


def test_the_last_step_of_an_epoch_is_smaller():
    plan = sampler.StepSampler(num_examples=10, examples_per_step=4, epochs=2, seed=0)
    assert [len(plan.indices_for(step)) for step in range(1, 7)] == [4, 4, 2, 4, 4, 2]
    assert [plan.examples_seen(step) for step in range(7)] == [0, 4, 8, 10, 14, 18, 20]


@pytest.mark.parametrize("num_examples, examples_per_step", [(100, 32), (96, 32), (5, 32)])
def test_examples_seen_is_the_sum_of_the_steps(num_examples, examples_per_step):
    plan = sampler.StepSampler(num_examples, examples_per_step, epochs=3, seed=1)
    seen = 0
    for step in range(1, plan.total_steps + 1):
        seen += len(plan.indices_for(step))
        assert plan.examples_seen(step) == seen
    assert seen == 3 * num_examples


@pytest.mark.parametrize("max_steps, total", [(0, 8), (3, 3), (8, 8), (9, 8)])
def test_max_steps_only_shortens(max_steps, total):
    assert sampler.StepSampler(100, 32, epochs=2, seed=0, max_steps=max_steps).total_steps == total


def test_the_order_depends_on_seed_and_epoch_and_on_nothing_else():
    plans = [sampler.StepSampler(200, 32, epochs=2, seed=seed) for seed in (5, 5, 6)]
    shorter = sampler.StepSampler(200, 32, epochs=9, seed=5, max_steps=3)
    orders = [[order_of(plan, epoch) for epoch in (0, 1)] for plan in plans]
    assert orders[0] == orders[1] and order_of(shorter, 0) == orders[0][0]
    assert orders[0][0] != orders[0][1] and orders[0][0] != orders[2][0] != orders[2][1]
    assert orders[0][0] != list(range(200)), "not shuffled"


def test_a_step_is_the_same_whichever_steps_were_asked_before():
    plan = sampler.StepSampler(100, 32, epochs=3, seed=0)
    forwards = [plan.indices_for(step).tolist() for step in range(1, 13)]
    sampler._shuffled.cache_clear()
    backwards = [plan.indices_for(step).tolist() for step in range(12, 0, -1)]
    assert forwards == backwards[::-1]


def test_the_fixed_sample_is_fixed_sorted_and_spread():
    sample = sampler.fixed_sample(1000, 100, seed=0)
    assert np.array_equal(sample, sampler.fixed_sample(1000, 100, seed=0))
    assert not np.array_equal(sample, sampler.fixed_sample(1000, 100, seed=1))
    assert len(set(sample.tolist())) == 100 and (np.diff(sample) > 0).all()
    assert all(20 <= ((sample >= start) & (sample < start + 500)).sum() <= 80 for start in (0, 500))


@pytest.mark.parametrize("num_examples, size", [(10, 0), (10, 10), (10, 11), (0, 5), (0, 0)])
def test_the_fixed_sample_of_everything_is_everything(num_examples, size):
    assert sampler.fixed_sample(num_examples, size, seed=0).tolist() == list(range(num_examples))
