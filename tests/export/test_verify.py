"""Test `python -m export.verify`, its reports, and the comparison of layers."""

from __future__ import annotations

import dataclasses
import html.parser
import json
import logging
import math
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from calib.calibrate import measure_table
from calib.calibration_set import sample_calibration_set
from calib.graph.conv_to_matmul import convs_to_matmul
from calib.graph.onnx_graph import load_fp32_graph, read_manifest
from calib.qdq_quantizer import QuantizationPolicy, insert_qdq
from export.parity.compare import compare
from export.parity.compare_layers import compare_layers
from export.parity.html_report import render_html_report
from export.parity.model_file import ModelFile, provenance
from export.parity.parity_report import ParityReport
from export.parity.parity_result import AccuracyBudget, Disagreement, PlanCheck, violations
from export.parity.parity_tables import Table
from export.verify import verify
from runtime import Grounder
from runtime.artifacts.engine_layers import NOT_PROVEN, PROVEN
from runtime.artifacts.manifest import METADATA_KEY, Manifest
from runtime.benchmarking.report import ONE_QUERY, BenchmarkCase, Memory, ModelInfo, Report, Timing
from runtime.benchmarking.timing import Latency
from runtime.core.cpu_info import cpu
from runtime.core.errors import AnnotationError, CheckFailed, DeviceError, GroundingError, ModelFileError, OutputError
from runtime.core.io.atomic_files import write_json
from runtime.core.io.digests import sha256
from runtime.core.moments import Moment
from runtime.datasets.dataset import DataSet
from runtime.grounding.evaluation import batches_of
from tests.parity.models import save_twin
from tests.raising import quotes, raises, records

ROOT = Path(__file__).parents[2]


def changed(source: Path, path: Path, change: Callable[[np.ndarray], np.ndarray], *weights: str) -> Path:
    """Write a copy of an ONNX file with some weights changed."""
    model = onnx.load(source)
    for tensor in model.graph.initializer:
        if tensor.name in weights:
            values = change(onnx.numpy_helper.to_array(tensor)).astype(np.float32)
            tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))
    onnx.save(model, path)
    return path


