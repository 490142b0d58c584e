"""The shapes that an engine is built for, as values that tests read without a GPU."""

from __future__ import annotations

import contextlib
import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence

from runtime.artifacts.manifest import Manifest
from runtime.backends.batch_shapes import MinOptMax
from runtime.core.errors import QueryError, ShapeError
from runtime.datasets.dataset import DataSet
from runtime.datasets.presets import length_quantiles, length_quantiles_of, query_length_of

Shape = tuple[int, ...]
# As commands take MIN OPT MAX.
SizeRange = tuple[int, int, int]

# A plain tuple, as the help of the commands shows it.
DEFAULT_BATCH = (1, 8, 32)
DEFAULT_CACHED_VIDEOS = 64
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
    batch: MinOptMax
    query_length: MinOptMax
    shapes: Mapping[str, tuple[Shape, Shape, Shape]]


def default_query_lengths(manifest: Manifest) -> MinOptMax:
    """Return the query lengths an engine is made for where none are asked for: its data set's, as far as they go."""
    return MinOptMax(*(min(length, manifest.max_query_length) for length in query_length_of(manifest.training)))


def profiles(batch: SizeRange, query_length: SizeRange | None, manifest: Manifest) -> list[Profile]:
    """Return the optimization profiles of a domain: one for a single query, one for 2 to the largest batch.

    A kernel chosen for 32 queries is seldom the best for one, so a domain that holds both gets a profile for each.

    Raises:
        ShapeError: a range does not rise, starts below 1, or asks for longer queries than the model takes.
    """
    query_length = MinOptMax(*(query_length or default_query_lengths(manifest)))
    check_ranges(batch, query_length)
    if query_length.max > manifest.max_query_length:
        raise ShapeError(
            f"--query-length asks for up to {query_length.max} tokens and this model was exported for at most "
            f"{manifest.max_query_length}; lower it, or export again with --max-query-length {query_length.max}.",
            code="query_length_out_of_range",
        )
    smallest, best, largest = batch
    if smallest > 1 or largest == 1:
        return [_profile("batch", MinOptMax(*batch), query_length, manifest)]
    several = MinOptMax(2, max(best, 2), largest)
    return [
        _profile("one query", MinOptMax(1, 1, 1), query_length, manifest),
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
        batch = MinOptMax(1, min(2, most), most)
        return [Profile("videos", batch, MinOptMax(1, 1, 1), {"segment_features": _trio(features)})]
    retained = {
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
                **retained,
            },
        )
        for profile in whole
    ]


def with_fixed_query_length(profile: Profile, tokens: int) -> Profile:
    """Return a profile of a whole model or a query part for queries that are all padded to so many tokens."""
    smallest, best, largest = profile.batch
    return dataclasses.replace(
        profile,
        query_length=MinOptMax(tokens, tokens, tokens),
        shapes={**profile.shapes, "query_tokens": ((smallest, tokens), (best, tokens), (largest, tokens))},
    )


def one_profile(several: Sequence[Profile]) -> list[Profile]:
    """Return one profile in place of several: as wide as all of them, tuned for the last."""
    if len(several) == 1:
        return list(several)
    first, last = several[0], several[-1]
    shapes = {name: (first.shapes[name][0], best, largest) for name, (_, best, largest) in last.shapes.items()}
    batch = last.batch._replace(min=first.batch.min)
    length = last.query_length._replace(min=first.query_length.min)
    return [Profile("all queries", batch, length, shapes)]


@dataclasses.dataclass(frozen=True)
class Unrolling:
    """The query lengths for which engines with a written-out LSTM are built.

    Attributes:
        steps: longest queries of these engines, in tokens, ascending; empty if none is built.
        reason: why these, as a clause.
        automatic: whether the data set determines them, and not `--unroll`.
    """

    steps: tuple[int, ...]
    reason: str
    automatic: bool = False


def check_unroll(requested: Sequence[int]) -> tuple[int, ...]:
    """Return the lengths that `--unroll` names, ascending and each once; ShapeError if 0 and lengths are combined."""
    lengths = tuple(sorted(set(requested)))
    if 0 in lengths and len(lengths) > 1:
        raise ShapeError(
            f"--unroll 0 builds no engine with a written-out LSTM, but {' '.join(map(str, lengths))} was given. Give 0 "
            "alone, or lengths alone.",
            code="invalid_option",
        )
    return lengths


