"""Cause one fault on a GPU, in a process of its own, which may crash.

    python -m benchmarks.acceptance.fault_injection FAULT MODEL DATA

The last line that it prints is JSON: whether the outcome is the expected one, and what was seen. `benchmarks.gpu` runs
these; whether the device is a GPU is up to the model's library, so that what needs none is rehearsed on a CPU.
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

# Seconds by which the same answer may differ from one batch size to another.
SAME_S = 0.05
CHILD_SECONDS = 60
# What is left free of the GPU's memory: enough to live, too little for a large batch.
LEFT_FREE = 96 << 20
MANY = 4096
ROUNDS = 3

Pairs = list[tuple[Video, str]]
Seen = dict[str, Any]


def seen(ok: bool, told: str) -> Seen:
    return {"ok": ok, "told": told}


def threads(model: Path, device: Device, pairs: Pairs) -> Seen:
    """Four threads share one Grounder: each must get the answers that one alone gets, or a clear error."""
    grounder = Grounder.load(model, device)
    wanted = [grounder.ground(*pair) for pair in pairs]
    found: list[list[list[Moment]]] = [[] for _ in range(4)]
    errors: list[Exception] = []

    def ask(index: int) -> None:
        try:
            for _ in range(ROUNDS):
                found[index] = [grounder.ground(*pair) for pair in pairs]
        except Exception as error:
            errors.append(error)

    workers = [threading.Thread(target=ask, args=(index,)) for index in range(len(found))]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    if errors:
        clear = all(isinstance(error, GroundingError) for error in errors)
        return seen(clear, f"Threads are refused: {type(errors[0]).__name__}: {errors[0]}")
    worst = max(_distance(answers, wanted) for answers in found)
    count = ROUNDS * len(found) * len(pairs)
    return seen(
        worst <= SAME_S, f"{len(found)} threads asked {count} queries; borders differ by {worst:.2g} s at most."
    )


def fork(model: Path, device: Device, pairs: Pairs) -> Seen:
    """A process forked after CUDA started asks the parent's Grounder: the right answer or an error, no crash, no hang.

    Raises:
        DeviceError: by the runtime, where there is no GPU.
    """
    grounder = Grounder.load(model, device)
    wanted = [grounder.ground(*pair) for pair in pairs[:2]]
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)

    def ask() -> None:
        try:
            theirs.send(_distance([grounder.ground(*pair) for pair in pairs[:2]], wanted))
        except Exception as error:
            theirs.send(f"{type(error).__name__}: {str(error).splitlines()[0]}")
        if model.suffix != ".pt":
            # As where the child ends by itself: what is on the GPU is its parent's, and must not be destroyed here.
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
        return seen(False, f"The forked process hung for {CHILD_SECONDS} s.")
    child.join(CHILD_SECONDS)
    if child.exitcode is None:
        child.kill()
        return seen(False, f"The forked process was told {answer!r}, and did not end.")
    again = _distance([grounder.ground(*pair) for pair in pairs[:2]], wanted)
    if answer is None or child.exitcode:
        return seen(False, f"The forked process died with code {child.exitcode}.")
    if isinstance(answer, float):
        return seen(answer <= SAME_S, f"The forked process answers; borders differ by {answer:.2g} s at most.")
    return seen(again <= SAME_S, f"The forked process was told: {answer} The parent goes on.")


def ending(model: Path, device: Device, pairs: Pairs) -> Seen:
    """The process ends while a daemon thread asks: nothing is freed under it, and the exit code is 0."""
    grounder = Grounder.load(model, device)
    asked = threading.Semaphore(0)

    def ask() -> None:
        # Until the process is no more, or the model is closed.
        with contextlib.suppress(DeviceError):
            while True:
                grounder.ground_batch(pairs)
                asked.release()

    threading.Thread(target=ask, daemon=True).start()
    begun = all(asked.acquire(timeout=CHILD_SECONDS) for _ in range(ROUNDS))
    return seen(begun, "A daemon thread asks while the process ends; it ends well unless a code is told here.")


def memory(model: Path, device: Device, pairs: Pairs) -> Seen:
    """The GPU is full: a large batch ends in answers or one clear error, and a single query works afterwards."""
    from runtime.backends.cuda_driver import Cuda

    cuda = Cuda()
    grounder = Grounder.load(model, device)
    wanted = grounder.ground(*pairs[0])
    many = [pairs[index % len(pairs)] for index in range(MANY)]
    with _full(cuda):
        try:
            answers = grounder.ground_batch(many, batch_size=MANY)
            same = _distance(answers[:1], [wanted]) <= SAME_S
            told, clear = f"{MANY} queries at once were answered all the same.", same
        except GroundingError as error:
            told, clear = f"{type(error).__name__}: {error}", True
        except Exception as error:
            told = f"{type(error).__name__}: {str(error).splitlines()[0]}"
            # torch's own error says what happened and what to do, and is what users of torch expect.
            clear = type(error).__name__ == "OutOfMemoryError"
    alive = _distance([grounder.ground(*pairs[0])], [wanted]) <= SAME_S
    after = "Afterwards one query is answered." if alive else "Afterwards one query is answered wrongly."
    return seen(clear and alive, f"{told} {after}")


def opening(model: Path, device: Device, pairs: Pairs) -> Seen:
    """The GPU is full when a model is opened: one clear error, and it opens once there is room."""
    from runtime.backends.cuda_driver import Cuda

    cuda = Cuda()
    with _full(cuda):
        try:
            Grounder.load(model, device).ground(*pairs[0])
            told, clear = "It opened in what little was left.", True
        except Exception as error:
            told = f"{type(error).__name__}: {str(error).splitlines()[0]}"
            clear = isinstance(error, GroundingError) or type(error).__name__ == "OutOfMemoryError"
    Grounder.load(model, device).ground(*pairs[0])
    return seen(clear, f"{told} With room it opens.")


@contextlib.contextmanager
def _full(cuda: Any) -> Iterator[None]:
    """Keep all but a little of the GPU's memory."""
    taken: list[int] = []
    with cuda.current():
        size = max(cuda.memory()[0] - LEFT_FREE, 0)
        # What is free is not always in one piece.
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


def _distance(found: Sequence[list[Moment]], wanted: Sequence[list[Moment]]) -> float:
    """Return the largest difference of a border of best moments, in seconds."""
    worst = 0.0
    for ours, theirs in zip(found, wanted):
        if bool(ours) != bool(theirs):
            return float("inf")
        if ours:
            worst = max(worst, abs(ours[0].start - theirs[0].start), abs(ours[0].end - theirs[0].end))
    return worst


FAULTS: dict[str, Callable[[Path, Device, Pairs], Seen]] = {
    "threads": threads,
    "fork": fork,
    "ending": ending,
    "memory": memory,
    "opening": opening,
}


def main(fault: str, model: str, data: str, device: Any) -> None:
    data_set = DataSet(data)
    chosen = data_set.annotations("test", invalid="drop", quiet=True)[:8]
    pairs = [(data_set.video(annotation.video), annotation.sentence) for annotation in chosen]
    print(json.dumps(FAULTS[fault](Path(model), device, pairs)), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:5])
