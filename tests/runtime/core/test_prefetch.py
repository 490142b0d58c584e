"""Test `runtime.core.prefetch`: a thread computes items ahead, and errors are raised at their item."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest

from runtime.core.prefetch import prefetch


@pytest.mark.parametrize("depth", [1, 2, 5])
def test_prefetch_yields_items_and_error_in_order(depth: int) -> None:
    computed: list[int] = []

    def items() -> Iterator[int]:
        for number in range(10):
            if number == 7:
                raise ValueError("seven")
            computed.append(number)
            yield number

    stream = prefetch(items(), depth)
    seen = [next(stream)]
    deadline = time.monotonic() + 10
    while len(computed) <= depth and time.monotonic() < deadline:
        time.sleep(0.001)
    # Enough time to compute more items than allowed.
    time.sleep(0.05)
    assert len(computed) == depth + 1
    with pytest.raises(ValueError, match="seven"):
        seen.extend(stream)
    assert seen == [0, 1, 2, 3, 4, 5, 6]


def test_closed_prefetch_leaves_no_thread() -> None:
    before = threading.active_count()
    stream = prefetch(iter(range(100)), 3)
    next(stream)
    assert threading.active_count() == before + 1
    stream.close()
    assert threading.active_count() == before
