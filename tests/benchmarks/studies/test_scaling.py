"""Test `benchmarks.studies.scaling`: all curves of docs/performance.md are timed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.studies import scaling
from runtime.core.errors import GroundingError
from tests.raising import raises
from tests.train.training.narrow import narrow_backbone

__all__ = ["narrow_backbone"]


def test_every_curve_is_timed_and_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scaling, "QUERIES", (1, 4))
    monkeypatch.setattr(scaling, "QUERY_LENGTHS", (2, 5))
    # The network of tests/benchmarks/test_corpus.py, whose traced graph is used again.
    report = scaling.growth(
        segments=(32,), feature_dim=32, fpn_dim=8, samples=2,
        output=tmp_path / "growth.json", plot=tmp_path / "growth.png",
    )  # fmt: skip
    curves = report["ms"]
    assert {case: set(actual) for case, actual in curves[scaling.BY_SEGMENTS].items()} == {
        case: {32} for case in (scaling.ENCODE, scaling.ONE, scaling.MANY)
    }
    assert all(set(actual) == {2, 5} for actual in curves[scaling.BY_LENGTH].values())
    for queries, each in curves[scaling.BY_QUERIES][scaling.EACH].items():
        assert curves[scaling.BY_QUERIES][scaling.ENCODED_FOR][queries] > each > 0
    assert report["1e6 multiply-adds"][32]["video"] == 32 * 32 * 32 / 1e6
    assert json.loads((tmp_path / "growth.json").read_text())["network"]["T"] == 32
    assert (tmp_path / "growth.png").read_bytes()[:4] == b"\x89PNG"


def test_segments_not_divisible_by_levels_are_rejected() -> None:
    with raises(GroundingError, "invalid_option", "--segments", (32, 30)):
        scaling.growth(segments=(32, 30))
