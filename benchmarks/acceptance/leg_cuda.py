"""Run the leg `cuda`: check `runtime.backends.cuda_driver`, with the driver, Python and NumPy only."""

from __future__ import annotations

import importlib.util
import multiprocessing
import os
import threading
import time
from typing import Any

import numpy as np

from benchmarks.acceptance.run_config import Job
from benchmarks.acceptance.step_log import Found, Leg, Skip, no_promise
from runtime.backends.cuda_driver import Cuda, CudaError, OutOfDeviceMemory
from runtime.core.errors import DeviceError

COPY_BYTES = 1 << 20
# Size of throughput measurements.
LARGE_BYTES = 256 << 20
REPLAYS, ROUNDS, THREADS = 50, 50, 2
CHILD_SECONDS = 30
# Error of the wall clock, by which a time between events may exceed it.
CLOCK_SLACK_MS = 0.5


def run(job: Job, leg: Leg) -> None:
    """Check the calls of the driver that engines use."""
    try:
        cuda = open_gpu()
    except DeviceError as error:
        raise Skip(str(error)) from error
    size = COPY_BYTES if job.rehearsal else LARGE_BYTES
    leg.step("driver", lambda: no_promise(f"{cuda.name}, CUDA {cuda.driver}, compute capability {cuda.capability}."))
    leg.step("memory", lambda: _memory(cuda))
    leg.step("pinned copies", lambda: _copies(cuda, size))
    leg.step("graph of copies", lambda: _graph(cuda))
    leg.step("elapsed time", lambda: _elapsed(cuda, size))
    leg.step("out of memory", lambda: _out_of_memory(cuda))
    leg.step("two threads", lambda: _threads(cuda))
    leg.step("capture broken by a wait", lambda: _broken_capture(cuda))
    leg.step("torch on the same device", lambda: _torch(job, cuda))
    leg.step("fork", lambda: _fork(cuda))


def open_gpu() -> Cuda:
    """Open the first GPU; raises DeviceError if there is none."""
    return Cuda()


class Buffers:
    """Two page-locked arrays, a device buffer of `size` bytes and a stream, freed at the end of a `with` statement."""

    def __init__(self, cuda: Cuda, size: int) -> None:
        self.cuda, self.size = cuda, size

    def __enter__(self) -> Buffers:
        cuda = self.cuda
        self.stream, self.address = cuda.stream(), cuda.allocate(self.size)
        self.source, self.target = cuda.pinned(self.size), cuda.pinned(self.size)
        return self

    def __exit__(self, *_: object) -> None:
        self.cuda.unpin(self.source)
        self.cuda.unpin(self.target)
        self.cuda.free(self.address)
        self.cuda.destroy_stream(self.stream)

    def enqueue_copies(self) -> None:
        """Enqueue a copy to the GPU and one back."""
        self.cuda.copy_in(self.address, self.source.ctypes.data, self.size, self.stream)
        self.cuda.copy_out(self.target.ctypes.data, self.address, self.size, self.stream)

    def fill(self, seed: int) -> None:
        """Fill the source with random bytes, and the target with zeros."""
        self.source[:] = np.random.default_rng(seed).integers(0, 256, self.size, np.uint8)
        self.target[:] = 0

    @property
    def is_equal(self) -> bool:
        """Whether both arrays are equal."""
        return bool(np.array_equal(self.source[: self.size], self.target[: self.size]))


def _memory(cuda: Cuda) -> Found:
    with cuda.current():
        free, total = cuda.memory()
        address = cuda.allocate(COPY_BYTES)
        left = cuda.memory()[0]
        cuda.free(address)
    broken = [] if address % 256 == 0 else [f"an allocation at {address:#x} is not aligned to 256 bytes"]
    # Only bounds, because other processes may use the GPU.
    broken += [] if 0 < left <= total and free <= total else [f"{free}, then {left} of {total} bytes were free"]
    summary = f"{free / 2**30:.1f} of {total / 2**30:.1f} GiB are free."
    return Found(summary, {"free_bytes": free, "total_bytes": total}, broken)


