"""Take eager training steps as mmaction2's DRN does, as the baseline of the training benchmark.

The layers are those of `train.network`, which agree with mmaction2's to rounding. As in mmaction2, batches are lists,
sorted by query length; positions are computed for three levels, of which one is used; targets are assigned per video
and level; stage 2 computes everything and detaches; Adam updates all parameters one by one.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn
from torch.nn import functional

from train.network.losses import DISTANCE_RANGES, FOCAL_ALPHA, FOCAL_GAMMA, IOU_TARGET_THRESHOLD
from train.network.model import DRN
from train.training.recipes import Stage


@dataclasses.dataclass(frozen=True)
class Sample:
    """A query and the segments of its video: tokens (L,) int64, features (T, D), spans (T, 2), truth (2,)."""

    tokens: Tensor
    features: Tensor
    spans: Tensor
    truth: Tensor


class EagerTraining:
    """Takes training steps of a stage."""

    def __init__(self, model: DRN, stage: Stage, clip_norm: float = 5.0) -> None:
        self.model, self.stage, self.clip_norm = model.train(), stage, clip_norm
        self.parameters = list(model.requires_grad_(True).parameters())
        self.optimizer = torch.optim.Adam(self.parameters, lr=stage.learning_rate, foreach=False, fused=False)
        self.points = [
            torch.arange(0, model.config.num_segments, stride, dtype=torch.float32) + stride / 2
            for stride in model.config.strides
        ]

    def step(self, samples: list[Sample]) -> dict[str, float]:
        """Take an optimizer step, and return the losses."""
        losses = self.losses(samples)
        self.optimizer.zero_grad()
        sum(loss.mean() for loss in losses.values()).backward()
        nn.utils.clip_grad_norm_([p for p in self.parameters if p.grad is not None], self.clip_norm)
        self.optimizer.step()
        return {name: float(loss.detach().mean()) for name, loss in losses.items()}

    def losses(self, samples: list[Sample]) -> dict[str, Tensor]:
        """Return the three losses of a batch."""
        samples = sorted(samples, key=lambda sample: -len(sample.tokens))
        heads = self._head(self._pyramid(samples))
        truths = [sample.truth * self.model.config.num_segments for sample in samples]
        labels, expected = self._targets(truths)
        matching = torch.cat([level[0].permute(0, 2, 1).reshape(-1) for level in heads])
        distances = torch.cat([level[1].permute(0, 2, 1).reshape(-1, 2) for level in heads])
        positive = torch.nonzero(labels).squeeze(1)
        losses = {"matching": _focal(matching, labels).sum() / (len(positive) + len(samples))}
        predicted, expected = distances[positive], expected[positive]
        losses["boundary"] = _distance_loss(predicted, expected).mean() if len(positive) else predicted.sum()
        if self.stage.number == 2:
            losses = {name: loss.detach() for name, loss in losses.items()}
        losses["iou"] = self._iou_loss(heads, samples)
        return losses

    def _pyramid(self, samples: list[Sample]) -> list[Tensor]:
        model = self.model
        features = torch.stack([sample.features for sample in samples])
        lengths = torch.tensor([len(sample.tokens) for sample in samples])
        tokens = torch.zeros(len(samples), int(lengths[0]), dtype=torch.int64)
        for row, sample in enumerate(samples):
            tokens[row, : len(sample.tokens)] = sample.tokens
        words = model.query_encoder.embedding(tokens)
        packed = nn.utils.rnn.pack_padded_sequence(words, lengths, batch_first=True)
        outputs, _ = nn.utils.rnn.pad_packed_sequence(model.query_encoder.biLSTM(packed)[0], batch_first=True)
        queries = model.query_encoder.attend(outputs, lengths)
        spans = torch.stack([sample.spans for sample in samples])
        positions = []
        for level in range(3):
            if level == 1:
                # Unused, but computed by mmaction2.
                spans = torch.stack((spans[:, ::2, 0], spans[:, 1::2, 1]), dim=-1)
            duration = spans[..., 1:] - spans[..., :1]
            positions.append(model.position_transform(torch.cat((spans, duration), dim=-1).float()).permute(0, 2, 1))
        level_input = model.prop_fc(features).permute(0, 2, 1)
        levels = []
        for level, layer in enumerate(model.backbone_net.layers):
            level_input = model.qInput[level](queries[level])[:, :, None] * level_input
            if level == 0:
                level_input = torch.cat((level_input, positions[0]), dim=1)
            level_input = layer(level_input)
            levels.append(level_input)
        pyramid = model.fpn(levels)
        return [level.detach() for level in pyramid] if self.stage.number == 2 else pyramid

    def _head(self, pyramid: list[Tensor]) -> list[tuple[Tensor, Tensor, Tensor]]:
        head, levels = self.model.fcos.head, []
        for features, scale in zip(pyramid, head.scales, strict=True):
            matching_features, boundary_features = head.cls_tower(features), head.bbox_tower(features)
            matching = head.cls_logits(matching_features)
            distances = torch.exp(scale(head.bbox_pred(boundary_features)))
            mixed = torch.cat((matching_features, boundary_features), dim=1)
            if self.stage.number == 2:
                mixed, distances = mixed.detach(), distances.detach()
            levels.append((matching, distances, head.iou_scores(head.mix_fc(mixed))))
        return levels

    def _targets(self, truths: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Return labels (P * B,) and distances (P * B, 2) of all locations, level by level."""
        points = torch.cat(self.points)
        ranges = torch.cat(
            [
                torch.tensor(bounds)[None].expand(len(level), -1)
                for bounds, level in zip(DISTANCE_RANGES, self.points, strict=True)
            ]
        )
        sizes = [len(level) for level in self.points]
        labels, distances = [], []
        for truth in truths:
            both = torch.stack((points - truth[0], truth[1] - points), dim=1)
            farther = both.max(dim=1)[0]
            inside = both.min(dim=1)[0] > 0
            labels.append((inside & (farther >= ranges[:, 0]) & (farther <= ranges[:, 1])).float().split(sizes))
            distances.append(both.split(sizes))
        return (
            torch.cat([torch.cat([video[level] for video in labels]) for level in range(3)]),
            torch.cat([torch.cat([video[level] for video in distances]) for level in range(3)]),
        )

    def _iou_loss(self, heads: list[tuple[Tensor, Tensor, Tensor]], samples: list[Sample]) -> Tensor:
        if self.stage.number == 1:
            return torch.zeros(1)
        segments, proposals, scores = self.model.config.num_segments, [], []
        for points, (_, distances, score) in zip(self.points, heads, strict=True):
            start, end = points - distances[:, 0], points + distances[:, 1]
            proposals.append((torch.stack((start, end), dim=-1) / segments).clamp(0, 1))
            scores.append(score.squeeze(1))
        boxes, logits = torch.cat(proposals, dim=1), torch.cat(scores, dim=1)
        truth = torch.stack([sample.truth for sample in samples])[:, None]
        overlap = (torch.min(boxes[..., 1], truth[..., 1]) - torch.max(boxes[..., 0], truth[..., 0])).clamp(min=0)
        hull = torch.max(boxes[..., 1], truth[..., 1]) - torch.min(boxes[..., 0], truth[..., 0])
        target = overlap / (hull + 1e-6)
        near = target > IOU_TARGET_THRESHOLD
        if not near.any():
            # The published stage 2 fails here.
            return 0 * logits.sum()
        return functional.smooth_l1_loss(logits[near].sigmoid(), target[near])


def _focal(logits: Tensor, labels: Tensor) -> Tensor:
    p = logits.sigmoid()
    entropy = functional.binary_cross_entropy_with_logits(logits, labels, reduction="none")
    p_true = p * labels + (1 - p) * (1 - labels)
    return (FOCAL_ALPHA * labels + (1 - FOCAL_ALPHA) * (1 - labels)) * entropy * (1 - p_true) ** FOCAL_GAMMA


def _distance_loss(predicted: Tensor, expected: Tensor) -> Tensor:
    overlap = torch.min(predicted, expected).sum(dim=1)
    union = predicted.sum(dim=1) + expected.sum(dim=1) - overlap
    return -torch.log((overlap + 1e-8) / (union + 1e-8))
