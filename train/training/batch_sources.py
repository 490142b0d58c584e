"""Deliver the batches of a training step from host memory, device memory, or cached stem outputs.

A source yields the inputs of its network and the moments, (B, 2), for every batch of an epoch, on the device.
Mismatched pairs follow those that match, and have no moments.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from runtime.core.batch import pad_queries
from train.network.model import DRN, NetworkHeads, Stem
from train.training.dataset import TrainingData, append_mismatched

log = logging.getLogger("drn")

Step = tuple[tuple[Tensor, ...], Tensor]
# What a host may spend on the stems of a data set, as it does on nothing else: Charades-STA takes 0.4.
STEM_GIB = 4
# Pairs whose stems are computed together. Fixed, so that a run that is resumed computes the same bits.
STEM_PAIRS = 64


class Source(Protocol):
    def batches(self, epoch: Sequence[np.ndarray], mismatched: Sequence[np.ndarray] | None = None) -> Iterator[Step]:
        """Yield inputs and moments of every batch of `epoch`, given by the indices of its queries, with the batch's
        pairs of `mismatched` (`TrainingData.mismatched`)."""
        ...


def open_source(data: TrainingData, device: torch.device) -> Source:
    """Return where batches for `device` come from: its own memory, if it is a GPU that holds all features twice."""
    if device.type == "cpu":
        return HostSource(data, device)
    needed, free = data.pooled.features.nbytes, torch.cuda.mem_get_info(device)[0]
    if 2 * needed <= free:
        return DeviceSource(data, device)
    log.info("The features (%.1f GiB) stay on the host: %s has %.1f GiB free.", needed / 2**30, device, free / 2**30)
    return HostSource(data, device, workers=2)


class HostSource:
    """Batches are put together from the memory-mapped features; by other processes, ahead, where there are any."""

    def __init__(self, data: TrainingData, device: torch.device, workers: int = 0) -> None:
        self.data, self.device, self.workers = data, device, workers

    def batches(self, epoch: Sequence[np.ndarray], mismatched: Sequence[np.ndarray] | None = None) -> Iterator[Step]:
        loader = torch.utils.data.DataLoader(
            _Batches(self.data, epoch, mismatched),
            batch_size=None,
            num_workers=self.workers,
            prefetch_factor=4 if self.workers else None,
            multiprocessing_context="fork" if self.workers else None,
            # Copies from pinned memory alone run beside the arithmetic.
            pin_memory=self.device.type == "cuda",
        )
        for (tokens, lengths, *rest), truth in loader:
            tokens, *rest, truth = (t.to(self.device, non_blocking=True) for t in (tokens, *rest, truth))
            # Lengths stay on the CPU: see `QueryEncoder.forward`.
            yield (tokens, lengths, *rest), truth


class DeviceSource:
    """All features and sentences lie in the device's memory, and a batch is a few look-ups there."""

    def __init__(self, data: TrainingData, device: torch.device) -> None:
        tokens, lengths = pad_queries(data.queries)
        self.lengths = torch.from_numpy(lengths)
        self.tokens = torch.from_numpy(tokens).to(device)
        self.rows = torch.from_numpy(data.video_rows).to(device)
        features = data.pooled.features
        if data.blind:
            features = np.zeros(features.shape, features.dtype)
        self.features = torch.empty(features.shape, dtype=getattr(torch, features.dtype.name), device=device)
        for row, segments in enumerate(features):
            # A copy of one video, since torch takes no read-only memory map.
            self.features[row] = torch.from_numpy(np.array(segments))
        self.spans = torch.from_numpy(data.pooled.spans.astype(np.float32)).to(device)
        self.truth = torch.from_numpy(data.truth).to(device)
        self.device = device

    def batches(self, epoch: Sequence[np.ndarray], mismatched: Sequence[np.ndarray] | None = None) -> Iterator[Step]:
        requested = (
            np.stack((epoch, epoch), 1) if mismatched is None else list(map(append_mismatched, epoch, mismatched))
        )
        for (chosen, _), (queries, videos) in _on_both(requested, self.device):
            lengths, rows = self.lengths[chosen], self.rows[videos]
            tokens = self.tokens[queries, : int(lengths.max())]
            truth = self.truth[queries[: len(epoch[0])]]
            yield (tokens, lengths, self.features[rows].float(), self.spans[rows]), truth


