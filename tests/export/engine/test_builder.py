"""Test the calls of `export.engine.builder` to TensorRT 8.6, 10, 11 and TensorRT-RTX, on a recording test double."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx
import pytest

from benchmarks.fake_tensorrt import HOST_CODE, Driver
from export.engine.builder import (
    BuildOptions,
    build,
    check_options,
    is_strongly_typed,
    load_library,
    runs_here,
    unavailable_reason,
)
from export.engine.inspector import PlanNotLoaded
from export.engine.profiles import profiles
from runtime.artifacts.engine_layers import count_layers, read_layers
from runtime.backends.cuda_driver import Cuda
from runtime.core.errors import DeviceError, ModelFileError
from runtime.core.gpu_info import Gpu, cuda_gpu
from tests.export.conftest import TINY, manifest
from tests.export.engine import inspector_doubles
from tests.raising import quotes, raises

EMPTY = onnx.helper.make_model(onnx.helper.make_graph([], "none", [], [])).SerializeToString()
SHAPES = profiles((1, 4, 8), (1, 8, 12), manifest(TINY))


class Calls(list[tuple[str, tuple[Any, ...]]]):
    """Calls with their arguments, in order; `asked` has every name that was used, with its TensorRT class.

    `tests/export/test_conformance.py` checks `asked` against the real bindings.
    """

    def __init__(self) -> None:
        super().__init__()
        self.asked: set[tuple[str, str]] = set()


class Recorder:
    """A test double of the TensorRT class `of`, which accepts every call and records name and arguments."""

    def __init__(self, calls: Calls, of: str, **answers: Any) -> None:
        object.__setattr__(self, "_calls", calls)
        object.__setattr__(self, "_of", of)
        object.__setattr__(self, "_answers", answers)
        calls.asked |= {(of, name) for name in answers}

    def __getattr__(self, name: str) -> Any:
        self._calls.asked.add((self._of, name))
        if name in self._answers and not callable(self._answers[name]):
            return self._answers[name]

        def call(*arguments: Any) -> Any:
            self._calls.append((name, arguments))
            return self._answers[name](*arguments) if name in self._answers else True

        return call

    def __setattr__(self, name: str, value: Any) -> None:
        self._calls.asked.add((self._of, name))
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
"""TensorRT's versions, and TensorRT-RTX 1.7.1; `tests/export/test_conformance.py` holds them against the real ones."""


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
    loggers: list[Any] = []

    def runtime(logger: Any) -> Recorder:
        loggers.append(logger)
        return Recorder(calls, "Runtime", deserialize_cuda_engine=load)

    def load(plan: bytes) -> Recorder | None:
        compatible = ("VERSION_COMPATIBLE",) in named(calls, "set_flag")
        if compatible and (True,) not in named(calls, "engine_host_code_allowed"):
            loggers[-1].log(1, HOST_CODE)
            return None
        return Recorder(
            calls,
            "ICudaEngine",
            create_engine_inspector=lambda: Recorder(calls, "EngineInspector", get_engine_information=write),
            create_execution_context=answers.get("context", lambda: Recorder(calls, "IExecutionContext")),
        )

    def write(form: str) -> str:
        text: str = inspector_doubles.document(version, scenario, bound=is_bound(), profiles=len(SHAPES))
        return text

    def is_bound() -> bool:
        """Return whether the context of the inspector has a profile and shapes of all inputs."""
        last = max((place for place, (name, _) in enumerate(calls) if name == "execution_context"), default=-1)
        if last < 0 or calls[last][1] == (None,):
            return False
        chosen = [place for place, (name, _) in enumerate(calls) if name == "set_optimization_profile_async"]
        since = calls[chosen[-1] :] if chosen else []
        return {arguments[0] for name, arguments in since if name == "set_input_shape"} == set(SHAPES[0].shapes)

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
        Runtime=runtime,
        float32="float32",
        int32="int32",
        bool="bool",
        **known.more,
    )
    return library, calls


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


@pytest.mark.parametrize(("version", "flag"), [("10.16.1", 2), ("11.4.0", 1)])
def test_strongly_typed_versions_get_no_precision_flag(version: str, flag: int) -> None:
    library, calls = stand_in(version)
    plan = build(b"graph", options("int8", workspace_gib=2, optimization_level=5), library=library)
    assert plan.plan == b"plan"
    assert plan.strongly_typed
    assert plan.timing_cache == b"times"
    assert named(calls, "create_network") == [(flag,)], "STRONGLY_TYPED moved from 1 to 0"
    assert named(calls, "set_flag") == []
    assert named(calls, "clear_flag") == [("TF32",)]
    assert named(calls, "max_aux_streams") == [(0,)]
    assert named(calls, "set_memory_pool_limit") == [("workspace", 2 * 2**30)]
    assert named(calls, "builder_optimization_level") == [(5,)]
    assert named(calls, "profiling_verbosity") == [("detailed",)]


