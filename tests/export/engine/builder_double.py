"""Double TensorRT's builder, inspector and parser, and record their calls."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import onnx

from benchmarks.fake_tensorrt import HOST_CODE, Driver
from export.engine.builder import BuildOptions
from export.engine.profiles import profiles
from runtime.backends.cuda_driver import Cuda
from tests.export.conftest import TINY, manifest
from tests.export.engine import inspector_doubles

EMPTY = onnx.helper.make_model(onnx.helper.make_graph([], "none", [], [])).SerializeToString()
SHAPES = profiles((1, 4, 8), (1, 8, 12), manifest(TINY))


class Calls(list[tuple[str, tuple[Any, ...]]]):
    """Calls with their arguments, in order. `tests/export/test_conformance.py` checks the sets against the real API.

    Attributes:
        requested: class and name of every use.
        made: class, name and number of arguments of every call.
        written: class and name of every property that was set.
    """

    def __init__(self) -> None:
        super().__init__()
        self.requested: set[tuple[str, str]] = set()
        self.made: set[tuple[str, str, int]] = set()
        self.written: set[tuple[str, str]] = set()


class Recorder:
    """A test double of the TensorRT class `of`, which accepts every call and records name and arguments."""

    def __init__(self, calls: Calls, of: str, **answers: Any) -> None:
        object.__setattr__(self, "_calls", calls)
        object.__setattr__(self, "_of", of)
        object.__setattr__(self, "_answers", answers)
        calls.requested |= {(of, name) for name in answers}

    def __getattr__(self, name: str) -> Any:
        self._calls.requested.add((self._of, name))
        if name in self._answers and not callable(self._answers[name]):
            return self._answers[name]

        def call(*arguments: Any) -> Any:
            self._calls.append((name, arguments))
            self._calls.made.add((self._of, name, len(arguments)))
            return self._answers[name](*arguments) if name in self._answers else True

        return call

    def __setattr__(self, name: str, value: Any) -> None:
        self._calls.written.add((self._of, name))
        self._calls.requested.add((self._of, name))
        self._calls.append((name, (value,)))


@dataclasses.dataclass(frozen=True)
class Version:
    """The network flags of one version of TensorRT with their numbers, and its builder flags."""

    network_flags: Mapping[str, int]
    builder_flags: tuple[str, ...]
    more: Mapping[str, Any] = dataclasses.field(default_factory=dict)


WEAK = ("FP16", "INT8", "FP8", "OBEY_PRECISION_CONSTRAINTS", "VERSION_COMPATIBLE", "TF32")
VERSIONS = {
    "8.6.1": Version(
        {"EXPLICIT_BATCH": 0},
        WEAK,
        {"TacticSource": SimpleNamespace(CUBLAS=0, CUBLAS_LT=1, CUDNN=2, EDGE_MASK_CONVOLUTIONS=3, JIT_CONVOLUTIONS=4)},
    ),
    "10.16.1": Version({"EXPLICIT_BATCH": 0, "STRONGLY_TYPED": 1}, (*WEAK, "BF16")),
    "11.4.0": Version({"STRONGLY_TYPED": 0}, ("VERSION_COMPATIBLE", "TF32")),
    "1.7.1": Version(
        {"STRONGLY_TYPED": 0},
        ("VERSION_COMPATIBLE", "TF32"),
        {
            "ComputeCapability": SimpleNamespace(
                SM75=75, SM80=80, SM86=86, SM89=89, SM120=120, SM121=121, CURRENT=-1, NONE=0
            )
        },
    ),
}
"""TensorRT's versions, and TensorRT-RTX 1.7.1; `tests/export/test_conformance.py` compares them with the real ones."""


