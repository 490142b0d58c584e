"""Test `runtime.benchmarking.plots`: a picture of complete and empty reports."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from runtime.benchmarking.plots import draw
from runtime.benchmarking.report import Report


def test_plot_is_drawn_for_partial_reports(report: Report, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="draws the picture (pip install '.[plot]')")
    # The name of the first model is not UTF-8.
    label, (first, *others) = "a\udce9", report.models
    timings = [
        dataclasses.replace(each, model=label if each.model == first.label else each.model) for each in report.timings
    ]
    models = [dataclasses.replace(first, label=label), *others]
    complete = dataclasses.replace(report, models=models, timings=timings)
    empty = dataclasses.replace(report, timings=[], models=[], interrupted=True)
    for index, shown in enumerate((complete, empty)):
        draw(shown, tmp_path / f"{index}.png")
        assert (tmp_path / f"{index}.png").read_bytes().startswith(b"\x89PNG")
