"""Store uploaded clip features and video files in one directory, with limits and an expiry time.

Nothing of it names a file, nothing of it is unpickled, and a video is decoded in a process of its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import logging
import os
import secrets
import shutil
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from runtime.backends.base import Device
from runtime.core.errors import FeatureError, OutputError, one_line
from runtime.core.io.array_files import ArrayHeader, open_archive, read_array, read_member
from runtime.core.io.atomic_files import locked
from runtime.core.io.digests import content_stamp, file_stamp
from runtime.core.video import ClipTiming, Origin, Video, load_features
from runtime.datasets.dataset import DataSet
from runtime.media.extraction import cache_directory
from runtime.service.http_errors import HttpError, unknown_video
from runtime.service.video_cache import MEDIA_TYPES, Entry

log = logging.getLogger("drn.service")

# A .npz of one array has one entry of some 100 bytes in its directory; a directory of millions would fill the memory.
ZIP_DIRECTORY_BYTES = 4 << 10
# Beyond what a network and a video need, so that a file made to fill the memory ends its own process alone.
EXTRACTOR_MEMORY = 8 << 30
# `python -m runtime.extract` within that memory.
EXTRACT = (
    "import resource, runpy, sys; most = int(sys.argv.pop(1)); resource.setrlimit(resource.RLIMIT_AS, (most, most)); "
    "runpy.run_module('runtime.extract', run_name='__main__', alter_sys=True)"
)
NAME_LENGTH = 100


@dataclasses.dataclass(frozen=True)
class UploadOptions:
    """The limits of uploads and their expiry time.

    Attributes:
        directory: where; this service's own is made in it.
        total_bytes: of all uploads; the oldest go first.
        most: uploads.
        keep_s: seconds an upload stays after it was last asked.
        features_bytes: of an array, unpacked.
        extract_s: seconds that extraction may take.
        most_extractions: videos that are extracted or wait for it.
    """

    directory: Path = dataclasses.field(default_factory=lambda: cache_directory() / "uploads")
    total_bytes: int = 2 << 30
    most: int = 256
    keep_s: float = 3600.0
    features_bytes: int = 128 << 20
    extract_s: float = 900.0
    most_extractions: int = 4


@dataclasses.dataclass(eq=False)
class Upload:
    """A video that a client has sent.

    Attributes:
        id: by which it is asked: nobody can guess it.
        name: what answers call it.
        directory: of its files.
        features: a `.npy` file, once it is there.
        media: the video file, if it is one.
        duration, num_frames: once known.
        offset: seconds from the start of a video file, as players count, to its first picture.
        extraction: what makes the features, where a video file was sent.
        used: when it was last asked.
        bytes: of its files.
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
        state, problem = "ready", None
        if self.extraction is not None and not self.extraction.done():
            state = "extracting"
        elif self.features is None:
            state, error = "failed", self.extraction.exception() if self.extraction else None
            problem = error.message if isinstance(error, HttpError) else "The video could not be extracted."
        end = self.duration + self.offset
        return Entry(self.id, self.name, end, self.num_frames, self.media, state, problem)

    def load(self) -> Video:
        """Read the video, once its features are known. Refusal if it was removed meanwhile, in another thread."""
        assert self.features is not None
        try:
            array = load_features(self.features)
        except (FeatureError, OSError) as error:
            # The sentence names files of this machine.
            raise unknown_video(self.id) from error
        return Video(array, self.num_frames, self.duration, self.name, _origin(), offset=self.offset)


@contextlib.contextmanager
def storing() -> Iterator[None]:
    """Refuse an upload that cannot be stored, because the disk is full for example.

    Raises:
        HttpError: for every error of the file system in the block; its code is `no_room`.
    """
    try:
        yield
    except OSError as error:
        if error.errno is None:
            # A time-out, not the file system.
            raise
        log.error("An upload cannot be stored: %s", one_line(error))
        raise HttpError(
            503,
            f"The service cannot store the upload ({error.strerror}). Try later.",
            "no_room",
            {"retry-after": "60"},
        ) from error


