"""List the videos of a data set, and cache the videos that are loaded and encoded for queries."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import dataclasses
import functools
import itertools
import logging
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from runtime.artifacts.encoded_video import EncodedVideo, EncodedWindows
from runtime.core.errors import AnnotationError, DeviceError, FeatureError, GroundingError, VideoFileError, excerpt
from runtime.core.io.digests import file_stamp
from runtime.core.io.input_files import check_directory, open_inside
from runtime.core.lru_cache import LruCache
from runtime.core.names import by_fold
from runtime.core.tokenizer import Vocabulary
from runtime.core.video import Video
from runtime.datasets.dataset import DataSet
from runtime.grounding.grounder import Grounder
from runtime.grounding.requests import VideoInput
from runtime.media.video_file import offset_of
from runtime.service.batching import Batcher
from runtime.service.http_errors import HttpError
from runtime.service.prometheus import Telemetry

log = logging.getLogger("drn.service")

# Video files that browsers play, best support first.
MEDIA_TYPES = {
    ".mp4": "video/mp4",
    ".m4v": "video/mp4",
    ".mov": "video/quicktime",
    ".webm": "video/webm",
    ".mkv": "video/x-matroska",
    ".avi": "video/x-msvideo",
    ".ogv": "video/ogg",
}
READERS = 2
# Codes of errors whose messages contain no path of this machine, so that clients may get them.
PUBLIC_CODES = ("clip_timing_mismatch", "frame_rate_out_of_range", "constant_features")
# Number of videos on the first screen of the page.
MAX_EXAMPLES = 8
# Maximum product of a video's windows and the queries of one request.
MAX_WINDOWS = 512


@dataclasses.dataclass(frozen=True)
class Entry:
    """The description of a video.

    Attributes:
        id: identifier in requests.
        duration: seconds, as players count.
        state: ready, extracting, or failed.
    """

    id: str
    name: str
    duration: float
    num_frames: int | None
    media: Path | None = None
    state: str = "ready"
    problem: str | None = None


class VideoCatalog:
    """The videos of a data set.

    Args:
        media: directory of the video files, named after the videos.
    """

    def __init__(self, data: DataSet | None, media: Path | None = None) -> None:
        self._data = data
        self._media = _media_files(media) if media else {}
        self.names = sorted(data.durations) if data else []
        self._known = frozenset(self.names)

    @functools.cached_property
    def folded_names(self) -> dict[str, str]:
        """The names, for `near_name`."""
        return by_fold(self.names)

    def __contains__(self, name: str) -> bool:
        return name in self._known

    def entry(self, name: str) -> Entry:
        """Return the description of a video; its features are not read."""
        assert self._data is not None
        end = self._data.durations[name] + self._data.offset(name)
        return Entry(name, name, end, self._data.num_frames.get(name), self._media.get(name))

    def page(self, contains: str, offset: int, limit: int) -> tuple[int, list[Entry]]:
        """Return a page of the videos whose names contain a text, ignoring case.

        Returns:
            The number of matching videos, and the descriptions of those on the page.
        """
        lowered = contains.lower()
        names = [name for name in self.names if lowered in name.lower()] if lowered else self.names
        return len(names), [self.entry(name) for name in names[offset : offset + limit]]

    def examples(self, vocabulary: Vocabulary) -> list[tuple[Entry, str | None]]:
        """Return at most `MAX_EXAMPLES` videos to begin with, and a sentence about each; those with media first.

        Sentences contain no unknown words and differ. Without any, the first videos have no sentence. Videos without
        features are left out.
        """
        sentences = self._sentences(vocabulary)
        names: Sequence[str] = list(sentences) or self.names
        # Sorting is stable, so videos without media keep the order of the data set.
        ordered = sorted(names, key=lambda name: name not in self._media)
        chosen = itertools.islice(filter(self._has_features, ordered), MAX_EXAMPLES)
        return [(self.entry(name), sentences.get(name)) for name in chosen]

    def _has_features(self, name: str) -> bool:
        assert self._data is not None
        with contextlib.suppress(FeatureError):
            return self._data.store.file_stamp(name) is not None
        return False

    def _sentences(self, vocabulary: Vocabulary) -> dict[str, str]:
        """Return a sentence for each video that the test split describes in known words, or else another split."""
        if self._data is None or not self._data.splits:
            return {}
        try:
            annotations = self._data.annotations(self._data.splits[-1], invalid="keep", quiet=True)
        except GroundingError as error:
            log.warning("The page shows videos without examples: %s", error)
            return {}
        sentences: dict[str, str] = {}
        seen: set[str] = set()
        for annotation in annotations:
            video, sentence = annotation.video, annotation.sentence
            if video not in sentences and sentence not in seen and vocabulary.knows_all(sentence):
                sentences[video] = sentence
                seen.add(sentence)
        return sentences

    def load(self, name: str) -> Video:
        """Read a video.

        Raises:
            FeatureError, AnnotationError: with one of `PUBLIC_CODES`.
            HttpError: 404 for all other errors of its files.
        """
        assert self._data is not None
        try:
            video = self._data.video(name)
            return video if video.offset else dataclasses.replace(video, offset=self._media_offset(name))
        except (FeatureError, AnnotationError) as error:
            if error.code in PUBLIC_CODES:
                raise
            # The message may contain paths of this machine.
            raise HttpError(
                404,
                f"The features of {excerpt(name)} are missing or invalid. Use another video.",
                "no_features",
            ) from error

    def stamp(self, name: str) -> object:
        """Return a value that changes when the features or the video file of a video are written or replaced."""
        assert self._data is not None
        media = self._media.get(name)
        # Errors of the features are reported when they are read.
        with contextlib.suppress(FeatureError):
            return self._data.store.file_stamp(name), media and file_stamp(media)
        return None

    def _media_offset(self, name: str) -> float:
        """Return the seconds from the start of a video file to its first frame; 0 if they are unknown."""
        media = self._media.get(name)
        if media is None:
            return 0.0
        try:
            return offset_of(media)
        except (VideoFileError, DeviceError) as error:
            log.warning("The times of %r count from its first frame: %s", name, error)
            return 0.0


class VideoCache:
    """Cache prepared videos: checked, pooled and, by a split model, encoded. Concurrent requests share one preparation.

    Args:
        capacity: maximum size in bytes; the least recently used videos are evicted.
        telemetry: counts lookups: `hit`, `joined` (another request is preparing the video) or `miss`.
    """

    def __init__(self, grounder: Grounder, batcher: Batcher, capacity: int, telemetry: Telemetry) -> None:
        self._grounder = grounder
        self._batcher = batcher
        self._telemetry = telemetry
        self._prepared: LruCache[str, tuple[VideoInput, object]] = LruCache(capacity)
        self._pending: dict[tuple[str, object], asyncio.Task[VideoInput]] = {}
        self._readers = concurrent.futures.ThreadPoolExecutor(READERS, "drn-reader")

    @property
    def bytes(self) -> int:
        """Memory of the prepared videos."""
        return self._prepared.weight

    async def get(self, key: str, load: Callable[[], Video], stamp: object = None) -> VideoInput:
        """Return a prepared video.

        Args:
            load: reads the video, in another thread, if it is not cached; may raise FeatureError or HttpError.
            stamp: current stamp of its files; a cached video with another stamp is read again.

        Raises:
            FeatureError: the features do not fit the model.
            HttpError: 422 if the video has too many windows; 503 during shutdown.
        """
        cached = self._prepared.get(key)
        if cached is not None and cached[1] == stamp:
            self._telemetry.lookup("hit")
            return cached[0]
        self.forget(key)
        task = self._pending.get((key, stamp))
        self._telemetry.lookup("joined" if task else "miss")
        if task is None:
            task = asyncio.get_running_loop().create_task(self._load(key, load, stamp))
            self._pending[key, stamp] = task
            task.add_done_callback(functools.partial(self._finish, (key, stamp)))
        # A request that is cancelled must not cancel the preparation for the others.
        return await asyncio.shield(task)

    def forget(self, key: str) -> None:
        """Remove a video."""
        self._prepared.pop(key)

    def close(self) -> None:
        """End the threads that read videos."""
        self._readers.shutdown(cancel_futures=True)

    async def prepare(self, load: Callable[[], Video]) -> VideoInput:
        """Return a prepared video that is not cached."""

        def read() -> Video:
            video = load()
            windows = self._grounder.cut(video)
            check_windows(len(windows), 1)
            if not windows:
                # The result is stored in the video, so that the thread of the model does not pool it again.
                self._grounder.segments(video)
            return video

        video = await asyncio.get_running_loop().run_in_executor(self._readers, read)
        if self._grounder.is_pair:
            return await self._batcher.run(lambda: self._grounder.encode(video))
        return video

    async def _load(self, key: str, load: Callable[[], Video], stamp: object) -> VideoInput:
        started = time.perf_counter()
        video = await self.prepare(load)
        self._telemetry.phase("ready", time.perf_counter() - started)
        self._prepared.put(key, (video, stamp), _bytes(video))
        return video

    def _finish(self, key: tuple[str, object], task: asyncio.Task[VideoInput]) -> None:
        self._pending.pop(key, None)
        # asyncio logs an exception that is never retrieved, for example if all clients disconnected.
        if not task.cancelled():
            task.exception()


def _bytes(video: VideoInput) -> int:
    """Return the memory that a prepared video takes."""
    if isinstance(video, EncodedWindows):
        return sum(map(_bytes, video.parts))
    if isinstance(video, EncodedVideo):
        return video.features.nbytes + video.spans.nbytes
    segments = sum(part.features.nbytes for part in video._segments.values())
    # The system can reclaim the pages of a mapped file at any time.
    return segments if isinstance(video.features, np.memmap) else segments + video.features.nbytes


def check_windows(windows: int, queries: int) -> None:
    """Raise HttpError 422 if queries in the windows of a video would block the model for too long."""
    if windows * queries > MAX_WINDOWS:
        raise HttpError(
            422,
            f"{windows} windows times {queries} queries exceed the limit of {MAX_WINDOWS}. Send fewer queries at once, "
            "or a shorter video.",
            "too_long",
        )


def _media_files(directory: Path) -> dict[str, Path]:
    """Return the video files of a directory by the names of their videos, without links to files outside it."""
    check_directory(directory, "The directory of video files", GroundingError, "check --media")
    files: list[Path] = []
    for path in sorted(path for path in directory.iterdir() if path.suffix.lower() in MEDIA_TYPES):
        with contextlib.suppress(OSError):
            os.close(open_inside(path, directory))
            files.append(path)
    order = list(MEDIA_TYPES)
    # The last of several files of one name is used: the format that browsers support best.
    files.sort(key=lambda path: -order.index(path.suffix.lower()))
    return {path.stem: path for path in files}
