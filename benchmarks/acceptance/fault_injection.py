"""Inject one fault in this process, which may crash.

    python -m benchmarks.acceptance.fault_injection FAULT MODEL DATA DEVICE

The last line of the output is JSON: whether the outcome is the expected one, and a sentence. Faults that do not need a
GPU are rehearsed on a CPU.
"""

from __future__ import annotations

import contextlib
import gc
import json
import multiprocessing
import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from runtime.backends.base import Device
from runtime.core.errors import DeviceError, GroundingError
from runtime.core.moments import Moment
from runtime.core.video import Video
from runtime.datasets.dataset import DataSet
from runtime.grounding.grounder import Grounder

# Tolerance in seconds of the boundaries of a moment between batch sizes.
TOLERANCE_S = 0.05
CHILD_SECONDS = 60
# Free GPU memory in bytes that is enough to work, but too little for a large batch.
LEFT_FREE = 96 << 20
MANY = 4096
ROUNDS = 3

Pairs = list[tuple[Video, str]]
Outcome = dict[str, Any]


def outcome(ok: bool, sentence: str) -> Outcome:
    """Return the outcome of a fault as JSON."""
    return {"ok": ok, "told": sentence}


def threads(model: Path, device: Device, pairs: Pairs) -> Outcome:
    """Share a Grounder among four threads: each must get the answers of a single thread, or an error."""
    grounder = Grounder.load(model, device)
    expected = [grounder.ground(*pair) for pair in pairs]
    results: list[list[list[Moment]]] = [[] for _ in range(4)]
    errors: list[Exception] = []

    def ask(index: int) -> None:
        try:
            for _ in range(ROUNDS):
                results[index] = [grounder.ground(*pair) for pair in pairs]
        except Exception as error:
            errors.append(error)

    workers = [threading.Thread(target=ask, args=(index,)) for index in range(len(results))]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    if errors:
        clear = all(isinstance(error, GroundingError) for error in errors)
        return outcome(clear, f"Threads get an error: {type(errors[0]).__name__}: {errors[0]}")
    worst = max(_distance(answers, expected) for answers in results)
    count = ROUNDS * len(results) * len(pairs)
    return outcome(
        worst <= TOLERANCE_S,
        f"{len(results)} threads ran {count} queries; boundaries differ by {worst:.2g} s at most.",
    )


def fork(model: Path, device: Device, pairs: Pairs) -> Outcome:
    """Use a Grounder in a process that was forked after CUDA started: it must get the right answer or an error.

    Raises:
        DeviceError: there is no GPU.
    """
    grounder = Grounder.load(model, device)
    expected = [grounder.ground(*pair) for pair in pairs[:2]]
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)

    def ask() -> None:
        try:
            theirs.send(_distance([grounder.ground(*pair) for pair in pairs[:2]], expected))
        except Exception as error:
            theirs.send(f"{type(error).__name__}: {str(error).splitlines()[0]}")
        if model.suffix != ".pt":
            # As at the end of a process. The resources on the GPU belong to the parent.
            del grounder.backend
            gc.collect()
        os._exit(0)

    child = context.Process(target=ask)
    child.start()
    theirs.close()
    answer: Any = None
    if ours.poll(CHILD_SECONDS):
        with contextlib.suppress(EOFError):
            answer = ours.recv()
    else:
        child.kill()
        return outcome(False, f"The forked process hung for {CHILD_SECONDS} s.")
    child.join(CHILD_SECONDS)
    if child.exitcode is None:
        child.kill()
        return outcome(False, f"The forked process got {answer!r}, and did not end.")
    again = _distance([grounder.ground(*pair) for pair in pairs[:2]], expected)
    if answer is None or child.exitcode:
        return outcome(False, f"The forked process ended with code {child.exitcode}.")
    if isinstance(answer, float):
        return outcome(
            answer <= TOLERANCE_S, f"The forked process answers; boundaries differ by {answer:.2g} s at most."
        )
    return outcome(again <= TOLERANCE_S, f"The forked process got: {answer} The parent still works.")


