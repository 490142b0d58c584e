"""Check the arguments of a Grounder."""

from __future__ import annotations

import numbers
from collections.abc import Sequence
from typing import Union

import numpy as np

from runtime.artifacts.encoded_video import EncodedVideo, EncodedWindows
from runtime.core.errors import FeatureError, GroundingError, QueryError, ShapeError, check_argument, excerpt
from runtime.core.pooling import Segments
from runtime.core.video import Video

VideoInput = Union[Video, EncodedVideo, EncodedWindows]


def check_request(pairs: Sequence[tuple[VideoInput, str]], top_k: int, batch_size: int) -> None:
    """Raise GroundingError, FeatureError or QueryError unless these are valid arguments of `Grounder.ground_batch`."""
    for name, value, minimum in (("top_k", top_k, 0), ("batch_size", batch_size, 1)):
        if not isinstance(value, (int, np.integer)) or isinstance(value, bool) or value < minimum:
            raise GroundingError(
                f"Expected an integer of at least {minimum} for {name}, got {excerpt(value)}. Correct the argument.",
                code="invalid_argument",
            )
    if not isinstance(pairs, (list, tuple, Sequence)) or not all(
        isinstance(pair, (tuple, list, Sequence)) and len(pair) == 2 for pair in pairs
    ):
        raise GroundingError(
            f"Expected a list of (video, query) pairs, got {describe_value(pairs)}. Give one pair for each query.",
            code="invalid_argument",
        )
    for video, query in pairs:
        check_video(video)
        check_query(query)


def check_video(video: object) -> None:
    """Raise FeatureError unless `video` is a Video or an encoding of one."""
    if not isinstance(video, (Video, EncodedVideo, EncodedWindows)):
        raise FeatureError(
            f"Expected a Video or its encoding, got {describe_value(video)}. Read a feature file with Video.load.",
            code="invalid_argument",
        )


def check_query(query: object) -> None:
    """Raise QueryError unless `query` is a str."""
    if not isinstance(query, str):
        raise QueryError(f"Expected a sentence as text, got {describe_value(query)}. Give one str for each query.")


def check_sizes(batches: Sequence[int], lengths: Sequence[int], max_length: int) -> None:
    """Raise ShapeError unless the sizes to warm a model for are in range.

    Args:
        batches: numbers of queries.
        lengths, max_length: numbers of tokens.
    """
    for name, sizes in (("batches", batches), ("lengths", lengths)):
        check_argument(name, sizes, Sequence, "a list of integers", ShapeError)
        for size in sizes:
            check_argument(name, size, numbers.Integral, "integers", ShapeError)
    if min((*batches, *lengths), default=1) < 1 or max(lengths, default=1) > max_length:
        raise ShapeError(
            f"Expected batches of at least 1 query and lengths of 1 to {max_length} tokens, got "
            f"{excerpt(list(batches))} and {excerpt(list(lengths))}. Correct the sizes."
        )


def features_out_of_scale(inputs: Sequence[Segments | EncodedVideo], largest: float, kind: str) -> FeatureError:
    """Return the error for features that make the output not finite, although it is finite for zeros.

    Args:
        largest: largest absolute value of the inputs.
        kind: name of the features, such as C3D.
    """
    name = "encodings" if isinstance(inputs[0], EncodedVideo) else "features"
    return FeatureError(
        f"The model's output is not finite for {name} up to {largest:.3g}, but is finite for zeros, so the features "
        f"have another scale than those of the training. Extract {kind} features as for the training.",
        code="features_out_of_scale",
    )


def describe_value(value: object) -> str:
    """Return the type of an argument and, if it is a scalar or text, its value, for an error message."""
    text = excerpt(value) if isinstance(value, (str, bytes, int, float, type(None))) else ""
    return f"{text} ({type(value).__name__})" if text else f"a value of type {type(value).__name__}"
