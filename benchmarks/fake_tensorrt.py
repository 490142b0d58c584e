"""Double CUDA's driver and TensorRT with NumPy and ONNX Runtime, and enforce the rules of the real libraries.

The driver executes the work of a stream only when the stream is synchronized, so that early reads and writes of memory
have visible effects. TensorRT has the names of its version; a plan contains the path of its graph.

Rules of the driver, and their sources in the CUDA Driver API documentation and CUDA C++ Programming Guide:

- Device memory has its own addresses, and its initial content is undefined (`cuMemAlloc`: "The memory is not cleared").
- Host memory of asynchronous copies must be page-locked ("API synchronization behavior": other copies are staged).
- Calls act on the current context of the thread (`cuCtxPushCurrent`), or fail with CUDA_ERROR_INVALID_CONTEXT.
- During a capture, waiting for the stream and allocating memory fail and invalidate the capture
  (`cuThreadExchangeStreamCaptureMode`: "prohibited from potentially unsafe API calls"; an H200 returned
  CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED for the wait, benchmarks/results/gpu-2026-11-29-nvidia-h200.md).

Rules of TensorRT, and their sources in NvInferRuntime.h unless another is given:

- A profile is selected on a stream, and shapes must not be set before the stream has done it
  (`setOptimizationProfileAsync`: "must be called before calling setInputShape()", "Not synchronizing the stream ...
  will result in undefined behavior").
- Up to 8.6 a profile belongs to one context, unless profiles are shared (`PreviewFeature::kPROFILE_SHARING_0806`,
  "on in TensorRT 10.0").
- Shapes must be within the profile (`setInputShape`).
- Addresses must be aligned to 256 bytes (`setTensorAddress`).
- A context without memory of its own needs some before it runs (`createExecutionContextWithoutDeviceMemory`,
  `ExecutionContextAllocationStrategy::kUSER_MANAGED`).
- After a change of shapes a context must run once before a capture (Developer Guide, "CUDA Graphs": "Call enqueueV3()
  once after an input shape change to update internal state").

Rules of failures, and their sources:

- A version-compatible plan is rejected unless host code is allowed: `IRuntime::setEngineHostCodeAllowed` in
  NvInferRuntime.h. The message is that of libtensorrt_rtx.so 1.7.1.
- A TensorRT-RTX plan for other compute capabilities is rejected, with the message of libtensorrt_rtx.so 1.7.1. The
  header of a plan records them (`test_plan_header_records_compute_capabilities`).
- TensorRT 8.6 cannot capture an LSTM that is a loop; the message is that of 8.6.0 on an H200 (2026-11-29; "the enqueue
  call may return false if the current CUDA graph capture fails", sampleInference.cpp).
- A context whose capture failed keeps failing (NVIDIA/TensorRT#2603).
- A runtime cache of TensorRT-RTX is valid for one library, GPU and CUDA version (`IRuntimeCache::deserialize`, 1.7.1).
"""

from __future__ import annotations

import collections
import ctypes
import dataclasses
import json
import threading
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

# Handle of the primary context.
CONTEXT = 7
OUT_OF_MEMORY, INVALID_VALUE, INVALID_CONTEXT = 2, 1, 201
CAPTURE_UNSUPPORTED, CAPTURE_INVALIDATED = 900, 901
_NAMES = {1: "CUDA_ERROR_INVALID_VALUE", 2: "CUDA_ERROR_OUT_OF_MEMORY", 201: "CUDA_ERROR_INVALID_CONTEXT"}
# Host code that dereferences a device address should crash.
_DEVICE_SIDE = 1 << 56
VERSIONS = ("8.6.1", "10.16.1.11", "11.4.0.106", "1.7.1.116")


def _written(pointer: Any, value: Any) -> None:
    pointer._obj.value = value


@dataclasses.dataclass
class Stream:
    """Enqueued work that has not been executed."""

    waiting: list[Callable[[], None]] = dataclasses.field(default_factory=list)
    captured: list[Callable[[], None]] | None = None
    broken: bool = False


