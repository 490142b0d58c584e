"""Test `runtime.benchmarking.compare`: size, speed and recall of several models."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path

import pytest

from runtime.benchmarking.compare import FORMAT, SHOWN_METRICS, compare
from runtime.core.errors import GroundingError, ModelFileError
from runtime.core.tokenizer import Vocabulary
from tests.raising import quotes, raises, records


def test_comparison_of_equal_models_finds_no_difference(
    tiny_model: Path, mini: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib", reason="plots need the extra [plot]")
    monkeypatch.setattr("runtime.benchmarking.timing.WINDOW_SECONDS", 0.0)
    copy = tmp_path / "copy.onnx"
    copy.write_bytes(tiny_model.read_bytes())
    output, markdown, plot = (tmp_path / name for name in ("c.json", "c.md", "c.png"))
    comparison = compare(
        (tiny_model, copy), data=mini, samples=3, batch=2, threads=1, output=output, markdown=markdown, plot=plot
    )
    first, second = comparison.models
    assert (second.lost, second.gained, second.agreement) == (0, 0, 1.0)
    assert first.metrics == second.metrics
    assert set(SHOWN_METRICS) <= set(first.metrics)
    assert first.speed_up is None
    assert second.speed_up is not None
    assert second.size == copy.stat().st_size
    assert min(first.latency.p50_ms, second.queries_per_s) > 0
    written = json.loads(output.read_text())
    assert written["format"] == FORMAT
    assert [model["name"] for model in written["models"]] == [tiny_model.name, "copy.onnx"]
    lines = markdown.read_text().splitlines()
    assert lines[2].startswith(f"| {tiny_model.name} | fp32 | ")
    assert lines[0].count("|") == lines[2].count("|") == lines[3].count("|")
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert quotes(capsys.readouterr().out, "copy.onnx", "mmaction2")


def test_comparison_rejects_wrong_inputs_before_models_open(tiny_model: Path, mini: Path, tmp_path: Path) -> None:
    with raises(ModelFileError, "missing_option", 1):
        compare((tiny_model,), data=mini)
    with raises(ModelFileError, "missing_file", tmp_path / "none.onnx"):
        compare((tiny_model, tmp_path / "none.onnx"), data=mini)
    with raises(GroundingError, "invalid_option", "--samples", 0):
        compare((tiny_model, tiny_model), data=mini, samples=0)


def test_unknown_words_of_each_model_are_a_warning_once(
    tiny_model: Path,
    write_model: Callable[..., Path],
    mini: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("runtime.benchmarking.timing.WINDOW_SECONDS", 0.0)
    vocabulary = Vocabulary({"person": 1, "opens": 2, "closes": 3, "dog": 4})
    other = write_model(tmp_path / "other.onnx", vocabulary=vocabulary)
    compare((tiny_model, other, other), data=mini, samples=3, batch=2, threads=1)
    # Of recall, and of the timed queries.
    assert len(records(caplog, logging.WARNING, "'door'", "'sits'")) == 2
    assert not records(caplog, logging.WARNING, "dog sits.")
