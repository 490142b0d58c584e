"""Test `export.to_onnx`: outputs, dynamic sizes and the content of the file."""

from __future__ import annotations

import copy
import dataclasses
import getpass
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from calib.graph.naming import drn_modules
from calib.graph.opset import MAX_OPSET
from export.to_onnx import to_onnx
from export.tracing.torch_check import BATCH_SIZES, check_against_torch, relative_difference, validation_batches
from export.tracing.tracer import export_model
from runtime.artifacts.manifest import METADATA_KEY, Manifest
from runtime.backends import open_backend
from runtime.core.batch import HEAD_NAMES, INPUT_NAMES
from runtime.core.errors import CheckFailed, CheckpointError, OutputError, ShapeError
from runtime.core.io.digests import sha256
from runtime.core.tokenizer import Vocabulary
from tests import tolerances
from tests.export.conftest import (
    CONFIGS,
    MAX_QUERY_LENGTH,
    Inputs,
    manifest,
    random_inputs,
    signature,
    with_changed_weights,
)
from tests.export.rtx import build_with_rtx
from tests.raising import raises, records
from train.checkpoints import load_checkpoint, save_checkpoint
from train.network.model import DRN

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def sessions(exported: dict[str, onnx.ModelProto]) -> dict[str, onnxruntime.InferenceSession]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return {name: onnxruntime.InferenceSession(model.SerializeToString(), options) for name, model in exported.items()}


def run(session: onnxruntime.InferenceSession, inputs: Inputs) -> list[np.ndarray]:
    return session.run(
        list(HEAD_NAMES), {name: values.numpy() for name, values in zip(INPUT_NAMES, inputs, strict=True)}
    )


def assert_parity(session: onnxruntime.InferenceSession, model: DRN, inputs: Inputs) -> None:
    with torch.inference_mode():
        expected = model(*inputs)
    for name, ours, theirs in zip(HEAD_NAMES, run(session, inputs), expected, strict=True):
        assert relative_difference(ours, theirs.numpy()) <= tolerances.EXPORTED, name


@pytest.mark.parametrize("name", CONFIGS)
def test_graph_equals_torch_for_every_query_length(
    sessions: dict[str, onnxruntime.InferenceSession], networks: dict[str, DRN], name: str
) -> None:
    for length in range(1, 40):
        assert_parity(sessions[name], networks[name], random_inputs(CONFIGS[name], [length], seed=length))


@pytest.mark.parametrize("name", CONFIGS)
def test_graph_equals_torch_for_mixed_length_batches(
    sessions: dict[str, onnxruntime.InferenceSession], networks: dict[str, DRN], name: str
) -> None:
    for size in (1, 2, 3, 8, 17):
        lengths = [index % 11 + 1 for index in range(size)]
        assert_parity(sessions[name], networks[name], random_inputs(CONFIGS[name], lengths))
        assert_parity(sessions[name], networks[name], random_inputs(CONFIGS[name], lengths[::-1], longest=15))


def test_batch_and_length_are_dynamic_and_integers_int32(exported: dict[str, onnx.ModelProto]) -> None:
    int32, float32 = onnx.TensorProto.INT32, onnx.TensorProto.FLOAT
    graph = exported["tiny"].graph
    assert signature([*graph.input, *graph.output]) == {
        "query_tokens": (int32, ["batch", "query_length"]),
        "query_length": (int32, ["batch"]),
        "segment_features": (float32, ["batch", 16, 16]),
        "segment_spans": (float32, ["batch", 16, 2]),
        "matching_logits": (float32, ["batch", 28]),
        "boundary_distances": (float32, ["batch", 28, 2]),
        "iou_logits": (float32, ["batch", 28]),
    }


@pytest.mark.parametrize("name", CONFIGS)
def test_query_length_is_the_only_computed_int64(exported: dict[str, onnx.ModelProto], name: str) -> None:
    graph = onnx.shape_inference.infer_shapes(exported[name], strict_mode=True).graph
    int64 = {value.name for value in graph.value_info if value.type.tensor_type.elem_type == onnx.TensorProto.INT64} - {
        tensor.name for tensor in graph.initializer
    }
    assert {node.op_type for node in graph.node if int64 & set(node.output)} <= {"Shape", "Squeeze"}
    assert sum(node.op_type == "Cast" for node in graph.node) == 1


