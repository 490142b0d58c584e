"""Append decoding and NMS to a graph as standard operators, so that it returns moments in seconds.

The nodes compute `runtime.core.decoding` for a batch. Arithmetic has the order of NumPy's in float32, so the same
proposals are selected; only `Exp` rounds differently, by up to 2 units in the last place. The first (soft-NMS) or last
(hard NMS) of equal scores is selected by its position, not by the rule of an operator for ties. No value is infinite:
the score of a location without a proposal is `NONE`.

Shape letters: B batch, P locations, K moments.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import numpy as np

from calib.graph.graph_editing import copied
from calib.graph.onnx_graph import read_manifest, set_manifest, strip_weights
from calib.graph.opset import opset_of
from runtime.artifacts.manifest import Manifest, MomentOutput
from runtime.core.batch import DURATION, HEAD_NAMES, MOMENT_COUNT, MOMENTS
from runtime.core.decoding import ALPHA, HARD_NMS_MARGIN, HIGH_THRESHOLD, LOW_THRESHOLD, Decoding, locations
from runtime.core.video import MAX_DURATION_S

if TYPE_CHECKING:
    import onnx

# Number of moments of a query, as of `drn infer`.
COUNT = 5
# IoU threshold of the metric that hard NMS is for, as of `drn infer`.
METRIC_THRESHOLD = 0.5
# Score of locations that have no proposal, or whose proposal was selected or removed.
NONE = -1.0
# `moment_count` of a query whose heads are not finite, or whose duration is not that of a video.
INVALID = -1
# Reductions have their axes as an input from this opset on.
_AXES_INPUT_SINCE = 18
# Metadata for programs without a JSON parser: lines of a name and a value.
METADATA_KEY = "drn.moments"


def with_moments(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a copy of a graph with one more input, `duration`, and two more outputs, `moments` and `moment_count`.

    Decoding and NMS are those of the manifest, which records them under "moments".

    Args:
        model: a graph that was not split.

    Raises:
        ModelFileError: the graph is one part of a split model, or has moments already.
    """
    import onnx

    manifest = read_manifest(model)
    result = copied(model)
    part = _MomentGraph(manifest, opset_of(model))
    result.graph.node.extend(part.nodes)
    result.graph.initializer.extend(part.constants)
    result.graph.input.append(_duration())
    result.graph.output.extend(_outputs())
    result.doc_string += (
        f" {MOMENTS} (batch, {COUNT}, 3) contains start and end in seconds and score, best first; {MOMENT_COUNT} is "
        f"the number of moments of each query. The input {DURATION} is the length of each video in seconds. The "
        f"metadata key {METADATA_KEY!r} describes the other inputs."
    )
    set_manifest(result, dataclasses.replace(manifest, moments=moment_output(manifest.decoding)))
    result.metadata_props.add(key=METADATA_KEY, value=input_description(manifest))
    onnx.checker.check_model(strip_weights(result), full_check=True)
    return result


def moment_graph(manifest: Manifest, opset: int) -> onnx.ModelProto:
    """Return the decoding alone: a graph from heads and `duration` to `moments` and `moment_count`.

    Args:
        manifest: decoding and no-match threshold of the model.
        opset: opset of the graph, at least 17.
    """
    from onnx import TensorProto, checker, helper

    part, size = _MomentGraph(manifest, opset), manifest.decoding.num_locations
    sizes: tuple[list[str | int | None], ...] = (["batch", size], ["batch", size, 2], ["batch", size])
    heads = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in zip(HEAD_NAMES, sizes)]
    graph = helper.make_graph(part.nodes, "moments", [*heads, _duration()], _outputs(), part.constants)
    imports = [helper.make_opsetid("", opset)]
    ir_version = helper.find_min_ir_version_for(imports)
    model = helper.make_model(graph, opset_imports=imports, ir_version=ir_version, producer_name="drn-deploy")
    checker.check_model(model, full_check=True)
    return model


def moment_output(decoding: Decoding) -> MomentOutput:
    """Return what the manifest of a graph with moments records: number of moments, NMS and its constants."""
    if decoding.protocol == "drn":
        return MomentOutput(COUNT, "hard", {"iou_threshold": METRIC_THRESHOLD - HARD_NMS_MARGIN})
    return MomentOutput(
        COUNT, "soft", {"alpha": ALPHA, "low_threshold": LOW_THRESHOLD, "high_threshold": HIGH_THRESHOLD}
    )


