"""Check that all TensorRT names in the source exist in 8.6, 10.16, 11.4 and TensorRT-RTX, with matching signatures.

10.16 and 11.4 are the real Python bindings with stub libraries; `make bindings` installs them. 8.6 has no bindings for
this version of Python, so `tests/export/bindings.py` recorded its names.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from export.engine.builder import _network_flags, is_strongly_typed
from export.engine.weakly_typed import precision_flags
from tests.export.bindings import ROOT, Surface, compiler, read_surface, run_with
from tests.export.engine.test_builder import EMPTY, VERSIONS, build, gpu, options, stand_in
from tests.export.uses import Reading, lines_of

BINDINGS = os.environ.get("DRN_TENSORRT_BINDINGS")
RECORDED = Path(__file__).parent / "recorded" / "tensorrt-8.6.json"
LIBRARIES = ("8.6", "10.16", "11.4", "rtx")
STAND_INS = {"8.6": "8.6.1", "10.16": "10.16.1", "11.4": "11.4.0", "rtx": "1.7.1"}
# Classes whose names are only known at run time: precision flags of a weakly typed build, and GPUs of TensorRT-RTX.
CHOSEN = {"8.6": {"BuilderFlag"}, "10.16": set(), "11.4": set(), "rtx": {"ComputeCapability"}}


# Files that use TensorRT, each with a minimum for the number of its uses: 8.6 has 44, 17, 29, 9, 16 and 12
# (2026-11-30).
# `uses.py` recognizes objects of TensorRT by the names of variables: after a rename it sees fewer uses, or no file.
MIN_USES = {
    "export/engine/builder.py": 40,
    "export/engine/inspector.py": 15,
    "export/engine/weakly_typed.py": 26,
    "runtime/backends/execution_contexts.py": 8,
    "runtime/backends/tensorrt_engine.py": 14,
    "runtime/backends/tensorrt_logger.py": 10,
}


def sources() -> list[Path]:
    """Return the source files that use TensorRT."""
    rooms = [path for room in ("runtime", "export", "calib", "benchmarks") for path in (ROOT / room).rglob("*.py")]
    pattern = re.compile(r"(\b|_)trt\.(?!py)|import tensorrt")
    return sorted(path for path in rooms if pattern.search(path.read_text(encoding="utf-8")))


def folder_of(version: str) -> Path:
    """Return the folder of the bindings of a version; skip the test if there are none and none were requested."""
    folder = Path(BINDINGS or ROOT / ".venv" / "bindings") / version
    lacking = None
    if not (folder / "tensorrt_bindings").is_dir():
        lacking = f"no bindings of TensorRT {version} in {folder}; run `make bindings` (6 MB each, Linux x86-64)"
    elif compiler() is None:
        lacking = "no C compiler (cc) to make stand-ins for TensorRT's libraries with; install one"
    if lacking and BINDINGS:
        pytest.fail(f"{lacking}, or unset DRN_TENSORRT_BINDINGS")
    if lacking:
        pytest.skip(lacking)
    return folder


def surface_of(library: str) -> Surface:
    if library == "8.6":
        return dict(json.loads(RECORDED.read_text(encoding="utf-8")))
    if library == "rtx":
        if importlib.util.find_spec("tensorrt_rtx") is None:
            pytest.skip("TensorRT-RTX is not installed (pip install tensorrt-rtx-cu13)")
        return read_surface(None, "tensorrt_rtx")
    return read_surface(folder_of(library), "tensorrt_bindings")


def reading(path: Path, library: str) -> Reading:
    return Reading(path, surface_of(library), "tensorrt-rtx" if library == "rtx" else "tensorrt")


# For TensorRT 8.6 only.
WEAKLY_TYPED = ROOT / "export" / "engine" / "weakly_typed.py"


@pytest.mark.parametrize("path", [path for path in sources() if path != WEAKLY_TYPED], ids=lambda path: path.name)
@pytest.mark.parametrize("library", LIBRARIES)
def test_used_api_names_exist_in_each_version(path: Path, library: str) -> None:
    check_names(path, library)


def test_weakly_typed_build_uses_existing_names() -> None:
    # It also changes graphs, and ONNX has some of TensorRT's names.
    read = reading(WEAKLY_TYPED, "8.6")
    assert not read.problems(), lines_of(read.problems())
    assert {("ILayer", "precision"), ("INetworkDefinition", "get_layer")} <= {
        (use.owner, use.name) for use in read.uses.values()
    }
    assert {owner for owner, _ in read.chosen} <= CHOSEN["8.6"]


def check_names(path: Path, library: str) -> None:
    read = reading(path, library)
    assert not read.problems(), f"{path.name} on {library}:\n{lines_of(read.problems())}"
    assert not read.untracked, (
        f"{path.name}: TensorRT's names on what `uses.py` cannot follow: {sorted(read.untracked)}"
    )
    assert {owner for owner, _ in read.chosen} <= CHOSEN[library], read.chosen


def test_sources_are_all_files_that_use_tensorrt() -> None:
    assert [path.relative_to(ROOT).as_posix() for path in sources()] == sorted(MIN_USES)


@pytest.mark.parametrize("path", MIN_USES)
def test_analysis_covers_api_uses_of_every_file(path: str) -> None:
    assert len(reading(ROOT / path, "8.6").uses) >= MIN_USES[path]


@pytest.mark.parametrize(
    ("path", "old"),
    [
        ("export/engine/builder.py", "trt"),
        ("export/engine/builder.py", "config"),
        ("export/engine/inspector.py", "trt"),
        ("export/engine/weakly_typed.py", "trt"),
        ("export/engine/weakly_typed.py", "network"),
        ("runtime/backends/tensorrt_engine.py", "trt"),
        ("runtime/backends/tensorrt_engine.py", "library"),
        ("runtime/backends/execution_contexts.py", "context"),
        ("runtime/backends/execution_contexts.py", "trt"),
    ],
)
def test_renamed_variable_is_followed_or_reported(path: str, old: str, tmp_path: Path) -> None:
    text = (ROOT / path).read_text(encoding="utf-8")
    renamed = tmp_path / "renamed.py"
    renamed.write_text(re.sub(rf"\b{old}\b", "renamed", text), encoding="utf-8")
    read = reading(renamed, "8.6")
    # If the object comes from a call that `uses.py` follows, its name does not matter.
    followed = len(read.uses) == len(reading(ROOT / path, "8.6").uses)
    assert followed or len(read.uses) < MIN_USES[path] or read.untracked


@pytest.mark.parametrize("library", LIBRARIES)
def test_bindings_have_the_requested_version(library: str) -> None:
    assert surface_of(library)["version"].startswith("1." if library == "rtx" else library + ".")


def test_analysis_covers_api_uses_of_builder() -> None:
    seen = {(use.owner, use.name) for use in reading(ROOT / "export" / "engine" / "builder.py", "8.6").uses.values()}
    ends_of_chains = {
        ("ParserError", "desc"),
        ("ITimingCache", "serialize"),
        ("IOptimizationProfile", "set_shape"),
        ("NetworkDefinitionCreationFlag", "EXPLICIT_BATCH"),
        ("BuilderFlag", "VERSION_COMPATIBLE"),
    }
    assert ends_of_chains <= seen
    assert len(seen) >= 30


def test_analysis_covers_api_uses_of_inspector() -> None:
    seen = {(use.owner, use.name) for use in reading(ROOT / "export" / "engine" / "inspector.py", "8.6").uses.values()}
    assert seen >= {
        ("EngineInspector", "execution_context"),
        ("EngineInspector", "get_engine_information"),
        ("IExecutionContext", "set_input_shape"),
        ("IExecutionContext", "set_optimization_profile_async"),
        ("Runtime", "engine_host_code_allowed"),
    }


def test_analysis_covers_api_uses_of_runtime() -> None:
    paths = [path for path in sources() if path.is_relative_to(ROOT / "runtime")]
    uses = [use for path in paths for use in reading(path, "8.6").uses.values()]
    ends_of_chains = {
        ("ICudaEngine", "get_tensor_dtype"),
        ("IExecutionContext", "execute_async_v3"),
        ("IExecutionContext", "get_tensor_shape"),
        ("IExecutionContext", "set_input_shape"),
        ("IExecutionContext", "set_tensor_address"),
        ("Runtime", "engine_host_code_allowed"),
        ("TensorIOMode", "INPUT"),
    }
    assert ends_of_chains <= {(use.owner, use.name) for use in uses}


@pytest.mark.parametrize("library", ["10.16", "11.4", "rtx"])
def test_runtime_data_types_exist_in_each_version(library: str) -> None:
    from runtime.backends.tensorrt_engine import _DTYPES

    assert set(_DTYPES) <= set(surface_of(library)["names"]["DataType"]["members"])


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("config.set_memory_pool_limit(", "config.set_memory_limit(", "IBuilderConfig.set_memory_limit: does not"),
        ("config.profiling_verbosity =", "config.verbosity =", "IBuilderConfig.verbosity: does not exist"),
        ("HardwareCompatibilityLevel.AMPERE_PLUS", "HardwareCompatibilityLevel.AMPERE", "AMPERE: does not exist"),
        (".desc()", ".description()", "ParserError.description: does not exist"),
        ("updated_cache.serialize()", "updated_cache.serialise()", "ITimingCache.serialise: does not exist"),
        ('"EXPLICIT_BATCH"', '"EXPLICIT"', "NetworkDefinitionCreationFlag.EXPLICIT: does not exist"),
        ("trt.OnnxParser(network, logger)", "trt.OnnxParser(network)", "OnnxParser.__init__: needs logger"),
        ("trt.OnnxParser(network, logger)", "trt.OnnxParser(builder, logger)", "network is a INetworkDefinition, and"),
        ("set_timing_cache(cache, False)", "set_timing_cache(cache)", "set_timing_cache: needs ignore_mismatch"),
        ("MemoryPoolType.WORKSPACE, ", "ProfilingVerbosity.NONE, ", "pool is a MemoryPoolType, and gets"),
        ("builder.build_serialized_network(network, config)", "builder.build_engine_plan(config)", "build_engine_plan"),
        ("parser.num_errors", "len(parser.errors)", "OnnxParser.errors: does not exist"),
    ],
)
def test_unknown_api_name_is_reported(old: str, new: str, told: str, tmp_path: Path) -> None:
    text = (ROOT / "export" / "engine" / "builder.py").read_text(encoding="utf-8")
    assert old in text, "builder.py no longer says so; mutate what it says now"
    (tmp_path / "builder.py").write_text(text.replace(old, new), encoding="utf-8")
    assert told in lines_of(reading(tmp_path / "builder.py", "8.6").problems())


def test_untracked_object_is_reported(tmp_path: Path) -> None:
    (tmp_path / "lost.py").write_text("def run(thing):\n    thing.execute_async_v3(0)\n")
    assert reading(tmp_path / "lost.py", "8.6").untracked == {(2, "execute_async_v3")}


@pytest.mark.parametrize("library", ["10.16", "11.4", "rtx"])
def test_precision_flags_are_unused_if_strongly_typed(library: str) -> None:
    used = {
        use.name
        for use in reading(ROOT / "export" / "engine" / "builder.py", library).uses.values()
        if use.owner == "BuilderFlag"
    }
    assert used <= {"VERSION_COMPATIBLE", "TF32"}


def test_tensorrt_11_has_no_precision_flags_left() -> None:
    flags = surface_of("11.4")["names"]["BuilderFlag"]["members"]
    gone = {"FP16", "BF16", "INT8", "FP8", "INT4", "FP4", "OBEY_PRECISION_CONSTRAINTS", "PREFER_PRECISION_CONSTRAINTS"}
    assert not gone & set(flags)
    assert "EXPLICIT_BATCH" not in surface_of("11.4")["names"]["NetworkDefinitionCreationFlag"]["members"]
    assert gone < set(surface_of("10.16")["names"]["BuilderFlag"]["members"])


def test_precision_flags_exist_in_tensorrt_86() -> None:
    surface = surface_of("8.6")["names"]
    flags = {name for precision in ("fp32", "fp16", "int8") for name in precision_flags(precision)}
    assert flags == {"FP16", "INT8"}
    assert flags <= set(surface["BuilderFlag"]["members"])
    assert "BF16" not in surface["BuilderFlag"]["members"]


_BUILD = """
import tensorrt_bindings as trt
from export.engine.builder import BuildOptions, build
from export.engine.profiles import Profile
from runtime.backends.cuda_driver import Cuda
from benchmarks.fake_tensorrt import Driver

