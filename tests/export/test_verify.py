"""Test `python -m export.verify`: its checks, reports and invalid input."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import onnx
import pytest

from calib.calibration_table import CalibrationTable
from calib.graph.half_precision import convert_to_half
from calib.graph.moments import with_moments
from calib.graph.onnx_graph import read_manifest
from calib.graph.opset import raise_opset
from calib.graph.split_model import split_graph, write_split_model
from calib.qdq_quantizer import insert_qdq
from export.verify import verify
from runtime import Grounder
from runtime.artifacts.manifest import METADATA_KEY
from runtime.benchmarking.report import ONE_QUERY, BenchmarkCase, Memory, ModelInfo, Report, Timing
from runtime.benchmarking.timing import Latency
from runtime.core.cpu_info import cpu
from runtime.core.errors import AnnotationError, CheckFailed, DeviceError, GroundingError, ModelFileError, OutputError
from runtime.core.io.atomic_files import write_json
from runtime.core.io.digests import sha256
from tests.export.conftest import with_changed_weights
from tests.forked_commands import ForkedCommand
from tests.parity.models import save_twin
from tests.raising import quotes, raises, records

ROOT = Path(__file__).parents[2]


def test_equal_model_passes(models: Path, planted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reference, model = models / "drn.pt", models / "drn.onnx"
    report, page = tmp_path / "report.json", tmp_path / "passport.html"
    actual = verify(reference, model, planted, split="train", output=report, html=page, threads=1)
    printed = capsys.readouterr().out
    assert quotes(printed, 95, "train", "mmaction2")
    # The full sentence is asserted only here.
    assert printed.splitlines()[-1] == "The accuracy check of drn.onnx against drn.pt passed."

    written = json.loads(report.read_text())
    assert written["format"] == "drn-parity/1"
    assert written["broken"] == []
    assert written["simulated_features"] is True
    assert written["reference"]["sha256"] == sha256(reference)
    assert written["model"]["sources"] == {"drn.pt": sha256(reference)}
    assert written["recall"]["other"]["mIoU"] == actual.other.values["mIoU"]
    assert written["recall"]["prior"]["mIoU"] == actual.prior.values["mIoU"]
    assert set(written["flips"]) == {"R@1 IoU=0.5", "R@1 IoU=0.7"}
    assert written["cpu"] == cpu()
    assert set(written["heads"]) == {"matching_logits", "boundary_distances", "iou_logits"}
    text = page.read_text()
    assert cpu()["name"] in text
    assert ", ".join(cpu()["features"] or ["features unknown"]) in text
    assert sha256(reference) in text
    assert sha256(model) in text
    assert 'class="verdict passed"' in text
    assert "100.0 % in fp32" in text
    assert "--split train --max-drop 0.2" in text


def test_next_command_runs_model(models: Path, planted: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    graph = onnx.load(models / "drn.onnx")
    *_, query = write_split_model(*split_graph(graph), tmp_path / "drn.onnx")
    onnx.save(with_moments(graph), tmp_path / "drn.moments.onnx")
    # `build-engine` converts graphs without decoding that were not split.
    for model, command in (
        (models / "drn.onnx", "export.build_engine"),
        (tmp_path / "drn.moments.onnx", "runtime.benchmark"),
        (query, "runtime.benchmark"),
    ):
        caplog.clear()
        with caplog.at_level(logging.INFO, "drn"):
            verify(models / "drn.onnx", model, planted, limit=3, threads=1)
        assert records(caplog, logging.INFO, "Next:", command), model


def test_recorded_command_reproduces_the_report(models: Path, planted: Path, tmp_path: Path) -> None:
    model, reports = models / "drn.onnx", [tmp_path / "a.json", tmp_path / "b.json"]
    command = f"python -m export.verify --reference {model} --model {model} --data {planted} --limit 3"
    command += " --protocol drn --boundary-p99 0.5"
    for report in reports:
        ended = ForkedCommand([*command.split(), "--output", str(report)]).finish()
        assert ended.returncode == 0, ended.stderr
        assert ended.stderr.splitlines()[-1].startswith("Next:  python -m ")
        command = json.loads(report.read_text())["command"]
        assert command.startswith("python -m export.verify ")
    first, second = (json.loads(report.read_text()) for report in reports)
    assert second == first


def test_model_over_budget_fails_but_gets_a_report(
    models: Path, wrong: Path, planted: Path, tmp_path: Path, run_command: Any
) -> None:
    report, page = tmp_path / "report.json", tmp_path / "passport.html"
    arguments = ("--reference", models / "drn.onnx", "--model", wrong, "--data", planted, "--split", "train")
    outcome = run_command(verify, *arguments, "--output", report, "--html", page, code=1)
    last = outcome.err.splitlines()[-1]
    assert last.startswith("error: ")
    assert quotes(last, "wrong.onnx", "drn.onnx", "R@1 IoU=0.7", "--layers")
    assert len(json.loads(report.read_text())["broken"]) == 3
    assert 'class="verdict failed"' in page.read_text()


def test_larger_budget_accepts_the_model(models: Path, wrong: Path, planted: Path) -> None:
    with raises(CheckFailed, "parity_failed", "wrong.onnx", "drn.onnx", "mIoU"):
        verify(models / "drn.onnx", wrong, planted, boundary_p99=100, threads=1)
    verify(models / "drn.onnx", wrong, planted, boundary_p99=100, max_drop=100, threads=1)


def test_models_that_cannot_be_compared_are_rejected(models: Path, planted: Path, tmp_path: Path) -> None:
    good = models / "drn.onnx"
    truncated, foreign, narrow = (tmp_path / name for name in ("truncated.onnx", "foreign.onnx", "narrow.onnx"))
    truncated.write_bytes(good.read_bytes()[:5000])
    model = onnx.load(good)
    about = read_manifest(model)
    other = dataclasses.replace(about, features=dataclasses.replace(about.features, dim=500))
    onnx.helper.set_model_props(model, {METADATA_KEY: other.to_json()})
    onnx.save(model, narrow)
    del model.metadata_props[:]
    onnx.save(model, foreign)
    empty = tmp_path / "empty"
    shutil.copytree(planted, empty)
    (empty / "Charades_sta_test.txt").write_text("")
    twice = tmp_path / "x"
    refused: list[tuple[dict[str, Any], type[GroundingError], str, tuple[object, ...]]] = [
        ({"model": models / "gone.onnx"}, ModelFileError, "missing_file", (models / "gone.onnx",)),
        ({"model": truncated}, ModelFileError, "not_onnx", (truncated,)),
        ({"model": foreign}, ModelFileError, "missing_manifest", (foreign,)),
        ({"model": narrow}, ModelFileError, "models_differ", (32, 500)),
        ({"model": models / "history.jsonl"}, ModelFileError, "wrong_suffix", (models / "history.jsonl",)),
        ({"data": empty}, AnnotationError, "empty_file", (empty / "Charades_sta_test.txt",)),
        ({"split": "val"}, AnnotationError, "missing_split", ("'val'",)),
        ({"limit": 0}, GroundingError, "invalid_option", ("--limit", 0)),
        ({"batch_size": 0}, GroundingError, "invalid_option", ("--batch-size", 0)),
        ({"max_drop": math.nan}, GroundingError, "invalid_option", ("--max-drop", math.nan)),
        ({"boundary_p99": -1.0}, GroundingError, "invalid_option", ("--boundary-p99", -1.0)),
        ({"output": tmp_path}, OutputError, "output_is_directory", (tmp_path,)),
        ({"html": good}, OutputError, "output_is_input", (good, "--html")),
        ({"output": twice, "html": twice}, OutputError, "output_is_input", (twice, "--html")),
        ({"reference": models / "drn.pt", "layers": True}, ModelFileError, "wrong_suffix", ("--layers", "drn.pt")),
    ]
    before = sha256(good)
    for options, kind, code, values in refused:
        arguments = {"reference": good, "model": good, "data": planted, "threads": 1, **options}
        with raises(kind, code, *values) as caught:
            verify(**arguments)
        assert str(caught.value).endswith(".")
    assert sha256(good) == before
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("precision", ["bf16", "int8"])
def test_converted_graph_of_any_precision_is_compared_on_cpu(
    models: Path, planted: Path, table: Path, tmp_path: Path, precision: str, caplog: pytest.LogCaptureFixture
) -> None:
    source = models / "drn.onnx"
    graph = onnx.load(source)
    if precision == "int8":
        converted = insert_qdq(graph, CalibrationTable.load(table))
    else:
        converted = convert_to_half(raise_opset(graph, 22), "bf16")
    path = save_twin(converted, source, tmp_path / "converted.onnx", precision)
    caplog.set_level("INFO", "drn")
    actual = verify(source, path, planted, limit=4, max_drop=100, threads=1)
    assert 0 < actual.heads["matching_logits"].p99 < 1
    # In INT8 one of four queries may change its best moment.
    assert actual.overlap.mean > (0.4 if precision == "int8" else 0.8)
    assert len(records(caplog, logging.INFO, code="rounded_to_bf16")) == (precision == "bf16")
    assert not records(caplog, logging.INFO, code="without_fusions")
    if precision == "int8":
        verify(source, path, planted, limit=4, max_drop=100, threads=1, exact=True)
        assert records(caplog, logging.INFO, code="without_fusions")


def test_verify_of_graphs_does_not_import_torch(models: Path, planted: Path) -> None:
    code = (
        "import sys; from export.verify import verify; "
        "verify(sys.argv[1], sys.argv[1], sys.argv[2], limit=2); print('torch' in sys.modules)"
    )
    arguments = [sys.executable, "-c", code, models / "drn.onnx", planted]
    result = subprocess.run(arguments, capture_output=True, text=True, cwd=ROOT, check=True)
    assert result.stdout.splitlines()[-1] == "False"


def latency_report(path: Path, model: Path) -> Path:
    """Write a benchmark report of a model with a latency of 4 ms."""
    latency = Latency.from_samples([0.004] * 500)
    timing = Timing(BenchmarkCase(ONE_QUERY, "known video", "end to end"), model.name, latency)
    about = ModelInfo(model.name, sha256(model), {}, "fp32", "whole", "cpu", 0.1, 0.2, 1.0, Memory(1))
    hardware = {"cpu": "A CPU", "cores": 2, "gpu": None, "gpu_driver": None}
    settings = {"samples": 500, "batch": 32, "device": "auto", "threads": 1}
    values = ("2026-11-23", "command", hardware, {"numpy": "2"}, settings, {"note": "", "made_up": True})
    write_json(path, Report(*values, [about], [], [timing], [], 1, [], [], interrupted=False).to_dict())
    return path


def test_html_report_includes_measured_latency(models: Path, planted: Path, tmp_path: Path) -> None:
    model, page = models / "drn.onnx", tmp_path / "p.html"
    report = latency_report(tmp_path / "speed.json", model)
    verify(model, model, planted, limit=2, html=page, latency=report, threads=1)
    text = page.read_text()
    assert quotes(text, "A CPU, 2 cores, 1 thread, numpy 2, 2026-11-23", "end to end: known video", "4.00", "250.0")


def test_latency_of_another_model_is_rejected_first(
    models: Path, wrong: Path, planted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Grounder, "load", lambda *_: pytest.fail("a model was opened"))
    model, page = models / "drn.onnx", tmp_path / "p.html"
    report = latency_report(tmp_path / "speed.json", wrong)
    written = report.read_bytes()
    with raises(ModelFileError, "report_of_another_model", "wrong.onnx", sha256(wrong)[:12]):
        verify(model, model, planted, html=page, latency=report)
    with raises(GroundingError, "missing_option", "--latency", "--html"):
        verify(model, wrong, planted, latency=report)
    with raises(OutputError, "output_is_input", report):
        verify(model, wrong, planted, latency=report, html=report)
    with raises(ModelFileError, "missing_file", tmp_path / "none.json"):
        verify(model, wrong, planted, latency=tmp_path / "none.json", html=page)
    with raises(ModelFileError, "missing_file", tmp_path / "none.onnx"):
        verify(model, tmp_path / "none.onnx", planted, latency=report, html=page)
    assert report.read_bytes() == written
    assert not page.exists()


@pytest.mark.parametrize(
    ("library", "options"), [("jinja2", {"html": Path("a.html")}), ("polygraphy", {"layers": True})]
)
def test_missing_library_is_reported_before_models_are_opened(
    models: Path, planted: Path, monkeypatch: pytest.MonkeyPatch, library: str, options: dict[str, Any]
) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    monkeypatch.setattr(Grounder, "load", lambda *_: pytest.fail("a model was opened"))
    with raises(DeviceError, "missing_library", library, "'.[engine]'"):
        verify(models / "drn.onnx", models / "drn.onnx", planted, **options)


def test_verify_layers_names_wrong_module_in_reports(
    models: Path, planted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("polygraphy", reason="layers are compared by Polygraphy (pip install '.[engine]')")
    graph, other = onnx.load(models / "drn.onnx"), tmp_path / "other.onnx"
    onnx.save(with_changed_weights(graph, lambda values: values * 1.5, "fpn.layer_blocks.1.weight"), other)
    options = {"layers": True, "max_drop": 100, "boundary_p99": 100, "limit": 4, "threads": 1}
    report, page = tmp_path / "r.json", tmp_path / "p.html"
    verify(models / "drn.onnx", other, planted, output=report, html=page, **options)
    assert quotes(capsys.readouterr().out, "fpn.layer_blocks.1")
    assert json.loads(report.read_text())["layers"]["first_wrong"] == "fpn.layer_blocks.1"
    assert quotes(page.read_text(), "fpn.layer_blocks.1")
