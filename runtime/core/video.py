"""Define videos as clip features with a length, and pool the clips into segments."""

from __future__ import annotations

import dataclasses
import logging
import numbers
import os
from collections.abc import Callable
from pathlib import Path
from typing import cast

import numpy as np

from runtime.core.errors import (
    CheckpointError,
    FeatureError,
    GroundingError,
    check_argument,
    check_path,
    excerpt,
    reading,
)
from runtime.core.io.array_files import in_native_order, load_array, read_archive
from runtime.core.io.input_files import check_file
from runtime.core.pooling import ClipTiming, Pooling, Segments, pool_segments

log = logging.getLogger("drn")

# Videos of Charades have 6 to 120 frames per second, those of TACoS 29.4.
MIN_FRAME_RATE, MAX_FRAME_RATE = 1, 240
# Maximum ratio to the median frame rate of a data set, below which there is no warning; Charades has 0.2 to 4.
MAX_RATE_RATIO = 8

# About a year of video at 60 frames per second. Larger values are mistakes, and would overflow.
MAX_DURATION_S = 1e8
MAX_FRAMES = 2**31 - 1
# Clip features are of order 1 to 100. Far larger values overflow in float32 sums over a layer.
MAX_FEATURE = 1e15
# Features of C3D, I3D, VGG and CLIP are far smaller, so larger ones may be the cause of an output that is not finite.
LARGE_FEATURE = 1000.0
# Absolute and relative differences of this size are float32 rounding.
NEGLIGIBLE = 1e-6
# Larger files are memory-mapped: two hours of C3D features have 369 MB.
MAPPED_BYTES = 1 << 26


@dataclasses.dataclass(eq=False)
class Origin:
    """The origin of videos, which all videos of a data set share, so that warnings appear once.

    Attributes:
        advice: instructions for videos whose clips do not match their frames, as sentences.
    """

    advice: str = "Correct num_frames, or use features with this clip timing."
    warned: bool = False

    def check(self, name: str, num_clips: int, num_frames: int, clock: ClipTiming) -> None:
        """Check that the number of clips of a video matches its frame count.

        Raises:
            FeatureError: the two numbers contradict each other (code `clip_timing_mismatch`). A small difference is
                only a warning, once for all videos of this origin.
        """
        if clock.fits(num_frames, num_clips):
            return
        message = (
            f"Expected {clock.num_clips(num_frames)} clips for the {num_frames} frames of {name} ({clock}), got "
            f"{num_clips}."
        )
        if clock.contradicts(num_frames, num_clips):
            raise FeatureError(f"{message} {self.advice}", code="clip_timing_mismatch")
        self._warn(message)

    def check_clock(self, name: str, counted: ClipTiming, clock: ClipTiming) -> None:
        """Warn once if frames were counted by another clip timing than segments are pooled by.

        Args:
            counted: clip timing by which the frames were computed from the clips.
        """
        if counted != clock:
            self._warn(
                f"Expected the clip timing of the training data of the model for {name} ({clock}), got {counted}. "
                "Moments may be wrong."
            )

    def _warn(self, message: str) -> None:
        if not self.warned:
            self.warned = True
            log.warning("%s %s This warning appears once.", message, self.advice)


