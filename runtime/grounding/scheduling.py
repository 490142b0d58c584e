"""Order and overlap the batches of a Grounder, and cache the encodings of its last videos."""

from __future__ import annotations

import collections
import concurrent.futures
import logging
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from runtime.artifacts.encoded_video import EncodedVideo
from runtime.core.batch import Heads
from runtime.core.errors import (
    DeviceMemoryError,
)
from runtime.core.video import Video

log = logging.getLogger("drn")


def group_by_prepared(videos: Sequence[EncodedVideo]) -> list[np.ndarray]:
    """Return positions that may share batches: those of one prepared video, and all others."""
    groups: dict[int, list[int]] = {}
    for index, video in enumerate(videos):
        groups.setdefault(0 if video.prepared is None else id(video), []).append(index)
    return [np.array(positions) for positions in groups.values()]


class EncodingCache:
    """The last few videos' encodings, forgotten with the videos. Safe to use from several threads."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._known: collections.OrderedDict[int, tuple[weakref.ref[Video], EncodedVideo]] = collections.OrderedDict()
        self._lock = threading.Lock()

    def get(self, video: Video) -> EncodedVideo | None:
        with self._lock:
            reference, encoded = self._known.get(id(video), (None, None))
            # An address is used again once its video is gone.
            if reference is None or reference() is not video:
                return None
            self._known.move_to_end(id(video))
            return encoded

    def keep(self, video: Video, encoded: EncodedVideo) -> EncodedVideo:
        with self._lock:
            self._known[id(video)] = (weakref.ref(video), encoded)
            self._known.move_to_end(id(video))
            while len(self._known) > self._size:
                self._known.popitem(last=False)
        return encoded


def prefetch(answers: Iterator[tuple[np.ndarray, Heads]]) -> Iterator[tuple[np.ndarray, Heads]]:
    """Yield what an iterator yields, the next being made in a thread of its own meanwhile."""
    with concurrent.futures.ThreadPoolExecutor(1) as worker:
        coming = worker.submit(next, answers, None)
        while True:
            answer = coming.result()
            if answer is None:
                return
            coming = worker.submit(next, answers, None)
            yield answer


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
