"""Call the CUDA driver through ctypes, so that an engine runs without a CUDA package.

The primary context of the device is used, which TensorRT and torch share. Each call restores the context of its caller.
A forked process neither uses nor destroys the resources of its parent.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import weakref
from collections.abc import Iterator
from typing import Any

import numpy as np

from runtime.core.errors import DeviceError

LIBRARY = "libcuda.so.1"
OUT_OF_MEMORY = 2
_NON_BLOCKING = 1
# Allocations in other threads, as of torch, do not invalidate a capture in this mode.
_CAPTURE_THREAD_LOCAL = 1
_CAPABILITY_MAJOR, _CAPABILITY_MINOR = 75, 76

_out = ctypes.c_void_p
_handle, _address = ctypes.c_void_p, ctypes.c_uint64
_int, _unsigned, _size = ctypes.c_int, ctypes.c_uint, ctypes.c_size_t
# Argument types by exported name, from cuda.h; `_out` is an output pointer.
SIGNATURES: dict[str, tuple[Any, ...]] = {
    "cuInit": (_unsigned,),
    "cuDriverGetVersion": (_out,),
    "cuGetErrorName": (_int, _out),
    "cuGetErrorString": (_int, _out),
    "cuDeviceGetCount": (_out,),
    "cuDeviceGet": (_out, _int),
    "cuDeviceGetName": (_out, _int, _int),
    "cuDeviceGetAttribute": (_out, _int, _int),
    "cuDevicePrimaryCtxRetain": (_out, _int),
    "cuCtxPushCurrent_v2": (_handle,),
    "cuCtxPopCurrent_v2": (_out,),
    "cuMemGetInfo_v2": (_out, _out),
    "cuMemAlloc_v2": (_out, _size),
    "cuMemFree_v2": (_address,),
    "cuMemAllocHost_v2": (_out, _size),
    "cuMemFreeHost": (_handle,),
    "cuMemcpyHtoDAsync_v2": (_address, _handle, _size, _handle),
    "cuMemcpyDtoHAsync_v2": (_handle, _address, _size, _handle),
    "cuStreamCreate": (_out, _unsigned),
    "cuStreamSynchronize": (_handle,),
    "cuStreamDestroy_v2": (_handle,),
    "cuStreamBeginCapture_v2": (_handle, _int),
    "cuStreamEndCapture": (_handle, _out),
    "cuGraphInstantiateWithFlags": (_out, _handle, ctypes.c_ulonglong),
    "cuGraphDestroy": (_handle,),
    "cuGraphLaunch": (_handle, _handle),
    "cuGraphExecDestroy": (_handle,),
    "cuEventCreate": (_out, _unsigned),
    "cuEventRecord": (_handle, _handle),
    "cuEventElapsedTime": (_out, _handle, _handle),
    "cuEventDestroy_v2": (_handle,),
}


class CudaError(DeviceError):
    """A call of the CUDA driver or of TensorRT failed."""

    code = "gpu_call_failed"


class OutOfDeviceMemory(CudaError):
    """The GPU's memory is full."""

    code = "out_of_memory"


