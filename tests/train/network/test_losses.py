"""Test `train.network.losses`: losses, targets and gradients equal the published ones."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.core.pooling import ClipTiming, max_over_rows, segment_rows
from tests.tolerances import GRADIENTS, HEADS, LOSSES
from train.network.losses import (
    Losses,
    LossOptions,
    distance_loss,
    divide,
    focal_loss,
    loss_sums,
    proposal_overlap,
    targets,
)
from train.network.model import DRN, DRNConfig, NetworkHeads, locations
from train.training.recipes import RECIPES

STAGES = RECIPES["mmaction2"].stages
PUBLISHED = DRNConfig()
# A batch norm or a softmax removes their effect, so that their gradients are rounding noise.
NOISE = {
    "query_encoder.W1.bias",
    *(f"fcos.head.{module}.0.bias" for module in ("cls_tower", "bbox_tower", "mix_fc", "iou_scores")),
}


def losses_of(model: DRN, inputs: list[torch.Tensor], truth: Any, stage: int, **options: Any) -> Losses:
    model.train()
    STAGES[stage - 1].freeze(model)
    sums = loss_sums(model(*inputs), torch.as_tensor(truth), model.config, stage > 1, LossOptions(**options))
    return divide(sums)


def unit_heads(unit: Any) -> NetworkHeads:
    joined = {
        name: torch.from_numpy(np.concatenate([unit[f"loss_{name}_{level}"] for level in range(3)], 2))
        for name in ("cls", "box", "iou")
    }
    return NetworkHeads(joined["cls"][:, 0], joined["box"].transpose(1, 2).contiguous(), joined["iou"][:, 0])


@pytest.fixture(scope="module")
def unit(golden: Path) -> dict[str, np.ndarray]:
    return dict(np.load(golden / "unit.npz"))


@pytest.fixture(scope="module")
def trained_reference(reference: Any) -> Any:
    if not reference.training:
        pytest.skip("no training goldens of this seed are here")
    return reference


def test_targets_match_the_published_ones(unit: dict[str, np.ndarray]) -> None:
    positive, distances = targets(torch.from_numpy(unit["target_gt"]), PUBLISHED)
    np.testing.assert_array_equal(positive.numpy(), unit["target_label"] > 0)
    np.testing.assert_allclose(distances.numpy(), unit["target_ltrb"], rtol=0, atol=1e-5)
    # Labels of 255 moments.
    positive, _ = targets(torch.from_numpy(unit["labels_gt"]), PUBLISHED)
    np.testing.assert_array_equal(positive.numpy(), unit["labels"] > 0)


@pytest.mark.parametrize("stage", [1, 3])
def test_each_loss_matches_the_published_one_on_fixed_heads(unit: dict[str, np.ndarray], stage: int) -> None:
    truth = torch.from_numpy(unit["target_gt"])
    heads = unit_heads(unit)
    for head in heads:
        head.requires_grad_()
    losses = divide(loss_sums(heads, truth, PUBLISHED, with_iou=stage > 1))
    np.testing.assert_allclose([float(loss.detach()) for loss in losses], unit[f"loss_s{stage}"], rtol=LOSSES)
    losses.total().backward()
    for name, head in zip(("cls", "box", "iou"), heads, strict=True):
        if name == "iou" and stage == 1:
            assert head.grad is None
            continue
        expected = np.concatenate([unit[f"loss_s{stage}_grad_{name}_{level}"] for level in range(3)], 2)
        actual = head.grad.numpy().reshape(len(truth), 56, -1).transpose(0, 2, 1)
        np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-7)


def test_boundary_loss_matches_the_published_one(unit: dict[str, np.ndarray]) -> None:
    predicted, expected = torch.from_numpy(unit["iouloss_pred"]), torch.from_numpy(unit["iouloss_true"])
    loss = distance_loss(predicted, expected, torch.ones(len(predicted), dtype=torch.bool)).mean()
    np.testing.assert_allclose(float(loss), unit["iouloss"], rtol=LOSSES)


def test_overlap_matches_the_published_one(unit: dict[str, np.ndarray]) -> None:
    boxes = torch.from_numpy(unit["tiou_box"])
    centre = locations(PUBLISHED)[: boxes.shape[1]]
    distances = torch.ones(len(boxes), PUBLISHED.num_locations, 2)
    distances[:, : boxes.shape[1], 0] = centre - 32 * boxes[..., 0]
    distances[:, : boxes.shape[1], 1] = 32 * boxes[..., 1] - centre
    actual = proposal_overlap(distances, torch.from_numpy(unit["tiou_gt"])[:, 0], PUBLISHED, LossOptions())
    # The recorded function does not clip boxes to the video.
    inside = ((boxes >= 0) & (boxes <= 1)).all(-1).numpy()
    assert inside.sum() == 40
    np.testing.assert_allclose(actual[:, : boxes.shape[1]].numpy()[inside], unit["tiou"][inside], rtol=0, atol=1e-5)


@pytest.mark.parametrize("truth", ["real", "near", "clip"])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_losses_and_gradients_match_the_published_ones(trained_reference: Any, truth: str, stage: int) -> None:
    recorded, prefix = trained_reference.training, f"{truth}_s{stage}"
    model = trained_reference.model()
    losses = losses_of(model, trained_reference.inputs("a"), recorded[f"gt_{truth}"], stage)
    for loss, name in zip(losses, ("cls", "reg", "iou"), strict=True):
        np.testing.assert_allclose(float(loss.detach()), recorded[f"{prefix}_loss_{name}"].item(), rtol=HEADS)
    losses.total().backward()
    if f"{prefix}_grad_prop_fc.weight" not in recorded:
        # The published stage 2 fails for a batch without a location above 0.9; here its gradients are zero.
        assert stage == 2
        assert float(losses.iou.detach()) == 0
        gradients = [parameter.grad for parameter in model.parameters() if parameter.requires_grad]
        assert len(gradients) == 10
        assert all(gradient is not None and not gradient.any() for gradient in gradients)
        return
    compared = 0
    for name, parameter in model.named_parameters():
        expected = recorded[f"{prefix}_grad_{name}"]
        if not len(expected):
            # The published code has no gradient, or one of zeros, for parameters that are not trained.
            assert parameter.grad is None or not parameter.grad.any(), name
            continue
        assert parameter.grad is not None, name
        if name in NOISE:
            continue
        gradient = parameter.grad.double().flatten().numpy()
        projection = np.random.RandomState(1).standard_normal(len(gradient)) @ gradient
        actual = np.array([np.linalg.norm(gradient), gradient.sum(), projection, *gradient[:8]])
        # A sum of n errors is at most the root of n times their norm.
        spread = np.array([1, np.sqrt(len(gradient)), 10, *[1] * (len(actual) - 3)])
        assert (np.abs(actual - expected) <= GRADIENTS * expected[0] * spread + 1e-12).all(), name
        compared += 1
    assert compared >= {1: 71 - 3, 2: 10 - 2, 3: 71 - 3}[stage]


def test_full_size_network_has_the_published_losses(recipe: ModuleType, golden: Path) -> None:
    listed = json.loads((golden / "state_dict_full.json").read_text())
    recorded = listed["seeds"]["0"]
    state = recipe.make_state(listed["state_dict"], 0, **recorded["recipe"])
    assert recipe.digest(state) == recorded["weights_sha256"]
    model = DRN()
    model.load_state_dict({name: torch.from_numpy(array) for name, array in state.items()})
    small = np.load(golden / "small_seed0.npz")
    features = []
    for video, num_frames in zip(small["a_in_vid_name"], small["a_in_num_frames"].tolist(), strict=True):
        first, last, _ = segment_rows(num_frames, 32, "mmaction2", ClipTiming())
        features.append(max_over_rows(recipe.make_feature(video, recipe.c3d_rows(num_frames), 4096), first, last))
    names = ("query_tokens", "query_length", "proposals")
    tokens, length, spans = (torch.from_numpy(small[f"a_in_{name}"]) for name in names)
    with torch.no_grad():
        losses = losses_of(
            model, [tokens, length, torch.from_numpy(np.stack(features)), spans], small["a_in_gt_bbox"], 3
        )
    expected = [recorded["training"]["real_stage3"][f"loss_{name}"] for name in ("cls", "reg", "iou")]
    np.testing.assert_allclose([float(loss) for loss in losses], expected, rtol=HEADS)


def test_positive_locations_lie_inside_moment_and_level_range() -> None:
    # From 8 to 14 segments: six long, so at most 6 away on level 0 and at least 5.6 on level 1.
    positive, distances = targets(torch.tensor([[0.25, 14 / 32]]), PUBLISHED)
    assert locations(PUBLISHED)[positive[0]].tolist() == [8.5, 9.5, 10.5, 11.5, 12.5, 13.5]
    assert distances[0, 8].tolist() == [0.5, 5.5]
    # From 8 to 15: 8.5 is 6.5 from the end, too far for level 0 and far enough for level 1, where 9 is 6 away.
    positive, _ = targets(torch.tensor([[0.25, 15 / 32]]), PUBLISHED)
    level_0, level_1, level_2 = (locations(PUBLISHED)[part][positive[0, part]].tolist() for part in LEVELS)
    assert level_0 == [9.5, 10.5, 11.5, 12.5, 13.5]
    assert level_1 == [9]  # 11 is at most 4 away and 13 is 5
    assert level_2 == []


LEVELS = (slice(0, 32), slice(32, 48), slice(48, 56))


def test_reversed_moments_train_only_the_matching_head() -> None:
    truth = torch.tensor([[0.7, 0.5], [0.3, 0.3]])
    assert not targets(truth, PUBLISHED)[0].any()
    heads = NetworkHeads(*(torch.zeros(shape, requires_grad=True) for shape in ((2, 56), (2, 56, 2), (2, 56))))
    losses = divide(loss_sums(heads, truth, PUBLISHED, True))
    assert float(losses.boundary.detach()) == float(losses.iou.detach()) == 0
    losses.iou.backward(retain_graph=True)
    assert not heads.iou_logits.grad.any()
    losses.total().backward()
    assert all(torch.isfinite(head.grad).all() for head in heads)
    assert heads.matching_logits.grad.any()


def test_focal_loss_matches_hand_computed_values() -> None:
    logits = torch.tensor([0.0, 0.0, 2.0])
    actual = focal_loss(logits, torch.tensor([True, False, False]))
    p = 1 / (1 + np.exp(-2))
    expected = [0.25 * 0.25 * np.log(2), 0.75 * 0.25 * np.log(2), -0.75 * p**2 * np.log(1 - p)]
    np.testing.assert_allclose(actual, expected, rtol=1e-6)
    extreme = torch.tensor([-100.0, 100.0], requires_grad=True)
    loss = focal_loss(extreme, torch.tensor([True, False])).sum()
    loss.backward()
    np.testing.assert_allclose(float(loss.detach()), 25 + 75, rtol=1e-6)
    assert torch.isfinite(extreme.grad).all()


def test_boundary_loss_matches_hand_computed_values() -> None:
    predicted, expected = torch.tensor([[2.0, 2.0], [5.0, 5.0]]), torch.tensor([[1.0, 3.0], [-4.0, 9.0]])
    actual = distance_loss(predicted, expected, torch.tensor([True, False]))
    np.testing.assert_allclose(actual, [np.log(5 / 3), 0], rtol=1e-6)


def test_authors_iou_clip_applies_to_first_location_only() -> None:
    distances = torch.full((1, 56, 2), 4.0)
    truth = torch.tensor([[0.0, 4.5 / 32]])
    everywhere = proposal_overlap(distances, truth, PUBLISHED, LossOptions())
    first = proposal_overlap(distances, truth, PUBLISHED, LossOptions(iou_clip="first"))
    np.testing.assert_allclose(everywhere[0, :2], [1, 4.5 / 5.5], rtol=1e-4)
    # Unclipped, location 1.5 reaches from -2.5 to 5.5.
    np.testing.assert_allclose(first[0, :2], [1, 4.5 / 8], rtol=1e-4)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_batch_of_one_trains(reference: Any, stage: int) -> None:
    model = reference.model()
    losses = losses_of(model, reference.inputs("c"), reference.arrays["c_in_gt_bbox"], stage, iou_target="all")
    losses.total().backward()
    learnt = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert learnt
    assert all(parameter.grad is not None and torch.isfinite(parameter.grad).all() for parameter in learnt)
    assert any(parameter.grad.any() for parameter in learnt)


def test_iou_head_can_be_trained_on_every_location() -> None:
    torch.manual_seed(0)
    heads = NetworkHeads(torch.zeros(3, 56), torch.rand(3, 56, 2) * 9, torch.randn(3, 56))
    truth = torch.tensor([[0.1, 0.3], [0.2, 0.9], [0.5, 0.6]])
    near = loss_sums(heads, truth, PUBLISHED, True)
    everywhere = loss_sums(heads, truth, PUBLISHED, True, LossOptions(iou_target="all"))
    assert float(near.counts[2]) < 20
    assert float(everywhere.counts[2]) == 3 * 56
    overlap = proposal_overlap(heads.boundary_distances, truth, PUBLISHED, LossOptions())
    expected = 0.5 * (heads.iou_logits.sigmoid() - overlap).square().mean()
    np.testing.assert_allclose(float(divide(everywhere).iou), float(expected), rtol=1e-5)


def test_only_overlaps_above_0_9_train_the_iou_head() -> None:
    centre = locations(PUBLISHED)
    distances = torch.full((1, 56, 2), 1e-3)
    truth = torch.tensor([[8 / 32, 18 / 32]])
    for index, overlap in ((10, 0.95), (12, 0.91), (14, 0.89), (16, 0.5)):
        distances[0, index] = torch.tensor([centre[index] - 8, 8 + 10 * overlap - centre[index]])
    heads = NetworkHeads(torch.zeros(1, 56), distances, torch.zeros(1, 56))
    sums = loss_sums(heads, truth, PUBLISHED, True)
    assert float(sums.counts[2]) == 2
    np.testing.assert_allclose(float(divide(sums).iou), 0.25 * (0.45**2 + 0.41**2), rtol=1e-3)


def test_iou_loss_has_gradient_for_boundaries_in_stage_3() -> None:
    distances = torch.full((1, 56, 2), 3.0, requires_grad=True)
    heads = NetworkHeads(torch.zeros(1, 56), distances, torch.full((1, 56), -2.0))
    divide(loss_sums(heads, torch.tensor([[7.55 / 32, 13.5 / 32]]), PUBLISHED, True)).iou.backward()
    assert distances.grad[0, 10].any()


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=2, max_size=6), st.integers(0, 2**16), st.data())
@settings(max_examples=40, deadline=None)
def test_loss_sums_add_up_over_parts_of_a_batch(moments: Any, seed: int, data: Any) -> None:
    generator = torch.Generator().manual_seed(seed)
    count = len(moments)
    heads = NetworkHeads(
        torch.randn(count, 56, generator=generator),
        torch.rand(count, 56, 2, generator=generator) * 12,
        torch.randn(count, 56, generator=generator),
    )
    truth = torch.tensor(moments, dtype=torch.float32)
    options = LossOptions(iou_target=data.draw(st.sampled_from(["near", "all"])))
    cut = data.draw(st.integers(1, count - 1))
    complete = loss_sums(heads, truth, PUBLISHED, True, options)
    parts = [
        loss_sums(NetworkHeads(*(head[part] for head in heads)), truth[part], PUBLISHED, True, options)
        for part in (slice(None, cut), slice(cut, None))
    ]
    for name, one, other, both in zip(complete._fields, *parts, complete, strict=True):
        torch.testing.assert_close(one + other, both, rtol=1e-5, atol=1e-5, msg=name)
    divided = divide(parts[0], complete.counts).total() + divide(parts[1], complete.counts).total()
    torch.testing.assert_close(divided, divide(complete).total(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("num_segments", [16, 32, 64, 128])
def test_level_ranges_grow_with_the_number_of_segments(num_segments: int) -> None:
    config = dataclasses.replace(PUBLISHED, num_segments=num_segments)
    moments = torch.rand(200, 2, generator=torch.Generator().manual_seed(0)).sort(dim=1).values
    positive, distances = targets(moments, config)
    farther = distances.amax(-1) * 32 / num_segments
    first = 0
    for stride, (lowest, highest) in zip(config.strides, ((0, 6), (5.6, 11), (11, 32)), strict=True):
        level = slice(first, first + num_segments // stride)
        trained = farther[:, level][positive[:, level]]
        assert lowest <= trained.min()
        assert trained.max() <= highest
        first = level.stop


@pytest.mark.parametrize("iou_target", ["near", "all"])
def test_mismatched_pairs_train_only_the_matching_head(iou_target: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    heads = NetworkHeads(
        torch.randn(5, 56, generator=generator, requires_grad=True),
        (torch.rand(5, 56, 2, generator=generator) * 12).requires_grad_(),
        torch.randn(5, 56, generator=generator, requires_grad=True),
    )
    truth, options = torch.tensor([[0.1, 0.4], [0.2, 0.3], [0.5, 1.0]]), LossOptions(iou_target=iou_target)
    sums = loss_sums(heads, truth, PUBLISHED, True, options)
    alone = loss_sums(NetworkHeads(*(head[:3] for head in heads)), truth, PUBLISHED, True, options)
    for name in ("boundary", "iou"):
        assert torch.equal(getattr(sums, name), getattr(alone, name)), name
    refused = focal_loss(heads.matching_logits[3:], torch.zeros(2, 56, dtype=torch.bool)).sum()
    torch.testing.assert_close(sums.matching, alone.matching + refused)
    # Each pair counts once, and positives are those of matching pairs.
    assert (sums.counts - alone.counts).tolist() == [2, 0, 0]
    divide(sums).total().backward()
    assert (heads.matching_logits.grad[3:] > 0).all(), "mismatched pairs must score lower"
    assert not heads.boundary_distances.grad[3:].any()
    assert not heads.iou_logits.grad[3:].any()
