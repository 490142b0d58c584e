"""Define DRN as an inference graph, equivalent to `train.network.model.DRN` in evaluation mode, with fewer operators.

Rewritten parts, all equal up to float32 rounding:

- Batch norm is folded into the convolution before it, and `W1` into `W2`, in float64.
- Convolutions are 2-D with kernels (1, k) over (B, C, 1, T), so that TensorRT needs no reshapes around them.
- The BiLSTM is two forward LSTMs. A gather reverses the tokens within each query, so that the backward LSTM reads no
  padding and queries of a batch may have any lengths in any order.
- The linear layer on spans and the convolution after it are one convolution of (start, end): duration = end - start.
- Both towers are one convolution whose output is the input of `mix_fc`. The head processes all levels in one tensor.

`torch.export` has no LSTM of variable length, and the gather of torch requires int64. Both are ONNX operators during
export and torch operators otherwise, so that the module can be tested without an export.

Submodules have the names of the corresponding DRN modules, which `export.tracing.tracer` uses for nodes and weights.
Shape letters: B batch, L query length, T segments, C channels, P locations, E embedding, H LSTM width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from train.network.model import DRN, Backbone, FeaturePyramid, Head, NetworkHeads, QueryEncoder

# Far below all attention logits, within the range of FP16, and low enough that a float32 softmax returns exactly 0.
MASKED_LOGIT = -1e4


class ExportableDRN(nn.Module):
    """The module to export, with copies of the weights of `model`.

    Integer inputs are int32. T is fixed at `model.config.num_segments`; B and L are dynamic.
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
        """Compute the three heads; tokens after the length of a query have no effect.

        Args:
            query_tokens: (B, L) int32 word ids.
            query_length: (B,) int32 lengths in tokens, at least 1.
            segment_features: (B, T, D) float32.
            segment_spans: (B, T, 2) float32 starts and ends as fractions of the video.

        Returns:
            Matching logits (B, P), boundary distances in segments (B, P, 2), and IoU logits (B, P).
        """
        queries = self.query_encoder(query_tokens, query_length)
        gates = [gate(query) for gate, query in zip(self.qInput, queries, strict=True)]
        # These two depend on the video only: `calib.graph.split_model` cuts the graph here.
        projected = self.prop_fc(segment_features)
        positions = self.position_transform(segment_spans)
        levels = self.backbone_net(projected, positions, gates)
        return NetworkHeads(*self.fcos.head(self.fpn(levels)))


class ExportableLinear(nn.Module):
    """x W + b with W of shape (in, out), the layout of ONNX MatMul, so that the graph has no transpose."""

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.weight = _constant(weight.T)
        self.bias = _constant(bias)

    def forward(self, inputs: Tensor) -> Tensor:
        return torch.addmm(self.bias, inputs, self.weight)


