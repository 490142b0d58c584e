"""Flip one bit of model files of every kind: the file is rejected, or its answers do not change."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

from calib.calibration_table import CalibrationTable
from calib.graph.half_precision import convert_to_half
from calib.graph.onnx_graph import load_fp32_graph, load_onnx, manifest_in
from calib.graph.split_model import pair_paths, split_graph, write_split_model
from calib.qdq_quantizer import insert_qdq
from export.seal import seal_model
from export.to_onnx import to_onnx
from export.triton.model_config import ServingOptions, read_model
from runtime.artifacts.encoded_video import EncodedVideo
from runtime.artifacts.manifest import METADATA_KEY
from runtime.artifacts.onnx_metadata import check, external_data, read_metadata, with_digest
from runtime.backends import open_backend
from runtime.core.batch import Batch
from runtime.core.errors import ModelFileError
from runtime.datasets.dataset import DataSet
from runtime.describe import describe
from runtime.grounding.evaluation import batches_of
from runtime.grounding.grounder import Grounder
from runtime.media.extractors import open_extractor
from tests.damage import count_refused, damaged, flip, random_bits
from tests.export.conftest import TINY, random_inputs
from tests.raising import quotes, raises
from tests.runtime.media.extractor_graphs import write_clips, write_images


@pytest.fixture
def graph(exported: dict[str, onnx.ModelProto], tmp_path: Path) -> Path:
    path = tmp_path / "drn.onnx"
    path.write_bytes(with_digest(exported["tiny"].SerializeToString()))
    return path


def heads(path: Path, batch: Batch | None = None) -> Callable[[], bytes]:
    """Return a function that opens a model and returns its heads and its manifest."""
    batch = batch or Batch(*(array.numpy() for array in random_inputs(TINY, [3, 5])))

    def answer() -> bytes:
        backend = open_backend(path, "cpu", 1)
        outputs = backend.run(batch)
        about = json.dumps(backend.manifest.to_dict(), sort_keys=True).encode()
        return about + b"".join(array.tobytes() for array in vars(outputs).values())

    return answer


def test_damaged_unsplit_graph_is_rejected(graph: Path) -> None:
    assert count_refused(graph, heads(graph), ModelFileError) == 40


def test_damaged_manifest_is_rejected_or_harmless(graph: Path) -> None:
    """Vocabulary, thresholds and digest: a file that is not rejected has the same answers."""
    content, answer = graph.read_bytes(), heads(graph)
    expected, refused = answer(), 0
    begin = 8 * (content.index(b"drn.manifest") - 8)
    bits = (begin + np.array(random_bits(content[begin // 8 :], 40))).tolist()
    for bit in damaged(graph, bits):
        try:
            assert answer() == expected, bit
        except ModelFileError:
            refused += 1
    assert refused >= 38


@pytest.mark.parametrize("part", ["video", "query"])
def test_damaged_model_parts_are_rejected(exported: dict[str, onnx.ModelProto], tmp_path: Path, part: str) -> None:
    path = tmp_path / "drn.onnx"
    write_split_model(*split_graph(exported["tiny"]), path)
    video, query = pair_paths(path)
    inputs = random_inputs(TINY, [3] * 12)

    def answer() -> bytes:
        pair: Any = open_backend(query, "cpu", 1)
        encoded = pair.encode(inputs[2].numpy()[:1])[0]
        about = EncodedVideo(encoded, inputs[3].numpy()[0], 1.0)
        outputs = pair.ask(inputs[0].numpy(), inputs[1].numpy(), [about], np.zeros(12, np.int32))
        return b"".join(array.tobytes() for array in vars(outputs).values())

    files = {"video": video, "query": query}
    assert count_refused(files[part], answer, ModelFileError, 10) == 10


@pytest.mark.parametrize("manifest", ["{", "[1]"])
def test_seal_model_with_damaged_manifest_is_rejected(tmp_path: Path, manifest: str) -> None:
    path = tmp_path / "drn.onnx"
    graph = onnx.helper.make_model(onnx.helper.make_graph([], "g", [], []))
    entry = graph.metadata_props.add()
    entry.key, entry.value = METADATA_KEY, manifest
    path.write_bytes(graph.SerializeToString())
    before = path.read_bytes()
    with raises(ModelFileError, "damaged_file", path):
        seal_model(path)
    assert path.read_bytes() == before


@pytest.mark.parametrize("name", ["drn.onnx", "weights.data"])
def test_damaged_external_data_is_rejected(graph: Path, tmp_path: Path, name: str) -> None:
    model = onnx.load(graph)
    path = tmp_path / "outside" / "drn.onnx"
    path.parent.mkdir()
    onnx.save(model, path, save_as_external_data=True, location="weights.data", size_threshold=200)
    assert external_data(path) == [path.parent / "weights.data"]
    # Another tool changed the file: it is rejected until `seal` records the change.
    with raises(ModelFileError, "digest_mismatch", path):
        open_backend(path, "cpu")
    seal_model(path)
    assert heads(path)() == heads(graph)()
    assert count_refused(path.parent / name, heads(path), ModelFileError, 10) == 10


@pytest.mark.parametrize("kind", ["int8", "fp16"])
def test_damaged_converted_graph_fails(models: Path, planted: Path, table: Path, tmp_path: Path, kind: str) -> None:
    source = load_fp32_graph(models / "drn.onnx")
    converted = insert_qdq(source, CalibrationTable.load(table)) if kind == "int8" else convert_to_half(source)
    annotations = DataSet(planted).annotations("test")[:4]
    grounder = Grounder.load(models / "drn.onnx", "cpu", 1)
    ((_, batch),) = batches_of(grounder, DataSet(planted), annotations, 4)
    path = tmp_path / "drn.converted.onnx"
    path.write_bytes(with_digest(converted.SerializeToString()))
    assert count_refused(path, heads(path, batch), ModelFileError, 10) == 10


@pytest.mark.parametrize("read", [load_onnx, load_fp32_graph, manifest_in, check, describe])
def test_every_graph_reader_rejects_damage(graph: Path, read: Callable[[Path], Any]) -> None:
    read(graph)
    for _ in damaged(graph, random_bits(graph.read_bytes(), 5)):
        with raises(ModelFileError, "digest_mismatch", graph):
            read(graph)


@pytest.mark.parametrize("part", [0, 1])
def test_triton_rejects_damaged_graphs(exported: dict[str, onnx.ModelProto], tmp_path: Path, part: int) -> None:
    files = write_split_model(*split_graph(exported["tiny"]), tmp_path / "drn.onnx")
    read_model(files[-1], ServingOptions())
    codes = []
    for _ in damaged(files[part], random_bits(files[part].read_bytes(), 10)):
        with pytest.raises(ModelFileError) as caught:
            read_model(files[-1], ServingOptions())
        assert quotes(str(caught.value), files[part].name)
        codes.append(caught.value.code)
    # Damage of the structure is detected before the digest.
    assert set(codes) <= {"digest_mismatch", "not_onnx"}
    assert codes.count("digest_mismatch") >= 8


def features(path: Path, clips: np.ndarray) -> Callable[[], bytes]:
    return lambda: open_extractor(path, "cpu", 1).extract(clips).tobytes()


def test_damaged_extractor_is_rejected(tmp_path: Path) -> None:
    path = write_clips(tmp_path / "c3d.onnx")
    path.write_bytes(with_digest(path.read_bytes()))
    clips = np.random.default_rng(0).integers(0, 256, (2, 16, 24, 24, 3), np.uint8)
    assert count_refused(path, features(path, clips), ModelFileError, 10) == 10


@pytest.mark.parametrize("name", ["encoder.onnx", "encoder.onnx.json"])
def test_damaged_image_encoder_or_metadata_is_rejected(tmp_path: Path, name: str) -> None:
    path = write_images(tmp_path / "encoder.onnx")
    assert seal_model(path) == tmp_path / "encoder.onnx.json"
    clips = np.random.default_rng(0).integers(0, 256, (2, 1, 24, 24, 3), np.uint8)
    # Whitespace in JSON has no effect.
    assert count_refused(tmp_path / name, features(path, clips), ModelFileError) >= 36


def test_files_without_digest_load(
    exported: dict[str, onnx.ModelProto], graph: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old = tmp_path / "old.onnx"
    onnx.save(exported["tiny"], old)
    assert heads(old)() == heads(graph)()
    assert [check(path).recorded is not None for path in (old, graph)] == [False, True]
    for path in (old, graph):
        describe(path)
    shown = [line for line in capsys.readouterr().out.splitlines() if line.startswith("digest")]
    assert len(set(shown)) == 2


def test_exported_files_contain_exactly_one_digest(checkpoint: Path, tmp_path: Path) -> None:
    output = to_onnx(checkpoint, tmp_path / "drn.onnx", split=True, max_query_length=3)
    files = (output, *pair_paths(output))
    for path in files:
        content = check(path)
        assert content.recorded == content.digest is not None
        assert read_metadata(path)["drn.manifest"].count('"digest"') == 1
        # A second call changes nothing, and other ONNX readers can read the file.
        assert with_digest(path.read_bytes()) == path.read_bytes()
        onnx.checker.check_model(onnx.load(path))
        onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])


def test_file_onnxruntime_cannot_parse_is_reported_damaged(graph: Path) -> None:
    content = graph.read_bytes()
    graph.write_bytes(flip(content, 8 * content.index(b"Conv")))
    with raises(ModelFileError, "digest_mismatch", graph):
        open_backend(graph, "cpu")
