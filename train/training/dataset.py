"""Training batches: features pooled once into a memory-mapped file, sentences encoded once, epochs shuffled by seed."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import json
import logging
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from runtime.artifacts.manifest import Features
from runtime.core.batch import Batch, collate
from runtime.core.errors import AnnotationError, FeatureError, OutputError, QueryError
from runtime.core.io.array_files import load_array
from runtime.core.io.atomic_files import atomic_write
from runtime.core.sliding_windows import Windows
from runtime.core.tokenizer import Vocabulary
from runtime.core.video import Segments, check_features, check_varies, max_over_rows, segment_rows
from runtime.datasets.dataset import Annotation, DataSet

log = logging.getLogger("drn")


@dataclasses.dataclass(frozen=True)
class PooledFeatures:
    """The segments of many videos.

    Attributes:
        rows: video name to its row.
        features: (V, T, D) memory map, in the dtype of the feature files.
        spans: (V, T, 2) float64 fractions of the video.
        key: hash of all that they depend on.
    """

    rows: dict[str, int]
    features: np.ndarray
    spans: np.ndarray
    key: str

    def segments(self, video: str) -> Segments:
        row = self.rows[video]
        return Segments(self.features[row], self.spans[row])


def pool(
    data_set: DataSet, videos: Sequence[str], num_segments: int, features: Features, cache: Path
) -> PooledFeatures:
    """Return the segments of `videos`, from the cache where it still holds for their files.

    The cache is keyed by everything that its content depends on: the names, sizes and times of the feature files,
    samples of their content, places in an HDF5 file, frame counts, T, the clock and the pooling rule. It is written
    whole or not at all, and ends with its SHA-256, which is compared here.

    Args:
        data_set: where features and frame counts come from.
        videos: names, each once.
        num_segments: T.
        features: their width, clock and pooling rule.
        cache: directory of the cache.

    Raises:
        FeatureError: a file is missing or unusable, or of another width.
        OutputError: the cache cannot be written.
    """
    store = data_set.store
    stamps = [store.stamp(video) for video in videos]
    num_frames = [data_set.frames(video) for video in videos]
    recipe = {
        "files": stamps,
        "num_frames": num_frames,
        "num_segments": num_segments,
        "features": dataclasses.asdict(features),
    }
    key = hashlib.sha256(json.dumps(recipe).encode()).hexdigest()[:16]
    path = cache / f"pooled-{key}.npy"
    places = [segment_rows(count, num_segments, features.pooling, features.clock) for count in num_frames]
    if _is_complete(path, (len(videos), num_segments, features.dim)):
        # The file may have been written by another run, which gave the warning, or by a version that did not check.
        data_set.check_clips(videos, features.clock)
    else:
        try:
            _write(path, data_set, videos, places, num_frames, num_segments, features)
        except OutputError as error:
            raise OutputError(
                f"{error} The pooled features go to --cache, which is {cache}.", code=error.code
            ) from error
    mapped = load_array(path)
    spans = np.stack([spans for _, _, spans in places])
    return PooledFeatures({video: row for row, video in enumerate(videos)}, mapped, spans, key)


def _is_complete(path: Path, shape: tuple[int, ...]) -> bool:
    """Return whether a cache file is there and holds what its name says; a damaged one is written anew."""
    if not path.is_file():
        return False
    # On a damaged header NumPy raises what its parser does, without a common base.
    with contextlib.suppress(Exception):
        if load_array(path).shape == shape and _ends_with_digest(path):
            return True
    log.warning("%s is damaged; pooling again.", path)
    return False


def _ends_with_digest(path: Path) -> bool:
    """Return whether the last 32 bytes of a file, behind the array, are the SHA-256 of all before."""
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        left = path.stat().st_size - digest.digest_size
        while left > 0:
            block = stream.read(min(left, 1 << 20))
            if not block:
                return False
            digest.update(block)
            left -= len(block)
        return stream.read() == digest.digest()


def _write(
    path: Path,
    data_set: DataSet,
    videos: Sequence[str],
    places: Sequence[tuple],
    num_frames: Sequence[int],
    num_segments: int,
    features: Features,
) -> None:
    store, dim = data_set.store, features.dim
    dtype = store.load(videos[0]).dtype
    with atomic_write(path) as temporary, open(temporary, "wb") as stream:
        # Plain writes, since a memory map that outgrows the disk kills the process instead of raising.
        header = {
            "descr": np.lib.format.dtype_to_descr(dtype),
            "fortran_order": False,
            "shape": (len(videos), num_segments, dim),
        }
        head = io.BytesIO()
        np.lib.format.write_array_header_2_0(head, header)
        stream.write(head.getvalue())
        digest = hashlib.sha256(head.getvalue())
        progress = tqdm(
            zip(videos, places, num_frames, strict=True),
            "pooling features",
            len(videos),
            unit="video",
            leave=False,
            disable=None,
        )
        for video, (first, last, _), frames in progress:
            clips = store.load(video)
            check_features(clips, video)
            location = f"The features of {video} in {store.path(video)} are"
            if clips.shape[1] != dim:
                raise FeatureError(
                    f"{location} {clips.shape[1]} wide where the first video's are {dim} wide; extract them again.",
                    code="feature_width_mismatch",
                )
            if clips.dtype != dtype:
                raise FeatureError(
                    f"{location} {clips.dtype} where the first video's are {dtype}; store all features alike.",
                    code="feature_type_mismatch",
                )
            data_set.origin.check(video, len(clips), frames, features.clock)
            check_varies(clips, video)
            rows = np.ascontiguousarray(max_over_rows(clips, first, last)).tobytes()
            stream.write(rows)
            digest.update(rows)
        stream.write(digest.digest())


@dataclasses.dataclass(frozen=True)
class TrainingBatch:
    """Inputs of B matching pairs, then of mismatched ones; and the moments, (B, 2) float32 fractions of the video."""

    inputs: Batch
    truth: np.ndarray


class TrainingData:
    """The queries of a split, ready to be batched.

    Args:
        data_set: where moments come from.
        annotations: the queries.
        pooled: segments of every video among them.
        vocabulary: encodes the sentences.
        blind: whether features are replaced by zeros, to measure what can be learnt without looking.
    """

    def __init__(
        self,
        data_set: DataSet,
        annotations: Sequence[Annotation],
        pooled: PooledFeatures,
        vocabulary: Vocabulary,
        blind: bool = False,
    ) -> None:
        self.annotations = annotations
        self.queries = encode(annotations, vocabulary)
        self.truth = data_set.spans(annotations).astype(np.float32)
        self.pooled = pooled
        self.video_rows = np.array([pooled.rows[annotation.video] for annotation in annotations], np.int64)
        self.blind = blind

    def __len__(self) -> int:
        return len(self.annotations)

    def segments(self, video: str) -> Segments:
        """Return what the network sees of a video, validation included."""
        segments = self.pooled.segments(video)
        return Segments(np.zeros_like(segments.features), segments.spans) if self.blind else segments

    def features(self, rows: np.ndarray) -> np.ndarray:
        """Return the features of the videos at `rows` of the pooled ones, (n, T, D) float32."""
        chosen = self.pooled.features[rows]
        return np.zeros(chosen.shape, np.float32) if self.blind else chosen.astype(np.float32)

    def batch(self, indices: np.ndarray, mismatched: np.ndarray | None = None) -> TrainingBatch:
        """Return the queries at `indices`, in that order, and after them the pairs of `mismatched`; see there."""
        requested = np.stack((indices, indices)) if mismatched is None else append_mismatched(indices, mismatched)
        segments = [self.segments(self.annotations[index].video) for index in requested[1]]
        inputs = collate([self.queries[index] for index in requested[0]], segments)
        return TrainingBatch(inputs, self.truth[indices])

    def epoch(self, batch_size: int, seed: Sequence[int], rank: int = 0, processes: int = 1) -> list[np.ndarray]:
        """Return the indices of every batch of one epoch of one process.

        The order depends on `seed` alone. A step takes `batch_size` times `processes` queries, of which process `rank`
        gets its part; what is left over at the end is dropped, as published.
        """
        order = np.random.default_rng(list(seed)).permutation(len(self))
        step = batch_size * processes
        starts = range(rank * batch_size, len(self) - step + rank * batch_size + 1, step)
        return [order[start : start + batch_size] for start in starts]

    def mismatched(
        self, epoch: Sequence[np.ndarray], count: int, seed: Sequence[int], rank: int = 0, processes: int = 1
    ) -> list[np.ndarray]:
        """Return for every batch of an epoch `count` pairs of a sentence of the batch and a video that is not its own.

        Sentences take turns. A video is that of a query drawn from all of the data set, and the draw depends on `seed`
        alone: processes together ask the pairs that one process with all of their batches would.

        Returns:
            For each batch (2, count) indices: of the query, and of the query whose video it asks.
        """
        steps = len(epoch)
        drawn = np.random.default_rng([*seed, 1]).random((steps, processes, count))[:, rank]
        by_video = np.argsort(self.video_rows, kind="stable")
        rows = self.video_rows[by_video]
        pairs = []
        for batch, draw in zip(epoch, drawn, strict=True):
            queries = batch[np.arange(count) * len(batch) // count]
            first, end = (np.searchsorted(rows, self.video_rows[queries], side) for side in ("left", "right"))
            # Among all but the video's own queries, which are adjacent.
            location = (draw * (len(rows) - (end - first))).astype(np.int64)
            pairs.append(np.stack((queries, by_video[np.where(location < first, location, location + end - first)])))
        return pairs


def append_mismatched(indices: np.ndarray, mismatched: np.ndarray) -> np.ndarray:
    """Return (2, B + M) indices: of the queries, and of the queries whose videos they ask, B matching pairs first."""
    return np.concatenate((np.stack((indices, indices)), mismatched), axis=1)


def encode(annotations: Sequence[Annotation], vocabulary: Vocabulary) -> list[np.ndarray]:
    """Return the word ids of every sentence; AnnotationError, naming place and video, for one without a known word."""
    unheard: Counter[str] = Counter()
    queries = []
    for annotation in annotations:
        try:
            queries.append(vocabulary.encode(annotation.sentence, unheard))
        except QueryError as error:
            location = f"Sentence {annotation.line} of the annotations, of {annotation.video}"
            raise AnnotationError(f"{location}, cannot be used: {error}", code=error.code) from error
    vocabulary.tell(unheard)
    return queries


def split_by_video(
    annotations: Sequence[Annotation], fraction: float, seed: int
) -> tuple[list[Annotation], list[Annotation]]:
    """Return annotations to train on, and those of `fraction` of the videos to validate on; no video is in both."""
    videos = sorted({annotation.video for annotation in annotations})
    count = max(1, round(fraction * len(videos)))
    held_out = {videos[index] for index in np.random.default_rng([seed, 1]).permutation(len(videos))[:count]}
    retained = [annotation for annotation in annotations if annotation.video not in held_out]
    return retained, [annotation for annotation in annotations if annotation.video in held_out]


def windows_of(data_set: DataSet, annotations: Sequence[Annotation]) -> Windows:
    """Return how a model that learns from these annotations cuts videos that are longer than theirs."""
    durations = [data_set.durations[video] for video in sorted({annotation.video for annotation in annotations})]
    moments = [
        min(annotation.end, data_set.durations[annotation.video]) - annotation.start
        for annotation in annotations
        if annotation.end > annotation.start
    ]
    return Windows.of(durations, moments)
