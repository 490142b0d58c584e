"""Check the doubles of TensorRT, on which all other tests run, against the API of 8.6, 10.16, 11.4 and TensorRT-RTX.

A double accepts only what the real library has, so code that passes on the doubles uses no other names or arguments.

10.16 and 11.4 are the real Python bindings with stub libraries; `make bindings` installs them. 8.6 has no bindings for
this version of Python, so `tests/export/bindings.py` recorded its names.
"""

from __future__ import annotations

import importlib.util
import inspect
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx
import pytest

from benchmarks import fake_tensorrt
from calib.graph.half_precision import convert_to_half
from export.engine.builder import build
from export.engine.weakly_typed import precision_flags
from runtime.backends.tensorrt_engine import _DTYPES
from runtime.core.errors import ModelFileError
from tests.export.bindings import ROOT, Surface, compiler, read_surface, run_with
from tests.export.engine.builder_double import (
    EMPTY,
    VERSIONS,
    Calls,
    Recorder,
    gpu,
    layer,
    options,
    stand_in,
    with_layers,
)
from tests.raising import raises

BINDINGS = os.environ.get("DRN_TENSORRT_BINDINGS")
RECORDED = Path(__file__).parent / "recorded" / "tensorrt-8.6.json"
LIBRARIES = ("8.6", "10.16", "11.4", "rtx")
STAND_INS = dict(zip(LIBRARIES, VERSIONS, strict=True))
FAKES = dict(zip(LIBRARIES, fake_tensorrt.VERSIONS, strict=True))
# The classes that the doubles of `fake_tensorrt` imitate.
FAKE_CLASSES = {
    "Runtime": "Runtime",
    "Engine": "ICudaEngine",
    "Context": "IExecutionContext",
    "RuntimeConfig": "IRuntimeConfig",
    "RuntimeCache": "IRuntimeCache",
}


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


def accepts(member: dict[str, Any], count: int) -> bool:
    """Return whether one of the overloads of a method takes this number of arguments."""
    required = ([parameter[2] for parameter in parameters] for parameters, _ in member.get("signatures", ()))
    return any(sum(needed) <= count <= len(needed) for needed in required)


def argument_counts(function: Callable[..., Any]) -> range:
    """Return the numbers of arguments that a function of a double takes."""
    parameters = inspect.signature(function).parameters.values()
    return range(sum(parameter.default is parameter.empty for parameter in parameters), len(parameters) + 1)


@pytest.mark.parametrize("library", LIBRARIES)
def test_bindings_have_the_requested_version(library: str) -> None:
    assert surface_of(library)["version"].startswith("1." if library == "rtx" else library + ".")


def builder_calls(library: str, exported: dict[str, onnx.ModelProto]) -> tuple[Any, Calls]:
    """Return a double after builds with all options, with the layers of 8.6, and of a graph that cannot be parsed."""
    module, calls = stand_in(STAND_INS[library])
    more: dict[str, Any] = {"version_compatible": True, "hardware_compatible": True}
    if library == "rtx":
        more = {"target": "tensorrt-rtx", "compute_capabilities": ("8.6",)}
    given = options("fp16", workspace_gib=1, optimization_level=1, **more)
    build(EMPTY, given, library=module, cuda=gpu())
    if library == "8.6":
        module.PreviewFeature = SimpleNamespace(PROFILE_SHARING_0806=0)
        half = convert_to_half(exported["tiny"], keep=("prop_fc",))
        with_layers(module, [layer(calls, node.name) for node in half.graph.node])
        build(half.SerializeToString(), given, library=module, cuda=gpu())
        assert ("ILayer", "precision") in calls.written
    error = Recorder(calls, "ParserError", desc=lambda: "node 7")
    module.OnnxParser(None, None)._answers.update(
        parse=lambda graph: False, num_errors=1, get_error=lambda index: error
    )
    with raises(ModelFileError, "unparsable_graph"):
        build(EMPTY, given, library=module)
    return module, calls


