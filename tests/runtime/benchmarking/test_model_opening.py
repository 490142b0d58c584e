"""Test `runtime.benchmarking.model_opening`: labels, files, and the start of a fresh process."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from benchmarks.fake_tensorrt import write_plan
from runtime.benchmarking.model_opening import cold_start, model_files, model_labels
from runtime.core.errors import GroundingError
from tests.raising import raises
from tests.runtime.planted import PlantedBackend


def test_models_with_same_name_get_distinct_labels() -> None:
    paths = [Path(name) for name in ("a/x.onnx", "b/x.onnx", "y.onnx", "y.onnx")]
    assert model_labels(paths) == ["a/x.onnx", "b/x.onnx", "y.onnx (1)", "y.onnx (2)"]


def test_model_files_include_all_parts(tmp_path: Path) -> None:
    manifest = dataclasses.replace(PlantedBackend().manifest, part="query", video_part={"m.video.onnx": "1" * 64})
    for suffix in ("onnx", "engine"):
        query, video = tmp_path / f"m.query.{suffix}", tmp_path / f"m.video.{suffix}"
        video.write_text("video")
        assert model_files(query, manifest) == [query, video]
    assert model_files(query, PlantedBackend().manifest) == [query]
    # An engine's plans for short queries are named by its sidecar.
    graph, shorter = tmp_path / "m.query.onnx", tmp_path / "m.query.8.engine"
    graph.write_text("graph")
    shorter.write_text("plan")
    write_plan(query, graph, [], manifest, unrolled={shorter.name: "2" * 64})
    assert model_files(query, manifest) == [query, video, shorter]


def test_cold_start_is_timed_in_a_new_process(tiny_model: Path, tmp_path: Path) -> None:
    assert cold_start(tiny_model, "cpu", 1) > 0
    broken = tmp_path / "broken.onnx"
    broken.write_text("no model")
    with raises(GroundingError, "measurement_failed", "broken.onnx"):
        cold_start(broken, "cpu", 1)
