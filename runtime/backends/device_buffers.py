"""Allocate the device and page-locked memory of one engine, and copy between the two."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from runtime.backends.batch_shapes import Shape, TensorSlice
from runtime.backends.cuda_driver import Cuda, CudaError


class DeviceBuffers:
    """The memory, stream and events of one engine, allocated once.

    All inputs share one buffer, so that one copy moves them to the GPU; so do all outputs.

    Attributes:
        stream: handle of the stream on which the engine and its copies run.
        events: handles of the events at the start and the end of a timed run.
        scratch: GPU address of the memory that all contexts share.
        device_in, device_out: GPU addresses of inputs and outputs.
        host_in, host_out: page-locked memory of the same sizes, (bytes,) uint8.
        encodings: GPU addresses of the encoded videos, by number of slots (profiles differ in it) and tensor name.
        staging: page-locked source of each tensor of `encodings`, of the same shape.
    """

    def __init__(self, cuda: Cuda) -> None:
        self.cuda = cuda
        self.encodings: dict[tuple[int, str], int] = {}
        self.staging: dict[tuple[int, str], np.ndarray] = {}
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
        """Allocate the tensors of encodings, once for each number of slots.

        Args:
            shapes: tensor name to shape, (slots, ...).
        """
        for name, shape in shapes.items():
            key = (shape[0], name)
            if key not in self.encodings:
                layout = TensorSlice(0, shape, dtypes[name])
                self.encodings[key] = self._allocate(layout.size)
                self.staging[key] = layout.view(self._pin(layout.size))

    def allocate_inputs_and_outputs(self, bytes_in: int, bytes_out: int) -> None:
        """Allocate the buffers of inputs and of outputs, on the device and the host."""
        self.device_in, self.device_out = self._allocate(bytes_in), self._allocate(bytes_out)
        self.host_in, self.host_out = self._pin(bytes_in), self._pin(bytes_out)

    def copy_in(self, size: int) -> None:
        """Enqueue a copy of the first `size` bytes of the inputs to the device."""
        self.cuda.copy_in(self.device_in, self.host_in.ctypes.data, size, self.stream)

    def copy_out(self, size: int) -> None:
        """Enqueue a copy of the first `size` bytes of the outputs from the device."""
        self.cuda.copy_out(self.host_out.ctypes.data, self.device_out, size, self.stream)

    def upload(self, name: str, slots: int, slot: int) -> None:
        """Enqueue a copy of one encoding from `staging` to its slot on the device."""
        host = self.staging[slots, name][slot]
        self.cuda.copy_in(self.encodings[slots, name] + slot * host.nbytes, host.ctypes.data, host.nbytes, self.stream)

    @property
    def pinned_bytes(self) -> int:
        """Return the bytes of page-locked host memory."""
        return sum(array.nbytes for array in self._pinned)

    def synchronize(self) -> None:
        """Wait for all enqueued work; CudaError if any of it failed."""
        for stream in self._streams:
            self.cuda.synchronize(stream)

    def free(self) -> None:
        """Free everything; errors are ignored."""
        owned: list[tuple[Callable[[Any], None], list[Any]]] = [
            (self.cuda.free, self._device),
            (self.cuda.unpin, self._pinned),
            (self.cuda.destroy_event, self._events),
            (self.cuda.destroy_stream, self._streams),
        ]
        for free, resources in owned:
            for resource in resources:
                with contextlib.suppress(CudaError):
                    free(resource)
            resources.clear()

    def _allocate(self, size: int) -> int:
        self._device.append(self.cuda.allocate(size))
        self.device_bytes += size
        return self._device[-1]

    def _pin(self, size: int) -> np.ndarray:
        self._pinned.append(self.cuda.pinned(size))
        return self._pinned[-1]