@pytest.mark.parametrize(("precision", "flags"), [("fp32", []), ("fp16", ["FP16"]), ("int8", ["INT8", "FP16"])])
def test_weakly_typed_version_sets_precision_flags(precision: str, flags: list[str]) -> None:
    library, calls = stand_in("8.6.1")
    plan = build(EMPTY, options(precision), library=library)
    assert not plan.strongly_typed
    assert named(calls, "set_flag") == [(flag,) for flag in flags]


@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_precision_unsupported_by_version_is_rejected(precision: str) -> None:
    library, calls = stand_in("8.6.1")
    with raises(DeviceError, "precision_unsupported", "8.6.1", precision):
        build(b"graph", options(precision), library=library)
    assert named(calls, "build_serialized_network") == []


@pytest.mark.parametrize("version", ["8.6.1", "10.16.1", "11.4.0", "1.7.1"])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_fp32_disables_tf32_unless_allowed(version: str, precision: str) -> None:
    rtx: dict[str, Any] = {"target": "tensorrt-rtx", "compute_capabilities": ("8.6",)} if version[0:2] == "1." else {}
    for allowed in (False, True):
        library, calls = stand_in(version)
        build(EMPTY, options(precision, tf32=allowed, **rtx), library=library)
        assert named(calls, "clear_flag") == ([] if allowed else [("TF32",)])


@pytest.mark.parametrize(("version", "refused"), [("10.5.0", True), ("10.6.0", False), ("11.4.0", False)])
def test_bf16_requires_parser_of_opset_22(version: str, refused: bool) -> None:
    library, _ = stand_in("11.4.0" if version.startswith("11") else "10.16.1")
    library.__version__ = version
    with raises(DeviceError, "precision_unsupported", "bf16", "10.6") if refused else contextlib.nullcontext():
        check_options(options("bf16"), library)


def test_fp8_is_rejected_for_unsupported_hardware() -> None:
    library, _ = stand_in("1.7.1")
    with raises(DeviceError, "precision_unsupported", "fp8"):
        check_options(options("fp8", "tensorrt-rtx", compute_capabilities=("8.9",)), library)
    library, _ = stand_in("11.4.0")
    with raises(DeviceError, "conflicting_options", "--hardware-compatible", "fp8"):
        check_options(options("fp8", hardware_compatible=True), library)
    check_options(options("fp8"), library)


def test_each_profile_sets_shapes_of_all_inputs() -> None:
    library, calls = stand_in("11.4.0")
    build(b"graph", options(), library=library)
    assert len(named(calls, "add_optimization_profile")) == 2
    assert ("query_tokens", (1, 1), (1, 8), (1, 12)) in named(calls, "set_shape")
    assert ("segment_features", (2, 16, 16), (4, 16, 16), (8, 16, 16)) in named(calls, "set_shape")
    assert len(named(calls, "set_shape")) == 8


def test_compatibility_options_set_named_flags() -> None:
    library, calls = stand_in("10.16.1")
    build(b"graph", options(version_compatible=True, hardware_compatible=True), library=library)
    assert named(calls, "set_flag") == [("VERSION_COMPATIBLE",)]
    assert named(calls, "hardware_compatibility_level") == [("ampere",)]


def test_rtx_build_sets_compute_capabilities() -> None:
    library, calls = stand_in("1.7.1")
    given = options(target="tensorrt-rtx", compute_capabilities=("8.6", "12.0"))
    assert build(b"graph", given, library=library).inspection is None
    assert named(calls, "num_compute_capabilities") == [(2,)]
    assert named(calls, "set_compute_capability") == [(86, 0), (120, 1)]
    with raises(DeviceError, "unsupported_compute_capability", "1.7.1", "9.0"):
        build(b"graph", options(target="tensorrt-rtx", compute_capabilities=("9.0",)), library=library)


def test_rtx_without_gpu_requires_compute_capability() -> None:
    if cuda_gpu():
        pytest.skip("this machine has a GPU")
    library, _ = stand_in("1.7.1")
    with raises(DeviceError, "missing_option", "--compute-capability"):
        build(b"graph", options(target="tensorrt-rtx"), library=library)


INSPECTED = ("8.6.1", "10.16.1", "11.4.0")


@pytest.mark.parametrize("version", INSPECTED)
def test_engine_is_inspected_with_a_context_per_profile(version: str) -> None:
    library, calls = stand_in(version, "generated")
    inspection = build(EMPTY, options(), library=library, cuda=gpu()).inspection
    assert inspection is not None
    assert [view.name for view in inspection.profiles] == ["one query", "several queries"]
    assert [view.shapes["query_tokens"] for view in inspection.profiles] == [(1, 8), (4, 8)]
    assert [index for index, _ in named(calls, "set_optimization_profile_async")] == [0, 1]
    for view in inspection.profiles:
        assert view.text is not None
        # 8.6 shows no types of tensors.
        assert count_layers(read_layers(view.text)).arithmetic == ({} if version == "8.6.1" else {"fp16": 6})
    # 11 shows types, but not formats, without a context.
    assert bool(count_layers(read_layers(inspection.unbound)).arithmetic) == (version == "11.4.0")


