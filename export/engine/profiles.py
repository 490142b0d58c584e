"""Choose the optimization profiles of an engine, and the query lengths of further engines with an unrolled LSTM."""

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
# MIN OPT MAX of an option; a plain tuple, because the help of a command shows its default.
SizeRange = tuple[int, int, int]

DEFAULT_BATCH = (1, 8, 32)
DEFAULT_CACHED_VIDEOS = 64
"""Number of encoded videos that an engine keeps in GPU memory: 16 MB in FP16 at full size."""
MAX_ENCODE_BATCH = 8
"""Maximum number of videos per batch of the video part."""


@dataclasses.dataclass(frozen=True)
class Profile:
    """One optimization profile.

    Attributes:
        name: name of the profile in reports.
        batch: min, opt and max number of queries.
        query_length: min, opt and max number of tokens.
        shapes: min, opt and max shape of each input.
    """

    name: str
    batch: MinOptMax
    query_length: MinOptMax
    shapes: Mapping[str, tuple[Shape, Shape, Shape]]


def default_query_lengths(manifest: Manifest) -> MinOptMax:
    """Return the query lengths of the training data set, limited to those that the model accepts."""
    return MinOptMax(*(min(length, manifest.max_query_length) for length in query_length_of(manifest.training)))


def profiles(batch: SizeRange, query_length: SizeRange | None, manifest: Manifest) -> list[Profile]:
    """Return the optimization profiles: one for a single query, and one for 2 to the maximum batch size.

    The fastest kernel for 32 queries is seldom the fastest for one, so the two have separate profiles.

    Args:
        batch: min, opt and max number of queries.
        query_length: min, opt and max number of tokens; None for `default_query_lengths`.

    Raises:
        ShapeError: a range is not 1 <= min <= opt <= max, or exceeds the query length of the model.
    """
    query_length = MinOptMax(*(query_length or default_query_lengths(manifest)))
    check_ranges(batch, query_length)
    if query_length.max > manifest.max_query_length:
        raise ShapeError(
            f"Expected --query-length of at most {manifest.max_query_length} tokens, for which the model was exported, "
            f"got {query_length.max}. Lower the maximum, or export again with --max-query-length {query_length.max}.",
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
    part: str, full: Sequence[Profile], manifest: Manifest, videos: int, encoded_dim: int
) -> list[Profile]:
    """Return the optimization profiles of one part of a split model.

    Args:
        part: `video` or `query`.
        full: profiles of the full model, as `profiles` returns them.
        videos: number of encoded videos that the query part keeps in GPU memory.
        encoded_dim: number of channels D of an encoded video.
    """
    segments, width = manifest.decoding.num_segments, manifest.features.dim
    if part == "video":
        largest = min(videos, MAX_ENCODE_BATCH)
        batch = MinOptMax(1, min(2, largest), largest)
        features = _min_opt_max([(size, segments, width) for size in batch])
        return [Profile("videos", batch, MinOptMax(1, 1, 1), {"segment_features": features})]
    video_shapes = {
        "encoded_features": _min_opt_max([(size, encoded_dim, segments) for size in (1, videos, videos)]),
        "segment_spans": _min_opt_max([(size, segments, 2) for size in (1, videos, videos)]),
    }
    return [
        dataclasses.replace(
            profile,
            shapes={
                "query_tokens": profile.shapes["query_tokens"],
                "query_length": profile.shapes["query_length"],
                "video_index": profile.shapes["query_length"],
                **video_shapes,
            },
        )
        for profile in full
    ]


def with_fixed_query_length(profile: Profile, tokens: int) -> Profile:
    """Return a profile for queries that are all padded to `tokens` tokens."""
    smallest, best, largest = profile.batch
    return dataclasses.replace(
        profile,
        query_length=MinOptMax(tokens, tokens, tokens),
        shapes={**profile.shapes, "query_tokens": ((smallest, tokens), (best, tokens), (largest, tokens))},
    )


def one_profile(several: Sequence[Profile]) -> list[Profile]:
    """Return one profile that covers several: smallest min, largest max, and the opt of the last profile."""
    if len(several) == 1:
        return list(several)
    first, last = several[0], several[-1]
    shapes = {name: (first.shapes[name][0], best, largest) for name, (_, best, largest) in last.shapes.items()}
    batch = last.batch._replace(min=first.batch.min)
    length = last.query_length._replace(min=first.query_length.min)
    return [Profile("all queries", batch, length, shapes)]


@dataclasses.dataclass(frozen=True)
class Unrolling:
    """The query lengths for which engines with an unrolled LSTM are built.

    Attributes:
        steps: maximum number of tokens of each engine, ascending; empty for none.
        reason: source of the lengths, as a clause.
        automatic: whether the lengths are a default and not from `--unroll`.
    """

    steps: tuple[int, ...]
    reason: str
    automatic: bool = False


