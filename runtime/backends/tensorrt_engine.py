"""Load one TensorRT engine on the GPU and run it.

TensorRT 8.6, 10, 11 and TensorRT-RTX take one path; where a name differs, the library is inspected for it. The memory
of an engine is in `device_buffers`, its contexts and CUDA graphs are in `execution_contexts`.
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
from runtime.backends.batch_shapes import ALIGNMENT, AXES, MinOptMax, OptimizationProfile, choose, profile_from_shapes
from runtime.backends.cuda_driver import Cuda, CudaError, OutOfDeviceMemory, disable_in_forked_children, leak_forever
from runtime.backends.device_buffers import DeviceBuffers
from runtime.backends.execution_contexts import EngineTensors, ExecutionContexts, ExecutionState
from runtime.backends.rtx_runtime_cache import KernelCache, Key
from runtime.backends.tensorrt_logger import CallChecker, explain_startup_failure, logger_for
from runtime.core.batch import ENCODED_FEATURES, HEAD_NAMES
from runtime.core.errors import DeviceMemoryError, ModelFileError, ShapeError

log = logging.getLogger("drn")

# Outputs of the other kinds of network.
OTHER_OUTPUTS = {"video": (ENCODED_FEATURES,), "clips": ("features",)}
SPANS = "segment_spans"
# At the end of the process, time for calls in other threads to end. A call takes milliseconds.
LAST_CALLS_SECONDS = 2.0
# Runs of a shape after which it is captured.
RUNS_BEFORE_CAPTURE = 2
# Sizes whose profile is remembered.
MAX_CACHED_CHOICES = 4096
# In the rows that pad a batch: a query of one unknown word, which no mask makes empty.
_PADDING = {"query_length": 1}
# NumPy has no bfloat16: its bits are stored.
_DTYPES = {"FLOAT": "f4", "HALF": "f2", "BF16": "u2", "INT32": "i4", "INT64": "i8", "UINT8": "u1"}


class TensorRTEngine:
    """One engine on the GPU.

    Attributes:
        path, sidecar: of the engine file.
        cuda: the GPU.
        domains: its optimization profiles.
        turn: lock for the one thread that uses it; the engines of one model share theirs.
        tensors: its inputs and outputs.
        buffers: its memory, with the slots of encodings.
        contexts: its execution contexts.
        closed: whether everything was released.
        rows_answered: number of rows since the engine was opened.
        answers_above: tokens up to which another engine runs the queries.
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
        self.answers_above = 0
        self.closed = False
        self.turn = threading.Lock()
        disable_in_forked_children(self)
        _OPEN.add(self)
        try:
            with self.turn, cuda.current():
                self._open()
        except OutOfDeviceMemory as error:
            self.close()
            with cuda.current():
                free, total = cuda.memory()
            raise DeviceMemoryError(
                f"The GPU has not enough memory for {path.name} ({free / 2**30:.1f} of {total / 2**30:.1f} GiB are "
                f"free): {str(error).rstrip('.')}; end what else uses it, or build for fewer queries (--batch)."
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
            # Only plans that match the hash in the sidecar are opened.
            self._runtime.engine_host_code_allowed = True
        try:
            plan = self.path.read_bytes()
        except MemoryError as error:
            raise DeviceMemoryError(
                f"{self.path} has {self.path.stat().st_size / 2**20:.0f} MiB, more memory than this machine has free; "
                "end what else uses it."
            ) from error
        self._plan_bytes = len(plan)
        self._engine = self._runtime.deserialize_cuda_engine(plan)
        checker = CallChecker(self._trt, self._logger, self.path.name)
        checker.require(
            self._engine is not None,
            "load the plan",
            f"; build it again: `{engine_compatibility.rebuild_command(self.path, self.sidecar)}`",
        )
        part = self.sidecar.manifest.part
        outputs = OTHER_OUTPUTS.get(part, HEAD_NAMES)
        stored = (ENCODED_FEATURES, SPANS) if part == "query" else ()
        self.tensors = EngineTensors(AXES[part], stored, outputs, self._read_tensors(AXES[part], outputs))
        dtype = self.tensors.dtypes.get(ENCODED_FEATURES)
        # bfloat16 goes in and out as its bits.
        self.half_bits = dtype is not None and dtype.kind == "u"
        self.domains = [self._domain(index) for index in range(self._engine.num_optimization_profiles)]
        # Neither a video part nor an extractor takes queries.
        ranges = [profile.ranges.get("query_length", MinOptMax(0, 0, 0)) for profile in self.domains]
        self.query_length = MinOptMax.covering(ranges)
        run_advice = functools.partial(_advice_for_failed_run, self.path, self.sidecar)
        self.contexts = ExecutionContexts(
            self._trt, self._engine, self.tensors, self.buffers, self._kernels, checker, run_advice
        )
        self.buffers.allocate_scratch(self.contexts.scratch_bytes)
        self._allocate_staging()

    def _read_tensors(self, expected_inputs: Iterable[str], expected_outputs: Iterable[str]) -> dict[str, np.dtype]:
        """Return the data types of the tensors; ModelFileError unless they are those of such a part."""
        engine, trt = self._engine, self._trt
        names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        inputs = {name for name in names if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT}
        wrong = (inputs ^ set(expected_inputs)) | ((set(names) - inputs) ^ set(expected_outputs))
        wrong |= {name for name in names if engine.get_tensor_location(name) != trt.TensorLocation.DEVICE}
        kinds = {name: str(engine.get_tensor_dtype(name)).rpartition(".")[2] for name in names}
        wrong |= {name for name, kind in kinds.items() if kind not in _DTYPES}
        if wrong:
            raise ModelFileError(
                f"{self.path} is not a DRN engine: {', '.join(sorted(wrong))} is missing, unknown, or not in "
                "device memory; build it with `python -m export.build_engine`.",
                code="unexpected_tensors",
            )
        return {name: np.dtype(_DTYPES[kind]) for name, kind in kinds.items()}

    def _domain(self, index: int) -> OptimizationProfile:
        axes = self.tensors.axes
        shapes = {name: [tuple(shape) for shape in self._engine.get_tensor_profile_shape(name, index)] for name in axes}
        return profile_from_shapes(index, axes, shapes, frozenset(("video",) if self.tensors.encodings else ()))

    def _allocate_staging(self) -> None:
        """Allocate memory for the largest shape of any profile, and for the encodings that stay on the device."""
        tensors = self.tensors
        bytes_in = bytes_out = ALIGNMENT
        for profile in self.domains:
            shapes = profile.shapes(tensors.axes, profile.largest())
            self.buffers.allocate_encodings({name: shapes[name] for name in tensors.encodings}, tensors.dtypes)
            context = self.contexts.create(profile, shapes)
            bytes_in = max(bytes_in, tensors.pack_inputs(shapes)[1])
            outputs, size = tensors.pack_outputs(context)
            bytes_out = max(bytes_out, size)
            self._tails = {name: region.shape[1:] for name, region in outputs.items()}
        self.buffers.allocate_staging(bytes_in, bytes_out)

    def nothing(self) -> dict[str, np.ndarray]:
        """Return the outputs of no rows, which no profile takes."""
        return {name: np.empty((0, *tail), self.tensors.dtypes[name]) for name, tail in self._tails.items()}

    def run(self, inputs: Mapping[str, np.ndarray], sizes: Mapping[str, int]) -> dict[str, np.ndarray]:
        """Return the outputs, copied, of the rows that were given.

        Args:
            inputs: what is not resident; fewer rows, or shorter queries, than the engine takes are padded.
            sizes: how many there are along each axis.

        Raises:
            ShapeError: no profile takes them, or a size that is fixed is another.
            OutOfDeviceMemory: the GPU's memory is full.
        """
        state = self.contexts.state(*self.choose(sizes))
        for name, view in state.inputs.items():
            _fill(name, view, inputs[name], self.tensors.axes[name])
        state = self.contexts.run(state)
        rows = sizes["batch"] if "batch" in sizes else sizes["video"]
        self.rows_answered += rows
        answers = {name: view[:rows].copy() for name, view in state.outputs.items()}
        # A shape that was repeated will come again. The run has settled what was deferred.
        if state.runs >= RUNS_BEFORE_CAPTURE and state.graph is None and self.contexts.captures:
            self._capture(state)
        return answers

    def key(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """Return the profile and the padded sizes of a request: requests of one key share a context and a CUDA graph.

        Raises:
            ShapeError: no profile takes them.
        """
        profile, padded = self.choose(sizes)
        return (profile.index, *padded.values())

    def warm(self, sizes: Mapping[str, int]) -> None:
        """Run with made-up inputs until requests of these sizes need no new context and no capture; raises as `run`.

        Args:
            sizes: how many there are along each axis.
        """
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
            # A capture that failed gave the context back.
            self.run(inputs, sizes)

    def choose(self, sizes: Mapping[str, int]) -> tuple[OptimizationProfile, dict[str, int]]:
        """Return the profile for a request and the sizes it is padded to; see `batch_shapes.choose`."""
        key = tuple(sizes.values())
        if key not in self._choices:
            if len(self._choices) >= MAX_CACHED_CHOICES:
                self._choices.clear()
            self._choices[key] = choose(self.domains, sizes)
        return self._choices[key]

    def _capture(self, state: ExecutionState) -> None:
        """Capture a state in a CUDA graph; if that fails, warn once and go on without."""
        message = self.contexts.capture(state)
        if message is None:
            return
        # An engine for queries of one length has no loop.
        looping = self.query_length.min < self.query_length.max
        hint = " Its LSTM is a loop, which `export.build_engine --unroll 6 10` writes out." if looping else ""
        if looping and self.answers_above:
            hint = f" It answers only queries of more than {self.answers_above} tokens."
        log.warning(
            "%s cannot be captured in a CUDA graph and runs without, which is slower: %s%s",
            *(self.path.name, message, hint),
        )

    @property
    def bytes_held(self) -> tuple[int, int, int]:
        """Bytes of the plan, of buffers on the device, and of page-locked memory."""
        return self._plan_bytes, self.buffers.device_bytes, self.buffers.pinned_bytes

    def close(self) -> None:
        """Free everything; a closed network must not be used any more."""
        if self.closed:
            return
        self.closed = True
        # What frees must not hide the error on account of which it is called.
        with contextlib.suppress(CudaError), self.cuda.current():
            self._free()

    def _free(self) -> None:
        with contextlib.suppress(CudaError):
            self.buffers.synchronize()
        # Opening may have failed before there were contexts.
        if hasattr(self, "contexts"):
            self.contexts.close()
        self._engine = self._runtime = None
        self.buffers.free()

    def __del__(self, ending: Callable[[], bool] = sys.is_finalizing) -> None:
        # At the end of the process `close_all` was here before, and modules are gone.
        if not ending() and hasattr(self, "closed"):
            self.close()


_OPEN: weakref.WeakSet[TensorRTEngine] = weakref.WeakSet()


@atexit.register
def close_all() -> None:
    """Close every network: contexts and engines must be gone before CUDA is, or TensorRT may crash at the end.

    Memory must not be freed under a call, which at the end can be in a daemon thread alone: it is waited for, shortly,
    and what is in use even then is left to the operating system, destructors included.
    """
    until = time.monotonic() + LAST_CALLS_SECONDS
    for network in list(_OPEN):
        # In a forked process the driver is not there to be asked.
        if not network.cuda.usable:
            continue
        if network.turn.acquire(timeout=max(until - time.monotonic(), 0)):
            try:
                network.close()
            finally:
                network.turn.release()
        else:
            leak_forever(network)


def _fill(name: str, view: np.ndarray, array: np.ndarray, axes: tuple[str, ...]) -> None:
    """Write an input into its place, and padding around it where it is smaller."""
    if array.shape == view.shape:
        view[...] = array
        return
    if array.ndim != view.ndim or array.shape[len(axes) :] != view.shape[len(axes) :]:
        raise ShapeError(
            f"{name} is of shape {array.shape}, and this engine takes {view.shape[len(axes) :]} after "
            f"{' and '.join(axes)}."
        )
    inside = tuple(slice(size) for size in array.shape)
    view[array.shape[0] :] = _PADDING.get(name, 0)
    if len(axes) > 1:
        view[: array.shape[0], array.shape[1] :] = 0
    view[inside] = array


def _advice_for_failed_run(path: Path, sidecar: EngineMetadata) -> str:
    """Return what to do if an engine fails to run, as the end of a sentence."""
    if not engine_compatibility.is_hardware_compatible(sidecar.content):
        return ""
    # Kernels chosen for Ampere and later may fail on a GPU that they were not tried on (pytorch/TensorRT#4481).
    command = engine_compatibility.rebuild_command(path, sidecar, here=True)
    return f"; a hardware-compatible plan may fail on another GPU, so rebuild it on this one: `{command}`"
