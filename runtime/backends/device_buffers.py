"""Allocate the device and page-locked memory of one engine, and copy between the two."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from runtime.backends.batch_shapes import Shape, TensorSlice
from runtime.backends.cuda_driver import Cuda, CudaError


class DeviceBuffers:
    """The memory, the stream and the events of one engine, allocated once.

    Inputs lie side by side, so that one copy takes them to the GPU, and so do outputs.

    Args:
        cuda: the GPU.

    Attributes:
        stream: on which the engine runs and its tensors are copied.
        events: two, for the time between them.
        scratch: address of the memory that all contexts share.
        device_in, device_out: addresses of inputs and outputs.
        host_in, host_out: page-locked memory of the same sizes, (bytes,) uint8.
        encodings: addresses of the tensors of encodings, by their number of slots (profiles may differ) and name.
        staged: page-locked memory of the same shapes, from which they are copied.
        device_bytes: allocated on the device.
    """

    def __init__(self, cuda: Cuda) -> None:
        self.cuda = cuda
        self.encodings: dict[tuple[int, str], int] = {}
        self.staged: dict[tuple[int, str], np.ndarray] = {}
        self.device_bytes = 0
        self._device: list[int] = []
        self._pinned: list[np.ndarray] = []
        self._streams: list[int] = []
        self._events: list[int] = []

    def create_stream(self) -> None:
        """Create the stream and the events."""
        self.stream = self.cuda.stream()
        self._streams.append(self.stream)
        for _ in range(2):
            self._events.append(self.cuda.event())
        self.events = tuple(self._events)

    def allocate_scratch(self, size: int) -> None:
        self.scratch = self._allocate(size)

    def allocate_encodings(self, shapes: Mapping[str, Shape], dtypes: Mapping[str, np.dtype]) -> None:
        """Allocate the tensors of encodings, (slots, ...) each, unless there are such of so many slots."""
        for name, shape in shapes.items():
            key = (shape[0], name)
            if key not in self.encodings:
                region = TensorSlice(0, shape, dtypes[name])
                self.encodings[key] = self._allocate(region.size)
                self.staged[key] = region.view(self._pin(region.size))

    def allocate_staging(self, bytes_in: int, bytes_out: int) -> None:
        """Allocate inputs and outputs of at most so many bytes."""
        self.device_in, self.device_out = self._allocate(bytes_in), self._allocate(bytes_out)
        self.host_in, self.host_out = self._pin(bytes_in), self._pin(bytes_out)

    def copy_in(self, size: int) -> None:
        """Copy the first bytes of the inputs to the device, on the stream."""
        self.cuda.copy_in(self.device_in, self.host_in.ctypes.data, size, self.stream)

    def copy_out(self, size: int) -> None:
        """Copy the first bytes of the outputs from the device, on the stream."""
        self.cuda.copy_out(self.host_out.ctypes.data, self.device_out, size, self.stream)

    def upload(self, name: str, slots: int, slot: int) -> None:
        """Copy one encoding from `staged` to the device, ahead of the next run.

        Each part of `staged` is copied to one slot alone, so that nothing has to wait before it is written again.
        """
        host = self.staged[slots, name][slot]
        self.cuda.copy_in(self.encodings[slots, name] + slot * host.nbytes, host.ctypes.data, host.nbytes, self.stream)

    @property
    def pinned_bytes(self) -> int:
        """Page-locked memory of the host."""
        return sum(array.nbytes for array in self._pinned)

    def synchronize(self) -> None:
        """Wait for all that is on the stream; CudaError if it failed."""
        for stream in self._streams:
            self.cuda.synchronize(stream)

    def free(self) -> None:
        """Free everything; what cannot be freed is left."""
        freed: list[tuple[Callable[[Any], None], Sequence[Any]]] = [
            (self.cuda.free, self._device),
            (self.cuda.unpin, self._pinned),
            (self.cuda.destroy_event, self._events),
            (self.cuda.destroy_stream, self._streams),
        ]
        for free, resources in freed:
            for resource in resources:
                with contextlib.suppress(CudaError):
                    free(resource)
        self._device, self._pinned, self._events, self._streams = [], [], [], []

    def _allocate(self, size: int) -> int:
        self._device.append(self.cuda.allocate(size))
        self.device_bytes += size
        return self._device[-1]

    def _pin(self, size: int) -> np.ndarray:
        self._pinned.append(self.cuda.pinned(size))
        return self._pinned[-1]