def input_description(manifest: Manifest) -> str:
    """Return how queries and videos become inputs of the graph, as lines of a name and a value."""
    features = manifest.features
    values = {
        "clip_window": features.window,
        "clip_stride": features.stride,
        "pooling": features.pooling,
        "unknown_words": manifest.vocabulary.unknown,
        "max_query_length": manifest.max_query_length,
        "num_words": len(manifest.vocabulary),
        # Longer videos are grounded in windows, which a graph cannot do.
        **({"max_duration": manifest.windows.longest} if manifest.windows else {}),
    }
    return "".join(f"{name} {value}\n" for name, value in values.items())


def word_list(manifest: Manifest) -> str:
    """Return the words of a model in the order of their ids, the first with id 1, one per line."""
    words = sorted(manifest.vocabulary.words.items(), key=lambda entry: entry[1])
    return "".join(f"{word}\n" for word, _ in words)


def _duration() -> onnx.ValueInfoProto:
    from onnx import TensorProto, helper

    return helper.make_tensor_value_info(DURATION, TensorProto.FLOAT, ["batch"])


def _outputs() -> list[onnx.ValueInfoProto]:
    from onnx import TensorProto, helper

    return [
        helper.make_tensor_value_info(MOMENTS, TensorProto.FLOAT, ["batch", COUNT, 3]),
        helper.make_tensor_value_info(MOMENT_COUNT, TensorProto.INT32, ["batch"]),
    ]


