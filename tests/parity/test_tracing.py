"""The first error: what tracing and folding cost. `.pt` in torch against `.onnx` in ONNX Runtime, both FP32."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from export.parity.parity_result import AccuracyBudget, violations
from tests import tolerances
from tests.parity.models import parity


@pytest.mark.parametrize("protocol", ["mmaction2", "drn"])
@pytest.mark.parametrize("split", ["train", "test"])
def test_graph_equals_the_checkpoint(models: Path, planted: Path, split: str, protocol: str) -> None:
    found = parity(models / "drn.pt", models / "drn.onnx", planted, split, protocol=protocol)
    for name, error in found.heads.items():
        assert error.max <= tolerances.EXPORTED * max(error.largest, 1), name
        assert error.not_finite == 0
    assert found.boundaries.max < tolerances.EXPORTED_SECONDS
    assert found.other.values == pytest.approx(found.reference.values, abs=1e-6)
    assert all(flips.gained == flips.lost == () for flips in found.flips.values())
    assert found.order.five == 1
    assert violations(found, AccuracyBudget(max_drop=0, boundary_p99=tolerances.EXPORTED_SECONDS)) == []


def test_test_network_recall_is_neither_zero_nor_full(models: Path, planted: Path) -> None:
    # Else nothing could be lost, and the test above would hold for any two.
    found = parity(models / "drn.pt", models / "drn.onnx", planted, "train")
    assert 0.1 < found.reference.values["R@1 IoU=0.5"] < 0.9
    assert found.reference.values["mIoU"] > found.prior.values["mIoU"]


@pytest.mark.parametrize("weight", ["fpn.inner_blocks.1.weight", "fcos.head.iou_scores.1.weight"])
def test_one_changed_weight_breaks_parity(models: Path, planted: Path, tmp_path: Path, weight: str) -> None:
    model = onnx.load(models / "drn.onnx")
    tensor = next(tensor for tensor in model.graph.initializer if tensor.name == weight)
    values = onnx.numpy_helper.to_array(tensor).copy()
    values.flat[np.abs(values).argmax()] *= -1
    tensor.CopyFrom(onnx.numpy_helper.from_array(values, weight))
    onnx.save(model, tmp_path / "wrong.onnx")
    found = parity(models / "drn.pt", tmp_path / "wrong.onnx", planted)
    assert any(error.max > 10 * tolerances.EXPORTED for error in found.heads.values())
