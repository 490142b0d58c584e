"""Test `export.parity.html_report`, and the text and JSON of the same report."""

from __future__ import annotations

import dataclasses
import html.parser
import json
import re
from pathlib import Path

import pytest

from export.parity.compare import compare
from export.parity.html_report import render_html_report
from export.parity.model_file import ModelFile, provenance
from export.parity.parity_report import ParityReport
from export.parity.parity_result import AccuracyBudget, Disagreement, PlanCheck, violations
from export.parity.parity_tables import Table
from runtime import Grounder
from runtime.artifacts.engine_layers import NOT_PROVEN, PROVEN
from runtime.core.cpu_info import cpu
from runtime.core.moments import Moment
from runtime.datasets.dataset import DataSet
from tests.raising import quotes


@pytest.fixture(scope="module")
def report(models: Path, wrong: Path, planted: Path) -> ParityReport:
    """The parity report of a model with another IoU head."""
    data_set = DataSet(planted)
    paths = (models / "drn.onnx", wrong)
    sides = [Grounder.load(path, "cpu", 1) for path in paths]
    parity = compare(*sides, data_set, data_set.annotations("test"))
    files = [ModelFile.of(path, side.manifest) for path, side in zip(paths, sides, strict=True)]
    budget = AccuracyBudget()
    return ParityReport(parity, *files, budget, violations(parity, budget), "test", "python -m export.verify")


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


