"""Compute the losses of DRN: matching of locations, boundary regression, IoU regression.

Every loss is a sum over locations and a count to divide it by, so that processes can add up both before dividing:
the result does not depend on how a batch is spread over them.

Source: FCOSLoss in mmaction2's drn_utils/fcos.py, after loss.py in the authors' code.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from train.network.model import DRNConfig, NetworkHeads, locations

FOCAL_ALPHA = 0.25
FOCAL_GAMMA = 2.0
# In segments of a video of 32, both ends included: how far the farther boundary of a location may be to be learnt on
# a level. Neighbouring ranges overlap, so a moment can be learnt on two.
DISTANCE_RANGES = ((-1.0, 6.0), (5.6, 11.0), (11.0, 1e8))
IOU_TARGET_THRESHOLD = 0.9


@dataclasses.dataclass(frozen=True)
class LossOptions:
    """The deviations from the published loss rules.

    Attributes:
        iou_target: which locations train the IoU head: `near` those whose proposal overlaps the moment by more than
            0.9, as published, or `all`.
        iou_clip: which proposals are cut off at the ends of the video before their overlap is taken: `all`, or
            `first`, a slip of the authors' code that cuts off location 0 only.
    """

    iou_target: Literal["near", "all"] = "near"
    iou_clip: Literal["all", "first"] = "all"


class LossSums(NamedTuple):
    """Sums over a batch and what to divide them by; each a scalar tensor."""

    matching: Tensor
    boundary: Tensor
    iou: Tensor
    counts: Tensor  # (3,) float: positives + pairs asked, positives, locations that train the IoU head


class Losses(NamedTuple):
    """The three losses, divided; their plain sum is what is minimised."""

    matching: Tensor
    boundary: Tensor
    iou: Tensor

    def total(self) -> Tensor:
        return self.matching + self.boundary + self.iou


def targets(truth: Tensor, config: DRNConfig) -> tuple[Tensor, Tensor]:
    """Return which locations are positive, (B, P) bool, and every location's distances to the boundaries, (B, P, 2).

    A location is positive if it lies strictly inside the moment and its farther boundary lies in its level's range.

    Args:
        truth: (B, 2) moments as fractions of the video.
        config: of the network; ranges grow with its number of segments.
    """
    centre = locations(config, truth.device)
    moment = truth.float() * config.num_segments
    distances = torch.stack((centre - moment[:, :1], moment[:, 1:] - centre), dim=-1)
    ranges = _distance_ranges(config, truth.device)
    farther = distances.amax(dim=-1)
    positive = (distances.amin(dim=-1) > 0) & (farther >= ranges[:, 0]) & (farther <= ranges[:, 1])
    return positive, distances


@functools.lru_cache(maxsize=8)
def _distance_ranges(config: DRNConfig, device: torch.device) -> Tensor:
    """Return the nearest and farthest that the farther boundary of each location may be, (P, 2), in segments.

    Kept, since a constant copied to a GPU waits for all that the GPU has to do.
    """
    factor = config.num_segments / 32
    ranges = [
        (nearest * factor if nearest > 0 else nearest, farthest * factor)
        for (nearest, farthest), stride in zip(DISTANCE_RANGES, config.strides, strict=True)
        for _ in range(config.num_segments // stride)
    ]
    return torch.tensor(ranges, device=device)


def loss_sums(
    heads: NetworkHeads, truth: Tensor, config: DRNConfig, with_iou: bool, options: LossOptions | None = None
) -> LossSums:
    """Return the sums and counts of the three losses of a batch.

    Args:
        heads: of B queries at P locations, after which may stand those of pairs whose video does not show what the
            sentence says: no location of theirs is positive, and the other two losses do not count them.
        truth: (B, 2) moments as fractions of the video.
        config: of the network.
        with_iou: whether the IoU head is trained; its sum is 0 otherwise.
        options: where to leave the published rules.
    """
    options = options or LossOptions()
    positive, distances = targets(truth, config)
    positives = positive.sum()
    requested, known = len(heads.matching_logits), len(truth)
    labels = functional.pad(positive, (0, 0, 0, requested - known)) if requested > known else positive
    matching = focal_loss(heads.matching_logits.float(), labels).sum()
    if requested > known:
        heads = NetworkHeads(*(head[:known] for head in heads))
    boundary = (distance_loss(heads.boundary_distances.float(), distances, positive)).sum()
    if with_iou:
        overlap = proposal_overlap(heads.boundary_distances.float(), truth.float(), config, options)
        trained = overlap > IOU_TARGET_THRESHOLD if options.iou_target == "near" else torch.ones_like(positive)
        # Smooth L1 with beta 1 on two numbers in [0, 1]: always its square branch. The gradient also reaches the
        # boundaries through the overlap, as published.
        errors = functional.smooth_l1_loss(heads.iou_logits.float().sigmoid(), overlap, reduction="none")
        iou, near = torch.where(trained, errors, 0.0).sum(), trained.sum()
    else:
        iou = near = torch.zeros((), device=truth.device)
    # As published, every pair that is asked counts once, a mismatched one too.
    counts = torch.stack((positives + requested, positives, near)).float()
    return LossSums(matching, boundary, iou, counts)


def divide(sums: LossSums, counts: Tensor | None = None) -> Losses:
    """Return the losses from sums and counts (those of all processes when given). A loss over nothing is a 0 that
    still has a gradient, so that a batch without any location to learn from does not end the training."""
    divisors = (sums.counts if counts is None else counts).clamp(min=1)
    return Losses(sums.matching / divisors[0], sums.boundary / divisors[1], sums.iou / divisors[2])


def focal_loss(logits: Tensor, positive: Tensor) -> Tensor:
    """Return the sigmoid focal loss of every logit, alpha 0.25, gamma 2, in the shape of `logits`."""
    # log p_t from the logits, since ln of a sigmoid underflows.
    signed = torch.where(positive, logits, -logits)
    log_p = functional.logsigmoid(signed)
    alpha = torch.where(positive, FOCAL_ALPHA, 1 - FOCAL_ALPHA)
    return -alpha * torch.sigmoid(-signed) ** FOCAL_GAMMA * log_p


def distance_loss(predicted: Tensor, expected: Tensor, positive: Tensor) -> Tensor:
    """Return -ln IoU of positive locations, from (B, P, 2) distances to the boundaries; 0 elsewhere, (B, P)."""
    # Elsewhere the wanted distances may be negative, and the gradient of a NaN would get through the mask.
    expected = torch.where(positive[..., None], expected, 1.0)
    overlap = torch.minimum(predicted, expected).sum(-1)
    union = predicted.sum(-1) + expected.sum(-1) - overlap
    return torch.where(positive, torch.log((union + 1e-8) / (overlap + 1e-8)), 0.0)


def proposal_overlap(distances: Tensor, truth: Tensor, config: DRNConfig, options: LossOptions) -> Tensor:
    """Return how much each location's proposal overlaps the moment, (B, P), over their hull."""
    centre = locations(config, truth.device)
    spans = torch.stack((centre - distances[..., 0], centre + distances[..., 1]), dim=-1) / config.num_segments
    if options.iou_clip == "all":
        spans = spans.clamp(0, 1)
    else:
        spans = torch.cat((spans[:, :1].clamp(0, 1), spans[:, 1:]), dim=1)
    truth = truth[:, None]
    overlap = torch.minimum(spans[..., 1], truth[..., 1]) - torch.maximum(spans[..., 0], truth[..., 0])
    hull = torch.maximum(spans[..., 1], truth[..., 1]) - torch.minimum(spans[..., 0], truth[..., 0])
    return overlap.clamp(min=0) / (hull + 1e-6)