class Driver:
    """A double of the functions of libcuda that `runtime.backends.cuda_driver` calls.

    Attributes:
        calls: names of all calls, in order.
        room: bytes of device memory.
        full_at: index of the allocation that fails, counted from 0 after this is set.
        failing: name to error code of calls that fail.
    """

    def __init__(self, name: str = "NVIDIA H100", capability: tuple[int, int] = (9, 0), devices: int = 1) -> None:
        self.calls: list[str] = []
        self.room = 1 << 32
        self.full_at: int | None = None
        self.failing: dict[str, int] = {}
        self.streams: dict[int, Stream] = {}
        self.graphs: dict[int, list[Callable[[], None]]] = {}
        self.events: dict[int, float] = {}
        self.clock_ms = 0.0
        self._name, self._capability, self._devices = name, capability, devices
        self._memory: dict[int, Any] = {}
        self._pinned: dict[int, Any] = {}
        self._last = 1000
        self._threads = threading.local()

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("cu"):
            raise AttributeError(name)
        function = getattr(type(self), "_" + name.removesuffix("_v2"), None)
        if function is None:
            raise AttributeError(name)

        def call(*arguments: Any) -> int:
            self.calls.append(name)
            if name in self.failing:
                if name == "cuStreamEndCapture":
                    # The capture ends in any case.
                    self.streams[arguments[0]].captured = None
                return self.failing[name]
            free_of_context = ("cuInit", "cuDriver", "cuDevice", "cuGet", "cuCtx")
            if not name.startswith(free_of_context) and self.stack()[-1:] != [CONTEXT]:
                return INVALID_CONTEXT
            return int(function(self, *arguments) or 0)

        return call

    def stack(self) -> list[int]:
        """Return the stack of contexts of this thread; the last is current."""
        if not hasattr(self._threads, "stack"):
            self._threads.stack = []
        return self._threads.stack

    def held(self) -> dict[str, int]:
        """Return the number of resources by kind that have not been released."""
        resources = {
            "device": self._memory,
            "pinned": self._pinned,
            "streams": self.streams,
            "events": self.events,
            "graphs": self.graphs,
        }
        return {name: len(held) for name, held in resources.items() if held}

    def allocated(self) -> int:
        """Return the bytes of allocated device memory."""
        return sum(len(block) for block in self._memory.values())

    def array(self, address: int, shape: Sequence[int], dtype: np.dtype) -> np.ndarray:
        """Return device memory as an array."""
        size = int(np.prod(shape)) * dtype.itemsize
        start, block = self._block(self._memory, address, size)
        return np.frombuffer(block, np.uint8, size, address - start).view(dtype).reshape(shape)

    def put(self, stream: int, work: Callable[[], None]) -> None:
        """Enqueue work on a stream, or add it to its capture."""
        chosen = self.streams[stream]
        (chosen.waiting if chosen.captured is None else chosen.captured).append(work)

    def capturing(self) -> Stream | None:
        """Return the stream with a capture, if there is one."""
        return next((stream for stream in self.streams.values() if stream.captured is not None), None)

    @staticmethod
    def _block(blocks: dict[int, Any], address: int, size: int) -> tuple[int, Any]:
        for start, block in blocks.items():
            if start <= address and address + size <= start + len(block):
                return start, block
        raise AssertionError(f"{size} bytes at {address:#x} are not in this kind of memory")

    def _forbidden(self) -> int:
        stream = self.capturing()
        if stream is not None:
            stream.broken = True
            return CAPTURE_UNSUPPORTED
        return 0

    def _is_full(self) -> bool:
        if self.full_at is None:
            return False
        self.full_at -= 1
        return self.full_at == -1

    def _handle(self) -> int:
        self._last += 1
        return self._last

    def _cuInit(self, flags: int) -> None: ...

    def _cuDriverGetVersion(self, version: Any) -> None:
        _written(version, 13000)

    def _cuGetErrorName(self, code: int, text: Any) -> None:
        _written(text, _NAMES.get(code, "CUDA_ERROR_UNKNOWN").encode())

    def _cuGetErrorString(self, code: int, text: Any) -> None:
        _written(text, f"code {code}".encode())

    def _cuDeviceGetCount(self, count: Any) -> None:
        _written(count, self._devices)

    def _cuDeviceGet(self, device: Any, ordinal: int) -> None:
        _written(device, ordinal)

    def _cuDeviceGetName(self, text: Any, size: int, device: int) -> None:
        text.value = self._name.encode()

    def _cuDeviceGetAttribute(self, value: Any, attribute: int, device: int) -> None:
        _written(value, {75: self._capability[0], 76: self._capability[1]}[attribute])

    def _cuDevicePrimaryCtxRetain(self, context: Any, device: int) -> None:
        _written(context, CONTEXT)

    def _cuCtxPushCurrent(self, context: int) -> int:
        self.stack().append(context)
        return 0 if context == CONTEXT else INVALID_VALUE

    def _cuCtxPopCurrent(self, context: Any) -> int:
        if not self.stack():
            return INVALID_CONTEXT
        _written(context, self.stack().pop())
        return 0

    def _cuMemGetInfo(self, free: Any, total: Any) -> None:
        _written(free, self.room - self.allocated())
        _written(total, self.room)

    def _cuMemAlloc(self, address: Any, size: int) -> int:
        if self._forbidden():
            return CAPTURE_UNSUPPORTED
        if self._is_full() or self.allocated() + size > self.room:
            return OUT_OF_MEMORY
        block = bytearray(b"\xff" * size)
        start = _DEVICE_SIDE + (self._handle() << 32)
        self._memory[start] = block
        _written(address, start)
        return 0

    def _cuMemFree(self, address: int) -> int:
        return 0 if self._memory.pop(address, None) is not None else INVALID_VALUE

    def _cuMemAllocHost(self, address: Any, size: int) -> int:
        if self._forbidden():
            return CAPTURE_UNSUPPORTED
        if self._is_full():
            return OUT_OF_MEMORY
        block = (ctypes.c_uint8 * size)()
        self._pinned[ctypes.addressof(block)] = block
        _written(address, ctypes.addressof(block))
        return 0

    def _cuMemFreeHost(self, address: int) -> int:
        return 0 if self._pinned.pop(address, None) is not None else INVALID_VALUE

    def _cuMemcpyHtoDAsync(self, address: int, host: int, size: int, stream: int) -> None:
        start, block = self._block(self._memory, address, size)
        self._block(self._pinned, host, size)

        def work() -> None:
            block[address - start : address - start + size] = ctypes.string_at(host, size)

        self.put(stream, work)

    def _cuMemcpyDtoHAsync(self, host: int, address: int, size: int, stream: int) -> None:
        start, block = self._block(self._memory, address, size)
        self._block(self._pinned, host, size)
        self.put(stream, lambda: ctypes.memmove(host, bytes(block[address - start : address - start + size]), size))

    def _cuStreamCreate(self, stream: Any, flags: int) -> None:
        assert flags == 1, "a stream that waits for the default one"
        handle = self._handle()
        self.streams[handle] = Stream()
        _written(stream, handle)

    def _cuStreamSynchronize(self, stream: int) -> int:
        if self._forbidden():
            return CAPTURE_UNSUPPORTED
        waiting = self.streams[stream].waiting
        while waiting:
            waiting.pop(0)()
        return 0

    def _cuStreamDestroy(self, stream: int) -> None:
        del self.streams[stream]

    def _cuStreamBeginCapture(self, stream: int, mode: int) -> None:
        self.streams[stream].captured, self.streams[stream].broken = [], False

    def _cuStreamEndCapture(self, stream: int, graph: Any) -> int:
        captured, broken = self.streams[stream].captured, self.streams[stream].broken
        self.streams[stream].captured = None
        if captured is None:
            return INVALID_VALUE
        if broken:
            return CAPTURE_INVALIDATED
        handle = self._handle()
        self.graphs[handle] = captured
        _written(graph, handle)
        return 0

    def _cuGraphInstantiateWithFlags(self, executable: Any, graph: int, flags: int) -> None:
        handle = self._handle()
        self.graphs[handle] = list(self.graphs[graph])
        _written(executable, handle)

    def _cuGraphDestroy(self, graph: int) -> None:
        del self.graphs[graph]

    def _cuGraphExecDestroy(self, graph: int) -> None:
        del self.graphs[graph]

    def _cuGraphLaunch(self, graph: int, stream: int) -> None:
        for work in self.graphs[graph]:
            self.put(stream, work)

    def _cuEventCreate(self, event: Any, flags: int) -> None:
        handle = self._handle()
        self.events[handle] = -1.0
        _written(event, handle)

    def _cuEventRecord(self, event: int, stream: int) -> None:
        def work() -> None:
            self.events[event] = self.clock_ms

        self.put(stream, work)

    def _cuEventElapsedTime(self, elapsed: Any, start: int, end: int) -> None:
        _written(elapsed, self.events[end] - self.events[start])

    def _cuEventDestroy(self, event: int) -> None:
        del self.events[event]


