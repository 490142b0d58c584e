"""Create the execution contexts of one engine, run them, and capture them in CUDA graphs."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from runtime.backends.batch_shapes import OptimizationProfile, Shape, TensorSlice, pack_tensors
from runtime.backends.cuda_driver import CudaError, OutOfDeviceMemory
from runtime.backends.device_buffers import DeviceBuffers
from runtime.backends.rtx_runtime_cache import KernelCache
from runtime.backends.tensorrt_logger import CallChecker
from runtime.core.errors import ModelFileError
from runtime.core.lru_cache import LruCache

# Contexts, each with its CUDA graph; the least recently used is released first. There is room for all sizes of batches
# to 32 and of queries to 16 words, which a service meets in any order, so that no context is created twice.
MAX_EXECUTION_STATES = 64


@dataclasses.dataclass(frozen=True)
class EngineTensors:
    """The inputs and outputs of an engine.

    Attributes:
        axes: of each input the sizes that are free; see `batch_shapes.AXES`.
        encodings: inputs that stay on the device.
        outputs: names, in the order of the results.
        dtypes: of all.
    """

    axes: Mapping[str, tuple[str, ...]]
    encodings: tuple[str, ...]
    outputs: tuple[str, ...]
    dtypes: Mapping[str, np.dtype]

    def pack_inputs(self, shapes: Mapping[str, Shape]) -> tuple[dict[str, TensorSlice], int]:
        """Return the slices of the inputs that are copied for each run, and their bytes."""
        copied = {name: shape for name, shape in shapes.items() if name not in self.encodings}
        return pack_tensors(copied, self.dtypes)

    def pack_outputs(self, context: Any) -> tuple[dict[str, TensorSlice], int]:
        """Return the slices of the outputs of a context that is set to shapes, and their bytes."""
        return pack_tensors({name: tuple(context.get_tensor_shape(name)) for name in self.outputs}, self.dtypes)


@dataclasses.dataclass
class ExecutionState:
    """One profile and shape: a context set to it, views of the staging memory, and the CUDA graph once captured."""

    profile: OptimizationProfile
    sizes: Mapping[str, int]
    context: Any
    inputs: Mapping[str, np.ndarray]
    outputs: Mapping[str, np.ndarray]
    bytes_in: int
    bytes_out: int
    runs: int = 0
    graph: int | None = None


class ExecutionContexts:
    """The execution contexts of one engine.

    There is one for each profile and shape, since a CUDA graph replays what its context was set to when it was
    captured. All contexts share their scratch memory, which only one uses at a time.

    Args:
        trt: the library.
        engine: of the library.
        tensors: its inputs and outputs.
        buffers: its memory.
        kernels: file for the kernels that TensorRT-RTX compiles.
        checker: raises errors of the library.
        run_advice: returns what to do if a run fails, as the end of a sentence.

    Attributes:
        states: by profile and padded sizes.
        captures: whether states can be captured: not by this class for TensorRT-RTX, and no more after a failure.
        scratch_bytes: memory that all contexts share.
        gpu_ms: milliseconds that the GPU spent on the network since this was last set to 0, if `timed`.
    """

    def __init__(
        self,
        trt: Any,
        engine: Any,
        tensors: EngineTensors,
        buffers: DeviceBuffers,
        kernels: KernelCache,
        checker: CallChecker,
        run_advice: Callable[[], str],
    ) -> None:
        self.states: LruCache[tuple[int, ...], ExecutionState] = LruCache(MAX_EXECUTION_STATES)
        self._timed = False
        self.gpu_ms = 0.0
        self._trt, self._engine = trt, engine
        self._tensors, self._buffers, self._cuda = tensors, buffers, buffers.cuda
        self._kernels, self._checker, self._run_advice = kernels, checker, run_advice
        size = engine.device_memory_size_v2 if hasattr(engine, "device_memory_size_v2") else engine.device_memory_size
        self.scratch_bytes = int(size)
        # TensorRT-RTX captures by itself.
        self.captures = not hasattr(trt, "CudaGraphStrategy")
        # Whether the last capture failed and nothing has run since.
        self._capture_failed = False
        # Of TensorRT-RTX: what every context is created with, and the compiled kernels that all of them share.
        self._config: Any = None
        self._cache: Any = None

    def create(self, profile: OptimizationProfile, shapes: Mapping[str, Shape]) -> Any:
        """Return a new context set to a profile and to shapes."""
        context = self._create_unset()
        self._checker.require(context is not None, "create an execution context")
        # TensorRT 8.6 takes the address alone.
        if hasattr(context, "set_device_memory"):
            context.set_device_memory(self._buffers.scratch, self.scratch_bytes)
        else:
            context.device_memory = self._buffers.scratch
        stream = self._buffers.stream
        if not context.set_optimization_profile_async(profile.index, stream):
            # TensorRT 8 lets one context have a profile, unless the engine was built to share it.
            self._release_profile(profile.index)
            chosen = context.set_optimization_profile_async(profile.index, stream)
            self._checker.require(chosen, f"choose profile {profile.index}")
        # A profile is switched on the stream, and shapes must not be set before it has been.
        self._cuda.synchronize(stream)
        for name, shape in shapes.items():
            self._checker.require(context.set_input_shape(name, shape), f"set {name} to {shape}")
        return context

    def _create_unset(self) -> Any:
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
            self._checker.discard()
            self._checker.require(config.set_runtime_cache(cache), "use a runtime cache")
            self._config = config
            self._cache = cache
        return engine.create_execution_context(self._config)

    def save_kernels(self) -> None:
        """Write what TensorRT-RTX has compiled beside the engine file; engines of TensorRT contain their kernels."""
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
            # What was captured contains the copies or not, as it was then.
            self.release()
        self._timed = timed

    def state(self, profile: OptimizationProfile, sizes: Mapping[str, int]) -> ExecutionState:
        """Return the state of a profile and padded sizes, which is created if there is none."""
        key = (profile.index, *sizes.values())
        state = self.states.get(key)
        if state is None:
            while len(self.states) >= MAX_EXECUTION_STATES:
                self._release(self.states.pop_oldest())
            state = self._new_state(profile, sizes)
            self.states.put(key, state)
        return state

    def _new_state(self, profile: OptimizationProfile, sizes: Mapping[str, int]) -> ExecutionState:
        tensors, buffers = self._tensors, self._buffers
        shapes = profile.shapes(tensors.axes, sizes)
        context = self.create(profile, shapes)
        inputs, bytes_in = tensors.pack_inputs(shapes)
        outputs, bytes_out = tensors.pack_outputs(context)
        addresses = {name: buffers.encodings[shapes[name][0], name] for name in tensors.encodings}
        addresses.update((name, buffers.device_in + region.offset) for name, region in inputs.items())
        addresses.update((name, buffers.device_out + region.offset) for name, region in outputs.items())
        for name, address in addresses.items():
            self._checker.require(context.set_tensor_address(name, address), f"set the address of {name}")
        return ExecutionState(
            profile,
            sizes,
            context,
            {name: region.view(buffers.host_in) for name, region in inputs.items()},
            {name: region.view(buffers.host_out) for name, region in outputs.items()},
            bytes_in,
            bytes_out,
        )

    def run(self, state: ExecutionState) -> ExecutionState:
        """Copy the inputs in, run the network, copy the outputs out, and wait.

        Returns:
            The state that ran, whose outputs are filled: another one of the same shape after a failed capture.

        Raises:
            CudaError: TensorRT or the GPU failed.
            OutOfDeviceMemory: the GPU's memory is full.
        """
        try:
            self._complete(state)
        except OutOfDeviceMemory:
            raise
        except CudaError:
            if not self._capture_failed:
                raise
            # The library may store the error of a capture, and report it once more. Inputs are still staged.
            self.release()
            state = self.state(state.profile, state.sizes)
            self._complete(state)
        self._capture_failed = False
        if self._timed:
            self.gpu_ms += self._cuda.elapsed_ms(*self._buffers.events)
        state.runs += 1
        return state

    def _complete(self, state: ExecutionState) -> None:
        """Run a state and wait for it."""
        stream = self._buffers.stream
        try:
            self._submit(state, stream)
            self._cuda.synchronize(stream)
        except BaseException:
            # What is on its way must not meet the next call in the staging memory.
            with contextlib.suppress(CudaError):
                self._cuda.synchronize(stream)
            raise

    def _submit(self, state: ExecutionState, stream: int) -> None:
        """Put a run on the stream: copy in, network, copy out, or the graph of them."""
        if state.graph is not None and not self._timed:
            self._cuda.launch(state.graph, stream)
            return
        self._buffers.copy_in(state.bytes_in)
        if self._timed:
            self._cuda.record(self._buffers.events[0], stream)
        if state.graph is not None:
            self._cuda.launch(state.graph, stream)
        else:
            self._enqueue(state)
        if self._timed:
            self._cuda.record(self._buffers.events[1], stream)
        self._buffers.copy_out(state.bytes_out)

    def _enqueue(self, state: ExecutionState) -> None:
        done = state.context.execute_async_v3(self._buffers.stream)
        self._checker.require(done, "run", "" if done else self._run_advice())

    def capture(self, state: ExecutionState) -> str | None:
        """Capture a state that has just run in a CUDA graph, unless an earlier capture failed.

        Returns:
            The error if this capture failed, else None.
        """
        if not self.captures:
            return None
        stream = self._buffers.stream
        try:
            try:
                self._cuda.begin_capture(stream)
                # Events in a graph are not timed, so what is timed is captured alone.
                if not self._timed:
                    self._buffers.copy_in(state.bytes_in)
                self._enqueue(state)
                if not self._timed:
                    self._buffers.copy_out(state.bytes_out)
            except BaseException:
                self._cuda.drop_capture(stream)
                raise
            state.graph = self._cuda.end_capture(stream)
        except (CudaError, ModelFileError) as error:
            self.captures = False
            self._capture_failed = True
            # A context whose capture failed may fail from then on.
            self.release()
            # A log may store the error itself, and with it the frames that hold the context.
            return str(error)
        return None

    def release(self) -> None:
        """Release every context and graph; they are created again when needed."""
        while len(self.states):
            self._release(self.states.pop_oldest())

    def _release_profile(self, index: int) -> None:
        for key in [key for key, _ in self.states.items() if key[0] == index]:
            self._release(self.states.pop(key))

    def _release(self, state: ExecutionState | None) -> None:
        if state is not None and state.graph is not None:
            self._cuda.destroy_graph(state.graph)

    def close(self) -> None:
        """Release what depends on the engine, and the engine; the object must not be used any more."""
        self.save_kernels()
        with contextlib.suppress(CudaError):
            self.release()
        self._config = self._cache = self._engine = None
