"""Define DRN, the Dense Regression Network for video grounding, in the order of the data flow.

Source: Zeng et al., "Dense Regression Network for Video Grounding", CVPR 2020. Parameter names are those of
mmaction2's published checkpoint, so that its state dict loads unchanged. `export/tracing/exportable_model.py` wraps
the network for tracing.

Shape letters: B batch, L query length, T segments, D feature channels, C channels, P locations.
"""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from runtime.core.errors import excerpt

# Channels of the three backbone levels. Both published code bases fail with other values.
BACKBONE_CHANNELS = (256, 512, 1024)
POSITION_CHANNELS = 256
# Larger sizes occur only in damaged files; a vocabulary of this size exceeds that of any language.
MAX_SIZE = 1 << 20
MAX_LAYERS = 64


@dataclasses.dataclass(frozen=True)
class DRNConfig:
    """Sizes of the network. The defaults are those of the published Charades-STA C3D model.

    Attributes:
        vocab_size: number of words; the embedding has one more row, row 0, for padding.
        embed_dim: dimension of the word vectors.
        feature_dim: channels D of the clip features.
        hidden_dim: LSTM hidden size H per direction.
        fpn_dim: channels of the feature pyramid and the heads; even.
        num_segments: number of segments T, a multiple of 4. The weights do not depend on it.
        strides: segments per location, for each level.
        head_convs: convolutions per tower of the head.
        lstm_layers: layers of the BiLSTM.
        prior_probability: initial matching score; a low one keeps the focal loss of a new network small.
    """

    vocab_size: int = 1301
    embed_dim: int = 300
    feature_dim: int = 4096
    hidden_dim: int = 512
    fpn_dim: int = 512
    num_segments: int = 32
    strides: tuple[int, ...] = (1, 2, 4)
    head_convs: int = 1
    lstm_layers: int = 1
    prior_probability: float = 0.01

    def __post_init__(self) -> None:
        object.__setattr__(self, "strides", tuple(self.strides))
        sizes = {name: value for name, value in vars(self).items() if name not in ("strides", "prior_probability")}
        for name, size in sizes.items():
            maximum = MAX_LAYERS if name in ("head_convs", "lstm_layers") else MAX_SIZE
            if not isinstance(size, int) or not 1 <= size <= maximum:
                raise ValueError(f"Expected {name} to be an integer from 1 to {maximum}, got {excerpt(size)}.")
        if self.strides != (1, 2, 4):
            raise ValueError(f"Expected the strides (1, 2, 4), got {excerpt(self.strides)}.")
        if self.num_segments % self.strides[-1]:
            raise ValueError(f"Expected num_segments to be a multiple of {self.strides[-1]}, got {self.num_segments}.")
        prior = self.prior_probability
        if isinstance(prior, bool) or not isinstance(prior, (int, float)) or not 0 < prior < 1:
            raise ValueError(f"Expected a prior_probability between 0 and 1, got {excerpt(prior)}.")
        if self.fpn_dim % 2:
            raise ValueError(f"Expected an even fpn_dim, got {self.fpn_dim}.")

    @property
    def num_locations(self) -> int:
        """Number of locations P: 56 for 32 segments."""
        return sum(self.num_segments // stride for stride in self.strides)


class NetworkHeads(NamedTuple):
    """Raw outputs, levels finest first; `runtime.core.batch.Heads` in torch."""

    matching_logits: Tensor  # (B, P)
    boundary_distances: Tensor  # (B, P, 2): from the location to the start and to the end, in segments
    iou_logits: Tensor  # (B, P)


class Stem(NamedTuple):
    """Outputs of the layers before the first batch norm, which do not depend on the other pairs of the batch."""

    first: Tensor  # (B, 256, T): output of the first convolution
    second_gate: Tensor  # (B, 256): gate of the input of the second convolution
    third_gate: Tensor  # (B, 512): gate of the input of the third


class QueryEncoder(nn.Module):
    """Encode a query as one feature per level, by three attentions over the outputs of a BiLSTM."""

    def __init__(self, config: DRNConfig) -> None:
        super().__init__()
        width = 2 * config.hidden_dim
        self.embedding = nn.Embedding(config.vocab_size + 1, config.embed_dim, padding_idx=0)
        self.biLSTM = nn.LSTM(
            config.embed_dim, config.hidden_dim, config.lstm_layers, batch_first=True, bidirectional=True
        )
        self.W3 = nn.Linear(2 * width, config.hidden_dim)
        self.W2 = nn.ModuleList(nn.Linear(config.hidden_dim, width) for _ in config.strides)
        self.W1 = nn.Linear(width, 1)

    def forward(self, query_tokens: Tensor, query_length: Tensor) -> list[Tensor]:
        """Return the query feature of each level, (B, 2H).

        Packing needs the lengths on the CPU, so pass them there: fetching them from a GPU would synchronize with it.

        Args:
            query_tokens: (B, L) int word ids, 0 past each length.
            query_length: (B,) int lengths in tokens, at least 1.
        """
        words = self.words(query_tokens, query_length)
        return self.attend(words, query_length.to(words.device, non_blocking=True))

    def words(self, query_tokens: Tensor, query_length: Tensor) -> Tensor:
        """Return the outputs of the BiLSTM, (B, L, 2H), zero past each length; see `forward` for the arguments."""
        embedded = self.embedding(query_tokens)
        packed = pack_padded_sequence(embedded, query_length.cpu(), batch_first=True, enforce_sorted=False)
        outputs, _ = self.biLSTM(packed)
        return pad_packed_sequence(outputs, batch_first=True, total_length=query_tokens.shape[1])[0]

    def attend(self, words: Tensor, query_length: Tensor) -> list[Tensor]:
        """Return the query feature of each level, (B, 2H).

        Args:
            words: (B, L, 2H) outputs of the BiLSTM.
            query_length: (B,) int lengths in tokens, on the device of `words`.
        """
        rows = torch.arange(len(words), device=words.device)
        # The outputs of both directions at the first and the last word, not the final hidden states.
        sentence = torch.cat((words[:, 0], words[rows, query_length.long() - 1]), dim=1)
        shared = functional.relu(self.W3(sentence))
        steps = torch.arange(words.shape[1], device=words.device)
        beyond = steps[None] >= query_length[:, None]
        features = []
        for project in self.W2:
            logits = self.W1(project(shared)[:, None] * words).squeeze(-1)
            attention = logits.masked_fill(beyond, -1e30 if logits.dtype == torch.float32 else -6e4).softmax(dim=1)
            features.append((attention[:, None] @ words).squeeze(1))
        return features


class Backbone(nn.Module):
    """Three temporal convolutions; a gate computed from the query multiplies the input of each."""

    def __init__(self, config: DRNConfig) -> None:
        super().__init__()
        inputs = (config.feature_dim + POSITION_CHANNELS, *BACKBONE_CHANNELS)
        self.layers = nn.ModuleList(
            nn.Sequential(
                nn.Conv1d(inputs[level], channels, 3, stride=1 if level == 0 else 2, padding=1, bias=False),
                nn.BatchNorm1d(channels),
                nn.ReLU(),
            )
            for level, channels in enumerate(BACKBONE_CHANNELS)
        )

    def forward(self, features: Tensor, positions: Tensor, gates: list[Tensor]) -> list[Tensor]:
        """Return the features of each level: (B, 256, T), (B, 512, T/2) and (B, 1024, T/4).

        Args:
            features: (B, D, T) projected clip features.
            positions: (B, 256, T) embedding of the spans.
            gates: gate of each level, (B, input channels).
        """
        return self.onward(self.first(features, positions, gates[0]), gates[1:])

    def first(self, features: Tensor, positions: Tensor, gate: Tensor) -> Tensor:
        """Return the output of the first convolution, (B, 256, T), before its batch norm; see `forward` for shapes."""
        # Positions are not gated.
        return self.layers[0][0](torch.cat((features * gate[:, :, None], positions), dim=1))

    def onward(self, first: Tensor, gates: list[Tensor]) -> list[Tensor]:
        """Return the features of each level from the output of `first`, (B, 256, T), and the other two gates."""
        _, norm, relu = self.layers[0]
        levels = [relu(norm(first))]
        for layer, gate in zip(self.layers[1:], gates, strict=True):
            levels.append(layer(levels[-1] * gate[:, :, None]))
        return levels


class FeaturePyramid(nn.Module):
    """Add coarse levels to finer ones. Unlike in most pyramids, a ReLU also follows the lateral convolutions."""

    def __init__(self, config: DRNConfig) -> None:
        super().__init__()

        def block(inputs: int, kernel: int) -> nn.Sequential:
            return nn.Sequential(
                nn.Conv1d(inputs, config.fpn_dim, kernel, padding=kernel // 2, bias=False),
                nn.BatchNorm1d(config.fpn_dim),
                nn.ReLU(),
            )

        self.inner_blocks = nn.ModuleList(block(channels, 1) for channels in BACKBONE_CHANNELS)
        self.layer_blocks = nn.ModuleList(block(config.fpn_dim, 3) for _ in BACKBONE_CHANNELS)

    def forward(self, levels: list[Tensor]) -> list[Tensor]:
        """Return the merged levels, three (B, fpn_dim, T_i), of three (B, C_i, T_i), all finest first."""
        outputs: list[Tensor] = []
        merged = None
        for level in reversed(range(len(levels))):
            lateral = self.inner_blocks[level](levels[level])
            if merged is not None:
                lateral = lateral + functional.interpolate(merged, scale_factor=2, mode="nearest")
            merged = lateral
            outputs.insert(0, self.layer_blocks[level](merged))
        return outputs


class Scale(nn.Module):
    """Multiply the distances of one level by a learned factor."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, values: Tensor) -> Tensor:
        return values * self.scale


class Head(nn.Module):
    """Compute matching logits, boundary distances and IoU logits; all levels share the weights."""

    def __init__(self, config: DRNConfig) -> None:
        super().__init__()
        width = config.fpn_dim

        def tower() -> nn.Sequential:
            layers: list[nn.Module] = []
            for _ in range(config.head_convs):
                layers += [nn.Conv1d(width, width, 3, padding=1), nn.BatchNorm1d(width), nn.ReLU()]
            return nn.Sequential(*layers)

        self.cls_tower = tower()
        self.bbox_tower = tower()
        self.cls_logits = nn.Conv1d(width, 1, 3, padding=1)
        self.bbox_pred = nn.Conv1d(width, 2, 3, padding=1)
        self.mix_fc = nn.Sequential(nn.Conv1d(2 * width, width, 1), nn.BatchNorm1d(width), nn.ReLU())
        self.iou_scores = nn.Sequential(
            nn.Conv1d(width, width // 2, 3, padding=1),
            nn.BatchNorm1d(width // 2),
            nn.ReLU(),
            nn.Conv1d(width // 2, 1, 1),
        )
        self.scales = nn.ModuleList(Scale() for _ in config.strides)
        for module in self.modules():
            if isinstance(module, nn.Conv1d):
                nn.init.normal_(module.weight, std=0.01)
                nn.init.zeros_(module.bias)
        nn.init.constant_(self.cls_logits.bias, -math.log((1 - config.prior_probability) / config.prior_probability))

    def forward(self, levels: list[Tensor]) -> NetworkHeads:
        """Return the heads of all levels, three (B, fpn_dim, T_i), concatenated finest first."""
        # One level after the other, because batch norm uses the statistics of each level.
        matching, distances, iou = [], [], []
        for features, scale in zip(levels, self.scales, strict=True):
            matching_features = self.cls_tower(features)
            boundary_features = self.bbox_tower(features)
            matching.append(self.cls_logits(matching_features).squeeze(1))
            # In float32, because exp overflows in half precision.
            distances.append(torch.exp(scale(self.bbox_pred(boundary_features).float())).transpose(1, 2))
            mixed = torch.cat((matching_features, boundary_features), dim=1)
            iou.append(self.iou_scores(self.mix_fc(mixed)).squeeze(1))
        return NetworkHeads(torch.cat(matching, 1), torch.cat(distances, 1), torch.cat(iou, 1))


class FCOS(nn.Module):
    """Contain the head under its name in the published checkpoint."""

    def __init__(self, config: DRNConfig) -> None:
        super().__init__()
        self.head = Head(config)

    def forward(self, levels: list[Tensor]) -> NetworkHeads:
        return self.head(levels)


class DRN(nn.Module):
    """Compute the heads at every location from a query and the segments of a video.

    A batch may contain queries of any length in any order; padding does not affect the heads.
    """

    def __init__(self, config: DRNConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or DRNConfig()
        width = 2 * config.hidden_dim
        self.query_encoder = QueryEncoder(config)
        self.backbone_net = Backbone(config)
        self.fpn = FeaturePyramid(config)
        self.fcos = FCOS(config)
        self.prop_fc = nn.Linear(config.feature_dim, config.feature_dim)
        self.position_transform = nn.Linear(3, POSITION_CHANNELS)
        gated = (config.feature_dim, *BACKBONE_CHANNELS[:-1])
        self.qInput = nn.ModuleList(nn.Linear(width, channels) for channels in gated)

    def forward(
        self, query_tokens: Tensor, query_length: Tensor, segment_features: Tensor, segment_spans: Tensor
    ) -> NetworkHeads:
        """Compute the heads at every location.

        Args:
            query_tokens: (B, L) int word ids, 0 past each length.
            query_length: (B,) int lengths in tokens, at least 1.
            segment_features: (B, T, D) clip features, max-pooled over each segment.
            segment_spans: (B, T, 2) starts and ends as fractions of the video.

        Returns:
            Heads at P locations: matching logits (B, P), boundary distances in segments (B, P, 2), IoU logits (B, P).
        """
        return self.score(self.stem(query_tokens, query_length, self.prop_fc(segment_features), segment_spans))

    def stem(self, query_tokens: Tensor, query_length: Tensor, projected: Tensor, segment_spans: Tensor) -> Stem:
        """Return the outputs of the layers before the first batch norm.

        Args:
            query_tokens: (B, L) int word ids, 0 past each length.
            query_length: (B,) int lengths in tokens, at least 1.
            projected: (B, T, D) outputs of `prop_fc`.
            segment_spans: (B, T, 2) starts and ends as fractions of the video.
        """
        queries = self.query_encoder(query_tokens, query_length)
        gate, *other_gates = (gate(query) for gate, query in zip(self.qInput, queries, strict=True))
        positions = self.position_transform(with_duration(segment_spans)).transpose(1, 2)
        return Stem(self.backbone_net.first(projected.transpose(1, 2), positions, gate), *other_gates)

    def score(self, stem: Stem) -> NetworkHeads:
        """Return the heads from the outputs of `stem`."""
        return self.fcos(self.fpn(self.backbone_net.onward(stem.first, list(stem[1:]))))


def with_duration(spans: Tensor) -> Tensor:
    """Return start, end and duration, (B, T, 3) float32, of (B, T, 2) spans; the difference is in their own dtype."""
    return torch.cat((spans, spans[..., 1:] - spans[..., :1]), dim=-1).float()


def locations(config: DRNConfig, device: torch.device | None = None) -> Tensor:
    """Return the center of each location in segments, (P,) float32, finest level first: stride * k + stride / 2."""
    return torch.cat(
        [
            torch.arange(0, config.num_segments, stride, dtype=torch.float32, device=device) + stride / 2
            for stride in config.strides
        ]
    )