def _copies(cuda: Cuda, size: int) -> Found:
    with cuda.current(), Buffers(cuda, size) as buffers:
        buffers.fill(0)
        seconds = []
        for _ in range(3):
            started = time.perf_counter()
            buffers.enqueue_copies()
            cuda.synchronize(buffers.stream)
            seconds.append(time.perf_counter() - started)
        broken = [] if buffers.is_equal else ["the copied bytes differ"]
    rate = 2 * size / min(seconds) / 1e9
    return Found(f"{size >> 20} MiB to the GPU and back: {rate:.1f} GB/s.", {"GB/s": rate}, broken)


def _graph(cuda: Cuda) -> Found:
    """Capture a copy to the GPU and back, and replay it with different bytes."""
    with cuda.current(), Buffers(cuda, COPY_BYTES) as buffers:
        cuda.begin_capture(buffers.stream)
        buffers.enqueue_copies()
        graph = cuda.end_capture(buffers.stream)
        wrong = 0
        seconds = []
        for number in range(REPLAYS):
            buffers.fill(number)
            started = time.perf_counter()
            cuda.launch(graph, buffers.stream)
            cuda.synchronize(buffers.stream)
            seconds.append(time.perf_counter() - started)
            wrong += not buffers.is_equal
        cuda.destroy_graph(graph)
    p50 = 1e6 * float(np.median(seconds))
    broken = [f"the bytes of {wrong} of {REPLAYS} replays differ"] if wrong else []
    return Found(f"{REPLAYS} replays; launch and wait take {p50:.0f} us (p50).", {"p50_us": p50}, broken)


def _elapsed(cuda: Cuda, size: int) -> Found:
    """Compare the time between two events with the wall clock."""
    with cuda.current(), Buffers(cuda, size) as buffers:
        begin, end = cuda.event(), cuda.event()
        started = time.perf_counter()
        cuda.record(begin, buffers.stream)
        buffers.enqueue_copies()
        cuda.record(end, buffers.stream)
        cuda.synchronize(buffers.stream)
        wall_ms = 1e3 * (time.perf_counter() - started)
        event_ms = cuda.elapsed_ms(begin, end)
        cuda.destroy_event(begin)
        cuda.destroy_event(end)
    broken = [] if 0 <= event_ms <= wall_ms + CLOCK_SLACK_MS else ["events and wall clock disagree"]
    values = {"event_ms": event_ms, "wall_ms": wall_ms}
    return Found(f"{event_ms:.3f} ms by events, {wall_ms:.3f} ms by the wall clock.", values, broken)


def _out_of_memory(cuda: Cuda) -> Found:
    """Request more memory than the GPU has, then a small amount, which must succeed."""
    with cuda.current():
        total = cuda.memory()[1]
        try:
            address = cuda.allocate(total + (1 << 30))
        except OutOfDeviceMemory as error:
            summary, broken = str(error), []
        except CudaError as error:
            summary, broken = str(error), ["the error is not recognized as out of memory"]
        else:
            cuda.free(address)
            summary, broken = "", ["more memory was allocated than the GPU has"]
        cuda.free(cuda.allocate(COPY_BYTES))
    return Found(summary, {"message": summary}, broken)


