"""Clip features of a video file, written as they come, so that a video of any length fits into memory."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from runtime.core.decoding import NON_FINITE
from runtime.core.errors import ModelFileError, VideoFileError, excerpt, printable_line, reading
from runtime.core.io.atomic_files import atomic_write, write_json
from runtime.core.io.digests import json_digest, sha256
from runtime.core.io.input_files import check_file, read_json
from runtime.core.io.text_files import is_number
from runtime.core.prefetch import prefetch
from runtime.core.video import ClipTiming, Video, load_features
from runtime.datasets.validation import MAX_FRAME_RATE
from runtime.media.extractors import Extractor
from runtime.media.frames import clips
from runtime.media.video_file import VideoFile, probe, read_frames

log = logging.getLogger("drn")

FORMAT = "drn-extracted/1"
# Increase it with every change of this package that changes features: those of before are extracted again.
REVISION = 2
BATCH_SIZE = 4
# Decoded while the network is at work: one to take next, and one in the making.
BATCHES_AHEAD = 2


@dataclasses.dataclass(frozen=True)
class Extracted:
    """The record of one video's extraction, without the features.

    Attributes:
        video: SHA-256 of the file.
        extractor: `extractor_key`.
        num_clips: features.
        num_frames, frame_rate: of the video, as `VideoFile` counts them.
        whole: whether the file was seen to be: what `partial` let pass may lack frames.
        features: SHA-256 of the `.npy` file; empty in notes of before, whose features are extracted again.
        offset: seconds from the start of the file, as players count, to the first picture.
        length: seconds of the pictures where the file ends before the last frame does; 0 where it does not.
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
        """Length in seconds, from the first picture."""
        return self.length or self.num_frames / self.frame_rate

    def serves(self, video: str, extractor: str, partial: bool) -> bool:
        """Return whether these features equal those of a new extraction."""
        return (self.video, self.extractor) == (video, extractor) and (self.whole or partial) and self.features != ""

    def to_dict(self) -> dict[str, Any]:
        """Return the note as it is written, with a `digest` of all the rest of it."""
        content = dataclasses.asdict(self)
        return {**content, "digest": json_digest(content)}


def extractor_key(extractor: Extractor) -> str:
    """Return a digest of all that decides features besides the video: the extractor's, and the code around it."""
    return json_digest({"revision": REVISION, "extractor": extractor.identity})


def check_length(video_file: VideoFile, clock: ClipTiming) -> None:
    """Raise VideoFileError if a video is shorter than one clip."""
    if video_file.num_frames < max(2, clock.window):
        frames = "1 frame" if video_file.num_frames == 1 else f"{video_file.num_frames} frames"
        raise VideoFileError(
            f"{video_file.path} has {frames} and a clip sees {clock.window}; give a video of at least "
            f"{max(2, clock.window)} frames.",
            code="video_too_short",
        )


def extract(
    footage: VideoFile,
    extractor: Extractor,
    output: str | os.PathLike[str],
    *,
    partial: bool = False,
    batch_size: int = BATCH_SIZE,
    threads: int | None = None,
) -> tuple[int, int]:
    """Write the features of a video to a `.npy` file, (num_clips, D) float32, whole or not at all.

    Only one batch of clips is held in memory.

    Returns:
        The number of clips, and of frames.

    Raises:
        VideoFileError: the video is damaged and `partial` is not set, or is too short for one clip.
        ModelFileError: the extractor gives features that are not finite.
        OutputError: `output` cannot be written.
    """
    from tqdm import tqdm

    about = extractor.manifest
    clock = ClipTiming(about.window, about.stride)
    check_length(footage, clock)
    # An image encoder needs no more than the frames it looks at.
    every = clock.stride if clock.window == 1 else 1
    seen = num_clips = 0
    progress = tqdm(
        total=footage.num_frames,
        desc=f"Extracting {printable_line(footage.path.name)}",
        unit="frame",
        leave=False,
        disable=None,
    )

    def counted() -> Iterator[np.ndarray]:
        nonlocal seen
        for picture in read_frames(footage, about.framing, every=every, partial=partial, threads=threads):
            seen += 1
            progress.update(every)
            yield picture

    windows = clips(counted(), clock.window, 1 if every > 1 else clock.stride)
    decoded = contextlib.closing(prefetch(_batches(windows, batch_size), BATCHES_AHEAD))
    with atomic_write(output) as temporary, open(temporary, "wb") as stream, progress, decoded as batches:
        _write_header(stream, 0, about.dim)
        for batch in batches:
            features = np.ascontiguousarray(extractor.extract(batch), np.float32)
            if not np.isfinite(features).all():
                raise ModelFileError(
                    f"The extractor gives features of {footage.path} that are not finite, among clips {num_clips} to "
                    f"{num_clips + len(batch) - 1}. Correct its description, or use one of precision fp32.",
                    code=NON_FINITE,
                )
            stream.write(features.data)
            num_clips += len(batch)
        # Of every second frame, say, the last may stand for one or for two.
        num_frames = seen if every == 1 else min(footage.num_frames, seen * every)
        if not num_clips:
            raise VideoFileError(
                f"{footage.path} decodes to {num_frames} frames and a clip sees {clock.window}; give a longer video.",
                code="video_too_short",
            )
        stream.seek(0)
        _write_header(stream, num_clips, about.dim)
    return num_clips, num_frames


