"""The shapes that an engine is built for, as values that tests read without a GPU."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from runtime.errors import ShapeError
from runtime.manifest import Manifest
from runtime.presets import query_length_of

# Smallest, best and largest.
Range = tuple[int, int, int]
Shape = tuple[int, ...]

DEFAULT_BATCH: Range = (1, 8, 32)
VIDEOS = 64
"""Encoded videos that an engine keeps on the GPU: 16 MB in FP16 at full size."""
MOST_ENCODED = 8
"""Videos that are encoded together."""


@dataclasses.dataclass(frozen=True)
class Profile:
    """One optimization profile: the shapes between which an engine works, and those it is tuned for.

    Attributes:
        name: how reports call it.
        batch: queries that go through together.
        query_length: tokens of a query.
        shapes: for each input the smallest, best and largest shape.
    """

    name: str
    batch: Range
    query_length: Range
    shapes: Mapping[str, tuple[Shape, Shape, Shape]]


def usual_query_length(manifest: Manifest) -> Range:
    """Return the query lengths an engine is made for where none are asked for: its data set's, as far as they go."""
    shortest, usual, longest = (min(length, manifest.max_query_length) for length in query_length_of(manifest.training))
    return shortest, usual, longest


def profiles(batch: Range, query_length: Range | None, manifest: Manifest) -> list[Profile]:
    """Return the optimization profiles of a domain: one for a single query, one for 2 to the largest batch.

    A kernel chosen for 32 queries is seldom the best for one, so a domain that holds both gets a profile for each.

    Raises:
        ShapeError: a range does not rise, starts below 1, or asks for longer queries than the model takes.
    """
    query_length = query_length or usual_query_length(manifest)
    check_ranges(batch, query_length)
    if query_length[2] > manifest.max_query_length:
        raise ShapeError(
            f"--query-length asks for up to {query_length[2]} tokens and this model was exported for at most "
            f"{manifest.max_query_length}; lower it, or export again with --max-query-length {query_length[2]}."
        )
    smallest, best, largest = batch
    if smallest > 1 or largest == 1:
        return [_profile("batch", batch, query_length, manifest)]
    several = (2, max(best, 2), largest)
    return [
        _profile("one query", (1, 1, 1), query_length, manifest),
        _profile("several queries", several, query_length, manifest),
    ]


def part_profiles(
    part: str, whole: Sequence[Profile], manifest: Manifest, videos: int, encoded_dim: int
) -> list[Profile]:
    """Return the optimization profiles of one part of a split model, from those of the whole.

    Args:
        part: video or query.
        whole: of `profiles`.
        manifest: of the part.
        videos: encodings that the query part keeps at hand; it always sees so many.
        encoded_dim: channels of an encoding.
    """
    segments, width = manifest.decoding.num_segments, manifest.features.dim
    if part == "video":
        most = min(videos, MOST_ENCODED)
        features = tuple((size, segments, width) for size in (1, min(2, most), most))
        return [Profile("videos", (1, min(2, most), most), (1, 1, 1), {"segment_features": _trio(features)})]
    kept = {
        "encoded_features": _trio([(size, encoded_dim, segments) for size in (1, videos, videos)]),
        "segment_spans": _trio([(size, segments, 2) for size in (1, videos, videos)]),
    }
    return [
        dataclasses.replace(
            profile,
            shapes={
                "query_tokens": profile.shapes["query_tokens"],
                "query_length": profile.shapes["query_length"],
                "video_index": profile.shapes["query_length"],
                **kept,
            },
        )
        for profile in whole
    ]


def exactly(profile: Profile, tokens: int) -> Profile:
    """Return a profile of a whole model or a query part for queries that are all padded to so many tokens."""
    smallest, best, largest = profile.batch
    return dataclasses.replace(
        profile,
        query_length=(tokens, tokens, tokens),
        shapes={**profile.shapes, "query_tokens": ((smallest, tokens), (best, tokens), (largest, tokens))},
    )


def one_profile(several: Sequence[Profile]) -> list[Profile]:
    """Return one profile in place of several: as wide as all of them, tuned for the last."""
    if len(several) == 1:
        return list(several)
    first, last = several[0], several[-1]
    shapes = {name: (first.shapes[name][0], best, largest) for name, (_, best, largest) in last.shapes.items()}
    batch = (first.batch[0], *last.batch[1:])
    length = (first.query_length[0], *last.query_length[1:])
    return [Profile("all queries", batch, length, shapes)]


def check_unrolled(steps: Sequence[int], query_length: Range) -> None:
    """Raise ShapeError unless each number of tokens is one that an engine for such queries may meet."""
    wrong = [count for count in steps if not 1 <= count <= query_length[2]]
    if wrong:
        raise ShapeError(
            f"--unroll takes numbers of tokens from 1 to {query_length[2]}, the longest query of this engine, and "
            f"{', '.join(map(str, wrong))} was given."
        )


def _trio(shapes: Sequence[Shape]) -> tuple[Shape, Shape, Shape]:
    smallest, best, largest = shapes
    return smallest, best, largest


def check_ranges(batch: Range, query_length: Range | None) -> None:
    """Raise ShapeError for a range that does not rise or starts below 1."""
    _check("--batch", batch)
    if query_length is not None:
        _check("--query-length", query_length)


def _check(flag: str, domain: Range) -> None:
    smallest, best, largest = domain
    if not 1 <= smallest <= best <= largest:
        raise ShapeError(
            f"{flag} takes MIN OPT MAX with 1 <= MIN <= OPT <= MAX, and {smallest} {best} {largest} was given."
        )


def _profile(name: str, batch: Range, query_length: Range, manifest: Manifest) -> Profile:
    segments, width = manifest.decoding.num_segments, manifest.features.dim

    def shapes(tail: Shape, words: bool = False) -> tuple[Shape, Shape, Shape]:
        smallest, best, largest = (
            (size, length, *tail) if words else (size, *tail) for size, length in zip(batch, query_length)
        )
        return smallest, best, largest

    return Profile(
        name,
        batch,
        query_length,
        {
            "query_tokens": shapes((), words=True),
            "query_length": shapes(()),
            "segment_features": shapes((segments, width)),
            "segment_spans": shapes((segments, 2)),
        },
    )
