"""Test the error of tracing: the checkpoint in torch against the FP32 graph in ONNX Runtime."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from export.parity.parity_result import AccuracyBudget, violations
from tests import tolerances
from tests.parity.models import parity


@pytest.mark.parametrize(("split", "protocol"), [("train", "mmaction2"), ("test", "drn")])
def test_graph_equals_the_checkpoint(models: Path, planted: Path, split: str, protocol: str) -> None:
    actual = parity(models / "drn.pt", models / "drn.onnx", planted, split, protocol=protocol)
    for name, error in actual.heads.items():
        assert error.max <= tolerances.EXPORTED * max(error.largest, 1), name
        assert error.not_finite == 0
    assert actual.boundaries.max < tolerances.EXPORTED_SECONDS
    assert actual.other.values == pytest.approx(actual.reference.values, abs=1e-6)
    assert all(flips.gained == flips.lost == () for flips in actual.flips.values())
    assert actual.order.five == 1
    assert violations(actual, AccuracyBudget(max_drop=0, boundary_p99=tolerances.EXPORTED_SECONDS)) == []
    if split == "train":
        # A comparison without right or without wrong answers would prove nothing.
        assert 0.1 < actual.reference.values["R@1 IoU=0.5"] < 0.9
        assert actual.reference.values["mIoU"] > actual.prior.values["mIoU"]


@pytest.mark.parametrize("weight", ["fpn.inner_blocks.1.weight", "fcos.head.iou_scores.1.weight"])
def test_one_changed_weight_breaks_parity(models: Path, planted: Path, tmp_path: Path, weight: str) -> None:
    model = onnx.load(models / "drn.onnx")
    tensor = next(tensor for tensor in model.graph.initializer if tensor.name == weight)
    values = onnx.numpy_helper.to_array(tensor).copy()
    values.flat[np.abs(values).argmax()] *= -1
    tensor.CopyFrom(onnx.numpy_helper.from_array(values, weight))
    onnx.save(model, tmp_path / "wrong.onnx")
    actual = parity(models / "drn.pt", tmp_path / "wrong.onnx", planted)
    assert any(error.max > 10 * tolerances.EXPORTED for error in actual.heads.values())