@pytest.mark.parametrize("name", CONFIGS)
def test_graph_has_no_unused_nodes_or_weights(exported: dict[str, onnx.ModelProto], name: str) -> None:
    model = exported[name]
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", 17)]
    assert model.producer_name == "drn-deploy"
    assert model.doc_string
    used = {name for node in model.graph.node for name in node.input} | set(HEAD_NAMES)
    assert [node.name for node in model.graph.node if not used & set(node.output)] == []
    assert [tensor.name for tensor in model.graph.initializer if tensor.name not in used] == []
    assert len({node.name for node in model.graph.node}) == len(model.graph.node)
    assert not {node.op_type for node in model.graph.node} & {"BatchNormalization", "Loop", "Scan", "If", "NonZero"}
    assert not model.functions


@pytest.mark.parametrize("name", CONFIGS)
def test_nodes_read_weights_from_initializers(exported: dict[str, onnx.ModelProto], name: str) -> None:
    graph = exported[name].graph
    weights = {tensor.name for tensor in graph.initializer}
    assert {"prop_fc.weight", "qInput.0.weight", "fpn.inner_blocks.2.bias", "fcos.head.mix_fc.weight"} <= weights
    paths = {"LSTM": (1, 2, 3), "Gemm": (1, 2), "Conv": (1,)}
    for node in graph.node:
        assert all(node.input[path] in weights for path in paths.get(node.op_type, ())), node.name


def test_node_names_identify_their_modules(exported: dict[str, onnx.ModelProto], networks: dict[str, DRN]) -> None:
    modules = {name for name, _ in networks["deep"].named_modules()}
    named: set[str] = set()
    for node in exported["deep"].graph.node:
        owners = drn_modules(node.name)
        assert owners, node.name
        assert set(owners) <= modules, node.name
        named |= set(owners)
    with_weights = {
        *("query_encoder.biLSTM", "query_encoder.W1", "query_encoder.W2", "query_encoder.W3"),
        *(f"qInput.{level}" for level in range(3)),
        *(f"backbone_net.layers.{level}" for level in range(3)),
        *(f"fpn.{blocks}.{level}" for blocks in ("inner_blocks", "layer_blocks") for level in range(3)),
        *(
            f"fcos.head.{part}"
            for part in ("cls_tower", "bbox_tower", "cls_logits", "bbox_pred", "mix_fc", "iou_scores")
        ),
        *("prop_fc", "position_transform"),
    }
    assert with_weights <= named


@pytest.mark.parametrize("name", CONFIGS)
def test_tensors_are_named_after_their_node(exported: dict[str, onnx.ModelProto], name: str) -> None:
    for node in exported[name].graph.node:
        assert set(node.output) <= set(HEAD_NAMES) or {output.split(":")[0] for output in node.output} == {node.name}


def test_graph_contains_no_paths_or_user_name(exported: dict[str, onnx.ModelProto]) -> None:
    content = exported["tiny"].SerializeToString()
    for trace in (str(ROOT), str(Path.home()), sys.prefix, "site-packages", ".py", "stack_trace", 'File "'):
        assert trace.encode() not in content, trace
    if len(getpass.getuser()) > 5:
        assert getpass.getuser().encode() not in content


def test_manifest_survives_export(exported: dict[str, onnx.ModelProto]) -> None:
    properties = {entry.key: entry.value for entry in exported["tiny"].metadata_props}
    assert list(properties) == [METADATA_KEY]
    assert Manifest.from_json(properties[METADATA_KEY]) == manifest(CONFIGS["tiny"])


def test_command_writes_runnable_graph(run_command: Any, checkpoint: Path, tmp_path: Path) -> None:
    path = tmp_path / "drn.onnx"
    result = run_command(to_onnx, "--checkpoint", checkpoint, "--output", path, "--max-query-length", MAX_QUERY_LENGTH)
    assert [line.split()[0] for line in result.out.splitlines()] == ["output", *HEAD_NAMES]
    assert [entry.name for entry in path.parent.iterdir()] == ["drn.onnx"]
    backend = open_backend(path, device="cpu")
    assert backend.manifest.stage == 2
    assert backend.manifest.max_query_length == MAX_QUERY_LENGTH
    assert backend.manifest.sources == {"drn.pt": sha256(checkpoint)}
    # Unlike torch, a distribution does not always name the CUDA version it was built for.
    assert torch.__version__.startswith(backend.manifest.producer["torch"])
    onnx.checker.check_model(path, full_check=True)


