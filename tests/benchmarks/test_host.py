"""Test `benchmarks.host`: the timed call returns the complete and correct answer."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import host
from benchmarks.fake_tensorrt import counted
from runtime import Grounder, open_backend
from runtime.core.errors import ModelFileError
from runtime.datasets.dataset import DataSet
from tests.raising import raises


@pytest.fixture
def pair(split_models: Path) -> Path:
    return split_models / "drn.query.onnx"


def test_report_has_all_figures_and_total_exceeds_parts(pair: Path, planted: Path, tmp_path: Path) -> None:
    report = host.host(pair, planted, batch=6, samples=20, output=tmp_path / "host.json")
    assert json.loads((tmp_path / "host.json").read_text()) == report
    actual = {name: latency["p50_ms"] for name, latency in report["ms"].items()}
    assert set(actual) == {host.ONE, host.ASKED, host.DECODED, host.many(6)}
    assert actual[host.ONE] > max(actual[host.ASKED], actual[host.DECODED]) > 0
    assert report["ms"][host.ONE]["samples"] == 20
    assert report["ms"][host.many(6)]["samples"] == 2


def test_timed_call_equals_graph_without_touching_the_gpu(pair: Path, planted: Path, tmp_path: Path) -> None:
    reference = Grounder(open_backend(pair, "cpu", 1))
    data_set = DataSet(planted)
    known = data_set.annotations("test")[:6]
    pairs = [(reference.encode(data_set.video(entry.video)), entry.sentence) for entry in known]
    bench = host.Bench(reference, pair, tmp_path, pairs)
    calls, runs = bench.calls(), bench.library.runs
    before, computed = len(bench.driver.calls), len(runs)
    for number, (video, sentence) in enumerate(pairs):
        actual = calls[host.ONE].run(calls[host.ONE].prepare(number))
        expected = reference.ground(video, sentence)
        assert [moment.start for moment in actual] == pytest.approx([moment.start for moment in expected], abs=1e-3)
    made = counted(bench.driver.calls[before:])
    assert made["cuGraphLaunch"] == made["cuStreamSynchronize"] == len(pairs)
    assert len(runs) == computed


def test_unsplit_model_is_rejected(models: Path, planted: Path) -> None:
    with raises(ModelFileError, "query_part_required", models / "drn.onnx", "--split"):
        host.host(models / "drn.onnx", planted)
