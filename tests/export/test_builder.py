"""`export.builder`: the right calls for TensorRT 8.6, 10, 11 and RTX, seen on a recording stand-in."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import onnx
import pytest

from export.builder import BuildOptions, build, cuda_devices, is_strongly_typed, load_library, why_not
from export.profiles import profiles
from runtime.errors import DeviceError, ModelFileError
from tests.export.conftest import TINY, manifest

SHAPES = profiles((1, 4, 8), (1, 8, 12), manifest(TINY))


class Recorder:
    """Answers every call, and remembers name and arguments."""

    def __init__(self, calls: list[tuple[str, tuple[Any, ...]]], **answers: Any) -> None:
        object.__setattr__(self, "_calls", calls)
        object.__setattr__(self, "_answers", answers)

    def __getattr__(self, name: str) -> Any:
        if name in self._answers and not callable(self._answers[name]):
            return self._answers[name]

        def call(*arguments: Any) -> Any:
            self._calls.append((name, arguments))
            return self._answers[name](*arguments) if name in self._answers else True

        return call

    def __setattr__(self, name: str, value: Any) -> None:
        self._calls.append((name, (value,)))


def stand_in(version: str, *, typed: bool, flags: tuple[str, ...] = (), **answers: Any) -> tuple[Any, list[Any]]:
    """Return a module like TensorRT's of that version, and the list in which its calls are recorded."""
    calls: list[Any] = []
    profile = Recorder(calls)
    cache = SimpleNamespace(serialize=lambda: b"times")
    config = Recorder(calls, create_timing_cache=lambda known: cache, get_timing_cache=lambda: cache)
    parser = Recorder(calls, **{"num_errors": 0, "parse": lambda graph: True, **answers.get("parser", {})})
    builder = Recorder(
        calls,
        create_network=lambda given: "network",
        create_builder_config=lambda: config,
        create_optimization_profile=lambda: profile,
        build_serialized_network=answers.get("build", lambda network, config: b"plan"),
    )
    inspector = SimpleNamespace(get_engine_information=lambda form: '{"Layers": []}')
    engine = SimpleNamespace(create_engine_inspector=lambda: inspector)
    library = SimpleNamespace(
        __version__=version,
        ILogger=type("ILogger", (), {"ERROR": 1, "INTERNAL_ERROR": 0, "WARNING": 2, "__init__": lambda self: None}),
        Builder=lambda logger: builder,
        OnnxParser=lambda network, logger: parser,
        NetworkDefinitionCreationFlag=SimpleNamespace(**({"STRONGLY_TYPED": 0} if typed else {"EXPLICIT_BATCH": 0})),
        BuilderFlag=SimpleNamespace(**{name: name for name in flags}),
        ProfilingVerbosity=SimpleNamespace(DETAILED="detailed"),
        MemoryPoolType=SimpleNamespace(WORKSPACE="workspace"),
        HardwareCompatibilityLevel=SimpleNamespace(AMPERE_PLUS="ampere"),
        LayerInformationFormat=SimpleNamespace(JSON="json"),
        ComputeCapability=SimpleNamespace(SM75=75, SM86=86, SM120=120, CURRENT=-1, NONE=0),
        Runtime=lambda logger: SimpleNamespace(deserialize_cuda_engine=lambda plan: engine),
    )
    return library, calls


def options(precision: str = "fp16", target: Any = "tensorrt", **more: Any) -> BuildOptions:
    return BuildOptions(target=target, precision=precision, profiles=SHAPES, **more)


def named(calls: list[Any], name: str) -> list[Any]:
    return [arguments for called, arguments in calls if called == name]


@pytest.mark.parametrize("version", ["10.16.0", "11.4.0"])
def test_strongly_typed_versions_get_no_precision_flag(version: str) -> None:
    library, calls = stand_in(version, typed=True, flags=("VERSION_COMPATIBLE",))
    plan = build(b"graph", options("int8", workspace_gib=2, optimization_level=5), library=library)
    assert plan.plan == b"plan"
    assert plan.strongly_typed
    assert plan.timing_cache == b"times"
    assert named(calls, "create_network") == [(1,)]
    assert named(calls, "set_flag") == []
    assert named(calls, "set_memory_pool_limit") == [("workspace", 2 * 2**30)]
    assert named(calls, "builder_optimization_level") == [(5,)]
    assert named(calls, "profiling_verbosity") == [("detailed",)]