def test_html_report_has_no_external_resources(report: ParityReport) -> None:
    text = render_html_report(report, commands=("python -m export.verify",))
    page = Page(text)
    assert page.open == []
    tags = {tag for tag, _ in page.tags}
    assert not tags & {"script", "link", "img", "iframe", "object", "base"}
    attributes = {name for _, values in page.tags for name in values}
    assert not attributes & {"src", "href", "srcset", "action", "data"}
    assert not re.search(r"https?:|url\(|@import", text)
    assert ("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}) in page.tags
    assert "prefers-color-scheme: dark" in text


def test_html_report_timelines_match_the_moments(report: ParityReport) -> None:
    row = Disagreement(
        7, "VID", "person opens", 20.0, (5.0, 10.0), Moment(4, 9, 0.9), None, overlap=0.0, reference_iou=2 / 3,
        other_iou=0.0, shift=20.0,
    )  # fmt: skip
    calm = dataclasses.replace(row, query="person sits", shift=0.01)
    parity = dataclasses.replace(report.parity, worst=(row, calm))
    page = Page(render_html_report(dataclasses.replace(report, parity=parity)))
    bars = {values["class"]: values for tag, values in page.tags if tag == "rect"}
    assert (bars["truth"]["x"], bars["truth"]["width"]) == ("25.00%", "25.00%")
    assert (bars["reference"]["x"], bars["reference"]["width"]) == ("20.00%", "25.00%")
    assert "other" not in bars
    labels = [values["aria-label"] for tag, values in page.tags if "aria-label" in values]
    assert labels == ["truth: 5.0–10.0 s of 20.0 s", "drn.onnx: 4.0–9.0 s of 20.0 s", "wrong.onnx: no moment of 20.0 s"]


@pytest.mark.parametrize(
    ("duration", "ticks"), [(20.0, "0 5 10 15 20"), (3.7, "0 0.5 1 1.5 2 2.5 3 3.5"), (30_000.0, "0 30000")]
)
def test_html_report_timelines_have_an_axis(report: ParityReport, duration: float, ticks: str) -> None:
    row = dataclasses.replace(report.parity.worst[0], duration=duration, shift=1.0)
    parity = dataclasses.replace(report.parity, worst=(row,))
    text = render_html_report(dataclasses.replace(report, parity=parity))
    assert re.findall(r"<text [^>]*>([^<]*) s<", text) == ticks.split()
    positions = [float(values["x1"].rstrip("%")) for tag, values in Page(text).tags if tag == "line"]
    assert positions == pytest.approx([100 * float(tick) / duration for tick in ticks.split()])


def test_html_report_marks_only_a_rejected_model(report: ParityReport) -> None:
    assert report.violations
    failed = render_html_report(report)
    assert re.findall(r'<li class="rejected"><b>([^<]*)', failed) == ["wrong.onnx"]
    passed = render_html_report(dataclasses.replace(report, violations=[], budget=AccuracyBudget(100)))
    assert 'class="rejected"' not in passed
    assert 'class="verdict passed"' in passed


def test_html_report_shows_drops_that_are_not_proven(report: ParityReport, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ParityReport, "unresolved", ["mIoU drops by 1.25 points"])
    text = render_html_report(dataclasses.replace(report, violations=[]))
    assert 'class="verdict unproven"' in text
    assert "mIoU drops by 1.25 points" in text


def test_reports_have_date_machine_and_versions(report: ParityReport) -> None:
    dated = dataclasses.replace(report, date="2026-01-31", versions={"onnxruntime": "1.99"})
    assert quotes(render_html_report(dated), "2026-01-31", cpu()["name"], "onnxruntime 1.99")
    content = json.loads(json.dumps(dated.to_dict()))
    assert (content["date"], content["cpu"], content["versions"]) == ("2026-01-31", cpu(), {"onnxruntime": "1.99"})


def test_html_report_escapes_query_text(report: ParityReport) -> None:
    hostile = "<script>alert('\"&')</script>"
    worst = tuple(dataclasses.replace(row, query=hostile, video=hostile) for row in report.parity.worst)
    assert worst
    named = dataclasses.replace(report.model, path=Path(f"{hostile.replace('/', '')}.onnx"))
    parity = dataclasses.replace(report.parity, worst=worst)
    report = dataclasses.replace(report, parity=parity, model=named, violations=[hostile])
    text = render_html_report(report, commands=(hostile,))
    page = Page(text)
    assert page.open == []
    assert "script" not in {tag for tag, _ in page.tags}
    assert "&lt;script&gt;" in text


def test_html_report_includes_latency_and_layer_stats(report: ParityReport) -> None:
    without = render_html_report(report)
    note = "Of its multiply-adds 95.0 % in int8."
    precision = Table("Precision", ("module", "int8"), [("prop_fc", "536.87")], [note], folded=True)
    page = render_html_report(report, precision, Table("Latency", ("", "p50 ms"), [("batch 1", "0.42")]))
    assert quotes(page, "95.0 % in int8", "536.87", "0.42")
    # Latency takes the place of the section about speed, and both it and the data types have a table.
    assert page.count("<h2") == without.count("<h2")
    assert ("Latency</h2>" in page, "Latency</h2>" in without) == (True, False)
    assert page.count("<table") == without.count("<table") + 2


def test_plan_verdicts_are_in_the_terminal_and_on_the_page(report: ParityReport) -> None:
    checks = (PlanCheck("drn.8.engine", 8, 3, 0), PlanCheck("drn.engine", 12, 1, 4))
    report = dataclasses.replace(report, parity=dataclasses.replace(report.parity, plans=checks))
    (table,) = [table for table in report.tables() if table.rows and table.rows[0][0] == "drn.8.engine"]
    assert [row[4] for row in table.rows] == [NOT_PROVEN, PROVEN]
    for row in table.rows:
        assert all(cell in report.text() for cell in row)
        assert all(f">{html.escape(cell)}<" in render_html_report(report) for cell in row)


def test_provenance_is_decided_by_hashes(report: ParityReport) -> None:
    reference, other = report.reference, report.model
    known, sentence = provenance(reference, other)
    assert known
    assert quotes(sentence, "drn.pt")
    strange = dataclasses.replace(other.manifest, sources={"drn.pt": "1" * 64})
    known, sentence = provenance(reference, dataclasses.replace(other, manifest=strange))
    assert not known
    assert quotes(sentence, "wrong.onnx", "drn.onnx")
    made = dataclasses.replace(other.manifest, sources={"some.onnx": reference.sha256})
    known, sentence = provenance(reference, dataclasses.replace(other, manifest=made))
    assert known
    assert quotes(sentence, "wrong.onnx", "drn.onnx")
    assert provenance(reference, reference)[0]
