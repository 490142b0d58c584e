"""Test `export.build_engine`: converted graphs, accuracy checks, reports, ahead-of-time engines and invalid input."""

from __future__ import annotations

import dataclasses
import inspect
import json
import logging
import shutil
import sys
from pathlib import Path
from typing import Any

import onnx
import pytest

from calib.errors import CalibrationError
from calib.graph.onnx_graph import read_manifest
from calib.graph.precision_audit import MIN_SHARES
from calib.graph.split_model import split_graph, write_split_model
from calib.qdq_quantizer import attainable_share
from export.build.build_config import BuildRequest
from export.build.run_build import choose_target
from export.build_engine import build_engine
from runtime import Grounder, Presence
from runtime.artifacts.engine_metadata import read_sidecar
from runtime.artifacts.manifest import METADATA_KEY
from runtime.backends.tensorrt_backend import short_query_plans
from runtime.core.errors import (
    AnnotationError,
    CheckFailed,
    DeviceError,
    FeatureError,
    GroundingError,
    ModelFileError,
    OutputError,
)
from runtime.core.io.digests import sha256
from runtime.datasets.dataset import DataSet
from runtime.describe import describe
from tests.export.engine.engine_builds import EngineBuilds
from tests.forked_commands import ForkedCommand
from tests.raising import quotes, raises, records

# In 8 bits a network this small has a larger accuracy drop than a real one; one of thirty queries is three points.
LOOSE = 100.0
LENGTHS = (1, 8, 12)
# A threshold above every score: builds and checks must not apply it.
NOTHING_BELOW = Presence(1.0, 0.9, 0.9, 10, 10)


