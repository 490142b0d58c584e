"""Trace a torch network to an ONNX graph, and name its nodes and tensors after modules."""

from __future__ import annotations

import contextlib
import logging
import platform
import re
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING

from calib.graph.opset import MIN_OPSET, with_opset
from runtime.artifacts.manifest import METADATA_KEY, Manifest
from runtime.core.batch import HEAD_NAMES, INPUT_NAMES
from runtime.core.packages import installed_version

if TYPE_CHECKING:
    import onnx
    from torch import nn

    from train.network.model import DRN, DRNConfig


# The lowest opset that torch's exporter supports.
TRACED_OPSET = 18


def export_model(
    model: DRN, manifest: Manifest, *, opset: int = MIN_OPSET, graph: nn.Module | None = None
) -> onnx.ModelProto:
    """Return the inference graph of a network, with its manifest in the metadata.

    A node is named MODULE/OPERATOR, such as `fcos.head.mix_fc/Conv`, with the modules of
    `export.tracing.exportable_model.ExportableDRN`. A tensor has the name of the node that computes it, a weight that
    of its module, such as `fcos.head.mix_fc.weight`. `calib.graph.naming.drn_modules` maps nodes to DRN modules.

    Args:
        model: the network, in any mode, on the CPU; it is not changed.
        manifest: stored in the metadata.
        opset: 17 to 23.
        graph: module to trace; None for `ExportableDRN(model)`.
    """
    from export.tracing.exportable_model import ExportableDRN

    traced = _trace(graph or ExportableDRN(model), model.config, max(opset, TRACED_OPSET))
    return finalize_model(
        traced,
        opset,
        {METADATA_KEY: manifest.to_json()},
        f"Dense Regression Network for video grounding. The manifest is under the metadata key {METADATA_KEY!r}.",
    )


def finalize_model(traced: onnx.ModelProto, opset: int, metadata: dict[str, str], doc_string: str) -> onnx.ModelProto:
    """Name the nodes of a traced graph, convert it to another opset, add metadata, and check it with the ONNX checker.

    Args:
        traced: graph that torch traced; it is changed.
        opset: opset of the result, 17 to 23.
        metadata: `metadata_props` of the result.
        doc_string: description that the result contains.
    """
    import onnx

    _tidy(traced.graph)
    before = onnx.helper.make_opsetid("", max(opset, TRACED_OPSET))
    exported = onnx.helper.make_model(
        traced.graph,
        opset_imports=[before],
        ir_version=onnx.helper.find_min_ir_version_for([before]),
        producer_name="drn-deploy",
        producer_version=producer()["drn-deploy"],
        doc_string=doc_string,
    )
    onnx.helper.set_model_props(exported, metadata)
    exported = with_opset(exported, opset)
    onnx.checker.check_model(exported, full_check=True)
    return exported


def producer() -> dict[str, str]:
    """Return the versions of Python and the libraries that write a file, for its manifest."""
    return {"python": platform.python_version()} | {
        name: installed_version(name) or "unknown" for name in ("drn-deploy", "torch", "onnx", "onnxscript")
    }


@contextlib.contextmanager
def silence_exporter() -> Iterator[None]:
    """Suppress the log and warnings of torch's exporter, which are about packages that are not used here."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _trace(graph: nn.Module, config: DRNConfig, opset: int) -> onnx.ModelProto:
    import torch

    batch, length = torch.export.Dim("batch", min=1), torch.export.Dim("query_length", min=1)
    # torch specializes the graph for sizes 0 and 1.
    example = (
        torch.ones(3, 5, dtype=torch.int32),
        torch.tensor([5, 2, 4], dtype=torch.int32),
        torch.zeros(3, config.num_segments, config.feature_dim),
        torch.zeros(3, config.num_segments, 2),
    )
    with silence_exporter(), torch.no_grad():
        program = torch.onnx.export(
            graph,
            example,
            dynamo=True,
            opset_version=opset,
            dynamic_shapes=({0: batch, 1: length}, {0: batch}, {0: batch}, {0: batch}),
            input_names=INPUT_NAMES,
            output_names=HEAD_NAMES,
            verbose=False,
        )
    assert program is not None
    return program.model_proto


def _tidy(graph: onnx.GraphProto) -> None:
    """Name nodes and tensors after modules, and remove the metadata of the exporter, which contains local paths."""
    graph.name = "drn"
    scopes = _scopes(list(graph.node))

    names: dict[str, str] = {value.name: value.name for value in (*graph.input, *graph.output)}
    uses: dict[str, int] = {}
    produced: set[str] = set()
    for node, scope in zip(graph.node, scopes):
        name = f"{scope}/{node.op_type}"
        uses[name] = uses.get(name, 0) + 1
        node.name = name if uses[name] == 1 else f"{name}_{uses[name]}"
        for index, output in enumerate(node.output):
            produced.add(output)
            names.setdefault(output, node.name if len(node.output) == 1 else f"{node.name}:{index}")

    for tensor in graph.initializer:
        # Weights have names with dots; the constants of the exporter do not.
        if re.fullmatch(r"\w+", tensor.name):
            names[tensor.name] = f"constant_{sum(name.startswith('constant_') for name in names.values())}"
        names.setdefault(tensor.name, tensor.name)
        tensor.name = names[tensor.name]
        del tensor.metadata_props[:]
        tensor.doc_string = ""

    for node in graph.node:
        node.input[:] = [names[name] if name else "" for name in node.input]
        node.output[:] = [names[name] for name in node.output]
        del node.metadata_props[:]
        node.doc_string = ""
    shapes = [value for value in graph.value_info if value.name in produced]
    for value in shapes:
        value.name = names[value.name]
    for value in (*graph.input, *graph.output, *shapes):
        del value.metadata_props[:]
        value.doc_string = ""

    del graph.value_info[:]
    graph.value_info.extend(shapes)
    del graph.metadata_props[:]
    graph.doc_string = ""


def _scopes(nodes: list[onnx.NodeProto]) -> list[str]:
    """Return the module of each node; a node without one gets the module of the node that reads its output."""
    scopes: list[str] = []
    used_in: dict[str, str] = {}
    for node in reversed(nodes):
        recorded = {entry.key: entry.value for entry in node.metadata_props}.get("pkg.torch.onnx.name_scopes", "")
        # Enclosing modules, outermost first, then the operation: "['', 'fpn', 'relu_3']".
        enclosing = [name for name in re.findall(r"'([^']*)'", recorded)[:-1] if name and not name.startswith("_")]
        scope = enclosing[-1] if enclosing else next((used_in[name] for name in node.output if name in used_in), "drn")
        scopes.insert(0, scope)
        used_in.update(dict.fromkeys(node.input, scope))
    return scopes
