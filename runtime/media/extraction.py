"""Extract the clip features of video files batch by batch, so that a video of any length fits into memory."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from runtime.core.cli import report_written
from runtime.core.decoding import NON_FINITE
from runtime.core.errors import ModelFileError, VideoFileError, excerpt, printable_line, reading
from runtime.core.io.atomic_files import atomic_write, write_json
from runtime.core.io.digests import json_digest, sha256
from runtime.core.io.input_files import read_json
from runtime.core.io.text_files import is_number
from runtime.core.pooling import ClipTiming
from runtime.core.prefetch import prefetch
from runtime.core.video import Video, load_features
from runtime.datasets.validation import MAX_FRAME_RATE
from runtime.media.container import check_video_file
from runtime.media.extractors import Extractor
from runtime.media.frames import clips
from runtime.media.video_file import VideoFile, probe, read_frames

log = logging.getLogger("drn")

FORMAT = "drn-extracted/1"
# Increase it with every change of this package that changes features, so that existing features are extracted again.
REVISION = 2
BATCH_SIZE = 4
# Batches that are decoded while the network runs.
BATCHES_AHEAD = 2


@dataclasses.dataclass(frozen=True)
class ExtractionRecord:
    """The record of one video's extraction, without the features.

    Attributes:
        video: SHA-256 of the video file.
        extractor: `Extraction.key`.
        whole: whether the file was checked for damage; with `partial` frames may be missing.
        features: SHA-256 of the `.npy` file; empty in records of earlier versions.
        offset: seconds from the start of the file, as players count, to the first frame.
        length: duration in seconds if the file ends within the last frame; else 0.
    """

    video: str
    extractor: str
    num_clips: int
    num_frames: int
    frame_rate: float
    whole: bool = True
    features: str = ""
    offset: float = 0.0
    length: float = 0.0

    @property
    def duration(self) -> float:
        """Duration in seconds from the first frame."""
        return self.length or self.num_frames / self.frame_rate

    def is_valid_for(self, video: str, extractor: str, partial: bool) -> bool:
        """Return whether a new extraction would give the recorded features."""
        return (self.video, self.extractor) == (video, extractor) and (self.whole or partial) and self.features != ""

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON object of the record, with a `digest` of its other fields."""
        content = dataclasses.asdict(self)
        return {**content, "digest": json_digest(content)}


def check_length(video_file: VideoFile, clock: ClipTiming) -> None:
    """Raise VideoFileError if a video is shorter than one clip."""
    if video_file.num_frames < max(2, clock.window):
        frames = "1 frame" if video_file.num_frames == 1 else f"{video_file.num_frames} frames"
        raise VideoFileError(
            f"{video_file.path} has {frames}, but a clip needs {clock.window}. Give a video of at least "
            f"{max(2, clock.window)} frames.",
            code="video_too_short",
        )


def extract(
    video_file: VideoFile,
    extractor: Extractor,
    output: str | os.PathLike[str],
    *,
    partial: bool = False,
    batch_size: int = BATCH_SIZE,
    threads: int | None = None,
) -> tuple[int, int]:
    """Write the features of a video to a `.npy` file, (num_clips, D) float32.

    Memory holds a few batches of clips only. The file is written completely or not at all.

    Args:
        partial: whether to accept a damaged file, and use what can be decoded.

    Returns:
        The number of clips, and of frames.

    Raises:
        VideoFileError: the video is damaged and `partial` is not set, or is too short for one clip.
        ModelFileError: the extractor returns features that are not finite.
    """
    from tqdm import tqdm

    manifest = extractor.manifest
    clock = ClipTiming(manifest.window, manifest.stride)
    check_length(video_file, clock)
    # An image encoder needs only one frame per clip.
    every = clock.stride if clock.window == 1 else 1
    num_read = num_clips = 0
    progress = tqdm(
        total=video_file.num_frames,
        desc=f"Extracting {printable_line(video_file.path.name)}",
        unit="frame",
        leave=False,
        disable=None,
    )

    def counted() -> Iterator[np.ndarray]:
        nonlocal num_read
        for frame in read_frames(video_file, manifest.framing, every=every, partial=partial, threads=threads):
            num_read += 1
            progress.update(every)
            yield frame

    windows = clips(counted(), clock.window, 1 if every > 1 else clock.stride)
    decoded = contextlib.closing(prefetch(_batches(windows, batch_size), BATCHES_AHEAD))
    with atomic_write(output) as temporary, open(temporary, "wb") as stream, progress, decoded as batches:
        _write_header(stream, 0, manifest.dim)
        for batch in batches:
            features = np.ascontiguousarray(extractor.extract(batch), np.float32)
            if not np.isfinite(features).all():
                raise ModelFileError(
                    f"The extractor returns features of {video_file.path} that are not finite, in clips {num_clips} to "
                    f"{num_clips + len(batch) - 1}. Correct its description, or use an extractor of precision fp32.",
                    code=NON_FINITE,
                )
            stream.write(features.data)
            num_clips += len(batch)
        # With a step of two, for example, the last frame that was read stands for one or two frames.
        num_frames = num_read if every == 1 else min(video_file.num_frames, num_read * every)
        if not num_clips:
            raise VideoFileError(
                f"{video_file.path} decodes to {num_frames} frames, but a clip needs {clock.window}. Give a longer "
                "video.",
                code="video_too_short",
            )
        stream.seek(0)
        _write_header(stream, num_clips, manifest.dim)
    return num_clips, num_frames


