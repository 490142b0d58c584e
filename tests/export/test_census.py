"""`export.census`: precision is counted, and what is called by another name is found out."""

from __future__ import annotations

import json

import onnx
import pytest

from export.census import Census, EngineCensus, census, check, check_engine, engine_census
from export.precision import to_half
from runtime.errors import ModelFileError, PromiseBroken
from tests.export.conftest import TINY

# As TensorRT 8.6 and 10 write them: format and type in one text.
TOGETHER = {
    "Layers": [
        {
            "Name": "prop_fc.conv/Conv",
            "LayerType": "CaskConvolution",
            "Inputs": [{"Name": "a", "Dimensions": [1, 4096, 1, 32], "Format/Datatype": "Channel major INT8 format"}],
            "Outputs": [
                {"Name": "b", "Dimensions": [1, 4096, 1, 32], "Format/Datatype": "Row major linear FP16 format"}
            ],
        },
        {
            "Name": "fcos.head/Exp",
            "LayerType": "PointWise",
            "Inputs": [{"Name": "c", "Format/Datatype": "Row major linear FP32"}],
            "Outputs": [{"Name": "d", "Format/Datatype": "Row major linear FP32"}],
        },
        {
            "Name": "query_encoder/Range",
            "LayerType": "Shuffle",
            "Inputs": [],
            "Outputs": [{"Name": "e", "Format/Datatype": "Row major Int32 format"}],
        },
    ],
    "Bindings": ["query_tokens"],
}
# As TensorRT 11 does: apart.
APART = {
    "Layers": [
        {
            "Name": "prop_fc.conv/Conv",
            "Inputs": [{"Name": "a", "Format": "N/A", "DataType": "Int8"}],
            "Outputs": [{"Name": "b", "Format": "Row major linear", "DataType": "Half"}],
        },
        {
            "Name": "fcos.head/Exp",
            "Inputs": [{"Name": "c", "Format": "Row major linear", "DataType": "Float"}],
            "Outputs": [{"Name": "d", "Format": "Row major linear", "DataType": "Float"}],
        },
        {"Name": "n", "Inputs": [], "Outputs": [{"Name": "e", "Format": "Row major", "DataType": "BFloat16"}]},
        {"Name": "m", "Inputs": [], "Outputs": [{"Name": "f", "Format": "Row major", "DataType": "FP8"}]},
    ],
    "I/O Tensors": [],
}


def test_multiply_adds_by_hand(exported: dict[str, onnx.ModelProto]) -> None:
    counted = census(exported["tiny"], query_length=8)
    segments, width, channels = TINY.num_segments, TINY.fpn_dim, TINY.feature_dim
    assert counted.macs["prop_fc"] == {"fp32": segments * channels * channels}
    assert counted.macs["backbone_net.layers.1"] == {"fp32": segments // 2 * 512 * 256 * 3}
    hidden, words = TINY.hidden_dim, TINY.embed_dim
    assert counted.macs["query_encoder.biLSTM"] == {"fp32": 2 * 8 * 4 * hidden * (words + hidden)}
    # Three levels, with one position between neighbours.
    locations = TINY.num_locations + 2
    assert counted.macs["fcos.head.mix_fc"] == {"fp32": locations * width * 2 * width}
    assert counted.share("fp32") == 1
    assert counted.precision() == "fp32"


def test_weights_are_counted_by_type(exported: dict[str, onnx.ModelProto]) -> None:
    whole, half = census(exported["tiny"]).weight_bytes, census(to_half(exported["tiny"])).weight_bytes
    assert set(whole) == {"fp32"}
    assert half["fp16"] == pytest.approx(whole["fp32"] / 2, rel=0.01)


def test_a_graph_is_held_to_its_name(exported: dict[str, onnx.ModelProto]) -> None:
    half = census(to_half(exported["tiny"]))
    check(half, "fp16")
    check(census(exported["tiny"]), "fp32")
    with pytest.raises(PromiseBroken, match=r"fp16 was asked for, and 0\.0 %"):
        check(census(exported["tiny"]), "fp16")
    mixed = census(to_half(exported["tiny"], keep=["fpn", "backbone_net.layers.2"]))
    assert 0 < mixed.share("fp32") < 1
    with pytest.raises(PromiseBroken, match=r"% of the multiply-adds"):
        check(mixed, "fp16")
    with pytest.raises(PromiseBroken):
        check(half, "int8")


def test_both_dialects_of_the_inspector_are_read() -> None:
    together, apart = engine_census(json.dumps(TOGETHER), 7), engine_census(json.dumps(APART))
    assert together == EngineCensus({"fp16": 1, "fp32": 1}, {"int8": 1, "fp32": 1}, 7)
    assert apart == EngineCensus({"fp16": 1, "fp32": 1, "bf16": 1, "fp8": 1}, {"int8": 1, "fp32": 1}, 0)


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"Layers": ["only", "names"]}'])
def test_what_tells_no_types_is_refused(text: str) -> None:
    with pytest.raises(ModelFileError):
        engine_census(text)


def test_an_engine_is_held_to_its_name() -> None:
    weights = 200_000_000
    check_engine(EngineCensus({"fp16": 9, "fp32": 1}, {"int8": 5}, 60_000_000), "int8", weights)
    check_engine(EngineCensus({"fp16": 9}, {}, 105_000_000), "fp16", weights)
    # Kernels weigh something too, and more than a small network.
    check_engine(EngineCensus({"fp16": 9}, {}, 21_500_000), "fp16", 10_000)
    with pytest.raises(PromiseBroken, match="no layer of the engine is in it"):
        check_engine(EngineCensus({"fp32": 9}, {"fp32": 9}, 105_000_000), "fp16", weights)
    with pytest.raises(PromiseBroken, match="held in a wider type"):
        check_engine(EngineCensus({"fp16": 9}, {}, 208_000_000), "fp16", weights)


def test_shares_add_up() -> None:
    counted = Census({"a": {"fp16": 3, "int8": 5}, "b": {"int8": 2}}, {})
    assert counted.total() == {"fp16": 3, "int8": 7}
    assert counted.share("int8") == 0.7
    assert counted.share("fp32") == 0
    assert counted.precision() == "int8"
