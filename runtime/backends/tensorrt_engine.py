"""One TensorRT plan on the GPU: its contexts, its buffers and its CUDA graphs.

Everything that a call needs is allocated once: pinned staging, device buffers, one stream. Inputs are put side by side,
so that one copy takes them to the GPU and one brings all outputs back. For each (profile, shape) there is one execution
context, since a CUDA graph replays what its context was set to when it was captured; all contexts share their scratch
memory, which only one uses at a time.

TensorRT 8.6, 10, 11 and TensorRT-RTX go one way; where a name differs, it is looked for.
"""

from __future__ import annotations

import atexit
import collections
import contextlib
import dataclasses
import logging
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
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
    TensorSlice,
    choose,
    pack_tensors,
    profile_from_shapes,
)
from runtime.backends.cuda_driver import Cuda, CudaError, OutOfDeviceMemory, disable_in_forked_children, leak_forever
from runtime.backends.rtx_runtime_cache import KernelCache, Key
from runtime.core.batch import ENCODED_FEATURES, HEAD_NAMES
from runtime.core.errors import DeviceError, DeviceMemoryError, ModelFileError, ShapeError, is_out_of_memory

log = logging.getLogger("drn")

# What the other kinds of network give.
OTHER_OUTPUTS = {"video": (ENCODED_FEATURES,), "clips": ("features",)}
SPANS = "segment_spans"
# Contexts, each with its CUDA graph, that are kept; the least used goes first. There is room for all sizes of batches
# to 32 and of queries to 16 words, which a service meets in any order, so that no context is made twice.
MAX_EXECUTION_STATES = 64
# Runs of a shape after which it is captured.
RUNS_BEFORE_CAPTURE = 2
# At the end of the process, what calls in other threads get to end in all. A call takes milliseconds.
LAST_CALLS_SECONDS = 2.0
# Sizes whose profile is remembered.
MAX_CACHED_CHOICES = 4096
# In the rows that pad a batch: a query of one unknown word, which no mask makes empty.
_PADDING = {"query_length": 1}
# bfloat16 is not known to NumPy: its bits are.
_DTYPES = {"FLOAT": "f4", "HALF": "f2", "BF16": "u2", "INT32": "i4", "INT64": "i8", "UINT8": "u1"}


@dataclasses.dataclass
class _ExecutionState:
    """One (profile, shape): a context set to it, views of the staging memory, and the CUDA graph once captured."""

    context: Any
    inputs: Mapping[str, np.ndarray]
    outputs: Mapping[str, np.ndarray]
    bytes_in: int
    bytes_out: int
    runs: int = 0
    graph: int | None = None