class Cuda:
    """The first visible GPU, initialized for this process.

    Args:
        library: replaces libcuda in tests.

    Attributes:
        capability: compute capability, as "9.0".
        driver: newest CUDA version that the driver supports, as "13.0".

    Raises:
        DeviceError: no driver or GPU is available, or the driver is too old.
    """

    def __init__(self, library: Any = None) -> None:
        self._calls = _bind(library if library is not None else _load())
        self._process = os.getpid()
        self._check("cuInit", 0)
        version, count, device = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
        self._check("cuDriverGetVersion", ctypes.byref(version))
        self.driver = f"{version.value // 1000}.{version.value % 1000 // 10}"
        self._check("cuDeviceGetCount", ctypes.byref(count))
        if not count.value:
            raise DeviceError(
                "The CUDA driver reports no GPU. Check CUDA_VISIBLE_DEVICES and nvidia-smi.", code="gpu_unavailable"
            )
        self._check("cuDeviceGet", ctypes.byref(device), 0)
        text = ctypes.create_string_buffer(256)
        self._check("cuDeviceGetName", text, len(text), device.value)
        self.name = text.value.decode(errors="replace")
        self.capability = ".".join(
            str(self._attribute(attribute, device.value)) for attribute in (_CAPABILITY_MAJOR, _CAPABILITY_MINOR)
        )
        self._context = self._create_handle("cuDevicePrimaryCtxRetain", device.value)

    @contextlib.contextmanager
    def current(self) -> Iterator[None]:
        """Make the GPU current in this thread for the block, then restore the previous context.

        Raises:
            DeviceError: this process was forked from the one that opened the GPU.
        """
        if os.getpid() != self._process:
            raise DeviceError(
                f"Process {os.getpid()} was forked after process {self._process} opened the GPU, and CUDA does not "
                "work in forked processes. Open the model in this process, or start processes with 'spawn'.",
                code="forked_process",
            )
        self._check("cuCtxPushCurrent_v2", self._context)
        try:
            yield
        finally:
            # The result is ignored: an error here would hide the one that ends the block.
            self._calls["cuCtxPopCurrent_v2"](ctypes.byref(ctypes.c_void_p()))

    @property
    def usable(self) -> bool:
        """Return whether the current process is the one that opened the GPU."""
        return os.getpid() == self._process

    def memory(self) -> tuple[int, int]:
        """Return the free and the total memory of the GPU in bytes."""
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        self._check("cuMemGetInfo_v2", ctypes.byref(free), ctypes.byref(total))
        return free.value, total.value

    def allocate(self, size: int) -> int:
        """Allocate `size` bytes on the GPU, aligned to 256, and return the address; OutOfDeviceMemory if it is full."""
        address = ctypes.c_uint64()
        self._check("cuMemAlloc_v2", ctypes.byref(address), max(size, 1))
        return address.value

    def free(self, address: int) -> None:
        self._check("cuMemFree_v2", address)

    def pinned(self, size: int) -> np.ndarray:
        """Allocate page-locked host memory, (size,) uint8; only `unpin` frees it."""
        address = self._create_handle("cuMemAllocHost_v2", max(size, 1))
        return np.ctypeslib.as_array((ctypes.c_uint8 * max(size, 1)).from_address(address))

    def unpin(self, array: np.ndarray) -> None:
        self._check("cuMemFreeHost", array.ctypes.data)

    def copy_in(self, address: int, host: int, size: int, stream: int) -> None:
        """Enqueue on `stream` a copy of `size` bytes from page-locked memory at `host` to the GPU at `address`."""
        self._check("cuMemcpyHtoDAsync_v2", address, host, size, stream)

    def copy_out(self, host: int, address: int, size: int, stream: int) -> None:
        """Enqueue on `stream` a copy of `size` bytes from the GPU at `address` to page-locked memory at `host`."""
        self._check("cuMemcpyDtoHAsync_v2", host, address, size, stream)

    def stream(self) -> int:
        """Create a stream that does not wait for the default stream."""
        return self._create_handle("cuStreamCreate", _NON_BLOCKING)

    def synchronize(self, stream: int) -> None:
        self._check("cuStreamSynchronize", stream)

    def destroy_stream(self, stream: int) -> None:
        self._check("cuStreamDestroy_v2", stream)

    def begin_capture(self, stream: int) -> None:
        """Start to capture the following calls on the stream instead of running them."""
        self._check("cuStreamBeginCapture_v2", stream, _CAPTURE_THREAD_LOCAL)

    def end_capture(self, stream: int) -> int:
        """End a capture and return the executable CUDA graph."""
        graph = ctypes.c_void_p()
        self._check("cuStreamEndCapture", stream, ctypes.byref(graph))
        try:
            return self._create_handle("cuGraphInstantiateWithFlags", graph.value, 0)
        finally:
            self._check("cuGraphDestroy", graph.value)

    def drop_capture(self, stream: int) -> None:
        """Discard a failed capture, so that the stream can be used again."""
        graph = ctypes.c_void_p()
        # The result is ignored: this call ends an invalidated capture and reports it as an error.
        self._calls["cuStreamEndCapture"](stream, ctypes.byref(graph))
        if graph.value:
            self._check("cuGraphDestroy", graph.value)

    def launch(self, graph: int, stream: int) -> None:
        self._check("cuGraphLaunch", graph, stream)

    def destroy_graph(self, graph: int) -> None:
        self._check("cuGraphExecDestroy", graph)

    def event(self) -> int:
        return self._create_handle("cuEventCreate", 0)

    def record(self, event: int, stream: int) -> None:
        self._check("cuEventRecord", event, stream)

    def elapsed_ms(self, start: int, end: int) -> float:
        """Return the milliseconds between two events of `event` that were recorded on a synchronized stream."""
        elapsed = ctypes.c_float()
        self._check("cuEventElapsedTime", ctypes.byref(elapsed), start, end)
        return elapsed.value

    def destroy_event(self, event: int) -> None:
        self._check("cuEventDestroy_v2", event)

    def _attribute(self, attribute: int, device: int) -> int:
        value = ctypes.c_int()
        self._check("cuDeviceGetAttribute", ctypes.byref(value), attribute, device)
        return value.value

    def _create_handle(self, name: str, *arguments: Any) -> int:
        """Return the handle that a call writes through its first argument."""
        handle = ctypes.c_void_p()
        self._check(name, ctypes.byref(handle), *arguments)
        assert handle.value is not None
        return handle.value

    def _check(self, name: str, *arguments: Any) -> None:
        code = self._calls[name](*arguments)
        if code:
            error = OutOfDeviceMemory if code == OUT_OF_MEMORY else CudaError
            # Callers handle full memory and failed captures, and add advice of their own.
            is_handled = error is OutOfDeviceMemory or "Capture" in name
            advice = "" if is_handled else " Check the GPU with `nvidia-smi`, and start the program again."
            raise error(f"CUDA call {name} failed: {self._describe(code)}.{advice}")

    def _describe(self, code: int) -> str:
        texts = []
        for name in ("cuGetErrorName", "cuGetErrorString"):
            text = ctypes.c_char_p()
            if self._calls[name](code, ctypes.byref(text)) == 0 and text.value:
                texts.append(text.value.decode(errors="replace"))
        return ", ".join(texts) or f"error {code}"