def ending(model: Path, device: Device, pairs: Pairs) -> Outcome:
    """End the process while a daemon thread runs queries: the exit code must be 0."""
    grounder = Grounder.load(model, device)
    finished = threading.Semaphore(0)

    def ask() -> None:
        # Until the process ends or the model is closed.
        with contextlib.suppress(DeviceError):
            while True:
                grounder.ground_batch(pairs)
                finished.release()

    threading.Thread(target=ask, daemon=True).start()
    started = all(finished.acquire(timeout=CHILD_SECONDS) for _ in range(ROUNDS))
    return outcome(started, "A daemon thread runs queries while the process ends.")


def memory(model: Path, device: Device, pairs: Pairs) -> Outcome:
    """Run a large batch with little GPU memory: answers or an error are expected, and a query that works afterwards."""
    from runtime.backends.cuda_driver import Cuda

    cuda = Cuda()
    grounder = Grounder.load(model, device)
    expected = grounder.ground(*pairs[0])
    many = [pairs[index % len(pairs)] for index in range(MANY)]
    with _full(cuda):
        try:
            answers = grounder.ground_batch(many, batch_size=MANY)
            same = _distance(answers[:1], [expected]) <= TOLERANCE_S
            sentence, clear = f"A batch of {MANY} queries was answered.", same
        except GroundingError as error:
            sentence, clear = f"{type(error).__name__}: {error}", True
        except Exception as error:
            sentence = f"{type(error).__name__}: {str(error).splitlines()[0]}"
            # torch's own error is clear.
            clear = type(error).__name__ == "OutOfMemoryError"
    alive = _distance([grounder.ground(*pairs[0])], [expected]) <= TOLERANCE_S
    after = "A query works afterwards." if alive else "The answer of a query is wrong afterwards."
    return outcome(clear and alive, f"{sentence} {after}")


def opening(model: Path, device: Device, pairs: Pairs) -> Outcome:
    """Open a model with little GPU memory: an error is expected, and it must open once there is memory."""
    from runtime.backends.cuda_driver import Cuda

    cuda = Cuda()
    with _full(cuda):
        try:
            Grounder.load(model, device).ground(*pairs[0])
            sentence, clear = "It opened.", True
        except Exception as error:
            sentence = f"{type(error).__name__}: {str(error).splitlines()[0]}"
            clear = isinstance(error, GroundingError) or type(error).__name__ == "OutOfMemoryError"
    Grounder.load(model, device).ground(*pairs[0])
    return outcome(clear, f"{sentence} With enough memory it opens.")


@contextlib.contextmanager
def _full(cuda: Any) -> Iterator[None]:
    """Allocate the GPU memory except `LEFT_FREE` bytes."""
    taken: list[int] = []
    with cuda.current():
        size = max(cuda.memory()[0] - LEFT_FREE, 0)
        # Free memory may be fragmented.
        while size > LEFT_FREE:
            try:
                taken.append(cuda.allocate(size))
                size = max(cuda.memory()[0] - LEFT_FREE, 0)
            except DeviceError:
                size //= 2
    try:
        yield
    finally:
        with cuda.current():
            for address in taken:
                cuda.free(address)


def _distance(actual: Sequence[list[Moment]], expected: Sequence[list[Moment]]) -> float:
    """Return the largest difference of the boundaries of best moments, in seconds."""
    largest = 0.0
    for moments, others in zip(actual, expected):
        if bool(moments) != bool(others):
            return float("inf")
        if moments:
            best, other = moments[0], others[0]
            largest = max(largest, abs(best.start - other.start), abs(best.end - other.end))
    return largest


FAULTS: dict[str, Callable[[Path, Device, Pairs], Outcome]] = {
    "threads": threads,
    "fork": fork,
    "ending": ending,
    "memory": memory,
    "opening": opening,
}


def main(fault: str, model: str, data: str, device: Any) -> None:
    """Inject a fault, and print its outcome."""
    data_set = DataSet(data)
    chosen = data_set.annotations("test", invalid="drop", quiet=True)[:8]
    pairs = [(data_set.video(annotation.video), annotation.sentence) for annotation in chosen]
    print(json.dumps(FAULTS[fault](Path(model), device, pairs)), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:5])
