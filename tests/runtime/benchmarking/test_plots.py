"""Test `runtime.benchmarking.plots`: a picture of whatever was measured."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from runtime.benchmarking.plots import draw
from runtime.benchmarking.report import Report


def test_a_picture_is_drawn_of_whatever_was_measured(report: Report, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="draws the picture (pip install '.[plot]')")
    for index, shown in enumerate((report, dataclasses.replace(report, timings=[], models=[], interrupted=True))):
        draw(shown, tmp_path / f"{index}.png")
        assert (tmp_path / f"{index}.png").read_bytes().startswith(b"\x89PNG")