class _MomentGraph:
    """The nodes from heads and `duration` to `moments` and `moment_count`.

    Methods append nodes and return the names of the tensors that they compute. All tensors are (B, P), or (B, 1) for
    the selected proposal, unless stated otherwise.

    Attributes:
        nodes, constants: the result.
    """

    def __init__(self, manifest: Manifest, opset: int) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []
        self._opset = opset
        self._decoding = decoding = manifest.decoding
        self._is_hard = decoding.protocol == "drn"
        self._positions = self._constant(np.arange(decoding.num_locations, dtype=np.float32))
        distances = self._split("boundary_distances", [1, 1], axis=2)
        distances = [self._node("Squeeze", name, self._axes(2)) for name in distances]
        finite = self._finite("matching_logits", "iou_logits", *distances)
        scores, starts, ends = self._scores(), self._edge("Sub", distances[0]), self._edge("Add", distances[1])
        self._write_outputs(self._selected(scores, starts, ends), finite, manifest)

    def _write_outputs(self, rows: tuple[str, str, str], finite: str, manifest: Manifest) -> None:
        """Compute the outputs.

        Args:
            rows: scores, starts and ends of the selected proposals, (B, K) each, starts and ends as fractions.
            finite: (B, 1) bool, whether all heads of a query are finite.
        """
        scores, starts, ends = rows
        zero = self._constant(np.float32(0))
        duration = self._node("Unsqueeze", DURATION, self._axes(1))
        valid = self._node("And", finite, self._is_duration(duration))
        selected = self._node("GreaterOrEqual", scores, zero)
        found = self._reduce("ReduceMax", self._cast(selected, np.float32), 1)
        # Without a likely location the answer is the complete video with score 1.
        first = self._constant(np.eye(1, COUNT, dtype=np.float32))
        fallback = self._node("Where", self._node("Greater", found, zero), zero, first)
        columns = [
            self._node("Mul", self._node("Where", selected, starts, zero), duration),
            self._node("Mul", self._node("Where", selected, ends, fallback), duration),
            self._node("Where", selected, scores, fallback),
        ]
        columns = [self._node("Where", valid, column, zero) for column in columns]
        columns = [self._node("Unsqueeze", column, self._axes(2)) for column in columns]
        self._node("Concat", *columns, axis=2, output=MOMENTS)

        matched = selected
        if manifest.presence:
            threshold = self._constant(np.float32(manifest.presence.threshold))
            matched = self._node("And", selected, self._node("GreaterOrEqual", self._best(scores), threshold))
        counts = self._node("ReduceSum", self._cast(matched, np.float32), self._axes(1), keepdims=1)
        if not manifest.presence:
            counts = self._node("Max", counts, self._constant(np.float32(1)))
        counts = self._node("Where", valid, counts, self._constant(np.float32(INVALID)))
        counts = self._node("Squeeze", counts, self._axes(1))
        self._cast(counts, np.int32, output=MOMENT_COUNT)

    def _is_duration(self, seconds: str) -> str:
        """Return (B, 1) bool: whether durations are those that `Video` accepts."""
        longest = self._constant(np.float32(MAX_DURATION_S))
        # A comparison with NaN is false.
        positive = self._node("Greater", seconds, self._constant(np.float32(0)))
        return self._node("And", positive, self._node("LessOrEqual", seconds, longest))

    def _finite(self, *heads: str) -> str:
        """Return (B, 1) bool: whether all values of (B, P) heads are finite."""
        magnitudes = self._node("Abs", self._node("Concat", *heads, axis=1))
        # A comparison with NaN is false.
        within = self._node("LessOrEqual", magnitudes, self._constant(np.finfo(np.float32).max))
        worst = self._reduce("ReduceMin", self._cast(within, np.float32), 1)
        return self._node("Greater", worst, self._constant(np.float32(0)))

    def _scores(self) -> str:
        """Return the scores of likely locations, `NONE` for others; see `runtime.core.decoding.score_proposals`."""
        decoding = self._decoding
        none = self._constant(np.float32(NONE))
        if decoding.use_iou_scores:
            probabilities = self._sigmoid(self._node("Concat", "matching_logits", "iou_logits", axis=1))
            matching, overlap = self._split(probabilities, [decoding.num_locations] * 2, axis=1)
            scores = self._node("Mul", matching, overlap)
        else:
            scores = matching = self._sigmoid("matching_logits")
        likely = self._node("Greater", matching, self._constant(np.float32(decoding.score_threshold)))
        if decoding.num_segments // decoding.strides[0] > decoding.pre_nms_top_n:
            likely = self._node("And", likely, self._best_of_each_level(self._node("Where", likely, scores, none)))
        return self._node("Where", likely, self._node("Sqrt", scores), none)

    def _sigmoid(self, logits: str) -> str:
        # The Sigmoid of ONNX Runtime is constant below -18.
        one = self._constant(np.float32(1))
        denominator = self._node("Add", self._node("Exp", self._node("Neg", self._node("Abs", logits))), one)
        numerator = self._node("Exp", self._node("Min", logits, self._constant(np.float32(0))))
        return self._node("Div", numerator, denominator)

    def _best_of_each_level(self, scores: str) -> str:
        """Return (B, P) bool: whether a location is among the `pre_nms_top_n` best of its level."""
        decoding, parts = self._decoding, []
        sizes = [decoding.num_segments // stride for stride in decoding.strides]
        limit = self._constant(np.float32(decoding.pre_nms_top_n))
        for level, size in zip(self._split(scores, sizes, axis=1), sizes):
            # (B, size, size): whether the location of the column precedes that of the row; of equal ones the first.
            row, column = (self._node("Unsqueeze", level, self._axes(axis)) for axis in (2, 1))
            earlier = self._constant(np.tri(size, k=-1, dtype=bool))
            tied = self._node("And", self._node("Equal", column, row), earlier)
            precedes = self._node("Or", self._node("Greater", column, row), tied)
            rank = self._node("ReduceSum", self._cast(precedes, np.float32), self._axes(2), keepdims=0)
            parts.append(self._node("Less", rank, limit))
        return self._node("Concat", *parts, axis=1)

    def _edge(self, operator: str, distances: str) -> str:
        """Return the starts or ends of the spans of all locations as fractions of the video."""
        centers = self._constant(locations(self._decoding.num_segments, self._decoding.strides))
        edges = self._node(operator, centers, distances)
        fractions = self._node("Div", edges, self._constant(np.float32(self._decoding.num_segments)))
        clipped = self._node("Max", fractions, self._constant(np.float32(0)))
        return self._node("Min", clipped, self._constant(np.float32(1)))

    def _selected(self, scores: str, starts: str, ends: str) -> tuple[str, str, str]:
        """Return scores, starts and ends, (B, K) each, of the proposals of NMS; negative scores after them."""
        none = self._constant(np.float32(NONE))
        wide = tuple(self._cast(name, np.float64) for name in (starts, ends)) if self._is_hard else (starts, ends)
        rows = []
        for rank in range(COUNT):
            best = self._best(scores)
            chosen = self._position_of(best, scores)
            span = tuple(
                self._reduce("ReduceMax", self._node("Where", chosen, edge, none), 1) for edge in (starts, ends)
            )
            rows.append((best, *span))
            if rank + 1 < COUNT:
                suppress = self._drop if self._is_hard else self._decay
                scores = self._node("Where", chosen, none, suppress(scores, span, wide))
        score_row, start_row, end_row = (self._node("Concat", *column, axis=1) for column in zip(*rows))
        return score_row, start_row, end_row

    def _best(self, scores: str) -> str:
        return self._reduce("ReduceMax", scores, 1)

    def _position_of(self, best: str, scores: str) -> str:
        """Return (B, P) bool: the one location whose score is `best`, the first for soft-NMS, the last for hard NMS."""
        reduction, other = ("ReduceMax", -1) if self._is_hard else ("ReduceMin", self._decoding.num_locations)
        tied = self._node("Equal", scores, best)
        candidates = self._node("Where", tied, self._positions, self._constant(np.float32(other)))
        return self._node("Equal", self._positions, self._reduce(reduction, candidates, 1))

    def _decay(self, scores: str, span: tuple[str, ...], spans: tuple[str, ...]) -> str:
        """Return the scores after soft-NMS with a selected span; see `runtime.core.decoding.soft_nms`."""
        iou = self._iou(span, spans, np.float32)
        slope, low = np.float32(HIGH_THRESHOLD - LOW_THRESHOLD), np.float32(LOW_THRESHOLD)
        width = self._node("Mul", self._node("Sub", span[1], span[0]), self._constant(slope))
        threshold = self._node("Add", width, self._constant(low))
        overlap = self._node("Where", self._node("Greater", iou, threshold), iou, self._constant(np.float32(0)))
        exponent = self._node("Mul", self._node("Mul", overlap, overlap), self._constant(np.float32(-1 / ALPHA)))
        return self._node("Mul", scores, self._node("Exp", exponent))

    def _drop(self, scores: str, span: tuple[str, ...], spans: tuple[str, ...]) -> str:
        """Return the scores after hard NMS with a selected span, in float64; see `runtime.core.decoding.hard_nms`."""
        iou = self._iou(tuple(self._cast(edge, np.float64) for edge in span), spans, np.float64)
        dropped = self._node("Greater", iou, self._constant(np.float64(METRIC_THRESHOLD - HARD_NMS_MARGIN)))
        return self._node("Where", dropped, self._constant(np.float32(NONE)), scores)

    def _iou(self, span: tuple[str, ...], spans: tuple[str, ...], dtype: type[np.floating[Any]]) -> str:
        """Return the IoU of a selected span with all spans; see `runtime.core.moments.temporal_iou`."""
        zero, one = self._constant(dtype(0)), self._constant(dtype(1))
        overlap = self._node("Sub", self._node("Min", span[1], spans[1]), self._node("Max", span[0], spans[0]))
        hull = self._node("Sub", self._node("Max", span[1], spans[1]), self._node("Min", span[0], spans[0]))
        divisor = self._node("Where", self._node("Greater", hull, zero), hull, one)
        return self._node("Div", self._node("Max", overlap, zero), divisor)

    def _node(self, operator: str, *inputs: str, output: str | None = None, **attributes: Any) -> str:
        (name,) = self._nodes(operator, inputs, [output] if output else None, attributes)
        return name

    def _nodes(
        self, operator: str, inputs: tuple[str, ...], outputs: list[str] | None, attributes: dict[str, Any]
    ) -> list[str]:
        from onnx import helper

        name = f"moments/{operator}_{len(self.nodes)}"
        outputs = outputs or [name]
        self.nodes.append(helper.make_node(operator, list(inputs), outputs, name, **attributes))
        return outputs

    def _split(self, tensor: str, sizes: list[int], axis: int) -> list[str]:
        outputs = [f"moments/Split_{len(self.nodes)}:{index}" for index in range(len(sizes))]
        return self._nodes("Split", (tensor, self._constant(np.array(sizes))), outputs, {"axis": axis})

    def _reduce(self, operator: str, tensor: str, axis: int) -> str:
        """Return a maximum or minimum over an axis, which remains with size 1."""
        if self._opset >= _AXES_INPUT_SINCE:
            return self._node(operator, tensor, self._axes(axis), keepdims=1)
        return self._node(operator, tensor, axes=[axis], keepdims=1)

    def _cast(self, tensor: str, dtype: type[np.generic], output: str | None = None) -> str:
        from onnx import helper

        return self._node("Cast", tensor, to=helper.np_dtype_to_tensor_dtype(np.dtype(dtype)), output=output)

    def _axes(self, axis: int) -> str:
        return self._constant(np.array([axis]))

    def _constant(self, value: np.ndarray | np.generic) -> str:
        """Return the name of a constant; equal constants share one."""
        from onnx import numpy_helper

        tensor = numpy_helper.from_array(np.asarray(value))
        for constant in self.constants:
            tensor.name = constant.name
            if constant == tensor:
                return constant.name
        tensor.name = f"moments.constant_{len(self.constants)}"
        self.constants.append(tensor)
        return tensor.name