class Library:
    """A double of the module of TensorRT, or of TensorRT-RTX for the versions 1.x.

    Attributes:
        calls: name and arguments of every call that changes a state.
        runs: input shapes of every run of a network.
        fed: inputs of the last run.
        failing: name to log message of calls that fail.
        compiled: number of kernels that TensorRT-RTX compiled because no runtime cache had them.
        cuda_major: major version of CUDA that a runtime cache records.
        kept_errors: number of runs that fail, in any context, because of an earlier failed capture.
        network_ms: milliseconds of a run, by the clock of the driver.
    """

    def __init__(self, driver: Driver, version: str) -> None:
        self.driver = driver
        self.__version__ = version
        rtx = version.startswith("1.")
        self.__name__ = "tensorrt_rtx" if rtx else "tensorrt"
        self.calls: list[tuple[Any, ...]] = []
        self.runs: list[dict[str, tuple[int, ...]]] = []
        self.fed: dict[str, np.ndarray] = {}
        self.failing: dict[str, str] = {}
        self.network_ms = 3.0
        self.kept_errors = 0
        self.contexts = 0
        self.compiled = 0
        self.cuda_major = 13
        self.old = version.startswith("8.")
        self.newest = version.startswith("11.") or rtx
        self.rtx = rtx
        self.TensorIOMode = SimpleNamespace(INPUT="input", OUTPUT="output")
        self.TensorLocation = SimpleNamespace(DEVICE="device", HOST="host")
        self.IProfiler = type("IProfiler", (), {})
        self.ILogger = type("ILogger", (), {"ERROR": 1, "INTERNAL_ERROR": 0, "WARNING": 2})
        if not self.old:
            self.ExecutionContextAllocationStrategy = SimpleNamespace(USER_MANAGED="user")
        if rtx:
            self.CudaGraphStrategy = SimpleNamespace(WHOLE_GRAPH_CAPTURE="whole")

    def Runtime(self, logger: Any) -> Runtime:
        return Runtime(self, logger)


