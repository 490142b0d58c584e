"""Measure the speed-up of each optimization of the exported graph on a CPU, by removing one at a time.

Each variant is checked against the exported graph. Results are ratios of processor time to that of the exported graph:
above 1, the optimization is faster.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import helper, numpy_helper
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.measurement import environment, interleave, medians, random_encoded_video, sparse_features
from calib.graph.conv_padding import extract_padding
from calib.graph.split_model import split_graph
from export.tracing.exportable_model import ExportableConv, ExportableDRN
from export.tracing.torch_check import TOLERANCE, relative_difference
from export.tracing.tracer import export_model
from runtime.backends.onnxruntime_session import DISABLED_OPTIMIZERS
from runtime.core.batch import ENCODED_FEATURES, VIDEO_INDEX
from runtime.core.cli import command
from runtime.core.errors import CheckFailed
from runtime.core.io.atomic_files import write_json
from train.checkpoints import load_checkpoint
from train.network.model import DRN, DRNConfig, with_duration

LENGTHS = (4, 8, 12)
EXPORTED, PRODUCT, MILLISECONDS = "as exported", "prop_fc as a matrix product", "as exported, ms each"
PADDED = "convolutions that pad by themselves"


def rewritings(
    checkpoint: Path,
    *,
    samples: int = 40,
    batch: int = 32,
    threads: int = 1,
    only: tuple[str, ...] = (),
    output: Path | None = None,
) -> dict[str, Any]:
    """Export the graph without each optimization, and time all variants in ONNX Runtime on this CPU.

    Args:
        checkpoint: drn.pt of a network of any size.
        samples: runs of each at batch 1, and a quarter of them at the larger batch; the report has medians.
        batch: the larger batch.
        threads: number of CPU threads.
        only: parts of the names of variants to time. Default: all.
        output: JSON file for the report.
    """
    torch.set_num_threads(threads)
    loaded = load_checkpoint(checkpoint)
    model = loaded.model()
    manifest = loaded.manifest()

    def exported(change: Callable[[ExportableDRN, DRN], Any] | None = None) -> onnx.ModelProto:
        graph = ExportableDRN(model)
        if change:
            change(graph, model)
        return export_model(model, manifest, opset=18, graph=graph)

    def selected(name: str) -> bool:
        return not only or any(part in name for part in only)

    complete = exported()
    graphs = {EXPORTED: complete}
    graphs.update((name, exported(change)) for name, change in TRACED.items() if selected(name))
    graphs.update((name, rewrite(complete)) for name, rewrite in REWRITTEN.items() if selected(name))
    # The query part is timed on an encoded video, the video part by itself.
    query_parts = {name: _session(extract_padding(split_graph(graph)[1]), threads) for name, graph in graphs.items()}
    if selected(PADDED):
        query_parts[PADDED] = _session(split_graph(complete)[1], threads)
    part = extract_padding(split_graph(complete)[1])
    query_parts.update((name, _session(part, threads, change)) for name, change in SETTINGS.items() if selected(name))
    video_parts = {EXPORTED: _session(split_graph(complete)[0], threads)}
    if selected(PRODUCT):
        video_parts[PRODUCT] = _session(split_graph(exported(_matrix_product))[0], threads)

    results: dict[str, dict[str, float]] = {}
    for size, length, runs in (*((1, length, samples) for length in LENGTHS), (batch, 8, max(5, samples // 4))):
        seconds = _timed(query_parts, _queries(model.config, size, length), runs)
        results[f"{size} x {length} words"] = _relative(seconds, size)
    for size in (1, 8):
        seconds = _timed(video_parts, _videos(model.config, size), max(5, samples // 2))
        results[f"{size} videos"] = _relative(seconds, size)
    print(_table(results))
    report = {**environment(threads), "time over that of the graph as exported": results}
    if output:
        write_json(output, report)
    return report


def _relative(seconds: dict[str, float], size: int) -> dict[str, float]:
    base = seconds[EXPORTED]
    return {MILLISECONDS: 1e3 * base / size, **{name: value / base for name, value in seconds.items()}}


def _separate_towers(graph: ExportableDRN, model: DRN) -> None:
    """Compute both towers separately."""
    (joined,) = graph.fcos.head.towers
    weights, biases = joined.weight.chunk(2), joined.bias.chunk(2)
    halves = [ExportableConv(w[:, :, 0], b, relu=True) for w, b in zip(weights, biases, strict=True)]

    class Towers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.halves = nn.ModuleList(halves)

        def forward(self, inputs: Tensor) -> Tensor:
            return torch.cat([half(inputs) for half in self.halves], dim=1)

    graph.fcos.head.towers = nn.ModuleList([Towers()])


def _by_level(graph: ExportableDRN, model: DRN) -> None:
    """Compute the head level by level, as the published code does."""
    head = graph.fcos.head
    lengths = [model.config.num_segments // stride for stride in model.config.strides]
    scales = head.scales.split(lengths)
    for block in graph.fpn.layer_blocks:
        block.extra = 0

    class Levels(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.towers, self.mix_fc = head.towers, head.mix_fc
            self.predictions, self.iou_scores = head.predictions, head.iou_scores

        def forward(self, levels: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
            heads = []
            for level, scale in zip(levels, scales, strict=True):
                towers = level
                for layer in self.towers:
                    towers = layer(towers)
                iou = self.iou_scores[1](self.iou_scores[0](self.mix_fc(towers))).flatten(1)
                matching, boundary = self.predictions(towers).squeeze(2).split((1, 2), dim=1)
                heads.append((matching.flatten(1), torch.exp(boundary * scale).transpose(1, 2), iou))
            return tuple(torch.cat(parts, 1) for parts in zip(*heads, strict=True))  # type: ignore[return-value]

    graph.fcos.head = Levels()


def _unfolded_norm(graph: ExportableDRN, model: DRN) -> None:
    """Apply batch norm after its convolution; ONNX Runtime is expected to fold it while loading."""

    class Normed(nn.Module):
        def __init__(self, conv: ExportableConv) -> None:
            super().__init__()
            scale = torch.rand(len(conv.weight), dtype=torch.float64) + 0.5
            self.conv = copy.deepcopy(conv)
            self.conv.relu = False
            self.conv.weight = nn.Parameter((conv.weight.double() / scale[:, None, None, None]).float())
            self.conv.bias = None
            self.norm = nn.BatchNorm2d(len(scale), eps=0.0).eval()
            self.norm.weight = nn.Parameter(scale.float())
            self.norm.bias = nn.Parameter(conv.bias.clone())

        def forward(self, inputs: Tensor) -> Tensor:
            return functional.relu(self.norm(self.conv(inputs)))

    head = graph.fcos.head
    for blocks in (graph.fpn.inner_blocks, graph.fpn.layer_blocks, head.towers):
        for index, block in enumerate(blocks):
            blocks[index] = Normed(block)
    head.mix_fc, head.iou_scores[0] = Normed(head.mix_fc), Normed(head.iou_scores[0])
    graph.requires_grad_(False)


def _positions_as_channels(graph: ExportableDRN, model: DRN) -> None:
    """Concatenate the positions, as 256 channels, with the gated features before the first convolution."""
    conv, norm, _ = model.backbone_net.layers[0]
    scale = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
    weight = (scale[:, None, None] * conv.weight.double()).float()[:, :, None]
    bias = (norm.bias.double() - norm.running_mean.double() * scale).float()
    transform = copy.deepcopy(model.position_transform)

    class Positions(nn.Module):
        def forward(self, spans: Tensor) -> Tensor:
            return transform(with_duration(spans)).transpose(1, 2).unsqueeze(2)

    class First(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.bias = nn.Parameter(weight.contiguous()), nn.Parameter(bias)

        def forward(self, gated: Tensor, positions: Tensor | None) -> Tensor:
            inputs = torch.cat((gated, positions), dim=1)
            return functional.relu(functional.conv2d(inputs, self.weight, self.bias, padding=(0, 1)))

    positions = Positions()
    positions.transform = transform
    graph.position_transform = positions  # type: ignore[assignment]
    graph.backbone_net.layers[0] = First()
    graph.requires_grad_(False)


def _one_dimension(graph: ExportableDRN, model: DRN) -> None:
    """Convolve (B, C, T) as torch's Conv1d does; ONNX Runtime has no blocked layout for it."""
    for module in graph.modules():
        if isinstance(module, ExportableConv):
            module.__class__ = type("Flat", (_Flat, module.__class__), {})