def test_check_covers_lengths_and_batch_sizes_realistically() -> None:
    config = CONFIGS["tiny"]
    batches = list(validation_batches(config, 9))
    assert {batch.query_tokens.shape[1] for batch in batches} == set(range(1, 10))
    assert {len(batch) for batch in batches} == set(BATCH_SIZES)
    assert any(np.any(np.diff(batch.query_length) > 0) for batch in batches)
    assert any(np.any(np.diff(batch.query_length) < 0) for batch in batches)
    for batch in batches:
        words = batch.query_tokens[np.arange(batch.query_tokens.shape[1]) < batch.query_length[:, None]]
        assert words.min() >= 1
        assert words.max() <= config.vocab_size
        assert batch.segment_features.min() == 0
        assert 0.6 < np.mean(batch.segment_features == 0) < 0.95
        assert np.all(batch.segment_spans[..., 0] < batch.segment_spans[..., 1])


def test_graph_failing_torch_parity_is_not_saved(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exported: dict[str, onnx.ModelProto]
) -> None:
    spoilt = with_changed_weights(exported["tiny"], lambda bias: bias + 1e-2, "fcos.head.iou_scores.1.bias")
    monkeypatch.setattr("export.tracing.checkpoint_to_onnx.export_model", lambda *_, **__: spoilt)
    output = tmp_path / "drn.onnx"
    output.write_text("what was here before")
    with raises(CheckFailed, "parity_failed", "iou_logits", "1e-04"):
        to_onnx(checkpoint, output, max_query_length=3)
    assert output.read_text() == "what was here before"
    assert list(tmp_path.iterdir()) == [output]


def process_backwards_forwards(graph: onnx.GraphProto) -> None:
    nodes = {node.name: node for node in graph.node}
    forwards = nodes["query_encoder.biLSTM.0.forwards/LSTM"]
    nodes["query_encoder.biLSTM.0.backwards/LSTM"].input[0] = forwards.input[0]


def freeze_query_length(graph: onnx.GraphProto) -> None:
    graph.initializer.append(onnx.numpy_helper.from_array(np.array(5, np.int32), "five"))
    next(node for node in graph.node if node.op_type == "Range").input[1] = "five"


@pytest.mark.parametrize(
    ("spoil", "code", "values"),
    [
        (process_backwards_forwards, "parity_failed", ("matching_logits", "1e-04")),
        (freeze_query_length, "graph_does_not_run", ()),
    ],
)
def test_torch_check_detects_a_wrong_graph(
    exported: dict[str, onnx.ModelProto],
    networks: dict[str, DRN],
    tmp_path: Path,
    spoil: Callable[[onnx.GraphProto], None],
    code: str,
    values: tuple[str, ...],
) -> None:
    graph = copy.deepcopy(exported["tiny"])
    spoil(graph.graph)
    onnx.save(graph, tmp_path / "spoilt.onnx")
    with raises(CheckFailed, code, *values):
        check_against_torch(tmp_path / "spoilt.onnx", networks["tiny"], MAX_QUERY_LENGTH)


def test_check_preserves_training_mode(
    networks: dict[str, DRN], exported: dict[str, onnx.ModelProto], tmp_path: Path
) -> None:
    onnx.save(exported["tiny"], tmp_path / "drn.onnx")
    model = copy.deepcopy(networks["tiny"]).train()
    assert set(check_against_torch(tmp_path / "drn.onnx", model, 2)) == set(HEAD_NAMES)
    assert model.training


def test_nan_output_fails_check(networks: dict[str, DRN], exported: dict[str, onnx.ModelProto], tmp_path: Path) -> None:
    onnx.save(exported["tiny"], tmp_path / "drn.onnx")
    model = copy.deepcopy(networks["tiny"])
    with torch.no_grad():
        model.fcos.head.cls_logits.bias.fill_(float("nan"))
    with raises(CheckFailed, "non_finite_output", "fcos.head.cls_logits"):
        check_against_torch(tmp_path / "drn.onnx", model, 2)


