"""Test `benchmarks.acceptance.torch_baselines`: baselines return the heads of the network."""

from __future__ import annotations

import pytest
import torch

from benchmarks.acceptance.torch_baselines import JoinedHeads, joined_heads, unpacked
from tests import tolerances
from tests.export.conftest import lively
from train.network.model import DRNConfig

CONFIG = DRNConfig(vocab_size=20, embed_dim=8, hidden_dim=12, feature_dim=16, fpn_dim=16)
LENGTHS = torch.tensor([1, 7, 4, 2])


@pytest.fixture(scope="module")
def tokens() -> torch.Tensor:
    return torch.randint(1, 21, (len(LENGTHS), 7), generator=torch.Generator().manual_seed(0))


def test_unpacked_lstm_equals_packed_lstm(tokens: torch.Tensor) -> None:
    model = lively(CONFIG).eval()
    with torch.inference_mode():
        expected = model.query_encoder.words(tokens, LENGTHS)
        actual = unpacked(model).query_encoder.words(tokens, LENGTHS)
    for row, length in enumerate(LENGTHS):
        torch.testing.assert_close(actual[row, :length], expected[row, :length], rtol=0, atol=tolerances.HEADS)


@pytest.mark.parametrize("encoded", [False, True])
def test_unpacked_baseline_equals_network_heads(tokens: torch.Tensor, encoded: bool) -> None:
    model = lively(CONFIG).eval()
    features = torch.randn(len(LENGTHS), CONFIG.num_segments, 16, generator=torch.Generator().manual_seed(1)).relu()
    edges = torch.arange(CONFIG.num_segments + 1) / CONFIG.num_segments
    spans = torch.stack((edges[:-1], edges[1:]), 1).expand(len(LENGTHS), -1, -1)
    with torch.inference_mode():
        expected = joined_heads(model(tokens, LENGTHS, features, spans))
        baseline = unpacked(model)
        inputs = baseline.prop_fc(features) if encoded else features
        actual = JoinedHeads(baseline, encoded)(tokens, LENGTHS, inputs, spans)
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerances.HEADS * expected.abs().max().item())