class _Flat(ExportableConv):
    def _convolve(self, inputs: Tensor) -> Tensor:
        weight = self.weight[:, :, 0]
        return functional.conv1d(
            inputs.squeeze(2), weight, self.bias, self.stride[1], self.padding[1], groups=self.groups
        ).unsqueeze(2)

    def _convolve_longer(self, inputs: Tensor) -> Tensor:
        return self._convolve(functional.pad(inputs, (0, self.extra)))


def _matrix_product(graph: ExportableDRN, model: DRN) -> None:
    """Compute `prop_fc` as a matrix product."""

    class Product(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(model.prop_fc.weight.detach().T.contiguous(), requires_grad=False)
            self.bias = nn.Parameter(model.prop_fc.bias.detach().clone(), requires_grad=False)

        def forward(self, features: Tensor) -> Tensor:
            return (features @ self.weight + self.bias).transpose(1, 2).unsqueeze(2)

    graph.prop_fc = Product()  # type: ignore[assignment]


def _unfolded_score(graph: ExportableDRN, model: DRN) -> None:
    """Apply `W1` after the product of `W2` and each word, as the published code does."""
    encoder, ours = model.query_encoder, graph.query_encoder
    weight = torch.cat([project.weight for project in encoder.W2]).detach().T.contiguous()
    ours.W2.weight = nn.Parameter(weight, requires_grad=False)
    ours.W2.bias = nn.Parameter(torch.cat([project.bias for project in encoder.W2]).detach(), requires_grad=False)

    class Scored(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner
            self.score = nn.Parameter(encoder.W1.weight.detach()[0].clone(), requires_grad=False)

        def forward(self, shared: Tensor) -> Tensor:
            return (self.inner(shared).unflatten(1, (ours.levels, -1)) * self.score).flatten(1)

    ours.W2 = Scored(ours.W2)  # type: ignore[assignment]


def _bidirectional(model: onnx.ModelProto) -> onnx.ModelProto:
    """Replace both LSTMs by one bidirectional LSTM operator with the query lengths."""
    graph = _copied(model)
    nodes = {node.name: node for node in graph.graph.node}
    constants = {entry.name: numpy_helper.to_array(entry) for entry in graph.graph.initializer}
    prefix = "query_encoder.biLSTM.0"
    both = [
        np.concatenate([constants[f"{prefix}.{way}.{name}"] for way in ("forwards", "backwards")]) for name in "WRB"
    ]
    for name, values in zip("WRB", both, strict=True):
        graph.graph.initializer.append(numpy_helper.from_array(values, f"both.{name}"))
    graph.graph.initializer.append(numpy_helper.from_array(np.array([0, 0, -1], np.int64), "both.shape"))
    words = nodes[f"{prefix}.forwards/LSTM"].input[0]
    hidden = both[1].shape[2]
    new = [
        helper.make_node(
            "LSTM", [words, "both.W", "both.R", "both.B", "query_length"], ["both"], "both/LSTM",
            hidden_size=hidden, direction="bidirectional",
        ),
        helper.make_node("Transpose", ["both"], ["both/turned"], "both/Transpose", perm=[0, 2, 1, 3]),
        helper.make_node("Reshape", ["both/turned", "both.shape"], [f"{prefix}/Concat"], "both/Reshape"),
    ]  # fmt: skip
    return _replaced(graph, {f"{prefix}/Concat": new})


def _word_table(model: onnx.ModelProto) -> onnx.ModelProto:
    """Look up the products of words and input weights in a table, and compute the recurrence as a Scan."""
    graph = _copied(model)
    constants = {entry.name: numpy_helper.to_array(entry) for entry in graph.graph.initializer}
    embedding = constants["query_encoder.embedding.weight"].astype(np.float64)
    nodes = {node.name: node for node in graph.graph.node}
    replaced: dict[str, list[onnx.NodeProto]] = {}
    for way in ("forwards", "backwards"):
        scope = f"query_encoder.biLSTM.0.{way}"
        weight, recurrent, bias = (constants[f"{scope}.{name}"][0].astype(np.float64) for name in "WRB")
        hidden = recurrent.shape[1]
        table = embedding @ weight.T + bias.reshape(2, -1).sum(0)
        tokens = next(n for n in graph.graph.node if n.output[0] == nodes[f"{scope}/LSTM"].input[0]).input[1]
        values = {"table": table.astype(np.float32), "R": recurrent.T.astype(np.float32).copy()}
        integers = {"parts": [3 * hidden, hidden], "hidden": [hidden]}
        for name, array in (*values.items(), *((n, np.array(v, np.int64)) for n, v in integers.items())):
            graph.graph.initializer.append(numpy_helper.from_array(array, f"{scope}.scan.{name}"))
        replaced[f"{scope}/Squeeze"] = _scan(scope, tokens, f"{scope}/Squeeze", hidden)
    return _replaced(graph, replaced)


def _scan(scope: str, tokens: str, output: str, hidden: int) -> list[onnx.NodeProto]:
    """Return the nodes of one direction of the LSTM as a Scan."""
    make = helper.make_node

    def rows(name: str, width: int) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["batch", width])

    body = helper.make_graph(
        [
            make("MatMul", ["state", f"{scope}.scan.R"], ["recurrent"]),
            make("Add", ["recurrent", "word"], ["sum"]),
            make("Split", ["sum", f"{scope}.scan.parts"], ["logits", "candidate"], axis=-1),
            make("Sigmoid", ["logits"], ["gates"]),
            make("Split", ["gates"], ["input", "output", "forget"], axis=-1, num_outputs=3),
            make("Tanh", ["candidate"], ["candidate_value"]),
            make("Mul", ["input", "candidate_value"], ["new"]),
            make("Mul", ["forget", "cell"], ["retained"]),
            make("Add", ["new", "retained"], ["new_cell"]),
            make("Tanh", ["new_cell"], ["activated"]),
            make("Mul", ["output", "activated"], ["new_state"]),
            make("Identity", ["new_state"], ["row"]),
        ],
        "step",
        [rows("state", hidden), rows("cell", hidden), rows("word", 4 * hidden)],
        [rows("new_state", hidden), rows("new_cell", hidden), rows("row", hidden)],
    )  # fmt: skip
    return [
        make("Gather", [f"{scope}.scan.table", tokens], [f"{scope}/words"], f"{scope}/Gather"),
        make("Shape", [tokens], [f"{scope}/batch"], f"{scope}/Shape", start=1),
        make("Concat", [f"{scope}/batch", f"{scope}.scan.hidden"], [f"{scope}/size"], f"{scope}/Concat", axis=0),
        make("ConstantOfShape", [f"{scope}/size"], [f"{scope}/zeros"], f"{scope}/ConstantOfShape"),
        make(
            "Scan",
            [f"{scope}/zeros", f"{scope}/zeros", f"{scope}/words"],
            [f"{scope}/state", f"{scope}/cell", output],
            f"{scope}/Scan",
            body=body,
            num_scan_inputs=1,
        ),
    ]


def _copied(model: onnx.ModelProto) -> onnx.ModelProto:
    graph = onnx.ModelProto()
    graph.CopyFrom(model)
    return graph


def _replaced(model: onnx.ModelProto, new: dict[str, list[onnx.NodeProto]]) -> onnx.ModelProto:
    """Replace nodes by name. ONNX Runtime removes unused nodes and constants when it loads the graph."""
    nodes: list[onnx.NodeProto] = []
    for node in model.graph.node:
        nodes += new.get(node.name, [node])
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    onnx.checker.check_model(model)
    return model


TRACED: dict[str, Callable[[ExportableDRN, DRN], None]] = {
    "batch norm not folded": _unfolded_norm,
    "W1 not folded into W2": _unfolded_score,
    "positions as 256 channels": _positions_as_channels,
    "two towers": _separate_towers,
    "head level by level": _by_level,
    "convolutions of one dimension": _one_dimension,
}
REWRITTEN: dict[str, Callable[[onnx.ModelProto], onnx.ModelProto]] = {
    "one bidirectional LSTM": _bidirectional,
    "word table and Scan for the LSTM": _word_table,
}


def _level(name: str) -> Callable[[Any], None]:
    def change(options: Any) -> None:
        options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, name)

    return change


