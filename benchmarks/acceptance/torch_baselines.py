"""Run the network in torch at its fastest on a GPU: CUDA graphs or compiled, FP32 or half precision.

What `benchmarks.gpu` holds our engines against. The weights are the same; batch norm is folded, and the BiLSTM runs
without packing, whose lengths on the host no CUDA graph could vary.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from runtime.core.batch import Batch, Heads
from runtime.core.errors import GroundingError
from train.network.model import DRN, DRNConfig, NetworkHeads, QueryEncoder

WARM_UP_RUNS = 3


class UnpackedEncoder(QueryEncoder):
    """The query encoder with two LSTMs that both run forward; the second reads each query from its end."""

    def __init__(self, config: DRNConfig, source: QueryEncoder) -> None:
        if config.lstm_layers != 1:
            raise GroundingError(f"The rivals are for one LSTM layer, and this network has {config.lstm_layers}.")
        super().__init__(config)
        self.load_state_dict(source.state_dict())
        self.forwards, self.backwards = (self._direction(config, suffix) for suffix in ("", "_reverse"))

    def _direction(self, config: DRNConfig, suffix: str) -> nn.LSTM:
        lstm = nn.LSTM(config.embed_dim, config.hidden_dim, batch_first=True)
        lstm.load_state_dict({name: getattr(self.biLSTM, f"{name}{suffix}") for name in lstm.state_dict()})
        return lstm

    def words(self, query_tokens: Tensor, query_length: Tensor) -> Tensor:
        """Return the BiLSTM's outputs, (B, L, 2H); garbage, but finite, past each length, where no one looks."""
        embedded = self.embedding(query_tokens)
        steps = torch.arange(query_tokens.shape[1], device=query_tokens.device)
        mirror = (query_length[:, None] - 1 - steps).clamp(min=0).long()[:, :, None]
        backwards = self.backwards(embedded.gather(1, mirror.expand_as(embedded)))[0]
        backwards = backwards.gather(1, mirror.expand_as(backwards))
        return torch.cat((self.forwards(embedded)[0], backwards), dim=2)


class _To(nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def forward(self, values: Tensor) -> Tensor:
        return values.to(self.dtype)


def unpacked(model: DRN, dtype: torch.dtype = torch.float32) -> DRN:
    """Return a copy of a network that a CUDA graph can hold, in evaluation mode, its weights in `dtype`."""
    model = copy.deepcopy(model).eval()
    model.query_encoder = UnpackedEncoder(model.config, model.query_encoder).to(next(model.parameters()).device)
    for block in list(model.modules()):
        if not isinstance(block, nn.Sequential):
            continue
        for index in range(len(block) - 1):
            if isinstance(block[index], nn.Conv1d) and isinstance(block[index + 1], nn.BatchNorm1d):
                block[index], block[index + 1] = fuse_conv_bn_eval(block[index], block[index + 1]), nn.Identity()
    if dtype != torch.float32:
        model.to(dtype)
        # Spans stay in float32 up to here: half precision knows thousandths of a video at best.
        model.position_transform = nn.Sequential(model.position_transform.float(), _To(dtype))
    return model.requires_grad_(False).eval()


class Asked(nn.Module):
    """A network for inputs on the device, its heads side by side, (B, P, 4) float32, so that one copy brings them.

    Attributes:
        encoded: whether its third input is what `prop_fc` makes of a video, in place of the segments.
    """

    def __init__(self, model: DRN, encoded: bool) -> None:
        super().__init__()
        self.model, self.encoded = model, encoded

    def forward(self, tokens: Tensor, lengths: Tensor, features: Tensor, spans: Tensor) -> Tensor:
        projected = features if self.encoded else self.model.prop_fc(features)
        heads = self.model.score(self.model.stem(tokens, lengths, projected, spans))
        return side_by_side(heads)


def side_by_side(heads: NetworkHeads) -> Tensor:
    """Return (B, P, 4) float32: matching logit, two distances, IoU logit."""
    matching, distances, overlap = (tensor.float() for tensor in heads)
    return torch.cat((matching[:, :, None], distances, overlap[:, :, None]), dim=2)


Runner = Callable[[Sequence[Tensor]], Tensor]


class Graphs:
    """A network as CUDA graphs, one for each shape of its inputs, captured when it first comes."""

    def __init__(self, network: nn.Module, device: torch.device) -> None:
        self._network, self._device = network, device
        self._captured: dict[tuple[Any, ...], tuple[torch.cuda.CUDAGraph, list[Tensor], Tensor]] = {}

    @torch.inference_mode()
    def __call__(self, inputs: Sequence[Tensor]) -> Tensor:
        key = tuple((tuple(tensor.shape), tensor.dtype) for tensor in inputs)
        if key not in self._captured:
            self._captured[key] = self._capture(inputs)
        graph, places, outputs = self._captured[key]
        for place, tensor in zip(places, inputs):
            place.copy_(tensor, non_blocking=True)
        graph.replay()
        return outputs

    def _capture(self, inputs: Sequence[Tensor]) -> tuple[torch.cuda.CUDAGraph, list[Tensor], Tensor]:
        places = [tensor.to(self._device, copy=True) for tensor in inputs]
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(WARM_UP_RUNS):
                self._network(*places)
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs = self._network(*places)
        return graph, places, outputs


class Rival:
    """A way to run the network in torch, from arrays to heads.

    Args:
        model: the network, on its device.
        kind: eager, compile (torch.compile, which chooses CUDA graphs itself) or graphs.
        dtype: of weights and features.
        encoded: whether videos are encoded beforehand; else the whole network is run each time.

    Features lie on the device in either case: `place` puts them there.
    """

    def __init__(self, model: DRN, kind: str, dtype: torch.dtype, encoded: bool) -> None:
        self.device = next(model.parameters()).device
        self.dtype, self.encoded = dtype, encoded
        self._model = unpacked(model, dtype)
        network: nn.Module = Asked(self._model, encoded)
        self.run: Runner
        if kind == "graphs":
            self.run = Graphs(network, self.device)
        else:
            called = torch.compile(network, mode="reduce-overhead", dynamic=False) if kind == "compile" else network
            self.run = torch.inference_mode()(lambda inputs: called(*(t.to(self.device) for t in inputs)))

    @torch.inference_mode()
    def place(self, features: np.ndarray, spans: np.ndarray) -> tuple[Tensor, Tensor]:
        """Return (B, T, D) segments, or what they are encoded to, and (B, T, 2) spans on the device."""
        tensor = torch.from_numpy(features).to(self.device, self.dtype)
        if self.encoded:
            tensor = self._model.prop_fc(tensor)
        return tensor, torch.from_numpy(spans).to(self.device)

    def ask(self, tokens: np.ndarray, lengths: np.ndarray, placed: tuple[Tensor, Tensor]) -> Heads:
        """Return the heads of queries about features that lie on the device."""
        rows = self.run([torch.from_numpy(tokens), torch.from_numpy(lengths), *placed]).cpu().numpy()
        return Heads(*(np.ascontiguousarray(part) for part in (rows[:, :, 0], rows[:, :, 1:3], rows[:, :, 3])))

    def heads(self, batch: Batch) -> Heads:
        """Return the heads of a batch, its features copied to the device first."""
        placed = self.place(batch.segment_features, batch.segment_spans)
        return self.ask(batch.query_tokens, batch.query_length, placed)