@pytest.mark.parametrize("library", LIBRARIES)
def test_builder_double_takes_only_what_the_library_has(library: str, exported: dict[str, onnx.ModelProto]) -> None:
    names = surface_of(library)["names"]
    module, calls = builder_calls(library, exported)
    # Only 8.6 has layers of its own, and its record lacks tensors.
    offered = {(owner, name) for owner, name in calls.requested if owner != "ITensor"}
    for name, thing in vars(module).items():
        if isinstance(thing, (SimpleNamespace, type)):
            offered |= {(name, member) for member in vars(thing) if not member.startswith("__")}
        elif callable(thing):
            assert accepts(names[name]["members"]["__init__"], len(inspect.signature(thing).parameters)), name
    assert {name for name in vars(module) if not name.startswith("__")} <= set(names)
    assert not {(owner, name) for owner, name in offered if name not in names[owner]["members"]}
    made = {call for call in calls.made if call[0] != "ITensor"}
    assert {("Builder", "build_serialized_network", 2), ("ParserError", "desc", 0)} <= made
    assert not {
        (owner, name, count) for owner, name, count in made if not accepts(names[owner]["members"][name], count)
    }
    assert not {(owner, name) for owner, name in calls.written if not names[owner]["members"][name].get("writable")}
    known = VERSIONS[STAND_INS[library]]
    real = names["NetworkDefinitionCreationFlag"]["members"]
    # The numbers of the flags differ between versions.
    assert {name: real[name]["value"] for name in known.network_flags} == known.network_flags
    for name in ("STRONGLY_TYPED", "EXPLICIT_BATCH"):
        assert (name in known.network_flags) == (name in real)
    for name in ("FP16", "BF16", "INT8", "FP8"):
        assert (name in known.builder_flags) == (name in names["BuilderFlag"]["members"])


def runtime_doubles(version: str, exported: dict[str, onnx.ModelProto], path: Path) -> Iterator[Any]:
    """Yield one object of each class that the double of the runtime offers in a version."""
    onnx.save(exported["tiny"], path)
    library = fake_tensorrt.Library(fake_tensorrt.Driver(), version)
    engine = fake_tensorrt.Engine(library, None, {"graph": str(path), "profiles": []})
    yield fake_tensorrt.Runtime(library, None)
    yield engine
    context = fake_tensorrt.Context(engine)
    # Properties that the source sets.
    if library.old:
        context.device_memory = 0
    yield context
    if library.rtx:
        config = engine.create_runtime_config()
        config.cuda_graph_strategy = library.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
        yield config
        yield config.create_runtime_cache()


@pytest.mark.parametrize("library", LIBRARIES)
def test_runtime_double_takes_library_calls(library: str, exported: dict[str, onnx.ModelProto], tmp_path: Path) -> None:
    names = surface_of(library)["names"]
    module = fake_tensorrt.Library(fake_tensorrt.Driver(), FAKES[library])
    enums = {name: thing for name, thing in vars(module).items() if isinstance(thing, SimpleNamespace)}
    assert {"TensorIOMode", "TensorLocation"} <= set(enums)
    for name, thing in enums.items():
        assert set(vars(thing)) <= set(names[name]["members"]), name
    for double in runtime_doubles(FAKES[library], exported, tmp_path / "drn.onnx"):
        members = names[FAKE_CLASSES[type(double).__name__]]["members"]
        offered = {name for name in dir(double) if not name.startswith("_")} - {"SCRATCH", "compile"}
        # Some names exist in some versions only.
        offered = {name for name in (*offered, "set_device_memory") if hasattr(double, name)}
        assert offered <= set(members), type(double)
        for name in offered:
            thing = getattr(double, name)
            if callable(thing):
                counts = argument_counts(thing)
                assert any(accepts(members[name], count) for count in counts), f"{name} with {counts} arguments"


@pytest.mark.parametrize("library", ["10.16", "11.4", "rtx"])
def test_runtime_data_types_exist_in_each_version(library: str) -> None:
    assert set(_DTYPES) <= set(surface_of(library)["names"]["DataType"]["members"])


def test_precision_flags_exist_in_tensorrt_86() -> None:
    flags = {name for precision in ("fp32", "fp16", "int8") for name in precision_flags(precision)}
    assert flags == {"FP16", "INT8"} <= set(surface_of("8.6")["names"]["BuilderFlag"]["members"])


_BUILD = """
import tensorrt_bindings as trt
from export.engine.builder import BuildOptions, _network_flags, build, is_strongly_typed
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
flag = int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
print(is_strongly_typed(trt), _network_flags(trt) == 1 << flag)

# The stub libraries are as strict about types as the real ones.
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
        print("accepted:", call)
    except TypeError:
        pass
"""


@pytest.mark.parametrize("version", ["10.16", "11.4"])
def test_real_bindings_accept_every_build_call(version: str) -> None:
    lowest = Path("/proc/sys/vm/mmap_min_addr")
    if lowest.exists() and int(lowest.read_text()) > 65536:
        pytest.skip(f"vm.mmap_min_addr is {lowest.read_text().strip()}, and 65536 or less is needed")
    output = run_with(folder_of(version), _BUILD).splitlines()
    assert output == ["True True True '' ['', ''] ''", "True True"]