class Uploads:
    """The uploads of one service. Its directory is removed at the end, and after a crash by the next service.

    Args:
        options: how much, and for how long.
        clock: how clips lie on frames, for features whose frames are not given.
        extractor: file of what makes features of videos; without it no video is taken.
        device, threads: for it.
        forgotten: called with the id of every upload that is removed.
    """

    def __init__(
        self,
        options: UploadOptions,
        clock: ClipTiming,
        extractor: Path | None = None,
        device: Device = "auto",
        threads: int | None = None,
        forgotten: Callable[[str], None] = lambda name: None,
    ) -> None:
        self._options = options
        self._clock = clock
        self._forgotten = forgotten
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
            # Another service that starts now must not take the new directory for a leftover before it is locked.
            with locked(options.directory, wait=True):
                self._clear_leftovers()
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
    def takes_videos(self) -> bool:
        return self._extractor is not None

    def __len__(self) -> int:
        return len(self._uploads)

    def get(self, name: str) -> Upload | None:
        """Return an upload by its id."""
        upload = self._uploads.get(name)
        if upload is not None:
            upload.used = time.monotonic()
        return upload

    @contextlib.contextmanager
    def incoming(self) -> Iterator[Upload]:
        """Yield an upload to fill; unless `keep` was called with it, its files are gone at the end of the block."""
        self.sweep()
        token = f"upload-{secrets.token_hex(16)}"
        upload = Upload(token, "video", self._own / token, used=time.monotonic())
        with storing():
            # Programs that clear temporary directories may have removed the service's own.
            upload.directory.mkdir(mode=0o700, parents=True)
        try:
            yield upload
        finally:
            if token not in self._uploads:
                self.forget(upload)

    def spend(self, upload: Upload, size: int) -> None:
        """Make room for so many more bytes of an upload, at the expense of the oldest; Refusal if there is none."""
        while self.bytes + size > self._options.total_bytes:
            others = [other for other in self._uploads.values() if other is not upload]
            if not others:
                raise HttpError(
                    503, "There is no room for this upload; try later, or send less.", "no_room", {"retry-after": "60"}
                )
            self.forget(min(others, key=lambda other: other.used))
        upload.bytes += size
        self.bytes += size

    def keep(self, upload: Upload) -> None:
        """Let an upload be asked by its id from now on, in place of the oldest where there are too many."""
        if len(self._uploads) >= self._options.most:
            self.forget(min(self._uploads.values(), key=lambda other: other.used))
        self._uploads[upload.id] = upload

    def forget(self, upload: Upload) -> None:
        """Remove an upload and its files."""
        self._uploads.pop(upload.id, None)
        if upload.extraction is not None:
            upload.extraction.cancel()
        self.bytes -= upload.bytes
        upload.bytes = 0
        shutil.rmtree(upload.directory, ignore_errors=True)
        self._forgotten(upload.id)

    def sweep(self) -> None:
        """Remove what nobody asked for a while."""
        before = time.monotonic() - self._options.keep_s
        for upload in list(self._uploads.values()):
            if upload.used < before:
                self.forget(upload)

    def close(self) -> None:
        """Remove all."""
        for upload in list(self._uploads.values()):
            self.forget(upload)
        shutil.rmtree(self._own, ignore_errors=True)
        self._lock.close()

    async def take_features(
        self, upload: Upload, sent: Path, dim: int, duration: float, num_frames: int | None
    ) -> Video:
        """Return the video of features that were sent; they stay in the upload. Refusal if they are none."""
        array = await asyncio.to_thread(read_features, sent, self._options.features_bytes, dim)
        frames = self._clock.num_frames(len(array)) if num_frames is None else num_frames
        video = Video(array, frames, duration, upload.name, _origin())
        video.check(self._clock)
        self.spend(upload, max(0, array.nbytes - upload.bytes))
        upload.features = upload.directory / "features.npy"
        upload.duration, upload.num_frames = duration, frames
        await asyncio.to_thread(np.save, upload.features, array)
        sent.unlink()
        return video

    async def check_extractor(self) -> None:
        """Raise Refusal (code `extractor_changed`) unless the extractor is the one that the service started with."""
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
        """Begin to extract a video that was sent; Refusal if it is none, or too many wait.

        Args:
            upload, sent: the upload and its file.
            partial: whether what can be decoded of a damaged file is enough.
        """
        suffix = sniff_container(sent)
        if self._extractions >= self._options.most_extractions:
            raise HttpError(
                429,
                f"{self._extractions} videos are being extracted, and no more may wait; try again later.",
                "queue_full",
                {"retry-after": "30"},
            )
        upload.media = sent.rename(upload.directory / f"video{suffix}")
        self._extractions += 1
        upload.extraction = asyncio.get_running_loop().create_task(self._extract(upload, partial))
        upload.extraction.add_done_callback(self._extracted)

    def _extracted(self, task: asyncio.Task[None]) -> None:
        self._extractions -= 1
        if not task.cancelled():
            task.exception()

    async def _extract(self, upload: Upload, partial: bool) -> None:
        """Extract the features of an upload in another process."""
        assert upload.media is not None
        created = upload.directory / "extracted"
        words = ["--extractor", str(self._extractor), "--output", str(created), "--device", self._device]
        if self._threads is not None:
            words += ["--threads", str(self._threads)]
        if partial:
            words.append("--partial")
        async with self._extracting:
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                *("-c", EXTRACT, str(EXTRACTOR_MEMORY), str(upload.media), *words),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.DEVNULL,
                stderr=asyncio.subprocess.PIPE,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            )
            try:
                _, said = await asyncio.wait_for(process.communicate(), self._options.extract_s)
            except asyncio.TimeoutError:
                raise HttpError(
                    422, f"The video took more than {self._options.extract_s:g} s to extract; send a shorter one."
                ) from None
            finally:
                if process.returncode is None:
                    process.kill()
                    await process.wait()
        await self.check_extractor()
        if process.returncode != 0:
            raise _cannot_extract(process.returncode, said.decode("utf-8", "replace"), upload.media)
        for line in said.decode("utf-8", "replace").splitlines():
            if upload.media.name in line:
                # What is odd about the video, such as time stamps that restart.
                log.warning("Upload %s: %s", upload.id, line.replace(str(upload.media), "the video")[:500])
        tables = DataSet(created)
        upload.duration, upload.num_frames = tables.durations["video"], tables.frames("video")
        upload.offset = tables.offset("video")
        upload.features = tables.feature_path("video").rename(upload.directory / "features.npy")
        shutil.rmtree(created, ignore_errors=True)
        self.spend(upload, upload.features.stat().st_size)

    def _clear_leftovers(self) -> None:
        """Remove directories of services that were killed: nobody holds their locks."""
        for location in self._options.directory.glob("service-*"):
            with contextlib.suppress(OutputError), locked(location):
                shutil.rmtree(location, ignore_errors=True)


