"""Test a network of 128 segments: training, graph, split model, INT8 and engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from calib.calibration_table import CalibrationTable
from calib.graph.half_precision import convert_to_half
from calib.graph.onnx_graph import load_fp32_graph
from calib.qdq_quantizer import insert_qdq
from export.build_engine import build_engine
from export.to_onnx import to_onnx
from runtime import Grounder
from runtime.datasets.dataset import DataSet
from runtime.grounding.evaluation import run_heads
from tests import tolerances
from tests.export.rtx import build_with_rtx
from tests.parity.models import parity
from train.__main__ import train
from train.checkpoints import load_checkpoint

SIZES: dict[str, Any] = {"embed_dim": 8, "hidden_dim": 8, "fpn_dim": 16, "batch_size": 16, "iou_target": "all"}


@pytest.fixture(scope="module")
def trained(planted: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the directory of a network of 128 segments, trained and exported, unsplit and split."""
    directory = tmp_path_factory.mktemp("t128")
    rates = {"epochs": (1, 1, 1), "lr": (3e-3, 1e-3, 1e-4)}
    train(planted, directory, num_segments=128, validate_on="none", device="cpu", **rates, **SIZES)
    to_onnx(directory / "drn.pt", directory / "drn.onnx", split=True, max_query_length=16)
    return directory


def test_graph_and_split_pair_equal_the_checkpoint(trained: Path, planted: Path) -> None:
    config = load_checkpoint(trained / "drn.pt").config
    for name in ("drn.onnx", "drn.query.onnx"):
        actual = parity(trained / "drn.pt", trained / name, planted)
        for head, error in actual.heads.items():
            assert error.max <= tolerances.EXPORTED * max(error.largest, 1), (name, head)
        assert actual.order.five == 1, name
    grounder = Grounder.load(trained / "drn.onnx")
    data_set = DataSet(planted)
    _, heads = next(run_heads(grounder, data_set, data_set.annotations("test")))
    assert heads.matching_logits.shape[1] == grounder.manifest.decoding.num_locations == config.num_segments * 7 // 4


def test_moments_are_in_video_seconds_for_any_segment_count(trained: Path, planted: Path) -> None:
    grounder, data_set = Grounder.load(trained / "drn.onnx"), DataSet(planted)
    annotation = data_set.annotations("test")[0]
    video = data_set.video(annotation.video)
    segments = grounder.segments(video)
    assert len(segments.spans) == grounder.manifest.decoding.num_segments
    np.testing.assert_allclose(np.diff(segments.spans).ravel(), 1 / len(segments.spans), atol=2 / video.num_frames)
    for moment in grounder.ground(video, annotation.sentence):
        assert 0 <= moment.start <= moment.end <= video.duration


@pytest.mark.rtx
def test_int8_calibrates_and_builds_for_other_segment_counts(trained: Path, planted: Path) -> None:
    output = build_engine(
        trained / "drn.onnx", precision="int8", target="onnxruntime", data=planted, max_drop=60.0, calib_samples=64,
        calib_method="minmax", query_length=(1, 8, 12), threads=1,
    )  # fmt: skip
    assert Grounder.load(output).manifest.precision == "int8"
    # TensorRT does not read the unsigned activations of the graph for a CPU.
    table = CalibrationTable.load(output.with_name("drn.int8.calibration.json"))
    graph = convert_to_half(insert_qdq(load_fp32_graph(trained / "drn.onnx"), table, opset=19))
    assert build_with_rtx(graph, query_length=(1, 8, 12))
