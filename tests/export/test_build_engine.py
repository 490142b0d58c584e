"""Test `export.build_engine` on a CPU: converted graphs, accuracy checks, ahead-of-time engines and invalid input."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import gzip
import inspect
import json
import logging
import math
import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx
import pytest
import torch

from calib.calibrate import measure_table
from calib.calibration_set import sample_calibration_set
from calib.errors import CalibrationError
from calib.graph.fp32_scales import has_half_scales
from calib.graph.onnx_graph import read_manifest
from calib.graph.split_model import split_graph, write_split_model
from calib.qdq_quantizer import attainable_share
from export.build.build_config import BuildRequest
from export.build.run_build import _check_engine, choose_target
from export.build_engine import build_engine
from export.engine import engine_writer
from export.engine.builder import BuildFailed, BuildOptions, BuiltEngine, unavailable_reason
from export.engine.engine_writer import _write_engine, mark_rejected
from export.engine.inspector import PlanNotLoaded
from export.tracing.tracer import export_model
from runtime import Grounder, Presence
from runtime.artifacts.engine_layers import (
    CONTRADICTED,
    NOT_PROVEN,
    PROVEN,
    Inspection,
    ProfileView,
    layers_path,
    packed,
    read_layers_file,
)
from runtime.artifacts.engine_metadata import read_sidecar
from runtime.artifacts.manifest import METADATA_KEY
from runtime.backends import engine_compatibility
from runtime.backends.engine_compatibility import rebuild_command
from runtime.backends.onnxruntime_session import _cuda_options
from runtime.backends.tensorrt_backend import short_query_plans
from runtime.core.errors import (
    AnnotationError,
    CheckFailed,
    DeviceError,
    FeatureError,
    GroundingError,
    ModelFileError,
    OutputError,
    ShapeError,
)
from runtime.core.gpu_info import cuda_gpu
from runtime.core.io.digests import sha256
from runtime.datasets.dataset import DataSet
from runtime.describe import describe
from tests.export.conftest import lively
from tests.export.engine.inspector_doubles import document
from tests.export.engine.test_builder import gpu, stand_in
from tests.raising import quotes, raises, records
from train.network.model import DRNConfig

# In 8 bits a network this small has a larger accuracy drop than a real one; one of thirty queries is three points.
LOOSE = 100.0


# A threshold above every score: builds and checks must not apply it.
NOTHING_BELOW = Presence(1.0, 0.9, 0.9, 10, 10)


@pytest.fixture
def model(models: Path, tmp_path: Path) -> Path:
    copy, graph = tmp_path / "drn.onnx", onnx.load(models / "drn.onnx")
    carrying = dataclasses.replace(read_manifest(graph), presence=NOTHING_BELOW)
    onnx.helper.set_model_props(graph, {METADATA_KEY: carrying.to_json()})
    onnx.save(graph, copy)
    return copy


def _measure(model: Path, planted: Path, path: Path) -> Path:
    drawn = sample_calibration_set(DataSet(planted), Grounder.load(model).manifest, samples=48, held_out=16)
    measure_table(onnx.load(model), drawn, "minmax", threads=1).save(path)
    return path


def test_fp16_build_writes_graph_with_manifest_and_presence(
    model: Path, planted: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = build_engine(model, precision="fp16", data=planted, query_length=(1, 8, 12))
    assert output == model.with_name("drn.fp16.onnx")
    told = capsys.readouterr().out
    assert quotes(told, "drn.fp16.onnx", "fp16")
    manifest = Grounder.load(output).manifest
    assert manifest.precision == "fp16"
    assert "drn.onnx" in manifest.sources
    assert manifest.training["precision"]["multiply-adds"] == {"fp16": 1.0}
    assert manifest.presence == NOTHING_BELOW
    assert manifest.windows is not None
    data_set = DataSet(planted)
    subject = data_set.annotations("test")[0]
    assert Grounder.load(output).ground(data_set.video(subject.video), subject.sentence) == []


def test_build_writes_parity_and_html_reports(model: Path, planted: Path) -> None:
    output = build_engine(model, precision="fp16", data=planted, query_length=(1, 8, 12), threads=1)
    report = json.loads(model.with_name("drn.fp16.parity.json").read_text())
    assert report["broken"] == []
    assert report["model"]["sha256"] == sha256(output)
    assert report["reference"]["sha256"] == sha256(model)
    page = model.with_name("drn.fp16.passport.html").read_text()
    assert "<h2>Speed</h2>" in page
    assert "<h2>Calibration</h2>" not in page
    assert "Parity report of drn.fp16.onnx" in page
    assert "export.build_engine" in page
    assert sha256(output) in page


@pytest.mark.rtx
@pytest.mark.parametrize(("precision", "capability"), [("bf16", "8.6"), ("int8", "8.6")])
def test_graph_and_manifest_record_the_precision(precision: Any, capability: str, model: Path, planted: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
    build_engine(
        model, precision=precision, target="tensorrt-rtx", compute_capability=(capability,), data=planted,
        calib_samples=64, calib_method="mse", max_drop=LOOSE, query_length=(1, 8, 12), threads=1,
    )  # fmt: skip
    properties = {
        entry.key: entry.value for entry in onnx.load(model.with_name(f"drn.{precision}.onnx")).metadata_props
    }
    assert json.loads(properties["drn.manifest"])["precision"] == precision
    # ONNX Runtime has no BF16 kernels, but `describe` can read the file.
    assert describe(model.with_name(f"drn.{precision}.onnx"))["precision"] == precision


def test_bf16_for_onnx_runtime_is_rejected(model: Path) -> None:
    with raises(DeviceError, "precision_unsupported", "bf16", "--target"):
        build_engine(model, precision="bf16", target="onnxruntime")


@pytest.mark.rtx
def test_engine_is_built_ahead_of_time_with_its_metadata(model: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
    output = build_engine(
        model, precision="fp16", target="tensorrt-rtx", compute_capability=("8.6",), query_length=(1, 8, 12)
    )
    assert output.name == "drn.fp16.engine"
    sidecar = read_sidecar(output)
    assert sidecar.manifest.precision == "fp16"
    assert sidecar.content["compute_capabilities"] == ["8.6"]
    assert len(sidecar.content["profiles"]) == 2
    assert set(sidecar.content["sha256"]) == {"drn.fp16.engine", "drn.fp16.onnx"}


def test_dry_run_lists_outputs_and_writes_no_file(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    build_engine(model, precision="fp16", dry_run=True, query_length=(1, 8, 12))
    told = capsys.readouterr().out
    assert quotes(told, model.with_name("drn.fp16.onnx"), "several queries")
    assert [path.name for path in model.parent.iterdir()] == ["drn.onnx"]


def test_graph_below_int8_share_is_saved_as_rejected(model: Path, planted: Path) -> None:
    with raises(CheckFailed, "precision_not_reached", "int8", "85 %", "drn.int8.rejected.onnx"):
        build_engine(
            model, precision="int8", data=planted, keep=("prop_fc", "fpn", "backbone_net"), calib_samples=64,
            calib_method="minmax", max_drop=LOOSE, query_length=(1, 8, 12),
        )  # fmt: skip
    assert not model.with_name("drn.int8.onnx").exists()
    assert Grounder.load(model.with_name("drn.int8.rejected.onnx")).manifest.precision == "int8"


def test_narrow_network_is_built_in_int8_with_a_warning(
    models: Path, planted: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    described = read_manifest(onnx.load(models / "drn.onnx"))
    words = max(described.vocabulary.words.values())
    config = DRNConfig(
        words, embed_dim=32, feature_dim=32, hidden_dim=64, fpn_dim=16, num_segments=described.decoding.num_segments
    )
    path = tmp_path / "drn.onnx"
    onnx.save(export_model(lively(config), dataclasses.replace(described, sources={})), path)
    attainable = attainable_share(onnx.load(path))
    assert attainable < 0.85
    table = _measure(path, planted, tmp_path / "t.json")
    output = build_engine(path, precision="int8", table=table, target="onnxruntime")
    shares = Grounder.load(output, "cpu", 1).manifest.training["precision"]["multiply-adds"]
    assert shares["int8"] == pytest.approx(attainable, abs=0.01)
    assert records(caplog, logging.WARNING, "int8", f"{100 * shares['int8']:.1f} %")
    with raises(CheckFailed, "precision_not_reached", "int8", "drn.int8.rejected.onnx"):
        build_engine(path, precision="int8", table=table, target="onnxruntime", keep=("prop_fc", "backbone_net"))


def test_model_over_budget_is_saved_as_rejected_only(
    model: Path, planted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model.with_name("drn.fp16.onnx").write_text("an earlier one")
    monkeypatch.setattr("export.parity.parity_result.AccuracyBudget.boundary_p99", -1.0)
    with raises(CheckFailed, "parity_failed", "drn.fp16.rejected.onnx", "drn.onnx"):
        build_engine(model, precision="fp16", data=planted, query_length=(1, 8, 12), threads=1)
    assert model.with_name("drn.fp16.onnx").read_text() == "an earlier one"
    rejected = model.with_name("drn.fp16.rejected.onnx")
    assert Grounder.load(rejected).manifest.precision == "fp16"
    page = model.with_name("drn.fp16.rejected.passport.html").read_text()
    assert 'class="verdict failed"' in page
    # The title and the lineage mark the file as rejected.
    assert page.count("rejected</em>") == 2
    assert sha256(rejected) in page
    assert not model.with_name("drn.fp16.passport.html").exists()


def test_build_with_data_requires_jinja_before_any_work(
    model: Path, planted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with raises(DeviceError, "missing_library", "jinja2"):
        build_engine(model, precision="fp16", data=planted)
    assert not list(model.parent.glob("drn.fp16.*"))


def test_html_report_command_names_short_query_engines() -> None:
    command = BuildRequest(Path("drn.onnx"), unroll=(6, 10), split=True).command()
    assert "--split --unroll 6 10" in command
    assert "--unroll" not in BuildRequest(Path("drn.onnx")).command()


def test_build_request_has_the_options_of_the_command() -> None:
    parameters = inspect.signature(build_engine).parameters.values()
    options = {field.name: field.default for field in dataclasses.fields(BuildRequest) if field.name != "model"}
    assert options == {parameter.name: parameter.default for parameter in parameters if parameter.name != "model"}


def test_reported_command_rebuilds_identical_file(model: Path, planted: Path, tmp_path: Path) -> None:
    table = _measure(model, planted, tmp_path / "t.json")
    output = build_engine(
        model, precision="int8", data=planted, table=table, keep=("fcos.head.mix_fc",), max_drop=LOOSE, limit=9,
        query_length=(1, 8, 12), threads=1, min_speedup=0,
    )  # fmt: skip
    said = json.loads(model.with_name("drn.int8.parity.json").read_text())["command"].split()
    assert said[:3] == ["python", "-m", "export.build_engine"]
    for words in (
        "--keep fcos.head.mix_fc",
        "--limit 9",
        "--query-length 1 8 12",
        f"--table {table}",
        "--min-speedup 0",
    ):
        assert words in " ".join(said)
    first = output.read_bytes()
    output.unlink()
    assert subprocess.run([sys.executable, *said[1:]], capture_output=True).returncode == 0
    assert output.read_bytes() == first


@pytest.mark.rtx
def test_failed_engine_build_keeps_previous_graph(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
    model.with_name("drn.fp16.onnx").write_text("an earlier one")

    def broken(*_: Any) -> Any:
        raise ModelFileError("cannot build the engine", code="no_way")

    monkeypatch.setattr("export.engine.engine_writer.build", broken)
    with raises(ModelFileError, "no_way"):
        build_engine(model, target="tensorrt-rtx", compute_capability=("8.6",), query_length=(1, 8, 12))
    assert {path.name for path in model.parent.iterdir()} == {"drn.onnx", "drn.fp16.onnx"}
    assert model.with_name("drn.fp16.onnx").read_text() == "an earlier one"


def test_graph_of_another_checkpoint_is_not_overwritten(models: Path, planted: Path, tmp_path: Path) -> None:
    checkpoint = tmp_path / "drn.pt"
    shutil.copy(models / "drn.pt", checkpoint)
    (tmp_path / "drn.onnx").write_text("precious")
    with raises(OutputError, "output_exists", tmp_path / "drn.onnx", "drn.pt"):
        build_engine(checkpoint, precision="fp16", query_length=(1, 8, 12))
    assert (tmp_path / "drn.onnx").read_text() == "precious"


@pytest.mark.parametrize("place", ["plan", "sidecar"])
def test_full_disk_preserves_the_previous_engine(
    place: str, model: Path, tensorrt: list[BuildOptions], monkeypatch: pytest.MonkeyPatch
) -> None:
    plans = iter((b"first", b"second"))
    monkeypatch.setattr(
        "export.engine.engine_writer.build",
        lambda *_: BuiltEngine(next(plans), "tensorrt 11.4.0", True, _inspected("wide"), None),
    )
    wanted: dict[str, Any] = {"precision": "fp32", "target": "tensorrt", "query_length": (1, 8, 12), "unroll": (0,)}
    output = build_engine(model, **wanted)
    before = {path.name: path.read_bytes() for path in model.parent.iterdir()}
    whole = Path.write_bytes if place == "plan" else Path.write_text

    def full(path: Path, content: Any, *arguments: Any, **options: Any) -> Any:
        if path.name.startswith(".") and path.suffix == (".engine" if place == "plan" else ".json"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return whole(path, content, *arguments, **options)  # type: ignore[operator]

    monkeypatch.setattr(Path, "write_bytes" if place == "plan" else "write_text", full)
    with raises(OutputError, "disk_full"):
        build_engine(model, **wanted)
    monkeypatch.undo()
    assert {path.name for path in model.parent.iterdir()} == set(before)
    assert output.read_bytes() == before[output.name]
    assert read_sidecar(output).manifest.precision == "fp32"


def test_conflicting_options_are_rejected_before_the_build(model: Path, tmp_path: Path) -> None:
    with raises(GroundingError, "missing_option", "int8", "--data", "--table"):
        build_engine(model, precision="int8")
    with raises(GroundingError, "inapplicable_option", "--calib-videos", model.name):
        build_engine(model, calib_videos=(model,), target="onnxruntime")
    with raises(GroundingError, "inapplicable_option", "--table", "fp16"):
        build_engine(model, precision="fp16", table=tmp_path / "t.json")
    with raises(GroundingError, "inapplicable_option", "--keep", "fp32"):
        build_engine(model, precision="fp32", keep=("fpn",), output=tmp_path / "o.onnx")
    with raises(OutputError, "wrong_suffix", tmp_path / "drn.engine", ".onnx"):
        build_engine(model, output=tmp_path / "drn.engine", target="onnxruntime")
    with raises(OutputError, "output_is_input", model):
        build_engine(model, output=model)
    with raises(ModelFileError, "missing_file", tmp_path / "absent.onnx"):
        build_engine(tmp_path / "absent.onnx")
    with raises(ShapeError, "invalid_option", "--batch", 4, 2, 1):
        build_engine(model, batch=(4, 2, 1), dry_run=True)


def test_split_build_pair_equals_unsplit_model(model: Path, planted: Path) -> None:
    output = build_engine(model, precision="fp16", data=planted, split=True, query_length=(1, 8, 12), threads=1)
    assert output == model.with_name("drn.fp16.query.onnx")
    whole, pair = Grounder.load(model.with_name("drn.fp16.onnx")), Grounder.load(output)
    assert sha256(model.with_name("drn.fp16.onnx")) in pair.manifest.sources.values()
    data_set = DataSet(planted)
    for annotation in data_set.annotations("test")[:4]:
        video = data_set.video(annotation.video)
        wanted = whole.ground(video, annotation.sentence)
        found = pair.ground(pair.encode(video), annotation.sentence)
        assert [moment.start for moment in found] == pytest.approx([moment.start for moment in wanted], abs=0.05)


def test_build_rejects_model_part_as_input(model: Path, planted: Path) -> None:
    write_split_model(*split_graph(onnx.load(model)), model)
    with raises(ModelFileError, "model_part", model.with_name("drn.query.onnx"), "query part"):
        build_engine(model.with_name("drn.query.onnx"), precision="fp16", data=planted)


@pytest.mark.rtx
def test_split_build_writes_two_engines_with_metadata(model: Path, planted: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
    output = build_engine(
        model, precision="int8", target="tensorrt-rtx", compute_capability=("8.6",), query_length=(1, 8, 12),
        split=True, videos=16, table=_measure(model, planted, tmp_path / "t.json"), threads=1,
    )  # fmt: skip
    assert output.name == "drn.int8.query.engine"
    query, video = read_sidecar(output), read_sidecar(model.with_name("drn.int8.video.engine"))
    assert (query.manifest.part, video.manifest.part) == ("query", "video")
    (named,) = query.manifest.video_part.items()
    assert named == ("drn.int8.video.onnx", sha256(model.with_name("drn.int8.video.onnx")))
    assert video.content["sha256"]["drn.int8.video.onnx"] == named[1]
    assert query.content["profiles"][0]["shapes"]["encoded_features"][2][0] == 16
    assert query.content["census"]["twin"]["shares"]["int8"] > 0.8


@pytest.mark.rtx
@pytest.mark.parametrize("split", [False, True])
def test_short_query_engines_are_built_and_recorded(model: Path, split: bool) -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
    output = build_engine(
        model, precision="fp16", target="tensorrt-rtx", compute_capability=("8.6",), query_length=(1, 8, 12),
        split=split, unroll=(6, 4, 6),
    )  # fmt: skip
    shorter = {steps: output.with_name(f"{output.stem}.{steps}.engine") for steps in (4, 6)}
    main = read_sidecar(output)
    assert main.content["unrolled"] == {path.name: sha256(path) for path in shorter.values()}
    for steps, path in shorter.items():
        content = read_sidecar(path).content
        assert [profile["query_length"] for profile in content["profiles"]] == [[steps] * 3] * 2
        assert content["profiles"][1]["shapes"]["query_tokens"] == [[2, steps], [8, steps], [32, steps]]
        assert "unrolled" not in content
        # It was built from the same graph.
        assert {*content["sha256"]} - {path.name} == {*main.content["sha256"]} - {output.name}
    assert short_query_plans(output, main) == [(path, read_sidecar(path)) for path in shorter.values()]
    if split:
        # The video part reads no tokens.
        assert "unrolled" not in read_sidecar(model.with_name("drn.fp16.video.engine")).content


def test_impossible_token_counts_are_rejected_before_the_build(
    model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("export.build.run_build.unavailable_reason", lambda target: None)
    monkeypatch.setattr("export.build.build_config.check_options", lambda options: None)
    engine: dict[str, Any] = {"target": "tensorrt", "query_length": (1, 8, 12), "dry_run": True}
    for wrong in ((-1,), (8, 13)):
        with raises(ShapeError, "invalid_option", "--unroll", 1, 12, wrong[-1]):
            build_engine(model, unroll=wrong, **engine)
    with raises(ShapeError, "invalid_option", "--unroll", "0 6"):
        build_engine(model, unroll=(6, 0), **engine)
    with raises(GroundingError, "inapplicable_option", "--unroll", "onnxruntime"):
        build_engine(model, target="onnxruntime", unroll=(8,))
    build_engine(model, unroll=(12, 8), **engine)
    told = [line.split()[1] for line in capsys.readouterr().out.splitlines() if line.startswith("unrolled")]
    assert [Path(path).name for path in told] == ["drn.fp16.8.engine", "drn.fp16.12.engine"]
    # The maximum query length of a published checkpoint is known after its conversion.
    monkeypatch.setattr("export.build.build_config.BuildConfig.early_profiles", lambda *_: None)
    with raises(ShapeError, "invalid_option", "--unroll", 1, 12, 13):
        build_engine(model, unroll=(13,), **{**engine, "dry_run": False})


def test_lstm_that_cannot_be_unrolled_is_rejected_first(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("export.build.run_build.unavailable_reason", lambda target: None)
    monkeypatch.setattr("export.build.build_config.check_options", lambda options: None)
    monkeypatch.setattr("export.build.run_build.convert_precision", lambda *_: pytest.fail("minutes were spent"))
    graph = onnx.load(model)
    next(node for node in graph.graph.node if node.op_type == "LSTM").name = "another/LSTM"
    onnx.save(graph, model)
    with raises(ModelFileError, "unsupported_lstm"):
        build_engine(model, target="tensorrt", query_length=(1, 8, 12), unroll=(6,))


def test_engine_options_for_other_targets_are_rejected(model: Path) -> None:
    with raises(GroundingError, "inapplicable_option", "--workspace", "onnxruntime"):
        build_engine(model, target="onnxruntime", workspace=1.0)
    with raises(GroundingError, "inapplicable_option", "--compute-capability", "onnxruntime"):
        build_engine(model, target="onnxruntime", compute_capability=("8.6",))


@pytest.mark.rtx
def test_unsupported_precision_is_rejected_before_the_build(model: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
    rtx: dict[str, Any] = {"target": "tensorrt-rtx", "query_length": (1, 8, 12), "dry_run": True}
    for precision, capability in (("fp8", "8.9"), ("bf16", "7.5")):
        with raises(DeviceError, "precision_unsupported", precision):
            build_engine(model, precision=precision, compute_capability=(capability,), data=tmp_path, **rtx)  # type: ignore[arg-type]
    with raises(DeviceError, "unsupported_compute_capability", "9.0", "12.1"):
        build_engine(model, compute_capability=("9.0",), **rtx)
    with raises(DeviceError, "inapplicable_option", "--version-compatible"):
        build_engine(model, compute_capability=("8.6",), version_compatible=True, **rtx)
    with raises(DeviceError, "invalid_option", "--optimization-level", 9):
        build_engine(model, compute_capability=("8.6",), optimization_level=9, **rtx)
    with raises(DeviceError, "invalid_option", "--workspace", "0.0"):
        build_engine(model, compute_capability=("8.6",), workspace=0.0, **rtx)


def test_unusable_calibration_data_is_rejected(model: Path, planted: Path, tmp_path: Path) -> None:
    wanted: dict[str, Any] = {"precision": "int8", "query_length": (1, 8, 12), "threads": 1}
    for dry_run in (False, True):
        with raises(GroundingError, "too_few_samples", "--calib-samples", 8, 32):
            build_engine(model, data=planted, calib_samples=8, dry_run=dry_run, **wanted)
        with raises(CalibrationError, "unknown_module", "'nonsense'"):
            build_engine(model, data=planted, keep=("nonsense",), dry_run=dry_run, **wanted)
        with raises(AnnotationError, "missing_file", tmp_path / "nowhere"):
            build_engine(model, data=tmp_path / "nowhere", dry_run=dry_run, **wanted)
    bare = tmp_path / "bare"
    shutil.copytree(planted, bare)
    for features in (bare / "C3D_unit16_overlap0.5_merged").iterdir():
        features.unlink()
    with raises(FeatureError, "missing_features", "C3D_unit16_overlap0.5_merged"):
        build_engine(model, data=bare, calib_samples=32, **wanted)
    other = tmp_path / "other.onnx"
    changed = onnx.load(model)
    bias = next(tensor for tensor in changed.graph.initializer if tensor.name == "prop_fc.bias")
    bias.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(bias) + 1, bias.name))
    onnx.save(changed, other)
    _measure(other, planted, tmp_path / "t.calibration.json")
    with raises(CalibrationError, "table_of_another_model", model):
        build_engine(model, table=tmp_path / "t.calibration.json", **wanted)
    assert sorted(path.name for path in model.parent.glob("drn.*")) == ["drn.onnx"]


def test_invalid_graph_file_is_rejected(tmp_path: Path) -> None:
    (tmp_path / "other.onnx").write_bytes(b"not a graph")
    with raises(ModelFileError, "not_onnx", tmp_path / "other.onnx"):
        build_engine(tmp_path / "other.onnx")


def test_auto_target_without_gpu_is_onnxruntime_with_reason() -> None:
    if cuda_gpu():
        pytest.skip("this machine has a GPU")
    chosen, why = choose_target("auto")
    assert chosen == "onnxruntime"
    assert quotes(why, str(unavailable_reason("tensorrt")).rstrip("."))
    with raises(DeviceError, "target_unavailable", "tensorrt"):
        choose_target("tensorrt")


@pytest.mark.parametrize(("target", "optimized"), [("onnxruntime", True), ("tensorrt-rtx", False)])
def test_int8_parity_check_uses_graph_form_of_the_target(
    target: Any, optimized: bool, model: Path, planted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if target == "tensorrt-rtx":
        pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
    seen = []

    class Enough(Exception):
        pass

    def stop(_: Any, graph: onnx.ModelProto, optimized: bool, threads: int | None) -> Any:
        seen.append((optimized, _narrow_operators(graph)))
        raise Enough

    monkeypatch.setattr("export.build.parity_check.ParityChecker._open_split", stop)
    with pytest.raises(Enough):
        build_engine(
            model, precision="int8", target=target, data=planted, table=_measure(model, planted, tmp_path / "t.json"),
            compute_capability=("8.6",) if target == "tensorrt-rtx" else (), max_drop=LOOSE, threads=1,
            query_length=(1, 8, 12),
        )  # fmt: skip
    # On a CPU ONNX Runtime has INT8 matrix products, engines have INT8 convolutions.
    assert seen == [(optimized, {"MatMul"} if target == "onnxruntime" else {"Conv"})]


def _narrow_operators(graph: onnx.ModelProto) -> set[str]:
    """Return the types of operators whose two inputs come from DequantizeLinear."""
    turned = {node.output[0] for node in graph.graph.node if node.op_type == "DequantizeLinear"}
    return {node.op_type for node in graph.graph.node if set(node.input[:2]) <= turned and len(node.input) > 1}


def test_rejected_engine_is_renamed_with_its_metadata(tmp_path: Path, model: Path) -> None:
    engine = tmp_path / "drn.fp16.engine"
    content = {
        "format": "drn-engine/1", "manifest": Grounder.load(model).manifest.to_dict(), "library": "tensorrt 11.4.0",
        "target": "tensorrt", "gpu": None, "compute_capabilities": [], "profiles": [], "options": {}, "census": {},
        "sha256": {"drn.fp16.onnx": "0" * 64},
    }  # fmt: skip
    _write_engine(engine, b"plan", content)
    kept = mark_rejected(engine)
    assert {path.name for path in tmp_path.iterdir()} >= {kept.name, f"{kept.name}.json"}
    assert not engine.exists()
    assert not engine.with_name("drn.fp16.engine.json").exists()
    assert kept.read_bytes() == b"plan"
    assert read_sidecar(kept).content["sha256"]["drn.fp16.onnx"] == "0" * 64
    # Its engines for short queries are recorded with their new names.
    _write_engine(engine, b"plan", {**content, "unrolled": {"drn.fp16.8.engine": "1" * 64}})
    assert read_sidecar(mark_rejected(engine)).content["unrolled"] == {"drn.fp16.8.rejected.engine": "1" * 64}


def _inspected(scenario: str, version: str = "11.4") -> Inspection:
    views = (ProfileView(name, {}, document(version, scenario, bound=True)) for name in ("one query", "several"))
    return Inspection(document(version, scenario, bound=False), tuple(views))


@pytest.fixture
def built_tokens(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A test double of TensorRT that builds any graph; the list has the query length of each, 0 for a dynamic one."""
    built: list[int] = []

    def build(graph: bytes, options: Any, known: Any) -> BuiltEngine:
        (tokens,) = (value for value in onnx.load_from_string(graph).graph.input if value.name == "query_tokens")
        built.append(tokens.type.tensor_type.shape.dim[1].dim_value)
        return BuiltEngine(bytes(100), "tensorrt 11.4", True, _inspected("convolutions"), None)

    monkeypatch.setattr(
        "export.engine.builder.load_library", lambda _: SimpleNamespace(__name__="trt", __version__="11.4")
    )
    monkeypatch.setattr("export.engine.builder.is_strongly_typed", lambda library: True)
    monkeypatch.setattr("export.build.build_config.check_options", lambda options: None)
    monkeypatch.setattr("export.build.run_build.unavailable_reason", lambda target: None)
    monkeypatch.setattr("export.build.run_build.runs_here", lambda options: False)
    monkeypatch.setattr("export.engine.engine_writer.build", build)
    return built


