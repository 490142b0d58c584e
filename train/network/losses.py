"""Compute the losses of DRN: matching of locations, boundary regression, IoU regression.

Each loss is a sum over locations and a count to divide it by. Processes add up both before dividing, so that the
result does not depend on how a batch is split among them.

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
# Range per level of the distance to the farther boundary at positive locations, in segments of a video of 32, both ends
# included. Adjacent ranges overlap, so that a moment can be learned on two levels.
DISTANCE_RANGES = ((-1.0, 6.0), (5.6, 11.0), (11.0, 1e8))
IOU_TARGET_THRESHOLD = 0.9


@dataclasses.dataclass(frozen=True)
class LossOptions:
    """Deviations from the published loss rules.

    Attributes:
        iou_target: locations that train the IoU head: `near`, those whose proposal has an IoU above 0.9 (published),
            or `all`.
        iou_clip: locations whose proposals are clamped to the video before the IoU: `all`, or `first`, a mistake of
            the authors' code that clamps location 0 only.
    """

    iou_target: Literal["near", "all"] = "near"
    iou_clip: Literal["all", "first"] = "all"


class LossSums(NamedTuple):
    """Sums of the losses over a batch, scalar tensors, and the counts to divide them by."""

    matching: Tensor
    boundary: Tensor
    iou: Tensor
    counts: Tensor  # (3,) float: positives + pairs, positives, locations that train the IoU head


class Losses(NamedTuple):
    """The three losses, scalar tensors."""

    matching: Tensor
    boundary: Tensor
    iou: Tensor

    def total(self) -> Tensor:
        """Return the sum, which training minimizes."""
        return self.matching + self.boundary + self.iou


def targets(truth: Tensor, config: DRNConfig) -> tuple[Tensor, Tensor]:
    """Return the training targets of all locations.

    A location is positive if it is strictly inside the moment and the distance to its farther boundary is in the range
    of its level. Ranges scale with the number of segments.

    Args:
        truth: (B, 2) moments, start and end as fractions of the video.

    Returns:
        Whether a location is positive, (B, P) bool, and the distances to start and end in segments, (B, P, 2) float32.
    """
    center = locations(config, truth.device)
    moment = truth.float() * config.num_segments
    distances = torch.stack((center - moment[:, :1], moment[:, 1:] - center), dim=-1)
    ranges = _distance_ranges(config, truth.device)
    farther = distances.amax(dim=-1)
    positive = (distances.amin(dim=-1) > 0) & (farther >= ranges[:, 0]) & (farther <= ranges[:, 1])
    return positive, distances


@functools.lru_cache(maxsize=8)
def _distance_ranges(config: DRNConfig, device: torch.device) -> Tensor:
    """Return the minimum and maximum distance to the farther boundary at each location, (P, 2), in segments.

    Cached, because copying a constant to a GPU would synchronize with it.
    """
    factor = config.num_segments / 32
    ranges = [
        (minimum * factor if minimum > 0 else minimum, maximum * factor)
        for (minimum, maximum), stride in zip(DISTANCE_RANGES, config.strides, strict=True)
        for _ in range(config.num_segments // stride)
    ]
    return torch.tensor(ranges, device=device)


def loss_sums(
    heads: NetworkHeads, truth: Tensor, config: DRNConfig, with_iou: bool, options: LossOptions | None = None
) -> LossSums:
    """Return the sums and counts of the three losses of a batch.

    Args:
        heads: heads of B matching pairs of a query and a video, then of any mismatched pairs. No location of a
            mismatched pair is positive, and it contributes to the matching loss only.
        truth: (B, 2) moments of the matching pairs, start and end as fractions of the video.
        with_iou: whether the IoU head is trained; its sum is 0 otherwise.
        options: deviations from the published rules.
    """
    options = options or LossOptions()
    positive, distances = targets(truth, config)
    positives = positive.sum()
    pairs, matches = len(heads.matching_logits), len(truth)
    labels = functional.pad(positive, (0, 0, 0, pairs - matches)) if pairs > matches else positive
    matching = focal_loss(heads.matching_logits.float(), labels).sum()
    if pairs > matches:
        heads = NetworkHeads(*(head[:matches] for head in heads))
    boundary = distance_loss(heads.boundary_distances.float(), distances, positive).sum()
    if with_iou:
        overlap = proposal_overlap(heads.boundary_distances.float(), truth.float(), config, options)
        trained = overlap > IOU_TARGET_THRESHOLD if options.iou_target == "near" else torch.ones_like(positive)
        # The gradient also reaches the boundaries through the overlap, as published.
        errors = functional.smooth_l1_loss(heads.iou_logits.float().sigmoid(), overlap, reduction="none")
        iou, near = torch.where(trained, errors, 0.0).sum(), trained.sum()
    else:
        iou = near = torch.zeros((), device=truth.device)
    # As published, every pair counts once, including mismatched ones.
    counts = torch.stack((positives + pairs, positives, near)).float()
    return LossSums(matching, boundary, iou, counts)


def divide(sums: LossSums, counts: Tensor | None = None) -> Losses:
    """Return the losses. Without any location to learn from, a loss is 0 and still has a gradient.

    `counts`, (3,), are those of all processes; None for those of `sums`.
    """
    divisors = (sums.counts if counts is None else counts).clamp(min=1)
    return Losses(sums.matching / divisors[0], sums.boundary / divisors[1], sums.iou / divisors[2])


def focal_loss(logits: Tensor, positive: Tensor) -> Tensor:
    """Return the sigmoid focal loss of every logit, alpha 0.25, gamma 2, in the shape of `logits` and `positive`.

    Source: Lin et al., "Focal Loss for Dense Object Detection", ICCV 2017, equation 5.
    """
    # `logsigmoid`, because the logarithm of a sigmoid underflows.
    signed = torch.where(positive, logits, -logits)
    log_p = functional.logsigmoid(signed)
    alpha = torch.where(positive, FOCAL_ALPHA, 1 - FOCAL_ALPHA)
    return -alpha * torch.sigmoid(-signed) ** FOCAL_GAMMA * log_p


def distance_loss(predicted: Tensor, expected: Tensor, positive: Tensor) -> Tensor:
    """Return -ln IoU of predicted and expected boundaries at positive locations and 0 elsewhere, (B, P).

    Args:
        predicted, expected: (B, P, 2) distances to the start and to the end, in segments.
        positive: (B, P) bool.
    """
    # Elsewhere the expected distances may be negative, and the gradient of a NaN would pass through the mask.
    expected = torch.where(positive[..., None], expected, 1.0)
    overlap = torch.minimum(predicted, expected).sum(-1)
    union = predicted.sum(-1) + expected.sum(-1) - overlap
    return torch.where(positive, torch.log((union + 1e-8) / (overlap + 1e-8)), 0.0)


def proposal_overlap(distances: Tensor, truth: Tensor, config: DRNConfig, options: LossOptions) -> Tensor:
    """Return the overlap of each location's proposal with the moment, divided by their hull, (B, P).

    Args:
        distances: (B, P, 2) to the start and to the end, in segments.
        truth: (B, 2) moments as fractions of the video.
        options: which proposals are clamped to the video.
    """
    center = locations(config, truth.device)
    spans = torch.stack((center - distances[..., 0], center + distances[..., 1]), dim=-1) / config.num_segments
    if options.iou_clip == "all":
        spans = spans.clamp(0, 1)
    else:
        spans = torch.cat((spans[:, :1].clamp(0, 1), spans[:, 1:]), dim=1)
    truth = truth[:, None]
    overlap = torch.minimum(spans[..., 1], truth[..., 1]) - torch.maximum(spans[..., 0], truth[..., 0])
    hull = torch.maximum(spans[..., 1], truth[..., 1]) - torch.minimum(spans[..., 0], truth[..., 0])
    return overlap.clamp(min=0) / (hull + 1e-6)