def unrolling(
    requested: Sequence[int], target: str, longest: int, manifest: Manifest | None, data: DataSet | None, split: str
) -> Unrolling:
    """Return the query lengths for which plans with a written-out LSTM are built besides the engine.

    Without `--unroll`, engines of TensorRT get the 90 % and 99 % quantiles of the query lengths: of the data set that
    is given, else of the one that the model was trained on. TensorRT-RTX captures CUDA graphs by itself and gets none.

    Args:
        requested: of `check_unroll`; (0,) for none, empty for the default.
        target: tensorrt, tensorrt-rtx or onnxruntime.
        longest: tokens of the longest query of the engine.
        manifest: of the model; None of a published checkpoint that is not converted yet, which names no data set.
        data: the data set of `--data`.
        split: whose queries count if the data set has no training split.

    Raises:
        ShapeError: a requested length is below 1 or above `longest`.
    """
    if tuple(requested) == (0,):
        return Unrolling((), "--unroll 0")
    if requested:
        wrong = [count for count in requested if not 1 <= count <= longest]
        if wrong:
            raise ShapeError(
                f"--unroll takes numbers of tokens from 1 to {longest}, the longest query of this engine, and "
                f"{', '.join(map(str, wrong))} was given. Correct --unroll, or give 0 for none.",
                code="invalid_option",
            )
        return Unrolling(tuple(requested), "--unroll")
    if target != "tensorrt":
        return Unrolling((), f"the default for {target}", automatic=True)
    if data and manifest is None:
        path = data.annotations_path(_counted_split(data, split))
        reason = f"90 % and 99 % quantiles of the queries of {path}, known once the checkpoint is converted"
        return Unrolling((), reason, automatic=True)
    training = manifest.training if manifest else {}
    quantiles = (data and manifest and _data_quantiles(data, split, manifest)) or length_quantiles_of(training)
    if quantiles is None:
        title = training.get("data_set")
        reason = f"the query lengths of {title} are unknown; give --data, or lengths with --unroll"
        return Unrolling((), reason, automatic=True)
    lengths, source = quantiles
    steps = tuple(sorted({length for length in lengths if 1 <= length < longest}))
    # "90 % and 99 % quantiles" names both, also where they are equal or the engine is too short for one.
    reason = f"90 % ({lengths[0]}) and 99 % ({lengths[1]}) quantiles of {source}"
    others = sorted(set(lengths) - set(steps))
    if others:
        reason += f"; no plan for {' and '.join(map(str, others))}, as the longest query of the engine has {longest}"
    return Unrolling(steps, reason, automatic=True)


def _data_quantiles(data: DataSet, split: str, manifest: Manifest) -> tuple[tuple[int, int], str] | None:
    """Return the quantiles of the lengths of a data set's queries as the model reads them; None without a known word.

    Of the training split, or of `split` where there is none.
    """
    split = _counted_split(data, split)
    unheard: Counter[str] = Counter()
    lengths = []
    for annotation in data.annotations(split, invalid="keep", quiet=True):
        # A query that the model cannot read is reported where it is asked.
        with contextlib.suppress(QueryError):
            lengths.append(len(manifest.vocabulary.encode(annotation.sentence, unheard)))
    if not lengths:
        return None
    return length_quantiles(lengths), f"{len(lengths)} queries of {data.annotations_path(split)}"


def _counted_split(data: DataSet, split: str) -> str:
    """Return the split whose queries are counted: the training split, or `split` where there is none."""
    return "train" if "train" in data.splits else split


def _trio(shapes: Sequence[Shape]) -> tuple[Shape, Shape, Shape]:
    smallest, best, largest = shapes
    return smallest, best, largest


def check_ranges(batch: SizeRange, query_length: SizeRange | None) -> None:
    """Raise ShapeError for a range that does not rise or starts below 1."""
    _check("--batch", batch)
    if query_length is not None:
        _check("--query-length", query_length)


def _check(flag: str, sizes: SizeRange) -> None:
    smallest, best, largest = sizes
    if not 1 <= smallest <= best <= largest:
        raise ShapeError(
            f"{flag} takes MIN OPT MAX with 1 <= MIN <= OPT <= MAX, and {smallest} {best} {largest} was given.",
            code="invalid_option",
        )


def _profile(name: str, batch: MinOptMax, query_length: MinOptMax, manifest: Manifest) -> Profile:
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