def _write_header(stream: Any, rows: int, dim: int) -> None:
    """Write the head of a `.npy` file; NumPy leaves room in it for any number of rows, so that it never moves."""
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


def extract_if_needed(
    path: Path,
    extractor: Extractor,
    output: Path,
    video_hash: str,
    extractor_hash: str,
    *,
    known: Extracted | None = None,
    partial: bool = False,
    batch_size: int = BATCH_SIZE,
    threads: int | None = None,
    footage: VideoFile | None = None,
) -> Extracted:
    """Return what is known of a video if `output` still holds just that, else extract it and return that.

    Args:
        path: the video file.
        extractor: what makes the features.
        output: the `.npy` file.
        video_hash: SHA-256 of the video file.
        extractor_hash: `extractor_key`.
        known: what an earlier run noted of `output`.
        partial, batch_size, threads: see `extract`.
        footage: of the video, where it was looked at already.
    """
    if known is not None and output.is_file() and known.serves(video_hash, extractor_hash, partial):
        if sha256(output) == known.features:
            log.info("%s: features are there already, in %s.", path.name, output)
            return known
        log.warning("%s is damaged: it does not match the digest of its note; extracting again.", output)
    footage = footage or probe(path)
    if footage.damage and partial:
        log.warning("%s %s; what can be decoded is used.", path, footage.damage)
    num_clips, num_frames = extract(footage, extractor, output, partial=partial, batch_size=batch_size, threads=threads)
    return Extracted(
        video_hash,
        extractor_hash,
        num_clips,
        num_frames,
        footage.frame_rate,
        not partial,
        sha256(output),
        footage.offset,
        footage.length if num_frames >= footage.num_frames else 0.0,
    )


def load_or_extract(
    path: Path,
    extractor: Extractor,
    *,
    partial: bool = False,
    batch_size: int = BATCH_SIZE,
    threads: int | None = None,
    footage: VideoFile | None = None,
) -> Video:
    """Return a video file as its clip features, extracted once and kept in `cache_directory`.

    The key is the content of the video, and everything that decides the features of an extractor (`extractor_key`). An
    entry that is damaged is made again. Raises as `extract`.
    """
    video, maker = hash_of(path), extractor_key(extractor)
    output = cache_directory() / f"{video[:24]}-{maker[:24]}.npy"
    note = output.with_suffix(".json")
    known = _cached_note(note)
    result = extract_if_needed(
        path,
        extractor,
        output,
        video,
        maker,
        known=known,
        partial=partial,
        batch_size=batch_size,
        threads=threads,
        footage=footage,
    )
    if result != known:
        write_json(note, {"format": FORMAT, **result.to_dict()})
    return Video(load_features(output), result.num_frames, result.duration, path.stem, offset=result.offset)


def hash_of(path: Path) -> str:
    """Return the SHA-256 of a video file; VideoFileError if there is none, or it cannot be read."""
    check_file(path, "The video", VideoFileError)
    try:
        return sha256(path)
    except OSError as error:
        raise VideoFileError(f"The video {path} cannot be read: {error.strerror}.", code="unreadable_file") from error


def cache_directory() -> Path:
    """Return where features of videos are kept: DRN_CACHE, else drn-deploy in the user's cache directory."""
    configured = os.environ.get("DRN_CACHE")
    if configured:
        return Path(configured)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "drn-deploy"


def _cached_note(path: Path) -> Extracted | None:
    """Return a note of the cache; None where there is none, or it is damaged."""
    if not path.is_file():
        return None
    try:
        return read_note(read_json(path, "note on features", VideoFileError), path)
    except VideoFileError as error:
        log.warning("%s The features are extracted again.", error)
        return None


def read_note(value: Any, source: Path) -> Extracted | None:
    """Return what a note says that `Extracted.to_dict` made, None where it does not match its own digest.

    Raises:
        VideoFileError: it is no such note.
    """
    with reading(source, "a note on extracted features", VideoFileError, "remove it"):
        fields = {name: item for name, item in value.items() if name not in ("format", "digest")}
        note = Extracted(**fields)
        texts, counts = (note.video, note.extractor, note.features), (note.num_clips, note.num_frames)
        if not all(isinstance(text, str) for text in texts) or not isinstance(note.whole, bool):
            raise ValueError("it lacks the digests of the files")
        if not all(type(count) is int and count > 0 for count in counts) or not is_number(note.frame_rate):
            raise ValueError("its counts are not numbers")
        if not 0 < note.frame_rate <= MAX_FRAME_RATE:
            raise ValueError(f"its frame rate is {excerpt(note.frame_rate)}")
    if "digest" not in value:
        # Of before there were digests. What cannot be checked is not served.
        return dataclasses.replace(note, features="")
    if value["digest"] != json_digest(fields):
        log.warning("A note in %s is damaged: it does not match its own digest.", source)
        return None
    return note