shapes = {"query_tokens": ((1, 1), (1, 8), (1, 12)), "query_length": ((1,), (1,), (1,))}
profile = Profile("one query", (1, 1, 1), (1, 8, 12), shapes)
options = BuildOptions(
    "tensorrt", "int8", [profile, profile], optimization_level=3, workspace_gib=0.5, version_compatible=True,
    hardware_compatible=True,
)
plan = build(b"graph", options, b"times", trt, Cuda(Driver()))
inspection = plan.inspection
print(
    plan.strongly_typed, len(plan.plan) > 0, len(plan.timing_cache) > 0, repr(inspection.unbound),
    [view.text for view in inspection.profiles], repr(inspection.reason()),
)
"""


def low_memory() -> None:
    """Skip if the system reserves low addresses, which the stub libraries need."""
    least = Path("/proc/sys/vm/mmap_min_addr")
    if least.exists() and int(least.read_text()) > 65536:
        pytest.skip(f"vm.mmap_min_addr is {least.read_text().strip()}, and 65536 or less is needed")


@pytest.mark.parametrize("version", ["10.16", "11.4"])
def test_real_bindings_accept_every_build_call(version: str) -> None:
    low_memory()
    assert run_with(folder_of(version), _BUILD).split() == ["True", "True", "True", "''", "['',", "'']", "''"]


_REFUSED = """
import tensorrt_bindings as trt
builder = trt.Builder(trt.Logger())
config = builder.create_builder_config()
for call in (
    "config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, 0.5)",
    "config.set_memory_pool_limit('WORKSPACE', 1)",
    "config.set_timing_cache(b'times', False)",
    "config.__class__.profiling_verbosity.fset(config, 2)",
    "builder.create_optimization_profile().set_shape('query_tokens', (1, 1), (4, 8))",
    "builder.build_serialized_network(config, builder.create_network(0))",
):
    try:
        eval(call)
        print("taken:", call)
    except TypeError:
        pass
