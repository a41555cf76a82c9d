"""Work done ahead of its use in threads, in order and with a bound."""

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
    """A thread pool that cancels pending work on exit, also after an error."""
    pool = ThreadPoolExecutor(number)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def ahead(pool: ThreadPoolExecutor, function: Callable[[A], B], items: Iterable[A], depth: int) -> Iterator[B]:
    """Yield function(item) for every item in order, computed in the pool at most `depth` items ahead."""
    running: deque[Future[B]] = deque()
    for item in items:
        running.append(pool.submit(function, item))
        while running and (len(running) > depth or running[0].done()):
            yield running.popleft().result()
    while running:
        yield running.popleft().result()


def batches(items: Iterable[A], size: int) -> Iterator[list[A]]:
    """Yield the items in lists of `size`; the last list may be shorter."""
    iterator = iter(items)
    while batch := list(islice(iterator, size)):
        yield batch
