"""Test `export.build.reduced_precision`: modules that stay in higher precision by the scan and by held-out queries."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import numpy_helper

from calib.calibration_table import CalibrationTable
from calib.errors import CalibrationError
from calib.graph.precision_audit import audit_graph
from calib.quantization_plan import QuantizationPlan
from export.build.reduced_precision import ConversionOptions, convert_precision, held_in_fp32
from runtime.artifacts.manifest import Library
from runtime.core.errors import CheckFailed
from runtime.datasets.dataset import DataSet
from tests.export.conftest import with_changed_weights
from tests.raising import quotes, raises


@pytest.fixture(scope="module")
def source(models: Path) -> onnx.ModelProto:
    return onnx.load(models / "drn.onnx")


@pytest.fixture(scope="module")
def data_set(planted: Path) -> DataSet:
    return DataSet(planted)


def scaled(graph: onnx.ModelProto, **factors: float) -> onnx.ModelProto:
    """Return a copy with some weights scaled; `__` in a name replaces the dot."""
    for name, factor in factors.items():
        graph = with_changed_weights(graph, lambda values, factor=factor: values * factor, name.replace("__", "."))
    return graph


@pytest.mark.parametrize("library", [None, "onnxruntime", "openvino"])
def test_only_cpu_has_unsigned_activations(source: onnx.ModelProto, table: Path, library: Library | None) -> None:
    options = ConversionOptions(table=table, library=library)
    graph = convert_precision(source, "int8", options, None).graph.graph
    points = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer if "zero_point" in tensor.name}
    quantizers = [node.input[2] for node in graph.node if node.op_type == "QuantizeLinear"]
    assert {int(points[name]) for name in quantizers} == ({-128, 0} if library else {0})


def test_overflow_prone_module_stays_fp32_and_is_reported(source: onnx.ModelProto, data_set: DataSet) -> None:
    # The product of both factors is unchanged, but values between the two layers exceed FP16.
    loud = scaled(source, prop_fc__weight=2.0**18, prop_fc__bias=2.0**18, backbone_net__layers__0__weight=2.0**-18)
    converted = convert_precision(loud, "fp16", ConversionOptions(threads=1), data_set)
    assert "prop_fc" in converted.facts["held back in FP32"]
    assert audit_graph(converted.graph).macs["prop_fc"].keys() == {"fp32"}
    untouched = convert_precision(source, "fp16", ConversionOptions(threads=1), data_set)
    assert untouched.facts["held back in FP32"] == []
    # On some CPUs rounding restores a module of the head, but none that could overflow.
    assert "prop_fc" not in untouched.facts["restored to FP32"]


def test_module_losing_accuracy_in_fp16_is_restored(source: onnx.ModelProto, data_set: DataSet) -> None:
    # Subnormal weights in FP16: nothing overflows, but answers change.
    weights = {f"fpn__layer_blocks__{level}__{kind}": 2.0**-21 for level in range(3) for kind in ("weight", "bias")}
    faint = scaled(source, **weights, fcos__head__towers__0__weight=2.0**21)
    twin = convert_precision(faint, "fp16", ConversionOptions(threads=1), data_set)
    assert twin.facts["restored to FP32"]
    assert {name.split(".")[0] for name in twin.facts["restored to FP32"]} <= {"fpn", "fcos"}


def test_fewest_modules_are_restored_and_the_plan_repeats_it(
    source: onnx.ModelProto, data_set: DataSet, table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    measured = CalibrationTable.load(table)
    small = dict(measured.ranges)
    small["prop_fc/Unsqueeze"] = dataclasses.replace(small["prop_fc/Unsqueeze"], high=0.01)
    path = tmp_path / "spoilt.calibration.json"
    dataclasses.replace(measured, ranges=small).save(path)
    options = ConversionOptions(table=path, max_drop=4.0, threads=1, plan_output=tmp_path / "plan.json")
    converted = convert_precision(source, "int8", options, data_set)
    kept = converted.facts["kept out of 8 bits"]
    # With other rounding (two threads) a borderline query can restore up to two more modules.
    assert "prop_fc" in kept
    assert len(kept) <= 3
    assert quotes(capsys.readouterr().out, "prop_fc")
    assert json.loads((tmp_path / "plan.json").read_text())["keep"] == kept
    again = convert_precision(
        source, "int8", dataclasses.replace(options, plan=tmp_path / "plan.json", plan_output=None), None
    )
    assert again.graph.SerializeToString() == converted.graph.SerializeToString()


def test_unreachable_budget_raises_budget_exceeded(
    source: onnx.ModelProto, data_set: DataSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("export.build.reduced_precision.BOUNDARY_P99", -1.0)
    monkeypatch.setattr("export.build.reduced_precision.modules", lambda graph: {"prop_fc", "fpn.layer_blocks.0"})
    with raises(CheckFailed, "budget_exceeded", "fp16"):
        convert_precision(source, "fp16", ConversionOptions(threads=1), data_set)


def test_table_of_test_videos_and_foreign_plan_are_rejected(
    source: onnx.ModelProto, data_set: DataSet, table: Path, tmp_path: Path
) -> None:
    measured = CalibrationTable.load(table)
    video = data_set.annotations("test")[0].video
    dataclasses.replace(measured, videos=(video,)).save(tmp_path / "test.json")
    with raises(CalibrationError, "test_videos_used", 1, video):
        convert_precision(source, "int8", ConversionOptions(table=tmp_path / "test.json", threads=1), data_set)
    QuantizationPlan(("prop_fc",), "int8", "0" * 64, dict(measured.key), {}).save(tmp_path / "plan.json")
    with raises(CalibrationError, "plan_of_another_table", "0" * 12, measured.digest[:12]):
        convert_precision(source, "int8", ConversionOptions(table=table, plan=tmp_path / "plan.json", threads=1), None)


def test_borderline_accuracy_is_decided_by_more_queries(
    source: onnx.ModelProto, data_set: DataSet, table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = CalibrationTable.load(table)
    small = {
        name: dataclasses.replace(entry, low=entry.low / 1e4, high=entry.high / 1e4)
        for name, entry in measured.ranges.items()
    }
    dataclasses.replace(measured, ranges=small).save(tmp_path / "t.json")
    requested = {}

    def search(model: Any, table: Any, judge: Any, max_drop: float, *, ranker: Any, **_: Any) -> Any:
        requested.update(judge=len(judge.annotations), ranker=len(ranker.annotations))
        raise CheckFailed("enough", code="enough")

    monkeypatch.setattr("export.build.reduced_precision.HELD_OUT", 8)
    monkeypatch.setattr("export.build.reduced_precision.find_layers_to_restore", search)
    with raises(CheckFailed, "enough"):
        convert_precision(
            source, "int8", ConversionOptions(table=tmp_path / "t.json", max_drop=0.0, threads=1), data_set
        )
    assert requested["ranker"] == 8
    assert requested["judge"] > 8


def test_graph_without_products_keeps_nothing_in_fp32() -> None:
    assert held_in_fp32({}) == ()
