"""What people run today, written once to compare with: eager PyTorch, one query at a time, NMS over Python lists.

The network is ours with the same weights (it agrees with mmaction2's to rounding); the way of calling it and what
stands around it follow mmaction2's DRN: batch 1, boxes and scores level by level with torch, soft-NMS over lists.
"""

from __future__ import annotations

import math

import numpy as np
import torch

from runtime.core.video import Video
from train.checkpoints import Checkpoint
from train.network.model import DRN, locations


class EagerBaseline:
    """Answers one query at a time."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.model: DRN = checkpoint.model()
        self.vocabulary = checkpoint.vocabulary
        self.decoding = checkpoint.decoding
        self.features = checkpoint.features

    @torch.no_grad()
    def ground(self, video: Video, query: str) -> list[tuple[float, float, float]]:
        """Return (start, end, score) in seconds, best first, at most six."""
        tokens = torch.from_numpy(self.vocabulary.encode(query))[None]
        segments = video.segments(self.decoding.num_segments, self.features.pooling, self.features.clock)
        features = torch.from_numpy(segments.features.astype(np.float32))[None]
        spans = torch.from_numpy(segments.spans)[None]
        heads = self.model(tokens, torch.tensor([tokens.shape[1]]), features, spans)
        rows = self._rows(heads.matching_logits[0], heads.boundary_distances[0], heads.iou_logits[0])
        return [(start * video.duration, end * video.duration, score) for start, end, score in soft_nms(rows)]

    def _rows(self, matching: torch.Tensor, distances: torch.Tensor, overlap: torch.Tensor) -> list[list[float]]:
        centre = locations(self.model.config)
        segments = self.decoding.num_segments
        rows: list[list[float]] = []
        start = 0
        for stride in self.decoding.strides:
            level = slice(start, start + segments // stride)
            start = level.stop
            p = matching[level].sigmoid()
            kept = p > self.decoding.score_threshold
            score = (p * overlap[level].sigmoid() if self.decoding.use_iou_scores else p)[kept].sqrt()
            box = torch.stack((centre[level] - distances[level, 0], centre[level] + distances[level, 1]), 1)[kept]
            box = (box / segments).clamp(0, 1)
            rows += torch.cat((box, score[:, None]), 1).tolist()
        return rows or [[0.0, 1.0, 1.0]]


def soft_nms(rows: list[list[float]], count: int = 6) -> list[tuple[float, float, float]]:
    """Suppress over plain lists, as the published code does; see `runtime.core.decoding.soft_nms` for the rule."""
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
