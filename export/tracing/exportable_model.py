"""DRN as an inference graph: the same answers as `train.network.model.DRN` in evaluation mode, in fewer and plainer
steps.

What is rewritten, each exactly but for the last bits of float32:

- Batch norm is folded into the convolution before it, and so is `W1` into `W2`, in float64, rounded once.
- Convolutions are 2-D, kernels (1, k) over (B, C, 1, T): TensorRT then needs no reshaping around them.
- The BiLSTM is two forward LSTMs. The backward one reads words reversed within each query's own length, by gather,
  so that no padding is read and batches may be ragged in any order.
- Linear on spans, then convolution is one convolution of (start, end), as duration = end - start.
- Both towers are one convolution whose output is `mix_fc`'s input; the head sees all levels side by side.

`torch.export` has no LSTM of variable length, and torch's gather wants int64. Those operators are written as ONNX
while exporting and computed with torch otherwise, so that the graph can be tested without exporting it.

Submodules carry the names of the DRN modules that they stand for, and `export.to_onnx` names nodes and initialisers
after them. Shape letters: B batch, L query length, T segments, C channels, P locations, E embedding, H LSTM width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from train.network.model import DRN, Backbone, FeaturePyramid, Head, NetworkHeads, QueryEncoder

# Below every attention logit that a network gives, far from the end of half precision, and so far down that the softmax
# of float32 gives exactly 0.
MASKED_LOGIT = -1e4


class ExportableDRN(nn.Module):
    """The module to export. It copies what it needs from `model`, which is not changed.

    Integer inputs are int32. T is fixed at `model.config.num_segments`; B and L are free.
    """

    def __init__(self, model: DRN) -> None:
        super().__init__()
        config = model.config
        self.query_encoder = ExportableQueryEncoder(model.query_encoder)
        self.prop_fc = VideoProjection(model.prop_fc)
        self.qInput = nn.ModuleList(ExportableLinear(gate.weight, gate.bias) for gate in model.qInput)
        self.position_transform = SpanProjection(model)
        self.backbone_net = ExportableBackbone(model.backbone_net, config.feature_dim)
        self.fpn = ExportablePyramid(model.fpn)
        self.fcos = nn.Module()
        self.fcos.head = ExportableHead(model.fcos.head, [config.num_segments // stride for stride in config.strides])
        self.requires_grad_(False).eval()

    def forward(
        self, query_tokens: Tensor, query_length: Tensor, segment_features: Tensor, segment_spans: Tensor
    ) -> NetworkHeads:
        """Score every location; see `DRN.forward`. What stands past a query's length is never looked at."""
        queries = self.query_encoder(query_tokens, query_length)
        gates = [gate(query) for gate, query in zip(self.qInput, queries, strict=True)]
        # These two depend on the video alone: `calib.graph.split_model` cuts here, to encode it once and ask often.
        projected = self.prop_fc(segment_features)
        positions = self.position_transform(segment_spans)
        levels = self.backbone_net(projected, positions, gates)
        return NetworkHeads(*self.fcos.head(self.fpn(levels)))


class ExportableLinear(nn.Module):
    """x W + b with W (in, out): the layout of ONNX's MatMul, so that no transpose stands in the graph."""

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.weight = _constant(weight.T)
        self.bias = _constant(bias)

    def forward(self, inputs: Tensor) -> Tensor:
        return torch.addmm(self.bias, inputs, self.weight)


