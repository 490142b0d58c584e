"""Group windows into batches, split batches that do not fit a device, and cache the encodings of recent videos."""

from __future__ import annotations

import dataclasses
import itertools
import logging
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import numpy as np

from runtime.backends.network import Encoding
from runtime.core.batch import Heads
from runtime.core.errors import DeviceMemoryError
from runtime.core.lru_cache import LruCache
from runtime.core.sliding_windows import Window
from runtime.core.video import Video
from runtime.grounding.requests import VideoInput

log = logging.getLogger("drn")

Item = TypeVar("Item")


@dataclasses.dataclass(frozen=True)
class WindowGroup:
    """Windows that are in memory together, with one row for each pair of a window and a query.

    Attributes:
        pairs: index of the (video, query) pair of each row.
        windows: index of the row's window in its video.
        encodings: encoding of the window of each row.
    """

    pairs: list[int]
    windows: list[int]
    encodings: list[Encoding]


def window_groups(
    pairs: Sequence[tuple[VideoInput, str]],
    windows: Sequence[Sequence[Window]],
    encode: Callable[[VideoInput], Encoding],
    encode_windows: Callable[[VideoInput, Sequence[Window]], Iterator[Encoding]],
    batch_size: int,
) -> Iterator[WindowGroup]:
    """Yield groups of windows that are in memory together.

    All videos of one window form one group. Longer videos are encoded in groups that fill a batch.

    Args:
        windows: windows of the video of each pair; empty if the entire video is one window.
    """
    single = [pair for pair, split in enumerate(windows) if not split]
    videos = {id(pairs[pair][0]): pairs[pair][0] for pair in single}
    encoded = {key: encode(video) for key, video in videos.items()}
    yield WindowGroup(single, [0] * len(single), [encoded[id(pairs[pair][0])] for pair in single])
    pairs_of_video: dict[int, list[int]] = {}
    for pair, split in enumerate(windows):
        if split:
            pairs_of_video.setdefault(id(pairs[pair][0]), []).append(pair)
    for same_video in pairs_of_video.values():
        encodings = enumerate(encode_windows(pairs[same_video[0]][0], windows[same_video[0]]))
        while part := list(itertools.islice(encodings, max(1, batch_size // len(same_video)))):
            yield WindowGroup(
                same_video * len(part),
                [index for index, _ in part for _ in same_video],
                [encoding for _, encoding in part for _ in same_video],
            )


def distinct(items: Sequence[Item]) -> tuple[list[Item], np.ndarray]:
    """Return the distinct objects of a sequence, compared by identity.

    Returns:
        The distinct objects in the order of their first appearance, and (B,) int32, the index of each item among them.
    """
    objects = {id(item): item for item in items}
    index = {key: number for number, key in enumerate(objects)}
    return list(objects.values()), np.array([index[id(item)] for item in items], np.int32)


class EncodingCache:
    """Store the encodings of the `Video` objects used last, compared by identity; safe to use from several threads."""

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

    `run` returns the heads of a slice of the rows. If a half does not fit either, DeviceMemoryError is raised.
    """
    try:
        return run(slice(0, num_rows))
    except DeviceMemoryError:
        if num_rows < 2:
            raise
        log.warning("The device has no memory left for a batch of %d queries. Running it in two halves.", num_rows)
        halves = [run(part) for part in (slice(0, num_rows // 2), slice(num_rows // 2, num_rows))]
        return Heads(*(np.concatenate(pair) for pair in zip(*(vars(half).values() for half in halves))))
