"""Test `benchmarks.multiply_adds`, on which docs/performance.md and docs/scale.md are based."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from benchmarks.multiply_adds import c3d_multiply_adds, clips_per_hour, drn_multiply_adds  # noqa: E402
from train.extractors.c3d import C3D, CROP, WINDOW, C3DConfig  # noqa: E402
from train.network.model import DRNConfig  # noqa: E402


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


def test_multiply_adds_match_the_published_network() -> None:
    work = drn_multiply_adds(DRNConfig(), 8)
    assert work["video"] == 4096 * 4096 * 32
    # 893 million for a pair with 8 words, of which 6 are positions, that are folded.
    assert (work["video"] + work["first"] + work["rest"]) / 1e6 == pytest.approx(893 - 6.3, abs=1)
