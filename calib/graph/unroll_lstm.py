"""Unroll the LSTM of a graph for queries of a fixed number of tokens.

TensorRT runs each direction of an LSTM as a loop, which CUDA graphs cannot capture. Unrolled, both directions take
their steps together, and one product applies the input weights to all words before the first step. Steps past the end
of a query cost the same time, so engines are built for a few numbers of tokens, and the runtime takes the smallest one
that fits (`runtime.backends.tensorrt_backend`).

Shape letters: S steps, B batch, E width of a word, H LSTM width. Gates are in ONNX order: i, o, f, c.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from calib.graph.graph_editing import copied, needed_nodes, replace_nodes
from runtime.core.errors import ModelFileError

TOKENS = "query_tokens"


def unroll_lstm(model: onnx.ModelProto, steps: int) -> onnx.ModelProto:
    """Return a copy of a graph with its LSTMs unrolled.

    Args:
        model: a graph of this toolkit, of any precision. Each LSTM is computed in the type of its weights.
        steps: number of tokens that the copy takes; shorter queries are padded as before.

    Raises:
        ModelFileError: the graph does not have two LSTMs per layer.
    """
    layers = lstm_layers(model)
    copy = copied(model)
    graph = copy.graph
    (tokens,) = (value for value in graph.input if value.name == TOKENS)
    tokens.type.tensor_type.shape.dim[1].dim_value = steps
    # Other shapes are described for any number of tokens.
    del graph.value_info[:]
    nodes = [node for node in graph.node if node.op_type != "LSTM"]
    for scope, pair in layers.items():
        layer = _Layer(scope, pair, {tensor.name: tensor for tensor in graph.initializer}, steps)
        nodes += layer.nodes()
        graph.initializer.extend(layer.constants)
    known = [value.name for value in (*graph.input, *graph.initializer)]
    # Drops the initial states of the LSTMs.
    replace_nodes(graph, needed_nodes(list(_in_order(nodes, known)), {value.name for value in graph.output}))
    return copy


def lstm_layers(model: onnx.ModelProto) -> dict[str, list[onnx.NodeProto]]:
    """Return the two LSTMs of each layer by their common name prefix.

    Raises:
        ModelFileError: the graph reads no tokens, or does not have two LSTMs per layer.
    """
    layers: dict[str, list[onnx.NodeProto]] = {}
    for node in model.graph.node:
        if node.op_type == "LSTM":
            layers.setdefault(node.name.rpartition("/")[0].rpartition(".")[0], []).append(node)
    reads_words = any(value.name == TOKENS for value in model.graph.input)
    if not reads_words or not layers or any(len(pair) != 2 for pair in layers.values()):
        raise ModelFileError(
            f"Expected two LSTM nodes for each layer, got {[len(pair) for pair in layers.values()]}. Export the model "
            "again with this version.",
            code="unsupported_lstm",
        )
    return layers


class _Layer:
    """Both directions of one BiLSTM layer as unrolled nodes."""

    def __init__(
        self, scope: str, pair: Sequence[onnx.NodeProto], weights: dict[str, onnx.TensorProto], steps: int
    ) -> None:
        self.scope, self.pair, self.steps = scope, pair, steps
        self.constants: list[onnx.TensorProto] = []
        directions = [[numpy_helper.to_array(weights[name]) for name in node.input[1:4]] for node in pair]
        self.hidden = directions[0][1].shape[2]
        # (2, E, 4H), (2, H, 4H) and (2, 1, 4H): W and R transposed for MatMul, and the sum of both biases.
        self.word_weights = self._constant("W", np.concatenate([w.transpose(0, 2, 1) for w, _, _ in directions]))
        self.state_weights = self._constant("R", np.concatenate([r.transpose(0, 2, 1) for _, r, _ in directions]))
        biases = [b.astype(np.float64).reshape(1, 2, -1).sum(axis=1, keepdims=True) for *_, b in directions]
        self.bias = self._constant("B", np.concatenate(biases).astype(np.float32).astype(directions[0][2].dtype))

    def _constant(self, name: str, values: np.ndarray) -> str:
        name = f"{self.scope}.{name}"
        self.constants.append(numpy_helper.from_array(np.ascontiguousarray(values), name))
        return name

    def _sizes(self, name: str, values: Sequence[int]) -> str:
        return self._constant(name, np.array(values, np.int64))

    def nodes(self) -> Iterator[onnx.NodeProto]:
        """Yield the nodes that compute the (S, 1, B, H) outputs of both LSTMs from their (S, B, E) inputs."""

        def made(kind: str, inputs: Iterable[str], name: str, outputs: int = 1, **more: Any) -> onnx.NodeProto:
            name = f"{self.scope}/{name}"
            names = [name] if outputs == 1 else [f"{name}:{index}" for index in range(outputs)]
            return helper.make_node(kind, list(inputs), names, name, **more)

        steps, hidden, scope = self.steps, self.hidden, self.scope
        first, second, width = self._sizes("axis0", [0]), self._sizes("axis1", [1]), self.word_weights
        for index, node in enumerate(self.pair):
            yield made("Unsqueeze", [node.input[0], first], f"words{index}")
        # One product for all words of all queries: (2, S, B, E) as (2, S B, E).
        yield made("Concat", [f"{scope}/words0", f"{scope}/words1"], "words", axis=0)
        embedded = next(tensor for tensor in self.constants if tensor.name == width).dims[1]
        yield made("Reshape", [f"{scope}/words", self._sizes("rows", [2, -1, embedded])], "rows")
        yield made("MatMul", [f"{scope}/rows", width], "product")
        yield made("Add", [f"{scope}/product", self.bias], "sums")
        yield made("Reshape", [f"{scope}/sums", self._sizes("steps", [2, steps, -1, 4 * hidden])], "given")
        alone = self._sizes("alone", [1] * steps)
        yield made("Split", [f"{scope}/given", alone], "step", steps, axis=1)
        parts, thirds = self._sizes("parts", [3 * hidden, hidden]), self._sizes("thirds", [hidden] * 3)
        state = cell = ""
        for step in range(steps):
            at = f"{scope}/step:{step}" if steps > 1 else f"{scope}/step"
            yield made("Squeeze", [at, second], f"{step}.given")
            gates = f"{scope}/{step}.given"
            if state:
                yield made("MatMul", [state, self.state_weights], f"{step}.recalled")
                yield made("Add", [gates, f"{scope}/{step}.recalled"], f"{step}.gates")
                gates = f"{scope}/{step}.gates"
            yield made("Split", [gates, parts], f"{step}.parts", 2, axis=2)
            yield made("Sigmoid", [f"{scope}/{step}.parts:0"], f"{step}.open")
            yield made("Split", [f"{scope}/{step}.open", thirds], f"{step}.gate", 3, axis=2)
            yield made("Tanh", [f"{scope}/{step}.parts:1"], f"{step}.candidate")
            entry, output, forget = (f"{scope}/{step}.gate:{index}" for index in range(3))
            yield made("Mul", [entry, f"{scope}/{step}.candidate"], f"{step}.entered")
            entered = f"{scope}/{step}.entered"
            if cell:
                yield made("Mul", [forget, cell], f"{step}.remembered")
                yield made("Add", [f"{scope}/{step}.remembered", entered], f"{step}.cell")
                entered = f"{scope}/{step}.cell"
            cell = entered
            yield made("Tanh", [cell], f"{step}.squashed")
            yield made("Mul", [output, f"{scope}/{step}.squashed"], f"{step}.state")
            state = f"{scope}/{step}.state"
            yield made("Unsqueeze", [state, first], f"{step}.row")
        # (S, 2, B, H), split into the outputs of the two LSTMs.
        yield made("Concat", [f"{scope}/{step}.row" for step in range(steps)], "states", axis=0)
        outputs = [node.output[0] for node in self.pair]
        yield helper.make_node(
            "Split", [f"{scope}/states", self._sizes("directions", [1, 1])], outputs, f"{scope}/directions", axis=1
        )


def _in_order(nodes: Sequence[onnx.NodeProto], known: Iterable[str]) -> Iterator[onnx.NodeProto]:
    """Yield nodes in topological order, otherwise in the given order."""
    ready, waiting = {"", *known}, list(nodes)
    while waiting:
        later = []
        for node in waiting:
            if ready.issuperset(node.input):
                ready.update(node.output)
                yield node
            else:
                later.append(node)
        assert len(later) < len(waiting), "the graph has a cycle"
        waiting = later
