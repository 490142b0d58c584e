"""Test `runtime.benchmarking.plots`: a picture of whatever was measured."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from runtime.benchmarking.plots import draw
from runtime.benchmarking.report import Report


def test_plot_is_drawn_for_partial_reports(report: Report, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="draws the picture (pip install '.[plot]')")
    (model, *others), timings = report.models, [dataclasses.replace(each, model="a\udce9") for each in report.timings]
    named = dataclasses.replace(report, models=[dataclasses.replace(model, label="a\udce9"), *others], timings=timings)
    empty = dataclasses.replace(report, timings=[], models=[], interrupted=True)
    for index, shown in enumerate((report, named, empty)):
        draw(shown, tmp_path / f"{index}.png")
        assert (tmp_path / f"{index}.png").read_bytes().startswith(b"\x89PNG")
