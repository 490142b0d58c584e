"""Test `export.build_engine` with feature extractors: accuracy, engines and invalid input."""

from __future__ import annotations

import importlib.util
import json
import logging
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest

from benchmarks.fake_tensorrt import VERSIONS, Driver, Library, write_plan
from calib.errors import CalibrationError
from calib.graph.precision_audit import audit_graph
from calib.range_estimation import METHODS
from export.build import extractor_engine
from export.build.extractor_clips import real_clips
from export.build.extractor_engine import FEATURE_TOLERANCES, FeatureTolerance, compare
from export.build.extractor_quantizer import quantize_extractor
from export.build_engine import build_engine
from export.tracing.synthetic_clips import synthetic_clips
from runtime.artifacts.engine_metadata import read_sidecar, read_verified
from runtime.artifacts.onnx_metadata import with_digest
from runtime.backends.cuda_driver import Cuda
from runtime.backends.tensorrt_backend import open_extractor_engine
from runtime.core.errors import CheckFailed, DeviceError, GroundingError, ModelFileError, OutputError
from runtime.core.gpu_info import cuda_gpu
from runtime.core.io.digests import sha256
from runtime.describe import describe
from runtime.infer import infer
from runtime.media.extractors import open_extractor
from tests.export.conftest import with_changed_weights
from tests.export.engine.engine_builds import EngineBuilds
from tests.export.narrow_c3d import TINY, lively
from tests.films import film
from tests.raising import quotes, raises, records
from tests.runtime.media.extractor_graphs import write_clips
from tests.train.extractors.c3d_layouts import LAYOUTS
from train.extractors.c3d import MEANS
from train.extractors.checkpoint import load_extractor, save_extractor
from train.extractors.published import ExtractorCheckpoint

RTX = {"target": "tensorrt-rtx", "compute_capability": ("8.6",), "batch": (1, 2, 4)}


def copy_model(c3d: Path, directory: Path) -> Path:
    for path in (c3d, c3d.with_suffix(".pt")):
        shutil.copy(path, directory)
    return directory / "c3d.onnx"


@pytest.fixture
def model(c3d: Path, tmp_path: Path) -> Path:
    return copy_model(c3d, tmp_path)


