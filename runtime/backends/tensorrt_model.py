"""Run one call at a time on a TensorRT model, report its memory, and close it."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from runtime.backends.batch_shapes import row_slices
from runtime.backends.cuda_driver import OutOfDeviceMemory
from runtime.backends.tensorrt_engine import TensorRTEngine
from runtime.core.errors import DeviceError

log = logging.getLogger("drn")


@dataclasses.dataclass(frozen=True)
class MemoryReport:
    """The memory that a model uses, in bytes.

    Attributes:
        plan: size of the plan, most of which are the weights.
        device: buffers on the GPU: scratch of the network, inputs, outputs, encodings.
        pinned: page-locked memory of the host.
        free, total: of the GPU as a whole, as it is now.
    """

    plan: int
    device: int
    pinned: int
    free: int
    total: int


@dataclasses.dataclass(frozen=True)
class PlanUse:
    """The number of queries that one of a model's engines answered.

    Attributes:
        name: file name of the plan.
        max_query_length: tokens of the longest query that it takes.
        queries: number of queries that it has answered since it was opened.
    """

    name: str
    max_query_length: int
    queries: int


# Some rows of a call, rising, and their outputs.
RowOutputs = tuple[np.ndarray, Mapping[str, np.ndarray]]


class TensorRTModel:
    """The engines of a model, their encoding cache and their lifetime."""

    def __init__(self, *networks: TensorRTEngine) -> None:
        self._networks = networks
        self._network = networks[0]
        self._lock = self._network.turn
        for network in networks:
            network.turn = self._lock
        self.device = "cuda"
        self.gpu_name = self._network.cuda.name

    @contextlib.contextmanager
    def _turn(self) -> Iterator[None]:
        """One call at a time, on the GPU that the model is on.

        Raises:
            DeviceError: the model was closed, or this process was forked after it was opened.
        """
        with self._network.cuda.current(), self._lock:
            if any(network.closed for network in self._networks):
                raise DeviceError(
                    f"{self._network.path.name} was closed; open it again to ask it.", code="model_closed"
                )
            yield

    def time_gpu(self, on: bool) -> None:
        """Start or stop measuring what `gpu_ms` returns."""
        with self._turn():
            for network in self._networks:
                network.contexts.timed = on

    @property
    def gpu_ms(self) -> float:
        """Milliseconds that the GPU spent on the network in the last call, without copies, if `time_gpu` is on."""
        return sum(network.contexts.gpu_ms for network in self._networks)

    def memory_report(self) -> MemoryReport:
        """Return what the model holds."""
        with self._turn():
            plan, device, pinned = (sum(sizes) for sizes in zip(*(network.bytes_held for network in self._networks)))
            free, total = self._network.cuda.memory()
            return MemoryReport(plan, device, pinned, free, total)

    def close(self) -> None:
        """Free the GPU's memory; the model cannot run any more."""
        # In a forked process there is nothing to free, and who held the lock is not there.
        if not self._network.cuda.usable:
            return
        with self._lock:
            for network in self._networks:
                network.close()

    def _reset_clock(self) -> None:
        for network in self._networks:
            network.contexts.gpu_ms = 0.0

    def _answer(self, rows: np.ndarray, run: Callable[[np.ndarray], Mapping[str, np.ndarray]]) -> list[RowOutputs]:
        """Return rows and their outputs; where memory does not do, what is kept is given back and halves are tried.

        Raises:
            DeviceError: a half is still too much.
        """
        try:
            return [(rows, run(rows))]
        except OutOfDeviceMemory as error:
            log.info("The GPU's memory is full (%s); trying again in two halves.", error)
        for network in self._networks:
            network.contexts.release()
        answers = []
        for half in np.array_split(rows, 2) if len(rows) > 1 else [rows]:
            try:
                answers.append((half, run(half)))
            except OutOfDeviceMemory as error:
                free, total = self._network.cuda.memory()
                raise DeviceError(
                    f"The GPU's memory is full ({free / 2**20:.0f} of {total / 2**20:.0f} MiB are free), also for "
                    f"{len(half)} at once; end what else uses it, or ask in smaller batches.",
                    code="out_of_memory",
                ) from error
        return answers

    def _in_pieces(self, network: TensorRTEngine, axis: str, name: str, array: np.ndarray, output: str) -> np.ndarray:
        """Return an output of a network of one input, of which no more rows go through together than it takes."""
        most = max(profile.ranges[axis].max for profile in network.domains)

        def some(rows: np.ndarray) -> Mapping[str, np.ndarray]:
            return network.run({name: array[as_slice(rows)]}, {axis: len(rows)})

        with self._turn():
            self._reset_clock()
            results = [
                answer[output]
                for part in row_slices(len(array), most)
                for _, answer in self._answer(np.arange(part.start, part.stop), some)
            ]
        if not results:
            return network.nothing()[output]
        return results[0] if len(results) == 1 else np.concatenate(results)


def as_slice(rows: np.ndarray) -> Any:
    """Rows as a slice where they follow each other, so that nothing is copied before it is staged."""
    first, last = int(rows[0]), int(rows[-1])
    return slice(first, last + 1) if last - first + 1 == len(rows) else rows