def check_frame_rate(
    name: str,
    num_frames: float,
    duration: float,
    error: type[GroundingError] = FeatureError,
    usual_rate: float | None = None,
) -> None:
    """Raise `error` (code `frame_rate_out_of_range`) unless a video has 1 to 240 frames per second.

    Args:
        usual_rate: median frame rate of the data set; a rate far from it is a warning.
    """
    rate = num_frames / duration
    actual = f"{rate:.3g} ({num_frames:g} frames in {duration:g} seconds)"
    advice = "Correct the duration in seconds or the frame count."
    if not MIN_FRAME_RATE <= rate <= MAX_FRAME_RATE:
        raise error(
            f"Expected {MIN_FRAME_RATE} to {MAX_FRAME_RATE} frames per second for {name}, got {actual}. {advice}",
            code="frame_rate_out_of_range",
        )
    if usual_rate and not 1 / MAX_RATE_RATIO <= rate / usual_rate <= MAX_RATE_RATIO:
        log.warning(
            "Expected about %.3g frames per second for %s, the median of its data set, got %s. %s",
            usual_rate, name, actual, advice, extra={"code": "frame_rate_out_of_range"},
        )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Video:
    """Clip features and length of one video.

    Attributes:
        features: (num_clips, D) floats.
        num_frames: length in frames.
        duration: length in seconds.
        name: name in reports.
        origin: origin of the video, whose warnings appear once.
        counted: clip timing by which `num_frames` was computed from the number of clips; None if it is known.
        offset: seconds from the start of the video file, as in players, to the first picture. Moments are in the time
            of players, and all other times start at the first picture.
    """

    features: np.ndarray
    num_frames: int
    duration: float
    name: str = "video"
    origin: Origin = dataclasses.field(default_factory=Origin, repr=False, compare=False)
    counted: ClipTiming | None = dataclasses.field(default=None, repr=False, compare=False)
    offset: float = 0.0
    _segments: dict[tuple[int, str, ClipTiming], Segments] = dataclasses.field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        check_argument("name", self.name, str, "a text", FeatureError)
        check_argument("origin", self.origin, Origin, "an Origin", FeatureError)
        check_features(self.features, self.name)
        for field in ("duration", "offset", "num_frames"):
            _check_number(field, getattr(self, field), self.name)
        check_duration(self.duration, self.name)
        if not 0 <= self.offset <= MAX_DURATION_S:
            raise FeatureError(
                f"Expected an offset of 0 to {MAX_DURATION_S:g} s for {self.name}, got {self.offset}. Correct the "
                "offset.",
                code="invalid_argument",
            )
        if not 2 <= self.num_frames <= MAX_FRAMES:
            raise FeatureError(
                f"Expected 2 to {MAX_FRAMES} frames for {self.name}, got {self.num_frames}. Correct the frame count.",
                code="invalid_frame_count",
            )
        check_frame_rate(self.name, self.num_frames, self.duration)

    @property
    def end(self) -> float:
        """Return the seconds from the start of the video file, as in players, to the end of the last picture."""
        return self.offset + self.duration

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        duration: float,
        num_frames: int | None = None,
        name: str | None = None,
        clock: ClipTiming | None = None,
        origin: Origin | None = None,
    ) -> Video:
        """Read a `.npy`, `.npz` or `.pt` feature file, without torch and without running code in the file.

        Args:
            path: file of a (num_clips, D) float array.
            duration: length in seconds.
            num_frames: length in frames; default: computed from the number of clips, up to one clip stride too low.
            name: name in reports; default: the stem of the file.
            clock: clip timing from which `num_frames` is computed; default: that of C3D.
            origin: origin of the video; default: a new one.

        Raises:
            FeatureError: the file is missing, is not such an array, or contains values that are not finite.
        """
        check_path(path, FeatureError)
        clock = ClipTiming() if clock is None else clock
        check_argument("clock", clock, ClipTiming, "a ClipTiming", FeatureError)
        path = Path(path)
        features = load_features(path)
        counted = clock if num_frames is None else None
        if num_frames is None:
            num_frames = clock.num_frames(len(features))
        return cls(features, num_frames, duration, name or path.stem, origin or Origin(), counted)

    def segments(self, num_segments: int, pooling: Pooling = "mmaction2", clock: ClipTiming | None = None) -> Segments:
        """Divide the video into `num_segments` equal parts and max-pool the clips of each.

        The result is cached for later queries.

        Args:
            pooling: rule for borders and clips. `mmaction2`: the first part starts at 0, the last ends one frame before
                the end, and a part contains the clips from that of its first to that of its last frame. `drn`: borders
                count frames from 1, and a part of at most one window contains a single clip.
            clock: clip timing of the features; default: that of C3D.

        Raises:
            FeatureError: clips and frames contradict each other, or all clips are equal; see `check`.

        Source: CharadesSTADataset in mmaction2; CharadesSTA and its proposal file in the authors' code.
        """
        key = (num_segments, pooling, ClipTiming() if clock is None else clock)
        try:
            result = self._segments.get(key)
        except TypeError:
            result = None  # An unhashable argument has the wrong type, which the checks below report.
        if result is None:
            check_argument("num_segments", num_segments, numbers.Integral, "a number of segments", FeatureError)
            check_argument("pooling", pooling, str, "a rule of pooling", FeatureError)
            if not 1 <= num_segments <= MAX_FRAMES:
                raise FeatureError(
                    f"Expected 1 to {MAX_FRAMES} for num_segments, got {excerpt(num_segments)}. Correct the argument.",
                    code="invalid_argument",
                )
            self.check(key[2])
            self._segments[key] = pool_segments(self.features, self.num_frames, *key)
        return self._segments[key]

    def check(self, clock: ClipTiming) -> None:
        """Raise FeatureError unless clips match frames and the clips are not all equal.

        Frames that were computed from the clips always match.

        Raises:
            FeatureError: clips and frames contradict each other (code `clip_timing_mismatch`), or all clips are equal
                (`constant_features`).
        """
        check_argument("clock", clock, ClipTiming, "a ClipTiming", FeatureError)
        if self.counted is None:
            self.origin.check(self.name, len(self.features), self.num_frames, clock)
        else:
            self.origin.check_clock(self.name, self.counted, clock)
        check_varies(self.features, self.name)


