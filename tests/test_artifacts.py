"""Files that version 0.1 wrote still load, and models give the answers that were recorded then."""

from __future__ import annotations

import contextlib
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest

from export.verify import verify
from runtime import EncodedVideo, EncodedWindows, Grounder, GroundingError
from runtime.describe import describe
from runtime.evaluate import evaluate
from runtime.extract import extract
from runtime.ground_corpus import ground_corpus

ARCHIVE = Path(__file__).parent / "artifacts" / "v0.1.tar.xz"
MODELS = ("drn.pt", "drn.onnx", "drn.query.onnx", "drn.fp16.onnx")
# Largest difference of a boundary in seconds and of a score. FP16 differs by rounding, FP32 by the order of sums.
TOLERANCE = {"drn.fp16.onnx": 0.02}
FP32_TOLERANCE = 1e-3


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("stored")
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(directory, filter="data")
    return directory


def best_moments(path: Path) -> np.ndarray:
    """Return the best moment of each query in a predictions file, (N, 3): start, end, score."""
    return np.array([json.loads(line)["pred_relevant_windows"][0] for line in path.open(encoding="utf-8")])


@pytest.mark.parametrize("name", MODELS)
def test_stored_model_gives_recorded_moments(stored: Path, tmp_path: Path, name: str) -> None:
    evaluate(stored / name, stored / "data", predictions=tmp_path / "p.jsonl", device="cpu", threads=1)
    difference = np.abs(best_moments(tmp_path / "p.jsonl") - best_moments(stored / "predictions.jsonl")).max(axis=1)
    # Several moments of these made-up weights score alike, and rounding decides which of two comes first.
    assert np.mean(difference <= TOLERANCE.get(name, FP32_TOLERANCE)) >= 0.9


def test_stored_int8_model_can_be_run(stored: Path, tmp_path: Path) -> None:
    # Its recorded answers are those of one kind of CPU, on which 16-bit sums saturate.
    evaluate(stored / "drn.int8.onnx", stored / "data", predictions=tmp_path / "p.jsonl", device="cpu", threads=1)
    assert np.isfinite(best_moments(tmp_path / "p.jsonl")).all()


@pytest.mark.parametrize("name", [*MODELS, "drn.int8.onnx", "drn.fp16.engine", "c3d.onnx"])
def test_stored_file_can_be_described(stored: Path, name: str) -> None:
    assert describe(stored / name)


def test_stored_encodings_give_recorded_moments(stored: Path) -> None:
    grounder = Grounder.load(stored / "drn.query.onnx", "cpu", threads=1)
    query = json.loads((stored / "predictions.jsonl").read_text().splitlines()[0])
    encoded = EncodedVideo.load(stored / "encoding.npz")
    moment = grounder.ground(encoded, query["query"])[0]
    expected = query["pred_relevant_windows"][0]
    assert [moment.start, moment.end, moment.score] == pytest.approx(expected, abs=FP32_TOLERANCE)
    windows = EncodedWindows.load(stored / "windows.npz")
    assert len(windows.parts) == len(windows.windows) > 1
    assert grounder.ground(windows, query["query"])


def test_stored_calibration_table_and_plan_match_their_graph(stored: Path, tmp_path: Path) -> None:
    from calib.quantize import quantize

    table, plan = stored / "drn.int8.calibration.json", stored / "drn.int8.plan.json"
    assert quantize(stored / "drn.onnx", table, tmp_path / "drn.int8.onnx", plan=plan).is_file()


def test_stored_corpus_is_resumed_or_rejected_unchanged(stored: Path) -> None:
    shards = {path: path.read_bytes() for path in (stored / "corpus").glob("shard-*")}
    assert len(shards) == 2
    arguments = stored / "drn.query.onnx", stored / "data", stored / "queries.jsonl", stored / "corpus"
    # Features may have changed since, and files of version 0.1 do not record what they were.
    with contextlib.suppress(GroundingError):
        ground_corpus(*arguments, actors=0, shard_pairs=3)
    assert {path: path.read_bytes() for path in shards} == shards


def test_stored_features_equal_new_extraction(stored: Path) -> None:
    pytest.importorskip("av", reason="PyAV decodes the video")
    directory = stored / "extracted" / "C3D_unit16_overlap0.5_merged"
    before = np.load(directory / "clip.npy")
    extract((stored / "clip.mkv",), extractor=stored / "c3d.onnx", output=stored / "extracted")
    np.testing.assert_allclose(np.load(directory / "clip.npy"), before, rtol=1e-4, atol=1e-4)


def test_stored_checkpoint_verifies_against_its_graph(stored: Path) -> None:
    verify(stored / "drn.pt", stored / "drn.onnx", stored / "data", device="cpu", threads=1)