class TensorRTEngine:
    """One plan on the GPU.

    Attributes:
        path, sidecar: the plan's.
        cuda: the GPU.
        domains: its optimization profiles.
        turn: held by the one thread that uses it; networks of one model share theirs.
        resident: where the encodings' tensors lie on the device, by how many there are (profiles may differ) and name.
        staged: page-locked memory of the same shapes, from which they are copied there.
        closed: whether everything was given back.
        gpu_ms: milliseconds that the GPU spent on the network since `gpu_ms` was last set to 0; counted only while
            `timed`.
    """

    def __init__(self, library: Any, cuda: Cuda, path: Path, sidecar: EngineMetadata) -> None:
        self.path, self.sidecar, self.cuda = path, sidecar, cuda
        self.gpu_ms = 0.0
        self._trt = library
        self._logger = logger_for(library)
        self._programs: collections.OrderedDict[tuple[int, ...], _ExecutionState] = collections.OrderedDict()
        self._device: list[int] = []
        self._pinned: list[np.ndarray] = []
        self._device_bytes = 0
        self._timed = False
        self._captures = not hasattr(library, "CudaGraphStrategy")
        # Whether the last capture failed and nothing has run since.
        self._capture_failed = False
        # Of TensorRT-RTX: what every context is made with, and the compiled kernels that all of them share.
        self._config: Any = None
        self._cache: Any = None
        version = f"{library.__name__} {library.__version__}"
        key = Key(str(sidecar.content["sha256"][path.name]), version, f"{cuda.name} ({cuda.capability})")
        self._kernels = KernelCache(path, key)
        self._choices: dict[tuple[int, ...], tuple[OptimizationProfile, dict[str, int]]] = {}
        self._streams: list[int] = []
        self._events: list[int] = []
        # Rows that were answered since the plan was opened.
        self.rows_answered = 0
        # Tokens up to which another plan answers in place of this one.
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
        cuda = self.cuda
        self._stream = cuda.stream()
        self._streams.append(self._stream)
        self._events += [cuda.event(), cuda.event()]
        # The runtime must live as long as its engine.
        with explain_startup_failure(self._trt, self._logger, cuda.driver):
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
        self._expect(
            self._engine is not None,
            "load the plan",
            f"; build it again: `{engine_compatibility.rebuild_command(self.path, self.sidecar)}`",
        )
        part = self.sidecar.manifest.part
        self._axes = AXES[part]
        self._resident = (ENCODED_FEATURES, SPANS) if part == "query" else ()
        self._outputs = OTHER_OUTPUTS.get(part, HEAD_NAMES)
        self._dtypes = self._read_tensors(self._outputs)
        self.half_bits = self._half_bits()
        self.domains = [self._domain(index) for index in range(self._engine.num_optimization_profiles)]
        # Neither a video part nor an extractor takes queries.
        ranges = [profile.ranges.get("query_length", MinOptMax(0, 0, 0)) for profile in self.domains]
        self.query_length = MinOptMax.covering(ranges)
        self._scratch_bytes = int(
            self._engine.device_memory_size_v2
            if hasattr(self._engine, "device_memory_size_v2")
            else self._engine.device_memory_size
        )
        self._scratch = self._allocate(self._scratch_bytes)
        self._allocate_staging()

    def _half_bits(self) -> bool:
        """Return whether encoded features are bfloat16, which is copied as 16-bit integers."""
        if ENCODED_FEATURES not in self._dtypes:
            return False
        return bool(self._dtypes[ENCODED_FEATURES].kind == "u")

    def _read_tensors(self, outputs: Sequence[str]) -> dict[str, np.dtype]:
        """Return the tensors' types, after checking that they are those of such a part."""
        engine, trt = self._engine, self._trt
        names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        inputs = {name for name in names if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT}
        wrong = (inputs ^ set(self._axes)) | ((set(names) - inputs) ^ set(outputs))
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
        shapes = {
            name: [tuple(shape) for shape in self._engine.get_tensor_profile_shape(name, index)] for name in self._axes
        }
        return profile_from_shapes(index, self._axes, shapes, frozenset(("video",)) if self._resident else frozenset())

    def _allocate_staging(self) -> None:
        """Allocate what the largest shape of any profile needs, and the encodings' place on the device and before."""
        self.resident: dict[tuple[int, str], int] = {}
        self.staged: dict[tuple[int, str], np.ndarray] = {}
        bytes_in = bytes_out = ALIGNMENT
        for profile in self.domains:
            shapes = profile.shapes(self._axes, profile.largest())
            for name in self._resident:
                key = (shapes[name][0], name)
                if key not in self.resident:
                    region = TensorSlice(0, shapes[name], self._dtypes[name])
                    self.resident[key] = self._allocate(region.size)
                    self.staged[key] = region.view(self._new_pinned(region.size))
            context = self._context(profile, shapes)
            bytes_in = max(bytes_in, self._layout_in(shapes)[1])
            bytes_out = max(bytes_out, self._layout_out(context)[1])
            self._tails = {name: tuple(context.get_tensor_shape(name))[1:] for name in self._outputs}
        self._device_in, self._device_out = self._allocate(bytes_in), self._allocate(bytes_out)
        self._host_in, self._host_out = self._new_pinned(bytes_in), self._new_pinned(bytes_out)

    def _new_pinned(self, size: int) -> np.ndarray:
        self._pinned.append(self.cuda.pinned(size))
        return self._pinned[-1]

    def _allocate(self, size: int) -> int:
        self._device.append(self.cuda.allocate(size))
        self._device_bytes += size
        return self._device[-1]

    def _layout_in(self, shapes: Mapping[str, tuple[int, ...]]) -> Any:
        staged = {name: shape for name, shape in shapes.items() if name not in self._resident}
        return pack_tensors(staged, self._dtypes)

    def _layout_out(self, context: Any) -> Any:
        return pack_tensors({name: tuple(context.get_tensor_shape(name)) for name in self._outputs}, self._dtypes)

    def nothing(self) -> dict[str, np.ndarray]:
        """Return the outputs of no rows, which no profile takes."""
        return {name: np.empty((0, *tail), self._dtypes[name]) for name, tail in self._tails.items()}

    def _context(self, profile: OptimizationProfile, shapes: Mapping[str, tuple[int, ...]]) -> Any:
        """Return a new context set to a profile and to shapes, on the shared scratch memory."""
        context = self._bare_context()
        self._expect(context is not None, "create an execution context")
        # TensorRT 8.6 takes the address alone.
        if hasattr(context, "set_device_memory"):
            context.set_device_memory(self._scratch, self._scratch_bytes)
        else:
            context.device_memory = self._scratch
        if not context.set_optimization_profile_async(profile.index, self._stream):
            # TensorRT 8 lets one context have a profile, unless the plan was built to share it.
            self._forget_profile(profile.index)
            chosen = context.set_optimization_profile_async(profile.index, self._stream)
            self._expect(chosen, f"choose profile {profile.index}")
        # A profile is switched on the stream, and shapes must not be set before it has been.
        self.cuda.synchronize(self._stream)
        for name, shape in shapes.items():
            self._expect(context.set_input_shape(name, shape), f"set {name} to {shape}")
        return context

    def _bare_context(self) -> Any:
        trt, engine = self._trt, self._engine
        if not hasattr(trt, "ExecutionContextAllocationStrategy"):
            return engine.create_execution_context_without_device_memory()
        strategy = trt.ExecutionContextAllocationStrategy.USER_MANAGED
        if not hasattr(trt, "CudaGraphStrategy"):
            return engine.create_execution_context(strategy)
        if self._config is None:
            # TensorRT-RTX compiles kernels while it runs, so it alone knows when to capture; it does so by itself.
            config = engine.create_runtime_config()
            config.set_execution_context_allocation_strategy(strategy)
            config.cuda_graph_strategy = trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
            cache = config.create_runtime_cache()
            stored = self._kernels.read()
            if stored is not None and not cache.deserialize(stored):
                # Of the driver, for one, which the file does not name.
                self._kernels.ignore("TensorRT-RTX refuses it on this machine")
            self._logger.lines.clear()
            self._expect(config.set_runtime_cache(cache), "use a runtime cache")
            self._config = config
            self._cache = cache
        return engine.create_execution_context(self._config)

    def save_kernels(self) -> None:
        """Write what TensorRT-RTX compiled so far beside the plan; plans of TensorRT hold their kernels."""
        if not hasattr(self._trt, "CudaGraphStrategy") or self._cache is None:
            return
        content = self._cache.serialize()
        if content is not None:
            self._kernels.write(bytes(content))

    @property
    def timed(self) -> bool:
        """Return whether `gpu_ms` is measured, by events around the network alone, without the copies."""
        return self._timed

    @timed.setter
    def timed(self, timed: bool) -> None:
        if timed != self._timed:
            # What was captured holds the copies or leaves them out, as it was then.
            self.forget_programs()
        self._timed = timed

    def run(self, inputs: Mapping[str, np.ndarray], sizes: Mapping[str, int]) -> dict[str, np.ndarray]:
        """Return the outputs, copied, of the rows that were given.

        Args:
            inputs: what is not resident; fewer rows, or shorter queries, than the engine takes are padded.
            sizes: how many there are along each axis.

        Raises:
            ShapeError: no profile takes them, or a size that is fixed is another.
            OutOfDeviceMemory: the GPU's memory is full.
        """
        profile, padded = self.choose(sizes)
        program = self._program(profile, padded)
        for name, view in program.inputs.items():
            _fill(name, view, inputs[name], self._axes[name])
        try:
            self._complete(program)
        except OutOfDeviceMemory:
            raise
        except CudaError:
            if not self._capture_failed:
                raise
            # The library may keep the error of a capture, and report it once more. Inputs are still in their places.
            self.forget_programs()
            program = self._program(profile, padded)
            self._complete(program)
        self._capture_failed = False
        if self._timed:
            self.gpu_ms += self.cuda.elapsed_ms(*self._events)
        program.runs += 1
        rows = sizes["batch"] if "batch" in sizes else sizes["video"]
        self.rows_answered += rows
        answers = {name: view[:rows].copy() for name, view in program.outputs.items()}
        # A shape that comes a second time will come again. The run just done has settled what was deferred.
        if program.runs >= RUNS_BEFORE_CAPTURE and program.graph is None and self._captures:
            self._capture(program)
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
        shapes = profile.shapes(self._axes, sizes)
        inputs = {
            name: np.full(shapes[name], _PADDING.get(name, 0), self._dtypes[name])
            for name in self._axes
            if name not in self._resident
        }
        for _ in range(RUNS_BEFORE_CAPTURE):
            self.run(inputs, sizes)
        if self.key(sizes) not in self._programs:
            # A capture that failed gave the context back.
            self.run(inputs, sizes)

    def _complete(self, program: _ExecutionState) -> None:
        """Run a program and wait for it."""
        try:
            self._submit(program)
            self.cuda.synchronize(self._stream)
        except BaseException:
            # What is on its way must not meet the next call in the staging memory.
            with contextlib.suppress(CudaError):
                self.cuda.synchronize(self._stream)
            raise

    def choose(self, sizes: Mapping[str, int]) -> tuple[OptimizationProfile, dict[str, int]]:
        """Return the profile for a request and the sizes it is padded to; see `batch_shapes.choose`."""
        key = tuple(sizes.values())
        if key not in self._choices:
            if len(self._choices) >= MAX_CACHED_CHOICES:
                self._choices.clear()
            self._choices[key] = choose(self.domains, sizes)
        return self._choices[key]

    def upload(self, name: str, slots: int, slot: int) -> None:
        """Copy one encoding to the device, ahead of the next run, from where it was put in `staged`.

        Each place there is copied to one slot alone, so that nothing has to wait before it is written again.
        """
        host = self.staged[slots, name][slot]
        self.cuda.copy_in(self.resident[slots, name] + slot * host.nbytes, host.ctypes.data, host.nbytes, self._stream)

    def _program(self, profile: OptimizationProfile, sizes: Mapping[str, int]) -> _ExecutionState:
        key = (profile.index, *sizes.values())
        program = self._programs.get(key)
        if program is None:
            while len(self._programs) >= MAX_EXECUTION_STATES:
                self._forget(next(iter(self._programs)))
            program = self._programs[key] = self._new_program(profile, sizes)
        self._programs.move_to_end(key)
        return program

    def _new_program(self, profile: OptimizationProfile, sizes: Mapping[str, int]) -> _ExecutionState:
        shapes = profile.shapes(self._axes, sizes)
        context = self._context(profile, shapes)
        inputs, bytes_in = self._layout_in(shapes)
        outputs, bytes_out = self._layout_out(context)
        addresses = {name: self.resident[shapes[name][0], name] for name in self._resident}
        addresses.update((name, self._device_in + region.offset) for name, region in inputs.items())
        addresses.update((name, self._device_out + region.offset) for name, region in outputs.items())
        for name, address in addresses.items():
            self._expect(context.set_tensor_address(name, address), f"place {name}")
        return _ExecutionState(
            context,
            {name: region.view(self._host_in) for name, region in inputs.items()},
            {name: region.view(self._host_out) for name, region in outputs.items()},
            bytes_in,
            bytes_out,
        )

    def _submit(self, program: _ExecutionState) -> None:
        """Put a run on the stream: copy in, network, copy out, or the graph of them."""
        if program.graph is not None and not self._timed:
            self.cuda.launch(program.graph, self._stream)
            return
        self._copy_in(program)
        if self._timed:
            self.cuda.record(self._events[0], self._stream)
        if program.graph is not None:
            self.cuda.launch(program.graph, self._stream)
        else:
            self._enqueue(program)
        if self._timed:
            self.cuda.record(self._events[1], self._stream)
        self._copy_out(program)

    def _copy_in(self, program: _ExecutionState) -> None:
        self.cuda.copy_in(self._device_in, self._host_in.ctypes.data, program.bytes_in, self._stream)

    def _enqueue(self, program: _ExecutionState) -> None:
        done = program.context.execute_async_v3(self._stream)
        way_out = ""
        if not done and engine_compatibility.is_hardware_compatible(self.sidecar.content):
            # Kernels chosen for Ampere and later may fail on a GPU that they were not tried on (pytorch/TensorRT#4481).
            command = engine_compatibility.rebuild_command(self.path, self.sidecar, here=True)
            way_out = f"; a hardware-compatible plan may fail on another GPU, so rebuild it on this one: `{command}`"
        self._expect(done, "run", way_out)

    def _copy_out(self, program: _ExecutionState) -> None:
        self.cuda.copy_out(self._host_out.ctypes.data, self._device_out, program.bytes_out, self._stream)

    def _capture(self, program: _ExecutionState) -> None:
        """Capture a program that has just run; where that cannot be done, go on without, and say so once."""
        steps: tuple[Callable[[_ExecutionState], None], ...] = (self._copy_in, self._enqueue, self._copy_out)
        try:
            try:
                self.cuda.begin_capture(self._stream)
                # Events in a graph are not timed, so what is timed is captured alone.
                for step in (self._enqueue,) if self._timed else steps:
                    step(program)
            except BaseException:
                self.cuda.drop_capture(self._stream)
                raise
            program.graph = self.cuda.end_capture(self._stream)
        except (CudaError, ModelFileError) as error:
            self._captures = False
            self._capture_failed = True
            # A context whose capture failed may fail from then on.
            self.forget_programs()
            # A plan for queries of one length has no loop.
            looping = self.query_length.min < self.query_length.max
            hint = " Its LSTM is a loop, which `export.build_engine --unroll 6 10` writes out." if looping else ""
            if looping and self.answers_above:
                hint = f" It answers only queries of more than {self.answers_above} tokens."
            log.warning(
                "%s cannot be captured in a CUDA graph and runs without, which is slower: %s%s",
                self.path.name,
                # A log may keep the error itself, and with it the frames that hold the context.
                str(error),
                hint,
            )

    def _expect(self, ok: Any, doing: str, way_out: str = "") -> None:
        """Raise what TensorRT said unless a call went well."""
        if ok:
            self._logger.lines.clear()
            return
        message = "; ".join(self._logger.lines)[:500] or "it did not say why"
        self._logger.lines.clear()
        sentence = f"{self._trt.__name__} {self._trt.__version__} could not {doing} of {self.path.name}: {message}"
        kind = OutOfDeviceMemory if is_out_of_memory(message) else CudaError
        raise kind(f"{sentence.rstrip('.')}{way_out}.")

    def forget_programs(self) -> None:
        """Give back every context and graph; they are made again when needed."""
        for key in list(self._programs):
            self._forget(key)

    def _forget_profile(self, index: int) -> None:
        for key in [key for key in self._programs if key[0] == index]:
            self._forget(key)

    def _forget(self, key: tuple[int, ...]) -> None:
        program = self._programs.pop(key)
        if program.graph is not None:
            self.cuda.destroy_graph(program.graph)

    @property
    def bytes_held(self) -> tuple[int, int, int]:
        """Bytes of the plan, of buffers on the device, and of page-locked memory."""
        return self._plan_bytes, self._device_bytes, sum(array.nbytes for array in self._pinned)

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
            for stream in self._streams:
                self.cuda.synchronize(stream)
        self.save_kernels()
        with contextlib.suppress(CudaError):
            self.forget_programs()
        self._config = self._cache = None
        self._engine = self._runtime = None
        freed: list[tuple[Callable[[Any], None], Sequence[Any]]] = [
            (self.cuda.free, self._device),
            (self.cuda.unpin, self._pinned),
            (self.cuda.destroy_event, self._events),
            (self.cuda.destroy_stream, self._streams),
        ]
        for free, things in freed:
            for thing in things:
                with contextlib.suppress(CudaError):
                    free(thing)
        self._device, self._pinned, self._events, self._streams = [], [], [], []

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