@pytest.mark.parametrize("version", INSPECTED)
def test_failed_context_keeps_unbound_inspection(version: str) -> None:
    library, _ = stand_in(version, context=lambda: None)
    driver = Driver()
    inspection = build(EMPTY, options(), library=library, cuda=Cuda(driver)).inspection
    assert inspection is not None
    assert [view.text for view in inspection.profiles] == [None, None]
    assert inspection.reason()
    assert inspection.views() == [inspection.unbound] * 2
    assert driver.held() == {}


@pytest.mark.parametrize("version", INSPECTED)
def test_version_compatible_engine_is_inspected(version: str) -> None:
    library, calls = stand_in(version)
    plan = build(EMPTY, options(version_compatible=True), library=library, cuda=gpu())
    assert plan.inspection is not None
    assert plan.inspection.reason() == ""
    # Other plans must not allow host code.
    library, calls = stand_in(version)
    build(EMPTY, options(), library=library, cuda=gpu())
    assert named(calls, "engine_host_code_allowed") == []


def test_unloadable_engine_raises_error() -> None:
    library, _ = stand_in("11.4.0")
    runtime = library.Runtime
    library.Runtime = lambda logger: Recorder(Calls(), "Runtime", deserialize_cuda_engine=lambda plan: None)
    with pytest.raises(PlanNotLoaded):
        build(EMPTY, options(), library=library, cuda=gpu())
    library.Runtime = runtime


@pytest.mark.parametrize(
    ("here", "capabilities", "inspected"),
    [("8.6", ("8.6", "12.0"), True), ("8.6", (), True), ("9.0", ("8.6", "12.0"), False), (None, ("8.6",), False)],
)
def test_rtx_engine_is_inspected_only_on_matching_gpu(
    here: Any, capabilities: Any, inspected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    library, calls = stand_in("1.7.1")
    monkeypatch.setattr("export.engine.builder.cuda_gpu", lambda: here and Gpu("x", capability=here))
    given = options(target="tensorrt-rtx", compute_capabilities=capabilities)
    plan = build(b"graph", given, library=library, cuda=gpu())
    assert plan.plan == b"plan"
    assert (plan.inspection is not None) == inspected
    assert bool(plan.not_inspected_reason) != inspected
    assert bool(named(calls, "deserialize_cuda_engine")) == inspected
    assert runs_here(given) == inspected


@pytest.mark.rtx
def test_rtx_library_contains_messages_of_the_fake() -> None:
    libraries = pytest.importorskip("tensorrt_rtx_libs", reason="TensorRT-RTX is not installed")
    path = next(Path(libraries.__file__).parent.glob("libtensorrt_rtx.so.*"))
    content = path.read_bytes()
    for words in (HOST_CODE, "Format not available due to dynamic shapes", "The engine cannot run on this GPU, which"):
        assert words.encode() in content


def test_timing_cache_of_another_gpu_is_rejected() -> None:
    library, _ = stand_in("11.4.0")
    builder = library.Builder(None)
    config = builder.create_builder_config()
    config._answers["set_timing_cache"] = lambda cache, ignore: False
    with raises(ModelFileError, "timing_cache_mismatch"):
        build(b"graph", options(), b"old", library)


def test_parse_and_build_failures_raise_model_file_error() -> None:
    broken = Recorder(Calls(), "ParserError", desc=lambda: "node 7 is odd")
    answers = {"parser": {"parse": lambda graph: False, "num_errors": 1, "get_error": lambda index: broken}}
    library, _ = stand_in("11.4.0", **answers)
    with raises(ModelFileError, "unparsable_graph", "node 7 is odd"):
        build(b"graph", options(), library=library)
    library, _ = stand_in("11.4.0", build=lambda network, config: None)
    with raises(ModelFileError, "build_failed", "11.4.0"):
        build(b"graph", options(), library=library)


def test_missing_library_is_named_with_install_command() -> None:
    try:
        import tensorrt  # noqa: F401
    except ImportError:
        with raises(DeviceError, "missing_library", "tensorrt"):
            load_library("tensorrt")
        assert quotes(str(unavailable_reason("tensorrt")), "tensorrt")
    else:
        pytest.skip("TensorRT is installed")


@pytest.mark.rtx
def test_used_api_names_exist_in_tensorrt_rtx(exported: dict[str, onnx.ModelProto]) -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
    library = load_library("tensorrt-rtx")
    assert is_strongly_typed(library)
    given = options(target="tensorrt-rtx", compute_capabilities=("8.6", "8.9"), workspace_gib=1, optimization_level=1)
    plan = build(exported["tiny"].SerializeToString(), given)
    assert len(plan.plan) > 1000
    assert plan.library.startswith("tensorrt_rtx 1.")
    with raises(ModelFileError, "unparsable_graph"):
        build(b"no graph", given)