def check_unroll(requested: Sequence[int]) -> tuple[int, ...]:
    """Return the distinct lengths of `--unroll`, ascending; raise ShapeError if 0 is combined with lengths."""
    lengths = tuple(sorted(set(requested)))
    if 0 in lengths and len(lengths) > 1:
        raise ShapeError(
            f"Expected --unroll 0 alone or lengths of at least 1, got {' '.join(map(str, lengths))}. Remove 0, which "
            "builds no engine with an unrolled LSTM, or the lengths.",
            code="invalid_option",
        )
    return lengths


def unrolling(
    requested: Sequence[int], target: str, longest: int, manifest: Manifest | None, data: DataSet | None, split: str
) -> Unrolling:
    """Return the query lengths for which further engines with an unrolled LSTM are built.

    The default for TensorRT is the 90 % and 99 % quantiles of the query lengths in `data`, or else in the data set that
    the model was trained on. TensorRT-RTX captures CUDA graphs itself, so its default is none.

    Args:
        requested: lengths that `check_unroll` returned; (0,) for none, empty for the default.
        target: tensorrt, tensorrt-rtx or onnxruntime.
        longest: maximum number of tokens of the engine.
        manifest: manifest of the model; None for a published checkpoint that is not converted yet.
        data: data set of `--data`.
        split: split to count if the data set has no training split.

    Raises:
        ShapeError: a requested length is below 1 or above `longest`.
    """
    if tuple(requested) == (0,):
        return Unrolling((), "--unroll 0")
    if requested:
        wrong = [count for count in requested if not 1 <= count <= longest]
        if wrong:
            raise ShapeError(
                f"Expected --unroll lengths of 1 to {longest} tokens, the maximum of this engine, got "
                f"{', '.join(map(str, wrong))}. Correct --unroll, or give 0 for none.",
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
        reason = f"the query lengths of {title} are unknown; add --data, or lengths with --unroll"
        return Unrolling((), reason, automatic=True)
    lengths, source = quantiles
    steps = tuple(sorted({length for length in lengths if 1 <= length < longest}))
    reason = f"90 % ({lengths[0]}) and 99 % ({lengths[1]}) quantiles of {source}"
    others = sorted(set(lengths) - set(steps))
    if others:
        reason += f"; no engine for {' and '.join(map(str, others))}, because the maximum of the engine is {longest}"
    return Unrolling(steps, reason, automatic=True)


def _data_quantiles(data: DataSet, split: str, manifest: Manifest) -> tuple[tuple[int, int], str] | None:
    """Return the 90 % and 99 % quantiles of the query lengths in tokens, and their source; None without known words."""
    split = _counted_split(data, split)
    lengths = []
    for annotation in data.annotations(split, invalid="keep", quiet=True):
        # A query that the model cannot encode is reported when it is answered.
        with contextlib.suppress(QueryError):
            lengths.append(len(manifest.vocabulary.encode(annotation.sentence, Counter())))
    if not lengths:
        return None
    return length_quantiles(lengths), f"{len(lengths)} queries of {data.annotations_path(split)}"


def _counted_split(data: DataSet, split: str) -> str:
    """Return the split whose queries are counted: the training split, or `split` if there is none."""
    return "train" if "train" in data.splits else split


def _min_opt_max(shapes: Sequence[Shape]) -> tuple[Shape, Shape, Shape]:
    smallest, best, largest = shapes
    return smallest, best, largest


def check_ranges(batch: SizeRange, query_length: SizeRange | None) -> None:
    """Raise ShapeError for a range that is not 1 <= min <= opt <= max."""
    _check("--batch", batch)
    if query_length is not None:
        _check("--query-length", query_length)


def _check(flag: str, sizes: SizeRange) -> None:
    smallest, best, largest = sizes
    if not 1 <= smallest <= best <= largest:
        raise ShapeError(
            f"Expected {flag} MIN OPT MAX with 1 <= MIN <= OPT <= MAX, got {smallest} {best} {largest}. "
            "Correct the option.",
            code="invalid_option",
        )


def _profile(name: str, batch: MinOptMax, query_length: MinOptMax, manifest: Manifest) -> Profile:
    segments, width = manifest.decoding.num_segments, manifest.features.dim

    shapes = {
        "query_tokens": _min_opt_max(list(zip(batch, query_length))),
        "query_length": _min_opt_max([(size,) for size in batch]),
        "segment_features": _min_opt_max([(size, segments, width) for size in batch]),
        "segment_spans": _min_opt_max([(size, segments, 2) for size in batch]),
    }
    return Profile(name, batch, query_length, shapes)