def load_features(path: str | os.PathLike[str]) -> np.ndarray:
    """Return the features in a `.npy`, `.npz` or `.pt` file, (num_clips, D) in the float type of the file.

    The byte order is that of this machine. A large `.npy` file is memory-mapped.

    Raises:
        FeatureError: the file is missing, empty or truncated, contains no such array, or would run code when read.
    """
    path = Path(path)
    check_file(path, "The feature file", FeatureError, "check the path or the name of the video")
    if path.stat().st_size == 0:
        raise FeatureError(
            f"The feature file {path} is empty. Extract the features of this video again.", code="empty_file"
        )
    if path.suffix not in FEATURE_SUFFIXES:
        raise FeatureError(
            f"Expected a .npy, .npz or .pt file of features, got {path}. Convert the features.", code="wrong_suffix"
        )
    with reading(path, "a NumPy array of clip features", FeatureError, "extract the features of this video again"):
        value = FEATURE_SUFFIXES[path.suffix](path)
        if value.ndim != 2 or value.dtype.kind != "f":
            raise _wrong_array(path, value.dtype, value.shape)
        return in_native_order(value)


def _mapped_array(path: Path) -> np.ndarray:
    with open(path, "rb") as stream:
        if stream.read(2) == b"PK":
            raise FeatureError(
                f"Expected one array in {path}, got an archive. Save the array with numpy.save.",
                code="ambiguous_features",
            )
    return load_array(path, MAPPED_BYTES)


def _only_array(path: Path) -> np.ndarray:
    """Return the one array of a `.npz` file."""
    arrays = read_archive(path, max_members=1)
    if len(arrays) != 1:
        raise FeatureError(
            f"Expected one array of clip features in {path}, got none. Save the features again.",
            code="ambiguous_features",
        )
    return next(iter(arrays.values()))


def _tensor(path: Path) -> np.ndarray:
    from runtime.core.io import torch_reader

    try:
        value = torch_reader.load(path)
    except CheckpointError as error:
        raise FeatureError(str(error), code=error.code) from error
    if not isinstance(value, np.ndarray):
        raise FeatureError(
            f"Expected a tensor of clip features in {path}, got a {type(value).__name__}. Save the tensor alone.",
            code="wrong_array",
        )
    return value


FEATURE_SUFFIXES: dict[str, Callable[[Path], np.ndarray]] = {
    ".npy": _mapped_array,
    ".npz": _only_array,
    ".pt": _tensor,
    ".pth": _tensor,
}


