"""Compute the next items of an iterator in a thread while the caller uses the current one."""

from __future__ import annotations

import collections
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")


def prefetch(items: Iterator[Item], depth: int = 1) -> Generator[Item, None, None]:
    """Yield the items of an iterator that one thread advances, in their order.

    Args:
        items: yields no None.
        depth: maximum number of items computed ahead of the caller.

    Raises:
        Exception: what `items` raises, at the same item.
    """
    worker = ThreadPoolExecutor(1, "drn-prefetch")
    try:
        pending = collections.deque(worker.submit(next, items, None) for _ in range(depth))
        while (item := pending.popleft().result()) is not None:
            pending.append(worker.submit(next, items, None))
            yield item
    finally:
        # After an interruption nobody takes the items that were not begun.
        worker.shutdown(cancel_futures=True)
