"""Define the cases of a benchmark, in groups, and the calls that each case times."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from typing import Any, cast

import numpy as np

from runtime.artifacts.encoded_video import EncodedVideo
from runtime.backends.base import PairBackend
from runtime.benchmarking.phases import time_phases
from runtime.benchmarking.report import BATCH_SIZE, LENGTH, ONE_QUERY, PER_VIDEO, BenchmarkCase, TimingScope
from runtime.benchmarking.timing import Call
from runtime.benchmarking.workload import BenchmarkedModel, Pair, device_of
from runtime.core.video import Video

# Time limit of a sweep case for each model, after the minimum number of calls.
SWEEP_SECONDS = 5.0

Models = Sequence[BenchmarkedModel]


@dataclasses.dataclass(frozen=True)
class TimedCase:
    """A case and its calls.

    Attributes:
        max_seconds: time limit for each model; None for no limit.
    """

    case: BenchmarkCase
    calls: Mapping[BenchmarkedModel, Call]
    max_seconds: float | None = None


@dataclasses.dataclass(frozen=True)
class CaseInputs:
    """The models and limits from which cases are built.

    Attributes:
        models: in the order of the command line.
        max_batch: maximum batch size and number of queries per video.
    """

    models: Models
    max_batch: int
    note: Callable[[str], None]


def doubling_sizes(maximum: int) -> list[int]:
    """Return 1, 2, 4, ..., and `maximum`."""
    powers = [1 << exponent for exponent in range(maximum.bit_length()) if 1 << exponent < maximum]
    return [*powers, maximum]


def one_query_cases(inputs: CaseInputs) -> Generator[TimedCase, None, None]:
    """Yield the cases of one query: end to end about new and known (cached) videos, the network, encoding a video."""
    models = inputs.models
    new, known = (BenchmarkCase(ONE_QUERY, f"{which} video", "end to end") for which in ("new", "known"))
    yield TimedCase(new, {model: _ground_one(model, model.unseen_pairs) for model in models})
    yield TimedCase(known, {model: _ground_one(model, model.cached_pairs) for model in models})
    for scope, timed, scope_models in _network_scopes(inputs):
        with timed:
            case = BenchmarkCase(ONE_QUERY, "network", scope)
            yield TimedCase(case, {model: _network(model, 1, scope) for model in scope_models})
            pairs = [model for model in scope_models if model.grounder.is_pair]
            case = BenchmarkCase(ONE_QUERY, "encode a video", scope)
            yield TimedCase(case, {model: _encode(model, scope) for model in pairs})


def batch_size_cases(inputs: CaseInputs) -> Generator[TimedCase, None, None]:
    """Yield the cases of every batch size: end to end about known videos, and the network only."""
    for size in doubling_sizes(inputs.max_batch):
        case = BenchmarkCase(BATCH_SIZE, "known videos", "end to end", size, size)
        yield TimedCase(case, {model: model.ground_call(size) for model in inputs.models}, SWEEP_SECONDS)
    for scope, timed, models in _network_scopes(inputs):
        with timed:
            for size in doubling_sizes(inputs.max_batch):
                case = BenchmarkCase(BATCH_SIZE, "network", scope, size, size)
                yield TimedCase(case, {model: _network(model, size, scope) for model in models}, SWEEP_SECONDS)


def per_video_cases(inputs: CaseInputs) -> Generator[TimedCase, None, None]:
    """Yield the cases of every number of queries about one known video."""
    known: dict[BenchmarkedModel, Video | EncodedVideo] = {model: model.cached[0][0] for model in inputs.models}
    for size in doubling_sizes(inputs.max_batch):
        case = BenchmarkCase(PER_VIDEO, "known video", "end to end", size, size)
        yield TimedCase(case, {model: _ground_video(model, known[model], size) for model in known}, SWEEP_SECONDS)


def query_length_cases(inputs: CaseInputs) -> Generator[TimedCase, None, None]:
    """Yield the cases of one query of every length: the network only."""
    if not inputs.models:
        return
    for length in doubling_sizes(min(model.grounder.manifest.max_query_length for model in inputs.models)):
        case = BenchmarkCase(LENGTH, "network", "host", length)
        yield TimedCase(case, {model: _network_of_length(model, length) for model in inputs.models}, SWEEP_SECONDS)


# The report names the system states that are read after each group accordingly.
CASE_GROUPS: tuple[tuple[str, Callable[[CaseInputs], Generator[TimedCase, None, None]]], ...] = (
    ("one query", one_query_cases),
    ("batch sizes", batch_size_cases),
    ("per video", per_video_cases),
    ("lengths", query_length_cases),
)


def phases_call(model: BenchmarkedModel, size: int, samples: list[dict[str, float]]) -> Call:
    """Return a call that grounds queries about new videos and records the time of each phase.

    Args:
        samples: list to which the seconds of each phase are appended at every call.
    """
    return Call(
        lambda pairs: samples.append(time_phases(model.grounder, pairs)[1]),
        lambda number: model.unseen_pairs(number, size),
    )


def _network_scopes(
    inputs: CaseInputs,
) -> Iterator[tuple[TimingScope, contextlib.AbstractContextManager[None], Models]]:
    """Yield the timing scopes of the network, the context to enter for each, and the models that support it."""
    yield "host", contextlib.nullcontext(), inputs.models
    for model in inputs.models:
        if not model.reports_gpu_time:
            reason = "it runs on the CPU" if device_of(model.grounder) == "cpu" else "its library does not report them"
            inputs.note(f"{model.label} has no times of the GPU only, because {reason}.")
    on_gpu = [model for model in inputs.models if model.reports_gpu_time]
    if on_gpu:
        yield "gpu", _gpu_timed(on_gpu), on_gpu


@contextlib.contextmanager
def _gpu_timed(models: Models) -> Iterator[None]:
    backends: list[Any] = [model.grounder.backend for model in models]
    for backend in backends:
        backend.time_gpu(True)
    try:
        yield
    finally:
        for backend in backends:
            backend.time_gpu(False)


def _ground_one(model: BenchmarkedModel, select: Callable[[int, int], Sequence[Pair]]) -> Call:
    return Call(lambda pair: model.grounder.ground(*pair), lambda number: select(number, 1)[0])


def _ground_video(model: BenchmarkedModel, video: Video | EncodedVideo, size: int) -> Call:
    def prepare(number: int) -> list[Pair]:
        return [(video, query) for _, query in model.cached_pairs(number, size)]

    return Call(lambda pairs: model.grounder.ground_batch(pairs, batch_size=size), prepare)


def _network(model: BenchmarkedModel, size: int, scope: TimingScope) -> Call:
    # At most four batches in rotation, to limit memory.
    count = max(1, min(4, len(model.pairs) // size))
    batches = [model.cached_pairs(number, size) for number in range(count)]
    encode = model.grounder.encode_query
    calls = [
        model.network_call([encode(query) for _, query in pairs], [video for video, _ in pairs]) for pairs in batches
    ]
    return Call(lambda call: call(None), lambda number: calls[number % count], _device_seconds(model, scope))


def _network_of_length(model: BenchmarkedModel, length: int) -> Call:
    ids = np.random.default_rng(length).integers(1, len(model.grounder.manifest.vocabulary) + 1, length, np.int32)
    return Call(model.network_call([ids], [model.cached[0][0]]))


def _encode(model: BenchmarkedModel, scope: TimingScope) -> Call:
    pair = cast(PairBackend, model.grounder.backend)
    videos = list({id(video): video for video, _ in model.pairs}.values())
    features = [model.grounder.segments(video).features[None].astype(np.float32, copy=False) for video in videos]
    return Call(pair.encode, lambda number: features[number % len(features)], _device_seconds(model, scope))


def _device_seconds(model: BenchmarkedModel, scope: TimingScope) -> Callable[[], float] | None:
    backend: Any = model.grounder.backend
    return (lambda: backend.gpu_ms / 1e3) if scope == "gpu" else None
