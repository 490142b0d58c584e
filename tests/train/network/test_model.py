"""Test `train.network.model`: heads equal the published ones, and do not depend on the batch."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.raising import quotes
from tests.tolerances import HEADS
from tests.train.conftest import random_inputs
from train.network.model import BACKBONE_CHANNELS, DRN, DRNConfig, locations, with_duration


def assert_close(actual: Any, expected: Any, tolerance: float = HEADS) -> None:
    """Assert that errors are at most `tolerance` times the largest expected value."""
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert actual.shape == expected.shape
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance * np.abs(expected).max())


@pytest.mark.parametrize("size", ["small", "full"])
def test_state_dict_matches_the_published_one(golden: Path, size: str) -> None:
    listed = json.loads((golden / f"state_dict_{size}.json").read_text())
    sizes = {**listed["config"], **listed["changed"]}
    config = DRNConfig(
        sizes["vocab_size"], sizes["embed_dim"], listed["feature_dim"], sizes["hidden_dim"], sizes["fpn_feature_dim"]
    )
    with torch.device("meta"):
        model = DRN(config)
    ours = [[n, list(t.shape), str(t.dtype).removeprefix("torch.")] for n, t in model.state_dict().items()]
    assert ours == listed["state_dict"]
    assert [name for name, _ in model.named_parameters()] == listed["trainable"]
    assert sum(parameter.numel() for parameter in model.parameters()) == listed["parameters"]
    if size == "full":
        assert config == DRNConfig()
        assert (listed["parameters"], len(listed["trainable"]), len(ours)) == (39_214_288, 81, 120)


@torch.no_grad()
def test_every_step_of_the_network_matches_the_published_one(reference: Any) -> None:
    model, order = reference.model(), reference.arrays["a_sort_index"]
    tokens, length, features, spans = reference.inputs("a")

    def check(name: str, tensor: torch.Tensor) -> None:
        assert_close(tensor[order], reference.arrays[f"a_{name}"])

    queries = model.query_encoder(tokens, length)
    gates = [gate(query) for gate, query in zip(model.qInput, queries, strict=True)]
    for level in range(3):
        check(f"query_feature_{level}", queries[level])
        check(f"query_gate_{level}", gates[level])
    projected = model.prop_fc(features)
    positions = model.position_transform(with_duration(spans))
    check("prop_fc", projected)
    check("position_0", positions)
    levels = model.backbone_net(projected.transpose(1, 2), positions.transpose(1, 2), gates)
    pyramid = model.fpn(levels)
    for level in range(3):
        check(f"backbone_{level}", levels[level])
        check(f"fpn_{level}", pyramid[level])


@pytest.mark.parametrize("batch", ["a", "b", "c"])
@torch.no_grad()
def test_heads_match_the_published_ones(reference: Any, as_arrays: Any, batch: str) -> None:
    published = reference.heads(batch, reference.arrays[f"{batch}_sort_index"])
    for actual, expected in zip(as_arrays(reference.model()(*reference.inputs(batch))), published, strict=True):
        assert_close(actual, expected)


@torch.no_grad()
def test_heads_in_training_mode_match_the_published_ones(reference: Any, as_arrays: Any) -> None:
    if not reference.training:
        pytest.skip("no training goldens of this seed are here")
    published = reference.heads("near_train", reference.training["near_train_sort_index"])
    for actual, expected in zip(as_arrays(reference.model().train()(*reference.inputs("a"))), published, strict=True):
        assert_close(actual, expected)


@torch.no_grad()
def test_batch_order_does_not_change_heads(reference: Any, as_arrays: Any) -> None:
    model, inputs = reference.model(), reference.inputs("a")
    order = torch.tensor([2, 0, 3, 1])
    straight = as_arrays(model(*inputs))
    shuffled = as_arrays(model(*(tensor[order] for tensor in inputs)))
    for one, other in zip(straight, shuffled, strict=True):
        assert_close(other, one[order.numpy()], 1e-5)


@torch.no_grad()
def test_single_query_equals_query_in_batch(reference: Any, as_arrays: Any) -> None:
    model, inputs = reference.model(), reference.inputs("a")
    together = as_arrays(model(*inputs))
    for row, length in enumerate(inputs[1].tolist()):
        tokens, lengths, features, spans = (tensor[row : row + 1] for tensor in inputs)
        alone = as_arrays(model(tokens[:, :length], lengths, features, spans))
        for one, other in zip(alone, together, strict=True):
            assert_close(one[0], other[row], 1e-5)


@torch.no_grad()
def test_padding_tokens_do_not_change_heads(reference: Any, as_arrays: Any) -> None:
    model, (tokens, length, features, spans) = reference.model(), reference.inputs("a")
    unpadded = as_arrays(model(tokens, length, features, spans))
    # Words in place of padding, and more of them.
    padded = torch.full((len(tokens), tokens.shape[1] + 3), 7)
    for row, size in enumerate(length.tolist()):
        padded[row, :size] = tokens[row, :size]
    for actual, expected in zip(as_arrays(model(padded, length, features, spans)), unpadded, strict=True):
        assert_close(actual, expected, 1e-5)


@torch.no_grad()
def test_positions_reach_only_level_0_and_bypass_gates(reference: Any) -> None:
    model = reference.model()
    gates = [torch.zeros(1, n) for n in (reference.config.feature_dim, *BACKBONE_CHANNELS[:-1])]
    nothing = torch.zeros(1, reference.config.feature_dim, 32)
    one, other = (model.backbone_net(nothing, torch.full((1, 256, 32), value), gates) for value in (0.0, 1.0))
    assert not torch.equal(one[0], other[0])
    assert torch.equal(one[1], other[1])


@pytest.mark.parametrize(
    "sizes", [{"num_segments": 16}, {"num_segments": 64}, {"head_convs": 2}, {"lstm_layers": 2}], ids=repr
)
@torch.no_grad()
def test_network_of_other_sizes_runs(tiny: DRNConfig, sizes: dict[str, int]) -> None:
    config = dataclasses.replace(tiny, **sizes)
    model = DRN(config).eval()
    num_locations = config.num_segments * 7 // 4
    assert config.num_locations == num_locations == len(locations(config))
    heads = model(*random_inputs(config, [3, 1, 5]))
    assert [tuple(head.shape) for head in heads] == [(3, num_locations), (3, num_locations, 2), (3, num_locations)]
    assert float(locations(config).max()) < config.num_segments
    if "num_segments" in sizes:
        # The weights do not depend on the number of segments.
        model.load_state_dict(DRN(tiny).state_dict())
    if "head_convs" in sizes:
        assert {"fcos.head.cls_tower.3.weight", "fcos.head.cls_tower.4.running_mean"} <= model.state_dict().keys()


def test_locations_match_the_published_ones(golden: Path) -> None:
    points = np.load(golden / "unit.npz")["points"]
    np.testing.assert_array_equal(locations(DRNConfig()), points)
    np.testing.assert_array_equal(points[[0, 1, 31, 32, 33, 48, 55]], [0.5, 1.5, 31.5, 1, 3, 2, 30])


@pytest.mark.parametrize(
    "wrong",
    [
        {"num_segments": 30},
        {"num_segments": 0},
        {"hidden_dim": 0},
        {"vocab_size": 10**18},
        {"embed_dim": 3.5},
        {"strides": (1, 2)},
        {"strides": (2, 4, 8)},
        {"fpn_dim": 15},
        {"prior_probability": 1.5},
        {"head_convs": 1_000_000},
        {"lstm_layers": 65},
        {"prior_probability": {"x": 1}},
    ],
)
def test_invalid_network_sizes_are_rejected(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011 (the message is checked below)
        DRNConfig(**wrong)
    assert quotes(str(caught.value), *wrong.values())
