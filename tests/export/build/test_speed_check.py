"""Test the speed check of builds, and the choice of the fastest precision."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx
import pytest

from calib.calibration_table import CalibrationTable
from export.build import speed_check
from export.build.build_config import BuildConfig, BuildRequest
from export.build_engine import build_engine
from export.engine.builder import BuildOptions
from runtime.benchmarking.timing import Ratio
from runtime.core.errors import CheckFailed, DeviceError, GroundingError
from runtime.grounding.grounder import Grounder
from tests.raising import raises

# The fixture `no_speed_checks` replaces it during the tests.
MEASURE_SPEED: Callable[..., speed_check.SpeedCheck] = speed_check.measure_speed
LOOSE = 200.0


def _ratio(low: float, high: float) -> Ratio:
    return Ratio((low + high) / 2, low, high, 100)


def _check(single: tuple[float, float], batched: tuple[float, float]) -> speed_check.SpeedCheck:
    return speed_check.SpeedCheck("b.onnx", "a.onnx", 1.05, _ratio(*single), _ratio(*batched), "a CPU")


@pytest.mark.parametrize(
    ("single", "batched", "verdict"),
    [
        ((1.06, 1.1), (0.5, 0.6), "faster"),
        ((0.5, 0.6), (1.05, 1.1), "faster"),
        ((0.9, 1.04), (0.9, 1.04), "not faster"),
        ((0.9, 1.06), (0.9, 1.04), "not proven"),
        ((0.9, 1.04), (1.04, 2.0), "not proven"),
    ],
)
def test_verdict_depends_on_the_intervals_of_both_ratios(
    single: tuple[float, float], batched: tuple[float, float], verdict: str
) -> None:
    assert _check(single, batched).verdict == verdict


def test_sentence_of_a_missing_measurement_has_its_reason() -> None:
    check = speed_check.SpeedCheck("b.onnx", "", 1.05, reason="This machine cannot run the engine.")
    assert check.verdict == "not measured"
    assert check.reason in check.sentence()


def test_measured_ratio_is_relative_to_reference(model: Path, planted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed_check, "time_interleaved", lambda calls, *_: [[0.3] * 20, [0.1] * 20])
    check = MEASURE_SPEED(("a.onnx", "b.onnx"), lambda: [Grounder.load(model, "cpu", 1)] * 2, 1.05, planted)
    assert check.single is not None
    assert (check.verdict, round(check.single.median, 6)) == ("faster", 3.0)
    assert "3.00" in check.sentence()


def test_measurement_runs_one_query_and_a_batch(model: Path, planted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []

    def time_once(calls: list[Any], *_: object) -> list[list[float]]:
        sizes.extend(len(call.prepare(0)) for call in calls)
        return [[call.seconds(0)] * 3 for call in calls]

    monkeypatch.setattr(speed_check, "time_interleaved", time_once)
    check = MEASURE_SPEED(("a.onnx", "b.onnx"), lambda: [Grounder.load(model, "cpu", 1)] * 2, 1.05, None)
    assert sizes == [1, 1, speed_check.BATCH, speed_check.BATCH]
    assert check.single is not None


def test_model_that_cannot_be_opened_is_not_measured() -> None:
    def fail() -> list[Grounder]:
        raise DeviceError("no kernel for this GPU")

    check = MEASURE_SPEED(("a.onnx", "b.onnx"), fail, 1.05, None)
    assert (check.verdict, check.reason) == ("not measured", "no kernel for this GPU")


@pytest.mark.parametrize("split", [False, True])
def test_slower_int8_model_is_written_and_the_build_fails(
    model: Path, planted: Path, table: Path, monkeypatch: pytest.MonkeyPatch, split: bool
) -> None:
    def slower(names: tuple[str, str], open_models: Any, *_: object) -> speed_check.SpeedCheck:
        reference, built = open_models()
        assert reference.is_pair is built.is_pair is split
        assert (reference.manifest.precision, built.manifest.precision) == ("fp32", "int8")
        return _check((0.8, 0.9), (0.8, 0.9))

    monkeypatch.setattr(speed_check, "measure_speed", slower)
    calibration: dict[str, Any] = {"table": table} if split else {"calib_samples": 64, "calib_method": "minmax"}
    with raises(CheckFailed, "not_faster", "0.85", "a.onnx"):
        build_engine(
            model, precision="int8", target="onnxruntime", data=planted, limit=9, max_drop=LOOSE, threads=1,
            split=split, **calibration,
        )  # fmt: skip
    name = "drn.int8.query.onnx" if split else "drn.int8.onnx"
    assert Grounder.load(model.with_name(name)).manifest.precision == "int8"
    report = json.loads(model.with_name("drn.int8.parity.json").read_text())
    assert report["speed"]["verdict"] == "not faster"
    page = model.with_name("drn.int8.passport.html").read_text()
    assert report["speed"]["sentence"] in page
    assert '<th scope="row">one query</th><td>0.85</td><td>0.80</td><td>0.90</td>' in page
    used = table if split else model.with_name("drn.int8.calibration.json")
    coverage = CalibrationTable.load(used).coverage
    assert f"{coverage['sentences']} queries of {coverage['videos']} videos" in page
    first = coverage["axes"]["query tokens"][0]
    assert f"<td>{first['samples']}</td><td>{first['of']}</td>" in page
    assert "rejected</em>" not in page


@pytest.mark.parametrize(
    ("precision", "given", "required"),
    [("int8", None, 1.05), ("fp8", None, 1.05), ("fp16", None, 0), ("fp16", 1.2, 1.2), ("int8", 0.0, 0)],
)
def test_required_speed_has_default_for_8_bits(precision: Any, given: float | None, required: float) -> None:
    assert BuildRequest(Path("drn.onnx"), precision, min_speedup=given).required_speed == required


@pytest.mark.parametrize(
    ("options", "code", "values"),
    [
        ({"min_speedup": -1.0}, "invalid_option", ("--min-speedup", -1.0)),
        ({"min_speedup": math.nan}, "invalid_option", ("--min-speedup", math.nan)),
    ],
)
def test_invalid_options_are_rejected(
    model: Path, options: dict[str, Any], code: str, values: tuple[object, ...]
) -> None:
    with raises(GroundingError, code, *values):
        build_engine(model, **{"target": "onnxruntime", **options})


@pytest.mark.parametrize(("runs_here", "quoted"), [(False, "cannot run"), (True, "drn.fp16.engine")])
def test_engine_without_gpu_or_fp16_engine_is_not_measured(
    model: Path, monkeypatch: pytest.MonkeyPatch, runs_here: bool, quoted: str
) -> None:
    monkeypatch.setattr(speed_check, "runs_here", lambda options: runs_here)
    converted: Any = SimpleNamespace(manifest=Grounder.load(model).manifest)
    job = BuildConfig(model, "int8", "tensorrt", None, None)
    options = BuildOptions(target="tensorrt", precision="int8", profiles=())
    request = BuildRequest(model, "int8", "tensorrt")
    check = speed_check.check_speed(request, job, "drn.int8.engine", options, (model, onnx.load(model)), converted)
    assert check is not None
    assert check.verdict == "not measured"
    assert quoted in check.reason
