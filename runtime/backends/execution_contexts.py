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

# Enough for all padded batch sizes up to 32 and query lengths up to 16, so that a service creates each context once.
MAX_EXECUTION_STATES = 64


@dataclasses.dataclass(frozen=True)
class EngineTensors:
    """The inputs and outputs of an engine.

    Attributes:
        axes: input name to the names of its dynamic axes; see `batch_shapes.AXES`.
        encodings: names of the inputs that stay on the device.
        outputs: names of the outputs, in the order of the results.
    """

    axes: Mapping[str, tuple[str, ...]]
    encodings: tuple[str, ...]
    outputs: tuple[str, ...]
    dtypes: Mapping[str, np.dtype]

    def pack_inputs(self, shapes: Mapping[str, Shape]) -> tuple[dict[str, TensorSlice], int]:
        """Return the layout of the inputs that are copied for each run, as `pack_tensors` returns it."""
        copied = {name: shape for name, shape in shapes.items() if name not in self.encodings}
        return pack_tensors(copied, self.dtypes)

    def pack_outputs(self, context: Any) -> tuple[dict[str, TensorSlice], int]:
        """Return the layout of the outputs of a context whose input shapes are set, as `pack_tensors` returns it."""
        return pack_tensors({name: tuple(context.get_tensor_shape(name)) for name in self.outputs}, self.dtypes)


