"""Choose the optimization profile and padded shape of a batch, and the layout of its tensors in memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from runtime.core.batch import DURATION, HEAD_NAMES, Heads
from runtime.core.errors import ShapeError

Shape = tuple[int, ...]
# Ascending row indices, and the outputs of these rows by name.
RowOutputs = tuple[np.ndarray, Mapping[str, np.ndarray]]

# TensorRT requires the address of every tensor to be a multiple of this number of bytes.
ALIGNMENT = 256
MIN_PADDED_LENGTH = 4
_WHOLE: Mapping[str, tuple[str, ...]] = {
    "query_tokens": ("batch", "query_length"),
    "query_length": ("batch",),
    "segment_features": ("batch",),
    "segment_spans": ("batch",),
}
# The dynamic leading axes of each input, by part: a whole model, also with decoding and NMS, the two parts of a split
# one, a feature extractor.
AXES: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "whole": _WHOLE,
    "moments": {**_WHOLE, DURATION: ("batch",)},
    "video": {"segment_features": ("video",)},
    "query": {
        "query_tokens": ("batch", "query_length"),
        "query_length": ("batch",),
        "video_index": ("batch",),
        "encoded_features": ("video",),
        "segment_spans": ("video",),
    },
    "clips": {"clips": ("batch",)},
}


class MinOptMax(NamedTuple):
    """The smallest and largest size of an axis that an engine accepts, and the size that it is tuned for (opt)."""

    min: int
    opt: int
    max: int

    @classmethod
    def covering(cls, ranges: Iterable[Sequence[int]]) -> MinOptMax:
        """Return the range that covers the ranges of several profiles.

        The opt is that of the last profile, because the first profile of an engine may be for single queries.

        Args:
            ranges: (min, opt, max) of one axis for each profile, at least one.
        """
        minima, optima, maxima = zip(*ranges)
        return cls(min(minima), optima[-1], max(maxima))


@dataclasses.dataclass(frozen=True)
class OptimizationProfile:
    """One optimization profile of an engine.

    Attributes:
        ranges: range of each axis that the engine has: `batch`, `query_length` and `video`.
        static_shapes: for each input, the sizes after its dynamic axes.
        fixed: axes that are always padded to their maximum (the videos stored on the device).
    """

    index: int
    ranges: Mapping[str, MinOptMax]
    static_shapes: Mapping[str, Shape]
    fixed: frozenset[str] = frozenset()

    def padded(self, sizes: Mapping[str, int]) -> dict[str, int] | None:
        """Return the sizes that a request is padded to.

        Args:
            sizes: axis to size of the request, for every axis of `ranges`.

        Returns:
            Axis to padded size; None if the request is too large for this profile.
        """
        results = {}
        for axis, (min_size, _, max_size) in self.ranges.items():
            if sizes[axis] > max_size:
                return None
            size = max(sizes[axis], min_size)
            if axis in self.fixed:
                results[axis] = max_size
            else:
                results[axis] = padded_length(size, max_size) if axis == "query_length" else min(bucket(size), max_size)
        return results

    def shapes(self, axes: Mapping[str, tuple[str, ...]], sizes: Mapping[str, int]) -> dict[str, Shape]:
        """Return the shape of every input at given sizes.

        Args:
            axes: input name to the names of its dynamic axes, which are its first axes; see `AXES`.
        """
        return {name: (*(sizes[axis] for axis in dynamic), *self.static_shapes[name]) for name, dynamic in axes.items()}

    def max_sizes(self) -> dict[str, int]:
        return {axis: size.max for axis, size in self.ranges.items()}


def profile_from_shapes(
    index: int,
    axes: Mapping[str, tuple[str, ...]],
    shapes: Mapping[str, Sequence[Shape]],
    fixed: frozenset[str] = frozenset(),
) -> OptimizationProfile:
    """Return an engine's profile from the min, opt and max shape of each input.

    Args:
        shapes: input name to its min, opt and max shape.
    """
    ranges: dict[str, MinOptMax] = {}
    for name, dynamic in axes.items():
        ranges.update((axis, MinOptMax(*sizes)) for axis, *sizes in zip(dynamic, *shapes[name]))
    static_shapes = {name: tuple(shapes[name][2][len(dynamic) :]) for name, dynamic in axes.items()}
    return OptimizationProfile(index, ranges, static_shapes, fixed)


def bucket(size: int) -> int:
    """Return the next size of 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, ..., so that at most a third is padding.

    Masks make padding exact. Few sizes mean few CUDA graphs.
    """
    power = 1 << (size - 1).bit_length()
    between = 3 * power // 4
    return between if power >= 4 and between >= size else power


def padded_length(length: int, max_length: int) -> int:
    """Return the tokens that a query is padded to: 4, 6, 8, 12, 16, 24, ..., at most `max_length`."""
    return min(max(bucket(length), MIN_PADDED_LENGTH), max_length)


def choose_profile(
    profiles: Sequence[OptimizationProfile], sizes: Mapping[str, int]
) -> tuple[OptimizationProfile, dict[str, int]]:
    """Return the profile with the least padding for a request; of equal ones, the smaller profile.

    Args:
        sizes: axis to size of the request.

    Returns:
        The profile, and axis to padded size.

    Raises:
        ShapeError: the request is too large for every profile.
    """
    padded_sizes = [(profile, profile.padded(sizes)) for profile in profiles]
    best = min(
        ((profile, padded) for profile, padded in padded_sizes if padded is not None),
        key=lambda pair: (_volume(pair[1]), _volume(pair[0].max_sizes()), pair[0].index),
        default=None,
    )
    if best is None:
        supported = " or ".join(
            ", ".join(f"{axis} {low} to {high}" for axis, (low, _, high) in profile.ranges.items())
            for profile in profiles
        )
        raise ShapeError(
            f"Expected {supported}, got {', '.join(f'{axis} {size}' for axis, size in sizes.items())}. Run smaller "
            "batches, or build the engine for larger ones (--batch)."
        )
    return best


def row_slices(num_rows: int, max_rows: int) -> Iterator[np.ndarray]:
    """Yield the row indices of consecutive parts of a batch, (rows,) int64, each of at most `max_rows` rows."""
    for start in range(0, num_rows, max_rows):
        yield np.arange(start, min(start + max_rows, num_rows))


def as_slice(rows: np.ndarray) -> slice | np.ndarray:
    """Return ascending row indices, (rows,) with at least one, as a slice if they are consecutive.

    Indexing by a slice does not copy.
    """
    first, last = int(rows[0]), int(rows[-1])
    return slice(first, last + 1) if last - first + 1 == len(rows) else rows


def row_slices_by_video(
    video_index: np.ndarray, max_rows: int, max_videos: int, num_videos: int
) -> Iterator[np.ndarray]:
    """Yield row indices of parts of a batch, each within the limits of rows and of different videos.

    Args:
        video_index: (B,) int, the index of the video of each row.
        num_videos: number of videos, including those that no row refers to.
    """
    if num_videos <= max_videos:
        yield from row_slices(len(video_index), max_rows)
        return
    distinct, inverse = np.unique(video_index, return_inverse=True)
    for start in range(0, len(distinct), max_videos):
        (rows,) = np.nonzero((inverse >= start) & (inverse < start + max_videos))
        for part in row_slices(len(rows), max_rows):
            yield rows[part]


def gather_rows(
    num_rows: int, outputs: Sequence[RowOutputs], empty_outputs: Callable[[], Mapping[str, np.ndarray]]
) -> Heads:
    """Return the heads of a batch that ran in parts.

    Args:
        outputs: row indices and outputs (name to array) of each part.
    """
    if len(outputs) == 1:
        gathered = outputs[0][1]
    elif num_rows:
        gathered = {name: np.empty((num_rows, *values.shape[1:]), np.float32) for name, values in outputs[0][1].items()}
        for rows, part in outputs:
            for name in HEAD_NAMES:
                gathered[name][rows] = part[name]
    else:
        gathered = empty_outputs()
    return Heads(*[np.asarray(gathered[name], np.float32) for name in HEAD_NAMES])


def referenced_videos(video_index: np.ndarray, num_videos: int, max_videos: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the videos that rows refer to.

    All videos are returned if they fit, because `np.unique` takes longer than a small network.

    Args:
        video_index: (B,) int, the index of the video of each row.
        num_videos: number of videos, including those that no row refers to.

    Returns:
        (V,) int indices of videos, and (B,) int, for each row the index of its video among them.
    """
    if len(video_index) == 1:
        return video_index, np.zeros(1, np.int32)
    if num_videos <= max_videos:
        return np.arange(num_videos), video_index
    return np.unique(video_index, return_inverse=True)


