"""Store uploaded clip features and video files in one directory, with limits and an expiry time.

Paths do not depend on what clients send, pickles are never loaded, and videos are decoded in another process.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import secrets
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from runtime.backends.base import Device
from runtime.core.errors import FeatureError, OutputError, one_line
from runtime.core.io.atomic_files import locked
from runtime.core.io.digests import content_stamp, file_stamp
from runtime.core.pooling import ClipTiming
from runtime.core.video import Origin, Video, load_features
from runtime.datasets.dataset import DataSet
from runtime.media.extraction import cache_directory
from runtime.service.http_errors import HttpError, draining, unknown_video
from runtime.service.isolated import run_isolated
from runtime.service.uploaded_files import read_features, sniff_container
from runtime.service.video_cache import Entry

log = logging.getLogger("drn.service")

EXTRACT = "import runpy; runpy.run_module('runtime.extract', run_name='__main__', alter_sys=True)"
ORIGIN = Origin("Correct the field num_frames, or send features with this clip timing.")


@dataclasses.dataclass(frozen=True)
class UploadOptions:
    """The limits of uploads and their expiry time.

    Attributes:
        directory: parent of the service's own directory.
        total_bytes: maximum size of all uploads; the least recently used are deleted first.
        max_uploads: maximum number of uploads.
        keep_s: time from the last query to the deletion of an upload, in seconds.
        features_bytes: maximum size of an uncompressed array.
        extract_s: maximum time of an extraction, in seconds.
        max_extractions: maximum number of videos that are extracted or wait for it.
    """

    directory: Path = dataclasses.field(default_factory=lambda: cache_directory() / "uploads")
    total_bytes: int = 2 << 30
    max_uploads: int = 256
    keep_s: float = 3600.0
    features_bytes: int = 128 << 20
    extract_s: float = 900.0
    max_extractions: int = 4


@dataclasses.dataclass(eq=False)
class Upload:
    """An uploaded video.

    Attributes:
        id: random identifier in requests.
        features: `.npy` file, once it exists.
        duration, num_frames: seconds and frames; 0 until they are known.
        offset: seconds from the start of the video file, as players count, to its first frame.
        used: time of the last query, as `time.monotonic`.
        bytes: size of its files.
    """

    id: str
    name: str
    directory: Path
    features: Path | None = None
    media: Path | None = None
    duration: float = 0.0
    num_frames: int = 0
    offset: float = 0.0
    extraction: asyncio.Task[None] | None = None
    used: float = 0.0
    bytes: int = 0

    @property
    def entry(self) -> Entry:
        """The description of the video."""
        state, problem = "ready", None
        if self.extraction is not None and not self.extraction.done():
            state = "extracting"
        elif self.features is None:
            state, error = "failed", self.extraction.exception() if self.extraction else None
            problem = error.message if isinstance(error, HttpError) else "The extraction of the video failed."
        end = self.duration + self.offset
        return Entry(self.id, self.name, end, self.num_frames, self.media, state, problem)

    def load(self) -> Video:
        """Read the video, whose features exist; HttpError 404 if it was deleted meanwhile."""
        assert self.features is not None
        try:
            array = load_features(self.features)
        except (FeatureError, OSError) as error:
            # The message contains a path of this machine.
            raise unknown_video(self.id) from error
        return Video(array, self.num_frames, self.duration, self.name, ORIGIN, offset=self.offset)


@contextlib.contextmanager
def storing() -> Iterator[None]:
    """Reject an upload that cannot be stored, for example because the disk is full.

    Raises:
        HttpError: for every error of the file system in the block; its code is `no_room`.
    """
    try:
        yield
    except OSError as error:
        if error.errno is None:
            # TimeoutError is an OSError too.
            raise
        log.error("An upload cannot be stored: %s", one_line(error))
        raise HttpError(
            503,
            f"The service cannot store the upload ({error.strerror}). Try again later.",
            "no_room",
            {"retry-after": "60"},
        ) from error


class Uploads:
    """The uploads of one service. Their directory is deleted at the end, and after a crash by the next service.

    Args:
        clock: clip timing of the model, for features that are sent without a frame count.
        extractor: extractor of video files; None rejects video files.

    Raises:
        OutputError: the directory cannot be written.
    """

    def __init__(
        self,
        options: UploadOptions,
        clock: ClipTiming,
        extractor: Path | None = None,
        device: Device = "auto",
        threads: int | None = None,
        on_remove: Callable[[str], None] = lambda name: None,
    ) -> None:
        self._options = options
        self._clock = clock
        self._on_remove = on_remove
        self._extractor = extractor
        self._extractor_stamp = None if extractor is None else file_stamp(extractor)
        self._extractor_digest = None if extractor is None else content_stamp(extractor)[2]
        self._device = device
        self._threads = threads
        self._uploads: dict[str, Upload] = {}
        self._extracting = asyncio.Semaphore(1)
        self._extractions = 0
        self.bytes = 0
        try:
            # Another service that starts now must not remove the new directory before it is locked.
            with locked(options.directory, wait=True):
                for leftover in options.directory.glob("service-*"):
                    # The lock of a service that was killed is free.
                    with contextlib.suppress(OutputError), locked(leftover):
                        shutil.rmtree(leftover, ignore_errors=True)
                self._own = options.directory / f"service-{secrets.token_hex(8)}"
                self._own.mkdir(mode=0o700)
                self._lock = contextlib.ExitStack()
                self._lock.enter_context(locked(self._own))
        except (OSError, OutputError) as error:
            raise OutputError(
                f"Uploads cannot be stored in {options.directory} ({one_line(error)}). Name another directory with "
                "--uploads."
            ) from error

    @property
    def accepts_videos(self) -> bool:
        """Return whether video files can be extracted."""
        return self._extractor is not None

    def __len__(self) -> int:
        return len(self._uploads)

    def get(self, name: str) -> Upload | None:
        """Return an upload by its id, and renew its expiry time; None if there is none."""
        upload = self._uploads.get(name)
        if upload is not None:
            upload.used = time.monotonic()
        return upload

    @contextlib.contextmanager
    def incoming(self) -> Iterator[Upload]:
        """Yield an empty upload, which is deleted at the end of the block unless `add` was called with it."""
        self.sweep()
        token = f"upload-{secrets.token_hex(16)}"
        upload = Upload(token, "video", self._own / token, used=time.monotonic())
        with storing():
            # Programs that clean temporary directories may have removed the service's directory.
            upload.directory.mkdir(mode=0o700, parents=True)
        try:
            yield upload
        finally:
            if token not in self._uploads:
                self.remove(upload)

    def reserve(self, upload: Upload, size: int) -> None:
        """Count further bytes of an upload, and delete the least recently used uploads to make space.

        Raises:
            HttpError: 503 if the upload alone exceeds the limit.
        """
        while self.bytes + size > self._options.total_bytes:
            others = [other for other in self._uploads.values() if other is not upload]
            if not others:
                raise HttpError(
                    503,
                    "The service has no space for this upload. Try again later, or send less.",
                    "no_room",
                    {"retry-after": "60"},
                )
            self.remove(min(others, key=lambda other: other.used))
        upload.bytes += size
        self.bytes += size

    def add(self, upload: Upload) -> None:
        """Make an upload available by its id, and delete the least recently used one if there are too many."""
        if len(self._uploads) >= self._options.max_uploads:
            self.remove(min(self._uploads.values(), key=lambda other: other.used))
        self._uploads[upload.id] = upload

    def remove(self, upload: Upload) -> None:
        """Delete an upload and its files."""
        self._uploads.pop(upload.id, None)
        if upload.extraction is not None:
            upload.extraction.cancel()
        self.bytes -= upload.bytes
        upload.bytes = 0
        shutil.rmtree(upload.directory, ignore_errors=True)
        self._on_remove(upload.id)

    def sweep(self) -> None:
        """Delete expired uploads."""
        expired = time.monotonic() - self._options.keep_s
        for upload in list(self._uploads.values()):
            if upload.used < expired:
                self.remove(upload)

    def close(self) -> None:
        """Delete all uploads and the directory of the service."""
        for upload in list(self._uploads.values()):
            self.remove(upload)
        shutil.rmtree(self._own, ignore_errors=True)
        self._lock.close()

    async def take_features(
        self, upload: Upload, sent: Path, dim: int, duration: float, num_frames: int | None
    ) -> Video:
        """Check uploaded features and store them in the upload.

        Args:
            sent: file of the features; it is deleted.
            num_frames: number of frames of the video; None estimates it from the number of clips.

        Raises:
            HttpError: the file or its array is invalid or too large.
            FeatureError: frames, duration and clips contradict each other.
        """
        array = await asyncio.to_thread(read_features, sent, self._options.features_bytes, dim)
        frames = self._clock.num_frames(len(array)) if num_frames is None else num_frames
        video = Video(array, frames, duration, upload.name, ORIGIN)
        video.check(self._clock)
        self.reserve(upload, max(0, array.nbytes - upload.bytes))
        upload.features = upload.directory / "features.npy"
        upload.duration, upload.num_frames = duration, frames
        await asyncio.to_thread(np.save, upload.features, array)
        sent.unlink()
        return video

    async def check_extractor(self) -> None:
        """Raise HttpError 503 (code `extractor_changed`) if the extractor changed since the service started."""
        assert self._extractor is not None
        stamp = file_stamp(self._extractor)
        if stamp == self._extractor_stamp:
            return
        with contextlib.suppress(OSError):
            # A copy of the same content is the same extractor.
            if (await asyncio.to_thread(content_stamp, self._extractor))[2] == self._extractor_digest:
                self._extractor_stamp = stamp
                return
        log.error("%s changed since the service started. Restart the service to use it.", self._extractor)
        raise HttpError(
            503,
            "The extractor of this service changed since the start, so it accepts no video files. Send features, or "
            "restart the service.",
            "extractor_changed",
        )

    def take_video(self, upload: Upload, sent: Path, partial: bool = False) -> None:
        """Store an uploaded video file, and start to extract its features.

        Args:
            sent: the video file; it is renamed.

        Raises:
            HttpError: 415 if the format is not supported; 429 if too many videos wait.
        """
        suffix = sniff_container(sent)
        if self._extractions >= self._options.max_extractions:
            raise HttpError(
                429,
                f"{self._extractions} videos are being extracted or wait, which is the limit. Try again later.",
                "queue_full",
                {"retry-after": "30"},
            )
        upload.media = sent.rename(upload.directory / f"video{suffix}")
        self._extractions += 1
        upload.extraction = asyncio.get_running_loop().create_task(self._extract(upload, partial))
        upload.extraction.add_done_callback(self._finish_extraction)

    def _finish_extraction(self, task: asyncio.Task[None]) -> None:
        self._extractions -= 1
        # asyncio logs an exception that is never retrieved.
        if not task.cancelled():
            task.exception()

    async def _extract(self, upload: Upload, partial: bool) -> None:
        assert upload.media is not None
        output = upload.directory / "extracted"
        arguments = ["--extractor", str(self._extractor), "--output", str(output), "--device", self._device]
        if self._threads is not None:
            arguments += ["--threads", str(self._threads)]
        if partial:
            arguments.append("--partial")
        async with self._extracting:
            try:
                exit_code, messages = await run_isolated(EXTRACT, [upload.media, *arguments], self._options.extract_s)
            except asyncio.TimeoutError:
                raise HttpError(
                    422, f"The extraction took more than {self._options.extract_s:g} s. Send a shorter video."
                ) from None
        await self.check_extractor()
        if exit_code != 0:
            raise _extraction_error(exit_code, messages, upload.media)
        for line in messages.splitlines():
            if upload.media.name in line:
                # Warnings about the video, for example time stamps that restart.
                log.warning("Upload %s: %s", upload.id, line.replace(str(upload.media), "the video")[:500])
        tables = DataSet(output)
        upload.duration, upload.num_frames = tables.durations["video"], tables.frames("video")
        upload.offset = tables.offset("video")
        upload.features = tables.feature_path("video").rename(upload.directory / "features.npy")
        shutil.rmtree(output, ignore_errors=True)
        self.reserve(upload, upload.features.stat().st_size)


def _extraction_error(exit_code: int | None, stderr: str, media: Path) -> HttpError:
    """Return the HTTP error for a failed extraction, without paths of this machine."""
    if exit_code in (-signal.SIGTERM, -signal.SIGINT):
        # A signal for the process group, as of Ctrl-C or a service manager, also stops the extraction.
        return draining()
    (*_, line) = ["", *stderr.strip().splitlines()]
    if exit_code == 2 and line.startswith("error: "):
        reason = line.removeprefix("error: ").replace(str(media), "The video")
        if "/" not in reason:
            return HttpError(422, reason.replace("pass --partial", "send the field partial=true"))
    log.error("Extraction ended with exit code %s: %s", exit_code, stderr[-2000:])
    return HttpError(422, "The extraction of the video failed. Convert it to an mp4 file with H.264.")
