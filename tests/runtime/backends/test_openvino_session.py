"""Test `runtime.backends.openvino_session`: graphs give the results of ONNX Runtime, and INT8 is exact on every CPU."""

from __future__ import annotations

import dataclasses
import importlib.util
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from calib.graph.moments import with_moments
from calib.graph.onnx_graph import read_manifest, set_manifest
from calib.graph.split_model import split_graph, write_split_model
from calib.qdq_quantizer import LARGEST, MAX_EXACT_WEIGHT
from runtime import Grounder
from runtime.artifacts.manifest import Manifest
from runtime.artifacts.onnx_metadata import with_digest
from runtime.backends import open_backend
from runtime.backends.exact_int8 import saturates
from runtime.backends.openvino_session import OpenVinoSession
from runtime.core.batch import DURATION, Batch
from runtime.core.cpu_info import cpu_features
from runtime.core.errors import DeviceError, ModelFileError, ShapeError
from tests.raising import raises
from tests.runtime.engine_bench import Graphs
from tests.runtime.number_checks import check_video_index, check_words_and_lengths
from tests.tolerances import HEADS

installed = pytest.mark.skipif(importlib.util.find_spec("openvino") is None, reason="OpenVINO is not installed")


@pytest.fixture(scope="module")
def files(graphs: Graphs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with drn.onnx and its parts for OpenVINO, and the same below `reference` for ONNX Runtime."""
    directory = tmp_path_factory.mktemp("openvino")
    shutil.copytree(graphs.whole.parent, directory / "reference")
    graph = onnx.load(graphs.whole)
    manifest = Manifest.from_json({entry.key: entry.value for entry in graph.metadata_props}["drn.manifest"])
    set_manifest(graph, dataclasses.replace(manifest, library="openvino"))
    write_split_model(*split_graph(graph), directory / "drn.onnx")
    (directory / "drn.onnx").write_bytes(with_digest(graph.SerializeToString()))
    return directory


def batch_of(manifest: Manifest, rows: int, words: int, seed: int = 0) -> Batch:
    rng = np.random.default_rng(seed)
    segments = manifest.decoding.num_segments
    lengths = rng.integers(1, words + 1, rows).astype(np.int32)
    lengths[:1] = words
    tokens = rng.integers(1, len(manifest.vocabulary.words), (rows, words)).astype(np.int32)
    tokens[np.arange(words) >= lengths[:, None]] = 0
    features = rng.random((rows, segments, manifest.features.dim), np.float32)
    return Batch(tokens, lengths, features, np.sort(rng.random((rows, segments, 2), np.float32), -1))


def close(actual: Any, expected: Any) -> bool:
    pairs = zip(vars(actual).values(), vars(expected).values(), strict=True)
    return all(np.abs(a - b).max(initial=0) <= HEADS * np.abs(b).max(initial=1) for a, b in pairs)


@installed
@pytest.mark.parametrize("name", ["drn.onnx", "drn.query.onnx"])
def test_heads_equal_those_of_onnx_runtime(files: Path, name: str) -> None:
    actual, expected = open_backend(files / name, "cpu", 1), open_backend(files / "reference" / name, "cpu", 1)
    assert actual.manifest.library == "openvino"
    # Batch sizes and lengths change in both directions, as OpenVINO compiles kernels for new shapes.
    for rows, words in ((1, 6), (5, 3), (1, 4), (3, 12), (0, 4), (2, 1)):
        batch = batch_of(expected.manifest, rows, words)
        assert close(actual.run(batch), expected.run(batch)), (rows, words)


@installed
def test_threads_that_share_a_model_get_their_own_answers(files: Path) -> None:
    model = open_backend(files / "drn.onnx", "cpu", 2)
    batches = [batch_of(model.manifest, 1 + seed % 3, 4, seed) for seed in range(12)]
    alone = [model.run(batch) for batch in batches]
    with ThreadPoolExecutor(4) as pool:
        assert all(map(close, pool.map(model.run, batches), alone))


@installed
def test_session_computes_in_fp32_on_the_given_threads(files: Path) -> None:
    session = OpenVinoSession(str(files / "drn.onnx"), 2)
    compiled = session._request.get_compiled_model()
    assert compiled.get_property("INFERENCE_NUM_THREADS") == 2
    assert compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name() == "f32"
    # Processes of one machine would pin their threads to the same cores.
    assert compiled.get_property("ENABLE_CPU_PINNING") is False


@installed
@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("query_tokens", lambda array: array.astype(np.int64)),
        ("query_length", lambda array: array[:1]),
        ("segment_features", lambda array: array[:, :, :-1]),
        ("segment_spans", lambda array: array[0]),
    ],
)
def test_input_that_does_not_fit_the_graph_is_rejected(files: Path, name: str, change: Any) -> None:
    model = open_backend(files / "drn.onnx", "cpu")
    batch = batch_of(model.manifest, 2, 4)
    expected = model.run(batch)
    with raises(ShapeError, "shape_mismatch", name):
        model.run(Batch(**{**vars(batch), name: change(getattr(batch, name))}))
    assert close(model.run(batch), expected)


@installed
@pytest.mark.parametrize("library", ["openvino", "onnxruntime"])
@pytest.mark.parametrize("name", ["drn.onnx", "drn.query.onnx"])
def test_numbers_out_of_range_are_rejected(files: Path, name: str, library: str) -> None:
    model = open_backend(files / name if library == "openvino" else files / "reference" / name, "cpu")
    check_words_and_lengths(model, batch_of(model.manifest, 2, 4))


@installed
@pytest.mark.parametrize("library", ["openvino", "onnxruntime"])
def test_index_of_a_missing_video_is_rejected(files: Path, library: str) -> None:
    pair: Any = open_backend(files / ("" if library == "openvino" else "reference") / "drn.query.onnx", "cpu")
    check_video_index(pair, batch_of(pair.manifest, 2, 4))


@installed
def test_axes_of_a_graph_with_moments_must_agree(files: Path) -> None:
    graph = with_moments(onnx.load(files / "reference" / "drn.onnx"))
    session = OpenVinoSession(graph.SerializeToString(), 1)
    batch = batch_of(read_manifest(onnx.load(files / "drn.onnx")), 2, 4)
    feed = {**vars(batch), DURATION: np.ones(2, np.float32)}
    session.run(None, feed)
    for name in feed:
        with raises(ShapeError, "shape_mismatch"):
            session.run(None, {**feed, name: feed[name][:1]})


@installed
def test_missing_input_is_not_taken_from_the_previous_call(files: Path) -> None:
    session = OpenVinoSession(str(files / "drn.video.onnx"))
    segments = batch_of(open_backend(files / "drn.onnx").manifest, 1, 1).segment_features
    session.run(None, {"segment_features": segments})
    with raises(ShapeError, "shape_mismatch", "segment_features"):
        session.run(None, {})


def test_gpu_is_rejected(files: Path) -> None:
    with raises(DeviceError, "gpu_unavailable", "cuda", "--device cpu"):
        open_backend(files / "drn.onnx", "cuda")


def test_missing_library_is_named_with_its_extra(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    with raises(DeviceError, "missing_library", "[openvino]", "onnxruntime"):
        Grounder.load(files / "drn.onnx")


@installed
def test_damaged_file_is_reported_as_damaged(files: Path, tmp_path: Path) -> None:
    content = bytearray((files / "drn.onnx").read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / "drn.onnx").write_bytes(content)
    with raises(ModelFileError, "digest_mismatch"):
        open_backend(tmp_path / "drn.onnx")
    # The manifest, which names the library, is at the end.
    (tmp_path / "drn.onnx").write_bytes(content[:-1000])
    with raises(ModelFileError, "not_onnx", tmp_path / "drn.onnx") as caught:
        open_backend(tmp_path / "drn.onnx")
    assert "ONNX Runtime" not in str(caught.value)


@installed
def test_graph_that_openvino_cannot_read_is_rejected(files: Path, tmp_path: Path) -> None:
    graph = onnx.load(files / "drn.onnx")
    graph.graph.node[0].op_type = "Unknown"
    (tmp_path / "drn.onnx").write_bytes(with_digest(graph.SerializeToString()))
    with raises(ModelFileError, "not_onnx", "OpenVINO"):
        open_backend(tmp_path / "drn.onnx")


@installed
@pytest.mark.skipif(sys.platform != "linux", reason="the signal stack is restored on Linux only")
def test_signal_stack_of_the_process_is_restored(files: Path) -> None:
    # In a process of its own, because OpenVINO sets a signal stack for the first model only.
    code = (
        "import ctypes, sys; from runtime.backends import openvino_session; "
        "session = openvino_session.OpenVinoSession(sys.argv[1], 1); stack = openvino_session._SignalStack(); "
        "ctypes.CDLL(None).sigaltstack(None, ctypes.byref(stack)); print(stack.flags)"
    )
    command = [sys.executable, "-c", code, str(files / "drn.onnx")]
    # SS_DISABLE: no signal stack, as at the start of a process.
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "2\n"


@installed
def test_import_starts_no_telemetry(tmp_path: Path) -> None:
    package = tmp_path / "openvino_telemetry"
    package.mkdir()
    (package / "__init__.py").write_text("print('telemetry')")
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r}); "
        "from runtime.backends.openvino_session import import_openvino; import_openvino().Core(); print('imported'); "
        "import openvino_telemetry"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["imported", "telemetry"]


def convolution(weights: np.ndarray, zero_point: int) -> bytes:
    """Return a graph of float data in steps of 1 with a zero point, convolved with int8 weights (N, C, 1, taps)."""
    constants = {
        "scale": np.float32(1),
        "zero": np.int8(zero_point),
        "weight": weights,
        "scales": np.ones(len(weights), np.float32),
        "zeros": np.zeros(len(weights), np.int8),
    }
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["dq"]),
        helper.make_node("DequantizeLinear", ["weight", "scales", "zeros"], ["w"], axis=0),
        helper.make_node("Conv", ["dq", "w"], ["y"]),
    ]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["b", weights.shape[1], 1, "t"])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["b", len(weights), 1, "s"])
    tensors = [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()]
    graph = helper.make_graph(nodes, "one", [x], [y], tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return bytes(model.SerializeToString())


def exact(data: np.ndarray, weights: np.ndarray) -> np.ndarray:
    taps = weights.shape[-1]
    columns = data.shape[-1] - taps + 1
    shifted = [data[..., tap : tap + columns].astype(np.float64) for tap in range(taps)]
    return sum(np.einsum("bcht,nc->bnht", part, weights[:, :, 0, tap]) for tap, part in enumerate(shifted))


def computed(weights: np.ndarray, data: np.ndarray, zero_point: int) -> np.ndarray:
    session = OpenVinoSession(convolution(weights, zero_point), 1)
    return session.run(["y"], {"x": data.astype(np.float32)})[0]


@installed
@settings(max_examples=12, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from([0, -128]), st.sampled_from([1, 3]), st.booleans())
def test_weights_within_the_limit_are_exact_on_this_cpu(seed: int, zero_point: int, taps: int, extreme: bool) -> None:
    rng = np.random.default_rng(seed)
    limit, low, high = int(MAX_EXACT_WEIGHT), -128 - zero_point, 127 - zero_point
    shape = (16, 2 * int(rng.integers(1, 40)), 1, taps)
    weights = rng.choice([-limit, limit], shape) if extreme else rng.integers(-limit, limit + 1, shape)
    shape = (2, shape[1], 1, 8)
    data = rng.choice([low, high, high], shape) if extreme else rng.integers(low, high + 1, shape)
    assert (computed(weights.astype(np.int8), data, zero_point) == exact(data, weights)).all()


@installed
@pytest.mark.parametrize("zero_point", [0, -128])
def test_larger_weights_saturate_where_there_is_no_vnni(zero_point: int) -> None:
    weights = np.full((16, 64, 1, 1), int(LARGEST["int8"]), np.int8)
    data = np.full((1, 64, 1, 8), 127 - zero_point)
    is_exact = (computed(weights, data, zero_point) == exact(data, weights)).all()
    if saturates() and cpu_features() is not None:
        assert not is_exact
    assert 2 * 255 * MAX_EXACT_WEIGHT < 2**15 <= 2 * 255 * (MAX_EXACT_WEIGHT + 1)