def _entry(name: str, value: str) -> Callable[[Any], None]:
    return lambda options: options.add_session_config_entry(name, value)


SETTINGS: dict[str, Callable[[Any], None]] = {
    "again as exported": lambda options: None,
    "session: optimisations extended": _level("ORT_ENABLE_EXTENDED"),
    "session: optimisations basic": _level("ORT_ENABLE_BASIC"),
    "session: no memory arena": lambda options: setattr(options, "enable_cpu_mem_arena", False),
    "session: no memory pattern": lambda options: setattr(options, "enable_mem_pattern", False),
    "session: denormals as zero": _entry("session.set_denormal_as_zero", "1"),
    "session: weights not prepacked": _entry("session.disable_prepacking", "1"),
}


def _session(model: onnx.ModelProto, threads: int, change: Callable[[Any], None] | None = None) -> Any:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads
    if change:
        change(options)
    return onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"], disabled_optimizers=DISABLED_OPTIMIZERS
    )


def _queries(config: DRNConfig, size: int, length: int) -> dict[str, np.ndarray]:
    """Return the inputs of the query part for queries of `length` or one word less, on one encoded video."""
    video = random_encoded_video(config)
    return {
        "query_tokens": np.random.default_rng(0).integers(1, config.vocab_size + 1, (size, length), dtype=np.int32),
        "query_length": np.array([length - index % 2 for index in range(size)], np.int32),
        VIDEO_INDEX: np.zeros(size, np.int32),
        ENCODED_FEATURES: video.features[None],
        "segment_spans": video.spans[None],
    }


