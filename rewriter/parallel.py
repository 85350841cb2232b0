"""Independent work on a thread for each core, in order."""

from __future__ import annotations

import collections
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch

A = TypeVar("A")
B = TypeVar("B")


def in_parallel(work: Callable[[A], B], items: Iterable[A], workers: int | None = None) -> Iterator[tuple[A, B]]:
    """(item, work(item)) in order, on a thread for each core, each with one thread of torch: sites are independent, and torch lets
    go of the interpreter while it computes. Little more than an item a worker is in flight.

    An interrupt cancels what has not begun."""
    count = workers or os.cpu_count() or 1
    before = torch.get_num_threads()
    waiting: collections.deque[tuple[A, Future[B]]] = collections.deque()
    pool = ThreadPoolExecutor(count, initializer=torch.set_num_threads, initargs=(1 if count > 1 else before,))
    try:
        for item in items:
            waiting.append((item, pool.submit(work, item)))
            if len(waiting) > count:
                item, future = waiting.popleft()
                yield item, future.result()
        while waiting:
            item, future = waiting.popleft()
            yield item, future.result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