@pytest.fixture(scope="module")
def wrong(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose IoU head has the opposite sign."""
    path = tmp_path_factory.mktemp("wrong") / "wrong.onnx"
    return changed(models / "drn.onnx", path, np.negative, "fcos.head.iou_scores.1.weight", "fcos.head.scales")


@pytest.fixture
def judged(models: Path, wrong: Path, planted: Path) -> ParityReport:
    """The parity report of that model."""
    data_set = DataSet(planted)
    sides = [Grounder.load(path, "cpu", 1) for path in (models / "drn.onnx", wrong)]
    parity = compare(*sides, data_set, data_set.annotations("test"))
    files = [ModelFile.of(path, side.manifest) for path, side in zip((models / "drn.onnx", wrong), sides, strict=True)]
    budget = AccuracyBudget()
    return ParityReport(parity, *files, budget, violations(parity, budget), "test", "python -m export.verify")


# The command


def test_equal_model_passes_and_writes_reports(
    models: Path, planted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    reference, model = models / "drn.pt", models / "drn.onnx"
    report, page = tmp_path / "report.json", tmp_path / "passport.html"
    found = verify(reference, model, planted, split="train", output=report, html=page, threads=1)
    said = capsys.readouterr().out
    assert quotes(said, 95, "train", "mmaction2")
    # The full sentence is asserted only here.
    assert said.splitlines()[-1] == "The accuracy check of drn.onnx against drn.pt passed."

    written = json.loads(report.read_text())
    assert written["format"] == "drn-parity/1"
    assert written["broken"] == []
    assert written["simulated_features"] is True
    assert written["reference"]["sha256"] == sha256(reference)
    assert written["model"]["sources"] == {"drn.pt": sha256(reference)}
    assert written["recall"]["other"]["mIoU"] == found.other.values["mIoU"]
    assert written["recall"]["prior"]["mIoU"] == found.prior.values["mIoU"]
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


def test_recorded_command_reproduces_the_report(models: Path, planted: Path, tmp_path: Path) -> None:
    arguments = ("--reference", models / "drn.onnx", "--model", models / "drn.onnx", "--data", planted, "--limit", 3)
    more = ("--protocol", "drn", "--boundary-p99", 0.5, "--output", tmp_path / "a.json")
    words = [sys.executable, "-m", "export.verify", *map(str, (*arguments, *more))]
    first = subprocess.run(words, capture_output=True, text=True, cwd=ROOT)
    assert first.returncode == 0, first.stderr
    assert first.stderr.splitlines()[-1].startswith("Next:  python -m ")
    written = json.loads((tmp_path / "a.json").read_text())
    again = written["command"].split()
    assert again[:3] == ["python", "-m", "export.verify"]
    # This process has torch loaded, whose version the report would contain.
    words = [sys.executable, *again[1:], "--output", str(tmp_path / "b.json")]
    assert subprocess.run(words, capture_output=True, cwd=ROOT).returncode == 0
    assert json.loads((tmp_path / "b.json").read_text()) == written


def test_model_over_budget_fails_but_gets_a_report(
    models: Path, wrong: Path, planted: Path, tmp_path: Path, run_command: Callable[..., Any]
) -> None:
    report, page = tmp_path / "report.json", tmp_path / "passport.html"
    arguments = ("--reference", models / "drn.onnx", "--model", wrong, "--data", planted, "--split", "train")
    outcome = run_command(verify, *arguments, "--output", report, "--html", page)
    assert outcome.code == 1
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
    about = Manifest.from_json(model.metadata_props[0].value)
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
        assert "\n" not in str(caught.value)
        assert str(caught.value).endswith(".")
    assert sha256(good) == before
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("precision", ["fp16", "bf16", "int8"])
def test_converted_graph_of_any_precision_is_compared_on_cpu(
    models: Path, planted: Path, tmp_path: Path, precision: str, caplog: pytest.LogCaptureFixture
) -> None:
    from calib.calibrate import measure_table
    from calib.calibration_set import sample_calibration_set
    from calib.graph.half_precision import convert_to_half
    from calib.graph.opset import raise_opset
    from calib.qdq_quantizer import insert_qdq

    source = models / "drn.onnx"
    graph = onnx.load(source)
    if precision == "int8":
        manifest = Grounder.load(source, "cpu", 1).manifest
        drawn = sample_calibration_set(DataSet(planted), manifest, samples=32, held_out=32)
        twin = insert_qdq(graph, measure_table(graph, drawn, "minmax"))
    else:
        twin = convert_to_half(raise_opset(graph, 22) if precision == "bf16" else graph, precision)
    path = save_twin(twin, source, tmp_path / "twin.onnx", precision)
    caplog.set_level("INFO", "drn")
    found = verify(source, path, planted, limit=4, max_drop=100, threads=1)
    assert found.heads["matching_logits"].max > 0
    # In INT8 one of four queries may change its best moment.
    assert found.overlap.mean > (0.4 if precision == "int8" else 0.8)
    assert found.heads["matching_logits"].p99 < 1
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


# The HTML report


class Page(html.parser.HTMLParser):
    """Collects tags, attributes and tags that are not closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "rect", "line"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_html_report_has_no_external_resources(judged: ParityReport) -> None:
    text = render_html_report(judged, commands=("python -m export.verify",))
    page = Page(text)
    assert page.open == []
    tags = {tag for tag, _ in page.tags}
    assert not tags & {"script", "link", "img", "iframe", "object", "base"}
    attributes = {name for _, values in page.tags for name in values}
    assert not attributes & {"src", "href", "srcset", "action", "data"}
    assert not re.search(r"https?:|url\(|@import", text)
    assert ("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}) in page.tags
    assert "prefers-color-scheme: dark" in text


def test_html_report_timelines_match_the_moments(judged: ParityReport) -> None:
    row = Disagreement(
        7, "VID", "person opens", 20.0, (5.0, 10.0), Moment(4, 9, 0.9), None, overlap=0.0, reference_iou=2 / 3,
        other_iou=0.0, shift=20.0,
    )  # fmt: skip
    calm = dataclasses.replace(row, query="person sits", shift=0.01)
    parity = dataclasses.replace(judged.parity, worst=(row, calm))
    page = Page(render_html_report(dataclasses.replace(judged, parity=parity)))
    bars = {values["class"]: values for tag, values in page.tags if tag == "rect"}
    assert (bars["truth"]["x"], bars["truth"]["width"]) == ("25.00%", "25.00%")
    assert (bars["reference"]["x"], bars["reference"]["width"]) == ("20.00%", "25.00%")
    assert "other" not in bars
    labels = [values["aria-label"] for tag, values in page.tags if "aria-label" in values]
    assert labels == ["truth: 5.0–10.0 s of 20.0 s", "drn.onnx: 4.0–9.0 s of 20.0 s", "wrong.onnx: no moment of 20.0 s"]


@pytest.mark.parametrize(
    ("duration", "ticks"), [(20.0, "0 5 10 15 20"), (3.7, "0 0.5 1 1.5 2 2.5 3 3.5"), (30_000.0, "0 30000")]
)
def test_html_report_timelines_have_an_axis(judged: ParityReport, duration: float, ticks: str) -> None:
    row = dataclasses.replace(judged.parity.worst[0], duration=duration, shift=1.0)
    parity = dataclasses.replace(judged.parity, worst=(row,))
    text = render_html_report(dataclasses.replace(judged, parity=parity))
    assert re.findall(r"<text [^>]*>([^<]*) s<", text) == ticks.split()
    positions = [float(values["x1"].rstrip("%")) for tag, values in Page(text).tags if tag == "line"]
    assert positions == pytest.approx([100 * float(tick) / duration for tick in ticks.split()])


def test_html_report_marks_only_a_rejected_model(judged: ParityReport) -> None:
    assert judged.violations
    failed = render_html_report(judged)
    assert re.findall(r'<li class="rejected"><b>([^<]*)', failed) == ["wrong.onnx"]
    passed = render_html_report(dataclasses.replace(judged, violations=[], budget=AccuracyBudget(100)))
    assert 'class="rejected"' not in passed
    assert 'class="verdict passed"' in passed


def test_html_report_shows_drops_that_are_not_proven(judged: ParityReport, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ParityReport, "unresolved", ["mIoU drops by 1.25 points"])
    text = render_html_report(dataclasses.replace(judged, violations=[]))
    assert 'class="verdict unproven"' in text
    assert "mIoU drops by 1.25 points" in text


def test_reports_have_date_machine_and_versions(judged: ParityReport) -> None:
    report = dataclasses.replace(judged, date="2026-01-31", versions={"onnxruntime": "1.99"})
    assert quotes(render_html_report(report), "2026-01-31", cpu()["name"], "onnxruntime 1.99")
    content = json.loads(json.dumps(report.to_dict()))
    assert (content["date"], content["cpu"], content["versions"]) == ("2026-01-31", cpu(), {"onnxruntime": "1.99"})


def test_html_report_without_jinja_is_rejected_first(
    models: Path, planted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "jinja2", None)
    monkeypatch.setattr(Grounder, "load", lambda *_: pytest.fail("a model was opened"))
    with raises(DeviceError, "missing_library", "jinja2", "'.[engine]'"):
        verify(models / "drn.onnx", models / "drn.onnx", planted, html=tmp_path / "report.html")


def test_html_report_escapes_query_text(judged: ParityReport) -> None:
    hostile = "<script>alert('\"&')</script>"
    worst = tuple(dataclasses.replace(row, query=hostile, video=hostile) for row in judged.parity.worst)
    assert worst
    named = dataclasses.replace(judged.model, path=Path(f"{hostile.replace('/', '')}.onnx"))
    parity = dataclasses.replace(judged.parity, worst=worst)
    report = dataclasses.replace(judged, parity=parity, model=named, violations=[hostile])
    text = render_html_report(report, commands=(hostile,))
    page = Page(text)
    assert page.open == []
    assert "script" not in {tag for tag, _ in page.tags}
    assert "&lt;script&gt;" in text


def test_html_report_includes_latency_and_layer_stats(judged: ParityReport) -> None:
    without = render_html_report(judged)
    note = "Of its multiply-adds 95.0 % in int8."
    precision = Table("Precision", ("module", "int8"), [("prop_fc", "536.87")], [note], folded=True)
    page = render_html_report(judged, precision, Table("Latency", ("", "p50 ms"), [("batch 1", "0.42")]))
    assert quotes(page, "95.0 % in int8", "536.87", "0.42")
    # Latency takes the place of the section about speed, and both it and the data types have a table.
    assert page.count("<h2") == without.count("<h2")
    assert ("Latency</h2>" in page, "Latency</h2>" in without) == (True, False)
    assert page.count("<table") == without.count("<table") + 2


def test_plan_verdicts_are_in_the_terminal_and_on_the_page(judged: ParityReport) -> None:
    checks = (PlanCheck("drn.8.engine", 8, 3, 0), PlanCheck("drn.engine", 12, 1, 4))
    report = dataclasses.replace(judged, parity=dataclasses.replace(judged.parity, plans=checks))
    (table,) = [table for table in report.tables() if table.rows and table.rows[0][0] == "drn.8.engine"]
    assert [row[4] for row in table.rows] == [NOT_PROVEN, PROVEN]
    for row in table.rows:
        assert all(cell in report.text() for cell in row)
        assert all(f">{html.escape(cell)}<" in render_html_report(report) for cell in row)


def latency_report(path: Path, model: Path) -> Path:
    """Write a benchmark report of a model with a latency of 4 ms."""
    latency = Latency.from_samples([0.004] * 500)
    timing = Timing(BenchmarkCase(ONE_QUERY, "known video", "end to end"), model.name, latency)
    about = ModelInfo(model.name, sha256(model), {}, "fp32", "whole", "cpu", 0.1, 0.2, 1.0, Memory(1))
    hardware = {"cpu": "A CPU", "cores": 2, "gpu": None, "gpu_driver": None}
    settings = {"samples": 500, "batch": 32, "device": "auto", "threads": 1}
    told = ("2026-11-23", "command", hardware, {"numpy": "2"}, settings, {"told": "", "made_up": True})
    write_json(path, Report(*told, [about], [], [timing], [], 1, [], [], interrupted=False).to_dict())
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


def test_provenance_is_decided_by_hashes(judged: ParityReport) -> None:
    reference, other = judged.reference, judged.model
    known, said = provenance(reference, other)
    assert known
    assert quotes(said, "drn.pt")
    strange = dataclasses.replace(other.manifest, sources={"drn.pt": "1" * 64})
    known, said = provenance(reference, dataclasses.replace(other, manifest=strange))
    assert not known
    assert quotes(said, "wrong.onnx", "drn.onnx")
    made = dataclasses.replace(other.manifest, sources={"some.onnx": reference.sha256})
    known, said = provenance(reference, dataclasses.replace(other, manifest=made))
    assert known
    assert quotes(said, "wrong.onnx", "drn.onnx")
    assert provenance(reference, reference)[0]


# Comparison of layers


@pytest.fixture
def asked(models: Path, planted: Path) -> list[Any]:
    pytest.importorskip("polygraphy", reason="layers are compared by Polygraphy (pip install '.[engine]')")
    data_set = DataSet(planted)
    grounder = Grounder.load(models / "drn.onnx", "cpu", 1)
    return [batch for _, batch in batches_of(grounder, data_set, data_set.annotations("test")[:4], 2)]


def test_compare_layers_with_itself_finds_no_difference(models: Path, asked: list[Any]) -> None:
    found = compare_layers(models / "drn.onnx", models / "drn.onnx", asked)
    assert {module.worst.relative for module in found.modules} == {0}
    assert (found.first_wrong, found.unmatched, found.queries) == (None, 0, 4)
    assert quotes(found.sentence(), "1e-04", "0.0e+00")
    names = [module.module for module in found.modules]
    assert names.index("query_encoder.biLSTM") < names.index("qInput.0") < names.index("backbone_net.layers.0")
    assert {"prop_fc", "fpn.inner_blocks.1", "fcos.head.mix_fc"} < set(names)


def test_int8_graph_is_compared_without_channel_scales(
    models: Path, planted: Path, asked: list[Any], tmp_path: Path
) -> None:
    source = load_fp32_graph(models / "drn.onnx")
    drawn = sample_calibration_set(DataSet(planted), read_manifest(source), samples=48, held_out=16)
    table = measure_table(source, drawn, "minmax", threads=1)
    gains = [exponent for row in table.gains.values() for exponent in row]
    assert any(gains)
    onnx.save(convs_to_matmul(insert_qdq(source, table, QuantizationPolicy(stored=()))), tmp_path / "drn.int8.onnx")
    found = compare_layers(models / "drn.onnx", tmp_path / "drn.int8.onnx", asked)
    errors = {module.module: module.worst.relative for module in found.modules}
    # Gates contain the channel scales and are not quantized.
    assert max(errors[f"qInput.{level}"] for level in range(3)) < 1e-6
    assert all(map(math.isfinite, errors.values()))
    assert max(errors.values()) > 1e-4


@pytest.mark.parametrize(
    ("weight", "module", "untouched"),
    [
        ("fpn.inner_blocks.1.weight", "fpn.inner_blocks.1", ["backbone_net.layers.2", "fpn.inner_blocks.0"]),
        ("query_encoder.biLSTM.0.backwards.W", "query_encoder.biLSTM", ["prop_fc", "position_transform"]),
        ("fcos.head.mix_fc.weight", "fcos.head.mix_fc", ["fpn.layer_blocks.0"]),
    ],
)
def test_compare_layers_names_first_wrong_module(
    models: Path, asked: list[Any], tmp_path: Path, weight: str, module: str, untouched: list[str]
) -> None:
    other = changed(models / "drn.onnx", tmp_path / "other.onnx", lambda values: values * 1.01, weight)
    seen: list[int] = []
    found = compare_layers(models / "drn.onnx", other, asked, on_progress=seen.append)
    assert found.first_wrong is not None
    assert found.first_wrong[0] == module
    assert quotes(found.sentence(), module, found.first_wrong[1].tensor)
    right = {row.module for row in found.modules if row.worst.relative == 0}
    assert set(untouched) <= right
    assert seen == [1, 1]
    assert found.to_dict()["first_wrong"] == module


def test_layer_tolerance_depends_on_precision_or_option(models: Path, asked: list[Any], tmp_path: Path) -> None:
    other = changed(models / "drn.onnx", tmp_path / "o.onnx", lambda values: values * 1.01, "fcos.head.mix_fc.weight")
    model = onnx.load(other)
    about = Manifest.from_json(model.metadata_props[0].value)
    onnx.helper.set_model_props(model, {METADATA_KEY: dataclasses.replace(about, precision="int8").to_json()})
    onnx.save(model, other)
    assert compare_layers(models / "drn.onnx", other, asked[:1]).first_wrong is None
    assert compare_layers(models / "drn.onnx", other, asked[:1], tolerance=1e-3).first_wrong is not None


def test_overflow_is_wrong_at_any_tolerance(models: Path, asked: list[Any], tmp_path: Path) -> None:
    other = changed(models / "drn.onnx", tmp_path / "o.onnx", lambda values: values * np.inf, "prop_fc.bias")
    found = compare_layers(models / "drn.onnx", other, asked, tolerance=100)
    assert found.first_wrong is not None
    assert found.first_wrong[0] == "prop_fc"
    json.dumps(found.to_dict(), allow_nan=False)


def test_tensors_missing_in_other_model_are_counted(models: Path, asked: list[Any], tmp_path: Path) -> None:
    model = onnx.load(models / "drn.onnx")
    renamed = next(node for node in model.graph.node if node.name == "fpn.inner_blocks.0/Conv")
    for node in model.graph.node:
        node.input[:] = ["fused" if name == renamed.output[0] else name for name in node.input]
    renamed.output[0] = "fused"
    onnx.save(model, tmp_path / "fused.onnx")
    found = compare_layers(models / "drn.onnx", tmp_path / "fused.onnx", asked)
    assert (found.unmatched, found.first_wrong) == (1, None)


def test_verify_layers_names_wrong_module_in_reports(
    models: Path, planted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], asked: list[Any]
) -> None:
    other = changed(models / "drn.onnx", tmp_path / "o.onnx", lambda values: values * 1.5, "fpn.layer_blocks.1.weight")
    options = {"layers": True, "max_drop": 100, "boundary_p99": 100, "limit": 4, "threads": 1}
    report, page = tmp_path / "r.json", tmp_path / "p.html"
    verify(models / "drn.onnx", other, planted, output=report, html=page, **options)
    assert quotes(capsys.readouterr().out, "fpn.layer_blocks.1")
    assert json.loads(report.read_text())["layers"]["first_wrong"] == "fpn.layer_blocks.1"
    assert quotes(page.read_text(), "fpn.layer_blocks.1")


def test_layers_option_without_polygraphy_is_rejected_first(
    models: Path, planted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "polygraphy", None)
    monkeypatch.setattr(Grounder, "load", lambda *_: pytest.fail("a model was opened"))
    with raises(DeviceError, "missing_library", "polygraphy", "'.[engine]'"):
        verify(models / "drn.onnx", models / "drn.onnx", planted, layers=True)
