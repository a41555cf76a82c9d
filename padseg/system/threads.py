"""Work in threads ahead of its use, in order and bounded."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

A = TypeVar('A')
B = TypeVar('B')


@contextlib.contextmanager
def threads(number: int) -> Iterator[ThreadPoolExecutor]:
    """A pool that starts nothing more after an error."""
    pool = ThreadPoolExecutor(number)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def ahead(pool: ThreadPoolExecutor, function: Callable[[A], B], items: Iterable[A], depth: int) -> Iterator[B]:
    """function(item) for every item in order, computed in the pool, at most `depth` before they are asked for."""
    running: deque[Future[B]] = deque()
    for item in items:
        running.append(pool.submit(function, item))
        while running and (len(running) > depth or running[0].done()):
            yield running.popleft().result()
    while running:
        yield running.popleft().result()


def batches(items: Iterable[A], size: int) -> Iterator[list[A]]:
    """The items in lists of `size`, the last one shorter."""
    iterator = iter(items)
    while batch := list(islice(iterator, size)):
        yield batch