def _origin() -> Origin:
    return Origin("Correct the field num_frames, or send features with this clip timing.")


def shown_name(given: str, fallback: str = "video") -> str:
    """Return a text that a client calls a video by, as one line of readable characters."""
    stem = given.replace("\\", "/").rsplit("/", 1)[-1]
    return "".join(letter if letter.isprintable() else " " for letter in stem).strip()[:NAME_LENGTH] or fallback


def read_features(path: Path, most_bytes: int, dim: int) -> np.ndarray:
    """Return the (num_clips, dim) floats of a `.npy` file, or of a `.npz` file of one array.

    Sizes are checked before anything is unpacked, and no more is read than was announced.

    Raises:
        Refusal: it is another kind of file, or of another shape, or too large.
    """
    check = functools.partial(_check_header, max_bytes=most_bytes, dim=dim)
    with open(path, "rb") as stream:
        start = stream.read(512)
        stream.seek(0)
        # torch writes an archive whose first member is this.
        torch = b"/data.pkl" in start
        try:
            if start.startswith(b"\x93NUMPY"):
                return _native(read_array(stream, os.fstat(stream.fileno()).st_size, check))
            if start.startswith(b"PK") and not torch:
                with open_archive(stream, ZIP_DIRECTORY_BYTES) as archive:
                    return _native(read_member(archive, _array_of(archive), "The features", check))
        except HttpError:
            raise
        # On damaged files NumPy, zipfile and zlib raise what their parsers do, without a common base.
        except Exception as error:
            reason = one_line(error)[:200] or type(error).__name__
            raise HttpError(
                422, f"The features cannot be read: {reason}. Write one array with numpy.save or numpy.savez."
            ) from error
    if start.startswith(b"\x89HDF"):
        kind = "an HDF5 file"
    elif torch:
        kind = "a torch file, which is a pickle and never opened here"
    elif start.startswith(b"\x80"):
        kind = "a pickle, which is never opened here"
    else:
        kind = "no NumPy file"
    raise HttpError(415, f"The features are {kind}; send one array, as numpy.save or numpy.savez writes it.")