class Runtime:
    __slots__ = ("_library", "_logger", "engine_host_code_allowed")

    def __init__(self, library: Library, logger: Any) -> None:
        self._library, self._logger = library, logger
        self.engine_host_code_allowed = False
        if "Runtime" in library.failing:
            # TensorRT logs errors of CUDA as warnings.
            logger.log(2, library.failing["Runtime"])
            raise TypeError("pybind11::init(): factory function returned nullptr")

    def deserialize_cuda_engine(self, plan: bytes) -> Engine | None:
        self._library.calls.append(("deserialize_cuda_engine", self.engine_host_code_allowed))
        if "deserialize_cuda_engine" in self._library.failing:
            self._logger.log(1, self._library.failing["deserialize_cuda_engine"])
            return None
        content = json.loads(plan)
        if content.get("host_code") and not self.engine_host_code_allowed:
            self._logger.log(1, HOST_CODE)
            return None
        here = "{}.{}".format(*self._library.driver._capability)
        if content.get("capabilities") and here not in content["capabilities"]:
            self._logger.log(1, f"The engine cannot run on this GPU, which has compute capability {here}.")
            return None
        return Engine(self._library, self._logger, content)


HOST_CODE = "Cannot deserialize engine with lean runtime since IRuntime::getEngineHostCodeAllowed() is false."
NOT_CAPTURABLE = (
    "3: [runner.cpp::execute::732] Error Code 3: API Usage Error (Parameter check failed at: "
    "runtime/myelin/runner.cpp::execute::732, condition: !isCapturing || isCapturable. The CUDA stream is in capturing "
    "mode, but this TRT engine is not stream capturable!\n)"
)


