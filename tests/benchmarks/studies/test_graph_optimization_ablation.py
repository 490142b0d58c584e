"""Test `benchmarks.studies.graph_optimization_ablation`: variants of every kind are timed."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.studies.graph_optimization_ablation import rewritings
from tests.train.training.narrow import narrow_backbone

__all__ = ["narrow_backbone"]


def test_rewritings_writes_time_ratios(models: Path, tmp_path: Path) -> None:
    only, output = ("bidirectional", "Scan", "by level", "denormals"), tmp_path / "rewritings.json"
    rewritings(models / "drn.pt", samples=2, batch=2, only=only, output=output)
    results = json.loads(output.read_text())["time over that of the graph as exported"]
    assert len(results["2 x 8 words"]) == 6
    assert all(ratio > 0 for ratio in results["2 x 8 words"].values())