"""


@pytest.mark.parametrize("version", ["10.16", "11.4"])
def test_fake_libraries_keep_strictness_of_bindings(version: str) -> None:
    low_memory()
    assert run_with(folder_of(version), _REFUSED) == ""


@pytest.mark.parametrize("version", ["10.16", "11.4"])
def test_network_is_strongly_typed_by_flag_name(version: str) -> None:
    code = (
        "import json, tensorrt_bindings as trt; from export.engine.builder import _network_flags, is_strongly_typed; "
        "flag = int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED); "
        "print(json.dumps([is_strongly_typed(trt), _network_flags(trt), flag]))"
    )
    typed, given, flag = json.loads(run_with(folder_of(version), code))
    assert typed is True
    assert given == 1 << flag
    assert flag == {"10.16": 1, "11.4": 0}[version], "the integers differ, so only names will do"


def test_tensorrt_86_is_weakly_typed() -> None:
    members = surface_of("8.6")["names"]["NetworkDefinitionCreationFlag"]["members"]
    flags = {name: told["value"] for name, told in members.items() if "value" in told}
    library: Any = SimpleNamespace(NetworkDefinitionCreationFlag=SimpleNamespace(**flags))
    assert not is_strongly_typed(library)
    assert _network_flags(library) == 1 << flags["EXPLICIT_BATCH"]


@pytest.mark.parametrize("library", LIBRARIES)
def test_fake_library_offers_only_existing_names(library: str) -> None:
    """The test double of `test_builder.py` has no names that the real library lacks."""
    names = surface_of(library)["names"]
    version = STAND_INS[library]
    module, calls = stand_in(version)
    rtx = {"target": "tensorrt-rtx", "compute_capabilities": ("8.6",)} if library == "rtx" else {}
    more = {} if rtx else {"version_compatible": True, "hardware_compatible": True}
    given = options("fp16", workspace_gib=1, optimization_level=1, **rtx, **more)
    build(EMPTY, given, library=module, cuda=gpu())
    offered = calls.asked | {
        (name, member)
        for name, thing in vars(module).items()
        if isinstance(thing, (SimpleNamespace, type))
        for member in vars(thing)
        if not member.startswith("__")
    }
    assert {name for name in vars(module) if not name.startswith("__")} <= set(names)
    assert not {(name, member) for name, member in offered if member not in names[name]["members"]}
    known = VERSIONS[version]
    real = names["NetworkDefinitionCreationFlag"]["members"]
    assert {name: real[name]["value"] for name in known.network_flags} == known.network_flags
    for name in ("STRONGLY_TYPED", "EXPLICIT_BATCH"):
        assert (name in known.network_flags) == (name in real)
    for name in ("FP16", "BF16", "INT8", "FP8"):
        assert (name in known.builder_flags) == (name in names["BuilderFlag"]["members"])
