"""Test `benchmarks.corpus` and `benchmarks.multiply_adds`, on which docs/scale.md is based."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("ray.data", reason="Ray needs the extra [corpus]")

from benchmarks.corpus import corpus  # noqa: E402
from benchmarks.multiply_adds import c3d_multiply_adds, clips_per_hour  # noqa: E402
from train.extractors.c3d import C3D, CROP, WINDOW, C3DConfig  # noqa: E402


def test_c3d_multiply_adds_equal_sum_over_layers() -> None:
    config = C3DConfig((2, 3, 4, 5, 6, 7, 8, 9), 10)
    counted = []

    def count(layer: torch.nn.Module, _: object, output: torch.Tensor) -> None:
        counted.append(output[0].numel() * layer.weight[0].numel())

    network = C3D(config, (0.0, 0.0, 0.0)).eval()
    for layer in network.modules():
        if isinstance(layer, (torch.nn.Conv3d, torch.nn.Linear)):
            layer.register_forward_hook(count)
    with torch.no_grad():
        network(torch.zeros((1, WINDOW, *CROP, 3), dtype=torch.uint8))
    assert sum(counted) == c3d_multiply_adds(config)
    assert clips_per_hour() == 13499


def test_corpus_report_times_every_part(monkeypatch: pytest.MonkeyPatch) -> None:
    # Processes of Ray are timed by the command alone; that they work is shown beside `runtime.corpus.ray_runner`.
    monkeypatch.setattr("benchmarks.corpus._rates", lambda *_: {"1": 1.0, "2": 2.0})
    report = corpus(videos=5, sentences=4, rounds=1, feature_dim=32, fpn_dim=8)
    assert report["two processes over one"] == 2
    assert set(report["ms of processor time"]) == {"a video", "a pair", "a pair, around the network"}
    assert report["bytes of a row"] > 100
