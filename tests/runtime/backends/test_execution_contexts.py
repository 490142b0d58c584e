"""Test `runtime.backends.execution_contexts`: calls of the driver, CUDA graphs, failed captures, full memory."""

from __future__ import annotations

import contextlib
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.fake_tensorrt import NOT_CAPTURABLE, Engine, counted
from runtime.backends.batch_shapes import MIN_PADDED_LENGTH, bucket
from runtime.backends.cuda_driver import OutOfDeviceMemory
from runtime.backends.execution_contexts import MAX_EXECUTION_STATES
from runtime.core.errors import DeviceError
from tests.raising import quotes, raises, records
from tests.runtime.engine_bench import Bench, Graphs, assert_same, batch_of, encode_all, profile


def test_run_allocates_nothing_and_synchronizes_once(bench: Bench) -> None:
    backend = bench.whole()
    batch = batch_of([5, 7, 3])
    plain = ["cuMemcpyHtoDAsync_v2", "cuMemcpyDtoHAsync_v2", "cuStreamSynchronize"]
    # A new context waits for its profile once.
    assert bench.calls(lambda: backend.run(batch)) == ["cuStreamSynchronize", *plain]
    captured = ["cuStreamBeginCapture_v2", *plain[:2], "cuStreamEndCapture", "cuGraphInstantiateWithFlags"]
    assert bench.calls(lambda: backend.run(batch)) == [*plain, *captured, "cuGraphDestroy"]
    for seed in range(3):
        again = batch_of([6, 8, 1], seed)
        assert bench.calls(lambda again=again: backend.run(again)) == ["cuGraphLaunch", "cuStreamSynchronize"]
    assert counted(bench.driver.calls)["cuMemAlloc_v2"] == 3


def test_service_batch_sizes_fit_the_execution_states() -> None:
    batches, lengths = ({bucket(size) for size in range(1, maximum + 1)} for maximum in (32, 16))
    assert len(batches) * len({max(length, MIN_PADDED_LENGTH) for length in lengths}) <= MAX_EXECUTION_STATES


