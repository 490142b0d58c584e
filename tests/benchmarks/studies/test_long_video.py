"""Test `benchmarks.studies.long_video`: long videos are grounded in windows."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.studies.long_video import long_video
from runtime.core.errors import ModelFileError
from tests.raising import raises


def test_long_video_is_grounded_in_windows(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    actual = long_video(models / "drn.onnx", hours=0.2, queries=3)
    assert actual["windows"] > 10
    assert actual["moments"] > 0
    assert "0.2 h in " in capsys.readouterr().out


def test_model_without_windows_is_rejected(tiny: Path) -> None:
    with raises(ModelFileError, "missing_field", tiny):
        long_video(tiny)


@pytest.fixture
def tiny(models: Path, tmp_path: Path) -> Path:
    import dataclasses

    import onnx

    from runtime.artifacts.manifest import METADATA_KEY, Manifest

    model = onnx.load(models / "drn.onnx")
    (metadata,) = (entry.value for entry in model.metadata_props if entry.key == METADATA_KEY)
    without = dataclasses.replace(Manifest.from_json(metadata), windows=None)
    onnx.helper.set_model_props(model, {METADATA_KEY: without.to_json()})
    onnx.save(model, tmp_path / "tiny.onnx")
    return tmp_path / "tiny.onnx"
