"""CUDA's driver, by ctypes: the few calls that running an engine takes.

The driver's library is there wherever a GPU is, so nothing has to be installed for it. The device's primary context is
used, which TensorRT and torch share; whatever context a caller has is his again after each call. A process that was
forked has none of it: it neither uses nor destroys what its parent made.
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
# Another thread's allocation (torch's, say) does not break a capture of this thread.
_CAPTURE_THREAD_LOCAL = 1
_CAPABILITY_MAJOR, _CAPABILITY_MINOR = 75, 76

_out = ctypes.c_void_p
_handle, _address = ctypes.c_void_p, ctypes.c_uint64
_int, _unsigned, _size = ctypes.c_int, ctypes.c_uint, ctypes.c_size_t
# Arguments by exported name, as in cuda.h; `_out` is a pointer that the call writes through.
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
    """A call of CUDA's failed."""

    code = "gpu_call_failed"


class OutOfDeviceMemory(CudaError):
    """The GPU's memory is full."""

    code = "out_of_memory"


class Cuda:
    """The first GPU that CUDA shows, ready to be used by this process.

    Attributes:
        name: as the driver calls it.
        capability: compute capability, as "9.0".
        driver: the newest CUDA that the driver runs, as "13.0".

    Raises:
        DeviceError: there is no driver, no GPU, or the driver is too old.
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
                "The CUDA driver shows no GPU; look at CUDA_VISIBLE_DEVICES and nvidia-smi.", code="gpu_unavailable"
            )
        self._check("cuDeviceGet", ctypes.byref(device), 0)
        text = ctypes.create_string_buffer(256)
        self._check("cuDeviceGetName", text, len(text), device.value)
        self.name = text.value.decode(errors="replace")
        self.capability = ".".join(
            str(self._attribute(attribute, device.value)) for attribute in (_CAPABILITY_MAJOR, _CAPABILITY_MINOR)
        )
        self._context = self._made("cuDevicePrimaryCtxRetain", device.value)

    @contextlib.contextmanager
    def current(self) -> Iterator[None]:
        """Make the GPU current in this thread, and in the end whichever was: torch may be on another.

        Raises:
            DeviceError: this process was forked from the one that opened the GPU.
        """
        if os.getpid() != self._process:
            raise DeviceError(
                f"This process ({os.getpid()}) was forked from one that had opened the GPU already ({self._process}), "
                "and CUDA does not survive that; load the model in the new process, or start it by spawn.",
                code="forked_process",
            )
        self._check("cuCtxPushCurrent_v2", self._context)
        try:
            yield
        finally:
            # Its code would hide the error on account of which this ends.
            self._calls["cuCtxPopCurrent_v2"](ctypes.byref(ctypes.c_void_p()))

    @property
    def usable(self) -> bool:
        """Return whether the current process is the one that opened the GPU."""
        return os.getpid() == self._process

    def memory(self) -> tuple[int, int]:
        """Return the free and the total bytes of the GPU's memory."""
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        self._check("cuMemGetInfo_v2", ctypes.byref(free), ctypes.byref(total))
        return free.value, total.value

    def allocate(self, size: int) -> int:
        """Return the address of `size` new bytes on the GPU, aligned to 256; raises OutOfDeviceMemory."""
        address = ctypes.c_uint64()
        self._check("cuMemAlloc_v2", ctypes.byref(address), max(size, 1))
        return address.value

    def free(self, address: int) -> None:
        self._check("cuMemFree_v2", address)

    def pinned(self, size: int) -> np.ndarray:
        """Return `size` new bytes of page-locked host memory, as (size,) uint8; freed by `unpin` alone."""
        address = self._made("cuMemAllocHost_v2", max(size, 1))
        return np.ctypeslib.as_array((ctypes.c_uint8 * max(size, 1)).from_address(address))

    def unpin(self, array: np.ndarray) -> None:
        self._check("cuMemFreeHost", array.ctypes.data)

    def copy_in(self, address: int, host: int, size: int, stream: int) -> None:
        """Copy `size` bytes of page-locked memory at `host` to the GPU; done when the stream is."""
        self._check("cuMemcpyHtoDAsync_v2", address, host, size, stream)

    def copy_out(self, host: int, address: int, size: int, stream: int) -> None:
        """Copy `size` bytes of the GPU to page-locked memory at `host`; done when the stream is."""
        self._check("cuMemcpyDtoHAsync_v2", host, address, size, stream)

    def stream(self) -> int:
        """Return a new stream that does not wait for the default one."""
        return self._made("cuStreamCreate", _NON_BLOCKING)

    def synchronize(self, stream: int) -> None:
        self._check("cuStreamSynchronize", stream)

    def destroy_stream(self, stream: int) -> None:
        self._check("cuStreamDestroy_v2", stream)

    def begin_capture(self, stream: int) -> None:
        """Record what follows on the stream instead of running it."""
        self._check("cuStreamBeginCapture_v2", stream, _CAPTURE_THREAD_LOCAL)

    def end_capture(self, stream: int) -> int:
        """Return what was recorded, ready to be launched."""
        graph = ctypes.c_void_p()
        self._check("cuStreamEndCapture", stream, ctypes.byref(graph))
        try:
            return self._made("cuGraphInstantiateWithFlags", graph.value, 0)
        finally:
            self._check("cuGraphDestroy", graph.value)

    def drop_capture(self, stream: int) -> None:
        """End a capture in which something failed, so that the stream can be used again."""
        graph = ctypes.c_void_p()
        # An invalidated capture is ended by the very call that reports it.
        self._calls["cuStreamEndCapture"](stream, ctypes.byref(graph))
        if graph.value:
            self._check("cuGraphDestroy", graph.value)

    def launch(self, graph: int, stream: int) -> None:
        self._check("cuGraphLaunch", graph, stream)

    def destroy_graph(self, graph: int) -> None:
        self._check("cuGraphExecDestroy", graph)

    def event(self) -> int:
        return self._made("cuEventCreate", 0)

    def record(self, event: int, stream: int) -> None:
        self._check("cuEventRecord", event, stream)

    def elapsed_ms(self, start: int, end: int) -> float:
        """Return the milliseconds between two recorded events, once their stream is done."""
        elapsed = ctypes.c_float()
        self._check("cuEventElapsedTime", ctypes.byref(elapsed), start, end)
        return elapsed.value

    def destroy_event(self, event: int) -> None:
        self._check("cuEventDestroy_v2", event)

    def _attribute(self, attribute: int, device: int) -> int:
        value = ctypes.c_int()
        self._check("cuDeviceGetAttribute", ctypes.byref(value), attribute, device)
        return value.value

    def _made(self, name: str, *arguments: Any) -> int:
        """Return the handle that a call writes through its first argument."""
        handle = ctypes.c_void_p()
        self._check(name, ctypes.byref(handle), *arguments)
        assert handle.value is not None
        return handle.value

    def _check(self, name: str, *arguments: Any) -> None:
        code = self._calls[name](*arguments)
        if code:
            kind = OutOfDeviceMemory if code == OUT_OF_MEMORY else CudaError
            raise kind(f"CUDA's {name} failed: {self._told(code)}.")

    def _told(self, code: int) -> str:
        texts = []
        for name in ("cuGetErrorName", "cuGetErrorString"):
            text = ctypes.c_char_p()
            if self._calls[name](code, ctypes.byref(text)) == 0 and text.value:
                texts.append(text.value.decode(errors="replace"))
        return ", ".join(texts) or f"error {code}"


