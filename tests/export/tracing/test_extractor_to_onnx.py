"""Test `export.tracing.extractor_to_onnx`: features equal torch for any batch size, and the runtime opens the file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

import export.tracing.extractor_to_onnx
from export.to_onnx import to_onnx
from export.tracing.extractor_to_onnx import export_c3d
from export.tracing.torch_check import relative_difference
from runtime.core.errors import CheckFailed, CheckpointError, ShapeError
from runtime.core.io.digests import sha256
from runtime.media.extractors import ClipExtractor, open_extractor
from runtime.media.frames import clips
from runtime.media.video_file import probe, read_frames
from tests import tolerances
from tests.export.narrow_c3d import TINY, lively
from tests.films import film
from tests.raising import raises
from train.c3d import C3D, MEANS, C3DCheckpoint, save_c3d
from train.checkpoints import load_checkpoint


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("c3d") / "c3d.pt"
    weights = lively().state_dict()
    save_c3d(path, C3DCheckpoint(TINY, MEANS["plain"], weights, {"c3d.pickle": "1" * 64}))
    return path


@pytest.fixture(scope="module")
def exported(checkpoint: Path) -> Path:
    return to_onnx(checkpoint, checkpoint.with_name("c3d.onnx"))


def test_onnx_extractor_equals_torch_for_any_clip_count(checkpoint: Path, exported: Path) -> None:
    extractor = open_extractor(exported, "cpu", 1)
    assert isinstance(extractor, ClipExtractor)
    model = lively()
    rng = np.random.default_rng(5)
    for count in (1, 2, 5):
        batch = rng.integers(0, 256, (count, 16, 112, 112, 3), dtype=np.uint8)
        with torch.inference_mode():
            wanted = model(torch.from_numpy(batch)).numpy()
        assert wanted.max() > 3
        assert relative_difference(extractor.extract(batch), wanted) <= tolerances.EXPORTED


def test_extractor_graph_records_inputs_and_sources(checkpoint: Path, exported: Path) -> None:
    manifest = open_extractor(exported, "cpu", 1).manifest
    assert (manifest.kind, manifest.dim, manifest.window, manifest.stride) == ("C3D", 32, 16, 8)
    assert manifest.mean == MEANS["plain"]
    assert manifest.sources == {"c3d.pickle": "1" * 64, "c3d.pt": sha256(checkpoint)}
    graph = onnx.load(exported).graph
    assert [value.name for value in (*graph.input, *graph.output)] == ["clips", "features"]
    assert {tensor.name for tensor in graph.initializer} >= {"conv1a.weight", "conv5b.bias", "fc6.bias"}
    assert onnx.load(exported).opset_import[0].version == 17


def test_extractor_runs_on_clips_of_a_video(tmp_path: Path, exported: Path) -> None:
    extractor = open_extractor(exported, "cpu", 1)
    footage = probe(film(tmp_path / "hall.mp4", 33))
    found = [extractor.extract(clip[None]) for clip in clips(read_frames(footage, extractor.manifest.framing), 16, 8)]
    assert [features.shape for features in found] == [(1, 32)] * 3


def test_graph_failing_torch_parity_is_not_saved(
    tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(model: C3D, *arguments: object, **options: object) -> onnx.ModelProto:
        other = C3D(TINY, MEANS["mmaction2"])
        other.load_state_dict(model.state_dict())
        return export_c3d(other.eval(), *arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(export.tracing.extractor_to_onnx, "export_c3d", wrong)
    with raises(CheckFailed, "parity_failed", "1e-04"):
        to_onnx(checkpoint, tmp_path / "c3d.onnx")
    assert not list(tmp_path.iterdir())


def test_splitting_an_extractor_is_rejected(tmp_path: Path, checkpoint: Path) -> None:
    with raises(ShapeError, "inapplicable_option", checkpoint, "--split"):
        to_onnx(checkpoint, tmp_path / "c3d.onnx", split=True)


def test_c3d_checkpoint_as_model_is_rejected_with_command(checkpoint: Path) -> None:
    with raises(CheckpointError, "wrong_model_kind", f"export.to_onnx --model {checkpoint}"):
        load_checkpoint(checkpoint)
