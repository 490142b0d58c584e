"""Test `benchmarks.training_baseline`: the eager step has the losses and gradients of the trainer."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from benchmarks.training_baseline import EagerTraining, Sample
from tests.tolerances import GRADIENTS
from train.network.losses import divide, loss_sums
from train.network.model import DRN, DRNConfig, locations
from train.training.recipes import RECIPES

CONFIG = DRNConfig(vocab_size=20, embed_dim=8, feature_dim=32, hidden_dim=16, fpn_dim=16)
LENGTHS = [3, 6, 1, 6, 4]
# Before a batch norm, or under a softmax, a bias changes nothing: its gradient is rounding noise.
NOISE = ("cls_tower.0.bias", "bbox_tower.0.bias", "mix_fc.0.bias", "iou_scores.0.bias", "W1.bias")


@pytest.fixture
def model() -> DRN:
    torch.manual_seed(1)
    model = DRN(CONFIG).train()
    with torch.no_grad():
        for parameter in model.fcos.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
        model.fcos.head.bbox_pred.bias.fill_(1.3)
    return model


@pytest.fixture
def inputs() -> list[torch.Tensor]:
    tokens = torch.zeros(len(LENGTHS), max(LENGTHS), dtype=torch.int64)
    for row, length in enumerate(LENGTHS):
        tokens[row, :length] = torch.randint(1, 21, (length,))
    edges = torch.linspace(0, 1, 33)
    spans = torch.stack((edges[:-1], edges[1:]), 1).expand(len(LENGTHS), -1, -1)
    return [tokens, torch.tensor(LENGTHS), torch.rand(len(LENGTHS), 32, 32), spans]


@pytest.fixture
def truth(model: DRN, inputs: list[torch.Tensor]) -> torch.Tensor:
    """Moments near a proposal of the network's, so that there is something to learn for the IoU head."""
    with torch.no_grad():
        distances = copy.deepcopy(model)(*inputs).boundary_distances[:, 12]
    centre = locations(CONFIG)[12]
    return torch.stack((centre - distances[:, 0], centre + distances[:, 1]), 1).div(32).clamp(0, 1) + 1e-3


def samples_of(inputs: list[torch.Tensor], truth: torch.Tensor) -> list[Sample]:
    tokens, lengths, features, spans = inputs
    return [Sample(tokens[row, : lengths[row]], features[row], spans[row], truth[row]) for row in range(len(LENGTHS))]


@pytest.mark.parametrize("number", [1, 2, 3])
def test_baseline_losses_and_gradients_match_trainer(
    model: DRN, inputs: list[torch.Tensor], truth: torch.Tensor, number: int
) -> None:
    stage = RECIPES["mmaction2"].stages[number - 1]
    ours = copy.deepcopy(model)
    stage.freeze(ours)
    expected = divide(loss_sums(ours(*inputs), truth, CONFIG, stage.trains_iou_head))
    expected.total().backward()
    eager = EagerTraining(model, stage)
    losses = eager.losses(samples_of(inputs, truth))
    for name, loss in losses.items():
        assert float(loss.detach()) == pytest.approx(float(getattr(expected, name).detach()), rel=1e-5), name
    assert all(float(loss.detach()) > 0 for name, loss in losses.items() if number > 1 or name != "iou")
    sum(loss.mean() for loss in losses.values()).backward()
    compared = 0
    for (name, one), other in zip(model.named_parameters(), ours.parameters(), strict=True):
        if one.grad is None or other.grad is None:
            assert one.grad is None or not one.grad.any(), name
            assert other.grad is None or not other.grad.any(), name
        elif not name.endswith(NOISE):
            torch.testing.assert_close(one.grad, other.grad, rtol=0, atol=GRADIENTS * float(other.grad.norm()) + 1e-9)
            compared += bool(other.grad.any())
    assert compared >= {1: 60, 2: 8, 3: 65}[number]
    for (name, one), other in zip(model.named_buffers(), ours.buffers(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6, msg=name)


def test_step_changes_only_parameters_of_the_stage(model: DRN, inputs: list[torch.Tensor], truth: torch.Tensor) -> None:
    stage, before = RECIPES["mmaction2"].stages[1], copy.deepcopy(model.state_dict())
    EagerTraining(model, stage).step(samples_of(inputs, truth))
    moved = {name for name, parameter in model.named_parameters() if not torch.equal(before[name], parameter)}
    assert "fcos.head.iou_scores.3.weight" in moved
    assert "prop_fc.weight" not in moved
    assert all(stage.trains(name) for name in moved)


def test_benchmark_continues_after_batch_without_good_proposal(model: DRN, inputs: list[torch.Tensor]) -> None:
    losses: Any = EagerTraining(model, RECIPES["mmaction2"].stages[1]).step(
        samples_of(inputs, torch.tensor([[0.98, 0.985]] * len(LENGTHS)))
    )
    assert losses["iou"] == 0