class Engine:
    """Runs the graph of a plan in ONNX Runtime."""

    SCRATCH = 4096

    def __init__(self, library: Library, logger: Any, plan: dict[str, Any]) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level, options.intra_op_num_threads = 3, 1
        session = onnxruntime.InferenceSession(plan["graph"], options, providers=["CPUExecutionProvider"])
        self._library, self._logger, self._session = library, logger, session
        self._profiles = plan["profiles"]
        self._inputs = {value.name: value for value in session.get_inputs()}
        self._outputs = {value.name: value for value in session.get_outputs()}
        self.num_io_tensors = len(self._inputs) + len(self._outputs)
        self.num_optimization_profiles = len(self._profiles)
        if library.newest:
            self.device_memory_size_v2 = self.SCRATCH
        elif library.old:
            self.device_memory_size = self.SCRATCH
        else:
            self.device_memory_size = self.device_memory_size_v2 = self.SCRATCH
        if library.old:
            self.create_execution_context_without_device_memory = self._create
        else:
            self.create_execution_context = self._create_with
        if library.rtx:
            self.create_runtime_config = lambda: RuntimeConfig(library)
        self._types: dict[str, str] = plan.get("types", {})
        # The encoded field 4, op_type, of NodeProto in onnx.proto.
        self._loops = b'"\x04LSTM' in Path(plan["graph"]).read_bytes()
        self._owners: dict[int, weakref.ref[Context]] = {}

    def _create_with(self, strategy: Any) -> Context | None:
        expected = "user" if not isinstance(strategy, RuntimeConfig) else strategy._strategy
        assert expected == "user", "the context would allocate its own scratch memory"
        context = self._create()
        if context is not None and isinstance(strategy, RuntimeConfig):
            context._cache = strategy._cache
        return context

    def _create(self) -> Context | None:
        if "create_execution_context" in self._library.failing:
            self._logger.log(1, self._library.failing["create_execution_context"])
            return None
        self._library.contexts += 1
        return Context(self)

    def get_tensor_name(self, index: int) -> str:
        return [*self._inputs, *self._outputs][index]

    def get_tensor_mode(self, name: str) -> str:
        return "input" if name in self._inputs else "output"

    def get_tensor_location(self, name: str) -> str:
        return "device"

    def get_tensor_dtype(self, name: str) -> str:
        kind = (self._inputs | self._outputs)[name].type
        names = {
            "tensor(float)": "FLOAT",
            "tensor(float16)": "HALF",
            "tensor(int32)": "INT32",
            "tensor(uint8)": "UINT8",
        }
        return f"DataType.{self._types.get(name, names[kind])}"

    def get_tensor_profile_shape(self, name: str, index: int) -> list[tuple[int, ...]]:
        return [tuple(shape) for shape in self._profiles[index][name]]


class RuntimeConfig:
    __slots__ = ("_cache", "_library", "_strategy", "cuda_graph_strategy")

    def __init__(self, library: Library) -> None:
        self._library = library
        self._cache: RuntimeCache | None = None

    def set_execution_context_allocation_strategy(self, strategy: str) -> None:
        self._strategy = strategy

    def create_runtime_cache(self) -> RuntimeCache:
        return RuntimeCache(self._library)

    def set_runtime_cache(self, cache: RuntimeCache | None = None) -> bool:
        self._cache = cache
        return True


