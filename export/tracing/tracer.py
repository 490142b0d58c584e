"""Trace a torch network to an ONNX graph and simplify it."""

from __future__ import annotations

import contextlib
import importlib.metadata
import logging
import platform
import re
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING

from calib.graph.opset import MIN_OPSET, with_opset
from runtime.artifacts.manifest import METADATA_KEY, Manifest
from runtime.core.batch import HEAD_NAMES, INPUT_NAMES

if TYPE_CHECKING:
    import onnx
    from torch import nn

    from train.network.model import DRN, DRNConfig


TRACED_OPSET = 18


def export_model(
    model: DRN, manifest: Manifest, *, opset: int = MIN_OPSET, graph: nn.Module | None = None
) -> onnx.ModelProto:
    """Return the inference graph of `model` with `manifest` inside.

    A node is called `<module>/<operator>`, as `fcos.head.mix_fc/Conv`, where the module is the one of
    `export.tracing.exportable_model.ExportableDRN`; a tensor is called after the node it comes from, and a weight after
    its module, as `fcos.head.mix_fc.weight`. `drn_modules` turns a node's name into the names of DRN's own modules.

    Args:
        model: the network, in any mode, on the CPU; it stays as it is.
        manifest: what the file says of itself.
        opset: of the graph, 17 to 23.
        graph: what is traced; `export.tracing.exportable_model.ExportableDRN` of the model when None.
    """
    from export.tracing.exportable_model import ExportableDRN

    traced = _traced(graph or ExportableDRN(model), model.config, max(opset, TRACED_OPSET))
    return finalize_model(
        traced,
        opset,
        {METADATA_KEY: manifest.to_json()},
        "Dense Regression Network: where in a video a sentence happens. All that is needed to use it "
        f"stands under the metadata key {METADATA_KEY!r}.",
    )


def finalize_model(traced: onnx.ModelProto, opset: int, metadata: dict[str, str], doc_string: str) -> onnx.ModelProto:
    """Return what the exporter traced, tidied, in the opset asked for, with its metadata, and checked."""
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
    """Return the versions of what makes a file, for its manifest."""
    return {"python": platform.python_version()} | {
        name: _version(name) for name in ("drn-deploy", "torch", "onnx", "onnxscript")
    }


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


@contextlib.contextmanager
def silence_exporter() -> Iterator[None]:
    """Keep torch's exporter quiet: it warns of packages that we do not use."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _traced(graph: nn.Module, config: DRNConfig, opset: int) -> onnx.ModelProto:
    import torch

    batch, length = torch.export.Dim("batch", min=1), torch.export.Dim("query_length", min=1)
    # Any sizes but 0 and 1, which torch would take for special.
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
    """Drop what the exporter noted (stack traces, with paths of this machine), and name everything after its module."""
    graph.name = "drn"
    scopes = _scopes(list(graph.node))

    names: dict[str, str] = {value.name: value.name for value in (*graph.input, *graph.output)}
    taken: dict[str, int] = {}
    produced: set[str] = set()
    for node, scope in zip(graph.node, scopes):
        name = f"{scope}/{node.op_type}"
        taken[name] = taken.get(name, 0) + 1
        node.name = name if taken[name] == 1 else f"{name}_{taken[name]}"
        for index, output in enumerate(node.output):
            produced.add(output)
            names.setdefault(output, node.name if len(node.output) == 1 else f"{node.name}:{index}")

    for tensor in graph.initializer:
        # Weights have their module's name; the exporter's own constants are numbered.
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
    """Return the module of each node; one whose module the exporter lost belongs where its result is used."""
    scopes: list[str] = []
    used_in: dict[str, str] = {}
    for node in reversed(nodes):
        noted = {entry.key: entry.value for entry in node.metadata_props}.get("pkg.torch.onnx.name_scopes", "")
        # The list of enclosing modules, outermost first, then the operation: "['', 'fpn', 'relu_3']".
        enclosing = [name for name in re.findall(r"'([^']*)'", noted)[:-1] if name and not name.startswith("_")]
        scope = enclosing[-1] if enclosing else next((used_in[name] for name in node.output if name in used_in), "drn")
        scopes.insert(0, scope)
        used_in.update(dict.fromkeys(node.input, scope))
    return scopes
