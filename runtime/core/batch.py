"""Define the inputs and outputs of a backend, and collate queries and videos into batches."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np

from runtime.core.errors import ShapeError
from runtime.core.pooling import Segments

# Tensors between the two parts of a split model; see `calib.graph.split_model`.
ENCODED_FEATURES, VIDEO_INDEX = "encoded_features", "video_index"
# More input and outputs of a graph with decoding and NMS; see `calib.graph.moments`.
DURATION, MOMENTS, MOMENT_COUNT = "duration", "moments", "moment_count"


@dataclasses.dataclass(frozen=True)
class Batch:
    """B queries, each with the segments of its video. Field names are the input names of every exported graph.

    Attributes:
        query_tokens: (B, L) int32 word ids, 0 after each length.
        query_length: (B,) int32 numbers of tokens, at least 1.
        segment_features: (B, T, D) float32.
        segment_spans: (B, T, 2) float32, fractions of the video.
    """

    query_tokens: np.ndarray
    query_length: np.ndarray
    segment_features: np.ndarray
    segment_spans: np.ndarray

    def __len__(self) -> int:
        return len(self.query_length)


@dataclasses.dataclass(frozen=True)
class Heads:
    """Raw outputs for B queries at P locations, levels finest first, all float32.

    Attributes:
        matching_logits: (B, P), logits of the probability that the location is in the moment.
        boundary_distances: (B, P, 2), distances from the location to the start and to the end, in segments.
        iou_logits: (B, P), logits of the temporal IoU of the proposal with the moment.
    """

    matching_logits: np.ndarray
    boundary_distances: np.ndarray
    iou_logits: np.ndarray

    def __len__(self) -> int:
        return len(self.matching_logits)


HEAD_NAMES: tuple[str, ...] = tuple(Heads.__dataclass_fields__)
"""Output names of every exported graph, in the order of the fields of `Heads`."""
INPUT_NAMES: tuple[str, ...] = tuple(Batch.__dataclass_fields__)
"""Input names of a graph that was not split, in the order of the fields of `Batch`."""


def check_numbers(
    query_tokens: np.ndarray,
    query_length: np.ndarray,
    num_words: int,
    video_index: np.ndarray | None = None,
    num_videos: int = 0,
) -> None:
    """Check the numbers in the inputs of a network: most libraries accept some that are out of range, and answer.

    Args:
        query_tokens: (B, L) int32 word ids.
        query_length: (B,) int32 lengths in tokens.
        num_words: number of words of the vocabulary, whose ids start at 1; 0 if the model has none.
        video_index: (B,) int32 index of the video of each query, for a split model.
        num_videos: number of videos.

    Raises:
        ShapeError: a word id, a length or an index is out of range.
    """
    if not len(query_length):
        return
    # Lengths first: without tokens, all of them are out of range.
    ranges = [
        ("query_length", query_length, 1, query_tokens.shape[-1]),
        ("query_tokens", query_tokens, 0, num_words or np.iinfo(np.int32).max),
    ]
    if video_index is not None:
        ranges.append((VIDEO_INDEX, video_index, 0, num_videos - 1))
    for name, array, low, high in ranges:
        if array.min() < low or array.max() > high:
            raise ShapeError(
                f"Expected {name} of {low} to {high}, got {array.min()} to {array.max()}. Correct the batch."
            )


def collate(queries: Sequence[np.ndarray], videos: Sequence[Segments]) -> Batch:
    """Return a batch of B queries and the segments of their videos.

    Args:
        queries: B arrays (L_i,) of int32 word ids.
        videos: segments of the video of each query, B objects of equal shape.
    """
    return Batch(*pad_queries(queries), *stack_segments(videos))


def stack_segments(videos: Sequence[Segments]) -> tuple[np.ndarray, np.ndarray]:
    """Return features (B, T, D) and spans (B, T, 2) of the segments of B videos of equal shape, both float32."""
    features = np.empty((len(videos), *videos[0].features.shape), np.float32)
    spans = np.empty((len(videos), *videos[0].spans.shape), np.float32)
    for index, segments in enumerate(videos):
        features[index] = segments.features
        spans[index] = segments.spans
    return features, spans


def pad_queries(queries: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Return queries as one array, padded to the longest of them.

    Args:
        queries: B arrays (L_i,) of int32 word ids.

    Returns:
        (B, L) int32 word ids, 0 after each length, and (B,) int32 lengths in tokens.
    """
    lengths = np.array([len(tokens) for tokens in queries], np.int32)
    tokens = np.zeros((len(queries), lengths.max(initial=1)), np.int32)
    for row, ids in zip(tokens, queries):
        row[: len(ids)] = ids
    return tokens, lengths


def batches_by_length(queries: Sequence[np.ndarray], batch_size: int) -> Iterator[np.ndarray]:
    """Yield the indices of batches of queries of similar length, so that batches have little padding.

    Args:
        queries: word ids of each query, (L_i,) int32.

    Yields:
        (batch,) int64 indices in `queries`.
    """
    order = np.argsort([len(tokens) for tokens in queries], kind="stable")
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]


def batches(
    queries: Sequence[np.ndarray], videos: Sequence[Segments], batch_size: int
) -> Iterator[tuple[np.ndarray, Batch]]:
    """Yield pairs of a query and a video in batches of queries of similar length.

    Args:
        queries: N arrays (L_i,) of int32 word ids.
        videos: segments of the video of each query, N objects of equal shape.

    Yields:
        (B,) int64 indices of the pairs of a batch in `queries`, and the batch.
    """
    for indices in batches_by_length(queries, batch_size):
        yield indices, collate([queries[i] for i in indices], [videos[i] for i in indices])
