"""`export.build_engine --target openvino`: INT8 convolutions of weights that saturate on no CPU."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from calib.qdq_quantizer import MAX_EXACT_WEIGHT
from export.build_engine import build_engine
from export.verify import verify
from runtime import Grounder
from runtime.core.errors import DeviceError, GroundingError
from tests.raising import raises

installed = pytest.mark.skipif(importlib.util.find_spec("openvino") is None, reason="OpenVINO is not installed")
# In 8 bits a network this small has a larger accuracy drop than a real one.
LOOSE = 100.0


def weights(path: Path) -> list[np.ndarray]:
    tensors = (numpy_helper.to_array(tensor) for tensor in onnx.load(path).graph.initializer)
    return [values for values in tensors if values.dtype == np.int8 and values.ndim > 1]


@installed
def test_int8_build_has_convolutions_within_the_exact_limit(model: Path, planted: Path, table: Path) -> None:
    output = build_engine(
        model, precision="int8", target="openvino", data=planted, table=table, max_drop=LOOSE, threads=1
    )
    assert output == model.with_name("drn.int8.openvino.onnx")
    assert {values.ndim for values in weights(output)} >= {4}
    assert max(np.abs(values).max() for values in weights(output)) == MAX_EXACT_WEIGHT
    grounder = Grounder.load(output)
    assert (grounder.manifest.library, grounder.manifest.precision) == ("openvino", "int8")
    report = json.loads(model.with_name("drn.int8.openvino.parity.json").read_text())
    assert report["recall"]


@installed
def test_split_build_runs_in_openvino(model: Path, planted: Path, table: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from runtime.backends import openvino_session

    sources: list[Any] = []
    compiled = openvino_session.OpenVinoSession.__init__

    def counting(self: Any, source: Any, threads: int | None = None) -> None:
        sources.append(source)
        compiled(self, source, threads)

    monkeypatch.setattr(openvino_session.OpenVinoSession, "__init__", counting)
    query = build_engine(
        model, precision="int8", target="openvino", data=planted, table=table, max_drop=LOOSE, split=True, threads=1
    )
    # The parity check compiles both parts from memory.
    assert [type(source) for source in sources] == [bytes, bytes]
    assert query.name == "drn.int8.openvino.query.onnx"
    pair = Grounder.load(query)
    assert pair.is_pair
    assert [Path(source).name for source in sources[2:]] == [query.name, "drn.int8.openvino.video.onnx"]
    verify(query.with_name("drn.int8.openvino.onnx"), query, data=planted, max_drop=LOOSE)


@installed
def test_fp32_build_needs_no_data_and_fuses_padding(model: Path) -> None:
    output = build_engine(model, precision="fp32", target="openvino")
    assert output.name == "drn.fp32.openvino.onnx"
    assert Grounder.load(output).manifest.library == "openvino"
    assert not any(node.op_type == "Pad" for node in onnx.load(output).graph.node)


def test_build_without_the_library_is_rejected_before_any_work(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    with raises(DeviceError, "missing_library", "[openvino]"):
        build_engine(model, precision="fp32", target="openvino")


@installed
@pytest.mark.parametrize(
    ("options", "code", "values"),
    [
        ({"target": "openvino", "precision": "fp16"}, "precision_unsupported", ("fp16", "openvino")),
        ({"target": "openvino", "precision": "fp32", "workspace": 1.0}, "inapplicable_option", ("--workspace",)),
        ({"target": "openvino", "precision": "fp32", "tf32": True}, "inapplicable_option", ("--tf32",)),
    ],
)
def test_options_that_do_not_fit_the_target_are_rejected(
    model: Path, planted: Path, options: dict[str, Any], code: str, values: tuple[str, ...]
) -> None:
    with raises(GroundingError, code, *values):
        build_engine(model, data=planted, **options)
