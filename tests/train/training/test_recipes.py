"""Test `train.training.recipes`: trained parameters and learning rates equal the published ones."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from train.checkpoints import load_checkpoint
from train.network.model import DRN, DRNConfig
from train.training.recipes import RECIPES, Stage
from train.training.trainer import fresh_model

IOU_HEAD = {
    *(f"fcos.head.mix_fc.{part}" for part in ("0.weight", "0.bias", "1.weight", "1.bias")),
    *(f"fcos.head.iou_scores.{part}" for part in ("0.weight", "0.bias", "1.weight", "1.bias", "3.weight", "3.bias")),
}


@pytest.mark.parametrize(("number", "count"), [(1, 71), (2, 10), (3, 81)])
def test_stage_trains_the_published_parameters(tiny: DRNConfig, number: int, count: int) -> None:
    model = DRN(tiny)
    names = {name for name, _ in model.named_parameters()}
    # Earlier stages have no effect.
    for stage in (*RECIPES["mmaction2"].stages, RECIPES["mmaction2"].stages[number - 1]):
        stage.freeze(model)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert len(trained) == count
    assert trained == {1: names - IOU_HEAD, 2: IOU_HEAD, 3: names}[number]
    assert stage.trains_iou_head == (number > 1)


@pytest.mark.parametrize("number", [1, 2, 3])
def test_learning_rates_match_the_published_ones(golden: Path, number: int) -> None:
    expected = np.load(golden / "unit.npz")[f"lr_s{number}"]
    stage = RECIPES["mmaction2"].stages[number - 1]
    assert stage.epochs == len(expected)
    np.testing.assert_allclose([stage.learning_rate_at(epoch) for epoch in range(stage.epochs)], expected, rtol=1e-12)


def test_recipes_have_the_published_settings() -> None:
    authors, published = RECIPES["drn"], RECIPES["mmaction2"]
    # The authors use no warm-up.
    assert [stage.learning_rate_at(0) for stage in authors.stages] == [1e-3, 1e-5, 1e-7]
    assert (authors.batch_size, authors.clip_norm) == (32, 0.5)
    assert (published.batch_size, published.clip_norm) == (16, 5.0)
    assert [stage.number for stage in published.stages] == [1, 2, 3]
    assert Stage(1, 1e-3, 3, warmup_epochs=1).learning_rate_at(0) == 1e-3
    assert Stage(1, 1e-3, 3, warmup_epochs=2).learning_rate_at(0) == pytest.approx(1e-4)


def test_stage_2_changes_only_iou_head_and_statistics(short_run: Path) -> None:
    before = load_checkpoint(short_run / "stage1" / "best.pt").weights
    after = load_checkpoint(short_run / "stage2" / "best.pt").weights
    parameters = {name for name, _ in DRN(load_checkpoint(short_run / "drn.pt").config).named_parameters()}
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed & parameters == IOU_HEAD
    buffers = before.keys() - parameters
    assert len(buffers) == 39
    assert changed >= buffers


def test_stage_1_skips_iou_head_and_stage_3_trains_all(short_run: Path) -> None:
    weights = [load_checkpoint(short_run / f"stage{number}" / "best.pt").weights for number in (1, 2, 3)]
    names = {name for name, _ in DRN(load_checkpoint(short_run / "drn.pt").config).named_parameters()}
    fresh = fresh_model(load_checkpoint(short_run / "drn.pt").config, seed=0).state_dict()
    assert {name for name in names if torch.equal(fresh[name], weights[0][name])} == IOU_HEAD
    assert {name for name in names if torch.equal(weights[1][name], weights[2][name])} == set()
