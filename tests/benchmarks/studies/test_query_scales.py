"""Test `benchmarks.studies.query_scales`: both kinds of scales are measured for each method."""

from __future__ import annotations

from pathlib import Path

from benchmarks.studies.query_scales import query_scales


def test_each_scale_has_a_row_for_each_method(models: Path, planted: Path) -> None:
    result = query_scales(models / "drn.onnx", planted, methods=("mse", "output"), limit=4, samples=32)
    rows = result["rows"]
    assert [(row["method"], row["scale"]) for row in rows] == [
        ("mse", "constant"),
        ("output", "constant"),
        ("mse", "per query"),
        ("output", "per query"),
    ]
    assert all(value > 20 for row in rows for value in row["SQNR, dB"].values())
    assert rows[0] != {**rows[2], "scale": "constant"}
    assert result["time ratio"] > 0
