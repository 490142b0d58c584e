"""The videos a service knows by name: read and encoded once, however many ask, and kept while there is room."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import dataclasses
import functools
import logging
import os
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from runtime.artifacts.encoded_video import EncodedVideo, EncodedWindows
from runtime.core.errors import AnnotationError, DeviceError, FeatureError, GroundingError, VideoFileError, excerpt
from runtime.core.io.digests import file_stamp
from runtime.core.io.input_files import check_directory, open_inside
from runtime.core.lru_cache import LruCache
from runtime.core.names import by_fold
from runtime.core.video import Video
from runtime.datasets.dataset import DataSet
from runtime.grounding.grounder import Grounder
from runtime.grounding.requests import VideoInput
from runtime.media.video_file import offset_of
from runtime.service.batching import Batcher
from runtime.service.http_errors import HttpError
from runtime.service.prometheus import Telemetry

log = logging.getLogger("drn.service")

# What browsers play; a data set's own videos are found by these endings.
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
# Codes of errors about the numbers of a video, whose messages name no file of this machine.
CONTRADICTIONS = ("clip_timing_mismatch", "frame_rate_out_of_range", "constant_features")
# Of a long video, times the sentences of one request.
MAX_WINDOWS = 512


@dataclasses.dataclass(frozen=True)
class Entry:
    """A video as a list shows it.

    Attributes:
        id: what it is asked by.
        name: what answers call it.
        duration: seconds, as players count.
        num_frames: frames, where the data set has them.
        media: the file that plays it, where there is one.
        state: ready, extracting, or failed.
        problem: what failed.
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
        data: the data set; None knows no video.
        media: directory of its video files, named after the videos.
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
        """Return a video of the data set, whose features were not looked at."""
        assert self._data is not None
        end = self._data.durations[name] + self._data.offset(name)
        return Entry(name, name, end, self._data.num_frames.get(name), self._media.get(name))

    def page(self, contains: str, offset: int, limit: int) -> tuple[int, list[Entry]]:
        """Return how many names contain a text, in whatever case, and so many of them from `offset` on."""
        expected = contains.lower()
        result = [name for name in self.names if expected in name.lower()] if expected else self.names
        return len(result), [self.entry(name) for name in result[offset : offset + limit]]

    def load(self, name: str) -> Video:
        """Read a video. Refusal if it cannot be used: that is not for the client to put right."""
        assert self._data is not None
        try:
            video = self._data.video(name)
            return video if video.offset else dataclasses.replace(video, offset=self._film_offset(name))
        except (FeatureError, AnnotationError) as error:
            if error.code in CONTRADICTIONS:
                raise
            # The sentence names files of this machine.
            raise HttpError(
                404,
                f"The features of {excerpt(name)} are missing or cannot be used; ask about another video.",
                "no_features",
            ) from error

    def stamp(self, name: str) -> object:
        """Return what changes when the features or the film of a video are written or replaced."""
        assert self._data is not None
        film = self._media.get(name)
        # What is wrong with the features is reported when they are read.
        with contextlib.suppress(FeatureError):
            return self._data.store.file_stamp(name), film and file_stamp(film)
        return None

    def _film_offset(self, name: str) -> float:
        """Return the seconds from the start of a video's film to its first picture; 0 where that cannot be known."""
        film = self._media.get(name)
        if film is None:
            return 0.0
        try:
            return offset_of(film)
        except (VideoFileError, DeviceError) as error:
            log.warning("The times of %r count from its first picture: %s", name, error)
            return 0.0