def test_invalid_checkpoint_is_rejected(exported: dict[str, onnx.ModelProto], tmp_path: Path, refused: Any) -> None:
    (tmp_path / "drn.pt").write_text("not a checkpoint")
    refused(to_onnx, "--checkpoint", tmp_path / "drn.pt", "--output", tmp_path / "drn.onnx")
    assert not (tmp_path / "drn.onnx").exists()
    with raises(CheckpointError, "missing_file", tmp_path / "absent.pt"):
        to_onnx(tmp_path / "absent.pt", tmp_path / "drn.onnx")
    with raises(CheckpointError, "not_a_file", tmp_path):
        to_onnx(tmp_path, tmp_path / "drn.onnx")
    onnx.save(exported["tiny"], tmp_path / "graph.onnx")
    with raises(CheckpointError, "not_a_torch_file", tmp_path / "graph.onnx", "drn.pt"):
        to_onnx(tmp_path / "graph.onnx", tmp_path / "drn.onnx")


def test_network_without_vocabulary_warns(checkpoint: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save_checkpoint(tmp_path / "drn.pt", dataclasses.replace(load_checkpoint(checkpoint), vocabulary=Vocabulary({})))
    to_onnx(tmp_path / "drn.pt", tmp_path / "drn.onnx", max_query_length=2)
    assert records(caplog, logging.WARNING, "--vocabulary")


def test_older_files_of_another_checkpoint_are_a_warning(
    checkpoint: Path, exported: dict[str, onnx.ModelProto], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    output, query_part, moments = (tmp_path / f"drn{suffix}.onnx" for suffix in ("", ".query", ".moments"))
    onnx.save(exported["tiny"], query_part)
    moments.write_bytes(b"damaged")
    to_onnx(checkpoint, output, max_query_length=2)
    assert records(caplog, logging.WARNING, query_part, "--split")
    assert records(caplog, logging.WARNING, moments, "--moments")
    for path in (query_part, moments):
        path.write_bytes(output.read_bytes())
    caplog.clear()
    to_onnx(checkpoint, output, max_query_length=2)
    assert not records(caplog, logging.WARNING)


def test_unwritable_output_is_rejected_first(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "export.tracing.checkpoint_to_onnx.export_model", lambda *_, **__: pytest.fail("traced all the same")
    )
    (tmp_path / "file").touch()
    for output, code in (
        (tmp_path, "output_is_directory"),
        (tmp_path / "file" / "drn.onnx", "unwritable_output"),
        (tmp_path / "other.pt", "wrong_suffix"),
        (tmp_path / "drn", "wrong_suffix"),
        (checkpoint, "wrong_suffix"),
    ):
        with raises(OutputError, code, output):
            to_onnx(checkpoint, output)


@pytest.mark.parametrize(
    ("options", "code", "values"),
    [
        ({"opset": 16}, "unsupported_opset", ("--opset", 16)),
        ({"opset": 99}, "unsupported_opset", ("--opset", 99)),
        ({"max_query_length": 0}, "invalid_option", ("--max-query-length", 0)),
        ({"clock": (16, 8)}, "inapplicable_option", ("drn.pt", "--clock")),
        ({"class_scores": True}, "inapplicable_option", ("drn.pt", "--class-scores")),
    ],
)
def test_invalid_options_are_rejected(
    checkpoint: Path, tmp_path: Path, options: dict[str, Any], code: str, values: tuple[object, ...]
) -> None:
    with raises(ShapeError, code, *values):
        to_onnx(checkpoint, tmp_path / "drn.onnx", **options)


def test_training_mode_exports_identically(networks: dict[str, DRN], exported: dict[str, onnx.ModelProto]) -> None:
    model = copy.deepcopy(networks["tiny"]).train()
    again = export_model(model, manifest(model.config))
    assert model.training
    assert again.SerializeToString(deterministic=True) == exported["tiny"].SerializeToString(deterministic=True)


@pytest.mark.rtx
def test_newest_opset_exports_and_builds(networks: dict[str, DRN], tmp_path: Path) -> None:
    model = networks["tiny"]
    newer = export_model(model, manifest(model.config), opset=MAX_OPSET)
    assert newer.opset_import[0].version == MAX_OPSET
    onnx.save(newer, tmp_path / "drn.onnx")
    assert max(check_against_torch(tmp_path / "drn.onnx", model, 4).values()) <= tolerances.EXPORTED
    build_with_rtx(newer)