def _threads(cuda: Cuda) -> Found:
    """Copy in two threads, each on its own stream."""
    wrong, errors = [0] * THREADS, []

    def work(index: int) -> None:
        try:
            with cuda.current(), Buffers(cuda, COPY_BYTES) as buffers:
                for number in range(ROUNDS):
                    buffers.fill(ROUNDS * index + number)
                    buffers.enqueue_copies()
                    cuda.synchronize(buffers.stream)
                    wrong[index] += not buffers.is_equal
        except Exception as error:
            errors.append(f"{type(error).__name__}: {error}")

    workers = [threading.Thread(target=work, args=(index,)) for index in range(THREADS)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    broken = [*errors, *([f"the bytes of {sum(wrong)} copies differ"] if any(wrong) else [])]
    return Found(f"{THREADS} threads made {ROUNDS} copies each.", {"wrong": sum(wrong)}, broken)


def _broken_capture(cuda: Cuda) -> Found:
    """Synchronize a stream during a capture, which CUDA rejects; the stream must work afterwards."""
    with cuda.current(), Buffers(cuda, COPY_BYTES) as buffers:
        cuda.begin_capture(buffers.stream)
        buffers.enqueue_copies()
        try:
            cuda.synchronize(buffers.stream)
        except CudaError as error:
            summary, broken = str(error), []
        else:
            summary, broken = "", ["synchronizing during a capture was not rejected"]
        cuda.drop_capture(buffers.stream)
        buffers.fill(1)
        buffers.enqueue_copies()
        cuda.synchronize(buffers.stream)
        if not buffers.is_equal:
            broken.append("copied bytes differ after a broken capture")
    return Found(summary, {"message": summary}, broken)


def _torch(job: Job, cuda: Cuda) -> Found:
    """Use torch on the same GPU before, during and after driver calls, and read its memory with them."""
    if job.rehearsal:
        raise Skip("torch uses the same device on a GPU only.")
    if importlib.util.find_spec("torch") is None:
        raise Skip("torch cannot be imported.")
    import torch

    if not torch.cuda.is_available():
        raise Skip(f"torch {torch.__version__} finds no GPU.")
    values = torch.arange(COPY_BYTES // 4, dtype=torch.float32, device="cuda:0")
    torch.cuda.synchronize()
    with cuda.current(), Buffers(cuda, COPY_BYTES) as buffers:
        cuda.copy_out(buffers.target.ctypes.data, values.data_ptr(), COPY_BYTES, buffers.stream)
        cuda.synchronize(buffers.stream)
        ours = buffers.target[:COPY_BYTES].view(np.float32).copy()
        doubled = (2 * values).cpu().numpy()
    after = (3 * values).cpu().numpy()
    expected = np.arange(COPY_BYTES // 4, dtype=np.float32)
    pairs = {"our copy of torch's memory": (ours, expected), "torch within our calls": (doubled, 2 * expected)}
    pairs["torch after our calls"] = (after, 3 * expected)
    broken = [f"{name} is wrong" for name, (actual, right) in pairs.items() if not np.array_equal(actual, right)]
    if torch.cuda.current_device() != 0:
        broken.append(f"torch's device is {torch.cuda.current_device()} afterwards")
    return Found(f"torch {torch.__version__} and our calls share {torch.cuda.get_device_name(0)}.", {}, broken)


def _fork(cuda: Cuda) -> Found:
    """Use the GPU in a forked process: the expected result is an error there, and a parent that still works."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)

    def child() -> None:
        try:
            with cuda.current():
                theirs.send("")
        except Exception as error:
            theirs.send(f"{type(error).__name__}: {error}")
        os._exit(0)

    process: Any = context.Process(target=child)
    process.start()
    theirs.close()
    answered = ours.poll(CHILD_SECONDS)
    summary = ours.recv() if answered else ""
    process.join(CHILD_SECONDS)
    if process.exitcode is None:
        process.kill()
        return Found("", broken=[f"the forked process hung for {CHILD_SECONDS} s"])
    with cuda.current():
        cuda.free(cuda.allocate(COPY_BYTES))
    broken = [] if summary.startswith("DeviceError") else [f"the forked process got {summary!r} instead of an error"]
    broken += [] if process.exitcode == 0 else [f"the forked process ended with code {process.exitcode}"]
    return Found(f"The forked process gets: {summary}", {"message": summary}, broken)
