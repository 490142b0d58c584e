"""The second error: what narrower numbers cost. `.onnx` against its twins, all in ONNX Runtime on the CPU."""

from __future__ import annotations

import dataclasses
import importlib.util
from pathlib import Path

import onnx
import pytest

from export.parity.parity_result import AccuracyBudget, ParityResult, violations
from runtime import Grounder
from runtime.datasets.dataset import DataSet
from tests import tolerances
from tests.parity.models import parity, save_twin

# Until the module that makes a twin is there, its tests cannot run.
needs_half = pytest.mark.skipif(
    importlib.util.find_spec("calib.graph.half_precision") is None,
    reason="calib/graph/half_precision.py, which makes FP16, is missing",
)
needs_calib = pytest.mark.skipif(
    importlib.util.find_spec("calib.qdq_quantizer") is None,
    reason="calib/qdq_quantizer.py, which makes INT8, is missing",
)


@pytest.fixture(scope="module")
def half(models: Path) -> Path:
    from calib.graph.half_precision import convert_to_half

    twin = convert_to_half(onnx.load(models / "drn.onnx"), "fp16")
    return save_twin(twin, models / "drn.onnx", models / "drn.fp16.onnx", "fp16")


@pytest.fixture(scope="module")
def int8(models: Path, planted: Path) -> Path:
    from calib.calibrate import measure_table
    from calib.calibration_set import sample_calibration_set
    from calib.qdq_quantizer import insert_qdq

    source = models / "drn.onnx"
    model = onnx.load(source)
    drawn = sample_calibration_set(DataSet(planted), Grounder.load(source, "cpu", 1).manifest, samples=48, held_out=32)
    table = measure_table(model, drawn, "percentile")
    return save_twin(insert_qdq(model, table), source, models / "drn.int8.onnx", "int8")


@pytest.fixture(scope="module")
def halved(models: Path, half: Path, planted: Path) -> ParityResult:
    return parity(models / "drn.onnx", half, planted, "train")


@pytest.fixture(scope="module")
def quantised(models: Path, int8: Path, planted: Path) -> ParityResult:
    return parity(models / "drn.onnx", int8, planted, "train")


@needs_half
def test_fp16_heads_stay_within_tolerance(halved: ParityResult) -> None:
    for name, error in halved.heads.items():
        assert error.not_finite == 0
        assert error.max <= tolerances.HALF * error.largest, name


@needs_half
def test_fp16_boundaries_shift_less_than_a_tenth_second(halved: ParityResult) -> None:
    assert halved.locations.max < 0.1
    assert violations(halved, AccuracyBudget.of("fp16", max_drop=1.1)) == []


@needs_half
def test_fp16_heads_differ_from_fp32(halved: ParityResult) -> None:
    # Else the twin would be FP32 under another name.
    assert all(error.max > 1e-4 for error in halved.heads.values())


@needs_calib
def test_int8_heads_stay_within_tolerance(quantised: ParityResult) -> None:
    for name, error in quantised.heads.items():
        assert error.not_finite == 0
        assert error.p99 <= tolerances.INT8 * error.largest, name


@needs_calib
def test_int8_moments_mostly_agree_with_fp32(quantised: ParityResult) -> None:
    assert quantised.overlap.mean > 0.9
    assert abs(quantised.differences["mIoU"].mean) < 0.02
    assert all(len(flips.lost) <= 4 for flips in quantised.flips.values())


@needs_calib
def test_int8_error_exceeds_fp16_error(quantised: ParityResult, halved: ParityResult) -> None:
    for name, error in quantised.heads.items():
        assert error.p99 > halved.heads[name].p99, name


@needs_calib
def test_int8_with_too_small_ranges_violates_the_budget(models: Path, planted: Path, tmp_path: Path) -> None:
    from calib.calibrate import measure_table
    from calib.calibration_set import sample_calibration_set
    from calib.qdq_quantizer import insert_qdq

    source = models / "drn.onnx"
    model = onnx.load(source)
    drawn = sample_calibration_set(DataSet(planted), Grounder.load(source, "cpu", 1).manifest, samples=48, held_out=32)
    table = measure_table(model, drawn, "minmax")
    small = {
        name: dataclasses.replace(found, low=found.low / 16, high=found.high / 16)
        for name, found in table.ranges.items()
    }
    twin = insert_qdq(model, dataclasses.replace(table, ranges=small))
    wrong = parity(source, save_twin(twin, source, tmp_path / "wrong.onnx", "int8"), planted, "train")
    assert violations(wrong, AccuracyBudget.of("int8"))
    assert wrong.overlap.mean < 0.9