def test_tensorrt_build_adds_usual_query_length_engines(
    model: Path, planted: Path, built_tokens: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    asked: dict[str, Any] = {"target": "tensorrt", "query_length": (1, 8, 12), "threads": 1, "limit": 9}
    data = DataSet(planted)
    vocabulary = Grounder.load(model).manifest.vocabulary
    lengths = sorted(len(vocabulary.encode(one.sentence, Counter())) for one in data.annotations("train"))
    expected = sorted({lengths[math.ceil(share * len(lengths)) - 1] for share in (0.9, 0.99)})
    output = build_engine(model, data=planted, **asked)
    assert built_tokens == [*expected, 0]
    assert engine_compatibility.unrolled_steps(read_sidecar(output).content) == expected
    told = capsys.readouterr().out
    assert quotes(told, len(lengths), data.annotations_path("train"))
    # The recorded command reproduces the build with other data.
    command = json.loads(model.with_name("drn.fp16.parity.json").read_text())["command"]
    assert f"--unroll {' '.join(map(str, expected))}" in command
    assert f"--unroll {' '.join(map(str, expected))}" in engine_compatibility.rebuild_command(
        output, read_sidecar(output)
    )
    # Without --data the lengths are those of the model; one that is not below the engine's maximum is left out.
    record_quantiles(model, [5, 12])
    built_tokens.clear()
    build_engine(model, target="tensorrt", query_length=(1, 8, 12))
    assert built_tokens == [5, 0]
    built_tokens.clear()
    output = build_engine(model, target="tensorrt", query_length=(1, 8, 12), unroll=(0,))
    assert built_tokens == [0]
    assert "unrolled" not in read_sidecar(output).content
    assert "--unroll 0" in engine_compatibility.rebuild_command(output, read_sidecar(output))


def record_quantiles(model: Path, quantiles: list[int]) -> None:
    graph = onnx.load(model)
    about = read_manifest(graph)
    training = {**about.training, "query_length_quantiles": quantiles}
    onnx.helper.set_model_props(graph, {METADATA_KEY: dataclasses.replace(about, training=training).to_json()})
    onnx.save(graph, model)


def test_query_part_gets_engines_for_usual_query_lengths(
    model: Path, built_tokens: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    record_quantiles(model, [4, 4])
    monkeypatch.setattr(
        "export.engine.engine_writer.build", lambda *_: BuiltEngine(bytes(100), "tensorrt 11.4", True, shown, None)
    )
    shown = _inspected("convolutions")
    output = build_engine(model, target="tensorrt", query_length=(1, 8, 12), split=True)
    assert engine_compatibility.unrolled_steps(read_sidecar(output).content) == [4]
    assert "unrolled" not in read_sidecar(output.with_name("drn.fp16.video.engine")).content
    assert output.with_name("drn.fp16.query.4.engine").is_file()


def test_dry_run_names_usual_query_length_engines(
    model: Path, built_tokens: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    record_quantiles(model, [4, 6])
    for target, expected in (("tensorrt", ["drn.fp16.4.engine", "drn.fp16.6.engine"]), ("tensorrt-rtx", [])):
        build_engine(
            model, target=target, query_length=(1, 8, 12), dry_run=True,
            compute_capability=("8.6",) if target == "tensorrt-rtx" else (),
        )  # fmt: skip
        told = [line.split()[1] for line in capsys.readouterr().out.splitlines() if line.startswith("unrolled")]
        assert [Path(path).name for path in told] == expected


def dry_run(capsys: pytest.CaptureFixture[str], model: Path, **asked: Any) -> tuple[list[str], str]:
    """Return the engines for short queries that a dry run lists, and the source of their lengths."""
    capsys.readouterr()
    build_engine(model, target="tensorrt", dry_run=True, **asked)
    lines = capsys.readouterr().out.splitlines()
    (reason,) = [line.partition(" ")[2].strip() for line in lines if line.startswith("lengths ")]
    return [Path(line.split()[1]).name for line in lines if line.startswith("unrolled")], reason


def test_dry_run_lists_only_engines_that_are_built(
    model: Path, models: Path, built_tokens: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    record_quantiles(model, [4, 12])
    listed, reason = dry_run(capsys, model, query_length=(1, 8, 12))
    assert listed == ["drn.fp16.4.engine"]
    assert quotes(reason, 4, 12)
    graph = onnx.load(model)
    next(node for node in graph.graph.node if node.op_type == "LSTM").name = "another/LSTM"
    onnx.save(graph, model)
    listed, reason = dry_run(capsys, model, query_length=(1, 8, 12))
    assert listed == []
    assert quotes(reason, "LSTM", "unrolled")
    with pytest.raises(ModelFileError):
        build_engine(model, target="tensorrt", query_length=(1, 8, 12), unroll=(6,), dry_run=True)
    # A graph that was exported earlier is used if it accepts the longest query.
    checkpoint = model.with_name("drn.pt")
    shutil.copy(models / "drn.pt", checkpoint)
    assert dry_run(capsys, checkpoint)[0] != []
    longer = dataclasses.replace(read_manifest(graph), max_query_length=64)
    onnx.helper.set_model_props(graph, {METADATA_KEY: longer.to_json()})
    onnx.save(graph, model)
    assert dry_run(capsys, checkpoint)[0] == []
    model.unlink()
    assert dry_run(capsys, checkpoint)[0] != []


def test_dry_run_names_query_lengths_and_their_source(
    planted: Path, tmp_path: Path, built_tokens: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    published = tmp_path / "published.pth"
    torch.save({"state_dict": {"prop_fc.weight": torch.zeros(1)}}, published)
    listed, reason = dry_run(capsys, published)
    assert listed == ["published.fp16.9.engine", "published.fp16.10.engine"]
    assert "Charades-STA" in reason
    assert dry_run(capsys, published, query_length=(1, 8, 10))[0] == ["published.fp16.9.engine"]
    assert dry_run(capsys, published, unroll=(0,)) == ([], "--unroll 0")
    listed, reason = dry_run(capsys, published, data=planted)
    assert listed == []
    assert str(planted) in reason


def test_lstm_that_cannot_be_unrolled_keeps_the_loop(
    model: Path, built_tokens: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    record_quantiles(model, [4, 6])
    graph = onnx.load(model)
    next(node for node in graph.graph.node if node.op_type == "LSTM").name = "another/LSTM"
    onnx.save(graph, model)
    build_engine(model, target="tensorrt", query_length=(1, 8, 12))
    assert built_tokens == [0]
    assert records(caplog, logging.WARNING, "LSTM")


@pytest.mark.parametrize("error", [BuildFailed("No."), ModelFileError("No."), KeyboardInterrupt()])
@pytest.mark.parametrize("number", [0, 1, 2])
def test_interrupted_build_leaves_no_short_query_engine(
    model: Path, built_tokens: list[int], monkeypatch: pytest.MonkeyPatch, error: BaseException, number: int
) -> None:
    good = engine_writer.build

    def build(*arguments: Any) -> BuiltEngine:
        if len(built_tokens) == number:
            raise error
        return good(*arguments)

    before = {path.name: path.read_bytes() for path in model.parent.iterdir()}
    monkeypatch.setattr("export.engine.engine_writer.build", build)
    with pytest.raises(type(error)) as caught:
        build_engine(model, target="tensorrt", query_length=(1, 8, 12), unroll=(4, 6))
    assert len(built_tokens) == number
    # Only engines for short queries can be left out.
    assert ("--unroll 0" in str(caught.value)) == (isinstance(error, ModelFileError) and number < 2)
    after = {path.name: path.read_bytes() for path in model.parent.iterdir() if not path.name.startswith(".")}
    assert after == before


@pytest.mark.parametrize(
    ("error", "failing", "split"),
    [
        (BuildFailed("No."), (4,), False),
        (PlanNotLoaded("No."), (6,), True),
        (DeviceError("No."), (4, 6), False),
        (BuildFailed("No."), (4, 6), True),
    ],
)
def test_default_engine_that_fails_to_build_is_skipped(
    model: Path,
    planted: Path,
    built_tokens: list[int],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    error: GroundingError,
    failing: tuple[int, ...],
    split: bool,
) -> None:
    record_quantiles(model, [4, 6])

    def build(graph: bytes, *_: Any) -> BuiltEngine:
        tokens = [value for value in onnx.load_from_string(graph).graph.input if value.name == "query_tokens"]
        if tokens and tokens[0].type.tensor_type.shape.dim[1].dim_value in failing:
            raise error
        return BuiltEngine(bytes(100), "tensorrt 11.4", True, _inspected("convolutions"), None)

    monkeypatch.setattr("export.engine.engine_writer.build", build)
    monkeypatch.setattr("export.engine.profiles._data_quantiles", lambda *_: None)
    asked: dict[str, Any] = {"target": "tensorrt", "query_length": (1, 8, 12), "split": split}
    output = build_engine(model, data=planted, limit=3, threads=1, **asked)
    left = [steps for steps in (4, 6) if steps not in failing]
    assert engine_compatibility.unrolled_steps(read_sidecar(output).content) == left
    for steps in (4, 6):
        plan = output.with_name(f"{output.stem}.{steps}.engine")
        assert plan.is_file() == (steps in left)
        warnings = [
            record.getMessage()
            for record in caplog.records
            if record.levelno >= logging.WARNING and plan.name in record.getMessage()
        ]
        assert bool(warnings) == (steps in failing)
        assert all("No." in warning for warning in warnings)
    # The recorded command reproduces the build.
    command = json.loads(model.with_name("drn.fp16.parity.json").read_text())["command"]
    assert f"--unroll {' '.join(map(str, left or [0]))}" in command
    assert read_sidecar(output).content["options"]["changes"]
    if error.code == "build_failed":
        with pytest.raises(BuildFailed):
            build_engine(model, unroll=(4, 6), **asked)


def test_engines_of_one_build_share_timing_cache_and_profiles(
    model: Path, tensorrt: list[BuildOptions], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    seen: list[bytes | None] = []

    def build(graph: bytes, options: BuildOptions, known: bytes | None) -> BuiltEngine:
        tensorrt.append(options)
        seen.append(known)
        if len(options.profiles) > 1:
            raise PlanNotLoaded("tensorrt 8.6.1 cannot load the plan that it built: missing offset in id2offset.")
        times = b"%d" % len(seen)
        return BuiltEngine(b"plan", "tensorrt 8.6.1", True, _inspected("convolutions"), times)

    monkeypatch.setattr("export.engine.engine_writer.build", build)
    asked: dict[str, Any] = {"target": "tensorrt", "query_length": (1, 8, 12), "unroll": (4, 6)}
    output = build_engine(model, split=True, **asked)
    # The video part has one profile. Of the other plans only the first is built with two.
    assert [len(options.profiles) for options in tensorrt] == [1, 2, 1, 1, 1]
    assert seen == [None, b"1", b"1", b"3", b"4"]
    for name in ("drn.fp16.query.4.engine", "drn.fp16.query.6.engine", output.name):
        options = read_sidecar(output.with_name(name)).content["options"]
        assert options["profiles"] == 1
        assert any("--profiles 1" in change for change in options["changes"])
    # The file of an earlier build has priority.
    cache = tmp_path / "times.cache"
    cache.write_bytes(b"earlier")
    seen.clear()
    build_engine(model, profiles=1, timing_cache=cache, **asked)
    assert seen == [b"earlier", b"1", b"2"]
    assert cache.read_bytes() == b"3"


@pytest.mark.parametrize(("wide", "kept"), [(0, "drn.fp16.6.rejected"), (1, "drn.fp16.rejected")])
def test_one_failed_engine_leaves_all_engines_unchanged(
    model: Path, wide: int, kept: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    scenarios: Iterator[str] = iter(())
    monkeypatch.setattr(
        "export.engine.builder.load_library", lambda target: SimpleNamespace(__name__="trt", __version__="11.4")
    )
    monkeypatch.setattr("export.engine.builder.is_strongly_typed", lambda library: True)
    monkeypatch.setattr("export.build.build_config.check_options", lambda options: None)
    monkeypatch.setattr("export.build.run_build.unavailable_reason", lambda target: None)
    monkeypatch.setattr(
        "export.engine.engine_writer.build",
        lambda *_: BuiltEngine(bytes(100), "tensorrt 11.4", True, _inspected(next(scenarios)), None),
    )
    asked: dict[str, Any] = {"target": "tensorrt", "query_length": (1, 8, 12), "unroll": (6,)}
    scenarios = iter(("convolutions", "mixed"))
    output = build_engine(model, **asked)
    before = {path.name: path.read_bytes() for path in model.parent.iterdir()}
    assert {"drn.fp16.6.engine", "drn.fp16.6.engine.json", "drn.fp16.6.layers.json.gz"} < {*before}
    scenarios = iter(["wide" if index == wide else "convolutions" for index in range(2)])
    with raises(CheckFailed, "precision_contradicted", "fp16", f"{kept}.engine"):
        build_engine(model, **asked)
    after = {path.name: path.read_bytes() for path in model.parent.iterdir()}
    assert {*after} - {*before} == {f"{kept}.engine", f"{kept}.engine.json", f"{kept}.layers.json.gz"}
    assert {name: after[name] for name in before} == before
    # No other file of that build remains.
    rejected = output.with_name(f"{kept}.engine")
    assert not short_query_plans(rejected, read_sidecar(rejected))
    assert read_sidecar(rejected).content["census"]["verdict"] == CONTRADICTED
    layers = read_layers_file(layers_path(rejected))
    assert layers["sha256"] == sha256(rejected)
    assert [view["bound"]["Layers"][0]["Name"] for view in layers["profiles"]]
    assert [path.name for path, _ in short_query_plans(output, read_sidecar(output))] == ["drn.fp16.6.engine"]


def test_engines_failing_parity_are_renamed_together(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    @dataclasses.dataclass(frozen=True)
    class Judged:
        violations: tuple[str, ...] = ("It answers otherwise.",)
        model: Any = None

        def text(self) -> str:
            return self.violations[0]

        sentence = text

    manifest = Grounder.load(model).manifest
    content = {
        "format": "drn-engine/1", "manifest": manifest.to_dict(), "library": "tensorrt 11.4.0", "profiles": [],
        "sha256": {"drn.fp16.onnx": "0" * 64},
    }  # fmt: skip
    main, shorter = tmp_path / "drn.fp16.engine", tmp_path / "drn.fp16.8.engine"
    _write_engine(shorter, b"short", content)
    _write_engine(main, b"long", {**content, "unrolled": {shorter.name: sha256(shorter)}})
    layers_path(shorter).write_bytes(b"layers")
    written: list[Any] = []
    court: Any = SimpleNamespace(
        check_engine=lambda made: Judged(), write_reports=lambda proof, *_: written.append(proof)
    )
    with raises(CheckFailed, "parity_failed", "--optimization-level"):
        _check_engine(court, SimpleNamespace(manifest=manifest), [shorter, main])  # type: ignore[arg-type]
    assert written[0].model.path == tmp_path / "drn.fp16.rejected.engine"
    assert not main.exists()
    assert not shorter.exists()
    # The rejected engines can be opened together.
    (found,) = short_query_plans(written[0].model.path, read_sidecar(written[0].model.path))
    assert found[0].read_bytes() == b"short"
    assert layers_path(found[0]).read_bytes() == b"layers"


def test_table_at_its_output_path_is_used_unchanged(model: Path, planted: Path) -> None:
    table = _measure(model, planted, model.with_name("drn.int8.calibration.json"))
    before = table.read_bytes()
    build_engine(model, precision="int8", data=planted, table=table, dry_run=True, query_length=(1, 8, 12))
    assert table.read_bytes() == before


def test_plan_without_table_is_rejected(model: Path, planted: Path, tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text("{}")
    with raises(GroundingError, "missing_option", "--plan", "--table"):
        build_engine(model, precision="int8", data=planted, plan=tmp_path / "plan.json")


@pytest.mark.rtx
def test_engine_that_was_not_opened_is_not_proven(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
    large = BuiltEngine(
        bytes(90_000_000), "tensorrt_rtx 1.7.1.116", True, None, None, "no GPU is here to open the plan"
    )
    monkeypatch.setattr("export.engine.engine_writer.build", lambda *_: large)
    output = build_engine(model, target="tensorrt-rtx", compute_capability=("8.6",), query_length=(1, 8, 12))
    census = read_sidecar(output).content["census"]
    assert census["verdict"] == NOT_PROVEN
    assert census["engine"] is None
    assert "90 MB" in census["reason"]
    assert "not proven" in capsys.readouterr().out
    assert records(caplog, logging.WARNING, NOT_PROVEN)
    assert not layers_path(output).exists()


@pytest.mark.parametrize(
    ("version", "scenario", "verdict"),
    [
        ("8.6.1", "convolutions", PROVEN), ("8.6.1", "foreign", NOT_PROVEN), ("10.16.1", "generated", PROVEN),
        ("10.16.1", "foreign", NOT_PROVEN), ("11.4.0", "mixed", NOT_PROVEN), ("11.4.0", "names", NOT_PROVEN),
        ("8.6.1", "wide", CONTRADICTED), ("10.16.1", "wide", CONTRADICTED), ("11.4.0", "wide", CONTRADICTED),
    ],
)  # fmt: skip
def test_build_result_follows_inspector_verdict(
    version: str,
    scenario: str,
    verdict: str,
    model: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    library, _ = stand_in(version, scenario)
    monkeypatch.setattr("export.engine.builder.load_library", lambda target: library)
    monkeypatch.setattr("export.build.run_build.unavailable_reason", lambda target: None)
    monkeypatch.setattr("export.engine.inspector.Cuda", gpu)
    rejected = verdict == CONTRADICTED
    with raises(CheckFailed, "precision_contradicted", "fp16") if rejected else contextlib.nullcontext():
        build_engine(model, target="tensorrt", query_length=(1, 8, 12), unroll=(0,))
    engine = model.with_name("drn.fp16.rejected.engine" if rejected else "drn.fp16.engine")
    assert read_sidecar(engine).content["census"]["verdict"] == verdict
    layers = read_layers_file(layers_path(engine))
    assert [view["name"] for view in layers["profiles"]] == ["one query", "several queries"]
    assert layers["unbound"] == json.loads(document(version, scenario, bound=False), strict=False)
    assert layers["profiles"][1]["bound"] == json.loads(document(version, scenario, bound=True), strict=False)
    capsys.readouterr()
    describe(engine)
    described = capsys.readouterr().out
    assert verdict in described
    assert "layers: several queries" in described


def test_layers_of_another_build_are_not_described(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    engine = tmp_path / "drn.fp16.engine"
    content = {
        "format": "drn-engine/1", "manifest": Grounder.load(model).manifest.to_dict(), "library": "tensorrt 11.4.0",
        "target": "tensorrt", "profiles": [], "sha256": {"drn.fp16.onnx": "0" * 64},
    }  # fmt: skip
    _write_engine(engine, b"plan", content)
    whole = packed(_inspected("wide"), engine.name, "0" * 64, "tensorrt 11.4.0")
    for layers in (whole, whole[:40], b"text", gzip.compress(b"[]"), gzip.compress(b"{}"), b""):
        layers_path(engine).write_bytes(layers)
        describe(engine)
        described = capsys.readouterr().out
        assert "30 in fp32" not in described
        assert layers_path(engine).name in described


@pytest.fixture
def tensorrt(monkeypatch: pytest.MonkeyPatch) -> list[BuildOptions]:
    """Replace TensorRT 11.4 by a function of the test, and return the options of each build."""
    monkeypatch.setattr("export.engine.builder.load_library", lambda target: stand_in("11.4.0")[0])
    monkeypatch.setattr("export.build.run_build.unavailable_reason", lambda target: None)
    monkeypatch.setattr("export.build.build_config.check_options", lambda options: None)
    return []


def test_two_profile_engine_that_fails_to_load_gets_one_profile(
    model: Path,
    tensorrt: list[BuildOptions],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def build(graph: bytes, options: BuildOptions, *_: Any) -> BuiltEngine:
        tensorrt.append(options)
        if len(options.profiles) > 1:
            # The message in NVIDIA/TensorRT#2977.
            raise PlanNotLoaded("tensorrt 8.6.1 cannot load the plan that it built: missing offset in id2offset.")
        return BuiltEngine(b"plan", "tensorrt 8.6.1", True, _inspected("convolutions"), None)

    monkeypatch.setattr("export.engine.engine_writer.build", build)
    output = build_engine(model, target="tensorrt", query_length=(1, 8, 12), unroll=(0,), batch=(1, 4, 8))
    assert [len(options.profiles) for options in tensorrt] == [2, 1]
    content = read_sidecar(output).content
    (profile,) = content["profiles"]
    assert profile["batch"] == [1, 4, 8]
    assert profile["shapes"]["query_tokens"] == [[1, 1], [4, 8], [8, 12]]
    assert content["options"]["profiles"] == 1
    assert "--profiles 1" in capsys.readouterr().out
    assert "--profiles 1" in rebuild_command(output, read_sidecar(output))
    # With --profiles 1 there is only one attempt.
    tensorrt.clear()
    build_engine(model, target="tensorrt", query_length=(1, 8, 12), unroll=(0,), batch=(1, 4, 8), profiles=1)
    assert [len(options.profiles) for options in tensorrt] == [1]


def test_one_profile_engine_that_fails_to_load_raises_error(
    model: Path, tensorrt: list[BuildOptions], monkeypatch: pytest.MonkeyPatch
) -> None:
    def build(*_: Any) -> BuiltEngine:
        raise PlanNotLoaded("no")

    monkeypatch.setattr("export.engine.engine_writer.build", build)
    for profiles in (1, 2):
        with pytest.raises(PlanNotLoaded):
            build_engine(model, target="tensorrt", query_length=(1, 8, 12), unroll=(0,), profiles=profiles)
    assert [path.name for path in model.parent.iterdir()] == ["drn.onnx"]


def test_int8_build_failure_is_retried_with_fp32_scales(
    model: Path,
    planted: Path,
    tmp_path: Path,
    tensorrt: list[BuildOptions],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    given: list[onnx.ModelProto] = []

    def build(graph: bytes, options: BuildOptions, *_: Any) -> BuiltEngine:
        given.append(onnx.load_from_string(graph))
        if has_half_scales(given[-1]):
            # NVIDIA/TensorRT#4832.
            raise BuildFailed("Could not infer output types for operation: dequantize")
        return BuiltEngine(b"plan", "tensorrt 11.4.0", True, _inspected("int8"), None)

    monkeypatch.setattr("export.engine.engine_writer.build", build)
    wanted: dict[str, Any] = {
        "precision": "int8", "target": "tensorrt", "query_length": (1, 8, 12), "threads": 1, "unroll": (4, 6),
        "table": _measure(model, planted, tmp_path / "t.json"),
    }  # fmt: skip
    output = build_engine(model, **wanted)
    # The first plan is built twice, later ones have FP32 scales at once.
    assert [has_half_scales(graph) for graph in given] == [True, False, False, False]
    for name in ("drn.int8.4.engine", "drn.int8.6.engine", output.name):
        assert read_sidecar(output.with_name(name)).content["options"]["changes"]
    assert "FP32" in capsys.readouterr().out
    # Without FP16 scales there is no second attempt.
    monkeypatch.setattr("export.engine.engine_writer.has_half_scales", lambda graph: False)
    with pytest.raises(BuildFailed):
        build_engine(model, **wanted)


@pytest.mark.parametrize("tf32", [False, True])
def test_tf32_option_is_recorded_in_metadata(
    tf32: bool, model: Path, tensorrt: list[BuildOptions], monkeypatch: pytest.MonkeyPatch
) -> None:
    def build(graph: bytes, options: BuildOptions, *_: Any) -> BuiltEngine:
        tensorrt.append(options)
        return BuiltEngine(b"plan", "tensorrt 11.4.0", True, _inspected("wide"), None)

    monkeypatch.setattr("export.engine.engine_writer.build", build)
    output = build_engine(model, precision="fp32", target="tensorrt", query_length=(1, 8, 12), unroll=(0,), tf32=tf32)
    assert [options.tf32 for options in tensorrt] == [tf32]
    sidecar = read_sidecar(output)
    assert sidecar.content["options"]["tf32"] == tf32
    assert ("--tf32" in rebuild_command(output, sidecar)) == tf32
    # ONNX Runtime reads the option from the graph.
    assert _cuda_options(model.with_name("drn.fp32.onnx"))["use_tf32"] == str(int(tf32))


def test_engine_options_for_onnx_runtime_are_rejected(model: Path) -> None:
    with raises(GroundingError, "inapplicable_option", "--profiles", "onnxruntime"):
        build_engine(model, target="onnxruntime", profiles=1)


def test_reports_contain_the_engine_verdict(
    model: Path, planted: Path, tensorrt: list[BuildOptions], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "export.engine.engine_writer.build",
        lambda *_: BuiltEngine(b"plan", "tensorrt 11.4.0", True, _inspected("mixed"), None),
    )
    build_engine(model, target="tensorrt", data=planted, query_length=(1, 8, 12), unroll=(0,), limit=4, threads=1)
    found = json.loads(model.with_name("drn.fp16.parity.json").read_text())["engine_precision"]
    assert found["verdict"] == NOT_PROVEN
    assert "ForeignNode" in found["reason"]
    assert f"is {NOT_PROVEN}" in model.with_name("drn.fp16.passport.html").read_text()
