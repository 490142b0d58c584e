"""Rank the videos of a split for each query by the score of their best moment."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from runtime.core.decoding import score_proposals
from runtime.core.errors import GroundingError, ModelFileError
from runtime.datasets.dataset import DataSet
from runtime.grounding.evaluation import CHUNK_SIZE, Chunk, run_chunk
from runtime.grounding.grounder import BATCH_SIZE, Grounder

RANKS = (1, 10)


@dataclasses.dataclass(frozen=True)
class Ranking:
    """The rank of the correct video of each of N queries among K videos.

    Attributes:
        ranks: (N,) float64 in [1, K], 1 for the best; equal scores share the mean of their ranks.
        videos: number of videos K.
    """

    ranks: np.ndarray
    videos: int

    @property
    def values(self) -> dict[str, float]:
        """Return R@1 and R@10 as fractions, and the median rank."""
        recalls = {f"R@{rank}": float((self.ranks <= rank).mean()) for rank in RANKS}
        return {**recalls, "median rank": float(np.median(self.ranks))}

    @property
    def chance(self) -> dict[str, float]:
        """Return the expected `values` of random scores."""
        return {**{f"R@{r}": min(1.0, r / self.videos) for r in RANKS}, "median rank": (self.videos + 1) / 2}


def rank(scores: np.ndarray) -> Ranking:
    """Return the ranking of the correct video among K videos for each of N queries.

    Args:
        scores: (N, K) float scores, the correct video in the first column; -inf is the lowest.
    """
    correct = scores[:, :1]
    above, equal = (scores > correct).sum(axis=1), (scores == correct).sum(axis=1)
    return Ranking(above + (equal + 1) / 2, scores.shape[1])


def draw_videos(correct: np.ndarray, num_videos: int, count: int, seed: int) -> np.ndarray:
    """Draw `count` other videos for each sentence without repetition; GroundingError if there are not enough videos.

    Args:
        correct: (N,) int, index of the video of each sentence.

    Returns:
        (N, 1 + count) int indices of videos, the correct one first.
    """
    if count > num_videos - 1:
        raise GroundingError(
            f"Expected at least {count} other videos for each sentence, got {max(num_videos - 1, 0)}. Lower --videos "
            "of runtime.rank or --mismatched of train.fit_presence, or give more data.",
            code="too_few_videos",
        )
    rng = np.random.default_rng(seed)
    others = np.stack([rng.choice(num_videos - 1, count, replace=False) for _ in correct])
    return np.concatenate((correct[:, None], others + (others >= correct[:, None])), axis=1)


def best_scores(
    grounder: Grounder,
    data_set: DataSet,
    sentences: Sequence[str],
    videos: Sequence[str],
    video_index: np.ndarray,
    *,
    batch_size: int = BATCH_SIZE,
    on_progress: Callable[[int], Any] = lambda pairs: None,
) -> np.ndarray:
    """Return the score of the best moment of each of N sentences in K videos; see `evaluate` for the errors.

    Every video is read once, encoded once by a split model, and not split into windows.

    Args:
        sentences: N sentences.
        video_index: (N, K) int, indices in `videos`.
        on_progress: called with the number of pairs scored since the last call.

    Returns:
        (N, K) float32 in [0, 1]; -inf if no location is likely.
    """
    encoded = {sentence: grounder.encode_query(sentence, check_content=False) for sentence in dict.fromkeys(sentences)}
    tokens = [encoded[sentence] for sentence in sentences]
    flat_index, num_videos = video_index.ravel(), video_index.shape[1]
    scores = np.full(flat_index.size, -np.inf, np.float32)
    for rows in _rows_by_video(flat_index):
        indices = flat_index[rows].tolist()
        loaded = {index: data_set.video(videos[index]) for index in set(indices)}
        segments = {index: grounder.segments(video) for index, video in loaded.items()}
        chunk = Chunk(
            rows,
            [tokens[row // num_videos] for row in rows],
            [segments[index] for index in indices],
            [videos[index] for index in indices],
            [loaded[index].duration for index in indices],
        )
        for batch_rows, heads in run_chunk(grounder, chunk, batch_size):
            try:
                proposals = score_proposals(heads, grounder.manifest.decoding)
            except ModelFileError as error:
                pairs = [(segments[flat_index[row]], tokens[row // num_videos]) for row in batch_rows]
                raise grounder.cause_of(error, pairs) from error
            scores[batch_rows] = proposals.scores.max(axis=1)
            on_progress(len(batch_rows))
    return scores.reshape(video_index.shape)


def _rows_by_video(video_index: np.ndarray) -> Iterator[np.ndarray]:
    """Yield row indices in chunks that contain all rows of their videos; only a single video may exceed the limit."""
    order = np.argsort(video_index, kind="stable")
    ends = [*(np.flatnonzero(np.diff(video_index[order])) + 1).tolist(), len(order)]
    start = 0
    for end, next_end in zip(ends, [*ends[1:], len(order) + CHUNK_SIZE]):
        if next_end - start > CHUNK_SIZE:
            yield order[start:end]
            start = end