def stand_in(version: str, scenario: str = "convolutions", **answers: Any) -> tuple[Any, Calls]:
    """Return a test double of a version of TensorRT, and the list of its recorded calls.

    Its plans follow these rules:

    - A version-compatible plan is refused unless host code is allowed (`IRuntime::setEngineHostCodeAllowed` in
      NvInferRuntime.h; the sentence is in libtensorrt_rtx.so of 1.7.1).
    - 8.6's parser ignores `start` and `end` of Shape and then ends the process (observed with 8.6.0 on an H200,
      2026-11-29: Range of `Shape(start=1, end=2)`, "condition: isValidDims(dimensions)", SIGSEGV).
      Here it refuses the graph.
    - A context, and so the inspector, knows sizes only after its profile was selected and every input has a shape
      (`IEngineInspector::setExecutionContext`).

    Args:
        version: of `VERSIONS`.
        scenario: what the engine looks like; see `tests.export.engine.inspector_doubles`.
        answers: `parser`: of its calls; `build`, `context`: in place of building, and of creating a context.
    """
    calls = Calls()
    profile = Recorder(calls, "IOptimizationProfile")
    cache = Recorder(calls, "ITimingCache", serialize=lambda: b"times")
    config = Recorder(calls, "IBuilderConfig", create_timing_cache=lambda known: cache, get_timing_cache=lambda: cache)
    network = Recorder(calls, "INetworkDefinition", num_layers=0)

    def parse(graph: bytes) -> bool:
        return not (version.startswith("8.") and cuts_shapes(graph))

    parser = Recorder(calls, "OnnxParser", **{"num_errors": 0, "parse": parse, **answers.get("parser", {})})
    builder = Recorder(
        calls,
        "Builder",
        create_network=lambda given: network,
        create_builder_config=lambda: config,
        create_optimization_profile=lambda: profile,
        build_serialized_network=answers.get("build", lambda network, config: b"plan"),
    )
    known = VERSIONS[version]
    library = SimpleNamespace(
        __version__=version,
        __name__="tensorrt_rtx" if version.startswith("1.") else "tensorrt",
        ILogger=type("ILogger", (), {"ERROR": 1, "INTERNAL_ERROR": 0, "WARNING": 2, "__init__": lambda self: None}),
        Builder=lambda logger: builder,
        OnnxParser=lambda network, logger: parser,
        NetworkDefinitionCreationFlag=SimpleNamespace(**known.network_flags),
        BuilderFlag=SimpleNamespace(**{name: name for name in known.builder_flags}),
        ProfilingVerbosity=SimpleNamespace(DETAILED="detailed"),
        MemoryPoolType=SimpleNamespace(WORKSPACE="workspace"),
        HardwareCompatibilityLevel=SimpleNamespace(AMPERE_PLUS="ampere"),
        LayerInformationFormat=SimpleNamespace(JSON="json"),
        Runtime=lambda logger: _runtime(calls, logger, version, scenario, answers.get("context")),
        float32="float32",
        int32="int32",
        bool="bool",
        **known.more,
    )
    return library, calls


def _runtime(calls: Calls, logger: Any, version: str, scenario: str, context: Callable[[], Any] | None) -> Recorder:
    """Return a double of the class Runtime, whose engines have an inspector."""

    def load(plan: bytes) -> Recorder | None:
        compatible = ("VERSION_COMPATIBLE",) in named(calls, "set_flag")
        if compatible and (True,) not in named(calls, "engine_host_code_allowed"):
            logger.log(1, HOST_CODE)
            return None
        return Recorder(
            calls,
            "ICudaEngine",
            create_engine_inspector=lambda: Recorder(calls, "EngineInspector", get_engine_information=write),
            create_execution_context=context or (lambda: Recorder(calls, "IExecutionContext")),
        )

    def write(form: str) -> str:
        bound = _has_bound_context(calls)
        text: str = inspector_doubles.document(version, scenario, bound=bound, profiles=len(SHAPES))
        return text

    return Recorder(calls, "Runtime", deserialize_cuda_engine=load)


def _has_bound_context(calls: Calls) -> bool:
    """Return whether the context of the inspector has a profile and shapes of all inputs."""
    last = max((index for index, (name, _) in enumerate(calls) if name == "execution_context"), default=-1)
    if last < 0 or calls[last][1] == (None,):
        return False
    selected = [index for index, (name, _) in enumerate(calls) if name == "set_optimization_profile_async"]
    since = calls[selected[-1] :] if selected else []
    return {arguments[0] for name, arguments in since if name == "set_input_shape"} == set(SHAPES[0].shapes)


def cuts_shapes(graph: bytes) -> bool:
    """Return whether a serialized graph has a Shape with `start` or `end`."""
    nodes = onnx.load_from_string(graph).graph.node
    return any(node.op_type == "Shape" and node.attribute for node in nodes)


def gpu() -> Cuda:
    """Return a GPU with a test double of the driver."""
    return Cuda(Driver())


def options(precision: str = "fp16", target: Any = "tensorrt", **more: Any) -> BuildOptions:
    return BuildOptions(target=target, precision=precision, profiles=SHAPES, **more)


def named(calls: Calls, name: str) -> list[Any]:
    return [arguments for called, arguments in calls if called == name]


def layer(calls: Calls, name: str, kind: str = "CONVOLUTION", precision: str = "float32", **more: Any) -> Recorder:
    """Return a layer of a network of TensorRT 8.6.

    Args:
        more: `reads`: names of its inputs; `shapes`: whether they are shape tensors; `dtype`: their type.
    """
    about = {"is_shape_tensor": more.get("shapes", False), "dtype": more.get("dtype", "float32")}
    inputs = [Recorder(calls, "ITensor", name=read, **about) for read in more.get("reads", ("input",))]
    output = Recorder(calls, "ITensor", name=f"{name}_output", **about)
    return Recorder(
        calls, "ILayer", name=name, type=f"LayerType.{kind}", precision=precision, num_inputs=len(inputs),
        num_outputs=1, get_input=lambda index: inputs[index], get_output=lambda index: output,
    )  # fmt: skip


def with_layers(library: Any, layers: Sequence[Recorder]) -> None:
    """Let the network of a double have these layers."""
    network = library.Builder(None).create_network(1)
    network._answers.update(num_layers=len(layers), get_layer=lambda index: layers[index])