class RuntimeCache:
    """Compiled kernels for one library, GPU and driver (IRuntimeCache.deserialize, 1.7.1)."""

    __slots__ = ("_kernels", "_library")

    def __init__(self, library: Library) -> None:
        self._library, self._kernels = library, set[str]()

    def _environment(self) -> list[str]:
        return [self._library.__version__, self._library.driver._name, str(self._library.cuda_major)]

    def serialize(self) -> memoryview:
        return memoryview(json.dumps([self._environment(), sorted(self._kernels)]).encode())

    def deserialize(self, blob: bytes) -> bool:
        assert self._library.driver.stack()[-1:] == [CONTEXT], "no current CUDA context"
        try:
            environment, kernels = json.loads(bytes(blob))
        except ValueError:
            return False
        if environment != self._environment():
            return False
        self._kernels |= set(kernels)
        return True

    def compile(self, shapes: dict[str, tuple[int, ...]]) -> None:
        kernel = json.dumps(sorted(shapes.items()))
        self._library.compiled += kernel not in self._kernels
        self._kernels.add(kernel)


class Context:
    __slots__ = (
        "__weakref__",
        "_addresses",
        "_broken",
        "_cache",
        "_engine",
        "_fresh",
        "_profile",
        "_scratch",
        "_shapes",
        "_waited",
        "device_memory",
        "profiler",
    )

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._profile = -1
        self._waited: list[int] = []
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}
        self._scratch = 0
        self._fresh = True
        self._broken = False
        self._cache: RuntimeCache | None = None

    def __getattr__(self, name: str) -> Any:
        if name == "set_device_memory" and not self._engine._library.old:
            return self._set_device_memory
        raise AttributeError(name)

    def _set_device_memory(self, address: int, size: int) -> None:
        assert size >= Engine.SCRATCH
        self._scratch = address

    def set_optimization_profile_async(self, index: int, stream: int) -> bool:
        owners = self._engine._owners
        owner = owners[index]() if index in owners and self._engine._library.old else None
        if owner is not None and owner is not self:
            self._engine._logger.log(1, f"Profile {index} has been chosen by another IExecutionContext.")
            return False
        owners[index] = weakref.ref(self)
        self._engine._library.driver.put(stream, lambda: self._waited.append(index))
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        assert self._waited, "the stream of the profile has not been synchronized"
        self._profile = self._waited[-1]
        smallest, _, largest = self._engine._profiles[self._profile][name]
        # Without `strict`, because legs also run this under Python 3.9.
        if not all(low <= size <= high for low, size, high in zip(smallest, shape, largest)):  # noqa: B905
            self._engine._logger.log(1, f"{name} {shape} is outside profile {self._profile}")
            return False
        self._shapes[name] = tuple(shape)
        self._fresh = True
        return True

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        outputs = self._engine._outputs
        if name not in outputs:
            return self._shapes[name]
        first = next(iter(self._shapes.values()))[0]
        return (first, *outputs[name].shape[1:])

    def set_tensor_address(self, name: str, address: int) -> bool:
        assert address % 256 == 0, f"{name} at {address:#x} is not aligned"
        self._addresses[name] = address
        return True

    def execute_async_v3(self, stream: int) -> bool:
        engine, library = self._engine, self._engine._library
        library.calls.append(("execute_async_v3", stream))
        error = library.failing.get("execute_async_v3")
        capturing = library.driver.streams[stream].captured is not None
        if error is None and capturing and "capture" in library.failing:
            error = library.failing["capture"]
        if error is None and capturing and library.old and engine._loops:
            error = NOT_CAPTURABLE
        if error is None and not capturing and (self._broken or library.kept_errors):
            library.kept_errors = max(library.kept_errors - 1, 0)
            error = "Error Code 1: Cuda Runtime (operation failed due to a previous error during capture)"
        if error is not None:
            if capturing:
                library.driver.streams[stream].broken = True
                self._broken = True
            engine._logger.log(1, error)
            return False
        if not library.old:
            assert self._scratch, "no device memory"
        else:
            self._scratch = self.device_memory
        assert set(self._shapes) == set(engine._inputs)
        assert set(self._addresses) == set(engine._inputs) | set(engine._outputs)
        assert not (capturing and self._fresh), "a context must run once before a capture"
        if not capturing:
            self._fresh = False
        if self._cache is not None:
            self._cache.compile(self._shapes)
        shapes, addresses, scratch = dict(self._shapes), dict(self._addresses), self._scratch
        outputs = {name: self.get_tensor_shape(name) for name in engine._outputs}

        def work() -> None:
            driver = library.driver
            driver.array(scratch, (Engine.SCRATCH,), np.dtype("u1"))[:] = 0
            library.runs.append(shapes)
            kinds = {"FLOAT": "f4", "HALF": "f2", "INT32": "i4", "BF16": "u2", "UINT8": "u1"}
            dtype = {
                name: np.dtype(kinds[engine.get_tensor_dtype(name).partition(".")[2]]) for name in (*shapes, *outputs)
            }
            feed = {name: driver.array(addresses[name], shape, dtype[name]).copy() for name, shape in shapes.items()}
            feed = library.fed = {name: _from_bits(array) for name, array in feed.items()}
            for name, found in zip(engine._outputs, engine._session.run(list(engine._outputs), feed)):  # noqa: B905
                driver.array(addresses[name], outputs[name], dtype[name])[...] = (
                    _to_bits(found) if dtype[name] == np.uint16 else found
                )
            driver.clock_ms += library.network_ms
            if hasattr(self, "profiler") and not capturing:
                for layer, share in (("encoder", 0.75), ("heads", 0.25)):
                    self.profiler.report_layer_time(layer, share * library.network_ms)

        library.driver.put(stream, work)
        return True


