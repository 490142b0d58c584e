"""`export.build_engine --target openvino`: INT8 convolutions of weights that saturate on no CPU."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from calib.calibrate import measure_table
from calib.calibration_set import sample_calibration_set
from calib.qdq_quantizer import MAX_EXACT_WEIGHT
from export.build import fastest_precision
from export.build.build_config import BuildRequest
from export.build.speed_check import SpeedCheck
from export.build_engine import build_engine
from export.verify import verify
from runtime import Grounder
from runtime.benchmarking.timing import Ratio
from runtime.core.errors import CheckFailed, DeviceError, GroundingError
from runtime.datasets.dataset import DataSet
from tests.raising import quotes, raises

installed = pytest.mark.skipif(importlib.util.find_spec("openvino") is None, reason="OpenVINO is not installed")
# In 8 bits a network this small has a larger accuracy drop than a real one.
LOOSE = 100.0


@pytest.fixture
def model(models: Path, tmp_path: Path) -> Path:
    return Path(shutil.copy(models / "drn.onnx", tmp_path))


@pytest.fixture
def table(model: Path, planted: Path, tmp_path: Path) -> Path:
    drawn = sample_calibration_set(DataSet(planted), Grounder.load(model).manifest, samples=48, held_out=16)
    measure_table(onnx.load(model), drawn, "minmax", threads=1).save(tmp_path / "table.json")
    return tmp_path / "table.json"


def weights(path: Path) -> list[np.ndarray]:
    tensors = (numpy_helper.to_array(tensor) for tensor in onnx.load(path).graph.initializer)
    return [values for values in tensors if values.dtype == np.int8 and values.ndim > 1]


@installed
def test_int8_build_is_a_graph_of_convolutions_within_the_exact_limit(model: Path, planted: Path, table: Path) -> None:
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
def test_split_build_is_checked_and_run_in_openvino(
    model: Path, planted: Path, table: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
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
def test_fp32_build_needs_no_data_and_keeps_padding_in_convolutions(model: Path) -> None:
    output = build_engine(model, precision="fp32", target="openvino")
    assert output.name == "drn.fp32.openvino.onnx"
    assert Grounder.load(output).manifest.library == "openvino"
    assert not any(node.op_type == "Pad" for node in onnx.load(output).graph.node)


@installed
@pytest.mark.parametrize("precision", ["fp16", "bf16", "fp8"])
def test_precision_that_openvino_computes_in_fp32_is_rejected(model: Path, precision: Any) -> None:
    with raises(DeviceError, "precision_unsupported", precision, "openvino"):
        build_engine(model, precision=precision, target="openvino")


def test_build_without_the_library_is_rejected_before_any_work(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    with raises(DeviceError, "missing_library", "[openvino]"):
        build_engine(model, precision="fp32", target="openvino")


@installed
def test_options_of_engines_are_rejected(model: Path) -> None:
    with raises(GroundingError, "inapplicable_option", "--workspace", "openvino"):
        build_engine(model, precision="fp32", target="openvino", workspace=1.0)


@pytest.fixture
def planned(monkeypatch: pytest.MonkeyPatch, model: Path) -> Callable[..., list[BuildRequest]]:
    """A function that replaces builds by outcomes, by library: speeds for one query and for a batch, or an error."""

    def plan(**outcomes: tuple[float, float] | CheckFailed) -> list[BuildRequest]:
        requests: list[BuildRequest] = []

        def run_with_speed(request: BuildRequest) -> tuple[Path, SpeedCheck]:
            requests.append(request)
            model.with_name("drn.int8.calibration.json").touch()
            outcome = outcomes[request.target]
            if isinstance(outcome, CheckFailed):
                raise outcome
            single, batched = (Ratio(value, value - 0.01, value + 0.01, 100) for value in outcome)
            path = model.with_name(f"{request.target}.onnx")
            return path, SpeedCheck(path.name, "drn.onnx", request.required_speed, single, batched, "a CPU")

        monkeypatch.setattr(fastest_precision, "run_with_speed", run_with_speed)
        return requests

    return plan


FAILED = CheckFailed("The accuracy check failed.", code="parity_failed")


@installed
@pytest.mark.parametrize(
    ("outcomes", "precision", "chosen"),
    [
        ({"onnxruntime": (1.4, 1.3), "openvino": (1.2, 1.8)}, "auto", "openvino.onnx"),
        ({"onnxruntime": (1.4, 1.9), "openvino": (1.2, 1.8)}, "auto", "onnxruntime.onnx"),
        ({"onnxruntime": FAILED, "openvino": (1.2, 1.8)}, "auto", "openvino.onnx"),
        ({"onnxruntime": (0.9, 0.8), "openvino": (0.9, 0.9)}, "auto", "drn.onnx"),
        ({"onnxruntime": (0.9, 0.8), "openvino": (0.9, 1.2)}, "int8", "openvino.onnx"),
        ({"onnxruntime": FAILED, "openvino": FAILED}, "auto", "drn.onnx"),
    ],
)
def test_target_cpu_is_the_fastest_accurate_model(
    model: Path, planted: Path, planned: Any, outcomes: dict[str, Any], precision: Any, chosen: str
) -> None:
    requests = planned(**outcomes)
    output = build_engine(model, precision=precision, target="cpu", data=planted)
    assert output.name == chosen
    assert [request.target for request in requests] == ["onnxruntime", "openvino"]
    # The second build reuses the ranges of the first.
    assert [request.table for request in requests] == [None, model.with_name("drn.int8.calibration.json")]


@installed
def test_target_cpu_fails_if_no_int8_model_is_accurate(model: Path, planted: Path, planned: Any) -> None:
    planned(onnxruntime=FAILED, openvino=FAILED)
    with raises(CheckFailed, "parity_failed"):
        build_engine(model, precision="int8", target="cpu", data=planted)


@installed
def test_target_cpu_fails_if_int8_is_slower_in_both_libraries(model: Path, planted: Path, planned: Any) -> None:
    planned(onnxruntime=(0.9, 0.8), openvino=(0.9, 0.9))
    with raises(CheckFailed, "not_faster", "openvino.onnx"):
        build_engine(model, precision="int8", target="cpu", data=planted)


@installed
@pytest.mark.parametrize("data", [None, True])
def test_accuracy_is_claimed_only_with_data(
    model: Path, planted: Path, planned: Any, table: Path, capsys: pytest.CaptureFixture[str], data: bool | None
) -> None:
    planned(onnxruntime=(1.4, 1.3), openvino=(1.2, 1.8))
    build_engine(model, precision="int8", target="cpu", table=table, data=planted if data else None)
    assert ("--max-drop" in capsys.readouterr().out) == bool(data)


@pytest.mark.parametrize(
    ("options", "error", "code", "values"),
    [
        ({"precision": "int8", "min_speedup": 0}, GroundingError, "inapplicable_option", ("--min-speedup",)),
        ({"precision": "fp16"}, DeviceError, "precision_unsupported", ("fp16", "cpu")),
        ({"precision": "int8", "output": Path("a.onnx")}, GroundingError, "inapplicable_option", ("--output",)),
    ],
)
def test_options_that_do_not_fit_target_cpu_are_rejected(
    model: Path, planted: Path, options: dict[str, Any], error: type[GroundingError], code: str, values: Any
) -> None:
    with raises(error, code, *values):
        build_engine(model, target="cpu", data=planted, **options)


def test_target_cpu_without_openvino_says_so(
    model: Path, planted: Path, planned: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    planned(onnxruntime=(1.4, 1.3))
    assert build_engine(model, precision="int8", target="cpu", data=planted).name == "onnxruntime.onnx"
    assert quotes(caplog.text, "[openvino]")