@dataclasses.dataclass
class ExecutionState:
    """The execution context of one profile and shape.

    Attributes:
        profile, sizes: the profile, and the padded size of each of its axes.
        context: TensorRT's `IExecutionContext`, with the shapes of `sizes` set.
        inputs, outputs: tensor name to a view of page-locked memory.
        bytes_in, bytes_out: bytes that one run copies.
        graph: CUDA graph of a run; None until it is captured.
    """

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
    """The execution contexts of one engine, one for each profile and shape.

    A CUDA graph replays the shapes that its context had when it was captured. All contexts share scratch memory, which
    only one uses at a time.

    Args:
        engine: TensorRT's `ICudaEngine`, deserialized.
        run_advice: returns what to do if a run fails, as the end of an error message.

    Attributes:
        states: execution states by profile index and padded sizes.
        captures: whether CUDA graphs are captured: False after a failure, and for TensorRT-RTX, which captures itself.
        gpu_ms: milliseconds that the GPU spent on the network since this was set to 0, if `timed`.
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
        self._is_rtx = hasattr(trt, "CudaGraphStrategy")
        self.captures = not self._is_rtx
        # Whether the last capture failed and nothing has run since.
        self._capture_failed = False
        # TensorRT-RTX only: the configuration of contexts, and the kernels that they share.
        self._config: Any = None
        self._cache: Any = None

    def create(self, profile: OptimizationProfile, shapes: Mapping[str, Shape]) -> Any:
        """Return a new `IExecutionContext` for a profile and input shapes.

        Raises:
            CudaError: TensorRT cannot create the context, or rejects a shape.
            OutOfDeviceMemory: the GPU's memory is full.
        """
        context = self._create_context()
        self._checker.require(
            context is not None,
            "create an execution context",
            ". Check the GPU with `drn doctor`, or build the engine again with `python -m export.build_engine`",
        )
        # TensorRT 8.6 has a property for the address, without the size.
        if hasattr(context, "set_device_memory"):
            context.set_device_memory(self._buffers.scratch, self.scratch_bytes)
        else:
            context.device_memory = self._buffers.scratch
        stream = self._buffers.stream
        if not context.set_optimization_profile_async(profile.index, stream):
            # In TensorRT 8 only one context can use a profile, unless the engine was built to share it.
            self._release_profile(profile.index)
            selected = context.set_optimization_profile_async(profile.index, stream)
            self._checker.require(selected, f"select profile {profile.index}")
        # The profile is switched on the stream, and shapes must not be set before.
        self._cuda.synchronize(stream)
        for name, shape in shapes.items():
            self._checker.require(context.set_input_shape(name, shape), f"set {name} to {shape}")
        return context

    def _create_context(self) -> Any:
        trt, engine = self._trt, self._engine
        if not hasattr(trt, "ExecutionContextAllocationStrategy"):
            return engine.create_execution_context_without_device_memory()
        strategy = trt.ExecutionContextAllocationStrategy.USER_MANAGED
        if not self._is_rtx:
            return engine.create_execution_context(strategy)
        if self._config is None:
            config = engine.create_runtime_config()
            config.set_execution_context_allocation_strategy(strategy)
            # TensorRT-RTX compiles kernels while it runs, so only it can tell when a capture is possible.
            config.cuda_graph_strategy = trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
            cache = config.create_runtime_cache()
            stored = self._kernels.read()
            if stored is not None and not cache.deserialize(stored):
                # For example, another driver version, which the file does not record.
                self._kernels.ignore("TensorRT-RTX rejects it on this machine")
            self._checker.discard()
            self._checker.require(config.set_runtime_cache(cache), "use a runtime cache")
            self._config, self._cache = config, cache
        return engine.create_execution_context(self._config)

    def save_kernels(self) -> None:
        """Write the kernels that TensorRT-RTX has compiled; other engines contain theirs."""
        # Only TensorRT-RTX has this enum, and runtime caches.
        if not hasattr(self._trt, "CudaGraphStrategy") or self._cache is None:
            return
        content = self._cache.serialize()
        if content is not None:
            self._kernels.write(bytes(content))

    @property
    def timed(self) -> bool:
        """Return whether `gpu_ms` is measured, by events around the network without the copies."""
        return self._timed

    @timed.setter
    def timed(self, timed: bool) -> None:
        if timed != self._timed:
            # A graph contains the copies only if it was captured untimed.
            self.release()
        self._timed = timed

    def state(self, profile: OptimizationProfile, sizes: Mapping[str, int]) -> ExecutionState:
        """Return the state of a profile and padded sizes, which is created at the first call.

        Args:
            sizes: axis to padded size, as `choose_profile` returns them.
        """
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
        addresses.update((name, buffers.device_in + layout.offset) for name, layout in inputs.items())
        addresses.update((name, buffers.device_out + layout.offset) for name, layout in outputs.items())
        for name, address in addresses.items():
            self._checker.require(context.set_tensor_address(name, address), f"set the address of {name}")
        return ExecutionState(
            profile,
            sizes,
            context,
            {name: layout.view(buffers.host_in) for name, layout in inputs.items()},
            {name: layout.view(buffers.host_out) for name, layout in outputs.items()},
            bytes_in,
            bytes_out,
        )

    def run(self, state: ExecutionState) -> ExecutionState:
        """Copy the inputs to the GPU, run the network, copy the outputs back, and wait.

        Returns:
            The state with filled outputs: `state`, or a new one of the same shape after a failed capture.

        Raises:
            CudaError: TensorRT or the GPU failed.
            OutOfDeviceMemory: the GPU's memory is full.
        """
        try:
            self._run_and_wait(state)
        except OutOfDeviceMemory:
            raise
        except CudaError:
            if not self._capture_failed:
                raise
            # TensorRT may report the error of a failed capture once more. The inputs are still in the staging memory.
            self.release()
            state = self.state(state.profile, state.sizes)
            self._run_and_wait(state)
        self._capture_failed = False
        if self._timed:
            self.gpu_ms += self._cuda.elapsed_ms(*self._buffers.events)
        state.runs += 1
        return state

    def _run_and_wait(self, state: ExecutionState) -> None:
        stream = self._buffers.stream
        try:
            self._enqueue(state, stream)
            self._cuda.synchronize(stream)
        except BaseException:
            # The next call must not overwrite staging memory while copies are pending.
            with contextlib.suppress(CudaError):
                self._cuda.synchronize(stream)
            raise

    def _enqueue(self, state: ExecutionState, stream: int) -> None:
        """Enqueue a run: copies and network, or their CUDA graph."""
        if state.graph is not None and not self._timed:
            self._cuda.launch(state.graph, stream)
            return
        self._buffers.copy_in(state.bytes_in)
        if self._timed:
            self._cuda.record(self._buffers.events[0], stream)
        if state.graph is not None:
            self._cuda.launch(state.graph, stream)
        else:
            enqueued = state.context.execute_async_v3(stream)
            self._checker.require(enqueued, "run the network", "" if enqueued else self._run_advice())
        if self._timed:
            self._cuda.record(self._buffers.events[1], stream)
        self._buffers.copy_out(state.bytes_out)

    def capture(self, state: ExecutionState) -> str | None:
        """Capture a CUDA graph of a state that has just run, unless an earlier capture failed.

        Returns:
            The error message if this capture failed, else None.
        """
        if not self.captures:
            return None
        stream = self._buffers.stream
        try:
            try:
                self._cuda.begin_capture(stream)
                # Events in a graph cannot be read, so a timed graph contains the network only.
                if not self._timed:
                    self._buffers.copy_in(state.bytes_in)
                enqueued = state.context.execute_async_v3(stream)
                # Without advice, because the caller logs a warning.
                self._checker.require(enqueued, "capture the network", "")
                if not self._timed:
                    self._buffers.copy_out(state.bytes_out)
            except BaseException:
                self._cuda.drop_capture(stream)
                raise
            state.graph = self._cuda.end_capture(stream)
        except (CudaError, ModelFileError) as error:
            self.captures = False
            self._capture_failed = True
            # A context may keep failing after a failed capture.
            self.release()
            # Not the error itself: its traceback would keep the context alive.
            return str(error)
        return None

    def release(self) -> None:
        """Release every context and CUDA graph; they are created again when needed."""
        while len(self.states):
            self._release(self.states.pop_oldest())

    def _release_profile(self, index: int) -> None:
        for key in [key for key, _ in self.states.items() if key[0] == index]:
            self._release(self.states.pop(key))

    def _release(self, state: ExecutionState | None) -> None:
        if state is not None and state.graph is not None:
            self._cuda.destroy_graph(state.graph)

    def close(self) -> None:
        """Release the contexts and the engine; the object must not be used afterwards."""
        self.save_kernels()
        with contextlib.suppress(CudaError):
            self.release()
        self._config = self._cache = self._engine = None
