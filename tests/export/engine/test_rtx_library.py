"""Check rules of the test doubles on TensorRT-RTX itself, which parses, builds and reads plans without a GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import pytest

from benchmarks.fake_tensorrt import Driver, write_plan
from export.engine.builder import BuildOptions, _configure, build
from export.engine.inspector import PlanNotLoaded, inspect_plan
from export.engine.profiles import Profile
from runtime.backends.cuda_driver import Cuda
from runtime.backends.tensorrt_backend import open_engine
from runtime.backends.tensorrt_logger import logger_for
from runtime.core.errors import DeviceError, ModelFileError
from tests.export.conftest import TINY, manifest
from tests.export.engine.builder_double import VERSIONS
from tests.raising import raises

pytestmark = pytest.mark.rtx

# Offset in a plan of the bits of its compute capabilities, as unsigned little-endian integer (1.7.1).
CAPABILITIES = slice(32, 36)
# The first bytes of a plan of TensorRT ("ftrt"); a plan of TensorRT-RTX starts with "vtrt".
OTHER_PLAN = b"ftrt" + bytes(200)


@pytest.fixture(scope="module")
def trt() -> Any:
    return pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed", exc_type=ImportError)


def options(*capabilities: str, **more: Any) -> BuildOptions:
    shapes = {"x": ((1, 4), (2, 4), (8, 4))}
    profile = Profile("all", (1, 2, 8), (1, 1, 1), shapes)  # type: ignore[arg-type]
    return BuildOptions("tensorrt-rtx", "fp32", [profile], compute_capabilities=capabilities, **more)


def relu() -> bytes:
    x, y = (onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["batch", 4]) for name in "xy")
    graph = onnx.helper.make_graph([onnx.helper.make_node("Relu", ["x"], ["y"], "relu/Relu")], "relu", [x], [y])
    opset = onnx.helper.make_opsetid("", 18)
    return onnx.helper.make_model(graph, opset_imports=[opset], ir_version=8).SerializeToString()


def test_plan_header_records_compute_capabilities(trt: Any) -> None:
    one, other, both = (build(relu(), options(*names)).plan for names in (("8.6",), ("12.0",), ("8.6", "12.0")))
    assert trt.Runtime(logger_for(trt)).engine_header_size >= CAPABILITIES.stop
    bits = [int.from_bytes(plan[CAPABILITIES], "little") for plan in (one, other, both)]
    assert all(bit.bit_count() == 1 for bit in bits[:2])
    assert bits[0] | bits[1] == bits[2] != bits[0]


def test_graph_that_cannot_be_parsed_is_reported(trt: Any) -> None:
    with raises(ModelFileError, "unparsable_graph", trt.__version__):
        build(b"no graph", options("8.6"))


def test_supported_compute_capabilities_are_documented(trt: Any) -> None:
    members = {name for name in dir(trt.ComputeCapability) if name.startswith("SM")}
    double = vars(VERSIONS["1.7.1"].more["ComputeCapability"])
    assert members == {name for name in double if name.startswith("SM")}
    names = sorted((name[2:-1] + "." + name[-1] for name in members), key=float)
    text = (Path(__file__).parents[3] / "docs" / "engines.md").read_text(encoding="utf-8")
    assert f"`--compute-capability` {', '.join(names[:-1])} or {names[-1]} " in text


def test_tf32_is_enabled_until_cleared(trt: Any) -> None:
    builder = trt.Builder(logger_for(trt))
    for allowed in (False, True):
        config = builder.create_builder_config()
        assert config.get_flag(trt.BuilderFlag.TF32)
        _configure(trt, config, options("8.6", tf32=allowed))
        assert config.get_flag(trt.BuilderFlag.TF32) == allowed
        assert config.max_aux_streams == 0
        assert config.profiling_verbosity == trt.ProfilingVerbosity.DETAILED


@pytest.mark.parametrize("damage", ["of another library", "cut"])
def test_unreadable_plan_is_not_loaded(trt: Any, damage: str, tmp_path: Path) -> None:
    plan = build(relu(), options("8.6")).plan
    assert plan.startswith(b"vtrt")
    unreadable = OTHER_PLAN if damage == "of another library" else plan[: len(plan) // 2]
    # Both are reported before the library needs a GPU.
    reason = "magicTag" if damage == "of another library" else "plan.header.size"
    driver = Driver()
    with raises(PlanNotLoaded, "plan_not_loaded", reason):
        inspect_plan(trt, logger_for(trt), unreadable, options("8.6").profiles, cuda=Cuda(driver))
    graph, engine = tmp_path / "drn.onnx", tmp_path / "drn.fp32.engine"
    graph.write_bytes(relu())
    write_plan(engine, graph, [], manifest(TINY), trt.__version__, plan_bytes=unreadable)
    with raises(DeviceError, "gpu_call_failed", reason, engine.name):
        open_engine(engine, library=trt, cuda=Cuda(driver))
    assert driver.held() == {}
