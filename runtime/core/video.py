"""A video as the network meets it: clip features, and the segments they are pooled into."""

from __future__ import annotations

import dataclasses
import logging
import numbers
import os
from collections.abc import Callable
from pathlib import Path
from typing import Literal, cast

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
from runtime.core.io.array_files import load_array, read_archive
from runtime.core.io.input_files import check_file

Pooling = Literal["mmaction2", "drn"]

log = logging.getLogger("drn")

# How far the number of clips may be from what the frame count gives: beyond the first a warning, beyond the second an
# error. Published files are up to a few clips short. Rounding alone changes short videos by a clip or two.
CLOCK_SLACK = 0.1
MAX_CLIP_RATIO = 1.5
MAX_CLIP_DIFFERENCE = 2
# Videos of Charades have 6 to 120 frames per second, those of TACoS 29.4.
MIN_FRAME_RATE, MAX_FRAME_RATE = 1, 240
# Those of Charades are 0.2 to 4 times their median.
MAX_RATE_RATIO = 8

# A year of video at 60 frames a second, and then some: beyond is a mistake, and would overflow on the way.
LONGEST_SECONDS = 1e8
MAX_FRAMES = 2**31 - 1
# Clip features are of order 1 to 100. Far beyond, float32 sums over a layer are no numbers any more.
LARGEST_FEATURE = 1e15
# Features of C3D, I3D, VGG and CLIP stay far below this, so larger ones may be why an output is not finite.
LARGE_FEATURE = 1000.0
# Differences of this size, absolute and as a share, are rounding of float32.
NEGLIGIBLE = 1e-6
# A larger file stays on the disk and is read where it is looked at: two hours of C3D take 369 MB.
MAPPED_BYTES = 1 << 26


