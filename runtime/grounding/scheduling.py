"""Group windows into batches, split batches that do not fit a device, and cache the encodings of recent videos."""

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
    """Windows that are in memory together, with one row for each pair of a window and a query.

    Attributes:
        pairs: index of the (video, query) pair of each row.
        windows: index of the row's window in its video.
        encodings: of the window of each row.
    """

    pairs: list[int]
    windows: list[int]
    encodings: list[Encoding]


def distinct(items: Sequence[Item]) -> tuple[list[Item], np.ndarray]:
    """Return the distinct objects among B, compared by identity, and the index of each among them, (B,) int32."""
    objects = {id(item): item for item in items}
    index = {key: number for number, key in enumerate(objects)}
    return list(objects.values()), np.array([index[id(item)] for item in items], np.int32)


class EncodingCache:
    """Store the encodings of the videos used last, by identity; safe to use from several threads.

    Args:
        size: maximum number of encodings.
    """

    def __init__(self, size: int) -> None:
        self._encodings: LruCache[int, tuple[weakref.ref[Video], Encoding]] = LruCache(size)

    def get(self, video: Video) -> Encoding | None:
        reference, encoding = self._encodings.get(id(video)) or (None, None)
        # A new object may have the id of a deleted one.
        return encoding if reference is not None and reference() is video else None

    def put(self, video: Video, encoding: Encoding) -> None:
        self._encodings.put(id(video), (weakref.ref(video), encoding))


def retry_in_halves(run: Callable[[slice], Heads], num_rows: int) -> Heads:
    """Return the heads of a batch, run in two halves if the device has not enough memory for it.

    Args:
        run: returns the heads of some rows.
        num_rows: of the batch.

    Raises:
        DeviceMemoryError: a half does not fit either.
    """
    try:
        return run(slice(0, num_rows))
    except DeviceMemoryError:
        if num_rows < 2:
            raise
        log.warning("The device has no memory left for a batch of %d queries. Running it in two halves.", num_rows)
        halves = [run(part) for part in (slice(0, num_rows // 2), slice(num_rows // 2, num_rows))]
        return Heads(*(np.concatenate(pair) for pair in zip(*(vars(half).values() for half in halves))))
