"""Load the batches of training steps from host memory, device memory, or cached stem outputs."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from runtime.core.batch import pad_queries
from train.network.model import BACKBONE_CHANNELS, DRN, NetworkHeads, Stem
from train.training.dataset import TrainingData, query_video_pairs

log = logging.getLogger("drn")

Step = tuple[tuple[Tensor, ...], Tensor]
# Maximum size of cached stem outputs on a host. Those of Charades-STA take 0.4 GiB.
STEM_GIB = 4
# Batch size of the stem. Fixed, so that a resumed run computes the same bits.
STEM_PAIRS = 64


class Source(Protocol):
    """Yields the batches of an epoch."""

    def batches(self, epoch: Sequence[np.ndarray], mismatched: Sequence[np.ndarray] | None = None) -> Iterator[Step]:
        """Yield the inputs of the network and the (B, 2) moments of every batch, on the device.

        Args:
            epoch: (B,) int indices of the queries of each batch.
            mismatched: (2, M) int for each batch, as `TrainingData.mismatched` returns them: indices of queries, and of
                queries of other videos. These pairs follow the matching pairs in the inputs, and have no moments.
        """
        ...


def open_source(data: TrainingData, device: torch.device) -> Source:
    """Return a `DeviceSource` if `device` is a GPU with free memory for all features twice, else a `HostSource`."""
    if device.type == "cpu":
        return HostSource(data, device)
    needed, free = data.pooled.features.nbytes, torch.cuda.mem_get_info(device)[0]
    if 2 * needed <= free:
        return DeviceSource(data, device)
    log.info(
        "The features (%.1f GiB) stay in host memory, because %s has %.1f GiB free.",
        needed / 2**30, device, free / 2**30,
    )  # fmt: skip
    return HostSource(data, device, workers=2)


class HostSource:
    """Collates batches from the memory-mapped features, ahead of time if there are worker processes."""

    def __init__(self, data: TrainingData, device: torch.device, workers: int = 0) -> None:
        self.data, self.device, self.workers = data, device, workers

    def batches(self, epoch: Sequence[np.ndarray], mismatched: Sequence[np.ndarray] | None = None) -> Iterator[Step]:
        loader = torch.utils.data.DataLoader(
            _Batches(self.data, epoch, mismatched),
            batch_size=None,
            num_workers=self.workers,
            prefetch_factor=4 if self.workers else None,
            multiprocessing_context="fork" if self.workers else None,
            # Only copies from pinned memory run concurrently with kernels.
            pin_memory=self.device.type == "cuda",
        )
        for (tokens, lengths, *rest), truth in loader:
            tokens, *rest, truth = (t.to(self.device, non_blocking=True) for t in (tokens, *rest, truth))
            # Lengths stay on the CPU; see `QueryEncoder.forward`.
            yield (tokens, lengths, *rest), truth


class DeviceSource:
    """Indexes batches from the features and queries of all pairs in device memory."""

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
            # A copy, because torch does not accept a read-only memory map.
            self.features[row] = torch.from_numpy(np.array(segments))
        self.spans = torch.from_numpy(data.pooled.spans.astype(np.float32)).to(device)
        self.truth = torch.from_numpy(data.truth).to(device)
        self.device = device

    def batches(self, epoch: Sequence[np.ndarray], mismatched: Sequence[np.ndarray] | None = None) -> Iterator[Step]:
        pairs = [query_video_pairs(*batch) for batch in itertools.zip_longest(epoch, mismatched or ())]
        for (host_queries, _), (queries, videos) in _on_both(pairs, self.device):
            lengths, rows = self.lengths[host_queries], self.rows[videos]
            tokens = self.tokens[queries, : int(lengths.max())]
            truth = self.truth[queries[: len(epoch[0])]]
            yield (tokens, lengths, self.features[rows].float(), self.spans[rows]), truth


class CachedStemSource:
    """Indexes batches from the outputs of a frozen stem, computed once for all epochs of a stage.

    Later layers cannot be cached: as published, batch norm uses the statistics of the batch in every stage, and updates
    its running statistics at every step.
    """

    def __init__(self, data: TrainingData, model: DRN, device: torch.device, autocast: torch.dtype | None) -> None:
        self.device = device
        self.truth = torch.from_numpy(data.truth).to(device)
        self.stem = _stems(data, model, device, autocast)

    def batches(self, epoch: Sequence[np.ndarray], mismatched: Sequence[np.ndarray] | None = None) -> Iterator[Step]:
        assert mismatched is None, "the cache has the stem outputs of matching pairs only"
        for _, indices in _on_both(epoch, self.device):
            yield tuple(output[indices] for output in self.stem), self.truth[indices]


class StemContinuation(nn.Module):
    """The layers after the stem, for the inputs that a `CachedStemSource` yields."""

    def __init__(self, model: DRN) -> None:
        super().__init__()
        self.model = model

    def forward(self, *stem: Tensor) -> NetworkHeads:
        return self.model.score(Stem(*stem))


def stems_fit(data: TrainingData, model: DRN, device: torch.device) -> bool:
    """Return whether the stem outputs of all pairs fit into half of the free memory of a GPU, or 4 GiB of the host."""
    first, second, _ = BACKBONE_CHANNELS
    needed = 4 * len(data) * (first * model.config.num_segments + first + second)
    available = torch.cuda.mem_get_info(device)[0] // 2 if device.type == "cuda" else STEM_GIB * 2**30
    if needed > available:
        log.info(
            "Stage 2 computes its frozen layers at every step: a cache for %d queries would take %.1f GiB of %.1f GiB.",
            len(data), needed / 2**30, available / 2**30,
        )  # fmt: skip
    return needed <= available


@torch.no_grad()
def _stems(data: TrainingData, model: DRN, device: torch.device, autocast: torch.dtype | None) -> Stem:
    """Return the stem outputs of all pairs in the order of the data set; each video is projected once per batch."""
    tables: Stem | None = None
    by_video = np.argsort(data.video_rows, kind="stable")
    for start in range(0, len(by_video), STEM_PAIRS):
        pairs = by_video[start : start + STEM_PAIRS]
        rows, inverse = np.unique(data.video_rows[pairs], return_inverse=True)
        tokens, lengths = (torch.from_numpy(array) for array in pad_queries([data.queries[index] for index in pairs]))
        features = torch.from_numpy(data.features(rows)).to(device)
        spans = torch.from_numpy(data.pooled.spans[rows[inverse]].astype(np.float32)).to(device)
        with torch.autocast(device.type, autocast, enabled=autocast is not None):
            projected = model.prop_fc(features)[torch.from_numpy(inverse).to(device)]
            stem = model.stem(tokens.to(device), lengths, projected, spans)
        if tables is None:
            tables = Stem(*(output.new_empty(len(data), *output.shape[1:]) for output in stem))
        for table, output in zip(tables, stem, strict=True):
            table[torch.from_numpy(pairs).to(device)] = output
    assert tables is not None
    return tables


def _on_both(epoch: Sequence[np.ndarray], device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the indices of every batch on the host and on the device, copied there once per epoch."""
    host = torch.from_numpy(np.stack(epoch))
    yield from zip(host, host.to(device), strict=True)


class _Batches(torch.utils.data.Dataset[Step]):
    """The batches of an epoch, for torch's `DataLoader`."""

    def __init__(
        self, data: TrainingData, epoch: Sequence[np.ndarray], mismatched: Sequence[np.ndarray] | None
    ) -> None:
        self.data, self.epoch, self.mismatched = data, epoch, mismatched

    def __len__(self) -> int:
        return len(self.epoch)

    def __getitem__(self, index: int) -> Step:
        batch = self.data.batch(self.epoch[index], self.mismatched[index] if self.mismatched else None)
        return tuple(torch.from_numpy(array) for array in vars(batch.inputs).values()), torch.from_numpy(batch.truth)
