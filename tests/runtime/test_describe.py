"""Test `python -m runtime.describe`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from runtime.artifacts.manifest import Manifest
from runtime.describe import describe
from tests.raising import check_error


def test_describe_prints_model_facts(tiny_model: Path, run_command: Any) -> None:
    outcome = run_command(describe, tiny_model)
    rows = dict(line.split("  ", 1) for line in outcome.out.splitlines())
    rows = {label.strip(): text.strip() for label, text in rows.items()}
    assert rows["file"].startswith("tiny.onnx, ")
    assert rows["network"] == "DRN after training stage 3, fp32"
    assert "features of width 16, 16 frames per clip, one clip every 8 frames" in rows["input"]
    assert rows["segments"] == "32, pooled as in mmaction2; 56 locations"
    assert rows["queries"] == "1 to 13 tokens of 21 words; unknown words: skip"
    assert "soft-NMS" in rows["decoding"]
    assert rows["source drn.pt"] == "0" * 64


def test_describe_prints_manifest(tiny_model: Path, tiny_manifest: Manifest, run_command: Any) -> None:
    outcome = run_command(describe, tiny_model, "--json")
    assert Manifest.from_json(outcome.out) == tiny_manifest
    assert json.loads(outcome.out)["vocabulary"]["words"]["dog"] == 8


def test_describe_ignores_a_validation_that_is_no_table(
    tmp_path: Path, write_model: Callable[..., Path], run_command: Any
) -> None:
    run_command(describe, write_model(tmp_path / "a.onnx", training={"validation": "none"}))


def test_describe_reads_image_encoder_metadata_file(tmp_path: Path, run_command: Any, refused: Any) -> None:
    graphs = pytest.importorskip("tests.runtime.media.extractor_graphs")
    outcome = run_command(describe, graphs.write_images(tmp_path / "clip.onnx"))
    assert "encoder, an extractor of clip features" in outcome.out
    assert "1 frames per clip, one clip every 8" in outcome.out
    (tmp_path / "clip.onnx.json").write_text("{")
    check_error(refused(describe, tmp_path / "clip.onnx"), "invalid_json", tmp_path / "clip.onnx.json")


def test_describe_rejects_files_that_are_not_models(tmp_path: Path, refused: Any) -> None:
    (tmp_path / "text.onnx").write_text("a text")
    check_error(refused(describe, tmp_path / "text.onnx"), "not_onnx", tmp_path / "text.onnx")
    check_error(refused(describe, tmp_path / "gone.onnx"), "missing_file", tmp_path / "gone.onnx")
    check_error(refused(describe, "triton://host:8001/drn"), "wrong_model_kind")
