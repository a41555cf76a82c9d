"""Work ahead in threads: order, bounds, errors."""

from __future__ import annotations

import threading

import pytest

from padseg.system.threads import ahead, batches, threads


def test_results_come_in_order_whichever_is_ready_first():
    second = threading.Event()

    def work(number):
        if number == 0:
            assert second.wait(20)  # the first ends after the second
        if number == 1:
            second.set()
        return number * 2

    with threads(2) as pool:
        assert list(ahead(pool, work, range(20), 5)) == [number * 2 for number in range(20)]


@pytest.mark.parametrize('depth', [1, 4])
def test_no_more_than_depth_items_are_taken_before_they_are_asked_for(depth):
    taken = []
    stuck = threading.Event()

    def items():
        for number in range(50):
            taken.append(number)
            yield number

    with threads(1) as pool:
        results = ahead(pool, lambda number: stuck.wait(20) if number else number, items(), depth)
        assert next(results) == 0
        assert len(taken) <= depth + 1
        stuck.set()
        assert len(list(results)) == 49


def test_an_error_ends_the_work():
    done = []

    def work(number):
        if number == 3:
            raise ZeroDivisionError
        done.append(number)
        return number

    with pytest.raises(ZeroDivisionError), threads(1) as pool:
        for _ in ahead(pool, work, iter(range(1000)), 4):
            pass
    assert len(done) < 20


def test_batches():
    assert list(batches(range(5), 2)) == [[0, 1], [2, 3], [4]]
    assert list(batches([], 2)) == []