def _from_bits(array: np.ndarray) -> np.ndarray:
    return (array.astype(np.uint32) << 16).view(np.float32) if array.dtype == np.uint16 else array


def _to_bits(array: np.ndarray) -> np.ndarray:
    """Truncate to bfloat16."""
    return (np.ascontiguousarray(array).view(np.uint32) >> 16).astype(np.uint16)


def write_plan(
    path: Path,
    graph: Path,
    profiles: Sequence[dict[str, Any]],
    manifest: Any,
    version: str = "10.16.1.11",
    types: dict[str, str] | None = None,
    plan_bytes: bytes | None = None,
    **content: Any,
) -> Path:
    """Write a plan that represents a graph, and its sidecar, as `export.build_engine` does.

    Args:
        path: the plan.
        graph: ONNX file that the plan represents.
        profiles: `name`, `batch`, `query_length` and `shapes` of each optimization profile.
        manifest: manifest of the model.
        version: version of TensorRT.
        types: name to type of inputs and outputs with another type than in the graph.
        plan_bytes: content of the plan; None for one that the double loads.
        content: other fields of the sidecar.
    """
    from runtime.artifacts.engine_metadata import FORMAT, metadata_path, with_digest
    from runtime.core.io.digests import sha256

    shapes = [profile["shapes"] for profile in profiles]
    options = content.get("options", {})
    plan = {"graph": str(graph), "profiles": shapes, "types": types or {}}
    plan |= {"host_code": bool(options.get("version_compatible"))}
    plan |= {"capabilities": content.get("compute_capabilities", [])}
    path.write_bytes(json.dumps(plan).encode() if plan_bytes is None else plan_bytes)
    rtx = version.startswith("1.")
    about = {
        "format": FORMAT,
        "manifest": manifest.to_dict(),
        "library": f"{'tensorrt_rtx' if rtx else 'tensorrt'} {version}",
        "target": "tensorrt-rtx" if rtx else "tensorrt",
        "gpu": "NVIDIA H100, 580.1, 81559 MiB, 9.0",
        "compute_capabilities": [],
        "profiles": profiles,
        "options": {"version_compatible": False, "hardware_compatible": False},
        "sha256": {path.name: sha256(path), graph.name: sha256(graph)},
        **content,
    }
    metadata_path(path).write_text(json.dumps(with_digest(about)))
    return path


def counted(calls: Sequence[str]) -> collections.Counter[str]:
    """Return the number of calls by name."""
    return collections.Counter(calls)
