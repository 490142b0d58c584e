"""Select or synthesize the queries of a benchmark, and prepare them for the calls that are timed."""

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
from runtime.core.batch import collate, pad_queries
from runtime.core.errors import QueryError
from runtime.core.tokenizer import tokenize
from runtime.core.video import Video
from runtime.datasets.dataset import Annotation, DataSet
from runtime.grounding.grounder import Grounder
from runtime.grounding.scheduling import distinct

log = logging.getLogger("drn")

# Synthetic queries and videos, over which the calls of a case rotate; queries of a data set as many.
QUERIES, VIDEOS = 64, 8
MAX_VIDEOS = 64

Pair = tuple[Union[Video, EncodedVideo], str]


@dataclasses.dataclass(frozen=True)
class Workload:
    """The queries of a benchmark.

    Attributes:
        pairs: videos and queries.
        description: what they are, in a sentence.
        synthetic: whether they are not of a data set.
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
    """Return videos of half a minute with features as sparse as C3D's, and queries of words that all models know.

    Raises:
        QueryError: the models have no word in common.
    """
    features = manifests[0].features
    words = [word for word in manifests[0].vocabulary.words if word.isalnum() and tokenize(word) == [word]]
    words = [word for word in words if all(word in manifest.vocabulary.words for manifest in manifests)]
    if not words:
        raise QueryError(
            "The models have no word in common; compare models of one vocabulary, or pass --data.", code="models_differ"
        )
    rng = np.random.default_rng(0)
    videos = []
    for index in range(min(max(VIDEOS, batch), MAX_VIDEOS)):
        clips = np.maximum(rng.standard_normal((110, features.dim), np.float32) - 0.84, 0).astype(np.float16)
        videos.append(Video(clips, features.clock.num_frames(len(clips)), 30.0, f"video {index}"))
    max_length = min(manifest.max_query_length for manifest in manifests)
    pairs = []
    for index in range(max(QUERIES, batch)):
        # 3 to 10 words, as the published sentences mostly have.
        length = min(3 + index % 8, max_length)
        pairs.append((videos[index % len(videos)], " ".join(rng.choice(words, length))))
    description = (
        f"Inputs are made up: {len(pairs)} sentences of 3 to 10 words of the model's own, {len(videos)} videos of 110 "
        f"clips of width {features.dim}."
    )
    return Workload(pairs, description, synthetic=True)


def dataset_workload(directory: Path, video: str | None, queries: Sequence[str]) -> Workload:
    """Return videos and queries of a data set: those named, those of the video named, or some of the whole set.

    Raises:
        GroundingError: the data set or the video cannot be read.
    """
    data_set = DataSet(directory)
    if queries:
        assert video is not None
        named = data_set.video(video)
        pairs = [(named, query) for query in queries]
        return Workload(pairs, f"{len(pairs)} sentences given, about {video} of {directory}.", synthetic=False)
    splits = [name for name in ("test", "val", "train") if name in data_set.splits] or ["test"]
    annotations: list[Annotation] = []
    for split in splits if video is not None else splits[:1]:
        annotations += data_set.annotations(split, invalid="drop", quiet=True)
    if video is not None:
        # Loaded first, so that an unknown name raises its own error.
        data_set.video(video)
        annotations = [annotation for annotation in annotations if annotation.video == video]
        if not annotations:
            raise QueryError(f"{directory} holds no sentence about {video}; pass --query too.", code="missing_option")
    annotations = annotations[:: max(1, len(annotations) // QUERIES)][:QUERIES]
    videos = {name: data_set.video(name) for name in dict.fromkeys(annotation.video for annotation in annotations)}
    pairs = [(videos[annotation.video], annotation.sentence) for annotation in annotations]
    simulated = " (features are simulated)" if data_set.simulated else ""
    description = f"{len(pairs)} sentences about {len(videos)} videos of {directory}{simulated}."
    return Workload(pairs, description, synthetic=False)


def pairs_with_known_words(
    pairs: Sequence[tuple[Video, str]], grounders: Sequence[Grounder]
) -> list[tuple[Video, str]]:
    """Return the pairs whose queries have content words that the models know; QueryError if there is none."""
    usable: list[tuple[Video, str]] = []
    problem: QueryError | None = None
    for video, query in pairs:
        try:
            for grounder in grounders:
                grounder.encode_query(query, Counter())
        except QueryError as error:
            if error.code != "unknown_content_words":
                raise
            problem = error
        else:
            usable.append((video, query))
    if problem is not None and not usable:
        raise problem
    if problem is not None:
        log.warning("%d of %d sentences are not asked; the last: %s", len(pairs) - len(usable), len(pairs), problem)
    return usable


def ground_first(grounder: Grounder, pairs: Sequence[tuple[Video, str]] = ()) -> None:
    """Ground the first of these pairs, or a synthetic one."""
    grounder.ground(*(pairs or synthetic_workload([grounder.manifest]).pairs)[0])


@dataclasses.dataclass(frozen=True, eq=False)
class BenchmarkedModel:
    """An open model and its queries.

    Attributes:
        label: how tables call it.
        grounder: the model.
        pairs: videos and queries.
        cached: the same, with encodings in place of videos where the model takes them, else videos already pooled.
    """

    label: str
    grounder: Grounder
    pairs: Sequence[tuple[Video, str]]
    cached: Sequence[Pair]

    @classmethod
    def from_grounder(cls, label: str, grounder: Grounder, pairs: Sequence[tuple[Video, str]]) -> BenchmarkedModel:
        """Encode the videos of `pairs`, each once."""
        encoded: dict[int, Video | EncodedVideo] = {}
        for video, query in pairs:
            grounder.encode_query(query)
            if id(video) not in encoded:
                segments, about = grounder.segments(video), (video.duration, video.name)
                encoded[id(video)] = grounder.encode_segments(segments, *about) if grounder.is_pair else video
        return cls(label, grounder, pairs, [(encoded[id(video)], query) for video, query in pairs])

    def unseen_pairs(self, first: int, count: int) -> list[tuple[Video, str]]:
        """Return `count` pairs in rotation, about copies of the videos that nothing has pooled or encoded."""
        selected = self._rotate(self.pairs, first, count)
        videos = {id(video): dataclasses.replace(video) for video, _ in selected}
        return [(videos[id(video)], query) for video, query in selected]

    def cached_pairs(self, first: int, count: int) -> list[Pair]:
        """Return `count` pairs in rotation, about videos that are pooled or encoded."""
        return self._rotate(self.cached, first, count)

    def network_call(
        self, queries: Sequence[np.ndarray], videos: Sequence[Video | EncodedVideo]
    ) -> Callable[[Any], Any]:
        """Return a function that runs the network alone, with its copies, for word ids and cached videos."""
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

    @property
    def device(self) -> str:
        """cpu or cuda, as its backend or the backend's network reports."""
        return device_of(self.grounder)

    @staticmethod
    def _rotate(pairs: Sequence[Any], first: int, count: int) -> list[Any]:
        return [pairs[(first * count + index) % len(pairs)] for index in range(count)]


def device_of(grounder: Grounder) -> str:
    """Return cpu or cuda, as the backend or the backend's network reports."""
    backend: Any = grounder.backend
    parameters = getattr(getattr(backend, "model", None), "parameters", None)
    # torch's modules have no device, but their parameters do.
    device = next(parameters()).device if parameters else getattr(backend, "device", "unknown")
    return str(device).partition(":")[0]