def disable_in_forked_children(owner: Any) -> None:
    """Never destroy `owner` in a process forked from this one.

    The destructors of TensorRT and ONNX Runtime call CUDA, which crashes or hangs in a forked process.
    """
    _OWNERS.add(owner)


def leak_forever(owner: Any) -> None:
    """Never destroy `owner`, not even when the interpreter ends."""
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(owner))


def _disable_all() -> None:
    for owner in list(_OWNERS):
        leak_forever(owner)


_OWNERS: weakref.WeakSet[Any] = weakref.WeakSet()
# Windows has no fork.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_disable_all)


def _load() -> Any:
    try:
        return ctypes.CDLL(LIBRARY)
    except OSError as error:
        raise DeviceError(
            f"The CUDA driver cannot be loaded ({error}). Install the NVIDIA driver, or run an .onnx file on the CPU.",
            code="gpu_unavailable",
        ) from error


def _bind(library: Any) -> dict[str, Any]:
    calls = {}
    for name, arguments in SIGNATURES.items():
        call = getattr(library, name, None)
        if call is None:
            raise DeviceError(
                f"The NVIDIA driver has no {name}, which CUDA 11.4 added. Install a newer driver.",
                code="driver_too_old",
            )
        call.argtypes, call.restype = arguments, _int
        calls[name] = call
    return calls