def clips(count: int) -> np.ndarray:
    return np.random.default_rng(3).integers(0, 256, (count, 16, 112, 112, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ...]:
    """Two videos of 3 and 2 clips."""
    directory = tmp_path_factory.mktemp("videos")
    return film(directory / "hall.mp4", 34), film(directory / "door.mp4", 24)


@pytest.fixture(scope="module")
def fp16(c3d: Path, videos: tuple[Path, ...], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The FP16 graph, compared on synthetic clips and on videos."""
    model = copy_model(c3d, tmp_path_factory.mktemp("fp16"))
    return build_engine(model, precision="fp16", target="onnxruntime", calib_videos=videos)


def test_fp16_extractor_features_are_close_to_fp32(fp16: Path, c3d: Path) -> None:
    assert sorted(path.name for path in fp16.parent.iterdir()) == [
        "c3d.fp16.onnx", "c3d.fp16.parity.json", "c3d.onnx", "c3d.pt",
    ]  # fmt: skip
    wide, half = open_extractor(c3d, "cpu", 1), open_extractor(fp16, "cpu", 1)
    assert half.manifest.precision == "fp16"
    assert wide.manifest.sources.items() <= half.manifest.sources.items()
    assert half.manifest.sources["c3d.onnx"] == sha256(c3d)
    # Other clips than those of the check.
    expected, actual = wide.extract(clips(2)), half.extract(clips(2))
    assert 0 < np.abs(actual - expected).max() <= FEATURE_TOLERANCES["fp16"].difference * expected.max()
    graph = onnx.load(fp16).graph
    types = [value.type.tensor_type.elem_type for value in (*graph.input, *graph.output)]
    assert types == [onnx.TensorProto.UINT8, onnx.TensorProto.FLOAT]


def test_fp16_extractor_report_has_synthetic_and_real_clips(fp16: Path) -> None:
    report = json.loads(fp16.with_name("c3d.fp16.parity.json").read_text())
    assert report["model"]["sha256"] == sha256(fp16)
    assert report["promised"]["cosine"] <= report["twin"]["cosine"] <= report["twin_real"]["cosine"] <= 1 + 1e-6
    assert report["twin_real"]["difference"] <= report["twin"]["difference"]


def test_checkpoint_is_exported_once_before_the_build(model: Path) -> None:
    checkpoint, before = model.with_suffix(".pt"), model.stat().st_mtime_ns
    build_engine(checkpoint, precision="fp16", target="onnxruntime")
    assert model.stat().st_mtime_ns == before
    model.unlink()
    build_engine(checkpoint, precision="fp16", target="onnxruntime")
    assert open_extractor(model, "cpu", 1).manifest.precision == "fp32"
    other = model.read_bytes()
    save_extractor(checkpoint, ExtractorCheckpoint(TINY, MEANS["mmaction2"], lively().state_dict(), {}))
    with raises(OutputError, "output_exists", model, "c3d.pt"):
        build_engine(checkpoint, precision="fp16", target="onnxruntime")
    assert model.read_bytes() == other


@pytest.mark.parametrize("name", ["c3d.pickle", "pretrain.pth"])
def test_published_checkpoint_is_converted_first(name: str, tmp_path: Path) -> None:
    model = lively()
    LAYOUTS[name](model, tmp_path / name)
    output = build_engine(tmp_path / name, precision="fp16", target="onnxruntime")
    stem = name.partition(".")[0]
    assert output == tmp_path / f"{stem}.fp16.onnx"
    mean = MEANS["plain" if stem == "c3d" else "mmaction2"]
    assert open_extractor(output, "cpu", 1).manifest.mean == load_extractor(tmp_path / f"{stem}.pt").mean == mean
    for there in (f"{stem}.pt", f"{stem}.onnx"):
        with raises(OutputError, "output_exists", tmp_path / there, name):
            build_engine(tmp_path / name, precision="fp16", target="onnxruntime")
        (tmp_path / there).unlink()


def test_keep_option_leaves_layers_in_fp32(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    graph = onnx.load(build_engine(model, precision="fp16", target="onnxruntime", keep=("conv3a", "fc6")))
    assert quotes(capsys.readouterr().out, "c3d.fp16.onnx", "fp16", "fp32")
    kinds = {module: set(counts) for module, counts in audit_graph(graph).macs.items()}
    assert kinds["conv3a"] == kinds["fc6"] == {"fp32"}
    assert kinds["conv3b"] == {"fp16"}


@pytest.mark.rtx
def test_engine_is_built_ahead_of_time_with_its_metadata(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed", exc_type=ImportError)
    output = build_engine(model, precision="fp16", **RTX)
    content = read_verified(output)
    assert content["manifest"]["precision"] == "fp16"
    assert content["profiles"][0]["shapes"]["clips"] == [[size, 16, 112, 112, 3] for size in (1, 2, 4)]
    assert content["sha256"]["c3d.fp16.onnx"] == sha256(model.with_name("c3d.fp16.onnx"))
    with raises(ModelFileError, "wrong_model_kind", output, "--extractor"):
        read_sidecar(output)
    capsys.readouterr()
    assert describe(output)["manifest"] == content["manifest"]
    printed = capsys.readouterr().out
    assert quotes(printed, "C3D", "fp16", "tensorrt_rtx")
    describe(model)
    assert quotes(capsys.readouterr().out, "128 x 171", "112 x 112")
    output.write_bytes(output.read_bytes()[:-1])
    with raises(ModelFileError, "digest_mismatch", output, sha256(output)[:12]):
        open_extractor(output)


def write_engine(model: Path, name: str, sizes: tuple[int, int, int], version: str, manifest: Any) -> Path:
    shapes = {"clips": [[size, 16, 112, 112, 3] for size in sizes]}
    profile = {"name": "clips", "batch": sizes, "query_length": (1, 1, 1), "shapes": shapes}
    return write_plan(model.with_name(name), model, [profile], manifest, version)


@pytest.mark.parametrize("version", [VERSIONS[0], VERSIONS[-1]])
def test_engine_features_equal_graph_for_any_clip_count(model: Path, version: str) -> None:
    wide, driver = open_extractor(model, "cpu", 1), Driver()
    library = Library(driver, version)
    plan = write_engine(model, "c3d.fp32.engine", (1, 2, 3), version, wide.manifest)
    extractor = open_extractor_engine(plan, library=library, cuda=Cuda(driver))
    for count in (1, 2, 4):
        assert extractor.extract(clips(count)) == pytest.approx(wide.extract(clips(count)), rel=1e-4, abs=1e-4)
    # Four clips exceed the maximum batch size by one.
    assert [run["clips"][0] for run in library.runs] == [1, 2, 3, 1]
    assert library.fed["clips"].dtype == np.uint8
    extractor.close()


def test_engine_without_gpu_names_the_converted_graph(model: Path) -> None:
    manifest = open_extractor(model, "cpu", 1).manifest
    plan = write_engine(model, "c3d.fp32.engine", (1, 1, 1), VERSIONS[1], manifest)
    with raises(DeviceError, "gpu_required", plan.name):
        open_extractor(plan, "cpu")
    if cuda_gpu() is None:
        with raises(DeviceError, "incompatible_engine", plan.name, model):
            open_extractor(plan)
    other = write_engine(model, "drn.engine", (1, 1, 1), VERSIONS[1], SimpleNamespace(to_dict=dict))
    with raises(ModelFileError, "unknown_format", f"{other}.json", None):
        open_extractor_engine(other)


def test_features_over_tolerance_are_saved_as_rejected_only(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(extractor_engine.FEATURE_TOLERANCES, "fp16", FeatureTolerance(1.0, 1e-9))
    with raises(CheckFailed, "parity_failed", "1.0e-09", "c3d.fp16.rejected.onnx"):
        build_engine(model, precision="fp16", target="onnxruntime")
    assert sorted(path.name for path in model.parent.iterdir()) == ["c3d.fp16.rejected.onnx", "c3d.onnx", "c3d.pt"]


def test_overflow_prone_layer_stays_in_fp32(model: Path, caplog: pytest.LogCaptureFixture) -> None:
    # The fourth layer scales up beyond FP16, the next one scales down.
    loud = with_changed_weights(onnx.load(model), lambda values: values * 1e4, "conv4a.weight")
    loud = with_changed_weights(loud, lambda values: values * 1e-4, "conv4b.weight")
    model.write_bytes(with_digest(loud.SerializeToString()))
    output = build_engine(model, precision="fp16", target="onnxruntime")
    assert records(caplog, logging.WARNING, "conv4a")
    kinds = {module: set(counts) for module, counts in audit_graph(onnx.load(output)).macs.items()}
    assert kinds["conv4a"] == {"fp32"}
    assert kinds["conv3b"] == kinds["conv5a"] == {"fp16"}


def test_int8_extractor_is_compared_on_clips_not_calibrated_on(
    model: Path, videos: tuple[Path, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    calibrated: list[np.ndarray] = []

    def quantize(graph: onnx.ModelProto, clips: list[np.ndarray], *options: Any) -> Any:
        calibrated.extend(clips)
        return quantize_extractor(graph, clips, *options)

    monkeypatch.setattr(extractor_engine, "quantize_extractor", quantize)
    output = build_engine(model, precision="int8", target="onnxruntime", calib_videos=videos)
    manifest = open_extractor(model, "cpu", 1).manifest
    every_clip = real_clips(manifest, videos)
    assert len(every_clip) == 5
    assert [clip.tobytes() for clip in calibrated] == [clip.tobytes() for clip in every_clip[::2]]
    stats = audit_graph(onnx.load(output))
    assert stats.share("int8") > 0.99
    report = json.loads(model.with_name("c3d.int8.parity.json").read_text())
    assert report["method"] in METHODS
    assert report["twin"] == report["twin_real"]
    wide, small = open_extractor(model, "cpu", 1), open_extractor(output, "cpu", 1)
    assert small.manifest.precision == "int8"
    assert {path.name: sha256(path) for path in videos}.items() <= small.manifest.sources.items()
    cosine, difference = 1.0, 0.0
    for clip in every_clip[1::2]:
        expected, actual = wide.extract(clip)[0], small.extract(clip)[0]
        cosine = min(cosine, float(expected @ actual / np.linalg.norm(expected) / np.linalg.norm(actual)))
        difference = max(difference, float(np.abs(expected - actual).max() / np.abs(expected).max()))
    assert report["twin_real"] == {
        "cosine": pytest.approx(cosine, abs=1e-5),
        "difference": pytest.approx(difference, abs=1e-4),
    }


def test_int8_extractor_keeps_modules_and_takes_one_method(model: Path, videos: tuple[Path, ...]) -> None:
    options: dict[str, Any] = {"precision": "int8", "target": "onnxruntime", "calib_videos": videos}
    output = build_engine(model, calib_method="minmax", keep=("conv5b",), **options)
    assert json.loads(model.with_name("c3d.int8.parity.json").read_text())["method"] == "minmax"
    kinds = {module: set(counts) for module, counts in audit_graph(onnx.load(output)).macs.items()}
    assert kinds["conv5b"] == {"fp32"}
    assert kinds["fc6"] == kinds["conv1a"] == {"int8"}
    with raises(CalibrationError, "unknown_module", "conv9"):
        build_engine(model, keep=("conv9",), **options)


@pytest.mark.rtx
def test_int8_extractor_needs_no_names_of_nodes(videos: tuple[Path, ...], tmp_path: Path) -> None:
    model = write_clips(tmp_path / "tiny.onnx")
    assert not any(node.name for node in onnx.load(model).graph.node)
    output = build_engine(model, precision="int8", target="onnxruntime", calib_videos=videos)
    assert audit_graph(onnx.load(output)).share("int8") == 1


def test_int8_extractor_for_tensorrt_has_fp16_around(model: Path, videos: tuple[Path, ...]) -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed", exc_type=ImportError)
    build_engine(model, precision="int8", calib_videos=videos, **RTX)
    graph = onnx.load(model.with_name("c3d.int8.onnx"))
    stats = audit_graph(graph)
    assert stats.share("int8") > 0.99
    assert {node.op_type for node in graph.graph.node} >= {"QuantizeLinear", "DequantizeLinear", "Cast"}
    # TensorRT requires zero points of 0.
    zeros = [tensor for tensor in graph.graph.initializer if tensor.name.endswith("_zero_point")]
    assert not any(onnx.numpy_helper.to_array(tensor).any() for tensor in zeros)


def test_too_few_calibration_clips_are_rejected(model: Path, tmp_path: Path) -> None:
    with raises(CalibrationError, "too_few_samples", 2, 1, "--calib-videos"):
        build_engine(model, precision="int8", target="onnxruntime", calib_videos=(film(tmp_path / "short.mp4", 24),))
    assert sorted(path.name for path in model.parent.iterdir()) == ["c3d.onnx", "c3d.pt", "short.mp4"]


def test_engine_with_other_features_fails(model: Path, tensorrt: EngineBuilds, monkeypatch: pytest.MonkeyPatch) -> None:
    tensorrt.scenarios = ["names"]
    monkeypatch.setattr(extractor_engine, "runs_here", lambda options: True)
    closed: list[bool] = []

    def opened(path: Path) -> Any:
        wide = open_extractor(model, "cpu", 1)
        return SimpleNamespace(
            extract=lambda batch: wide.extract(batch) * shift, manifest=wide.manifest, close=lambda: closed.append(True)
        )

    monkeypatch.setattr(extractor_engine, "open_extractor", opened)
    shift = 1.0
    output = build_engine(model, precision="fp16", **RTX)
    assert json.loads(model.with_name("c3d.fp16.parity.json").read_text())["engine"]["difference"] < 1e-6
    output.unlink()
    shift = 1.1
    with raises(CheckFailed, "parity_failed", "1.0e-01", "c3d.fp16.rejected.engine"):
        build_engine(model, precision="fp16", **RTX)
    assert closed == [True, True]
    assert not output.exists()
    assert model.with_name("c3d.fp16.rejected.engine").is_file()


@pytest.mark.parametrize(
    ("options", "code", "values"),
    [
        ({"precision": "int8"}, "missing_option", ("int8", "--calib-videos")),
        ({"precision": "fp8"}, "precision_unsupported", ("fp8", "fp32, fp16, bf16, int8")),
        ({"split": True, "data": Path("d")}, "inapplicable_option", ("--data", "--split", "c3d.onnx")),
        ({"query_length": (1, 2, 3)}, "inapplicable_option", ("--query-length", "c3d.onnx")),
        ({"batch": (4, 2, 8)}, "invalid_option", ("--batch", 4, 2, 8)),
        ({"keep": ("conv9",)}, "unknown_module", ("conv9", "conv5b")),
        ({"precision": "bf16", "target": "onnxruntime"}, "precision_unsupported", ("bf16", "--target")),
        pytest.param(
            {"precision": "fp32", "target": "openvino"},
            "inapplicable_option",
            ("openvino", "c3d.onnx"),
            marks=pytest.mark.skipif(importlib.util.find_spec("openvino") is None, reason="OpenVINO is not installed"),
        ),
    ],
)
def test_options_not_for_extractors_are_rejected(
    model: Path, options: dict[str, Any], code: str, values: tuple[object, ...]
) -> None:
    with raises(GroundingError, code, *values):
        build_engine(model, **{"target": "onnxruntime", **options})
    assert sorted(path.name for path in model.parent.iterdir()) == ["c3d.onnx", "c3d.pt"]


def test_dry_run_names_output_without_building(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    build_engine(model, dry_run=True, target="onnxruntime")
    assert quotes(capsys.readouterr().out, model.with_name("c3d.fp16.onnx"))
    assert sorted(path.name for path in model.parent.iterdir()) == ["c3d.onnx", "c3d.pt"]


def test_converted_extractor_is_rejected_as_source_and_model(fp16: Path, tmp_path: Path) -> None:
    with raises(ModelFileError, "not_fp32", fp16, "fp16"):
        build_engine(fp16, precision="bf16", target="tensorrt-rtx", compute_capability=("8.6",))
    np.save(tmp_path / "hall.npy", np.eye(5, 32, dtype=np.float32))
    with raises(ModelFileError, "wrong_model_kind", fp16, "--extractor"):
        infer(fp16, ("door",), features=tmp_path / "hall.npy", duration=3)


def test_synthetic_clips_are_deterministic(model: Path) -> None:
    manifest = open_extractor(model, "cpu", 1).manifest
    first, second = (np.concatenate(list(synthetic_clips(manifest))) for _ in range(2))
    assert (first == second).all()
    assert first.shape == (6, 16, 112, 112, 3)
    # Full contrast and smooth: adjacent values differ by less than in noise.
    assert first.min() == 0
    assert first.max() == 255
    steps = np.abs(np.diff(first[0].astype(int), axis=2)).mean()
    assert steps < np.abs(np.diff(first[3].astype(int), axis=2)).mean() / 4


def test_all_zero_features_of_both_models_are_equal() -> None:
    dead = SimpleNamespace(extract=lambda clips: np.zeros((1, 4), np.float32))
    alive = SimpleNamespace(extract=lambda clips: np.ones((1, 4), np.float32))
    clips = [np.zeros((1, 2, 8, 8, 3), np.uint8)]
    assert compare(dead, dead, clips) == FeatureTolerance(1.0, 0.0)  # type: ignore[arg-type]
    assert FEATURE_TOLERANCES["fp16"].is_exceeded_by(compare(dead, alive, clips))  # type: ignore[arg-type]
    assert FEATURE_TOLERANCES["fp16"].is_exceeded_by(compare(alive, dead, clips))  # type: ignore[arg-type]
