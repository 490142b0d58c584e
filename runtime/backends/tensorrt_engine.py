"""Load one TensorRT engine on the GPU and run it.

TensorRT 8.6, 10, 11 and TensorRT-RTX share this code, which checks the module for names that differ. See
`device_buffers` for memory, and `execution_contexts` for contexts and CUDA graphs.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import logging
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from runtime.artifacts.engine_metadata import EngineMetadata
from runtime.backends import engine_compatibility
from runtime.backends.batch_shapes import (
    ALIGNMENT,
    AXES,
    MinOptMax,
    OptimizationProfile,
    choose_profile,
    profile_from_shapes,
)
from runtime.backends.cuda_driver import Cuda, CudaError, OutOfDeviceMemory, disable_in_forked_children, leak_forever
from runtime.backends.device_buffers import DeviceBuffers
from runtime.backends.execution_contexts import EngineTensors, ExecutionContexts, ExecutionState
from runtime.backends.rtx_runtime_cache import KernelCache, Key
from runtime.backends.tensorrt_logger import CallChecker, explain_startup_failure, logger_for
from runtime.core.batch import ENCODED_FEATURES, HEAD_NAMES
from runtime.core.errors import DeviceMemoryError, ModelFileError, ShapeError

log = logging.getLogger("drn")

# Outputs of a video part and of a feature extractor; other parts have the heads.
OTHER_OUTPUTS = {"video": (ENCODED_FEATURES,), "clips": ("features",)}
SPANS = "segment_spans"
# How long the exit of the process waits for calls in other threads, each of which takes milliseconds.
EXIT_TIMEOUT_SECONDS = 2.0
# Number of runs of a shape before it is captured in a CUDA graph.
RUNS_BEFORE_CAPTURE = 2
MAX_CACHED_CHOICES = 4096
# Rows that pad a batch have length 1, because a mask of length 0 would divide by zero.
_PADDING = {"query_length": 1}
# NumPy has no bfloat16, so its bits are stored as uint16.
_DTYPES = {"FLOAT": "f4", "HALF": "f2", "BF16": "u2", "INT32": "i4", "INT64": "i8", "UINT8": "u1"}


class TensorRTEngine:
    """One engine on the GPU.

    Args:
        library: the module `tensorrt`, `tensorrt_lean` or `tensorrt_rtx`.

    Attributes:
        profiles: optimization profiles, in the order of the build.
        query_length: min, opt and max number of tokens over the profiles; zeros if the engine takes no queries.
        lock: lock for exclusive use by one thread; the engines of a model share one lock.
        is_bfloat16: whether encodings are stored as bfloat16 bits.
        short_plan_max_length: maximum query length, in tokens, that another engine of the model runs; 0 without one.

    Raises:
        ModelFileError: the plan is no DRN engine.
        DeviceError: TensorRT cannot start or load the plan.
        DeviceMemoryError: the GPU or the host has not enough memory.
    """

    def __init__(self, library: Any, cuda: Cuda, path: Path, sidecar: EngineMetadata) -> None:
        self.path, self.sidecar, self.cuda = path, sidecar, cuda
        self.buffers = DeviceBuffers(cuda)
        self._trt = library
        self._logger = logger_for(library)
        version = f"{library.__name__} {library.__version__}"
        key = Key(str(sidecar.content["sha256"][path.name]), version, f"{cuda.name} ({cuda.capability})")
        self._kernels = KernelCache(path, key)
        self._choices: dict[tuple[int, ...], tuple[OptimizationProfile, dict[str, int]]] = {}
        self.rows_answered = 0
        self.short_plan_max_length = 0
        self.closed = False
        self.lock = threading.Lock()
        disable_in_forked_children(self)
        _OPEN.add(self)
        try:
            with self.lock, cuda.current():
                self._open()
        except OutOfDeviceMemory as error:
            self.close()
            with cuda.current():
                free, total = cuda.memory()
            raise DeviceMemoryError(
                f"The GPU has not enough memory for {path.name} ({free / 2**30:.1f} of {total / 2**30:.1f} GiB free): "
                f"{str(error).rstrip('.')}. End other programs on the GPU, or build for smaller batches (--batch)."
            ) from error
        except BaseException:
            self.close()
            raise

    def _open(self) -> None:
        self.buffers.create_stream()
        # The runtime must live as long as its engine.
        with explain_startup_failure(self._trt, self._logger, self.cuda.driver):
            self._runtime = self._trt.Runtime(self._logger)
        if engine_compatibility.is_version_compatible(self.sidecar.content):
            # Safe, because `read_sidecar` has compared the hash of the plan with the recorded one.
            self._runtime.engine_host_code_allowed = True
        try:
            plan = self.path.read_bytes()
        except MemoryError as error:
            raise DeviceMemoryError(
                f"{self.path} has {self.path.stat().st_size / 2**20:.0f} MiB, and this machine has not enough free "
                "memory. End other programs."
            ) from error
        self._plan_bytes = len(plan)
        self._engine = self._runtime.deserialize_cuda_engine(plan)
        checker = CallChecker(self._trt, self._logger, self.path.name)
        checker.require(
            self._engine is not None,
            "load the plan",
            f". Build it again: `{engine_compatibility.rebuild_command(self.path, self.sidecar)}`",
        )
        part = self.sidecar.manifest.part
        outputs = OTHER_OUTPUTS.get(part, HEAD_NAMES)
        encodings = (ENCODED_FEATURES, SPANS) if part == "query" else ()
        self.tensors = EngineTensors(AXES[part], encodings, outputs, self._read_dtypes(AXES[part], outputs))
        dtype = self.tensors.dtypes.get(ENCODED_FEATURES)
        self.is_bfloat16 = dtype is not None and dtype.kind == "u"
        self.profiles = [self._read_profile(index) for index in range(self._engine.num_optimization_profiles)]
        ranges = [profile.ranges.get("query_length", MinOptMax(0, 0, 0)) for profile in self.profiles]
        self.query_length = MinOptMax.covering(ranges)
        run_advice = functools.partial(_advice_for_failed_run, self.path, self.sidecar)
        self.contexts = ExecutionContexts(
            self._trt, self._engine, self.tensors, self.buffers, self._kernels, checker, run_advice
        )
        self.buffers.allocate_scratch(self.contexts.scratch_bytes)
        self._allocate_buffers()

    def _read_dtypes(self, expected_inputs: Iterable[str], expected_outputs: Iterable[str]) -> dict[str, np.dtype]:
        """Return the data types of all tensors; ModelFileError if a tensor is missing or unexpected."""
        engine, trt = self._engine, self._trt
        names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        inputs = {name for name in names if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT}
        wrong = (inputs ^ set(expected_inputs)) | ((set(names) - inputs) ^ set(expected_outputs))
        wrong |= {name for name in names if engine.get_tensor_location(name) != trt.TensorLocation.DEVICE}
        dtypes = {name: str(engine.get_tensor_dtype(name)).rpartition(".")[2] for name in names}
        wrong |= {name for name, dtype in dtypes.items() if dtype not in _DTYPES}
        if wrong:
            raise ModelFileError(
                f"{self.path} is no DRN engine: {', '.join(sorted(wrong))} is missing, unknown, or not in device "
                "memory. Build it with `python -m export.build_engine`.",
                code="unexpected_tensors",
            )
        return {name: np.dtype(_DTYPES[dtype]) for name, dtype in dtypes.items()}

    def _read_profile(self, index: int) -> OptimizationProfile:
        axes = self.tensors.axes
        shapes = {name: [tuple(shape) for shape in self._engine.get_tensor_profile_shape(name, index)] for name in axes}
        return profile_from_shapes(index, axes, shapes, frozenset(("video",) if self.tensors.encodings else ()))

    def _allocate_buffers(self) -> None:
        """Allocate memory for the largest shapes of all profiles, and for the encodings that stay on the device."""
        tensors = self.tensors
        bytes_in = bytes_out = ALIGNMENT
        for profile in self.profiles:
            shapes = profile.shapes(tensors.axes, profile.max_sizes())
            self.buffers.allocate_encodings({name: shapes[name] for name in tensors.encodings}, tensors.dtypes)
            context = self.contexts.create(profile, shapes)
            bytes_in = max(bytes_in, tensors.pack_inputs(shapes)[1])
            outputs, size = tensors.pack_outputs(context)
            bytes_out = max(bytes_out, size)
            self._row_shapes = {name: layout.shape[1:] for name, layout in outputs.items()}
        self.buffers.allocate_inputs_and_outputs(bytes_in, bytes_out)

    def empty_outputs(self) -> dict[str, np.ndarray]:
        """Return the outputs of an empty batch, which no profile accepts."""
        return {name: np.empty((0, *shape), self.tensors.dtypes[name]) for name, shape in self._row_shapes.items()}

    def run(self, inputs: Mapping[str, np.ndarray], sizes: Mapping[str, int]) -> dict[str, np.ndarray]:
        """Run a batch.

        Args:
            inputs: arrays by input name, except encodings. They are padded to the shape that the engine runs.
            sizes: size of each axis (`batch`, `query_length`, `video`) that the engine has.

        Returns:
            Copies of the outputs by name, without padding.

        Raises:
            ShapeError: no profile accepts the sizes, or an array has another shape.
            OutOfDeviceMemory: the GPU's memory is full.
            CudaError: TensorRT or the GPU failed.
        """
        state = self.contexts.state(*self.choose(sizes))
        for name, view in state.inputs.items():
            _fill(name, view, inputs[name], self.tensors.axes[name])
        state = self.contexts.run(state)
        rows = sizes["batch"] if "batch" in sizes else sizes["video"]
        self.rows_answered += rows
        outputs = {name: view[:rows].copy() for name, view in state.outputs.items()}
        # A shape that was repeated will come again. The run has completed all deferred initialization.
        if state.runs >= RUNS_BEFORE_CAPTURE and state.graph is None and self.contexts.captures:
            self._capture(state)
        return outputs

    def key(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """Return the profile index and the padded sizes of a request; requests of equal key share a context."""
        profile, padded = self.choose(sizes)
        return (profile.index, *padded.values())

    def warm(self, sizes: Mapping[str, int]) -> None:
        """Run zeros until requests of these sizes need no new context and no capture of a CUDA graph."""
        profile, _ = self.choose(sizes)
        shapes = profile.shapes(self.tensors.axes, sizes)
        inputs = {
            name: np.full(shapes[name], _PADDING.get(name, 0), self.tensors.dtypes[name])
            for name in self.tensors.axes
            if name not in self.tensors.encodings
        }
        for _ in range(RUNS_BEFORE_CAPTURE):
            self.run(inputs, sizes)
        if self.key(sizes) not in self.contexts.states:
            # A failed capture released the context.
            self.run(inputs, sizes)

    def choose(self, sizes: Mapping[str, int]) -> tuple[OptimizationProfile, dict[str, int]]:
        """Return the profile with the least padding for a request and its padded sizes, cached by size."""
        key = tuple(sizes.values())
        if key not in self._choices:
            if len(self._choices) >= MAX_CACHED_CHOICES:
                self._choices.clear()
            self._choices[key] = choose_profile(self.profiles, sizes)
        return self._choices[key]

    def _capture(self, state: ExecutionState) -> None:
        """Capture a CUDA graph of a state; warn if that fails."""
        message = self.contexts.capture(state)
        if message is None:
            return
        # An engine for queries of one length contains no loop.
        has_loop = self.query_length.min < self.query_length.max
        hint = " Build with `export.build_engine --unroll 6 10` to replace the LSTM's loop." if has_loop else ""
        if has_loop and self.short_plan_max_length:
            hint = f" Only queries of more than {self.short_plan_max_length} tokens are affected."
        log.warning(
            "%s runs without a CUDA graph, which is slower: %s%s",
            *(self.path.name, message, hint),
        )

    def max_size(self, axis: str) -> int:
        """Return the maximum size of an axis over all profiles."""
        return max(profile.ranges[axis].max for profile in self.profiles)

    @property
    def memory_bytes(self) -> tuple[int, int, int]:
        """Return the bytes of the plan, of buffers on the device, and of page-locked memory."""
        return self._plan_bytes, self.buffers.device_bytes, self.buffers.pinned_bytes

    def close(self) -> None:
        """Free everything; a closed engine must not be used afterwards."""
        if self.closed:
            return
        self.closed = True
        # An error here would hide the one that led to this call.
        with contextlib.suppress(CudaError), self.cuda.current():
            self._free()

    def _free(self) -> None:
        with contextlib.suppress(CudaError):
            self.buffers.synchronize()
        # Opening may have failed before contexts existed.
        if hasattr(self, "contexts"):
            self.contexts.close()
        self._engine = self._runtime = None
        self.buffers.free()

    def __del__(self, ending: Callable[[], bool] = sys.is_finalizing) -> None:
        # At interpreter exit, `close_all` has run already and modules may be gone.
        if not ending() and hasattr(self, "closed"):
            self.close()


_OPEN: weakref.WeakSet[TensorRTEngine] = weakref.WeakSet()


@atexit.register
def close_all() -> None:
    """Close every engine at exit: TensorRT may crash if its objects outlive CUDA.

    Memory must not be freed while a daemon thread uses it. An engine that is still in use after a timeout is never
    destroyed, and the operating system frees its memory.
    """
    deadline = time.monotonic() + EXIT_TIMEOUT_SECONDS
    for engine in list(_OPEN):
        # A forked process must not call the driver.
        if not engine.cuda.usable:
            continue
        if engine.lock.acquire(timeout=max(deadline - time.monotonic(), 0)):
            try:
                engine.close()
            finally:
                engine.lock.release()
        else:
            leak_forever(engine)


def _fill(name: str, view: np.ndarray, array: np.ndarray, axes: tuple[str, ...]) -> None:
    """Copy an input into its staging memory, and pad it if it is smaller."""
    if array.shape == view.shape:
        view[...] = array
        return
    if array.ndim != view.ndim or array.shape[len(axes) :] != view.shape[len(axes) :]:
        expected = ", ".join([*axes, *map(str, view.shape[len(axes) :])])
        raise ShapeError(f"Expected {name} of shape ({expected}), got {array.shape}. Correct the batch.")
    view[array.shape[0] :] = _PADDING.get(name, 0)
    if len(axes) > 1:
        view[: array.shape[0], array.shape[1] :] = 0
    view[tuple(map(slice, array.shape))] = array


def _advice_for_failed_run(path: Path, sidecar: EngineMetadata) -> str:
    """Return what to do if an engine fails to run, as the end of an error message."""
    if not engine_compatibility.is_hardware_compatible(sidecar.content):
        return ""
    # Kernels for Ampere and later may fail on a GPU that was not tested (pytorch/TensorRT#4481).
    command = engine_compatibility.rebuild_command(path, sidecar, here=True)
    return f". A hardware-compatible plan may fail on another GPU; rebuild it on this one: `{command}`"
