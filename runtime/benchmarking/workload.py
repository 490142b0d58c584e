"""Select or synthesize the queries of a benchmark, and prepare them for timed calls."""

from __future__ import annotations

import dataclasses
import logging
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Union, cast

import numpy as np

from runtime.artifacts.encoded_video import EncodedVideo
from runtime.artifacts.manifest import Manifest
from runtime.backends.base import PairBackend
from runtime.benchmarking.timing import Call
from runtime.core.batch import collate, pad_queries
from runtime.core.errors import QueryError, excerpt
from runtime.core.tokenizer import MAX_NAMED, tokenize
from runtime.core.video import Video
from runtime.datasets.dataset import Annotation, DataSet
from runtime.grounding.grounder import Grounder
from runtime.grounding.scheduling import distinct

log = logging.getLogger("drn")

# Number of queries, and of synthetic videos, that the calls of a case use in rotation.
QUERIES, VIDEOS = 64, 8
MAX_VIDEOS = 64

Pair = tuple[Union[Video, EncodedVideo], str]


@dataclasses.dataclass(frozen=True)
class Workload:
    """The queries of a benchmark.

    Attributes:
        synthetic: whether the videos and queries are random instead of from a data set.
    """

    pairs: Sequence[tuple[Video, str]]
    description: str
    synthetic: bool

    def to_dict(self) -> dict[str, Any]:
        videos = {id(video) for video, _ in self.pairs}
        return {
            "told": self.description,
            "made_up": self.synthetic,
            "queries": len(self.pairs),
            "videos": len(videos),
        }


def synthetic_workload(manifests: Sequence[Manifest], batch: int = 1) -> Workload:
    """Return random videos of 30 s with features as sparse as those of C3D, and queries of words that all models know.

    Args:
        batch: minimum number of queries.

    Raises:
        QueryError: the models have no word in common.
    """
    features = manifests[0].features
    words = [word for word in manifests[0].vocabulary.words if word.isalnum() and tokenize(word) == [word]]
    words = [word for word in words if all(word in manifest.vocabulary.words for manifest in manifests)]
    if not words:
        raise QueryError(
            "The models have no word in common. Compare models of one vocabulary, or pass --data.", code="models_differ"
        )
    rng = np.random.default_rng(0)
    videos = []
    for index in range(min(max(VIDEOS, batch), MAX_VIDEOS)):
        clips = np.maximum(rng.standard_normal((110, features.dim), np.float32) - 0.84, 0).astype(np.float16)
        videos.append(Video(clips, features.clock.num_frames(len(clips)), 30.0, f"video {index}"))
    max_length = min(manifest.max_query_length for manifest in manifests)
    pairs = []
    for index in range(max(QUERIES, batch)):
        # Most published sentences have 3 to 10 words.
        length = min(3 + index % 8, max_length)
        pairs.append((videos[index % len(videos)], " ".join(rng.choice(words, length))))
    description = (
        f"Synthetic inputs: {len(pairs)} sentences of 3 to 10 words of the vocabulary, {len(videos)} videos of 110 "
        f"clips of width {features.dim}."
    )
    return Workload(pairs, description, synthetic=True)


