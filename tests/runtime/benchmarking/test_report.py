"""`runtime.benchmarking.report`: shares, tables and sentences of a report that is made by hand."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from runtime.benchmarking.report import (
    BATCH_SIZE,
    ONE_QUERY,
    Agreement,
    Case,
    Memory,
    Phases,
    Report,
    Subject,
    Timing,
    draw,
    latency_table,
    read_report,
    where_and_when,
)
from runtime.benchmarking.system_info import Conditions, Gpu
from runtime.benchmarking.timing import Latency, Ratio, WarmUp
from runtime.core.errors import ModelFileError

FAST, SLOW = "f" * 64, "5" * 64


def subject(label: str, sha256: str, device: str = "cpu") -> Subject:
    return Subject(label, sha256, {label: sha256}, "fp32", "whole", device, 0.5, 0.6, 1.5, Memory(2**20))


def timing(model: str, ms: float, size: int = 1, **others: Any) -> Timing:
    case = Case(ONE_QUERY if size == 1 else BATCH_SIZE, "network", "host", size, size)
    return Timing(case, model, Latency.of([ms / 1e3] * 20), **others)


@pytest.fixture
def report() -> Report:
    graphics = Gpu("H100", "575", 1200.0, 1980.0, 60.0, 300.0, 10.0, 100.0, ("heat (software)",))
    return Report(
        "2026-11-23",
        "python -m runtime.benchmark",
        {"cpu": "EPYC", "cores": 2, "gpu": "H100", "gpu_driver": "575"},
        {"numpy": "2.4"},
        {"samples": 20, "batch": 2, "device": "auto", "threads": 1},
        {"told": "Inputs are made up.", "made_up": True},
        [subject("slow.onnx", SLOW), subject("fast.onnx", FAST)],
        [Agreement("fast.onnx", 10, 0.9, 0.2, 3.5, 4, 0.05)],
        [
            timing("slow.onnx", 10, warm_up=WarmUp(9, (1.0, 2.0, 3.0), settled=False)),
            timing("fast.onnx", 4, speedup=Ratio(2.5, 2.4, 2.6, 20)),
            timing("slow.onnx", 12, size=2),
            Timing(Case(BATCH_SIZE, "network", "host", 2, 2), "fast.onnx", None, failed="It takes 1."),
        ],
        [Phases("slow.onnx", 1, 1, 20, {"tokenise": 1.0, "segment": 5.0, "encode": 10.0, "network": 9.0})],
        2**30,
        [Conditions("before", 0.1, 2600.0, "performance", None), Conditions("after", 1.1, 2600.0, None, graphics)],
        ["A note."],
        interrupted=False,
    )


def test_the_share_around_the_network_counts_once_for_a_video_or_not() -> None:
    phases = Phases("a", 1, 1, 5, {"tokenise": 1.0, "segment": 4.0, "encode": 6.0, "network": 9.0})
    assert phases.around(known=False) == pytest.approx(5 / 20)
    assert phases.around(known=True) == pytest.approx(1 / 10)


def test_throughput_counts_the_slowest_calls_too() -> None:
    case = Case(BATCH_SIZE, "network", "host", 8, 8)
    assert Timing(case, "a", Latency.of([0.001] * 9 + [0.091])).queries_per_s == pytest.approx(800)


def test_the_table_says_ratios_failures_and_what_never_settled(report: Report) -> None:
    text = report.text()
    assert "2.50 (2.40 to 2.60)" in text
    assert "not measured: It takes 1." in text
    assert text.count("network *") == 1
    assert "differently from slow.onnx" in text
    assert "SM clock 1200.0 of 1980.0 MHz" in text
    assert "slowed by heat (software)" in text
    assert "Note: A note." in text
    assert "1 thread, numpy 2.4, 2026-11-23" in text


def test_what_agrees_is_said_to_agree() -> None:
    same = Agreement("b", 3, 1.0, 0.999, 0.001, 0, 0.05)
    assert same.sentence("a").startswith("b answers as a (3 queries")


def test_the_gpu_is_named_where_one_was_used(report: Report) -> None:
    assert "H100" not in where_and_when(report.to_dict())
    used = dataclasses.replace(report, models=[subject("slow.onnx", SLOW, "cuda")])
    assert where_and_when(used.to_dict()).startswith("H100, EPYC, 2 cores")


def test_a_passport_gets_the_rows_of_its_model_alone(report: Report, tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    path.write_text(json.dumps(report.to_dict(), allow_nan=False))
    header, rows = latency_table(read_report(path), FAST)
    assert header[0] == "Milliseconds: EPYC, 2 cores, 1 thread, numpy 2.4, 2026-11-23."
    assert rows == [("host: network", "4.00", "4.00", "4.00", "-", "4.00", "20", "250.0")]
    assert len(header) == len(rows[0])
    header, rows = latency_table({**read_report(path), "interrupted": True}, SLOW)
    assert header[0].endswith("Ended early.")
    assert [row[0] for row in rows] == ["host: network", "host: network, batch size 2"]


def test_a_passport_of_another_model_is_refused(report: Report) -> None:
    with pytest.raises(ModelFileError, match=r"slow.onnx .*fast.onnx"):
        latency_table(report.to_dict(), "0" * 64)
    nothing = dataclasses.replace(report, timings=[])
    with pytest.raises(ModelFileError, match="not of the model"):
        latency_table(nothing.to_dict(), FAST)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[]", "is of format None"),
        ('{"format": "drn-parity/1"}', "'drn-parity/1'"),
        ('{"format": "drn-benchmark/1"}', "measure again"),
        ("{", "JSON"),
        (None, "does not exist"),
    ],
)
def test_what_is_no_report_is_refused(tmp_path: Path, text: str | None, said: str) -> None:
    path = tmp_path / "r.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ModelFileError, match=said):
        read_report(path)


def test_a_timing_that_is_damaged_is_refused(report: Report, tmp_path: Path) -> None:
    content = report.to_dict()
    del content["timings"][0]["latency"]["p50_ms"]
    (tmp_path / "r.json").write_text(json.dumps(content))
    with pytest.raises(ModelFileError, match="measure again"):
        read_report(tmp_path / "r.json")


def test_a_picture_is_drawn_of_whatever_was_measured(report: Report, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="draws the picture (pip install 'drn-deploy[plot]')")
    for index, shown in enumerate((report, dataclasses.replace(report, timings=[], models=[], interrupted=True))):
        draw(shown, tmp_path / f"{index}.png")
        assert (tmp_path / f"{index}.png").read_bytes().startswith(b"\x89PNG")
