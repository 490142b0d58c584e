"""Test `calib.graph.precision_audit`: multiply-adds and bytes by data type, and the required share."""

from __future__ import annotations

import onnx
import pytest

from calib.graph.half_precision import convert_to_half
from calib.graph.precision_audit import PrecisionStats, audit_graph, require_precision
from runtime.core.errors import CheckFailed
from tests.export.conftest import TINY
from tests.raising import raises
from tests.train.training.narrow import NARROW


def test_audit_counts_expected_multiply_adds(exported: dict[str, onnx.ModelProto]) -> None:
    counted = audit_graph(exported["tiny"], query_length=8)
    segments, width, channels = TINY.num_segments, TINY.fpn_dim, TINY.feature_dim
    assert counted.macs["prop_fc"] == {"fp32": segments * channels * channels}
    assert counted.macs["backbone_net.layers.1"] == {"fp32": segments // 2 * NARROW[1] * NARROW[0] * 3}
    hidden, words = TINY.hidden_dim, TINY.embed_dim
    assert counted.macs["query_encoder.biLSTM"] == {"fp32": 2 * 8 * 4 * hidden * (words + hidden)}
    # Three levels, with one position between neighbours.
    locations = TINY.num_locations + 2
    assert counted.macs["fcos.head.mix_fc"] == {"fp32": locations * width * 2 * width}
    assert counted.share("fp32") == 1
    assert counted.precision() == "fp32"


def test_require_precision_checks_requested_type(exported: dict[str, onnx.ModelProto]) -> None:
    single, half = audit_graph(exported["tiny"]), audit_graph(convert_to_half(exported["tiny"]))
    assert set(single.weight_bytes) == {"fp32"}
    assert half.weight_bytes["fp16"] == pytest.approx(single.weight_bytes["fp32"] / 2, rel=0.01)
    require_precision(half, "fp16")
    require_precision(single, "fp32")
    with raises(CheckFailed, "precision_not_reached", "fp16", "0.0 %"):
        require_precision(single, "fp16")
    mixed = audit_graph(convert_to_half(exported["tiny"], keep=["fpn", "backbone_net.layers.2"]))
    assert 0 < mixed.share("fp32") < 1
    with raises(CheckFailed, "precision_not_reached", f"{100 * mixed.share('fp16'):.1f} %"):
        require_precision(mixed, "fp16")
    with raises(CheckFailed, "precision_not_reached", "int8", "0.0 %"):
        require_precision(half, "int8")


def test_require_precision_uses_attainable_share() -> None:
    counted = PrecisionStats({"a": {"int8": 51}, "b": {"fp32": 49}}, {})
    with raises(CheckFailed, "precision_not_reached", "51.0 %", "85 %"):
        require_precision(counted, "int8")
    assert require_precision(counted, "int8", attainable=0.512) == "int8 in 51.0 % of the multiply-adds"
    # Half of what a narrow network can have is required, so that restored modules do not reject it.
    assert require_precision(counted, "int8", attainable=0.84) == "int8 in 51.0 % of the multiply-adds"
    with raises(CheckFailed, "precision_not_reached", "20.0 %", "26 %"):
        require_precision(PrecisionStats({"a": {"int8": 20}, "b": {"fp32": 80}}, {}), "int8", attainable=0.52)
    # A network in which enough can be 8-bit is held to the usual share.
    with raises(CheckFailed, "precision_not_reached", "84.0 %", "85 %"):
        require_precision(PrecisionStats({"a": {"int8": 84}, "b": {"fp32": 16}}, {}), "int8", attainable=0.96)


def test_precision_stats_total_and_shares_are_correct() -> None:
    counted = PrecisionStats({"a": {"fp16": 3, "int8": 5}, "b": {"int8": 2}}, {})
    assert counted.total() == {"fp16": 3, "int8": 7}
    assert counted.share("int8") == 0.7
    assert counted.share("fp32") == 0
    assert counted.precision() == "int8"