@dataclasses.dataclass(frozen=True)
class TensorSlice:
    """The position of a tensor in a buffer, `offset` in bytes."""

    offset: int
    shape: Shape
    dtype: np.dtype

    @property
    def size(self) -> int:
        """Return the size in bytes."""
        return int(np.prod(self.shape)) * self.dtype.itemsize

    def view(self, buffer: np.ndarray) -> np.ndarray:
        """Return the tensor as a view of a buffer, without copying.

        Args:
            buffer: 1-D uint8 array, as large as the layout of `pack_tensors`.
        """
        return buffer[self.offset : self.offset + self.size].view(self.dtype).reshape(self.shape)


def pack_tensors(shapes: Mapping[str, Shape], dtypes: Mapping[str, np.dtype]) -> tuple[dict[str, TensorSlice], int]:
    """Return a layout of tensors in one buffer, so that one copy moves them all.

    Returns:
        Tensor name to its slice of the buffer, and the size of the buffer in bytes.
    """
    slices, offset = {}, 0
    for name, shape in shapes.items():
        slices[name] = TensorSlice(offset, shape, dtypes[name])
        offset = -(-(offset + slices[name].size) // ALIGNMENT) * ALIGNMENT
    return slices, offset


def _volume(sizes: Mapping[str, int]) -> int:
    return int(np.prod(list(sizes.values())))