def test_similar_sizes_share_cuda_graph_up_to_limit(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("runtime.backends.execution_contexts.MAX_EXECUTION_STATES", 16)
    backend = bench.whole([profile((1, 4, 64))])
    before = bench.library.contexts
    for length in (5, 6):
        for size in (7, 8):
            backend.run(batch_of([length] * size))
    assert bench.library.contexts - before == 1
    for size in (1, 2, 3, 4, 6, 8, 12, 16, 24):
        for length in (4, 8):
            for _ in range(2):
                backend.run(batch_of([length] * size))
    assert bench.driver.held()["graphs"] == 16


@pytest.mark.parametrize(("version", "created"), [("8.6.1", 6), ("10.16.1.11", 2)])
def test_contexts_share_a_profile_if_version_allows(tmp_path: Path, graphs: Graphs, version: str, created: int) -> None:
    bench = Bench(tmp_path, graphs, version)
    backend = bench.whole([profile((1, 4, 8))])
    before = bench.library.contexts
    for _ in range(3):
        for lengths in ([3, 3], [9, 9, 9]):
            bench.check(backend, batch_of(lengths))
    assert bench.library.contexts - before == created


def test_rtx_engine_skips_explicit_graph_capture(tmp_path: Path, graphs: Graphs) -> None:
    bench = Bench(tmp_path, graphs, "1.7.1.116")
    backend = bench.whole()
    for _ in range(3):
        backend.run(batch_of([5]))
    assert "cuStreamBeginCapture_v2" not in bench.driver.calls


def test_failed_capture_keeps_results_and_warns_once(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    backend = bench.whole()
    failure = "operation not permitted when stream is capturing"
    bench.library.failing["capture"] = failure
    with caplog.at_level(logging.WARNING, "drn"):
        for seed in range(4):
            for lengths in ([5], [2, 3]):
                bench.check(backend, batch_of(lengths, seed))
    assert len(caplog.records) == len(records(caplog, logging.WARNING, failure, "--unroll 6 10")) == 1
    assert "cuGraphLaunch" not in bench.driver.calls
    # An unrolled LSTM has another reason.
    caplog.clear()
    backend = bench.whole(unroll=(6,))
    for _ in range(3):
        backend.run(batch_of([5]))
    (warning,) = [record.message for record in caplog.records]
    assert quotes(warning, "drn.fp32.6.engine", failure)
    assert "--unroll" not in warning


def test_error_reported_again_after_failed_capture_is_survived(bench: Bench) -> None:
    backend = bench.whole()
    first, second = batch_of([5]), batch_of([2, 3])
    bench.library.failing["capture"] = NOT_CAPTURABLE
    for _ in range(2):
        bench.check(backend, first)
    # TensorRT reports the error of the capture once more, in whichever context runs next.
    bench.library.kept_errors = 1
    for batch in (first, second, first, second):
        bench.check(backend, batch)


def test_error_without_or_long_after_failed_capture_is_raised(bench: Bench) -> None:
    backend = bench.whole()
    backend.run(batch_of([5]))
    bench.library.kept_errors = 1
    with pytest.raises(DeviceError):
        backend.run(batch_of([5]))
    bench.library.failing["capture"] = NOT_CAPTURABLE
    for _ in range(2):
        backend.run(batch_of([5]))
    bench.library.kept_errors = 9
    with pytest.raises(DeviceError):
        backend.run(batch_of([5]))


def test_tensorrt_8_captures_unrolled_lstms(tmp_path: Path, graphs: Graphs, caplog: pytest.LogCaptureFixture) -> None:
    bench = Bench(tmp_path, graphs, "8.6.1")
    backend = bench.whole()
    with caplog.at_level(logging.WARNING, "drn"):
        for seed in range(4):
            bench.check(backend, batch_of([5], seed))
    # 8.6 breaks the line within its error.
    assert caplog.messages
    assert not any("\n" in message for message in caplog.messages)
    assert "cuGraphLaunch" not in bench.driver.calls
    backend = bench.whole(unroll=(6,))
    for _ in range(4):
        backend.run(batch_of([5]))
    assert "cuGraphLaunch" in bench.driver.calls


@pytest.mark.parametrize("call", ["cuStreamBeginCapture_v2", "cuStreamEndCapture", "cuGraphInstantiateWithFlags"])
def test_driver_without_graph_capture_still_runs(bench: Bench, call: str) -> None:
    backend = bench.whole()
    bench.driver.failing[call] = 801
    for seed in range(3):
        bench.check(backend, batch_of([5, 2], seed))


def test_ctrl_c_during_capture_leaves_a_working_model(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    backend, batch, begin = bench.whole(), batch_of([5, 2]), bench.cuda.begin_capture

    def interrupted(stream: int) -> None:
        begin(stream)
        raise KeyboardInterrupt

    backend.run(batch)
    with monkeypatch.context() as patch:
        patch.setattr(bench.cuda, "begin_capture", interrupted)
        with pytest.raises(KeyboardInterrupt):
            backend.run(batch)
    for _ in range(2):
        bench.check(backend, batch)


def test_full_memory_frees_caches_and_halves_the_batch(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = bench.whole(unroll=(5,))
    for lengths in ([4], [4], [9], [9], [9, 9]):
        backend.run(batch_of(lengths))
    assert bench.driver.held()["graphs"] == 2
    create, failing = Engine._create, iter([True])

    def full_once(engine: Engine) -> Any:
        if next(failing, False):
            engine._logger.log(1, "CUDA error 2: out of memory")
            return None
        return create(engine)

    monkeypatch.setattr(Engine, "_create", full_once)
    bench.library.runs.clear()
    bench.check(backend, batch_of([4] * 8, 1))
    assert [run["query_length"] for run in bench.library.runs] == [(4,), (4,)]
    # The contexts of all engines were released first; the second half was captured.
    assert bench.driver.held()["graphs"] == 1


def test_persistent_full_memory_raises_and_model_survives(bench: Bench) -> None:
    backend = bench.whole()
    batch = batch_of([4] * 4)
    bench.library.failing["execute_async_v3"] = "Requested amount of GPU memory: CUDA out of memory"
    with raises(DeviceError, "out_of_memory", 2):
        backend.run(batch)
    bench.library.failing.clear()
    bench.check(backend, batch)


def test_encoding_caches_stay_separate_when_memory_is_full(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    # Halves of a batch run with another profile than the batch, which has encodings of its own.
    pair = bench.pair(profiles=[profile((1, 1, 1), "query", (1, 1, 1)), profile((2, 4, 8), "query", (1, 2, 3))])
    batch = batch_of([4, 4])
    # The first half needs the video that the batch has in the second slot.
    videos, index = encode_all(pair, batch)[::-1], np.array([1, 0], np.int32)
    create, failing = pair._network.contexts.create, iter([True])

    def full_once(*arguments: Any) -> Any:
        if next(failing, False):
            raise OutOfDeviceMemory("CUDA error 2: out of memory.")
        return create(*arguments)

    monkeypatch.setattr(pair._network.contexts, "create", full_once)
    for _ in range(2):
        assert_same(pair.ask(batch.query_tokens, batch.query_length, videos, index), bench.graphs.reference(batch))


def test_failed_hardware_compatible_engine_names_the_remedy(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    for hardware_compatible in (True, False):
        # pytorch/TensorRT#4481.
        bench.library.failing = {"execute_async_v3": "Error Code 1: Cask (Cask convolution execution)"}
        options = {"version_compatible": False, "hardware_compatible": hardware_compatible}
        backend = bench.whole(options=options)
        with pytest.raises(DeviceError) as caught:
            backend.run(batch_of([5]))
        assert ("export.build_engine" in str(caught.value)) is hardware_compatible
        assert "--hardware-compatible" not in str(caught.value)
        # A failed capture is only a warning.
        caplog.clear()
        bench.library.failing = {"capture": NOT_CAPTURABLE}
        for _ in range(2):
            backend.run(batch_of([5]))
        (warning,) = caplog.messages
        assert "hardware-compatible" not in warning


def test_gpu_time_is_that_of_the_networks(bench: Bench) -> None:
    backend = bench.whole(unroll=(6,))
    long, short = batch_of([9] * 19), batch_of([5])
    backend.run(long)
    assert backend.gpu_ms == 0
    backend.time_gpu(True)
    for batch, runs in ((long, 3), (short, 1)):
        for _ in range(4):
            bench.check(backend, batch)
            assert backend.gpu_ms == runs * bench.library.network_ms
    backend.time_gpu(False)
    bench.check(backend, long)
    assert backend.gpu_ms == 0


def test_memory_is_reported_and_freed_on_close(bench: Bench) -> None:
    for open_one in (bench.whole, bench.pair):
        backend = open_one()
        for _ in range(2):
            backend.run(batch_of([4, 4]))
        report = backend.memory_report()
        assert report.device == report.total - report.free == bench.driver.allocated()
        assert min(report.plan, report.pinned) > 0
        for _ in range(2):
            backend.close()
            assert bench.driver.held() == {}
        with contextlib.closing(open_one(unroll=(6,))) as larger:
            assert larger.memory_report().plan > report.plan
            assert larger.memory_report().device > 1.3 * report.device
