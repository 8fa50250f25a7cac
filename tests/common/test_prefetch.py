"""prefetch.py: items in order, one ahead; errors in their place; nothing left after an early stop."""

import contextlib
import threading
import time

import pytest

from common.prefetch import prefetched


def test_prefetched_batches_come_in_order_and_one_ahead():
    begun = []

    def build(number):
        begun.append(number)
        return number * 10

    with contextlib.closing(prefetched(iter(range(6)), build)) as batches:
        assert next(batches) == 0
        wait_until(lambda: begun == [0, 1])
        time.sleep(0.05)
        assert begun == [0, 1], "more than one was made ahead"
        assert list(batches) == [10, 20, 30, 40, 50]
    assert begun == list(range(6))


def wait_until(is_so, seconds=10):
    ends = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < ends, "it did not come to that"
        time.sleep(0.002)


def test_prefetching_works_while_the_consumer_does():
    started = threading.Event()

    def build(number):
        if number == 1:
            started.set()
        return threading.current_thread().name

    batches = prefetched(range(3), build)
    assert next(batches).startswith("prefetch")
    assert started.wait(10), "the second batch is only begun when it is asked for"
    batches.close()


def test_an_error_of_building_comes_out_in_its_place_and_ends_it():
    built = []

    def build(number):
        if number == 2:
            raise OSError("the disk is gone")
        built.append(number)
        return number

    batches = prefetched(range(10), build)
    assert [next(batches), next(batches)] == [0, 1]
    with pytest.raises(OSError, match="the disk is gone"):
        next(batches)
    assert list(batches) == [] and set(built) <= {0, 1, 3}, "it went on after the error"
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("prefetch")]


@pytest.mark.parametrize("depth", [0, 1, 3])
def test_stopping_early_builds_nothing_more_and_leaves_no_thread(depth):
    built = []
    batches = prefetched(range(1000), lambda number: built.append(number) or number, depth)
    assert [next(batches) for _ in range(3)] == [0, 1, 2]
    batches.close()
    assert 3 <= len(built) <= 3 + depth
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("prefetch")]
