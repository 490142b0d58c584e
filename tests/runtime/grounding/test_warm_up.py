"""Test `Grounder.warm` and `runtime.grounding.warm_up`: queries of warmed sizes need no context and no capture."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from runtime.artifacts.encoded_video import EncodedVideo
from runtime.backends.cuda_driver import OutOfDeviceMemory
from runtime.backends.tensorrt_engine import TensorRTEngine
from runtime.core.batch import Batch, Heads
from runtime.core.errors import DeviceMemoryError, ShapeError
from runtime.core.video import Video
from runtime.corpus import worker
from runtime.grounding.grounder import Grounder
from runtime.grounding.warm_up import usual_sizes, warm_usual
from tests.raising import raises, records
from tests.runtime.engine_bench import LONGEST, Bench, Graphs, batch_of

BATCHES, LENGTHS = (1, 2, 5, 8), (2, 5, 9)


@pytest.fixture
def bench(tmp_path: Path, graphs: Graphs) -> Bench:
    return Bench(tmp_path, graphs)


def answer(backend: Any, batch: Batch) -> None:
    """Run a batch, on a pair with one video for all queries."""
    if not hasattr(backend, "ask"):
        backend.run(batch)
        return
    videos = [EncodedVideo(backend.encode(batch.segment_features[:1])[0], batch.segment_spans[0], 1.0)]
    backend.ask(batch.query_tokens, batch.query_length, videos, np.zeros(len(batch), np.int32))


@pytest.mark.parametrize(
    ("version", "part", "unroll", "fails"),
    [
        ("10.16.1.11", "whole", (), False),
        ("10.16.1.11", "whole", (), True),
        ("11.4.0.106", "pair", (3, 6), False),
        ("1.7.1.116", "pair", (), False),
    ],
)
def test_warm_sizes_need_no_new_context_and_no_capture(
    tmp_path: Path, graphs: Graphs, version: str, part: str, unroll: tuple[int, ...], fails: bool
) -> None:
    bench = Bench(tmp_path, graphs, version)
    backend = getattr(bench, part)(unroll=unroll)
    grounder = Grounder(backend)
    # A failed capture releases all contexts.
    bench.library.failing.update({"capture": "not permitted"} if fails else {})
    assert grounder.warm(BATCHES, LENGTHS) > 0
    bench.driver.calls.clear()
    contexts = bench.library.contexts
    for _ in range(3):
        for size in BATCHES:
            for length in LENGTHS:
                answer(backend, batch_of([length] * size, seed=size))
    grounder.warm(BATCHES, LENGTHS)
    assert bench.library.contexts == contexts
    assert "cuStreamBeginCapture_v2" not in bench.driver.calls


@pytest.mark.parametrize("version", ["8.6.1", "10.16.1.11"])
@pytest.mark.parametrize("part", ["whole", "pair"])
def test_moments_equal_graph_before_and_after_warm_up(tmp_path: Path, graphs: Graphs, version: str, part: str) -> None:
    video = Video(np.random.default_rng(0).random((40, 16), np.float32), 400, 30.0)
    queries = ["word1 word2", "word3 word7 word1 word5 word9", "word4"]
    grounder, reference = (
        Grounder(getattr(Bench(tmp_path, graphs, version), part)()),
        Grounder.load(graphs.whole, "cpu"),
    )
    first = [grounder.ground(video, query) for query in queries]
    for moments, query in zip(first, queries, strict=True):
        for moment, expected in zip(moments, reference.ground(video, query), strict=True):
            assert (moment.start, moment.end) == pytest.approx((expected.start, expected.end), abs=1e-3)
    grounder.warm(BATCHES, LENGTHS)
    assert [grounder.ground(video, query) for query in queries] == first


@pytest.mark.parametrize(("batches", "lengths"), [((9,), (2,)), ((1,), (LONGEST + 1,)), ((0,), (2,)), ((1,), (0, 2))])
def test_sizes_beyond_engine_are_rejected(bench: Bench, batches: tuple[int, ...], lengths: tuple[int, ...]) -> None:
    grounder = Grounder(bench.whole())
    with raises(ShapeError, "shape_mismatch"):
        grounder.warm((1, *batches), (2, *lengths))
    assert not bench.library.runs


def test_warm_up_progress_counts_each_shape_once(bench: Bench) -> None:
    seen: list[tuple[int, int]] = []
    grounder = Grounder(bench.whole())
    # Tokens are padded to 4 and 6.
    assert grounder.warm((1, 3, 4), (1, 2, 3, 4, 5), progress=lambda *step: seen.append(step)) == 6
    assert seen == [(done, 6) for done in range(7)]
    assert grounder.warm((), (2,)) == grounder.warm((1,), ()) == 0


def test_single_query_contexts_are_not_evicted(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("runtime.backends.execution_contexts.MAX_EXECUTION_STATES", 3)
    backend = bench.whole()
    Grounder(backend).warm((1, 2, 4, 8), (4, 6, 8))
    contexts = bench.library.contexts
    for length in (4, 6, 8):
        backend.run(batch_of([length]))
    assert bench.library.contexts == contexts


def test_warm_up_out_of_memory_is_error_or_warning_by_size(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    grounder, warm = Grounder(bench.whole()), TensorRTEngine.warm
    calls = iter([False, True])

    def full(network: TensorRTEngine, sizes: Any) -> None:
        if next(calls, True):
            raise OutOfDeviceMemory("full")
        warm(network, sizes)

    monkeypatch.setattr(TensorRTEngine, "warm", full)
    with raises(DeviceMemoryError, "out_of_memory"):
        grounder.warm((1, 2), (4, 6))
    assert warm_usual(grounder, 4) == 0
    assert any(record.levelname == "WARNING" for record in caplog.records)


def test_usual_sizes_cover_typical_batches(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "drn")
    grounder = Grounder(bench.whole())
    # The engine accepts 8 queries, and those of Charades-STA have at most 10 tokens.
    assert usual_sizes(grounder, 32) == ([1, 2, 3, 4, 6, 8], list(range(1, 11)))
    assert usual_sizes(grounder, 5) == ([1, 2, 3, 4, 5], list(range(1, 11)))
    assert usual_sizes(Grounder(bench.whole(unroll=(LONGEST,))), 4)[1] == list(range(1, 11))
    assert warm_usual(grounder, 32) == 6 * 4
    assert len(records(caplog, logging.INFO, 24)) == 2
    contexts = bench.library.contexts
    for size in range(1, 20):
        grounder.backend.run(batch_of([size % 10 + 1] * size))
    assert bench.library.contexts == contexts


@pytest.mark.parametrize(("part", "unroll"), [("whole", (10,)), ("pair", (4, 11))])
def test_usual_sizes_reach_every_engine(bench: Bench, part: str, unroll: tuple[int, ...]) -> None:
    backend = getattr(bench, part)(unroll=unroll)
    grounder = Grounder(backend)
    batches, lengths = usual_sizes(grounder, 4)
    # Queries of Charades-STA have at most 10 tokens, and one longer query reaches the loop.
    assert lengths == [*range(1, 11), unroll[-1] + 1]
    warm_usual(grounder, 4)
    assert {use.max_query_length for use in backend.plan_uses() if use.queries} == {*unroll, LONGEST}
    contexts = bench.library.contexts
    for size in batches:
        answer(backend, batch_of([LONGEST] * size))
    assert bench.library.contexts == contexts


class Recorded:
    """A backend in ONNX Runtime that records the sizes that it runs."""

    def __init__(self, path: Path, device: str) -> None:
        self.inner: Any = Grounder.load(path, "cpu", 1).backend
        self.device = device
        self.seen: list[tuple[int, ...]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def run(self, batch: Batch) -> Heads:
        self.seen.append(batch.query_tokens.shape)
        return self.inner.run(batch)

    def ask(self, tokens: np.ndarray, *others: Any) -> Heads:
        self.seen.append(tokens.shape)
        return self.inner.ask(tokens, *others)


@pytest.mark.parametrize("part", ["whole", "query"])
def test_other_backend_is_warmed_on_gpu_only(graphs: Graphs, part: str) -> None:
    backend: Any = Recorded(getattr(graphs, part), "cuda")
    assert Grounder(backend).warm((1, 3), (2, 5)) == 4
    assert sorted(backend.seen) == [(1, 2), (1, 5), (3, 2), (3, 5)]
    backend = Recorded(getattr(graphs, part), "cpu")
    assert Grounder(backend).warm((1, 3), (2, 5)) == warm_usual(Grounder(backend), 32) == 0
    with pytest.raises(ShapeError):
        Grounder(backend).warm((1,), (LONGEST + 1,))
    assert backend.seen == []


def test_corpus_worker_warms_model_with_its_batch_size(graphs: Graphs, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    monkeypatch.setattr(worker, "warm_usual", lambda grounder, batch_size: seen.append(batch_size))
    settings = SimpleNamespace(device="cpu", threads=1, window=None, overlap=None, batch_size=7)
    double = SimpleNamespace(job=SimpleNamespace(model=graphs.whole, settings=settings))
    assert isinstance(worker.Worker._grounder.func(double), Grounder)  # type: ignore[attr-defined]
    assert seen == [7]
