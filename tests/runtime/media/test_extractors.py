"""Test `runtime.media.extractors`: features of clips and images, and rejected files."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from runtime.artifacts.extractor_manifest import FORMAT, ExtractorManifest
from runtime.artifacts.manifest import Features
from runtime.core.errors import FeatureError, ModelFileError
from runtime.media.extractors import ClipExtractor, ImageExtractor, open_extractor
from tests.raising import raises
from tests.runtime.media.extractor_graphs import CLIPS, IMAGES, mixing, write_clips, write_images

pytest.importorskip("onnxruntime", reason="ONNX Runtime runs the extractors of these tests")


@pytest.fixture
def clips() -> np.ndarray:
    return np.random.default_rng(1).integers(0, 256, (3, 16, 24, 24, 3), dtype=np.uint8)


def test_clip_extractor_gets_unchanged_clips(tmp_path: Path, clips: np.ndarray) -> None:
    extractor = open_extractor(write_clips(tmp_path / "tiny.onnx"), "cpu")
    assert isinstance(extractor, ClipExtractor)
    assert extractor.manifest == CLIPS
    expected = clips.astype(float).mean(axis=(1, 2, 3)) @ mixing()
    assert extractor.extract(clips) == pytest.approx(expected, rel=1e-4)
    assert extractor.extract(clips[:1]) == pytest.approx(expected[:1], rel=1e-4)


@pytest.mark.parametrize("white", [1.0, 255.0])
def test_image_extractor_scales_pixels_as_in_manifest(tmp_path: Path, clips: np.ndarray, white: float) -> None:
    mean, std = ([white * value for value in values] for values in (IMAGES.mean, IMAGES.std))
    manifest = dataclasses.replace(IMAGES, mean=tuple(mean), std=tuple(std), white=white)
    extractor = open_extractor(write_images(tmp_path / "clip.onnx", manifest), "cpu")
    assert isinstance(extractor, ImageExtractor)
    frames = clips[:, :1]
    pixels = (frames[:, 0] / 255 - np.array(IMAGES.mean)) / np.array(IMAGES.std)
    actual = extractor.extract(frames)
    assert actual.dtype == np.float32
    assert actual == pytest.approx(pixels.mean(axis=(1, 2)) @ mixing(), rel=1e-3, abs=1e-6)


def test_extractor_manifest_survives_json() -> None:
    for manifest in (CLIPS, IMAGES, dataclasses.replace(CLIPS, sources={"c3d.pt": "0" * 64})):
        assert ExtractorManifest.from_dict(json.loads(manifest.to_json()), "x") == manifest


@pytest.mark.parametrize(
    ("change", "code", "values"),
    [
        ({"format": "other"}, "unknown_format", ["clip.onnx.json", "'other'"]),
        ({"window": 0}, "invalid_setting", [(16, 0, 8)]),
        ({"std": [1, 0, 1]}, "invalid_setting", [(1, 0, 1)]),
        ({"mean": [1, 2]}, "invalid_setting", [(1, 2)]),
        ({"crop": [25, 24]}, "invalid_setting", [(25, 24)]),
        ({"colour": "blue"}, "damaged_file", ["clip.onnx.json", "'colour'"]),
        ({"mean": 3}, "damaged_file", ["clip.onnx.json"]),
        ({"dim": True}, "invalid_setting", [True]),
        ({"crop": [23.5, 24]}, "invalid_setting", [23.5]),
        ({"crop": [True, True]}, "invalid_setting", []),
        ({"resize": 10**200}, "invalid_setting", []),
        ({"resize": 20000, "crop": [20000, 20000]}, "invalid_setting", [20000]),
        ({"window": 10**9}, "invalid_setting", [10**9]),
        ({"mean": [1e300, 1, 1]}, "invalid_setting", [1e300]),
        ({"std": [1e-300, 1, 1]}, "invalid_setting", [1e-300]),
        ({"white": 1e-300}, "invalid_setting", [1e-300]),
        ({"kind": ["CLIP"]}, "invalid_setting", []),
        ({"sources": {"c3d.pt": None}}, "invalid_setting", []),
        ({"sources": ["c3d.pt"]}, "damaged_file", ["clip.onnx.json"]),
    ],
)
def test_invalid_metadata_fails(tmp_path: Path, change: dict[str, object], code: str, values: list[object]) -> None:
    path = write_images(tmp_path / "clip.onnx")
    description = {"format": FORMAT, **dataclasses.asdict(IMAGES), **change}
    path.with_name("clip.onnx.json").write_text(json.dumps(description))
    with raises(ModelFileError, code, *values):
        open_extractor(path, "cpu")


def test_files_that_are_not_extractors_are_rejected(tmp_path: Path, tiny_model: Path) -> None:
    with raises(ModelFileError, "missing_file", tmp_path / "none.onnx"):
        open_extractor(tmp_path / "none.onnx", "cpu")
    with raises(ModelFileError, "wrong_suffix", "'c3d.pt'", "python -m export.to_onnx"):
        open_extractor(tmp_path / "c3d.pt", "cpu")
    (tmp_path / "text.onnx").write_text("no graph")
    with raises(ModelFileError, "not_onnx", tmp_path / "text.onnx"):
        open_extractor(tmp_path / "text.onnx", "cpu")
    with raises(ModelFileError, "missing_manifest", tmp_path / "bare.onnx", "bare.onnx.json"):
        open_extractor(write_images(tmp_path / "bare.onnx", beside=False), "cpu")
    with raises(ModelFileError, "wrong_model_kind", tiny_model, "--model"):
        open_extractor(tiny_model, "cpu")


def test_manifest_with_wrong_width_or_size_is_rejected(tmp_path: Path, clips: np.ndarray) -> None:
    path = write_images(tmp_path / "clip.onnx")
    description = {"format": FORMAT, **dataclasses.asdict(IMAGES), "dim": 17}
    path.with_name("clip.onnx.json").write_text(json.dumps(description))
    with raises(ModelFileError, "output_shape_mismatch", 17, (3, 16)):
        open_extractor(path, "cpu").extract(clips[:, :1])
    with raises(ModelFileError, "shape_mismatch", "clips"):
        open_extractor(write_clips(tmp_path / "tiny.onnx"), "cpu").extract(clips[:, :, :20])


def test_extractor_must_match_the_model() -> None:
    CLIPS.check_fits(Features("tiny", 16))
    with raises(FeatureError, "feature_width_mismatch", 16, 4096):
        CLIPS.check_fits(Features())
    with raises(FeatureError, "extractor_mismatch", 1, 8, 16):
        IMAGES.check_fits(Features("tiny", 16))
