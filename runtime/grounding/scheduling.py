"""Group the batches of a Grounder, halve those too large for a device, and cache the encodings of its last videos."""

from __future__ import annotations

import dataclasses
import logging
import weakref
from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np

from runtime.backends.network import Encoding
from runtime.core.batch import Heads
from runtime.core.errors import DeviceMemoryError
from runtime.core.lru_cache import LruCache
from runtime.core.video import Video

log = logging.getLogger("drn")

Item = TypeVar("Item")


@dataclasses.dataclass(frozen=True)
class WindowGroup:
    """Windows that are in memory together, one row for each query about each window.

    Attributes:
        pairs: the pair of video and query that each row belongs to.
        windows: the index of the row's window in its video.
        encodings: of the rows' windows.
    """

    pairs: list[int]
    windows: list[int]
    encodings: list[Encoding]


def distinct(items: Sequence[Item]) -> tuple[list[Item], np.ndarray]:
    """Return each of B objects once, and for each its index among those, (B,) int32."""
    objects = {id(item): item for item in items}
    index = {key: number for number, key in enumerate(objects)}
    return list(objects.values()), np.array([index[id(item)] for item in items], np.int32)


class EncodingCache:
    """Store the encodings of the last videos; safe to use from several threads.

    Args:
        size: maximum number of encodings.
    """

    def __init__(self, size: int) -> None:
        self._encodings: LruCache[int, tuple[weakref.ref[Video], Encoding]] = LruCache(size)

    def get(self, video: Video) -> Encoding | None:
        reference, encoding = self._encodings.get(id(video)) or (None, None)
        # Another object may have the address of a video that was deleted.
        return encoding if reference is not None and reference() is video else None

    def put(self, video: Video, encoding: Encoding) -> None:
        self._encodings.put(id(video), (weakref.ref(video), encoding))


def retry_in_halves(ask: Callable[[slice], Heads], rows: int) -> Heads:
    """Return the answers to a batch of so many rows; where memory does not do, to its halves, one after the other."""
    try:
        return ask(slice(0, rows))
    except DeviceMemoryError:
        if rows < 2:
            raise
        log.warning("The device has no memory left for %d queries at once; asking them in halves.", rows)
        halves = [ask(part) for part in (slice(0, rows // 2), slice(rows // 2, rows))]
        return Heads(*(np.concatenate(pair) for pair in zip(*(vars(half).values() for half in halves))))