class ExportableConv(nn.Module):
    """A temporal convolution of (B, C, 1, T) by (O, C / groups, k) weights, an optional addend and an optional ReLU."""

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        *,
        stride: int = 1,
        extra: int = 0,
        groups: int = 1,
        relu: bool = False,
    ) -> None:
        """Pad so that the output has length T, or T + `extra`."""
        super().__init__()
        self.weight = _constant(weight[:, :, None])
        self.bias = None if bias is None else _constant(bias)
        self.stride = (1, stride)
        self.padding = (0, weight.shape[2] // 2)
        self.extra = extra
        self.groups = groups
        self.relu = relu

    def forward(self, inputs: Tensor, added: Tensor | None = None) -> Tensor:
        outputs = self._convolve_longer(inputs) if self.extra else self._convolve(inputs)
        if added is not None:
            outputs = outputs + added
        return functional.relu(outputs) if self.relu else outputs

    def _convolve(self, inputs: Tensor) -> Tensor:
        return functional.conv2d(inputs, self.weight, self.bias, self.stride, self.padding, groups=self.groups)

    def _convolve_longer(self, inputs: Tensor) -> Tensor:
        if not torch.onnx.is_in_onnx_export():
            return self._convolve(functional.pad(inputs, (0, self.extra)))
        # torch's convolution pads both ends equally, so it would need a separate Pad node.
        batch, _, _, length = inputs.shape
        tensors = (inputs, self.weight) if self.bias is None else (inputs, self.weight, self.bias)
        return torch.onnx.ops.symbolic(
            "Conv",
            tensors,
            {
                "kernel_shape": list(self.weight.shape[2:]),
                "pads": [0, self.padding[1], 0, self.padding[1] + self.extra],
            },
            dtype=inputs.dtype,
            shape=(batch, len(self.weight), 1, length + self.extra),
        )


class VideoProjection(ExportableConv):
    """`prop_fc` as a 1 x 1 convolution, from (B, T, D) to (B, D, 1, T).

    The convolutions after it need that layout; on a CPU this is 15 % faster than a matrix product.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.weight[:, :, None], linear.bias)

    def forward(self, segment_features: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(segment_features.transpose(1, 2).unsqueeze(2))


class ExportableQueryEncoder(nn.Module):
    """Encode tokens and lengths into one (B, 2H) query feature for each level."""

    def __init__(self, encoder: QueryEncoder) -> None:
        super().__init__()
        self.embedding = nn.Module()
        self.embedding.weight = _constant(encoder.embedding.weight)
        self.biLSTM = nn.ModuleList(
            BidirectionalLayer(encoder.biLSTM, layer) for layer in range(encoder.biLSTM.num_layers)
        )
        self.W3 = ExportableLinear(encoder.W3.weight, encoder.W3.bias)
        # W1 (W2 s * y) = (W1 * W2 s) y. The bias of W1 is the same for all tokens, so softmax removes it.
        score = encoder.W1.weight.double()[0]
        self.levels = len(encoder.W2)
        self.W2 = ExportableLinear(
            torch.cat([score[:, None] * project.weight.double() for project in encoder.W2]),
            torch.cat([score * project.bias.double() for project in encoder.W2]),
        )

    def forward(self, query_tokens: Tensor, query_length: Tensor) -> list[Tensor]:
        steps = torch.arange(query_tokens.shape[1], dtype=torch.int32, device=query_tokens.device)
        # (L, B): number of tokens after each one, negative for padding. It is also the index of the mirrored token.
        remaining = (query_length - 1) - steps[:, None]
        mirror = remaining.clamp(min=0)
        tokens = query_tokens.T
        forward = functional.embedding(tokens, self.embedding.weight)
        backward = functional.embedding(_gather(tokens, mirror), self.embedding.weight)
        words = self.biLSTM[0](forward, backward, mirror)
        for layer in self.biLSTM[1:]:
            words = layer(words, _gather(words, mirror), mirror)
        # The first and the last token of each query, (1, B, 2H) each.
        ends = torch.cat((words[:1], _gather(words, mirror[:1])), dim=2)
        shared = functional.relu(self.W3(ends.squeeze(0)))
        directions = self.W2(shared).unflatten(1, (self.levels, -1))
        logits = directions @ words.permute(1, 2, 0)
        present = (remaining >= 0).T[:, None]
        attention = torch.where(present, logits, torch.full((), MASKED_LOGIT, dtype=logits.dtype)).softmax(dim=2)
        return [query.squeeze(1) for query in (attention @ words.transpose(0, 1)).split(1, dim=1)]


class BidirectionalLayer(nn.Module):
    """One layer of a BiLSTM over (L, B, C), as two forward LSTMs."""

    def __init__(self, lstm: nn.LSTM, layer: int) -> None:
        super().__init__()
        self.forwards = ExportableLSTM(lstm, f"l{layer}")
        self.backwards = ExportableLSTM(lstm, f"l{layer}_reverse")

    def forward(self, inputs: Tensor, mirrored: Tensor, mirror: Tensor) -> Tensor:
        """Return (L, B, 2H) outputs; values at padding are finite but meaningless.

        Args:
            inputs: (L, B, C) features of the tokens.
            mirrored: (L, B, C) the same with the tokens of each query reversed.
            mirror: (L, B) int32 index of the token at each reversed position.
        """
        return torch.cat((self.forwards(inputs), _gather(self.backwards(mirrored), mirror)), dim=2)


class ExportableLSTM(nn.Module):
    """One direction of one LSTM layer with zero initial state, and weights in the gate order i, o, f, c of ONNX."""

    def __init__(self, lstm: nn.LSTM, suffix: str) -> None:
        super().__init__()
        self.hidden = lstm.hidden_size

        def onnx_order(name: str) -> Tensor:
            input_gate, forget, cell, output = getattr(lstm, f"{name}_{suffix}").detach().chunk(4)
            return torch.cat((input_gate, output, forget, cell))[None]

        self.W = _constant(onnx_order("weight_ih"))
        self.R = _constant(onnx_order("weight_hh"))
        self.B = _constant(torch.cat((onnx_order("bias_ih"), onnx_order("bias_hh")), dim=1))

    def forward(self, inputs: Tensor) -> Tensor:
        """Return (L, B, H) from (L, B, C)."""
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
            input_gate, output, forget, candidate = (step + state @ self.R[0].T + bias).chunk(4, dim=1)
            cell = forget.sigmoid() * cell + input_gate.sigmoid() * candidate.tanh()
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
        # The convolution pads with zeros after the bias, so the contribution of the bias differs at both ends.
        bias = transform.bias.double()[None, :, None].expand(1, -1, model.config.num_segments)
        offset = functional.conv1d(bias, kernel, padding=1) * scale[:, None] + shift[:, None]
        self.offset = _constant(offset[:, :, None])

    def forward(self, segment_spans: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(segment_spans.transpose(1, 2).unsqueeze(2), self.offset)


class ExportableBackbone(nn.Module):
    """Three gated convolutions, as `train.network.model.Backbone`; `SpanProjection` is added to the first."""

    def __init__(self, backbone: Backbone, feature_dim: int) -> None:
        super().__init__()
        layers = []
        for level, (conv, norm, _) in enumerate(backbone.layers):
            weight, bias = _fold(conv, norm)
            if level == 0:
                # `SpanProjection` contains the bias.
                layers.append(ExportableConv(weight[:, :feature_dim], None, relu=True))
            else:
                layers.append(ExportableConv(weight, bias, stride=2, relu=True))
        self.layers = nn.ModuleList(layers)

    def forward(self, projected: Tensor, positions: Tensor, gates: list[Tensor]) -> list[Tensor]:
        """Return the features of each level, (B, C, 1, T_i), finest first.

        Args:
            projected: (B, D, 1, T) projected clip features.
            positions: (B, 256, 1, T) contribution of the spans to the first convolution.
            gates: gate of each level, (B, input channels).
        """
        levels = []
        features = projected
        for level, layer in enumerate(self.layers):
            features = layer(features * gates[level][:, :, None, None], None if level else positions)
            levels.append(features)
        return levels


class ExportablePyramid(nn.Module):
    """The pyramid of `train.network.model.FeaturePyramid`, with one more position after all levels but the last.

    That position belongs to no location: it is the gap between levels in the head.
    """

    def __init__(self, pyramid: FeaturePyramid) -> None:
        super().__init__()
        self.inner_blocks = nn.ModuleList(
            ExportableConv(*_fold(*block[:2]), relu=True) for block in pyramid.inner_blocks
        )
        self.layer_blocks = nn.ModuleList(
            ExportableConv(*_fold(*block[:2]), extra=int(block is not pyramid.layer_blocks[-1]), relu=True)
            for block in pyramid.layer_blocks
        )

    def forward(self, levels: list[Tensor]) -> list[Tensor]:
        """Return the merged levels of (B, C_i, 1, T_i): (B, fpn_dim, 1, T_i + 1), the last one without the gap."""
        merged = [block(level) for block, level in zip(self.inner_blocks, levels, strict=True)]
        for level in reversed(range(len(merged) - 1)):
            merged[level] = merged[level] + _upsample(merged[level + 1])
        return [block(level) for block, level in zip(self.layer_blocks, merged, strict=True)]


class ExportableHead(nn.Module):
    """The head of `train.network.model.Head`, with all levels in one tensor and one position between adjacent levels.

    That position is zero before every convolution, so each level is padded with zeros as if it were alone: the kernels
    reach one position to each side.
    """

    def __init__(self, head: Head, lengths: list[int]) -> None:
        super().__init__()
        width = head.cls_logits.in_channels
        towers: list[ExportableConv] = []
        for index in range(0, len(head.cls_tower), 3):
            matching, boundary = _fold(*head.cls_tower[index : index + 2]), _fold(*head.bbox_tower[index : index + 2])
            weight, bias = (torch.cat(pair) for pair in zip(matching, boundary, strict=True))
            # Both towers read the same input in the first layer, and their own half in later layers.
            towers.append(ExportableConv(weight, bias, groups=2 if index else 1, relu=True))
        self.towers = nn.ModuleList(towers)
        zeros = head.cls_logits.weight.new_zeros
        self.predictions = ExportableConv(
            torch.cat(
                (
                    torch.cat((head.cls_logits.weight, zeros(1, width, 3)), dim=1),
                    torch.cat((zeros(2, width, 3), head.bbox_pred.weight), dim=1),
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
        """Return matching logits (B, P), boundary distances in segments (B, P, 2) and IoU logits (B, P)."""
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
    """Return the float64 scale and shift, (C,) each, of a batch norm in evaluation mode."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    scale = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
    return scale, norm.bias.double() - norm.running_mean.double() * scale


def _fold(conv: nn.Conv1d, norm: nn.BatchNorm1d) -> tuple[Tensor, Tensor]:
    """Return float64 weight and bias of the convolution that equals `conv` followed by `norm` in evaluation mode."""
    scale, shift = _normalisation(norm)
    bias = shift if conv.bias is None else shift + scale * conv.bias.double()
    return scale[:, None, None] * conv.weight.double(), bias


def _gather(values: Tensor, index: Tensor) -> Tensor:
    """Return values[index[l, b], b] at [l, b], for (L, B) or (L, B, C) values and an (L', B) int32 index."""
    if values.dim() == 3:
        index = index.unsqueeze(2).expand(-1, -1, values.shape[2])
    if torch.onnx.is_in_onnx_export():
        return torch.onnx.ops.symbolic(
            "GatherElements", (values, index), {"axis": 0}, dtype=values.dtype, shape=index.shape
        )
    return values.gather(0, index.long())


def _upsample(values: Tensor) -> Tensor:
    """Repeat every column of (B, C, 1, T) values: (B, C, 1, 2T)."""
    return functional.interpolate(values, scale_factor=(1.0, 2.0), mode="nearest")