def disable_in_forked_children(owner: Any) -> None:
    """See to it that no process forked from this one destroys `owner`, nor what it holds on the GPU.

    The destructors of TensorRT and ONNX Runtime call CUDA, which in a forked process crashes or hangs.
    """
    _OWNERS.add(owner)


def leak_forever(owner: Any) -> None:
    """See to it that `owner` is never destroyed, not even when the interpreter ends."""
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(owner))


def _disable_all() -> None:
    for owner in list(_OWNERS):
        leak_forever(owner)


_OWNERS: weakref.WeakSet[Any] = weakref.WeakSet()
# Windows, where TensorRT runs too, has no fork.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_disable_all)


def _load() -> Any:
    try:
        return ctypes.CDLL(LIBRARY)
    except OSError as error:
        raise DeviceError(
            f"There is no CUDA driver here ({error}); install the NVIDIA driver, or run on the CPU with an .onnx file.",
            code="gpu_unavailable",
        ) from error


def _bind(library: Any) -> dict[str, Any]:
    calls = {}
    for name, arguments in SIGNATURES.items():
        call = getattr(library, name, None)
        if call is None:
            raise DeviceError(
                f"The NVIDIA driver is too old: it has no {name}, which came with CUDA 11.4; install a newer driver.",
                code="driver_too_old",
            )
        call.argtypes, call.restype = arguments, _int
        calls[name] = call
    return calls