@contextlib.contextmanager
def explain_startup_failure(trt: Any, logger: Any, driver: str | None) -> Iterator[None]:
    """Say what it means where TensorRT's own objects cannot be made, which its constructors do not report.

    Args:
        trt: the library.
        logger: the one it was given.
        driver: the newest CUDA that the driver runs.

    Raises:
        DeviceError: with the library's last words, which are a warning of CUDA's error code.
    """
    try:
        yield
    except TypeError as error:
        message = "; ".join(logger.lines) or logger.warned or str(error)
        raise DeviceError(
            f"{trt.__name__} {trt.__version__} could not start on this machine, whose driver runs CUDA "
            f"{driver or 'of an unknown version'} and older: {message.rstrip('.')}; install a newer driver, or a build "
            "of the library for that CUDA.",
            code="driver_too_old",
        ) from error


def logger_for(trt: Any) -> Any:
    """Return a logger of TensorRT's that keeps errors, and the last warning, for our messages."""

    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.lines: list[str] = []
            self.warned = ""

        def log(self, severity: Any, message: str) -> None:
            # TensorRT breaks lines within a message, also before its last bracket.
            line = " ".join(message.split())
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                self.lines.append(line)
            elif severity == trt.ILogger.WARNING:
                self.warned = line
                log.debug("TensorRT: %s", self.warned)

    return Logger()
