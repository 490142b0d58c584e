"""Test `benchmarks.multiply_adds`, on which docs/performance.md and docs/scale.md are based."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from benchmarks.multiply_adds import c3d_multiply_adds, clips_per_hour, drn_multiply_adds  # noqa: E402
from tests.train.training.narrow import NARROW, set_backbone  # noqa: E402
from train.extractors.c3d import C3D, CROP, WINDOW, C3DConfig  # noqa: E402
from train.network.model import DRN, POSITION_CHANNELS, DRNConfig  # noqa: E402


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


def test_drn_multiply_adds_equal_sum_over_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    set_backbone(monkeypatch, NARROW)
    sizes = {"embed_dim": 6, "feature_dim": 24, "hidden_dim": 10, "fpn_dim": 14, "num_segments": 8}
    config = DRNConfig(9, **sizes, head_convs=2, lstm_layers=2)
    counted: dict[str, int] = {}

    def count(name: str, layer: torch.nn.Module, output: torch.Tensor) -> None:
        counted[name] = counted.get(name, 0) + output[0].numel() * layer.weight[0].numel()

    network, words = DRN(config).eval(), 5
    for name, layer in network.named_modules():
        # Positions and the attention over words are not counted.
        if isinstance(layer, (torch.nn.Conv1d, torch.nn.Linear)) and not name.endswith(("position_transform", ".W1")):
            layer.register_forward_hook(lambda layer, _, output, name=name: count(name, layer, output))
    with torch.no_grad():
        segments = torch.zeros((1, config.num_segments, config.feature_dim)), torch.zeros((1, config.num_segments, 2))
        network(torch.ones((1, words), dtype=torch.long), torch.tensor([words]), *segments)
    first = counted.pop("backbone_net.layers.0.0") - 3 * POSITION_CHANNELS * NARROW[0] * config.num_segments
    video = counted.pop("prop_fc")
    lstm = words * sum(weights.numel() for name, weights in network.named_parameters() if "biLSTM.weight" in name)
    expected = {"video": video, "first": first, "rest": sum(counted.values()) + lstm}
    assert drn_multiply_adds(config, words) == expected


def test_multiply_adds_match_the_published_network() -> None:
    work = drn_multiply_adds(DRNConfig(), 8)
    assert work["video"] == 4096 * 4096 * 32
    # 893 million for a pair with 8 words, of which 6 are positions, that are folded.
    assert (work["video"] + work["first"] + work["rest"]) / 1e6 == pytest.approx(893 - 6.3, abs=1)
