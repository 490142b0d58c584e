"""Test `calib.graph.moments`: the graph returns the moments of the runtime, also for ties and invalid heads."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.studies.moments_in_graph import moments_in_graph
from calib.graph.moments import COUNT, METADATA_KEY, moment_graph, with_moments
from calib.graph.onnx_graph import load_fp32_graph
from calib.graph.onnx_session import open_session
from calib.graph.opset import MAX_OPSET, MIN_OPSET
from calib.graph.split_model import split_graph
from export.to_onnx import to_onnx
from export.tracing.moment_check import TOLERANCE, decode_moments, equal_moments
from export.triton import triton
from runtime.artifacts.manifest import Features, Manifest
from runtime.backends.model_manifest import read_manifest
from runtime.backends.openvino_session import import_openvino, preserved_signal_stack
from runtime.core.batch import DURATION, HEAD_NAMES, MOMENT_COUNT, MOMENTS, Batch, Heads
from runtime.core.decoding import Decoding
from runtime.core.errors import CheckFailed, ModelFileError, ShapeError
from runtime.core.presence import Presence
from runtime.core.tokenizer import Vocabulary
from runtime.core.video import MAX_DURATION_S
from runtime.datasets.dataset import DataSet
from runtime.describe import describe
from runtime.grounding.evaluation import batches_of
from runtime.grounding.grounder import Grounder
from tests.export.rtx import build_with_rtx
from tests.raising import raises

SMALL = Decoding(num_segments=4, strides=(1, 2))
DECODINGS = {
    "small": SMALL,
    "full": Decoding(),
    "limited": dataclasses.replace(SMALL, pre_nms_top_n=2),
    "stage 1": Decoding(use_iou_scores=False),
    "hard": Decoding(protocol="drn"),
    "hard, limited": dataclasses.replace(SMALL, protocol="drn", pre_nms_top_n=2),
}
Run = Callable[[Heads, np.ndarray], tuple[np.ndarray, np.ndarray]]


def manifest(decoding: Decoding, presence: Presence | None = None) -> Manifest:
    return Manifest(Vocabulary({"door": 2, "opens": 1}), decoding, Features(), presence=presence)


def in_onnxruntime(graph: onnx.ModelProto) -> Run:
    session = open_session(graph, threads=1, optimized=True)
    return lambda heads, durations: session.run([MOMENTS, MOMENT_COUNT], {**vars(heads), DURATION: durations})


def openvino_core() -> Any:
    """Return OpenVINO's core, imported without telemetry; skip if it is not installed."""
    if importlib.util.find_spec("openvino") is None:
        pytest.skip("OpenVINO is not installed (pip install openvino)")
    return import_openvino().Core()


