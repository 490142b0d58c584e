"""The shapes in which batches go through an engine, and where their tensors lie: values, decided without a GPU."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from runtime.core.errors import ShapeError

Shape = tuple[int, ...]

# TensorRT requires every tensor to begin at a multiple of this.
ALIGNMENT = 256
MIN_PADDED_LENGTH = 4
# Which of an input's leading sizes are free, and what they count, in a whole model, in the two parts of a pair, and in
# an extractor of clip features.
AXES: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "whole": {
        "query_tokens": ("batch", "query_length"),
        "query_length": ("batch",),
        "segment_features": ("batch",),
        "segment_spans": ("batch",),
    },
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
    """The sizes of one axis between which an engine works, and the size that it is tuned for."""

    min: int
    opt: int
    max: int

    @classmethod
    def covering(cls, ranges: Iterable[Sequence[int]]) -> MinOptMax:
        """Return the range over several profiles. The last profile has the optimum: an earlier one may be for one
        query alone."""
        minima, optima, maxima = zip(*ranges)
        return cls(min(minima), optima[-1], max(maxima))


@dataclasses.dataclass(frozen=True)
class OptimizationProfile:
    """One optimization profile of an engine.

    Attributes:
        index: its number in the engine.
        ranges: of `batch`, `query_length` and `video`, those that the engine has.
        tails: for each input the sizes that are fixed.
        fixed: axes that are always as large as they can be (the videos kept on the device).
    """

    index: int
    ranges: Mapping[str, MinOptMax]
    tails: Mapping[str, Shape]
    fixed: frozenset[str] = frozenset()

    def padded(self, sizes: Mapping[str, int]) -> dict[str, int] | None:
        """Return the sizes that a request is padded to; None if it is too large for this profile."""
        results = {}
        for axis, (smallest, _, largest) in self.ranges.items():
            if sizes[axis] > largest:
                return None
            size = max(sizes[axis], smallest)
            if axis in self.fixed:
                results[axis] = largest
            else:
                results[axis] = padded_length(size, largest) if axis == "query_length" else min(bucket(size), largest)
        return results

    def shapes(self, axes: Mapping[str, tuple[str, ...]], sizes: Mapping[str, int]) -> dict[str, Shape]:
        """Return the shape of every input at these sizes."""
        return {name: (*(sizes[axis] for axis in free), *self.tails[name]) for name, free in axes.items()}

    def largest(self) -> dict[str, int]:
        return {axis: size.max for axis, size in self.ranges.items()}


def profile_from_shapes(
    index: int,
    axes: Mapping[str, tuple[str, ...]],
    shapes: Mapping[str, Sequence[Shape]],
    fixed: frozenset[str] = frozenset(),
) -> OptimizationProfile:
    """Return an engine's profile from the smallest, best and largest shape of each input."""
    ranges: dict[str, MinOptMax] = {}
    for name, free in axes.items():
        smallest, best, largest = shapes[name]
        for location, axis in enumerate(free):
            ranges[axis] = MinOptMax(smallest[location], best[location], largest[location])
    return OptimizationProfile(
        index, ranges, {name: tuple(shapes[name][2][len(free) :]) for name, free in axes.items()}, fixed
    )


def bucket(size: int) -> int:
    """Return the next of 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, ...: few sizes, and at most a third is padding.

    The masks make padding exact, and each size costs a CUDA graph of its own.
    """
    power = 1 << (size - 1).bit_length()
    between = 3 * power // 4
    return between if power >= 4 and between >= size else power


def padded_length(length: int, longest: int) -> int:
    """Return the tokens that queries of a length are padded to: 4, 6, 8, 12, 16, 24, ..., at most the longest."""
    return min(max(bucket(length), MIN_PADDED_LENGTH), longest)


def choose(
    domains: Sequence[OptimizationProfile], sizes: Mapping[str, int]
) -> tuple[OptimizationProfile, dict[str, int]]:
    """Return the profile for a request and the sizes it is padded to: the least padding, then the smaller profile.

    Raises:
        ShapeError: it is too large for every profile.
    """
    fitting = [(profile, profile.padded(sizes)) for profile in domains]
    best = min(
        ((profile, padded) for profile, padded in fitting if padded is not None),
        key=lambda pair: (_volume(pair[1]), _volume(pair[0].largest()), pair[0].index),
        default=None,
    )
    if best is None:
        raise ShapeError(
            "The engine takes "
            + " or ".join(
                ", ".join(f"{axis} {low} to {high}" for axis, (low, _, high) in profile.ranges.items())
                for profile in domains
            )
            + f", and {', '.join(f'{axis} {size}' for axis, size in sizes.items())} was asked for."
        )
    return best


def row_slices(rows: int, largest: int) -> Iterator[slice]:
    """Yield the parts of a batch that go through one after another, each of `largest` rows at most."""
    for start in range(0, rows, largest):
        yield slice(start, min(start + largest, rows))


def row_slices_by_video(video_index: np.ndarray, largest: int, most_videos: int, videos: int) -> Iterator[np.ndarray]:
    """Yield the rows, at most `largest` and of at most `most_videos` different videos, that go through together.

    Args:
        video_index: (B,) which video each row asks.
        largest, most_videos: how many go through together.
        videos: how many there are, all asked or not.
    """
    if videos <= most_videos:
        for part in row_slices(len(video_index), largest):
            yield np.arange(part.start, part.stop)
        return
    distinct, which = np.unique(video_index, return_inverse=True)
    for start in range(0, len(distinct), most_videos):
        (rows,) = np.nonzero((which >= start) & (which < start + most_videos))
        for part in row_slices(len(rows), largest):
            yield rows[part]


def referenced_videos(video_index: np.ndarray, videos: int, most_videos: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the videos that a piece needs, (V,), and which of those each of its rows asks, (B,).

    Where there is room for all, all are named: looking for those that are asked takes longer than a small network.
    """
    if len(video_index) == 1:
        return video_index, np.zeros(1, np.int32)
    if videos <= most_videos:
        return np.arange(videos), video_index
    return np.unique(video_index, return_inverse=True)


@dataclasses.dataclass(frozen=True)
class TensorSlice:
    """The position of a tensor in a buffer."""

    offset: int
    shape: Shape
    dtype: np.dtype

    @property
    def size(self) -> int:
        """In bytes."""
        return int(np.prod(self.shape)) * self.dtype.itemsize

    def view(self, buffer: np.ndarray) -> np.ndarray:
        """Return the tensor in `buffer`, (size,) uint8, without copying."""
        return buffer[self.offset : self.offset + self.size].view(self.dtype).reshape(self.shape)


def pack_tensors(shapes: Mapping[str, Shape], dtypes: Mapping[str, np.dtype]) -> tuple[dict[str, TensorSlice], int]:
    """Return where tensors lie when put side by side, so that one copy moves them all, and the bytes they take."""
    regions, offset = {}, 0
    for name, shape in shapes.items():
        regions[name] = TensorSlice(offset, shape, dtypes[name])
        offset = -(-(offset + regions[name].size) // ALIGNMENT) * ALIGNMENT
    return regions, offset


def _volume(sizes: Mapping[str, int]) -> int:
    return int(np.prod(list(sizes.values())))
