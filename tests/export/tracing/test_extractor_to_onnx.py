"""Test `export.tracing.extractor_to_onnx`: features equal torch for any batch size, and the runtime opens the file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

import export.tracing.extractor_to_onnx
from calib.graph.onnx_session import open_session
from export.build_engine import build_engine
from export.to_onnx import to_onnx
from export.tracing.extractor_to_onnx import trace_extractor
from export.tracing.torch_check import relative_difference
from runtime.artifacts.extractor_manifest import ResizeCrop
from runtime.core.errors import CheckFailed, CheckpointError, ModelFileError, ShapeError
from runtime.core.io.digests import sha256
from runtime.datasets.dataset import DataSet
from runtime.extract import extract
from runtime.media.extractors import ClipExtractor, open_extractor
from runtime.media.frames import clips
from runtime.media.video_file import probe, read_frames
from tests import tolerances
from tests.export.narrow_c3d import TINY, lively
from tests.export.narrow_i3d import TINY as TINY_I3D
from tests.films import film
from tests.raising import raises
from train.checkpoints import load_checkpoint
from train.extractors.c3d import C3D, MEANS
from train.extractors.checkpoint import load_extractor


@pytest.fixture
def checkpoint(c3d: Path) -> Path:
    return c3d.with_suffix(".pt")


def test_onnx_extractor_equals_torch_for_any_clip_count(c3d: Path) -> None:
    extractor = open_extractor(c3d, "cpu", 1)
    assert isinstance(extractor, ClipExtractor)
    model = lively()
    rng = np.random.default_rng(5)
    for count in (1, 2, 5):
        batch = rng.integers(0, 256, (count, 16, 112, 112, 3), dtype=np.uint8)
        with torch.inference_mode():
            expected = model(torch.from_numpy(batch)).numpy()
        assert expected.max() > 3
        assert relative_difference(extractor.extract(batch), expected) <= tolerances.EXPORTED


def test_extractor_graph_records_inputs_and_sources(c3d: Path) -> None:
    manifest = open_extractor(c3d, "cpu", 1).manifest
    assert (manifest.kind, manifest.dim, manifest.window, manifest.stride) == ("C3D", 32, 16, 8)
    assert manifest.mean == MEANS["plain"]
    assert manifest.sources == {"c3d.pickle": "1" * 64, "c3d.pt": sha256(c3d.with_suffix(".pt"))}
    graph = onnx.load(c3d).graph
    assert [value.name for value in (*graph.input, *graph.output)] == ["clips", "features"]
    assert {tensor.name for tensor in graph.initializer} >= {"conv1a.weight", "conv5b.bias", "fc6.bias"}
    assert onnx.load(c3d).opset_import[0].version == 17


def test_extractor_runs_on_clips_of_a_video(tmp_path: Path, c3d: Path) -> None:
    extractor = open_extractor(c3d, "cpu", 1)
    video_file = probe(film(tmp_path / "hall.mp4", 33))
    actual = [
        extractor.extract(clip[None]) for clip in clips(read_frames(video_file, extractor.manifest.framing), 16, 8)
    ]
    assert [features.shape for features in actual] == [(1, 32)] * 3


def test_graph_failing_torch_parity_is_not_saved(
    tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(model: C3D, *arguments: object, **options: object) -> onnx.ModelProto:
        other = C3D(TINY, MEANS["mmaction2"])
        other.load_state_dict(model.state_dict())
        return trace_extractor(other.eval(), *arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(export.tracing.extractor_to_onnx, "trace_extractor", wrong)
    with raises(CheckFailed, "parity_failed", "1e-04"):
        to_onnx(checkpoint, tmp_path / "c3d.onnx")
    assert not list(tmp_path.iterdir())


def test_c3d_checkpoint_as_model_is_rejected_with_command(checkpoint: Path) -> None:
    with raises(CheckpointError, "wrong_model_kind", f"export.to_onnx --model {checkpoint}"):
        load_checkpoint(checkpoint)


def test_i3d_graph_equals_torch_with_class_scores(i3d: Path) -> None:
    model = load_extractor(i3d.with_suffix(".pt")).model()
    model.returns_scores = True
    clips = np.random.default_rng(5).integers(0, 256, (2, 16, 224, 224, 3), dtype=np.uint8)
    with torch.inference_mode():
        features, scores = (output.numpy() for output in model(torch.from_numpy(clips)))
    assert features.max() > 0.1
    session = open_session(i3d, optimized=True)
    actual_features, actual_scores = session.run(["features", "class_scores"], {"clips": clips})
    assert relative_difference(actual_features, features) <= tolerances.EXPORTED
    assert relative_difference(actual_scores, scores) <= tolerances.EXPORTED
    assert actual_scores.shape == (2, TINY_I3D.num_classes)
    assert np.array_equal(open_extractor(i3d, "cpu").extract(clips), actual_features)


def test_i3d_graph_records_preprocessing_and_clock(i3d: Path) -> None:
    manifest = open_extractor(i3d, "cpu", 1).manifest
    assert (manifest.kind, manifest.dim, manifest.window, manifest.stride) == ("I3D", TINY_I3D.dim, 16, 64)
    assert (manifest.resize, manifest.crop, manifest.mean, manifest.std) == (
        256,
        (224, 224),
        (127.5,) * 3,
        (127.5,) * 3,
    )
    assert manifest.sources == {"rgb_imagenet.pt": "1" * 64, "i3d.pt": sha256(i3d.with_suffix(".pt"))}
    names = {node.name for node in onnx.load(i3d).graph.node}
    assert {"Conv3d_1a_7x7/Conv", "Mixed_3b.b0/Conv", "Mixed_5c.b3b/Conv", "logits/Conv"} <= names


def test_extraction_follows_the_clock_of_the_manifest(tmp_path: Path, i3d: Path) -> None:
    data = extract((film(tmp_path / "hall.mp4", 100),), i3d, tmp_path / "data")
    features = DataSet(data).video("hall").features
    # Clips start at frames 0 and 64.
    assert features.shape == (2, TINY_I3D.dim)
    frames = list(read_frames(probe(tmp_path / "hall.mp4"), ResizeCrop(256, (224, 224))))
    second = open_extractor(i3d, "cpu").extract(np.stack(frames[64:80])[None])
    assert features[1] == pytest.approx(second[0], rel=1e-5, abs=1e-6)


def test_options_that_c3d_lacks_are_rejected(tmp_path: Path, checkpoint: Path) -> None:
    with raises(ShapeError, "inapplicable_option", checkpoint, "--class-scores"):
        to_onnx(checkpoint, tmp_path / "c3d.onnx", class_scores=True)
    with raises(ShapeError, "inapplicable_option", checkpoint, "--split"):
        to_onnx(checkpoint, tmp_path / "c3d.onnx", split=True)
    with raises(CheckpointError, "invalid_option", 8, "--clock"):
        to_onnx(checkpoint, tmp_path / "c3d.onnx", clock=(8, 8))
    assert not list(tmp_path.iterdir())


def test_build_of_a_graph_with_class_scores_is_rejected(i3d: Path) -> None:
    with raises(ModelFileError, "wrong_model_kind", i3d, "--class-scores"):
        build_engine(i3d, precision="fp16", target="onnxruntime")
