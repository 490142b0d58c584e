"""Ground one query at a time in eager PyTorch as mmaction2's DRN does, as the baseline of the CPU benchmark.

The network is that of `train.network`, which agrees with mmaction2's to rounding. As in mmaction2, the batch size is 1,
boxes and scores are computed per level in torch, and soft-NMS runs over Python lists.
"""

from __future__ import annotations

import math

import numpy as np
import torch

from runtime.core.video import Video
from train.checkpoints import Checkpoint
from train.network.model import DRN, locations


class EagerBaseline:
    """Grounds one query at a time, with the network compiled by torch.compile if `compiled`."""

    def __init__(self, checkpoint: Checkpoint, compiled: bool = False) -> None:
        model = checkpoint.model()
        # Queries differ in length.
        self.model: DRN = torch.compile(model, dynamic=True) if compiled else model
        self.vocabulary = checkpoint.vocabulary
        self.decoding = checkpoint.decoding
        self.features = checkpoint.features

    @torch.no_grad()
    def ground(self, video: Video, query: str) -> list[tuple[float, float, float]]:
        """Return at most six (start, end, score), in seconds, best first."""
        tokens = torch.from_numpy(self.vocabulary.encode(query))[None]
        segments = video.segments(self.decoding.num_segments, self.features.pooling, self.features.clock)
        features = torch.from_numpy(segments.features.astype(np.float32))[None]
        spans = torch.from_numpy(segments.spans)[None]
        heads = self.model(tokens, torch.tensor([tokens.shape[1]]), features, spans)
        rows = self._rows(heads.matching_logits[0], heads.boundary_distances[0], heads.iou_logits[0])
        return [(start * video.duration, end * video.duration, score) for start, end, score in soft_nms(rows)]

    def _rows(self, matching: torch.Tensor, distances: torch.Tensor, iou: torch.Tensor) -> list[list[float]]:
        """Return [start, end, score] of all proposals, as fractions of the video."""
        center = locations(self.model.config)
        segments = self.decoding.num_segments
        rows: list[list[float]] = []
        start = 0
        for stride in self.decoding.strides:
            level = slice(start, start + segments // stride)
            start = level.stop
            p = matching[level].sigmoid()
            likely = p > self.decoding.score_threshold
            score = (p * iou[level].sigmoid() if self.decoding.use_iou_scores else p)[likely].sqrt()
            box = torch.stack((center[level] - distances[level, 0], center[level] + distances[level, 1]), 1)[likely]
            box = (box / segments).clamp(0, 1)
            rows += torch.cat((box, score[:, None]), 1).tolist()
        return rows or [[0.0, 1.0, 1.0]]


def soft_nms(rows: list[list[float]], count: int = 6) -> list[tuple[float, float, float]]:
    """Apply soft-NMS to lists, as the published code does; see `runtime.core.decoding.soft_nms` for the rule."""
    rows = sorted(rows, key=lambda row: -row[2])
    picked: list[tuple[float, float, float]] = []
    while rows and len(picked) < count:
        best = max(range(len(rows)), key=lambda index: rows[index][2])
        start, end, score = rows.pop(best)
        for row in rows:
            overlap = max(min(end, row[1]) - max(start, row[0]), 0.0)
            union = (end - start) + (row[1] - row[0]) - overlap
            ratio = overlap / union if union > 0 else 0.0
            if ratio > 0.5 + 0.4 * (end - start):
                row[2] *= math.exp(-(ratio**2) / 0.4)
        picked.append((start, end, score))
    return picked
