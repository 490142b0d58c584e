"""Score the videos of a split for each query, pairs that match and pairs that do not."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from runtime.core.decoding import score_proposals
from runtime.core.errors import GroundingError, ModelFileError
from runtime.datasets.dataset import DataSet
from runtime.grounding.evaluation import CHUNK, Chunk, run_chunk
from runtime.grounding.grounder import BATCH_SIZE, Grounder

RANKS = (1, 10)


@dataclasses.dataclass(frozen=True)
class Ranking:
    """The ranks of N queries' own videos among K videos.

    Attributes:
        ranks: (N,) from 1, the best, to K; equal scores share the mean of their places.
        videos: K.
    """

    ranks: np.ndarray
    videos: int

    @property
    def values(self) -> dict[str, float]:
        """Shares of sentences whose own video is among the first, and the median rank."""
        shares = {f"R@{rank}": float((self.ranks <= rank).mean()) for rank in RANKS}
        return {**shares, "median rank": float(np.median(self.ranks))}

    @property
    def chance(self) -> dict[str, float]:
        """The same of scores that are drawn at random."""
        return {**{f"R@{r}": min(1.0, r / self.videos) for r in RANKS}, "median rank": (self.videos + 1) / 2}


def rank(scores: np.ndarray) -> Ranking:
    """Return the ranking of (N, K) scores, those of a sentence's own video first; -inf counts as the lowest."""
    own = scores[:, :1]
    above, equal = (scores > own).sum(axis=1), (scores == own).sum(axis=1)
    return Ranking(above + (equal + 1) / 2, scores.shape[1])


def draw_videos(own: np.ndarray, videos: int, count: int, seed: int) -> np.ndarray:
    """Return for each sentence its own video and `count` others, (N, 1 + count), drawn by seed without repetition.

    Args:
        own: (N,) numbers of videos.
        videos: how many there are.
        count: others for each.
        seed: of the draw.
    """
    if count > videos - 1:
        raise GroundingError(
            f"Each sentence is to be asked of {count} other videos, and there are {max(videos - 1, 0)}; lower --videos "
            "of runtime.rank or --mismatched of train.fit_presence, or give more data.",
            code="too_few_videos",
        )
    rng = np.random.default_rng(seed)
    others = np.stack([rng.choice(videos - 1, count, replace=False) for _ in own])
    return np.concatenate((own[:, None], others + (others >= own[:, None])), axis=1)


def best_scores(
    grounder: Grounder,
    data_set: DataSet,
    sentences: Sequence[str],
    videos: Sequence[str],
    asked: np.ndarray,
    *,
    batch_size: int = BATCH_SIZE,
    on_progress: Callable[[int], Any] = lambda pairs: None,
) -> np.ndarray:
    """Return the score of the best moment of each sentence in each video that it asks.

    Every video is read once, encoded once by a model that was split, and taken whole.

    Args:
        grounder: the model.
        data_set: where features and durations come from.
        sentences: N.
        videos: their names.
        asked: (N, K) numbers of videos.
        batch_size: pairs that go through the network together. Changes nothing but speed.
        on_progress: called with the number of pairs scored since the last call.

    Returns:
        (N, K) float32 in [0, 1]; -inf where no location is likely.
    """
    read = {sentence: grounder.encode_query(sentence, check_content=False) for sentence in dict.fromkeys(sentences)}
    tokens = [read[sentence] for sentence in sentences]
    expected = asked.ravel()
    scores = np.full(asked.size, -np.inf, np.float32)
    for rows in _scores_of_videos(expected):
        known = {number: data_set.video(videos[number]) for number in set(expected[rows].tolist())}
        pooled = {number: grounder.segments(video) for number, video in known.items()}
        numbers = expected[rows].tolist()
        chunk = Chunk(
            rows,
            [tokens[row // asked.shape[1]] for row in rows],
            [pooled[number] for number in numbers],
            [videos[number] for number in numbers],
            [known[number].duration for number in numbers],
        )
        for location, heads in run_chunk(grounder, chunk, batch_size):
            try:
                result = score_proposals(heads, grounder.manifest.decoding)
            except ModelFileError as error:
                asked_here = [(pooled[expected[row]], tokens[row // asked.shape[1]]) for row in location]
                raise grounder.cause_of(error, asked_here) from error
            scores[location] = result.scores.max(axis=1)
            on_progress(len(location))
    return scores.reshape(asked.shape)


def _scores_of_videos(expected: np.ndarray) -> Iterator[np.ndarray]:
    """Yield positions of a bounded number of pairs, unless one video is asked more often; each video in one part."""
    order = np.argsort(expected, kind="stable")
    ends = [*(np.flatnonzero(np.diff(expected[order])) + 1).tolist(), len(order)]
    start = 0
    for end, after in zip(ends, [*ends[1:], len(order) + CHUNK]):
        if after - start > CHUNK:
            yield order[start:end]
            start = end