def dataset_workload(directory: Path, video: str | None, queries: Sequence[str]) -> Workload:
    """Return videos and queries of a data set; GroundingError if the data set or the video cannot be read.

    Args:
        video: name of a video; None selects queries of the test split, or else of another one.
        queries: sentences about the video; empty selects its annotations.
    """
    data_set = DataSet(directory)
    if queries:
        assert video is not None
        features = data_set.video(video)
        pairs = [(features, query) for query in queries]
        return Workload(pairs, f"{len(pairs)} given sentences about {video} of {directory}.", synthetic=False)
    splits = [name for name in ("test", "val", "train") if name in data_set.splits] or ["test"]
    annotations: list[Annotation] = []
    for split in splits if video is not None else splits[:1]:
        annotations += data_set.annotations(split, invalid="drop", quiet=True)
    if video is not None:
        # Raises the error for an unknown name.
        data_set.video(video)
        annotations = [annotation for annotation in annotations if annotation.video == video]
        if not annotations:
            raise QueryError(f"{directory} has no sentence about {video}. Pass --query too.", code="missing_option")
    annotations = annotations[:: max(1, len(annotations) // QUERIES)][:QUERIES]
    videos = {name: data_set.video(name) for name in dict.fromkeys(annotation.video for annotation in annotations)}
    pairs = [(videos[annotation.video], annotation.sentence) for annotation in annotations]
    simulated = " (features are simulated)" if data_set.simulated else ""
    description = f"{len(pairs)} sentences about {len(videos)} videos of {directory}{simulated}."
    return Workload(pairs, description, synthetic=False)


def pairs_with_known_words(
    pairs: Sequence[tuple[Video, str]], grounders: Sequence[Grounder]
) -> list[tuple[Video, str]]:
    """Return the pairs whose queries have a content word that all models know, without the words that some do not know.

    Timed calls would otherwise warn of these words again and again. One warning names the words, another the pairs that
    are left out.

    Raises:
        QueryError: no query has one, or a query is invalid for another reason.
    """
    usable: list[tuple[Video, str]] = []
    removed: Counter[str] = Counter()
    problem: QueryError | None = None
    for video, query in pairs:
        unknown: Counter[str] = Counter()
        try:
            for grounder in grounders:
                grounder.encode_query(query, unknown)
            known = [token for token in tokenize(query) if token not in unknown]
            if not known:
                raise QueryError(
                    f"No word of {excerpt(query)} is known to all models. Compare models of one vocabulary.",
                    code="unknown_content_words",
                )
        except QueryError as error:
            if error.code != "unknown_content_words":
                raise
            problem = error
        else:
            usable.append((video, " ".join(known) if unknown else query))
            removed.update(unknown.keys())
    if problem is not None and not usable:
        raise problem
    if problem is not None:
        skipped = len(pairs) - len(usable)
        log.warning("%d of %d sentences are skipped. The last error: %s", skipped, len(pairs), problem)
    if removed:
        named = ", ".join(excerpt(word) for word, _ in removed.most_common(MAX_NAMED))
        log.warning("%d words that a model does not know are removed from the timed queries: %s.", len(removed), named)
    return usable


def ground_first(grounder: Grounder, pairs: Sequence[tuple[Video, str]] = ()) -> None:
    """Ground the first pair, or else a synthetic one, to finish the one-time costs of a model."""
    grounder.ground(*(pairs or synthetic_workload([grounder.manifest]).pairs)[0])


@dataclasses.dataclass(frozen=True, eq=False)
class BenchmarkedModel:
    """An open model and its queries.

    Attributes:
        cached: the same pairs with encoded videos for a split model, otherwise with videos whose segments are cached.
    """

    label: str
    grounder: Grounder
    pairs: Sequence[tuple[Video, str]]
    cached: Sequence[Pair]

    @classmethod
    def from_grounder(cls, label: str, grounder: Grounder, pairs: Sequence[tuple[Video, str]]) -> BenchmarkedModel:
        """Return a model with its queries after encoding or pooling each video once."""
        encoded: dict[int, Video | EncodedVideo] = {}
        for video, query in pairs:
            grounder.encode_query(query)
            if id(video) not in encoded:
                segments = grounder.segments(video)
                encoded[id(video)] = (
                    grounder.encode_segments(segments, video.duration, video.name) if grounder.is_pair else video
                )
        return cls(label, grounder, pairs, [(encoded[id(video)], query) for video, query in pairs])

    def unseen_pairs(self, first: int, count: int) -> list[tuple[Video, str]]:
        """Return `count` pairs in rotation, with copies of the videos that are not pooled or encoded yet."""
        selected = self._rotate(self.pairs, first, count)
        videos = {id(video): dataclasses.replace(video) for video, _ in selected}
        return [(videos[id(video)], query) for video, query in selected]

    def cached_pairs(self, first: int, count: int) -> list[Pair]:
        """Return `count` pairs in rotation, with videos that are pooled or encoded."""
        return self._rotate(self.cached, first, count)

    def ground_call(self, queries: int) -> Call:
        """Return a call that grounds so many queries, from text to moments, on videos that are pooled or encoded."""
        return Call(
            lambda pairs: self.grounder.ground_batch(pairs, batch_size=queries),
            lambda number: self.cached_pairs(number, queries),
        )

    def network_call(
        self, queries: Sequence[np.ndarray], videos: Sequence[Video | EncodedVideo]
    ) -> Callable[[Any], Any]:
        """Return a function that runs only the network, copies included, on a prepared batch.

        Args:
            queries: word ids of each query, (L,) int32.
        """
        backend = self.grounder.backend
        if not self.grounder.is_pair:
            batch = collate(queries, [self.grounder.segments(cast(Video, video)) for video in videos])
            return lambda _: backend.run(batch)
        videos_once, index = distinct(cast("Sequence[EncodedVideo]", videos))
        tokens, lengths = pad_queries(queries)
        pair = cast(PairBackend, backend)
        return lambda _: pair.ask(tokens, lengths, videos_once, index)

    @property
    def reports_gpu_time(self) -> bool:
        """Return whether the backend can measure the time on the GPU."""
        return hasattr(self.grounder.backend, "time_gpu")

    @staticmethod
    def _rotate(pairs: Sequence[Any], first: int, count: int) -> list[Any]:
        return [pairs[(first * count + index) % len(pairs)] for index in range(count)]


def device_of(grounder: Grounder) -> str:
    """Return `cpu` or `cuda`, or `unknown` if the backend has no `device`."""
    backend: Any = grounder.backend
    parameters = getattr(getattr(backend, "model", None), "parameters", None)
    # A torch module has no device, but its parameters do.
    device = next(parameters()).device if parameters else getattr(backend, "device", "unknown")
    return str(device).partition(":")[0]
