"""Test `export.parity.compare_layers`: the first module that differs between two graphs."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from calib.calibration_table import CalibrationTable
from calib.graph.conv_to_matmul import convs_to_matmul
from calib.graph.onnx_graph import load_fp32_graph, read_manifest
from calib.qdq_quantizer import QuantizationPolicy, insert_qdq
from export.parity.compare_layers import LayerComparison, compare_layers
from runtime import Grounder
from runtime.artifacts.manifest import METADATA_KEY
from runtime.core.batch import Batch
from runtime.datasets.dataset import DataSet
from runtime.grounding.evaluation import batches_of
from tests.export.conftest import with_changed_weights
from tests.raising import quotes

pytest.importorskip("polygraphy", reason="layers are compared by Polygraphy (pip install '.[engine]')")


@pytest.fixture(scope="module")
def batches(models: Path, planted: Path) -> list[Batch]:
    """Two batches of two queries."""
    data_set = DataSet(planted)
    grounder = Grounder.load(models / "drn.onnx", "cpu", 1)
    return [batch for _, batch in batches_of(grounder, data_set, data_set.annotations("test")[:4], 2)]


def compare_with(
    graph: onnx.ModelProto, models: Path, tmp_path: Path, batches: list[Batch], **options: Any
) -> LayerComparison:
    """Compare `drn.onnx` with another graph."""
    onnx.save(graph, tmp_path / "other.onnx")
    return compare_layers(models / "drn.onnx", tmp_path / "other.onnx", batches, **options)


def test_compare_layers_with_itself_finds_no_difference(models: Path, batches: list[Batch]) -> None:
    actual = compare_layers(models / "drn.onnx", models / "drn.onnx", batches)
    assert {module.worst.relative for module in actual.modules} == {0}
    assert (actual.first_wrong, actual.unmatched, actual.queries) == (None, 0, 4)
    assert quotes(actual.sentence(), "1e-04", "0.0e+00")
    names = [module.module for module in actual.modules]
    assert names.index("query_encoder.biLSTM") < names.index("qInput.0") < names.index("backbone_net.layers.0")
    assert {"prop_fc", "fpn.inner_blocks.1", "fcos.head.mix_fc"} < set(names)


def test_int8_is_compared_without_scales(models: Path, table: Path, batches: list[Batch], tmp_path: Path) -> None:
    ranges = CalibrationTable.load(table)
    assert any(exponent for row in ranges.gains.values() for exponent in row)
    int8 = insert_qdq(load_fp32_graph(models / "drn.onnx"), ranges, QuantizationPolicy(stored=()))
    actual = compare_with(convs_to_matmul(int8), models, tmp_path, batches)
    errors = {module.module: module.worst.relative for module in actual.modules}
    # Gates contain the channel scales and are not quantized.
    assert max(errors[f"qInput.{level}"] for level in range(3)) < 1e-6
    assert all(map(math.isfinite, errors.values()))
    assert max(errors.values()) > 1e-4


@pytest.mark.parametrize(
    ("weight", "module", "untouched"),
    [
        ("fpn.inner_blocks.1.weight", "fpn.inner_blocks.1", {"backbone_net.layers.2", "fpn.inner_blocks.0"}),
        ("query_encoder.biLSTM.0.backwards.W", "query_encoder.biLSTM", {"prop_fc", "position_transform"}),
    ],
)
def test_compare_layers_names_first_wrong_module(
    models: Path, batches: list[Batch], tmp_path: Path, weight: str, module: str, untouched: set[str]
) -> None:
    seen: list[int] = []
    other = with_changed_weights(onnx.load(models / "drn.onnx"), lambda values: values * 1.01, weight)
    actual = compare_with(other, models, tmp_path, batches, on_progress=seen.append)
    assert actual.first_wrong is not None
    assert actual.first_wrong[0] == module
    assert quotes(actual.sentence(), module, actual.first_wrong[1].tensor)
    assert untouched <= {row.module for row in actual.modules if row.worst.relative == 0}
    assert seen == [1, 1]
    assert actual.to_dict()["first_wrong"] == module


def test_layer_tolerance_depends_on_precision_or_option(models: Path, batches: list[Batch], tmp_path: Path) -> None:
    graph = onnx.load(models / "drn.onnx")
    other = with_changed_weights(graph, lambda values: values * 1.01, "fcos.head.mix_fc.weight")
    int8 = dataclasses.replace(read_manifest(graph), precision="int8")
    onnx.helper.set_model_props(other, {METADATA_KEY: int8.to_json()})
    assert compare_with(other, models, tmp_path, batches[:1]).first_wrong is None
    assert compare_with(other, models, tmp_path, batches[:1], tolerance=1e-3).first_wrong is not None


def test_overflow_is_wrong_at_any_tolerance(models: Path, batches: list[Batch], tmp_path: Path) -> None:
    other = with_changed_weights(onnx.load(models / "drn.onnx"), lambda values: values * np.inf, "prop_fc.bias")
    actual = compare_with(other, models, tmp_path, batches, tolerance=100)
    assert actual.first_wrong is not None
    assert actual.first_wrong[0] == "prop_fc"
    json.dumps(actual.to_dict(), allow_nan=False)


def test_tensors_missing_in_other_model_are_counted(models: Path, batches: list[Batch], tmp_path: Path) -> None:
    other = onnx.load(models / "drn.onnx")
    renamed = next(node for node in other.graph.node if node.name == "fpn.inner_blocks.0/Conv")
    for node in other.graph.node:
        node.input[:] = ["fused" if name == renamed.output[0] else name for name in node.input]
    renamed.output[0] = "fused"
    actual = compare_with(other, models, tmp_path, batches)
    assert (actual.unmatched, actual.first_wrong) == (1, None)