def sniff_container(path: Path) -> str:
    """Return the ending of a video file by its first bytes; Refusal if it is none that is taken.

    FFmpeg would open more, among it play lists that name other files.
    """
    with open(path, "rb") as stream:
        start = stream.read(64)
    if start[4:8] == b"ftyp":
        return ".mov" if start[8:12] == b"qt  " else ".mp4"
    if start.startswith(b"\x1a\x45\xdf\xa3"):
        return ".webm" if b"webm" in start else ".mkv"
    if start.startswith(b"RIFF") and start[8:12] == b"AVI ":
        return ".avi"
    known = ", ".join(suffix[1:] for suffix in MEDIA_TYPES if suffix not in (".m4v", ".ogv"))
    raise HttpError(415, f"The video is of no kind that is taken ({known}); convert it to one of them.")


def _check_header(header: ArrayHeader, num_bytes: int, *, max_bytes: int, dim: int) -> None:
    """Raise HttpError unless an array has the type, shape and size that the model takes."""
    shape, dtype, size = header.shape, header.dtype, header.num_bytes
    if dtype.kind != "f" or dtype.itemsize > 8 or len(shape) != 2 or min(shape) < 1 or shape[1] != dim:
        raise HttpError(
            422,
            f"The features should be floats of shape (num_clips, {dim}), and are {dtype!s:.40} of shape "
            f"{str(shape)[:60]}; extract them with the network that the model was trained with.",
        )
    if size > max_bytes:
        raise HttpError(413, f"The features have {size} bytes and at most {max_bytes} are taken; send fewer clips.")
    if size != num_bytes:
        raise HttpError(
            422, f"The features should be {size} bytes by their header, and are {num_bytes}; write the file again."
        )


def _array_of(archive: zipfile.ZipFile) -> zipfile.ZipInfo:
    """Return the only array of a `.npz` file, or the one that is called features."""
    arrays = [member for member in archive.infolist() if member.filename.endswith(".npy")]
    named = [member for member in arrays if member.filename == "features.npy"] or arrays
    if len(named) != 1:
        raise ValueError(f"the .npz file holds {len(arrays)} arrays, and one, or one called features, is expected")
    return named[0]


def _native(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array, array.dtype.newbyteorder("="))


def _cannot_extract(code: int | None, said: str, media: Path) -> HttpError:
    """Return the refusal for a video that could not be extracted, without paths of this machine."""
    (*_, line) = ["", *said.strip().splitlines()]
    if code == 2 and line.startswith("error: "):
        reason = line.removeprefix("error: ").replace(str(media), "The video")
        if "/" not in reason:
            return HttpError(422, reason.replace("pass --partial", "send the field partial=true"))
    log.error("Extraction ended with %s: %s", code, said[-2000:])
    return HttpError(422, "The video could not be extracted; convert it to an mp4 file of H.264 and send that.")
