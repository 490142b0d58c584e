"""Test `runtime.benchmarking.report`: shares, tables and sentences of a report with known values."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from runtime.benchmarking.report import (
    BATCH_SIZE,
    Agreement,
    BenchmarkCase,
    Phases,
    Report,
    Timing,
    environment_line,
    latency_table,
    read_report,
)
from runtime.benchmarking.timing import Latency
from runtime.core.errors import ModelFileError
from runtime.core.moments import Moment
from tests.raising import raises
from tests.runtime.benchmarking.conftest import FAST, SLOW, model_info


def test_overhead_share_counts_video_encoding_once() -> None:
    phases = Phases("a", 1, 1, 5, {"tokenise": 1.0, "segment": 4.0, "encode": 6.0, "network": 9.0})
    assert phases.overhead_share(known=False) == pytest.approx(5 / 20)
    assert phases.overhead_share(known=True) == pytest.approx(1 / 10)


def test_throughput_includes_the_slowest_calls() -> None:
    case = BenchmarkCase(BATCH_SIZE, "network", "host", 8, 8)
    assert Timing(case, "a", Latency.from_samples([0.001] * 9 + [0.091])).queries_per_s == pytest.approx(800)


def test_table_lists_ratios_failures_and_unsettled_cases(report: Report) -> None:
    text = report.text()
    assert "2.50 (2.40 to 2.60)" in text
    assert "not measured: It takes 1." in text
    assert text.count("network *") == 1
    assert "and slow.onnx return different moments" in text
    assert "SM clock 1200.0 of 1980.0 MHz" in text
    assert "throttled by heat (software)" in text
    assert "Note: A note." in text
    assert "1 thread, numpy 2.4, 2026-11-23" in text


def test_agreement_sentence_reports_equal_models() -> None:
    same = Agreement("b", 3, 1.0, 0.999, 0.001, 0, 0.05)
    assert same.sentence("a").startswith("b and a return the same moments (3 queries")


def test_environment_line_names_gpu_only_if_used(report: Report) -> None:
    assert "H100" not in environment_line(report.to_dict())
    used = dataclasses.replace(report, models=[model_info("slow.onnx", SLOW, "cuda")])
    assert environment_line(used.to_dict()).startswith("H100, EPYC, 2 cores")


def test_latency_table_lists_only_rows_of_its_model(report: Report, tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    path.write_text(json.dumps(report.to_dict(), allow_nan=False))
    header, rows = latency_table(read_report(path), FAST)
    assert header[0] == "Milliseconds: EPYC, 2 cores, 1 thread, numpy 2.4, 2026-11-23."
    assert rows == [("host: network", "4.00", "4.00", "4.00", "-", "4.00", "20", "250.0")]
    assert len(header) == len(rows[0])
    header, rows = latency_table({**read_report(path), "interrupted": True}, SLOW)
    assert header[0].endswith("Ended early.")
    assert [row[0] for row in rows] == ["host: network", "host: network, batch size 2"]


def test_latency_table_of_another_model_is_rejected(report: Report) -> None:
    with raises(ModelFileError, "report_of_another_model", "slow.onnx", "fast.onnx"):
        latency_table(report.to_dict(), "0" * 64)
    nothing = dataclasses.replace(report, timings=[])
    with raises(ModelFileError, "report_of_another_model"):
        latency_table(nothing.to_dict(), FAST)


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("[]", "unknown_format"),
        ('{"format": "drn-parity/1"}', "unknown_format"),
        ('{"format": "drn-benchmark/1"}', "damaged_file"),
        ("{", "invalid_json"),
        (None, "missing_file"),
    ],
)
def test_invalid_report_file_is_rejected(tmp_path: Path, text: str | None, code: str) -> None:
    path = tmp_path / "r.json"
    if text is not None:
        path.write_text(text)
    with raises(ModelFileError, code, path):
        read_report(path)


def test_report_with_damaged_timing_is_rejected(report: Report, tmp_path: Path) -> None:
    content = report.to_dict()
    del content["timings"][0]["latency"]["p50_ms"]
    (tmp_path / "r.json").write_text(json.dumps(content))
    with raises(ModelFileError, "damaged_file", tmp_path / "r.json", "'p50_ms'"):
        read_report(tmp_path / "r.json")


def test_agreement_compares_best_moments_only() -> None:
    def moment(start: float, end: float) -> list[Moment]:
        return [Moment(start, end, 0.9), Moment(0, 100, 0.5)]

    result = Agreement.from_moments(
        "b", [moment(0, 10), moment(5, 10), [], []], [moment(0, 10.04), moment(0, 10), moment(1, 2), []]
    )
    assert result.queries == 4
    assert result.different == 2
    assert result.iou_min == pytest.approx(0.5)
    assert result.shift_max_s == 5
    assert result.iou_mean == pytest.approx((0.5 + 10 / 10.04) / 2)
