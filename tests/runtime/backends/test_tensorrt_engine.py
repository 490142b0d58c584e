"""Test `runtime.backends.tensorrt_engine`: open and close engines, in threads, after a fork, and without memory."""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import threading
import weakref
from pathlib import Path
from typing import Any

import pytest

from benchmarks.fake_tensorrt import write_plan
from runtime.artifacts.engine_metadata import metadata_path, read_sidecar
from runtime.backends import open_backend
from runtime.backends import tensorrt_engine as engine_module
from runtime.backends.cuda_driver import Cuda
from runtime.backends.tensorrt_backend import TensorRTBackend
from runtime.backends.tensorrt_engine import close_all
from runtime.core.batch import Heads
from runtime.core.errors import DeviceError, DeviceMemoryError, ModelFileError
from runtime.core.io.digests import sha256
from runtime.grounding.grounder import Grounder
from tests.raising import quotes, raises
from tests.runtime.engine_bench import LONGEST, Bench, Graphs, assert_same, batch_of, edit_metadata, profile


def test_engine_suffix_opens_tensorrt_backend(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.whole()
    monkeypatch.setattr("runtime.backends.tensorrt_backend.Cuda", lambda: bench.cuda)
    monkeypatch.setattr(
        "runtime.backends.tensorrt_backend._import", lambda names: ({("tensorrt",): bench.library}[names], "")
    )
    grounder = Grounder.load(bench.directory / "drn.fp32.engine", "cuda", 2)
    assert isinstance(grounder.backend, TensorRTBackend)
    assert grounder.backend.device == "cuda"


def test_tensorrt_is_not_imported_without_gpu(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.whole()

    def absent() -> Cuda:
        raise DeviceError("There is no CUDA driver here.")

    monkeypatch.setattr("runtime.backends.tensorrt_backend.Cuda", absent)
    monkeypatch.setattr("runtime.backends.tensorrt_backend._import", lambda names: pytest.fail(f"imports {names}"))
    with raises(DeviceError, "incompatible_engine", "There is no CUDA driver here", bench.directory / "drn.onnx"):
        open_backend(bench.directory / "drn.fp32.engine")
    with raises(DeviceError, "gpu_required", "drn.fp32.engine"):
        open_backend(bench.directory / "drn.fp32.engine", "cpu")


def test_changed_engine_is_not_loaded(bench: Bench) -> None:
    bench.whole().close()
    plan = bench.directory / "drn.fp32.engine"
    plan.write_bytes(plan.read_bytes() + b" ")
    bench.library.calls.clear()
    with raises(ModelFileError, "digest_mismatch", plan):
        bench.open(plan)
    assert bench.library.calls == []


def test_host_code_is_allowed_only_by_metadata(bench: Bench) -> None:
    for options in ({}, {"version_compatible": True, "hardware_compatible": False}):
        bench.check(bench.whole(options=options), batch_of([5]))
    opened = [call for call in bench.library.calls if call[0] == "deserialize_cuda_engine"]
    assert opened == [("deserialize_cuda_engine", False), ("deserialize_cuda_engine", True)]


def test_engine_with_other_tensors_is_rejected(bench: Bench, graphs: Graphs) -> None:
    plan = bench.directory / "odd.engine"
    write_plan(plan, graphs.video, [profile((1, 1, 1), "video")], graphs.manifest, bench.version)
    with raises(ModelFileError, "unexpected_tensors", plan, "query_tokens"):
        bench.open(plan)
    assert bench.driver.held() == {}


def test_pair_with_missing_or_foreign_video_part_is_rejected(bench: Bench) -> None:
    bench.pair().close()
    query, video = bench.directory / "drn.query.engine", bench.directory / "drn.video.engine"
    with raises(ModelFileError, "model_part", video, query):
        bench.open(video)
    edit_metadata(video, sha256={video.name: sha256(video)})
    with raises(ModelFileError, "digest_mismatch", video, query.name):
        bench.open(query)
    video.unlink()
    with raises(ModelFileError, "missing_file", query, video.name):
        bench.open(query)


def test_short_query_engine_of_another_build_is_rejected(bench: Bench) -> None:
    bench.whole(unroll=(6,)).close()
    plan, shorter = bench.directory / "drn.fp32.engine", bench.directory / "drn.fp32.6.engine"
    digests = read_sidecar(shorter).content["sha256"]
    # It matches its own metadata file, but not the hash that the longer plan records.
    shorter.write_bytes(shorter.read_bytes() + b" ")
    edit_metadata(shorter, sha256={**digests, shorter.name: sha256(shorter)})
    with raises(ModelFileError, "digest_mismatch", shorter, plan.name, "--unroll 6"):
        bench.open(plan)
    # The hash is recorded, but it is another part.
    bench.pair().close()
    plan, video = bench.directory / "drn.query.engine", bench.directory / "drn.video.engine"
    edit_metadata(plan, unrolled={video.name: sha256(video)})
    with raises(ModelFileError, "digest_mismatch", video, plan.name):
        bench.open(plan)


@pytest.mark.parametrize("missing", ["plan", "sidecar"])
def test_missing_short_query_engine_is_a_warning(bench: Bench, caplog: pytest.LogCaptureFixture, missing: str) -> None:
    bench.whole(unroll=(3, 6)).close()
    shorter = bench.directory / "drn.fp32.6.engine"
    (shorter if missing == "plan" else metadata_path(shorter)).unlink()
    caplog.clear()
    backend = bench.open(bench.directory / "drn.fp32.engine")
    (warning,) = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert quotes(warning, shorter.name, 6)
    for lengths, tokens in (([2], 3), ([5], 6), ([11], 12)):
        bench.check(backend, batch_of(lengths))
        assert bench.library.runs[-1]["query_tokens"][1] == tokens
    assert [use.max_query_length for use in backend.plan_uses()] == [3, 12]


def test_short_query_engine_over_memory_is_a_warning(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    with contextlib.closing(bench.pair()):
        needed = bench.driver.allocated()
    with contextlib.closing(bench.pair(unroll=(3, 6))):
        one_more = bench.driver.allocated() - needed
    plan = bench.directory / "drn.query.engine"
    for room, lengths in ((needed + 100, [12]), (needed + one_more - 100, [3, 12])):
        caplog.clear()
        bench.driver.room = room
        backend = bench.open(plan)
        warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
        assert [use.max_query_length for use in backend.plan_uses()] == lengths
        assert len(warnings) == 3 - len(lengths)
        assert all(any(f".{steps}.engine" in warning for warning in warnings) for steps in {3, 6} - {*lengths})
        bench.driver.room = 1 << 32
        bench.check(backend, batch_of([2, 5]))
        backend.close()
        assert not bench.driver.held()
    # The plan for all queries is required.
    bench.driver.room = 100
    with raises(DeviceMemoryError, "out_of_memory"):
        bench.open(plan)
    assert not bench.driver.held()


def test_failed_pair_opening_frees_all_memory(bench: Bench) -> None:
    profiles = [profile((1, 1, 1), "query", (1, 1, 1)), profile((2, 4, 8), "query", (1, 2, 3))]
    allocations = ("cuMemAlloc_v2", "cuMemAllocHost_v2")
    bench.pair(profiles=profiles).close()
    required = sum(name in allocations for name in bench.driver.calls)
    bench.driver.calls.clear()
    bench.pair(profiles=profiles, unroll=(5,)).close()
    count = sum(name in allocations for name in bench.driver.calls)
    assert count > required >= 2 * (2 + 4) + 4
    plan = bench.directory / "drn.query.engine"
    for nth in range(count):
        bench.driver.full_at = nth
        # The model opens without the short-query plan, which is opened last.
        with pytest.raises(DeviceMemoryError) if nth < required else contextlib.nullcontext():
            pair = bench.open(plan)
            assert [use.max_query_length for use in pair.plan_uses()] == [LONGEST]
            pair.close()
        assert bench.driver.held() == {}, nth
    bench.driver.full_at = None
    bench.check(bench.open(plan), batch_of([4, 4]))


@pytest.mark.parametrize(
    ("call", "message", "code", "values"),
    [
        ("create_execution_context", "Assertion status == kSUCCESS", "gpu_call_failed", ["export.build_engine"]),
        ("create_execution_context", "OutOfMemory (Requested size was 9 bytes.)", "out_of_memory", ["--batch"]),
        ("deserialize_cuda_engine", "version 239 does not match 240", "gpu_call_failed", ["export.build_engine"]),
        ("Runtime", "CUDA initialization failure with error: 35", "driver_too_old", ["CUDA 13.0"]),
    ],
)
def test_unopened_engine_frees_all_memory(bench: Bench, call: str, message: str, code: str, values: list[str]) -> None:
    bench.library.failing[call] = message
    subject = "tensorrt 10.16.1.11" if code == "driver_too_old" else "drn.fp32.engine"
    with raises(DeviceError, code, subject, message.rstrip(")."), *values) as caught:
        bench.whole()
    assert ("export.build_engine" in str(caught.value)) == ("export.build_engine" in values)
    assert bench.driver.held() == {}


def test_engine_for_another_or_a_small_gpu_frees_all_memory(bench: Bench) -> None:
    with raises(DeviceError, "incompatible_engine", "tensorrt 10.16.1.11", "NVIDIA T4"):
        bench.whole(gpu="NVIDIA T4, 1, 1 MiB, 7.5")
    assert bench.library.calls == []
    bench.driver.room = 6000
    with raises(DeviceError, "out_of_memory", "drn.fp32.engine", "--batch"):
        bench.whole()
    assert bench.driver.held() == {}


def test_engine_larger_than_host_memory_raises_one_error(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.whole().close()
    read = Path.read_bytes

    def full(file: Path) -> bytes:
        if file.suffix == ".engine":
            raise MemoryError
        return read(file)

    monkeypatch.setattr(Path, "read_bytes", full)
    with pytest.raises(DeviceMemoryError):
        bench.open(bench.directory / "drn.fp32.engine")


@pytest.mark.parametrize("end", ["exit", "deletion"])
def test_engines_are_freed_at_exit_and_on_deletion(bench: Bench, end: str) -> None:
    for open_one in (bench.whole, bench.pair):
        backend = open_one()
        backend.run(batch_of([4]))
        if end == "exit":
            close_all()
        else:
            del backend
        assert bench.driver.held() == {}


def test_close_all_waits_for_running_calls(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    backend, batch = bench.whole(), batch_of([4, 4])
    begun, ends = threading.Event(), threading.Event()
    synchronize = bench.cuda.synchronize
    backend.run(batch)

    def slowly(stream: int) -> None:
        begun.set()
        assert ends.wait(60)
        synchronize(stream)

    monkeypatch.setattr(bench.cuda, "synchronize", slowly)
    actual: list[Heads] = []
    running = threading.Thread(target=lambda: actual.append(backend.run(batch)))
    running.start()
    assert begun.wait(60)
    held = bench.driver.held()
    # The memory of a call that does not end is not freed.
    monkeypatch.setattr(engine_module, "EXIT_TIMEOUT_SECONDS", 0.05)
    close_all()
    assert bench.driver.held() == held
    monkeypatch.setattr(engine_module, "EXIT_TIMEOUT_SECONDS", 60.0)
    closing = threading.Thread(target=close_all)
    closing.start()
    ends.set()
    running.join()
    closing.join()
    assert_same(actual[0], bench.graphs.reference(batch))
    assert bench.driver.held() == {}


def test_closed_model_raises_without_driver_calls(bench: Bench) -> None:
    batch = batch_of([4, 4])
    for backend in (bench.whole(), bench.pair()):
        backend.close()
        calls = len(bench.driver.calls)
        for use, arguments in ((backend.run, (batch,)), (backend.memory_report, ()), (backend.time_gpu, (True,))):
            with raises(DeviceError, "model_closed"):
                use(*arguments)
        assert set(bench.driver.calls[calls:]) <= {"cuCtxPushCurrent_v2", "cuCtxPopCurrent_v2"}


def test_forked_process_raises_and_makes_no_driver_calls(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = bench.whole()
    here = os.getpid()
    monkeypatch.setattr(os, "getpid", lambda: here + 1)
    with raises(DeviceError, "forked_process", here, here + 1):
        backend.run(batch_of([4]))
    calls = len(bench.driver.calls)
    # A thread of the parent process that held the lock does not exist in the fork.
    with backend._lock:
        backend.close()
        close_all()
    assert len(bench.driver.calls) == calls
    monkeypatch.undo()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_forked_process_destroys_no_tensorrt_objects(bench: Bench) -> None:
    backend = bench.pair(unroll=(5,))
    backend.run(batch_of([4]))
    network = backend.network_for(4)
    (_, state), *_ = network.contexts.states.items()
    references = [weakref.ref(thing) for thing in (state.context, network._engine)]
    del network
    child = os.fork()
    if not child:
        with contextlib.suppress(BaseException):
            backend.close()
            del backend, state
            gc.collect()
            os._exit(sum(reference() is None for reference in references))
        os._exit(99)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    del backend, state
    gc.collect()
    assert [reference() for reference in references] == [None, None]


def test_cuda_context_of_the_caller_is_restored(bench: Bench) -> None:
    callers = 9
    bench.driver.stack().append(callers)
    batch = batch_of([4, 4])
    for open_one in (bench.whole, bench.pair):
        backend: Any = open_one()
        assert bench.driver.stack() == [callers]
        backend.time_gpu(True)
        backend.run(batch)
        assert backend.memory_report().device > 0
        bench.library.failing["execute_async_v3"] = "shape mismatch"
        with raises(DeviceError, "gpu_call_failed", "tensorrt 10.16.1.11", "shape mismatch"):
            backend.run(batch)
        bench.library.failing.clear()
        assert bench.driver.stack() == [callers]
        backend.close()
        assert bench.driver.stack() == [callers]
    bench.driver.room = 6000
    with raises(DeviceError, "out_of_memory"):
        bench.whole()
    assert bench.driver.stack() == [callers]