class VideoCache:
    """Videos ready to be asked, the last few of them: whoever comes while one is made ready waits for the same.

    Args:
        grounder: the model; one that was split encodes them.
        batcher: the thread that owns it.
        capacity: bytes; the videos asked last stay.
        telemetry: counts every look: `hit`, `joined` (another is making it ready) or `miss`.
    """

    def __init__(self, grounder: Grounder, batcher: Batcher, capacity: int, telemetry: Telemetry) -> None:
        self._grounder = grounder
        self._batcher = batcher
        self._telemetry = telemetry
        self._ready: LruCache[str, tuple[VideoInput, object]] = LruCache(capacity)
        self._coming: dict[tuple[str, object], asyncio.Task[VideoInput]] = {}
        self._readers = concurrent.futures.ThreadPoolExecutor(READERS, "drn-reader")

    def __len__(self) -> int:
        return len(self._ready)

    @property
    def bytes(self) -> int:
        """Memory of the videos that are ready."""
        return self._ready.weight

    async def subject(self, key: str, load: Callable[[], Video], stamp: object = None) -> VideoInput:
        """Return the video of this key as the model takes it.

        Args:
            key: of the video.
            load: reads it, in another thread, if it is not ready.
            stamp: of its files, taken now; a video with another stamp is read again.

        Raises what `load` does, and Refusal if the features do not fit the model.
        """
        ready = self._ready.get(key)
        if ready is not None and ready[1] == stamp:
            self._telemetry.looked("hit")
            return ready[0]
        self.forget(key)
        task = self._coming.get((key, stamp))
        self._telemetry.looked("joined" if task else "miss")
        if task is None:
            task = asyncio.get_running_loop().create_task(self._make_ready(key, load, stamp))
            self._coming[key, stamp] = task
            task.add_done_callback(functools.partial(self._arrived, (key, stamp)))
        # One who leaves does not take it from the others.
        return await asyncio.shield(task)

    def forget(self, key: str) -> None:
        """Remove a video."""
        self._ready.pop(key)

    def close(self) -> None:
        self._readers.shutdown(cancel_futures=True)

    async def prepared(self, load: Callable[[], Video]) -> VideoInput:
        """Return a video as the model takes it, without keeping it. Raises as `subject`."""

        def read() -> Video:
            video = load()
            check_windows(len(self._grounder.cut(video)), 1)
            if not self._grounder.cut(video):
                # Checked and pooled here, so that the model's thread finds it done.
                self._grounder.segments(video)
            return video

        video = await asyncio.get_running_loop().run_in_executor(self._readers, read)
        if self._grounder.is_pair:
            return await self._batcher.do(lambda: self._grounder.encode(video))
        return video

    async def _make_ready(self, key: str, load: Callable[[], Video], stamp: object) -> VideoInput:
        started = time.perf_counter()
        subject = await self.prepared(load)
        self._telemetry.phase("ready", time.perf_counter() - started)
        self._ready.put(key, (subject, stamp), _bytes(subject))
        return subject

    def _arrived(self, key: tuple[str, object], task: asyncio.Task[VideoInput]) -> None:
        self._coming.pop(key, None)
        # Read, so that a failure whose askers have all left is no warning of the loop's.
        if not task.cancelled():
            task.exception()


def _bytes(subject: VideoInput) -> int:
    if isinstance(subject, EncodedWindows):
        return sum(map(_bytes, subject.parts))
    if isinstance(subject, EncodedVideo):
        return subject.features.nbytes + subject.spans.nbytes
    segments = sum(part.features.nbytes for part in subject._segments.values())
    # What is mapped from a file takes no memory that the system could not have back.
    return segments if isinstance(subject.features, np.memmap) else segments + subject.features.nbytes


def check_windows(windows: int, queries: int) -> None:
    """Raise Refusal if so many sentences about a video of so many windows would keep the model from others for long."""
    if windows * queries > MAX_WINDOWS:
        raise HttpError(
            422,
            f"The video is as long as {windows} windows, and windows times sentences may be at most {MAX_WINDOWS}; "
            "ask less at once, or about a shorter video.",
            "too_long",
        )


def is_inside(path: Path) -> bool:
    """Return whether a path is a regular file that can be read and lies in its directory, links followed."""
    try:
        os.close(open_inside(path, path.parent))
    except OSError:
        return False
    return True


def _media_files(directory: Path) -> dict[str, Path]:
    """Return the video files of a directory by the names of their videos, without links that lead out of it."""
    check_directory(directory, "The directory of video files", GroundingError, "check --media")
    files = sorted(path for path in directory.iterdir() if path.suffix.lower() in MEDIA_TYPES and is_inside(path))
    order = list(MEDIA_TYPES)
    # Of several of one name, what browsers play best.
    files.sort(key=lambda path: -order.index(path.suffix.lower()))
    return {path.stem: path for path in files}