def _write_header(stream: Any, rows: int, dim: int) -> None:
    """Write the header of a `.npy` file. NumPy pads it for any number of rows, so that its length is constant."""
    np.lib.format.write_array_header_1_0(
        stream,
        {"descr": np.lib.format.dtype_to_descr(np.dtype(np.float32)), "fortran_order": False, "shape": (rows, dim)},
    )


def _batches(windows: Iterator[np.ndarray], size: int) -> Iterator[np.ndarray]:
    while True:
        batch = list(itertools.islice(windows, size))
        if not batch:
            return
        yield np.stack(batch)


@dataclasses.dataclass(frozen=True)
class Extraction:
    """An extractor with the options of `extract`."""

    extractor: Extractor
    partial: bool = False
    batch_size: int = BATCH_SIZE
    threads: int | None = None

    @functools.cached_property
    def key(self) -> str:
        """Digest of everything but the video that determines features: the extractor and this package."""
        return json_digest({"revision": REVISION, "extractor": self.extractor.identity})

    def update(
        self,
        path: Path,
        output: Path,
        video_hash: str,
        known: ExtractionRecord | None = None,
        video_file: VideoFile | None = None,
    ) -> ExtractionRecord:
        """Extract a video unless `output` still contains the features of an earlier extraction; see `extract`.

        Args:
            known: record of an earlier extraction to `output`.
            video_file: video file that `probe` returned; None probes the file if it must be extracted.

        Returns:
            The record of the extraction; `known` if its features are still valid.
        """
        if known is not None and output.is_file() and known.is_valid_for(video_hash, self.key, self.partial):
            if sha256(output) == known.features:
                log.info("%s: %s already contains the features.", path.name, output)
                return known
            log.warning("%s does not match its recorded digest. The features are extracted again.", output)
        video_file = video_file or probe(path)
        if video_file.damage and self.partial:
            log.warning("%s %s. The frames that can be decoded are used.", path, video_file.damage)
        options: dict[str, Any] = {"partial": self.partial, "batch_size": self.batch_size, "threads": self.threads}
        num_clips, num_frames = extract(video_file, self.extractor, output, **options)
        return ExtractionRecord(
            video_hash,
            self.key,
            num_clips,
            num_frames,
            video_file.frame_rate,
            not self.partial,
            sha256(output),
            video_file.offset,
            video_file.length if num_frames >= video_file.num_frames else 0.0,
        )


def load_or_extract(
    path: Path,
    extractor: Extractor,
    *,
    partial: bool = False,
    threads: int | None = None,
    video_file: VideoFile | None = None,
) -> Video:
    """Return the clip features of a video file, from the cache in `cache_directory` if possible; see `extract`.

    Cache keys are digests of the video's content and of everything that determines the features (`Extraction.key`).
    Damaged entries are extracted again.
    """
    extraction, video_hash = Extraction(extractor, partial, threads=threads), hash_of(path)
    output = cache_directory() / f"{video_hash[:24]}-{extraction.key[:24]}.npy"
    record_path = output.with_suffix(".json")
    known = _cached_record(record_path)
    record = extraction.update(path, output, video_hash, known, video_file)
    if record is not known:
        report_written(output)
    if record != known:
        write_json(record_path, {"format": FORMAT, **record.to_dict()})
        report_written(record_path)
    return Video(load_features(output), record.num_frames, record.duration, path.stem, offset=record.offset)


def hash_of(path: Path) -> str:
    """Return the SHA-256 of a video file; VideoFileError if it is missing or cannot be read."""
    check_video_file(path)
    try:
        return sha256(path)
    except OSError as error:
        raise VideoFileError(
            f"The video {path} cannot be read: {error.strerror}. Correct its permissions.", code="unreadable_file"
        ) from error


def cache_directory() -> Path:
    """Return the directory of cached features: DRN_CACHE, or else drn-deploy in the user's cache directory."""
    configured = os.environ.get("DRN_CACHE")
    if configured:
        return Path(configured)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "drn-deploy"


def _cached_record(path: Path) -> ExtractionRecord | None:
    """Return a record of the cache; None if there is none, or it is damaged."""
    if not path.is_file():
        return None
    try:
        return read_record(read_json(path, "record of extracted features", VideoFileError), path)
    except VideoFileError as error:
        log.warning("%s The features are extracted again.", error)
        return None


def read_record(value: Any, source: Path) -> ExtractionRecord | None:
    """Return the record of a JSON object from `ExtractionRecord.to_dict`; None if it does not match its digest."""
    with reading(source, "a record of extracted features", VideoFileError, "remove it"):
        fields = {name: item for name, item in value.items() if name not in ("format", "digest")}
        record = ExtractionRecord(**fields)
        texts, counts = (record.video, record.extractor, record.features), (record.num_clips, record.num_frames)
        if not all(isinstance(text, str) for text in texts) or not isinstance(record.whole, bool):
            raise ValueError("it lacks the digests of the files")
        if not all(type(count) is int and count > 0 for count in counts) or not is_number(record.frame_rate):
            raise ValueError("its frame and clip counts are not integers above 0")
        if not 0 < record.frame_rate <= MAX_FRAME_RATE:
            raise ValueError(f"its frame rate is {excerpt(record.frame_rate)}, expected above 0 to {MAX_FRAME_RATE}")
    if "digest" not in value:
        # Earlier versions wrote no digests, so their features cannot be verified.
        return dataclasses.replace(record, features="")
    if value["digest"] != json_digest(fields):
        log.warning("A record in %s does not match its digest. The features are extracted again.", source)
        return None
    return record
