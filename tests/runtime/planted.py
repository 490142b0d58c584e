"""Define a model with known moments, its variants, and videos in which its words happen."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from runtime import Video, Windows
from runtime.artifacts.manifest import Features, Manifest
from runtime.core.batch import Batch, Heads
from runtime.core.decoding import Decoding
from runtime.core.pooling import ClipTiming
from runtime.core.tokenizer import Vocabulary

# The words of the planted model with their ids, each of which is also the channel of its word.
CHANNELS = {"cat": 1, "dog": 2, "door": 3, "runs": 4, "opens": 5, "person": 6}
CLOCK = ClipTiming()
RATE = 24
CLIP = CLOCK.stride / RATE
# Windows of Charades-STA, but shorter, so that tests are fast.
WINDOWS = Windows(longest=50.0, length=43.0, overlap=14.5)


class PlantedBackend:
    """Return moments of known position: those where the channel of a query's last word is above 0.5.

    The second half of the video comes second, with a score that falls with the number of words. Padding of a query
    that reached the network would change the moments.

    Args:
        before: called with each batch; may raise.
        after: called with the heads of each batch; may change them.
    """

    def __init__(
        self,
        decoding: Decoding | None = None,
        dim: int = 8,
        max_query_length: int = 6,
        *,
        device: str = "cpu",
        before: Callable[[Batch], Any] = lambda batch: None,
        after: Callable[[Heads], Any] = lambda heads: None,
    ) -> None:
        self.manifest = Manifest(
            Vocabulary(CHANNELS), decoding or Decoding(), Features("planted", dim), max_query_length=max_query_length
        )
        self.device, self.before, self.after = device, before, after
        self.batches: list[Batch] = []

    def run(self, batch: Batch) -> Heads:
        self.batches.append(batch)
        self.before(batch)
        decoding = self.manifest.decoding
        matching = np.full((len(batch), decoding.num_locations), -9.0, np.float32)
        distances = np.zeros((len(batch), decoding.num_locations, 2), np.float32)
        iou = np.full(matching.shape, 4.0, np.float32)
        for row, length in enumerate(batch.query_length):
            channel = batch.query_tokens[row, :length][-1]
            (on,) = np.nonzero(batch.segment_features[row, :, channel] > 0.5)
            if len(on):
                middle = (on[0] + on[-1]) // 2
                matching[row, middle] = 4
                distances[row, middle] = middle + 0.5 - on[0], on[-1] + 1 - (middle + 0.5)
            # The last location of the coarsest level: the center of the last four segments.
            matching[row, -1] = 1 - 0.25 * length
            distances[row, -1] = decoding.num_segments / 2 - 2, 2
        heads = Heads(matching, distances, iou)
        self.after(heads)
        return heads


class Exponential:
    """The planted model with boundaries that grow exponentially with the features, as those of DRN do."""

    def __init__(self, model: Any, damaged: bool = False) -> None:
        self.model, self.manifest, self.damaged = model, model.manifest, damaged

    def run(self, batch: Batch) -> Heads:
        heads = self.model.run(batch)
        with np.errstate(over="ignore", invalid="ignore"):
            factor = np.exp(batch.segment_features.max(axis=(1, 2)))
            heads.boundary_distances[...] *= np.inf if self.damaged else factor[:, None, None]
        return heads


class PlantedPair:
    """The planted model in two parts; an encoding is the transposed features."""

    def __init__(self, model: Any, digest: str = "1" * 64) -> None:
        self.model = model
        self.manifest = dataclasses.replace(model.manifest, part="query", video_part={"planted.video.onnx": digest})
        self.encoded = 0
        self.requests: list[tuple[int, int]] = []

    def encode(self, segment_features: np.ndarray) -> np.ndarray:
        self.encoded += len(segment_features)
        return np.ascontiguousarray(segment_features.transpose(0, 2, 1))

    def ask(self, query_tokens: Any, query_length: Any, videos: Any, video_index: Any) -> Heads:
        assert query_tokens.dtype == query_length.dtype == video_index.dtype == np.int32
        self.requests.append((len(query_length), len(videos)))
        features = np.stack([videos[index].features.T for index in video_index])
        spans = np.stack([videos[index].spans for index in video_index])
        return self.model.run(Batch(query_tokens, query_length, features, spans))

    def run(self, batch: Batch) -> Heads:
        return self.model.run(batch)


def random_heads(rows: int, rng: np.random.Generator, num_locations: int = 56) -> Heads:
    """Return heads of likely and unlikely locations."""
    size = (rows, num_locations)
    values = rng.normal(-1, 2, size), rng.uniform(0, 8, (*size, 2)), rng.normal(0, 2, size)
    return Heads(*(array.astype(np.float32) for array in values))


class Noisy:
    """A model with random proposals."""

    def __init__(self, planted: Any) -> None:
        self.manifest = dataclasses.replace(planted.manifest, windows=WINDOWS)
        self.rng = np.random.default_rng(0)

    def run(self, batch: Batch) -> Heads:
        return random_heads(len(batch), self.rng, self.manifest.decoding.num_locations)


class Finder:
    """The planted model without its second half: the score of a moment rises with its visible part."""

    def __init__(self, planted: Any, windows: Windows | None = WINDOWS) -> None:
        self.planted = planted
        self.manifest = dataclasses.replace(planted.manifest, windows=windows)

    def run(self, batch: Batch) -> Heads:
        heads: Heads = self.planted.run(batch)
        heads.matching_logits[heads.matching_logits < 3] = -9
        is_likely = heads.matching_logits > 0
        seen = heads.boundary_distances.sum(-1)
        heads.matching_logits[is_likely] = 3 + 0.05 * seen[is_likely]
        return heads


def video(duration: float, dim: int = 8, **moments: tuple[int, int]) -> Video:
    """Return a video of 32 segments of one clip each, in which words happen in given segments, last included.

    A clip every frame and windows of one frame would give segments that share a clip; 256 clips of which eight go
    into a segment leave the borders free.
    """
    features = np.zeros((256, dim), np.float32)
    for word, (first, last) in moments.items():
        features[8 * first + 1 : 8 * last + 8, CHANNELS[word]] = 1
    if not moments:
        # Constant features are rejected.
        features[0, 0] = 1e-5
    return Video(features, 8 * 256 + 1, duration, "-".join(moments) or "nothing")


def long_video(seconds: float, dim: int = 8, **moments: tuple[float, float]) -> Video:
    """Return a video whose words happen at given seconds; a clip contains the words at its first frame."""
    num_frames = round(seconds * RATE)
    features = np.zeros((CLOCK.num_clips(num_frames), dim), np.float32)
    for word, (start, end) in moments.items():
        features[int(np.ceil(start / CLIP)) : int(np.ceil(end / CLIP)), CHANNELS[word]] = 1
    if not moments:
        # Constant features are rejected, and smaller differences count as rounding.
        features[0, 0] = 1e-5
    return Video(features, num_frames, num_frames / RATE, "long")


# One word happens in segments 8 to 15 of 32, that is from a quarter to a half of the video.
QUARTER = video(60.0, dog=(8, 15))
PAIRS = [
    (QUARTER, "dog"),
    (video(10.0, cat=(0, 3), door=(20, 31)), "person opens the door"),
    (QUARTER, "person runs opens dog"),
    (video(100.0, cat=(0, 3)), "cat"),
    (video(10.0, cat=(0, 3), door=(20, 31)), "cat"),
    (video(64.0, person=(31, 31)), "dog door person"),
]