@pytest.mark.parametrize(
    ("precision", "flags"), [("fp32", []), ("fp16", ["FP16"]), ("int8", ["INT8", "FP16"]), ("bf16", ["BF16"])]
)
def test_a_weakly_typed_version_gets_the_flags_of_the_precision(precision: str, flags: list[str]) -> None:
    library, calls = stand_in("8.6.0", typed=False, flags=("FP16", "INT8", "BF16"))
    plan = build(b"graph", options(precision), library=library)
    assert not plan.strongly_typed
    assert named(calls, "set_flag") == [(flag,) for flag in flags]


def test_a_precision_that_the_version_lacks_is_refused() -> None:
    library, _ = stand_in("8.6.0", typed=False, flags=("FP16", "INT8"))
    with pytest.raises(DeviceError, match=r"TensorRT 8\.6\.0 cannot build fp8"):
        build(b"graph", options("fp8"), library=library)


def test_every_profile_is_set_for_every_input() -> None:
    library, calls = stand_in("11.4.0", typed=True)
    build(b"graph", options(), library=library)
    assert len(named(calls, "add_optimization_profile")) == 2
    assert ("query_tokens", (1, 1), (1, 8), (1, 12)) in named(calls, "set_shape")
    assert ("segment_features", (2, 16, 16), (4, 16, 16), (8, 16, 16)) in named(calls, "set_shape")
    assert len(named(calls, "set_shape")) == 8


def test_compatibility_is_asked_for_by_name() -> None:
    library, calls = stand_in("10.16.0", typed=True, flags=("VERSION_COMPATIBLE",))
    build(b"graph", options(version_compatible=True, hardware_compatible=True), library=library)
    assert named(calls, "set_flag") == [("VERSION_COMPATIBLE",)]
    assert named(calls, "hardware_compatibility_level") == [("ampere",)]


def test_rtx_is_told_which_gpus_to_build_for() -> None:
    library, calls = stand_in("1.7.1", typed=True)
    given = options(target="tensorrt-rtx", compute_capabilities=("8.6", "12.0"))
    assert build(b"graph", given, library=library).inspector is None
    assert named(calls, "num_compute_capabilities") == [(2,)]
    assert named(calls, "set_compute_capability") == [(86, 0), (120, 1)]
    with pytest.raises(DeviceError, match=r"9\.0 was asked for"):
        build(b"graph", options(target="tensorrt-rtx", compute_capabilities=("9.0",)), library=library)


def test_without_a_gpu_rtx_must_be_told() -> None:
    if cuda_devices():
        pytest.skip("this machine has a GPU")
    library, _ = stand_in("1.7.1", typed=True)
    with pytest.raises(DeviceError, match="--compute-capability"):
        build(b"graph", options(target="tensorrt-rtx"), library=library)


def test_a_timing_cache_of_another_gpu_is_refused() -> None:
    library, _ = stand_in("11.4.0", typed=True)
    builder = library.Builder(None)
    config = builder.create_builder_config()
    config._answers["set_timing_cache"] = lambda cache, ignore: False
    with pytest.raises(ModelFileError, match="timing cache"):
        build(b"graph", options(), b"old", library)


def test_what_does_not_parse_or_build_is_one_sentence() -> None:
    broken = SimpleNamespace(desc=lambda: "node 7 is odd")
    answers = {"parser": {"parse": lambda graph: False, "num_errors": 1, "get_error": lambda index: broken}}
    library, _ = stand_in("11.4.0", typed=True, **answers)
    with pytest.raises(ModelFileError, match="cannot parse the graph: node 7 is odd"):
        build(b"graph", options(), library=library)
    library, _ = stand_in("11.4.0", typed=True, build=lambda network, config: None)
    with pytest.raises(ModelFileError, match="cannot build the engine"):
        build(b"graph", options(), library=library)


def test_a_library_that_is_not_there_is_named_with_the_way_out() -> None:
    try:
        import tensorrt  # noqa: F401
    except ImportError:
        with pytest.raises(DeviceError, match="cannot be imported"):
            load_library("tensorrt")
        assert "install TensorRT" in str(why_not("tensorrt"))
    else:
        pytest.skip("TensorRT is installed")


@pytest.mark.rtx
def test_every_name_we_use_exists_in_tensorrt_rtx(exported: dict[str, onnx.ModelProto]) -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
    library = load_library("tensorrt-rtx")
    assert is_strongly_typed(library)
    given = options(target="tensorrt-rtx", compute_capabilities=("8.6", "8.9"), workspace_gib=1, optimization_level=1)
    plan = build(exported["tiny"].SerializeToString(), given)
    assert len(plan.plan) > 1000
    assert plan.library.startswith("tensorrt_rtx 1.")
    with pytest.raises(ModelFileError, match="cannot parse"):
        build(b"no graph", given)
