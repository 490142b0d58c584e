"""Test the error of lower precision: an FP32 graph against its FP16 and INT8 graphs, in ONNX Runtime on the CPU."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import onnx
import pytest

from calib.calibrate import measure_table
from calib.calibration_set import sample_calibration_set
from calib.calibration_table import CalibrationTable
from calib.graph.half_precision import convert_to_half
from calib.qdq_quantizer import insert_qdq
from export.parity.parity_result import AccuracyBudget, ParityResult, violations
from runtime import Grounder
from runtime.datasets.dataset import DataSet
from tests import tolerances
from tests.parity.models import parity, save_twin


@pytest.fixture(scope="module")
def table(models: Path, planted: Path) -> CalibrationTable:
    source = models / "drn.onnx"
    drawn = sample_calibration_set(DataSet(planted), Grounder.load(source, "cpu", 1).manifest, samples=48, held_out=32)
    return measure_table(onnx.load(source), drawn, "percentile")


@pytest.fixture(scope="module")
def fp16(models: Path, planted: Path) -> ParityResult:
    source = models / "drn.onnx"
    half = convert_to_half(onnx.load(source), "fp16")
    return parity(source, save_twin(half, source, models / "drn.fp16.onnx", "fp16"), planted, "train")


@pytest.fixture(scope="module")
def int8(models: Path, planted: Path, table: CalibrationTable) -> ParityResult:
    source = models / "drn.onnx"
    quantized = insert_qdq(onnx.load(source), table)
    return parity(source, save_twin(quantized, source, models / "drn.int8.onnx", "int8"), planted, "train")


def test_fp16_stays_within_tolerances(fp16: ParityResult) -> None:
    for name, error in fp16.heads.items():
        assert error.not_finite == 0
        # A graph that is still FP32 has smaller errors.
        assert 1e-4 < error.max <= tolerances.HALF * error.largest, name
    assert fp16.locations.max < 0.1
    assert violations(fp16, AccuracyBudget.of("fp16", max_drop=1.1)) == []


def test_int8_stays_within_tolerances(int8: ParityResult, fp16: ParityResult) -> None:
    for name, error in int8.heads.items():
        assert error.not_finite == 0
        assert fp16.heads[name].p99 < error.p99 <= tolerances.INT8 * error.largest, name
    assert int8.overlap.mean > 0.9
    assert abs(int8.differences["mIoU"].mean) < 0.02
    assert all(len(flips.lost) <= 4 for flips in int8.flips.values())


def test_int8_with_too_small_ranges_violates_the_budget(
    models: Path, planted: Path, table: CalibrationTable, tmp_path: Path
) -> None:
    source = models / "drn.onnx"
    small = {
        name: dataclasses.replace(actual, low=actual.low / 16, high=actual.high / 16)
        for name, actual in table.ranges.items()
    }
    quantized = insert_qdq(onnx.load(source), dataclasses.replace(table, ranges=small))
    wrong = parity(source, save_twin(quantized, source, tmp_path / "wrong.onnx", "int8"), planted, "train")
    assert violations(wrong, AccuracyBudget.of("int8"))
    assert wrong.overlap.mean < 0.9