@pytest.fixture(scope="module")
def fp16(models: Path, planted: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The FP16 graph of a model with a presence threshold, next to its reports and `drn.onnx`."""
    source, graph = tmp_path_factory.mktemp("fp16") / "drn.onnx", onnx.load(models / "drn.onnx")
    manifest = dataclasses.replace(read_manifest(graph), presence=NOTHING_BELOW)
    onnx.helper.set_model_props(graph, {METADATA_KEY: manifest.to_json()})
    onnx.save(graph, source)
    return build_engine(source, precision="fp16", target="onnxruntime", data=planted, query_length=LENGTHS, threads=1)


def test_fp16_graph_has_manifest_and_presence(fp16: Path, planted: Path) -> None:
    assert fp16.name == "drn.fp16.onnx"
    manifest = Grounder.load(fp16).manifest
    assert manifest.precision == "fp16"
    assert "drn.onnx" in manifest.sources
    assert manifest.training["precision"]["multiply-adds"] == {"fp16": 1.0}
    assert manifest.presence == NOTHING_BELOW
    assert manifest.windows is not None
    data_set = DataSet(planted)
    subject = data_set.annotations("test")[0]
    assert Grounder.load(fp16).ground(data_set.video(subject.video), subject.sentence) == []


def test_build_writes_parity_and_html_reports(fp16: Path) -> None:
    source = fp16.with_name("drn.onnx")
    report = json.loads(fp16.with_name("drn.fp16.parity.json").read_text())
    assert report["broken"] == []
    assert report["model"]["sha256"] == sha256(fp16)
    assert report["reference"]["sha256"] == sha256(source)
    page = fp16.with_name("drn.fp16.passport.html").read_text()
    assert "<h2>Speed</h2>" in page
    assert "<h2>Calibration</h2>" not in page
    assert "Parity report of drn.fp16.onnx" in page
    assert "export.build_engine" in page
    assert sha256(fp16) in page


def test_split_build_pair_equals_unsplit_model(model: Path, planted: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = build_engine(model, precision="fp16", data=planted, split=True, query_length=LENGTHS, threads=1)
    assert output == model.with_name("drn.fp16.query.onnx")
    assert quotes(capsys.readouterr().out, "drn.fp16.onnx", "fp16")
    complete, pair = Grounder.load(model.with_name("drn.fp16.onnx")), Grounder.load(output)
    assert sha256(model.with_name("drn.fp16.onnx")) in pair.manifest.sources.values()
    data_set = DataSet(planted)
    for annotation in data_set.annotations("test")[:4]:
        video = data_set.video(annotation.video)
        expected = [moment.start for moment in complete.ground(video, annotation.sentence)]
        actual = [moment.start for moment in pair.ground(pair.encode(video), annotation.sentence)]
        assert actual == pytest.approx(expected, abs=0.05)


def test_bf16_graph_is_checked_on_a_cpu_and_described(model: Path, planted: Path, tensorrt: EngineBuilds) -> None:
    tensorrt.scenarios = ["names"]
    build_engine(model, precision="bf16", target="tensorrt", data=planted, limit=4, query_length=LENGTHS, unroll=(0,))
    # ONNX Runtime has no BF16 kernels, but `describe` can read the file.
    assert describe(model.with_name("drn.bf16.onnx"))["precision"] == "bf16"
    assert json.loads(model.with_name("drn.bf16.parity.json").read_text())["broken"] == []


@pytest.mark.rtx
def test_rtx_engines_are_built_ahead_of_time_with_metadata(model: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
    output = build_engine(
        model, precision="fp16", target="tensorrt-rtx", compute_capability=("8.6",), query_length=LENGTHS,
        unroll=(6, 4, 6),
    )  # fmt: skip
    assert output.name == "drn.fp16.engine"
    main = read_sidecar(output)
    assert main.manifest.precision == "fp16"
    assert main.content["compute_capabilities"] == ["8.6"]
    assert len(main.content["profiles"]) == 2
    assert set(main.content["sha256"]) == {"drn.fp16.engine", "drn.fp16.onnx"}
    shorter = {steps: output.with_name(f"drn.fp16.{steps}.engine") for steps in (4, 6)}
    assert main.content["unrolled"] == {path.name: sha256(path) for path in shorter.values()}
    for steps, path in shorter.items():
        content = read_sidecar(path).content
        assert [profile["query_length"] for profile in content["profiles"]] == [[steps] * 3] * 2
        assert content["profiles"][1]["shapes"]["query_tokens"] == [[2, steps], [8, steps], [32, steps]]
        assert "unrolled" not in content
        assert content["sha256"]["drn.fp16.onnx"] == main.content["sha256"]["drn.fp16.onnx"]
    assert short_query_plans(output, main) == [(path, read_sidecar(path)) for path in shorter.values()]


@pytest.mark.rtx
def test_split_int8_build_writes_two_engines_with_metadata(model: Path, table: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
    output = build_engine(
        model, precision="int8", target="tensorrt-rtx", compute_capability=("8.6",), query_length=LENGTHS, split=True,
        videos=16, table=table, threads=1,
    )  # fmt: skip
    assert output.name == "drn.int8.query.engine"
    query, video = read_sidecar(output), read_sidecar(model.with_name("drn.int8.video.engine"))
    assert (query.manifest.part, video.manifest.part) == ("query", "video")
    (named,) = query.manifest.video_part.items()
    assert named == ("drn.int8.video.onnx", sha256(model.with_name("drn.int8.video.onnx")))
    assert video.content["sha256"]["drn.int8.video.onnx"] == named[1]
    assert query.content["profiles"][0]["shapes"]["encoded_features"][2][0] == 16
    assert query.content["census"]["twin"]["shares"]["int8"] > 0.8
    assert describe(model.with_name("drn.int8.onnx"))["precision"] == "int8"


def test_dry_run_lists_outputs_and_writes_no_file(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    build_engine(model, precision="fp16", target="onnxruntime", dry_run=True, query_length=LENGTHS)
    assert quotes(capsys.readouterr().out, model.with_name("drn.fp16.onnx"), "several queries")
    assert [path.name for path in model.parent.iterdir()] == ["drn.onnx"]


# Modules with most of the multiply-adds.
LARGE = ("prop_fc", "fpn", "backbone_net")


def test_graph_below_int8_share_is_saved_as_rejected(model: Path, table: Path) -> None:
    with raises(CheckFailed, "precision_not_reached", "int8", "85 %", "drn.int8.rejected.onnx"):
        build_engine(model, precision="int8", table=table, target="onnxruntime", keep=LARGE)
    assert not model.with_name("drn.int8.onnx").exists()
    assert Grounder.load(model.with_name("drn.int8.rejected.onnx")).manifest.precision == "int8"


def test_network_too_narrow_for_int8_is_built_with_a_warning(
    model: Path, table: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(MIN_SHARES, "int8", 0.99)
    attainable = attainable_share(onnx.load(model))
    assert attainable < 0.99
    options: dict[str, Any] = {"precision": "int8", "table": table, "target": "onnxruntime"}
    shares = Grounder.load(build_engine(model, **options)).manifest.training["precision"]["multiply-adds"]
    assert shares["int8"] == pytest.approx(attainable, abs=0.01)
    assert records(caplog, logging.WARNING, "int8", f"{100 * shares['int8']:.1f} %")
    with raises(CheckFailed, "precision_not_reached", "int8", "drn.int8.rejected.onnx"):
        build_engine(model, **options, keep=LARGE)


def test_model_over_budget_is_saved_as_rejected(model: Path, planted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model.with_name("drn.fp16.onnx").write_text("an earlier one")
    monkeypatch.setattr("export.parity.parity_result.AccuracyBudget.boundary_p99", -1.0)
    with raises(CheckFailed, "parity_failed", "drn.fp16.rejected.onnx", "drn.onnx"):
        build_engine(model, precision="fp16", data=planted, query_length=LENGTHS, threads=1, limit=4)
    assert model.with_name("drn.fp16.onnx").read_text() == "an earlier one"
    rejected = model.with_name("drn.fp16.rejected.onnx")
    assert Grounder.load(rejected).manifest.precision == "fp16"
    page = model.with_name("drn.fp16.rejected.passport.html").read_text()
    assert 'class="verdict failed"' in page
    # The title and the lineage mark the file as rejected.
    assert page.count("rejected</em>") == 2
    assert sha256(rejected) in page
    assert not model.with_name("drn.fp16.passport.html").exists()


def test_build_request_has_the_options_of_the_command() -> None:
    parameters = inspect.signature(build_engine).parameters.values()
    options = {field.name: field.default for field in dataclasses.fields(BuildRequest) if field.name != "model"}
    assert options == {parameter.name: parameter.default for parameter in parameters if parameter.name != "model"}
    assert "--split --unroll 6 10" in BuildRequest(Path("drn.onnx"), unroll=(6, 10), split=True).command()
    assert "--unroll" not in BuildRequest(Path("drn.onnx")).command()


def test_reported_command_rebuilds_identical_file(model: Path, planted: Path, table: Path) -> None:
    output = build_engine(
        model, precision="int8", target="onnxruntime", data=planted, table=table, keep=("fcos.head.mix_fc",),
        max_drop=LOOSE, limit=4, query_length=LENGTHS, threads=1, min_speedup=0,
    )  # fmt: skip
    command = json.loads(model.with_name("drn.int8.parity.json").read_text())["command"]
    assert command.startswith("python -m export.build_engine")
    for words in (
        "--keep fcos.head.mix_fc",
        "--limit 4",
        "--query-length 1 8 12",
        f"--table {table}",
        "--min-speedup 0",
    ):
        assert words in command
    first = output.read_bytes()
    output.unlink()
    # In a process with another hash seed.
    assert ForkedCommand(command.split()).finish().returncode == 0
    assert output.read_bytes() == first


@pytest.mark.parametrize("target", ["onnxruntime", "tensorrt"])
def test_int8_parity_check_uses_graph_form_of_the_target(
    target: Any, model: Path, planted: Path, table: Path, tensorrt: EngineBuilds, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    class Enough(Exception):
        pass

    def stop(_: Any, graph: onnx.ModelProto, optimized: bool, threads: int | None) -> Any:
        seen.append((optimized, _narrow_operators(graph)))
        raise Enough

    monkeypatch.setattr("export.build.parity_check.ParityChecker._open_split", stop)
    with pytest.raises(Enough):
        build_engine(
            model, precision="int8", target=target, data=planted, table=table, max_drop=LOOSE, threads=1,
            query_length=LENGTHS,
        )  # fmt: skip
    # On a CPU ONNX Runtime has INT8 matrix products, engines have INT8 convolutions.
    assert seen == [(True, {"MatMul"})] if target == "onnxruntime" else [(False, {"Conv"})]


def _narrow_operators(graph: onnx.ModelProto) -> set[str]:
    """Return the types of operators whose two inputs come from DequantizeLinear."""
    dequantized = {node.output[0] for node in graph.graph.node if node.op_type == "DequantizeLinear"}
    return {node.op_type for node in graph.graph.node if set(node.input[:2]) <= dequantized and len(node.input) > 1}


def test_build_with_data_requires_jinja_first(model: Path, planted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with raises(DeviceError, "missing_library", "jinja2"):
        build_engine(model, precision="fp16", data=planted)
    assert not list(model.parent.glob("drn.fp16.*"))


def test_graph_of_another_checkpoint_is_not_overwritten(models: Path, tmp_path: Path) -> None:
    shutil.copy(models / "drn.pt", tmp_path)
    (tmp_path / "drn.onnx").write_text("precious")
    with raises(OutputError, "output_exists", tmp_path / "drn.onnx", "drn.pt"):
        build_engine(tmp_path / "drn.pt", precision="fp16", query_length=LENGTHS)
    assert (tmp_path / "drn.onnx").read_text() == "precious"


@pytest.mark.parametrize(
    ("options", "code", "values"),
    [
        ({"precision": "int8"}, "missing_option", ("int8", "--data", "--table")),
        ({"precision": "int8", "data": Path(), "plan": Path("plan.json")}, "missing_option", ("--plan", "--table")),
        ({"precision": "int8", "data": Path(), "calib_samples": 8}, "too_few_samples", ("--calib-samples", 8, 32)),
        ({"calib_videos": (Path("a.mp4"),)}, "inapplicable_option", ("--calib-videos", "drn.onnx")),
        ({"table": Path("t.json")}, "inapplicable_option", ("--table", "fp16")),
        ({"precision": "fp32", "keep": ("fpn",)}, "inapplicable_option", ("--keep", "fp32")),
        ({"precision": "bf16"}, "precision_unsupported", ("bf16", "--target")),
        ({"output": Path("drn.engine")}, "wrong_suffix", ("drn.engine", ".onnx")),
        ({"output": Path("drn.onnx")}, "output_is_input", ("drn.onnx",)),
        ({"batch": (4, 2, 1), "dry_run": True}, "invalid_option", ("--batch", 4, 2, 1)),
        ({"workspace": 1.0, "profiles": 1}, "inapplicable_option", ("--workspace", "--profiles", "onnxruntime")),
        ({"compute_capability": ("8.6",)}, "inapplicable_option", ("--compute-capability", "onnxruntime")),
        ({"unroll": (8,)}, "inapplicable_option", ("--unroll", "onnxruntime")),
        ({"target": "tensorrt", "unroll": (8, 13)}, "invalid_option", ("--unroll", 1, 12, 13)),
        ({"target": "tensorrt", "unroll": (6, 0)}, "invalid_option", ("--unroll", "0 6")),
    ],
)
def test_conflicting_options_are_rejected_before_the_build(
    options: dict[str, Any],
    code: str,
    values: tuple[object, ...],
    model: Path,
    tensorrt: EngineBuilds,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(model.parent)
    Path("plan.json").write_text("{}")
    with raises(GroundingError, code, *values):
        build_engine(Path("drn.onnx"), **{"target": "onnxruntime", "query_length": LENGTHS, **options})
    assert {path.name for path in model.parent.iterdir()} == {"drn.onnx", "plan.json"}
    assert tensorrt.attempts == []


def test_unusable_models_are_rejected(model: Path) -> None:
    write_split_model(*split_graph(onnx.load(model)), model)
    with raises(ModelFileError, "model_part", model.with_name("drn.query.onnx"), "query part"):
        build_engine(model.with_name("drn.query.onnx"))
    with raises(ModelFileError, "missing_file", model.with_name("absent.onnx")):
        build_engine(model.with_name("absent.onnx"))
    model.write_bytes(b"not a graph")
    with raises(ModelFileError, "not_onnx", model):
        build_engine(model)


def test_unusable_calibration_data_is_rejected(model: Path, planted: Path, table: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "precision": "int8", "target": "onnxruntime", "query_length": LENGTHS, "threads": 1, "calib_samples": 32,
    }  # fmt: skip
    with raises(CalibrationError, "unknown_module", "'nonsense'"):
        build_engine(model, data=planted, keep=("nonsense",), **options)
    with raises(AnnotationError, "missing_file", tmp_path / "nowhere"):
        build_engine(model, data=tmp_path / "nowhere", **options)
    bare = tmp_path / "bare"
    shutil.copytree(planted, bare)
    for features in (bare / "C3D_unit16_overlap0.5_merged").iterdir():
        features.unlink()
    with raises(FeatureError, "missing_features", "C3D_unit16_overlap0.5_merged"):
        build_engine(model, data=bare, **options)
    changed = onnx.load(model)
    bias = next(tensor for tensor in changed.graph.initializer if tensor.name == "prop_fc.bias")
    bias.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(bias) + 1, bias.name))
    onnx.save(changed, model)
    with raises(CalibrationError, "table_of_another_model", model):
        build_engine(model, table=table, **options)
    assert sorted(path.name for path in model.parent.glob("drn.*")) == ["drn.onnx"]


def test_table_at_its_output_path_is_used_unchanged(model: Path, table: Path) -> None:
    copy = Path(shutil.copy(table, model.with_name("drn.int8.calibration.json")))
    build_engine(model, precision="int8", target="onnxruntime", table=copy, dry_run=True)
    assert copy.read_bytes() == table.read_bytes()


@pytest.mark.parametrize(
    ("target", "capabilities", "missing", "chosen"),
    [
        ("auto", (), (), "tensorrt"),
        ("auto", (), ("tensorrt",), "onnxruntime"),
        ("auto", ("8.6",), ("tensorrt",), "tensorrt-rtx"),
        ("auto", ("8.6",), ("tensorrt", "tensorrt-rtx"), "onnxruntime"),
        ("tensorrt", (), ("tensorrt",), None),
        ("tensorrt-rtx", (), (), None),
    ],
)
def test_target_depends_on_libraries_gpu_and_capabilities(
    target: Any,
    capabilities: tuple[str, ...],
    missing: tuple[str, ...],
    chosen: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    reasons = {name: f"There is no {name} here." for name in missing}
    monkeypatch.setattr("export.build.run_build.unavailable_reason", reasons.get)
    monkeypatch.setattr("export.build.run_build.cuda_gpu", lambda: None)
    if chosen is None:
        with raises(DeviceError, "target_unavailable", *reasons.values()):
            choose_target(target, capabilities)
        return
    actual, reason = choose_target(target, capabilities)
    assert actual == chosen
    assert quotes(reason, *(text.rstrip(".") for text in [*reasons.values()][-1:] if chosen == "onnxruntime"))
