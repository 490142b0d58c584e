"""Test `benchmarks.corpus`, on which docs/scale.md is based."""

from __future__ import annotations

import pytest

from tests.train.training.narrow import narrow_backbone

__all__ = ["narrow_backbone"]

pytest.importorskip("torch")
pytest.importorskip("ray.data", reason="Ray needs the extra [corpus]")

from benchmarks.corpus import corpus


def test_corpus_report_times_every_part(monkeypatch: pytest.MonkeyPatch) -> None:
    # Only the command times processes of Ray; tests/runtime/corpus/test_ray_runner.py tests that they work.
    monkeypatch.setattr("benchmarks.corpus._rates", lambda *_: {"1": 1.0, "2": 2.0})
    report = corpus(videos=5, sentences=4, rounds=1, feature_dim=32, fpn_dim=8)
    assert report["two processes over one"] == 2
    assert set(report["ms of processor time"]) == {"a video", "a pair", "a pair, around the network"}
    assert report["bytes of a row"] > 100