def _videos(config: DRNConfig, size: int) -> dict[str, np.ndarray]:
    """Return the inputs of the video part."""
    rng = np.random.default_rng(0)
    return {"segment_features": sparse_features(rng, size, config.num_segments, config.feature_dim)}


def _timed(sessions: dict[str, Any], feed: dict[str, np.ndarray], runs: int) -> dict[str, float]:
    """Return the median seconds of each session, after a check of its outputs."""
    expected = sessions[EXPORTED].run(None, feed)
    for name, session in sessions.items():
        pairs = zip(session.run(None, feed), expected, strict=True)
        difference = max(relative_difference(actual, reference) for actual, reference in pairs)
        if not difference <= TOLERANCE:
            raise CheckFailed(
                f"The outputs of {name!r} differ by {difference:.1e}, more than {TOLERANCE:g}. Correct the variant."
            )
    calls = {name: lambda turn, session=session: session.run(None, feed) for name, session in sessions.items()}
    return medians(interleave(calls, runs, 2, time.process_time))


def _table(results: dict[str, dict[str, float]]) -> str:
    names = list(dict.fromkeys(name for times in results.values() for name in times))
    width = max(map(len, names))
    lines = [" " * width + "".join(f"  {column:>13}" for column in results)]
    for name in names:
        cells = (format(times[name], ".3f") if name in times else "" for times in results.values())
        lines.append(f"{name:<{width}}" + "".join(f"  {cell:>13}" for cell in cells))
    return "\n".join(lines)


if __name__ == "__main__":
    command(rewritings)