class ExportableConv(nn.Module):
    """A temporal convolution of (B, C, 1, T) by (O, C / groups, k) weights; plus what is added; ReLU if asked for."""

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        *,
        stride: int = 1,
        beyond: int = 0,
        groups: int = 1,
        relu: bool = False,
    ) -> None:
        """Pad so that T stays T, and by `beyond` more at the end: the output is then that much longer."""
        super().__init__()
        self.weight = _constant(weight[:, :, None])
        self.bias = None if bias is None else _constant(bias)
        self.stride = (1, stride)
        self.padding = (0, weight.shape[2] // 2)
        self.beyond = beyond
        self.groups = groups
        self.relu = relu

    def forward(self, inputs: Tensor, added: Tensor | None = None) -> Tensor:
        outputs = self._longer(inputs) if self.beyond else self._convolved(inputs)
        if added is not None:
            outputs = outputs + added
        return functional.relu(outputs) if self.relu else outputs

    def _convolved(self, inputs: Tensor) -> Tensor:
        return functional.conv2d(inputs, self.weight, self.bias, self.stride, self.padding, groups=self.groups)

    def _longer(self, inputs: Tensor) -> Tensor:
        if not torch.onnx.is_in_onnx_export():
            return self._convolved(functional.pad(inputs, (0, self.beyond)))
        # torch's convolution pads both ends alike, and would need a node of its own for this.
        batch, _, _, length = inputs.shape
        tensors = (inputs, self.weight) if self.bias is None else (inputs, self.weight, self.bias)
        return torch.onnx.ops.symbolic(
            "Conv",
            tensors,
            {
                "kernel_shape": list(self.weight.shape[2:]),
                "pads": [0, self.padding[1], 0, self.padding[1] + self.beyond],
            },
            dtype=inputs.dtype,
            shape=(batch, len(self.weight), 1, length + self.beyond),
        )


class VideoProjection(ExportableConv):
    """`prop_fc` as a convolution of one column, from (B, T, D) to (B, D, 1, T).

    The convolutions after it want that layout anyway; on a CPU this is 15 % faster than a matrix product.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.weight[:, :, None], linear.bias)

    def forward(self, segment_features: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(segment_features.transpose(1, 2).unsqueeze(2))


class ExportableQueryEncoder(nn.Module):
    """Tokens and lengths to one (B, 2H) query feature for each level."""

    def __init__(self, encoder: QueryEncoder) -> None:
        super().__init__()
        self.embedding = nn.Module()
        self.embedding.weight = _constant(encoder.embedding.weight)
        self.biLSTM = nn.ModuleList(
            BidirectionalLayer(encoder.biLSTM, layer) for layer in range(encoder.biLSTM.num_layers)
        )
        self.W3 = ExportableLinear(encoder.W3.weight, encoder.W3.bias)
        # W1 (W2 s * y) = (W1 * W2 s) y. W1's own bias moves all words alike, which softmax does not see.
        score = encoder.W1.weight.double()[0]
        self.levels = len(encoder.W2)
        self.W2 = ExportableLinear(
            torch.cat([score[:, None] * project.weight.double() for project in encoder.W2]),
            torch.cat([score * project.bias.double() for project in encoder.W2]),
        )

    def forward(self, query_tokens: Tensor, query_length: Tensor) -> list[Tensor]:
        steps = torch.arange(query_tokens.shape[1], dtype=torch.int32, device=query_tokens.device)
        # (L, B): words still to come after each; negative past the end. Also where its mirror image stands.
        remaining = (query_length - 1) - steps[:, None]
        mirror = remaining.clamp(min=0)
        tokens = query_tokens.T
        forward = functional.embedding(tokens, self.embedding.weight)
        backward = functional.embedding(_gather(tokens, mirror), self.embedding.weight)
        words = self.biLSTM[0](forward, backward, mirror)
        for layer in self.biLSTM[1:]:
            words = layer(words, _gather(words, mirror), mirror)
        # The words at both ends, (1, B, 2H) each.
        ends = torch.cat((words[:1], _gather(words, mirror[:1])), dim=2)
        shared = functional.relu(self.W3(ends.squeeze(0)))
        directions = self.W2(shared).unflatten(1, (self.levels, -1))
        logits = directions @ words.permute(1, 2, 0)
        present = (remaining >= 0).T[:, None]
        attention = torch.where(present, logits, torch.full((), MASKED_LOGIT, dtype=logits.dtype)).softmax(dim=2)
        return [query.squeeze(1) for query in (attention @ words.transpose(0, 1)).split(1, dim=1)]


class BidirectionalLayer(nn.Module):
    """One layer of a BiLSTM over (L, B, ·), as two LSTMs that both run forward."""

    def __init__(self, lstm: nn.LSTM, layer: int) -> None:
        super().__init__()
        self.forwards = ExportableLSTM(lstm, f"l{layer}")
        self.backwards = ExportableLSTM(lstm, f"l{layer}_reverse")

    def forward(self, inputs: Tensor, mirrored: Tensor, mirror: Tensor) -> Tensor:
        """Return (L, B, 2H) from the words and the same words reversed; garbage, but finite, past each length."""
        return torch.cat((self.forwards(inputs), _gather(self.backwards(mirrored), mirror)), dim=2)


class ExportableLSTM(nn.Module):
    """One direction of one layer from zero state, weights as ONNX has them: gates in the order i, o, f, c."""

    def __init__(self, lstm: nn.LSTM, suffix: str) -> None:
        super().__init__()
        self.hidden = lstm.hidden_size

        def reordered(name: str) -> Tensor:
            entry, forget, cell, output = getattr(lstm, f"{name}_{suffix}").detach().chunk(4)
            return torch.cat((entry, output, forget, cell))[None]

        self.W = _constant(reordered("weight_ih"))
        self.R = _constant(reordered("weight_hh"))
        self.B = _constant(torch.cat((reordered("bias_ih"), reordered("bias_hh")), dim=1))

    def forward(self, inputs: Tensor) -> Tensor:
        """Return (L, B, H) from (L, B, ·)."""
        length, batch, _ = inputs.shape
        if torch.onnx.is_in_onnx_export():
            return torch.onnx.ops.symbolic(
                "LSTM",
                (inputs, self.W, self.R, self.B),
                {"hidden_size": self.hidden},
                dtype=inputs.dtype,
                shape=(length, 1, batch, self.hidden),
            ).squeeze(1)
        state = cell = inputs.new_zeros(batch, self.hidden)
        outputs: list[Tensor] = []
        bias = self.B[0].view(2, -1).sum(0)
        for step in inputs @ self.W[0].T:
            entry, output, forget, candidate = (step + state @ self.R[0].T + bias).chunk(4, dim=1)
            cell = forget.sigmoid() * cell + entry.sigmoid() * candidate.tanh()
            state = output.sigmoid() * cell.tanh()
            outputs.append(state)
        return torch.stack(outputs)


class SpanProjection(ExportableConv):
    """The contribution of the spans, (B, T, 2), to the first convolution of the backbone: (B, 256, 1, T)."""

    def __init__(self, model: DRN) -> None:
        conv, norm, _ = model.backbone_net.layers[0]
        kernel = conv.weight.double()[:, model.config.feature_dim :]
        scale, shift = _normalisation(norm)
        transform = model.position_transform
        start, end, duration = transform.weight.double().T
        by_span = torch.stack((start - duration, end + duration), dim=1)
        super().__init__(scale[:, None, None] * torch.einsum("opk,ps->osk", kernel, by_span), None)
        # The convolution pads positions with zeros, so a bias before it tells less at the borders.
        everywhere = transform.bias.double()[None, :, None].expand(1, -1, model.config.num_segments)
        offset = functional.conv1d(everywhere, kernel, padding=1) * scale[:, None] + shift[:, None]
        self.offset = _constant(offset[:, :, None])

    def forward(self, segment_spans: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(segment_spans.transpose(1, 2).unsqueeze(2), self.offset)


class ExportableBackbone(nn.Module):
    """Three gated convolutions, as `network.model.Backbone`; the positions come in as their share of the first."""

    def __init__(self, backbone: Backbone, feature_dim: int) -> None:
        super().__init__()
        layers = []
        for level, (conv, norm, _) in enumerate(backbone.layers):
            weight, bias = _fold(conv, norm)
            if level == 0:
                # Its bias is in what the positions add.
                layers.append(ExportableConv(weight[:, :feature_dim], None, relu=True))
            else:
                layers.append(ExportableConv(weight, bias, stride=2, relu=True))
        self.layers = nn.ModuleList(layers)

    def forward(self, projected: Tensor, positions: Tensor, gates: list[Tensor]) -> list[Tensor]:
        """Return (B, C, 1, T_i) for each level from (B, D, 1, T), (B, 256, 1, T) and the gates."""
        levels = []
        features = projected
        for level, layer in enumerate(self.layers):
            features = layer(features * gates[level][:, :, None, None], None if level else positions)
            levels.append(features)
        return levels


class ExportablePyramid(nn.Module):
    """As `train.network.model.FeaturePyramid`, except that each output but the last is one position longer: what stands
    there belongs to no location and is the head's gap between levels."""

    def __init__(self, pyramid: FeaturePyramid) -> None:
        super().__init__()
        self.inner_blocks = nn.ModuleList(
            ExportableConv(*_fold(*block[:2]), relu=True) for block in pyramid.inner_blocks
        )
        self.layer_blocks = nn.ModuleList(
            ExportableConv(*_fold(*block[:2]), beyond=int(block is not pyramid.layer_blocks[-1]), relu=True)
            for block in pyramid.layer_blocks
        )

    def forward(self, levels: list[Tensor]) -> list[Tensor]:
        """Return three (B, fpn_dim, 1, T_i + 1), the last (B, fpn_dim, 1, T_i), finest first."""
        merged = [block(level) for block, level in zip(self.inner_blocks, levels, strict=True)]
        for level in reversed(range(len(merged) - 1)):
            merged[level] = merged[level] + _upsample(merged[level + 1])
        return [block(level) for block, level in zip(self.layer_blocks, merged, strict=True)]


class ExportableHead(nn.Module):
    """As `train.network.model.Head`, with the levels side by side in one tensor, one position between neighbours.

    That position is set to zero before every convolution that would see it, so each level is padded with zeros as if it
    stood alone: no convolution here reaches further than one position.
    """

    def __init__(self, head: Head, lengths: list[int]) -> None:
        super().__init__()
        width = head.cls_logits.in_channels
        towers: list[ExportableConv] = []
        for index in range(0, len(head.cls_tower), 3):
            matching, boundary = _fold(*head.cls_tower[index : index + 2]), _fold(*head.bbox_tower[index : index + 2])
            weight, bias = (torch.cat(pair) for pair in zip(matching, boundary, strict=True))
            # The first reads the same input twice; later ones read one half each.
            towers.append(ExportableConv(weight, bias, groups=2 if index else 1, relu=True))
        self.towers = nn.ModuleList(towers)
        apart = head.cls_logits.weight.new_zeros
        self.predictions = ExportableConv(
            torch.cat(
                (
                    torch.cat((head.cls_logits.weight, apart(1, width, 3)), dim=1),
                    torch.cat((apart(2, width, 3), head.bbox_pred.weight), dim=1),
                )
            ),
            torch.cat((head.cls_logits.bias, head.bbox_pred.bias)),
        )
        self.mix_fc = ExportableConv(*_fold(*head.mix_fc[:2]), relu=True)
        self.iou_scores = nn.ModuleList(
            (
                ExportableConv(*_fold(*head.iou_scores[:2]), relu=True),
                ExportableConv(head.iou_scores[3].weight, head.iou_scores[3].bias),
            )
        )
        self.scales = _constant(
            torch.cat([scale.scale.expand(length) for scale, length in zip(head.scales, lengths, strict=True)])
        )
        self.inside = _constant(torch.cat([functional.pad(torch.ones(length), (0, 1)) for length in lengths])[:-1])
        self.register_buffer("locations", self.inside.nonzero().flatten().int())

    def forward(self, levels: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Return (B, P), (B, P, 2) and (B, P) from what `ExportablePyramid` returns."""
        towers = torch.cat(levels, dim=3) * self.inside
        for layer in self.towers:
            towers = layer(towers) * self.inside
        overlap = self.iou_scores[1](self.iou_scores[0](self.mix_fc(towers) * self.inside))
        outputs = torch.cat((self.predictions(towers), overlap), dim=1).squeeze(2)
        matching, boundary, overlap = outputs.index_select(2, self.locations).split((1, 2, 1), dim=1)
        return matching.squeeze(1), torch.exp(boundary * self.scales).transpose(1, 2), overlap.squeeze(1)


def _constant(values: Tensor) -> nn.Parameter:
    return nn.Parameter(values.detach().float().clone(memory_format=torch.contiguous_format), requires_grad=False)


def _normalisation(norm: nn.BatchNorm1d) -> tuple[Tensor, Tensor]:
    """Return the float64 scale and shift, (C,) each, that batch norm amounts to in evaluation."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    scale = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
    return scale, norm.bias.double() - norm.running_mean.double() * scale


def _fold(conv: nn.Conv1d, norm: nn.BatchNorm1d) -> tuple[Tensor, Tensor]:
    """Return float64 weight and bias of one convolution that equals `conv` followed by `norm` in evaluation."""
    scale, shift = _normalisation(norm)
    bias = shift if conv.bias is None else shift + scale * conv.bias.double()
    return scale[:, None, None] * conv.weight.double(), bias


def _gather(values: Tensor, index: Tensor) -> Tensor:
    """Return values[index[l, b], b] at [l, b], for (L, B) or (L, B, C) values and an (L', B) int32 index."""
    if torch.onnx.is_in_onnx_export():
        if values.dim() == 3:
            index = index.unsqueeze(2).expand(-1, -1, values.shape[2])
        return torch.onnx.ops.symbolic(
            "GatherElements", (values, index), {"axis": 0}, dtype=values.dtype, shape=index.shape
        )
    index = index.long()
    if values.dim() == 3:
        index = index.unsqueeze(2).expand(-1, -1, values.shape[2])
    return values.gather(0, index)


def _upsample(values: Tensor) -> Tensor:
    """Return (B, C, 1, 2T): every column of (B, C, 1, T) twice."""
    return functional.interpolate(values, scale_factor=(1.0, 2.0), mode="nearest")
