"""Test the calls of `export.engine.builder` to TensorRT 8.6, 10, 11 and TensorRT-RTX, on a recording test double."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.fake_tensorrt import HOST_CODE, Driver
from export.engine.builder import build, check_options, load_library, runs_here, unavailable_reason
from export.engine.inspector import PlanNotLoaded
from runtime.artifacts.engine_layers import count_layers, read_layers
from runtime.backends.cuda_driver import Cuda
from runtime.core.errors import DeviceError, ModelFileError
from runtime.core.gpu_info import Gpu
from tests.export.engine.builder_double import EMPTY, Calls, Recorder, gpu, named, options, stand_in
from tests.raising import quotes, raises


@pytest.mark.parametrize(("version", "flag"), [("10.16.1", 2), ("11.4.0", 1)])
def test_strongly_typed_versions_get_no_precision_flag(version: str, flag: int) -> None:
    library, calls = stand_in(version)
    plan = build(b"graph", options("int8", workspace_gib=2, optimization_level=5), library=library)
    assert plan.plan == b"plan"
    assert plan.strongly_typed
    assert plan.timing_cache == b"times"
    assert named(calls, "create_network") == [(flag,)], "STRONGLY_TYPED moved from 1 to 0"
    assert named(calls, "parse") == [(b"graph",)]
    assert named(calls, "set_flag") == []
    assert named(calls, "max_aux_streams") == [(0,)]
    assert named(calls, "set_memory_pool_limit") == [("workspace", 2 * 2**30)]
    assert named(calls, "builder_optimization_level") == [(5,)]
    assert named(calls, "profiling_verbosity") == [("detailed",)]


@pytest.mark.parametrize(("precision", "flags"), [("fp32", []), ("fp16", ["FP16"]), ("int8", ["INT8", "FP16"])])
def test_weakly_typed_version_sets_precision_flags(precision: str, flags: list[str]) -> None:
    library, calls = stand_in("8.6.1")
    assert not build(EMPTY, options(precision), library=library).strongly_typed
    assert named(calls, "set_flag") == [(flag,) for flag in flags]
    # EXPLICIT_BATCH is flag 0.
    assert named(calls, "create_network") == [(1,)]


@pytest.mark.parametrize(
    ("version", "given", "code", "values"),
    [
        ("8.6.1", {"precision": "bf16"}, "precision_unsupported", ("8.6.1", "bf16")),
        ("8.6.1", {"precision": "fp8"}, "precision_unsupported", ("8.6.1", "fp8")),
        # The parser of opset 22, which has BF16 convolutions, came with 10.6.
        ("10.5.0", {"precision": "bf16"}, "precision_unsupported", ("bf16", "10.6")),
        (
            "11.4.0",
            {"precision": "fp8", "hardware_compatible": True},
            "conflicting_options",
            ("--hardware-compatible", "fp8"),
        ),
        ("11.4.0", {"compute_capabilities": ("8.6",)}, "inapplicable_option", ("--compute-capability",)),
        ("11.4.0", {"optimization_level": 9}, "invalid_option", ("--optimization-level", 9)),
        ("11.4.0", {"workspace_gib": 0.0}, "invalid_option", ("--workspace", "0.0")),
        ("1.7.1", {}, "missing_option", ("--compute-capability",)),
        ("1.7.1", {"compute_capabilities": ("9.0",)}, "unsupported_compute_capability", ("1.7.1", "9.0", "12.1")),
        ("1.7.1", {"version_compatible": True}, "inapplicable_option", ("--version-compatible",)),
        ("1.7.1", {"precision": "fp8", "compute_capabilities": ("8.9",)}, "precision_unsupported", ("fp8",)),
        ("1.7.1", {"precision": "bf16", "compute_capabilities": ("7.5",)}, "precision_unsupported", ("bf16", "7.5")),
    ],
)
def test_unsupported_options_are_rejected_before_the_build(
    version: str, given: dict[str, Any], code: str, values: tuple[object, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("export.engine.builder.cuda_gpu", lambda: None)
    library, calls = stand_in("10.16.1" if version.startswith("10.") else version)
    library.__version__ = version
    target = "tensorrt-rtx" if version == "1.7.1" else "tensorrt"
    with raises(DeviceError, code, *values):
        build(b"graph", options(**{"target": target, **given}), library=library)
    assert calls == []


@pytest.mark.parametrize(("version", "precision"), [("10.6.0", "bf16"), ("11.4.0", "bf16"), ("11.4.0", "fp8")])
def test_supported_precisions_are_accepted(version: str, precision: str) -> None:
    library, _ = stand_in("11.4.0" if version.startswith("11") else "10.16.1")
    library.__version__ = version
    check_options(options(precision), library)


@pytest.mark.parametrize("allowed", [False, True])
def test_tf32_is_cleared_unless_allowed(allowed: bool) -> None:
    library, calls = stand_in("11.4.0")
    build(EMPTY, options("fp32", tf32=allowed), library=library)
    assert named(calls, "clear_flag") == ([] if allowed else [("TF32",)])


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
    build(b"graph", options(target="tensorrt-rtx", compute_capabilities=("8.6", "12.0")), library=library)
    assert named(calls, "num_compute_capabilities") == [(2,)]
    assert named(calls, "set_compute_capability") == [(86, 0), (120, 1)]


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
    # Only version-compatible plans may run host code.
    assert named(calls, "engine_host_code_allowed") == []


def test_failed_context_keeps_unbound_inspection() -> None:
    library, _ = stand_in("11.4.0", context=lambda: None)
    driver = Driver()
    inspection = build(EMPTY, options(), library=library, cuda=Cuda(driver)).inspection
    assert inspection is not None
    assert [view.text for view in inspection.profiles] == [None, None]
    assert inspection.reason()
    assert inspection.views() == [inspection.unbound] * 2
    assert driver.held() == {}


@pytest.mark.parametrize("version", INSPECTED)
def test_version_compatible_engine_is_inspected(version: str) -> None:
    library, _ = stand_in(version)
    inspection = build(EMPTY, options(version_compatible=True), library=library, cuda=gpu()).inspection
    assert inspection is not None
    assert inspection.reason() == ""


def test_unloadable_engine_raises_error() -> None:
    library, _ = stand_in("11.4.0")
    library.Runtime = lambda logger: Recorder(Calls(), "Runtime", deserialize_cuda_engine=lambda plan: None)
    with pytest.raises(PlanNotLoaded):
        build(EMPTY, options(), library=library, cuda=gpu())


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
    library.Builder(None).create_builder_config()._answers["set_timing_cache"] = lambda cache, ignore: False
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


def test_missing_library_is_named_with_install_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with raises(DeviceError, "missing_library", "tensorrt"):
        load_library("tensorrt")
    assert quotes(str(unavailable_reason("tensorrt")), "tensorrt")
