"""Run the network in torch on a GPU as fast as possible, with CUDA graphs or torch.compile, as baselines for engines.

Batch norm is folded, and the BiLSTM runs without packing, because a CUDA graph cannot vary lengths on the host.
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
    """A query encoder with two forward LSTMs, of which the second reads the reversed queries."""

    def __init__(self, config: DRNConfig, source: QueryEncoder) -> None:
        if config.lstm_layers != 1:
            raise GroundingError(
                f"Expected one LSTM layer, got {config.lstm_layers}. Use a network of one layer.",
                code="unsupported_lstm",
            )
        super().__init__(config)
        self.load_state_dict(source.state_dict())
        self.forwards, self.backwards = (self._direction(config, suffix) for suffix in ("", "_reverse"))

    def _direction(self, config: DRNConfig, suffix: str) -> nn.LSTM:
        lstm = nn.LSTM(config.embed_dim, config.hidden_dim, batch_first=True)
        lstm.load_state_dict({name: getattr(self.biLSTM, f"{name}{suffix}") for name in lstm.state_dict()})
        return lstm

    def words(self, query_tokens: Tensor, query_length: Tensor) -> Tensor:
        """Return the BiLSTM's outputs, (B, L, 2H); values past each length are finite and unused."""
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
    """Return a copy of a network that CUDA graphs support, in evaluation mode, with weights in `dtype`."""
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
        # Spans stay in float32, because half precision has a resolution of a thousandth of a video.
        model.position_transform = nn.Sequential(model.position_transform.float(), _To(dtype))
    return model.requires_grad_(False).eval()


class JoinedHeads(nn.Module):
    """A network whose heads are one tensor, (B, P, 4) float32, which one copy transfers.

    Attributes:
        encoded: whether its third input is the output of `prop_fc` instead of the segments.
    """

    def __init__(self, model: DRN, encoded: bool) -> None:
        super().__init__()
        self.model, self.encoded = model, encoded

    def forward(self, tokens: Tensor, lengths: Tensor, features: Tensor, spans: Tensor) -> Tensor:
        projected = features if self.encoded else self.model.prop_fc(features)
        heads = self.model.score(self.model.stem(tokens, lengths, projected, spans))
        return joined_heads(heads)


def joined_heads(heads: NetworkHeads) -> Tensor:
    """Return (B, P, 4) float32: matching logit, two distances, IoU logit."""
    matching, distances, overlap = (tensor.float() for tensor in heads)
    return torch.cat((matching[:, :, None], distances, overlap[:, :, None]), dim=2)


Runner = Callable[[Sequence[Tensor]], Tensor]


class Graphs:
    """A network as CUDA graphs, one per input shape, captured at its first use."""

    def __init__(self, network: nn.Module, device: torch.device) -> None:
        self._network, self._device = network, device
        self._captured: dict[tuple[Any, ...], tuple[torch.cuda.CUDAGraph, list[Tensor], Tensor]] = {}

    @torch.inference_mode()
    def __call__(self, inputs: Sequence[Tensor]) -> Tensor:
        key = tuple((tuple(tensor.shape), tensor.dtype) for tensor in inputs)
        if key not in self._captured:
            self._captured[key] = self._capture(inputs)
        graph, buffers, outputs = self._captured[key]
        for buffer, tensor in zip(buffers, inputs):
            buffer.copy_(tensor, non_blocking=True)
        graph.replay()
        return outputs

    def _capture(self, inputs: Sequence[Tensor]) -> tuple[torch.cuda.CUDAGraph, list[Tensor], Tensor]:
        buffers = [tensor.to(self._device, copy=True) for tensor in inputs]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP_RUNS):
                self._network(*buffers)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs = self._network(*buffers)
        return graph, buffers, outputs


class TorchBaseline:
    """A way to run the network in torch, from arrays to heads, with features in device memory.

    Args:
        model: the network, on its device.
        kind: eager, compile (torch.compile, which uses CUDA graphs itself) or graphs.
        dtype: data type of weights and features.
        encoded: whether `to_device` encodes videos; else every run does.
    """

    def __init__(self, model: DRN, kind: str, dtype: torch.dtype, encoded: bool) -> None:
        self.device = next(model.parameters()).device
        self.dtype, self.encoded = dtype, encoded
        self._model = unpacked(model, dtype)
        network: nn.Module = JoinedHeads(self._model, encoded)
        self.run: Runner
        if kind == "graphs":
            self.run = Graphs(network, self.device)
        else:
            called = torch.compile(network, mode="reduce-overhead", dynamic=False) if kind == "compile" else network
            self.run = torch.inference_mode()(lambda inputs: called(*(t.to(self.device) for t in inputs)))

    @torch.inference_mode()
    def to_device(self, features: np.ndarray, spans: np.ndarray) -> tuple[Tensor, Tensor]:
        """Return the (B, T, D) segments, or their encodings, and the (B, T, 2) spans on the device."""
        tensor = torch.from_numpy(features).to(self.device, self.dtype)
        if self.encoded:
            tensor = self._model.prop_fc(tensor)
        return tensor, torch.from_numpy(spans).to(self.device)

    def ask(self, tokens: np.ndarray, lengths: np.ndarray, on_device: tuple[Tensor, Tensor]) -> Heads:
        """Return the heads of queries with features on the device."""
        rows = self.run([torch.from_numpy(tokens), torch.from_numpy(lengths), *on_device]).cpu().numpy()
        return Heads(*(np.ascontiguousarray(part) for part in (rows[:, :, 0], rows[:, :, 1:3], rows[:, :, 3])))

    def heads(self, batch: Batch) -> Heads:
        """Copy the features of a batch to the device, and return its heads."""
        on_device = self.to_device(batch.segment_features, batch.segment_spans)
        return self.ask(batch.query_tokens, batch.query_length, on_device)