def in_openvino(graph: onnx.ModelProto) -> Run:
    core = openvino_core()
    with preserved_signal_stack():
        model = core.compile_model(core.read_model(graph.SerializeToString()), "CPU", {"INFERENCE_NUM_THREADS": 1})

    def run(heads: Heads, durations: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        results = model({**vars(heads), DURATION: durations})
        return results[MOMENTS], results[MOMENT_COUNT]

    return run


def random_heads(decoding: Decoding, rows: int, rng: np.random.Generator, *, rounded: bool) -> Heads:
    """Return heads of likely and unlikely queries, and beyond the range of a sigmoid; rounded ones have ties."""
    size = (rows, decoding.num_locations)
    scale = rng.choice([1, 3, 40], (rows, 1))
    matching, overlap = rng.normal(rng.choice([-6, 0], (rows, 1)), scale, size), rng.normal(0, scale, size)
    distances = np.exp(rng.normal(0.5, 1.5, (*size, 2)))
    # An exported graph has positive distances; negative ones make spans that end before they start.
    distances[rng.random(size) < 0.1] *= -1
    if rounded:
        matching, overlap, distances = np.round(matching), np.round(overlap), np.round(distances)
    return Heads(*(values.astype(np.float32) for values in (matching, distances, overlap)))


def differing(run: Run, about: Manifest, batches: int, seed: int = 0) -> int:
    """Return the number of queries with other moments than those of the runtime, in random batches."""
    rng, count = np.random.default_rng(seed), 0
    for index in range(batches):
        heads = random_heads(about.decoding, int(rng.integers(1, 40)), rng, rounded=index % 2 == 0)
        durations = rng.uniform(1, 300, len(heads)).astype(np.float32)
        expected = decode_moments(heads, about, durations)
        count += int((~equal_moments(run(heads, durations), expected, durations)).sum())
    return count


@pytest.mark.parametrize(("name", "opset"), [*((name, MIN_OPSET) for name in DECODINGS), ("full", MAX_OPSET)])
def test_graph_returns_the_moments_of_the_runtime(name: str, opset: int) -> None:
    about = manifest(DECODINGS[name])
    assert differing(in_onnxruntime(moment_graph(about, opset)), about, 40) == 0


@pytest.mark.parametrize("name", DECODINGS)
def test_openvino_returns_the_moments_of_the_runtime(name: str) -> None:
    about = manifest(DECODINGS[name])
    assert differing(in_openvino(moment_graph(about, MIN_OPSET)), about, 20) == 0


@pytest.mark.parametrize("protocol", ["mmaction2", "drn"])
def test_all_scores_equal_select_the_same_locations(protocol: Any) -> None:
    about = manifest(dataclasses.replace(SMALL, protocol=protocol))
    heads = Heads(np.ones((3, 6), np.float32), np.full((3, 6, 2), 0.125, np.float32), np.ones((3, 6), np.float32))
    durations = np.array([4, 40, 400], np.float32)
    moments, counts = in_onnxruntime(moment_graph(about, MIN_OPSET))(heads, durations)
    centers = np.array([0.5, 1.5, 2.5, 3.5, 1, 3][:: 1 if protocol == "mmaction2" else -1][:COUNT], np.float32)
    np.testing.assert_array_equal(moments[0, :, 0], centers - np.float32(0.125))
    np.testing.assert_allclose(moments[2, :, 1], 100 * (centers + 0.125))
    assert counts.tolist() == [COUNT] * 3


@settings(deadline=None, max_examples=50)
@given(st.lists(st.sampled_from([-9.0, -1.0, 0.0, 0.5, 20.0, 30.0]), min_size=12, max_size=12), st.integers(0, 4))
def test_ties_and_saturated_logits_agree(logits: list[float], width: int) -> None:
    heads = Heads(
        np.array([logits[:6]], np.float32),
        np.full((1, 6, 2), width / 2, np.float32),
        np.array([logits[6:]], np.float32),
    )
    durations = np.ones(1, np.float32)
    about, run = manifest(DECODINGS["hard, limited"]), small_graph("hard, limited")
    assert equal_moments(run(heads, durations), decode_moments(heads, about, durations), durations).all()
    for name in ("small", "limited"):
        (actual, counts), about = small_graph(name)(heads, durations), manifest(DECODINGS[name])
        expected, expected_counts = decode_moments(heads, about, durations)
        np.testing.assert_allclose(actual[..., 2], expected[..., 2], rtol=0, atol=TOLERANCE)
        assert counts == expected_counts
        # The exp of NumPy and of ONNX Runtime round differently, so decayed scores that are equal may change places.
        scores = expected[0, :, 2]
        distinct = (np.abs(np.diff(scores, append=scores[-1:])) > TOLERANCE) & (
            np.abs(np.diff(scores, prepend=2)) > TOLERANCE
        )
        np.testing.assert_allclose(actual[0, distinct], expected[0, distinct], rtol=0, atol=TOLERANCE)


@functools.cache
def small_graph(name: str) -> Run:
    return in_onnxruntime(moment_graph(manifest(DECODINGS[name]), MIN_OPSET))


def test_query_with_non_finite_value_has_count_minus_one() -> None:
    about, durations = manifest(SMALL), np.array([10, 20, 30], np.float32)
    run = in_onnxruntime(moment_graph(about, MIN_OPSET))
    for head in HEAD_NAMES:
        for value in (np.nan, np.inf, -np.inf):
            heads = random_heads(SMALL, 3, np.random.default_rng(0), rounded=False)
            expected, expected_counts = decode_moments(heads, about, durations)
            getattr(heads, head)[1, 4] = value
            moments, counts = run(heads, durations)
            assert counts.tolist() == [expected_counts[0], -1, expected_counts[2]], (head, value)
            assert not moments[1].any()
            np.testing.assert_allclose(moments[[0, 2]], expected[[0, 2]], rtol=1e-5)


@pytest.mark.parametrize("invalid", [0, -1, np.nan, np.inf, -np.inf, 2 * MAX_DURATION_S])
def test_query_with_an_invalid_duration_has_count_minus_one(invalid: float) -> None:
    about, durations = manifest(SMALL), np.array([10, invalid, MAX_DURATION_S], np.float32)
    heads = random_heads(SMALL, 3, np.random.default_rng(0), rounded=False)
    moments, counts = in_onnxruntime(moment_graph(about, MIN_OPSET))(heads, durations)
    assert counts[1] == -1
    assert not moments[1].any()
    assert counts[[0, 2]].min() > 0


def test_unlikely_query_returns_the_complete_video() -> None:
    heads = Heads(np.full((1, 6), -20, np.float32), np.ones((1, 6, 2), np.float32), np.zeros((1, 6), np.float32))
    moments, counts = in_onnxruntime(moment_graph(manifest(SMALL), MIN_OPSET))(heads, np.array([12.5], np.float32))
    assert moments[0].tolist() == [[0, 12.5, 1]] + [[0, 0, 0]] * (COUNT - 1)
    assert counts.tolist() == [1]


def test_no_match_threshold_sets_the_count_to_zero() -> None:
    about = manifest(SMALL, Presence(0.5, 1, 1, 1, 1))
    heads = Heads(np.full((3, 6), -20, np.float32), np.ones((3, 6, 2), np.float32), np.full((3, 6), 20, np.float32))
    heads.matching_logits[:, 0] = -20, -1.2, 0
    durations = np.ones(3, np.float32)
    moments, counts = in_onnxruntime(moment_graph(about, MIN_OPSET))(heads, durations)
    # The square roots of sigmoid(-1.2) and sigmoid(0) are 0.48 and 0.71.
    assert counts.tolist() == [0, 0, 1]
    assert moments[:, 0, 2].round(2).tolist() == [1, np.float32(0.48), np.float32(0.71)]
    assert equal_moments((moments, counts), decode_moments(heads, about, durations), durations).all()


def test_graph_has_standard_operators_without_control_flow() -> None:
    for name, decoding in DECODINGS.items():
        graph = moment_graph(manifest(decoding), MIN_OPSET)
        operators = {node.op_type for node in graph.graph.node}
        assert {node.domain for node in graph.graph.node} == {""}
        assert not operators & {"Loop", "Scan", "If", "NonZero", "NonMaxSuppression", "ArgMax", "TopK"}, name


@pytest.mark.rtx
@pytest.mark.parametrize("name", ["full", "hard"])
def test_graph_with_moments_builds_in_tensorrt_rtx(name: str, exported: dict[str, onnx.ModelProto]) -> None:
    about = manifest(DECODINGS[name])
    build_with_rtx(moment_graph(about, MIN_OPSET))
    build_with_rtx(with_moments(exported["tiny"]))


@pytest.fixture(scope="module")
def files(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the directory of drn.onnx and its graph with moments, of the network that learnt the planted data."""
    directory = tmp_path_factory.mktemp("moments")
    to_onnx(models / "drn.pt", directory / "drn.onnx", moments=True, max_query_length=16, opset=19)
    return directory


def test_export_writes_three_files(files: Path) -> None:
    assert {path.name for path in files.iterdir()} == {"drn.onnx", "drn.moments.onnx", "drn.words.txt"}
    recorded = read_manifest(files / "drn.moments.onnx")
    assert recorded.moments is not None
    assert dataclasses.asdict(recorded.moments) == {
        "count": 5,
        "nms": "soft",
        "constants": {"alpha": 0.4, "low_threshold": 0.5, "high_threshold": 0.9},
    }
    assert dataclasses.replace(recorded, moments=None) == read_manifest(files / "drn.onnx")
    words = (files / "drn.words.txt").read_text().splitlines()
    assert {word: index for index, word in enumerate(words, 1)} == recorded.vocabulary.words


def test_metadata_describes_the_inputs(files: Path) -> None:
    model = onnx.load(files / "drn.moments.onnx")
    (text,) = (entry.value for entry in model.metadata_props if entry.key == METADATA_KEY)
    values = dict(line.split(" ") for line in text.splitlines())
    assert {"clip_window": "16", "clip_stride": "8", "pooling": "mmaction2", "unknown_words": "skip"}.items() <= (
        values.items()
    )
    assert values["max_query_length"] == "16"
    assert int(values["num_words"]) == len((files / "drn.words.txt").read_text().splitlines())
    assert [value.name for value in model.graph.input][-1] == DURATION
    assert [value.name for value in model.graph.output] == [*HEAD_NAMES, MOMENTS, MOMENT_COUNT]


def answers_of(session: Any, grounder: Grounder, data: DataSet) -> tuple[int, int]:
    """Return the numbers of test queries, and of those whose moments differ from those of `Grounder.ground`."""
    annotations = data.annotations("test")
    different = 0
    for rows, batch in batches_of(grounder, data, annotations, 7):
        durations = np.array([data.durations[annotations[row].video] for row in rows], np.float32)
        moments, counts = session(batch, durations)
        for row, actual, count in zip(rows, moments, counts, strict=True):
            answer = grounder.ground(data.video(annotations[row].video), annotations[row].sentence)
            expected = np.array([dataclasses.astuple(moment) for moment in answer], np.float32)
            different += count != len(answer) or not np.allclose(actual[:count], expected, rtol=1e-5, atol=1e-5)
    return len(annotations), different


def test_all_test_queries_have_the_answers_of_infer(files: Path, planted: Path) -> None:
    session = open_session(files / "drn.moments.onnx", threads=1, optimized=True)

    def run(batch: Batch, durations: np.ndarray) -> Any:
        return session.run([MOMENTS, MOMENT_COUNT], {**vars(batch), DURATION: durations})

    total, different = answers_of(run, Grounder.load(files / "drn.onnx", "cpu"), DataSet(planted))
    assert total >= 18
    assert different == 0


def test_openvino_has_the_answers_of_infer(files: Path, planted: Path) -> None:
    core = openvino_core()
    config = {"INFERENCE_PRECISION_HINT": "f32"}
    with preserved_signal_stack():
        model = core.compile_model(core.read_model(files / "drn.moments.onnx"), "CPU", config)

    def run(batch: Batch, durations: np.ndarray) -> Any:
        results = model({**vars(batch), DURATION: durations})
        return results[MOMENTS], results[MOMENT_COUNT]

    grounder = Grounder.load(files / "drn.onnx", "cpu")
    assert answers_of(run, grounder, DataSet(planted))[1] == 0


def test_commands_read_heads_beside_moments(files: Path, planted: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = DataSet(planted)
    annotation = data.annotations("test")[0]
    video = data.video(annotation.video)
    answers = [
        Grounder.load(files / name, "cpu").ground(video, annotation.sentence, top_k=7)
        for name in ("drn.moments.onnx", "drn.onnx")
    ]
    assert answers[0] == answers[1]
    describe(files / "drn.moments.onnx")
    assert "soft NMS (alpha 0.4, low_threshold 0.5, high_threshold 0.9)" in capsys.readouterr().out


def test_conversions_reject_a_graph_with_moments(files: Path, tmp_path: Path) -> None:
    path = files / "drn.moments.onnx"
    with raises(ModelFileError, "contains_moments", path):
        load_fp32_graph(path)
    with raises(ModelFileError, "contains_moments"):
        split_graph(onnx.load(path))
    with raises(ModelFileError, "contains_moments"):
        with_moments(onnx.load(path))
    with raises(ModelFileError, "contains_moments", path):
        triton(path, tmp_path / "repository")
    assert not list(tmp_path.iterdir())


def test_wrong_moments_are_not_saved(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("calib.graph.moments.ALPHA", 0.8)
    monkeypatch.setattr("calib.graph.moments.LOW_THRESHOLD", 0.1)
    with raises(CheckFailed, "parity_failed"):
        to_onnx(checkpoint, tmp_path / "drn.onnx", moments=True, max_query_length=12)
    assert not list(tmp_path.iterdir())


def test_study_counts_equal_moments_and_measures_times(files: Path, planted: Path) -> None:
    report = moments_in_graph(files / "drn.onnx", planted, sizes=(1, 3), samples=2)
    assert report["queries with the moments of the runtime"] == report["queries"] >= 18
    assert all(value > 0 for size in (1, 3) for value in report[f"us of CPU time per query, {size} at once"].values())


def test_invalid_moments_in_a_manifest_are_rejected() -> None:
    for value in (None, [], {"count": 0, "nms": "soft", "constants": {}}, {"count": 5, "nms": "x"}):
        with pytest.raises(ModelFileError):
            Manifest.from_dict({**manifest(SMALL).to_dict(), "moments": value})


def test_moments_of_an_extractor_are_rejected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("train.extractors.checkpoint.is_extractor_file", lambda path: True)
    with raises(ShapeError, "inapplicable_option", "--moments"):
        to_onnx(tmp_path / "c3d.pt", tmp_path / "c3d.onnx", moments=True)
