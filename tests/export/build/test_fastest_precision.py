"""Test `export.build.fastest_precision`: --precision auto and --target cpu choose the fastest accurate model."""

from __future__ import annotations

import importlib.util
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from export.build import fastest_precision
from export.build.build_config import BuildRequest
from export.build.speed_check import SpeedCheck
from export.build_engine import build_engine
from runtime.benchmarking.timing import Ratio
from runtime.core.errors import CheckFailed, GroundingError
from runtime.doctor import doctor
from tests.raising import quotes, raises, records

installed = pytest.mark.skipif(importlib.util.find_spec("openvino") is None, reason="OpenVINO is not installed")
FAILED = CheckFailed("The accuracy check failed.", code="parity_failed")

Outcome = tuple[float, float] | CheckFailed


@pytest.fixture
def planned(monkeypatch: pytest.MonkeyPatch, model: Path) -> Callable[..., list[BuildRequest]]:
    """A function that replaces builds by outcomes, by library: speeds for one query and for a batch, or an error."""

    def plan(outcomes: dict[str, Outcome]) -> list[BuildRequest]:
        requests: list[BuildRequest] = []

        def run_with_speed(request: BuildRequest) -> tuple[Path, SpeedCheck]:
            requests.append(request)
            model.with_name("drn.int8.calibration.json").touch()
            outcome = outcomes[request.target]
            if isinstance(outcome, CheckFailed):
                raise outcome
            single, batched = (Ratio(value, value - 0.2, value + 0.2, 100) for value in outcome)
            path = model.with_name(f"{request.target}.onnx")
            return path, SpeedCheck(path.name, "drn.onnx", request.required_speed, single, batched, "a CPU")

        monkeypatch.setattr(fastest_precision, "run_with_speed", run_with_speed)
        return requests

    return plan


@pytest.mark.parametrize(
    ("outcome", "chosen"),
    [
        ((1.4, 1.4), "onnxruntime.onnx"),
        # The intervals contain 1.
        ((1.1, 1.1), "drn.onnx"),
        ((0.5, 0.5), "drn.onnx"),
        (FAILED, "drn.onnx"),
    ],
)
def test_auto_precision_is_int8_only_if_accurate_and_faster(
    model: Path, planted: Path, planned: Any, capsys: pytest.CaptureFixture[str], outcome: Outcome, chosen: str
) -> None:
    requests = planned({"onnxruntime": outcome})
    output = build_engine(model, precision="auto", target="onnxruntime", data=planted)
    assert (output.name, [request.precision for request in requests]) == (chosen, ["int8"])
    assert capsys.readouterr().out.splitlines()[-1] == str(output)


@installed
@pytest.mark.parametrize(
    ("outcomes", "precision", "chosen"),
    [
        ({"onnxruntime": (1.4, 1.3), "openvino": (1.2, 1.8)}, "auto", "openvino.onnx"),
        ({"onnxruntime": (1.4, 1.9), "openvino": (1.2, 1.8)}, "auto", "onnxruntime.onnx"),
        ({"onnxruntime": FAILED, "openvino": (1.2, 1.8)}, "auto", "openvino.onnx"),
        ({"onnxruntime": (0.7, 0.7), "openvino": (0.7, 1.4)}, "int8", "openvino.onnx"),
        ({"onnxruntime": FAILED, "openvino": FAILED}, "auto", "drn.onnx"),
    ],
)
def test_target_cpu_is_the_fastest_accurate_model(
    model: Path, planted: Path, planned: Any, outcomes: dict[str, Outcome], precision: Any, chosen: str
) -> None:
    requests = planned(outcomes)
    output = build_engine(model, precision=precision, target="cpu", data=planted)
    assert output.name == chosen
    assert [request.target for request in requests] == ["onnxruntime", "openvino"]
    # The second build reuses the ranges of the first.
    assert [request.table for request in requests] == [None, model.with_name("drn.int8.calibration.json")]


@installed
@pytest.mark.parametrize(
    ("outcomes", "code"),
    [
        ({"onnxruntime": FAILED, "openvino": FAILED}, "parity_failed"),
        ({"onnxruntime": (0.7, 0.6), "openvino": (0.7, 0.7)}, "not_faster"),
    ],
)
def test_target_cpu_without_accurate_faster_int8_fails(
    model: Path, planted: Path, planned: Any, outcomes: dict[str, Outcome], code: str
) -> None:
    planned(outcomes)
    with raises(CheckFailed, code):
        build_engine(model, precision="int8", target="cpu", data=planted)


@pytest.mark.parametrize("has_data", [False, True])
def test_accuracy_is_claimed_only_with_data(
    model: Path, planted: Path, planned: Any, table: Path, capsys: pytest.CaptureFixture[str], has_data: bool
) -> None:
    planned(dict.fromkeys(("onnxruntime", "openvino"), (1.4, 1.3)))
    build_engine(model, precision="int8", target="cpu", table=table, data=planted if has_data else None)
    assert ("--max-drop" in capsys.readouterr().out) == has_data


@pytest.mark.parametrize("reason", ["No module named 'libopenvino'", "libopenvino.so: cannot open shared object file"])
def test_target_cpu_names_why_openvino_is_not_compared(
    model: Path,
    planted: Path,
    planned: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    reason: str,
) -> None:
    error = "ModuleNotFoundError" if reason.startswith("No module") else "OSError"
    (tmp_path / "openvino").mkdir()
    (tmp_path / "openvino" / "__init__.py").write_text(f"raise {error}({reason!r})")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "openvino", raising=False)
    requests = planned({"onnxruntime": (1.4, 1.3)})
    assert build_engine(model, precision="int8", target="cpu", data=planted).name == "onnxruntime.onnx"
    assert [request.target for request in requests] == ["onnxruntime"]
    assert records(caplog, logging.WARNING, reason, "[openvino]")
    # `drn doctor` judges the same import.
    (finding,) = (finding for finding in doctor() if "OpenVINO" in finding.subject)
    assert not finding.works
    assert quotes(finding.details, reason)


@pytest.mark.parametrize(
    ("options", "code", "values"),
    [
        ({"precision": "int8", "min_speedup": 0}, "inapplicable_option", ("--min-speedup",)),
        ({"precision": "fp16"}, "precision_unsupported", ("fp16", "cpu")),
        ({"precision": "int8", "output": Path("a.onnx")}, "inapplicable_option", ("--output",)),
    ],
)
def test_options_that_do_not_fit_target_cpu_are_rejected(
    model: Path, planted: Path, options: dict[str, Any], code: str, values: tuple[str, ...]
) -> None:
    with raises(GroundingError, code, *values):
        build_engine(model, target="cpu", data=planted, **options)