@dataclasses.dataclass(frozen=True)
class ClipTiming:
    """The frames behind a clip feature: `window` frames, one clip every `stride` frames (C3D: 16 and 8)."""

    window: int = 16
    stride: int = 8

    def __post_init__(self) -> None:
        if self.window < 1 or self.stride < 1:
            raise FeatureError(
                f"A clip sees at least 1 frame, and the next starts at least 1 later; {self.window} and {self.stride} "
                "were given.",
                code="invalid_clip_timing",
            )

    def __str__(self) -> str:
        return f"{self.window} frames a clip, one every {self.stride}"

    def num_clips(self, num_frames: int) -> int:
        """Return how many whole windows fit into `num_frames`, at least one."""
        return max(1, (num_frames - self.window) // self.stride + 1)

    def num_frames(self, num_clips: int) -> int:
        """Return the frames that `num_clips` windows cover; the true count may be up to `stride` - 1 higher."""
        return (num_clips - 1) * self.stride + self.window

    def fits(self, num_frames: int, num_clips: int) -> bool:
        """Return whether a video of `num_frames` frames has about `num_clips` clips."""
        expected = self.num_clips(num_frames)
        return abs(expected - num_clips) <= max(1, CLOCK_SLACK * expected)

    def contradicts(self, num_frames: int, num_clips: int) -> bool:
        """Return whether features of `num_clips` clips must have another timing or belong to another video."""
        low, high = sorted((self.num_clips(num_frames), num_clips))
        return high > MAX_CLIP_RATIO * low and high - low > MAX_CLIP_DIFFERENCE


@dataclasses.dataclass(eq=False)
class Origin:
    """The origin of videos; all videos of a data set share one.

    Attributes:
        advice: what to do when the clips of a video do not fit its frames, as sentences.
        warned: whether a warning about that was given.
    """

    advice: str = "Correct num_frames, or use features with this clip timing."
    warned: bool = False

    def check(self, name: str, num_clips: int, num_frames: int, clock: ClipTiming) -> None:
        """Compare the number of clips of a video with its frame count: this is the only place where that is done.

        Args:
            name: of the video.
            num_clips: rows of its features.
            num_frames: its length in frames.
            clock: the clip timing by which segments are pooled.

        Raises:
            FeatureError: they contradict each other (code `clip_timing_mismatch`). A smaller difference is a warning,
                once for all videos of this origin.
        """
        if clock.fits(num_frames, num_clips):
            return
        message = (
            f"The features of {name} have {num_clips} clips, but its {num_frames} frames make "
            f"{clock.num_clips(num_frames)} at {clock} (the clip timing that is expected here)."
        )
        if clock.contradicts(num_frames, num_clips):
            raise FeatureError(f"{message} {self.advice}", code="clip_timing_mismatch")
        self._warn(message)

    def check_clock(self, name: str, counted: ClipTiming, clock: ClipTiming) -> None:
        """Warn, once, if the frames of a video were counted by another clip timing than segments are pooled by."""
        if counted != clock:
            self._warn(
                f"The clips of {name} see {counted.window} frames, one every {counted.stride}, and those that the "
                f"model learnt from {clock.window}, one every {clock.stride}; its moments are wrong here unless it is "
                "known to fit."
            )

    def _warn(self, message: str) -> None:
        if not self.warned:
            self.warned = True
            log.warning("%s %s Other videos like this one are not listed.", message, self.advice)


def check_frame_rate(
    name: str,
    num_frames: float,
    duration: float,
    error: type[GroundingError] = FeatureError,
    usual_rate: float | None = None,
) -> None:
    """Raise `error` (code `frame_rate_out_of_range`) unless a video has 1 to 240 frames per second.

    A rate far from `usual_rate`, the median of the data set, is a warning.
    """
    rate = num_frames / duration
    counted = f"{name} has {num_frames:g} frames in {duration:g} seconds, which is {rate:.3g} frames per second"
    advice = "Give the duration in seconds, and the frame count of the same video."
    if not MIN_FRAME_RATE <= rate <= MAX_FRAME_RATE:
        raise error(
            f"{counted}; {MIN_FRAME_RATE} to {MAX_FRAME_RATE} are possible. {advice}", code="frame_rate_out_of_range"
        )
    if usual_rate and not 1 / MAX_RATE_RATIO <= rate / usual_rate <= MAX_RATE_RATIO:
        log.warning(
            "%s, but the median of its data set is %.3g. %s", counted, usual_rate, advice,
            extra={"code": "frame_rate_out_of_range"},
        )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Segments:
    """The network's input for one video.

    Attributes:
        features: (T, D), the element-wise maximum of the clips of each segment, as stored: float32 from
            `Video.segments`, so that every further query of the video gets them as the network takes them.
        spans: (T, 2) float64, starts and ends as fractions of the video.
    """

    features: np.ndarray
    spans: np.ndarray


@dataclasses.dataclass(frozen=True)
class Video:
    """Clip features of one video and its clock.

    Attributes:
        features: (num_clips, D) floats.
        num_frames: length in frames.
        duration: length in seconds.
        name: how reports call it.
        origin: where it comes from, for warnings that are given once.
        counted: the clip timing by which `num_frames` was counted from the clips; None where it is known.
        offset: seconds from the start of the video file, as players count, to the first picture. Moments are in the
            time of players; all other times count from the first picture.
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
        if not 0 < self.duration <= LONGEST_SECONDS:
            raise FeatureError(
                f"The duration of {self.name} must be above 0 and at most {LONGEST_SECONDS:g} seconds, "
                f"and {self.duration} was given.",
                code="invalid_frame_count",
            )
        if not 0 <= self.offset <= LONGEST_SECONDS:
            raise FeatureError(
                f"The offset of {self.name} must be 0 to {LONGEST_SECONDS:g} seconds, and {self.offset} was given."
            )
        if not 2 <= self.num_frames <= MAX_FRAMES:
            raise FeatureError(
                f"{self.name} needs 2 to {MAX_FRAMES} frames to be divided, and {self.num_frames} were given.",
                code="invalid_frame_count",
            )
        check_frame_rate(self.name, self.num_frames, self.duration)

    @property
    def end(self) -> float:
        """Seconds from the start of the video file, as players count, to the end of the last picture."""
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
        """Read a `.npy`, `.npz` or `.pt` feature file. Neither torch nor the running of code in the file is needed.

        Args:
            path: a (num_clips, D) float array.
            duration: seconds.
            num_frames: taken from the number of clips when not given, which is right to within one clip stride.
            name: the file's stem when not given.
            clock: how clips lie on frames, for `num_frames`.
            origin: where it comes from; a source of its own when not given.

        Raises:
            FeatureError: the file is missing, is not such an array, or holds values that are not finite.
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

        Args:
            num_segments: T.
            pooling: whose borders and rows. `mmaction2`: the first part starts at 0 and the last ends one frame
                early, a part keeps every clip from the one its first frame is in to the one its last frame is in.
                `drn`: borders count frames from 1, and a part of at most one window keeps a single clip.
            clock: how clips lie on frames.

        The result is kept, so that every further query of this video gets it for nothing.

        Raises:
            FeatureError: see `check`.

        Source: CharadesSTADataset in mmaction2; CharadesSTA and its proposal file in the authors' code.
        """
        key = (num_segments, pooling, ClipTiming() if clock is None else clock)
        try:
            result = self._segments.get(key)
        except TypeError:
            result = None  # An argument that cannot be hashed has the wrong type.
        if result is None:
            check_argument("num_segments", num_segments, numbers.Integral, "a number of segments", FeatureError)
            check_argument("pooling", pooling, str, "a rule of pooling", FeatureError)
            if not 1 <= num_segments <= MAX_FRAMES:
                raise FeatureError(
                    f"A video has 1 to {MAX_FRAMES} segments, and {excerpt(num_segments)} were asked for."
                )
            self.check(key[2])
            self._segments[key] = pool_segments(self.features, self.num_frames, *key)
        return self._segments[key]

    def check(self, clock: ClipTiming) -> None:
        """Raise FeatureError unless clips and frames fit each other and the clips differ from each other.

        See `Origin.check` and `check_varies`. Frames that were counted from the clips cannot contradict them.
        """
        check_argument("clock", clock, ClipTiming, "a ClipTiming", FeatureError)
        if self.counted is None:
            self.origin.check(self.name, len(self.features), self.num_frames, clock)
        else:
            self.origin.check_clock(self.name, self.counted, clock)
        check_varies(self.features, self.name)


def pool_segments(
    features: np.ndarray, num_frames: int, num_segments: int, pooling: Pooling, clock: ClipTiming
) -> Segments:
    """Return the segments of (num_clips, D) features that cover `num_frames` frames; see `Video.segments`."""
    first, last, spans = segment_rows(num_frames, num_segments, pooling, clock)
    return Segments(max_over_rows(features, first, last).astype(np.float32, copy=False), spans)


def segment_rows(
    num_frames: int, num_segments: int, pooling: Pooling, clock: ClipTiming
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the first and last clip of each segment, (T,) integers, last included, and the spans (T, 2) float64."""
    if pooling == "mmaction2":
        step = (num_frames - 1) / num_segments
        borders = (step * np.arange(num_segments + 1)).astype(np.int64)
        # T * ((N - 1) / T) may round below N - 1, and the last border is N - 1 by definition.
        borders[-1] = num_frames - 1
        starts, ends = borders[:-1], borders[1:]
        return starts // clock.stride, ends // clock.stride, np.stack((starts, ends), 1) / num_frames
    if pooling == "drn":
        borders = np.floor(np.linspace(1, num_frames, num_segments + 1)).astype(np.int64)
        starts, ends = borders[:-1], borders[1:]
        first = starts // clock.stride
        last = np.where(ends - starts <= clock.window, first, np.maximum(first, (ends - 1) // clock.stride))
        return first, last, np.stack((starts, ends), 1) / num_frames
    raise FeatureError(
        f"Segments are pooled as mmaction2 or drn, and {excerpt(pooling)} was asked for.", code="invalid_setting"
    )


def max_over_rows(features: np.ndarray, first: np.ndarray, last: np.ndarray) -> np.ndarray:
    """Return (T, D) element-wise maxima over rows first..last, last included, of (num_clips, D) features.

    Rows past the end are clipped to the last one: feature files shorter than their frame count occur.
    """
    end = len(features) - 1
    # NumPy compares halves in software, ten times slower than integers of the same order.
    ordered = _sortable_float16_bits(features.view(np.int16)) if features.dtype == np.float16 else features
    rows = np.stack(
        [ordered[start : stop + 1].max(axis=0) for start, stop in zip(np.minimum(first, end), np.minimum(last, end))]
    )
    return _sortable_float16_bits(rows).view(np.float16) if features.dtype == np.float16 else rows


def _sortable_float16_bits(bits: np.ndarray) -> np.ndarray:
    """Return the bits of finite halves as integers of the same order, and such integers as the bits again: negative
    numbers grow in magnitude, so all but their sign is turned round."""
    return bits ^ ((bits >> 15) & np.int16(0x7FFF))


def load_features(path: str | os.PathLike[str]) -> np.ndarray:
    """Return the clip features in a `.npy`, `.npz` or `.pt` file as (num_clips, D) floats; a large `.npy` is mapped.

    Raises:
        FeatureError: the file is missing, empty, truncated, holds no such array, or would run code when read.
    """
    path = Path(path)
    check_file(path, "The feature file", FeatureError, "check the path or the name of the video")
    if path.stat().st_size == 0:
        raise FeatureError(
            f"The feature file {path} is empty; extract the features of this video again.", code="empty_file"
        )
    if path.suffix not in FEATURE_SUFFIXES:
        raise FeatureError(
            f"{path} should end in .npy, .npz or .pt; convert the features to one of them.", code="wrong_suffix"
        )
    with reading(path, "a NumPy array of clip features", FeatureError, "extract the features of this video again"):
        value = FEATURE_SUFFIXES[path.suffix](path)
        if value.ndim != 2 or value.dtype.kind != "f":
            raise FeatureError(
                f"The features of {path} should be floats of shape (num_clips, D), and are {value.dtype} of shape "
                f"{value.shape}.",
                code="wrong_array",
            )
        return value


def _mapped_array(path: Path) -> np.ndarray:
    with open(path, "rb") as stream:
        if stream.read(2) == b"PK":
            raise FeatureError(
                f"{path} is an archive of arrays under the name of one; save the array with numpy.save.",
                code="ambiguous_features",
            )
    return load_array(path, MAPPED_BYTES)


def _only_array(path: Path) -> np.ndarray:
    """Return the one array of a `.npz` file."""
    arrays = read_archive(path, max_members=1)
    if len(arrays) != 1:
        raise FeatureError(
            f"{path} should hold one array of clip features, and holds none; save it again.", code="ambiguous_features"
        )
    return next(iter(arrays.values()))


def _tensor(path: Path) -> np.ndarray:
    from runtime.core.io import torch_reader

    try:
        value = torch_reader.load(path)
    except CheckpointError as error:
        raise FeatureError(f"{path} should be a tensor of clip features: {error}", code=error.code) from error
    if not isinstance(value, np.ndarray):
        raise FeatureError(
            f"{path} should be one tensor of clip features, and holds a {type(value).__name__}.", code="wrong_array"
        )
    return value


FEATURE_SUFFIXES: dict[str, Callable[[Path], np.ndarray]] = {
    ".npy": _mapped_array,
    ".npz": _only_array,
    ".pt": _tensor,
    ".pth": _tensor,
}


def check_features(features: np.ndarray, name: str) -> None:
    """Raise FeatureError unless `features` is a (num_clips, D) array of finite floats with at least one clip."""
    if not isinstance(features, np.ndarray) or features.ndim != 2 or features.dtype.kind != "f":
        shape = getattr(features, "shape", None)
        kind = getattr(features, "dtype", type(features).__name__)
        raise FeatureError(
            f"The features of {name} should be floats of shape (num_clips, D), and are {kind} of shape {shape}.",
            code="wrong_array",
        )
    if 0 in features.shape:
        raise FeatureError(
            f"The features of {name} hold no clips (shape {features.shape}); at least one is needed.", code="no_clips"
        )
    # The sum is finite only if every value is, and costs no array of flags. A float16 sum could overflow.
    with np.errstate(invalid="ignore", over="ignore"):
        total = features.sum(dtype=np.float64)
    if np.isfinite(total):
        # Finite, and yet too large for any layer? The sum of magnitudes decides without a look at each.
        if not abs(total) <= LARGEST_FEATURE:
            raise FeatureError(
                f"The features of {name} are as large as {np.abs(features).max():.1e}; extract them again.",
                code="features_too_large",
            )
    else:
        bad = np.argwhere(~np.isfinite(features))
        if len(bad):
            raise FeatureError(
                f"The features of {name} hold {len(bad)} values that are not finite, "
                f"the first in clip {bad[0][0]}; extract them again.",
                code="non_finite_features",
            )


def _check_number(field: str, value: object, name: str) -> None:
    """Raise FeatureError unless a field of a video is one real number, and a whole one if it counts frames."""
    # An array without axes is what NumPy reads from a file of one number.
    kind = value.dtype.kind if isinstance(value, np.ndarray) and value.ndim == 0 else ""
    is_real = kind in ("i", "u", "f") or (isinstance(value, numbers.Real) and not isinstance(value, bool))
    whole = field == "num_frames"
    if not is_real or (whole and cast(float, value) % 1 != 0):
        raise FeatureError(
            f"The {field} of {name} must be {'a whole number' if whole else 'a number of seconds'}, and "
            f"{excerpt(value)} ({type(value).__name__}) was given. Give it as {'an int' if whole else 'a float'}.",
            code="invalid_argument",
        )


def check_varies(features: np.ndarray, name: str) -> None:
    """Raise FeatureError (code `constant_features`) if clips differ by rounding alone, or a single one is about zero.

    Features of still pictures differ more from clip to clip, unless the frames are equal in every bit. No moment of
    such a video can be distinguished either.
    """
    dtype = np.promote_types(features.dtype, np.float32)
    reference = features[:1].astype(dtype) if len(features) > 1 else np.zeros(features.shape, dtype)
    # In nearly all files the first and the last row differ, and no other row is compared.
    for rows in (features[-1:], *(features[start : start + 1024] for start in range(0, len(features), 1024))):
        if not np.allclose(rows.astype(dtype, copy=False), reference, NEGLIGIBLE, NEGLIGIBLE):
            return
    if spread := float(np.ptp(features, axis=0).max()):
        value = f"values that differ by at most {spread:.1e}"
    else:
        value = f"the value {features.flat[0]:g}" if np.ptp(features[0]) == 0 else "the same values"
    raise FeatureError(
        f"The features of {name} hold {value} in all {len(features)} clips, so no moment can be distinguished. "
        "Extract them again.",
        code="constant_features",
    )
