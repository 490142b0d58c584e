"""Group the batches of a Grounder, halve those too large for a device, and cache the encodings of its last videos."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable

import numpy as np

from runtime.artifacts.encoded_video import EncodedVideo
from runtime.core.batch import Heads
from runtime.core.errors import DeviceMemoryError
from runtime.core.lru_cache import LruCache
from runtime.core.video import Video

log = logging.getLogger("drn")


class EncodingCache:
    """Store the encodings of the last videos; safe to use from several threads.

    Args:
        size: maximum number of encodings.
    """

    def __init__(self, size: int) -> None:
        self._encodings: LruCache[int, tuple[weakref.ref[Video], EncodedVideo]] = LruCache(size)

    def get(self, video: Video) -> EncodedVideo | None:
        reference, encoded = self._encodings.get(id(video)) or (None, None)
        # Another object may have the address of a video that was deleted.
        return encoded if reference is not None and reference() is video else None

    def put(self, video: Video, encoded: EncodedVideo) -> EncodedVideo:
        self._encodings.put(id(video), (weakref.ref(video), encoded))
        return encoded


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
