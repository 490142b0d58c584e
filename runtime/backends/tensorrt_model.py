"""Run one call at a time on a TensorRT model, report its memory, and close it."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping

import numpy as np

from runtime.backends.batch_shapes import RowOutputs, as_slice, row_slices
from runtime.backends.cuda_driver import OutOfDeviceMemory
from runtime.backends.tensorrt_engine import TensorRTEngine
from runtime.core.errors import DeviceError

log = logging.getLogger("drn")


@dataclasses.dataclass(frozen=True)
class MemoryReport:
    """The memory that a model uses, in bytes.

    Attributes:
        plan: size of the plans, mostly weights.
        device: buffers on the GPU: scratch memory, inputs, outputs and encodings.
        pinned: page-locked memory of the host.
        free, total: memory of the GPU at present.
    """

    plan: int
    device: int
    pinned: int
    free: int
    total: int


@dataclasses.dataclass(frozen=True)
class PlanUse:
    """The number of queries that one engine of a model has run."""

    name: str
    max_query_length: int
    queries: int


class TensorRTModel:
    """The engines of a model, their encoding cache and their lifetime.

    Calls raise ShapeError for arrays that do not fit the engine, and DeviceError if the GPU failed, its memory is full,
    or this process was forked after the engine was opened.
    """

    def __init__(self, *networks: TensorRTEngine) -> None:
        self._networks = networks
        self._network = networks[0]
        self._lock = self._network.lock
        for network in networks:
            network.lock = self._lock
        self.device = "cuda"
        self.gpu_name = self._network.cuda.name

    @contextlib.contextmanager
    def _exclusive(self) -> Iterator[None]:
        """Run one call at a time, with the model's GPU current.

        Raises:
            DeviceError: the model was closed, or this process was forked after it was opened.
        """
        with self._network.cuda.current(), self._lock:
            if any(network.closed for network in self._networks):
                raise DeviceError(f"{self._network.path.name} was closed. Open it again.", code="model_closed")
            yield

    def time_gpu(self, on: bool) -> None:
        """Start or stop the measurement that `gpu_ms` returns."""
        with self._exclusive():
            for network in self._networks:
                network.contexts.timed = on

    @property
    def gpu_ms(self) -> float:
        """Return the GPU time of the networks in the last call, in milliseconds without copies, if it is measured."""
        return sum(network.contexts.gpu_ms for network in self._networks)

    def memory_report(self) -> MemoryReport:
        """Return the memory that the engines of the model use."""
        with self._exclusive():
            plan, device, pinned = (sum(sizes) for sizes in zip(*(network.memory_bytes for network in self._networks)))
            free, total = self._network.cuda.memory()
            return MemoryReport(plan, device, pinned, free, total)

    def close(self) -> None:
        """Free the GPU's memory; the model cannot run afterwards."""
        # A forked process has nothing to free, and its copy of the lock may be locked forever.
        if not self._network.cuda.usable:
            return
        with self._lock:
            for network in self._networks:
                network.close()

    def _run_parts(
        self, parts: Iterable[np.ndarray], run: Callable[[np.ndarray], Mapping[str, np.ndarray]]
    ) -> list[RowOutputs]:
        """Run the rows of each part while no other call runs, and return rows and outputs."""
        with self._exclusive():
            for network in self._networks:
                network.contexts.gpu_ms = 0.0
            return [output for rows in parts for output in self._run_part(rows, run)]

    def _run_part(self, rows: np.ndarray, run: Callable[[np.ndarray], Mapping[str, np.ndarray]]) -> list[RowOutputs]:
        """Return rows and their outputs. If memory runs out, release all contexts and run two halves.

        Raises:
            DeviceError: a half does not fit either.
        """
        try:
            return [(rows, run(rows))]
        except OutOfDeviceMemory as error:
            log.info("The GPU's memory is full (%s). Trying again in two halves.", error)
        for network in self._networks:
            network.contexts.release()
        outputs = []
        for half in np.array_split(rows, 2) if len(rows) > 1 else [rows]:
            try:
                outputs.append((half, run(half)))
            except OutOfDeviceMemory as error:
                free, total = self._network.cuda.memory()
                raise DeviceError(
                    f"The GPU's memory is full for a batch of {len(half)}; {free / 2**20:.0f} of {total / 2**20:.0f} "
                    "MiB are free. End other programs on the GPU, or use smaller batches.",
                    code="out_of_memory",
                ) from error
        return outputs

    def _run_one_input(
        self, network: TensorRTEngine, axis: str, name: str, array: np.ndarray, output: str
    ) -> np.ndarray:
        """Return an output of a network with one input, run in parts of the largest size that it accepts."""

        def run(rows: np.ndarray) -> Mapping[str, np.ndarray]:
            return network.run({name: array[as_slice(rows)]}, {axis: len(rows)})

        outputs = self._run_parts(row_slices(len(array), network.max_size(axis)), run)
        results = [values[output] for _, values in outputs]
        if not results:
            return network.empty_outputs()[output]
        return results[0] if len(results) == 1 else np.concatenate(results)
