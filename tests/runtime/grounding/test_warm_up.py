"""`Grounder.warm` and `runtime.grounding.warm_up`: sizes that were warmed cost a query no context and no capture."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.fake_tensorrt import VERSIONS
from runtime.artifacts.encoded_video import EncodedVideo
from runtime.backends.cuda_driver import OutOfDeviceMemory
from runtime.backends.execution_contexts import MAX_EXECUTION_STATES
from runtime.backends.tensorrt_engine import TensorRTEngine
from runtime.core.batch import Batch, Heads
from runtime.core.errors import DeviceMemoryError, ShapeError
from runtime.core.video import Video
from runtime.grounding.grounder import Grounder
from runtime.grounding.warm_up import usual_sizes, warm_usual
from tests.raising import raises, records
from tests.runtime.backends.test_tensorrt_backend import LONGEST, Bench, Graphs, batch_of, graphs

__all__ = ["graphs"]

BATCHES, LENGTHS = (1, 2, 5, 8), (2, 5, 9)


@pytest.fixture(params=VERSIONS)
def bench(tmp_path: Path, graphs: Graphs, request: pytest.FixtureRequest) -> Bench:
    return Bench(tmp_path, graphs, request.param)


@pytest.mark.parametrize("part", ["whole", "pair"])
@pytest.mark.parametrize("unroll", [(), (3, 6)], ids=["loop", "unrolled"])
def test_warm_sizes_need_no_new_context_and_no_capture(bench: Bench, part: str, unroll: Sequence[int]) -> None:
    backend: Any = getattr(bench, part)(unroll=unroll)
    grounder = Grounder(backend)
    assert grounder.warm(BATCHES, LENGTHS) > 0
    batches = [batch_of([length] * size, seed=size) for size in BATCHES for length in LENGTHS]
    contexts, before = bench.library.contexts, len(bench.driver.calls)
    for _ in range(3):
        for batch in batches:
            answer(backend, part, batch)
    # Of a plan of 8.6 whose profiles are not shared, each context takes the place of another.
    if bench.library.old:
        return
    assert bench.library.contexts == contexts
    # Warm again costs nothing new either.
    grounder.warm(BATCHES, LENGTHS)
    assert not [name for name in bench.driver.calls[before:] if name.startswith("cuStreamBeginCapture")]


def answer(backend: Any, part: str, batch: Batch) -> None:
    """Run a batch, on a pair with one video that all queries ask."""
    if part == "whole":
        backend.run(batch)
        return
    videos = [EncodedVideo(backend.encode(batch.segment_features[:1])[0], batch.segment_spans[0], 1.0)]
    backend.ask(batch.query_tokens, batch.query_length, videos, np.zeros(len(batch), np.int32))


def test_warm_up_does_not_change_moments(bench: Bench) -> None:
    video = Video(np.random.default_rng(0).random((40, 16), np.float32), 400, 30.0)
    queries = ["word1 word2", "word3 word7 word1 word5 word9", "word4"]
    for backend in (bench.whole(), bench.pair()):
        grounder = Grounder(backend)
        expected = [grounder.ground(video, query) for query in queries]
        grounder.warm(BATCHES, LENGTHS)
        assert [grounder.ground(video, query) for query in queries] == expected


@pytest.mark.parametrize(("batches", "lengths"), [((9,), (2,)), ((1,), (LONGEST + 1,)), ((0,), (2,)), ((1,), (0, 2))])
def test_sizes_beyond_engine_are_rejected_before_running(
    bench: Bench, batches: tuple[int, ...], lengths: tuple[int, ...]
) -> None:
    for backend in (bench.whole(), bench.pair()):
        runs = len(bench.library.runs)
        with raises(ShapeError, "shape_mismatch"):
            Grounder(backend).warm((1, *batches), (2, *lengths))
        assert len(bench.library.runs) == runs


def test_warm_up_progress_counts_each_shape_once(bench: Bench) -> None:
    seen: list[tuple[int, int]] = []
    count = Grounder(bench.whole()).warm((1, 3, 4), (1, 2, 3, 4, 5), progress=lambda *step: seen.append(step))
    # Tokens are padded to 4 and 6.
    assert count == 6
    assert seen == [(done, 6) for done in range(7)]
    assert Grounder(bench.whole()).warm((), (2,)) == Grounder(bench.whole()).warm((1,), ()) == 0


def test_single_query_contexts_are_not_evicted(tmp_path: Path, graphs: Graphs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("runtime.backends.execution_contexts.MAX_EXECUTION_STATES", 3)
    assert MAX_EXECUTION_STATES > 3
    bench = Bench(tmp_path, graphs)
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


def test_usual_sizes_cover_typical_batches(bench: Bench, graphs: Graphs, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "drn")
    grounder = Grounder(bench.whole())
    # The engine takes 8 queries, and Charades-STA's have 10 tokens at most.
    assert usual_sizes(grounder, 32) == ([1, 2, 3, 4, 6, 8], list(range(1, 11)))
    assert usual_sizes(grounder, 5) == ([1, 2, 3, 4, 5], list(range(1, 11)))
    assert usual_sizes(Grounder(bench.whole(unroll=(LONGEST,))), 4)[1] == list(range(1, 11))
    assert warm_usual(grounder, 32) == 6 * 4
    assert len(records(caplog, logging.INFO, 24)) == 2
    contexts = bench.library.contexts
    for size in range(1, 20):
        grounder.backend.run(batch_of([size % 10 + 1] * size))
    assert bench.library.contexts == contexts or bench.library.old


@pytest.mark.parametrize("part", ["whole", "pair"])
@pytest.mark.parametrize("unroll", [(10,), (4, 11), (11,)])
def test_usual_sizes_reach_every_engine(bench: Bench, part: str, unroll: tuple[int, ...]) -> None:
    backend: Any = getattr(bench, part)(unroll=unroll)
    grounder = Grounder(backend)
    batches, lengths = usual_sizes(grounder, 4)
    # Charades-STA's queries have 10 tokens at most, and one length more reaches the loop.
    assert lengths == [*range(1, 11), unroll[-1] + 1]
    warm_usual(grounder, 4)
    assert {use.max_query_length for use in backend.plan_uses() if use.queries} == {*unroll, LONGEST}
    if not bench.library.old:
        contexts = bench.library.contexts
        for size in batches:
            answer(backend, part, batch_of([LONGEST] * size))
        assert bench.library.contexts == contexts


def test_warm_up_on_cpu_runs_nothing(graphs: Graphs, monkeypatch: pytest.MonkeyPatch) -> None:
    for path in (graphs.whole, graphs.query):
        grounder = Grounder.load(path, "cpu", 1)
        monkeypatch.setattr(type(grounder.backend), "run", lambda *_: pytest.fail("it was run"))
        assert grounder.warm(BATCHES, LENGTHS) == 0
        assert warm_usual(grounder, 32) == 0
        with pytest.raises(ShapeError):
            grounder.warm((1,), (LONGEST + 1,))


def test_warm_up_of_other_gpu_backend_runs_each_size_once(graphs: Graphs) -> None:
    class Recorded:
        device = "cuda"

        def __init__(self, path: Path) -> None:
            self.inner: Any = Grounder.load(path, "cpu", 1).backend
            self.manifest = self.inner.manifest
            self.seen: list[tuple[int, ...]] = []

        def run(self, batch: Any) -> Heads:
            self.seen.append(batch.query_tokens.shape)
            return self.inner.run(batch)

        def encode(self, features: np.ndarray) -> np.ndarray:
            return self.inner.encode(features)

        def ask(self, tokens: np.ndarray, *others: Any) -> Heads:
            self.seen.append(tokens.shape)
            return self.inner.ask(tokens, *others)

    for path in (graphs.whole, graphs.query):
        backend = Recorded(path)
        assert Grounder(backend).warm((1, 3), (2, 5)) == 4
        assert sorted(backend.seen) == [(1, 2), (1, 5), (3, 2), (3, 5)]


def test_corpus_worker_warms_model_with_its_batch_size(
    graphs: Graphs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from types import SimpleNamespace

    from runtime.corpus import worker

    seen: list[int] = []
    monkeypatch.setattr(worker, "warm_usual", lambda grounder, batch_size: seen.append(batch_size))
    settings = SimpleNamespace(device="cpu", threads=1, window=None, overlap=None, batch_size=7)
    double = SimpleNamespace(job=SimpleNamespace(model=graphs.whole, settings=settings))
    assert isinstance(worker.Worker._grounder.func(double), Grounder)  # type: ignore[attr-defined]
    assert seen == [7]