def check_features(features: np.ndarray, name: str) -> None:
    """Raise FeatureError unless features are finite floats of shape (num_clips, D) with at least one clip."""
    if not isinstance(features, np.ndarray) or features.ndim != 2 or features.dtype.kind != "f":
        raise _wrong_array(name, getattr(features, "dtype", type(features).__name__), getattr(features, "shape", None))
    if 0 in features.shape:
        raise FeatureError(
            f"The features of {name} contain no clips (shape {features.shape}). Extract them again.", code="no_clips"
        )
    # The sum is finite only if every value is, and needs no array of flags. A float16 sum could overflow.
    with np.errstate(invalid="ignore", over="ignore"):
        total = features.sum(dtype=np.float64)
    if np.isfinite(total):
        if not abs(total) <= MAX_FEATURE:
            raise FeatureError(
                f"The features of {name} have values up to {np.abs(features).max():.1e}, more than any layer can use. "
                "Extract them again.",
                code="features_too_large",
            )
    else:
        indices = np.argwhere(~np.isfinite(features))
        if len(indices):
            raise FeatureError(
                f"The features of {name} have {len(indices)} values that are not finite, the first in clip "
                f"{indices[0][0]}. Extract them again.",
                code="non_finite_features",
            )


def check_duration(duration: float, name: str) -> None:
    """Raise FeatureError (code `invalid_frame_count`) unless a duration is above 0 and at most `MAX_DURATION_S`."""
    if not 0 < duration <= MAX_DURATION_S:
        raise FeatureError(
            f"Expected a duration in (0, {MAX_DURATION_S:g}] seconds for {name}, got {duration}. Correct the duration.",
            code="invalid_frame_count",
        )


def _wrong_array(source: object, dtype: object, shape: object) -> FeatureError:
    return FeatureError(
        f"Expected floats of shape (num_clips, D) for {source}, got {dtype} of shape {shape}. Extract them again.",
        code="wrong_array",
    )


def _check_number(field: str, value: object, name: str) -> None:
    """Raise FeatureError unless a field of a video is a real number, and an integer if it counts frames."""
    # Files of one number are read as arrays without axes.
    kind = value.dtype.kind if isinstance(value, np.ndarray) and value.ndim == 0 else ""
    is_real = kind in ("i", "u", "f") or (isinstance(value, numbers.Real) and not isinstance(value, bool))
    is_count = field == "num_frames"
    if not is_real or (is_count and cast(float, value) % 1 != 0):
        raise FeatureError(
            f"Expected {'an integer' if is_count else 'a number of seconds'} for {field} of {name}, got "
            f"{excerpt(value)} ({type(value).__name__}). Correct the argument.",
            code="invalid_argument",
        )


def check_varies(features: np.ndarray, name: str) -> None:
    """Raise FeatureError (code `constant_features`) if clips differ by rounding alone, or a single one is about zero.

    Features of still pictures differ more, unless the frames are identical. Moments of such videos cannot be
    distinguished either.
    """
    dtype = np.promote_types(features.dtype, np.float32)
    reference = features[:1].astype(dtype) if len(features) > 1 else np.zeros(features.shape, dtype)
    # In nearly all files the first and the last row differ, so that no other row is compared.
    for rows in (features[-1:], *(features[start : start + 1024] for start in range(0, len(features), 1024))):
        if not np.allclose(rows.astype(dtype, copy=False), reference, NEGLIGIBLE, NEGLIGIBLE):
            return
    if spread := float(np.ptp(features, axis=0).max()):
        value = f"values that differ by at most {spread:.1e}"
    else:
        value = f"the value {features.flat[0]:g}" if np.ptp(features[0]) == 0 else "the same values"
    raise FeatureError(
        f"The features of {name} have {value} in all {len(features)} clips, so moments cannot be distinguished. "
        "Extract them again.",
        code="constant_features",
    )