class CachedStemSource:
    """The output of a frozen stem for each pair, computed once for all epochs of a stage.

    Not further: batch norm takes the statistics of its batch in every stage, as published, so that all behind it
    depends on who is in a batch, and moves its running statistics at every step.
    """

    def __init__(self, data: TrainingData, model: DRN, device: torch.device, autocast: torch.dtype | None) -> None:
        self.device = device
        self.truth = torch.from_numpy(data.truth).to(device)
        self.stem = _stems(data, model, device, autocast)

    def batches(self, epoch: Sequence[np.ndarray], mismatched: Sequence[np.ndarray] | None = None) -> Iterator[Step]:
        assert mismatched is None, "stems are those of matching pairs"
        for _, here in _on_both(epoch, self.device):
            yield tuple(part[here] for part in self.stem), self.truth[here]


class StemContinuation(nn.Module):
    """The rest of a network, for what a CachedStemSource yields."""

    def __init__(self, model: DRN) -> None:
        super().__init__()
        self.model = model

    def forward(self, *stem: Tensor) -> NetworkHeads:
        return self.model.score(Stem(*stem))


def stems_fit(data: TrainingData, model: DRN, device: torch.device) -> bool:
    """Return whether the stems of all pairs fit into half of a GPU's free memory, or 4 GiB of the host's."""
    # Before the first gradient a float32 is the most that a number takes.
    channels = [layer[0].out_channels for layer in model.backbone_net.layers]
    needed = 4 * len(data) * (channels[0] * model.config.num_segments + channels[0] + channels[1])
    room = torch.cuda.mem_get_info(device)[0] // 2 if device.type == "cuda" else STEM_GIB * 2**30
    if needed > room:
        log.info(
            "Stage 2 computes its frozen part at every step: kept for all %d queries, it would take %.1f GiB, and %.1f "
            "can be had.", len(data), needed / 2**30, room / 2**30,
        )  # fmt: skip
    return needed <= room


@torch.no_grad()
def _stems(data: TrainingData, model: DRN, device: torch.device, autocast: torch.dtype | None) -> Stem:
    """Return the stems of all pairs in the order of the data set; each video is projected once for its queries."""
    tables: Stem | None = None
    by_video = np.argsort(data.video_rows, kind="stable")
    for start in range(0, len(by_video), STEM_PAIRS):
        chosen = by_video[start : start + STEM_PAIRS]
        rows, location = np.unique(data.video_rows[chosen], return_inverse=True)
        tokens, lengths = (torch.from_numpy(array) for array in pad_queries([data.queries[index] for index in chosen]))
        features = torch.from_numpy(data.features(rows)).to(device)
        spans = torch.from_numpy(data.pooled.spans[rows[location]].astype(np.float32)).to(device)
        with torch.autocast(device.type, autocast, enabled=autocast is not None):
            projected = model.prop_fc(features)[torch.from_numpy(location).to(device)]
            stem = model.stem(tokens.to(device), lengths, projected, spans)
        if tables is None:
            tables = Stem(*(part.new_empty(len(data), *part.shape[1:]) for part in stem))
        for table, part in zip(tables, stem, strict=True):
            table[torch.from_numpy(chosen).to(device)] = part
    assert tables is not None
    return tables


def _on_both(epoch: Sequence[np.ndarray], device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the indices of every batch on the host and on the device, where they are copied once per epoch."""
    host = torch.from_numpy(np.stack(epoch))
    yield from zip(host, host.to(device), strict=True)


class _Batches(torch.utils.data.Dataset):
    """The batches of one epoch by number, for torch's loader."""

    def __init__(
        self, data: TrainingData, epoch: Sequence[np.ndarray], mismatched: Sequence[np.ndarray] | None
    ) -> None:
        self.data, self.epoch, self.mismatched = data, epoch, mismatched

    def __len__(self) -> int:
        return len(self.epoch)

    def __getitem__(self, index: int) -> Step:
        batch = self.data.batch(self.epoch[index], self.mismatched[index] if self.mismatched else None)
        return tuple(torch.from_numpy(array) for array in vars(batch.inputs).values()), torch.from_numpy(batch.truth)
