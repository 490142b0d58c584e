"""Compare I3D with public Kinetics-400 weights on two ActivityNet videos with reference features and classes."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch

Image = pytest.importorskip("PIL.Image", reason="the reference features were made with PIL's resize")
pytest.importorskip("av", reason="PyAV decodes the videos")

from export.to_onnx import to_onnx  # noqa: E402
from export.tracing import extractor_to_onnx  # noqa: E402
from runtime.artifacts.extractor_manifest import ResizeCrop  # noqa: E402
from runtime.datasets.dataset import DataSet  # noqa: E402
from runtime.extract import extract  # noqa: E402
from runtime.media.video_file import probe, read_frames  # noqa: E402
from train.convert import convert  # noqa: E402
from train.extractors.published import ExtractorCheckpoint  # noqa: E402

# The class of most windows of each video, and its probability for the mean feature of the video. The numbers are
# positions in the alphabetical list of Kinetics-400: "clean and jerk" and "walking the dog".
CLASSES = {"v_GGSY1Qvo990": (59, 0.91), "v_ZNVhz7ctTq0": (378, 0.87)}
CLOCK = (16, 64)


@pytest.fixture(scope="module")
def converted(i3d_data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ExtractorCheckpoint]:
    path = tmp_path_factory.mktemp("i3d") / "i3d.pt"
    checkpoint = convert(i3d_data / "i3d_kinetics400.npz", path)
    assert isinstance(checkpoint, ExtractorCheckpoint)
    return path, checkpoint


@pytest.fixture(scope="module")
def extracted(converted: tuple[Path, ExtractorCheckpoint], real_videos: Path) -> DataSet:
    """The features of both videos, of 16 frames every 64, by the exported graph."""
    checkpoint, _ = converted
    with pytest.MonkeyPatch.context() as patch:
        # A clip of the full network takes one to two seconds.
        patch.setattr(extractor_to_onnx, "BATCH_SIZES", (1,))
        graph = to_onnx(checkpoint, checkpoint.with_suffix(".onnx"), clock=CLOCK)
    videos = tuple(real_videos / f"{name}.mp4" for name in CLASSES)
    return DataSet(extract(videos, graph, checkpoint.parent / "data", threads=2))


@pytest.mark.parametrize("name", CLASSES)
def test_extracted_features_are_close_to_reference(extracted: DataSet, i3d_data: Path, name: str) -> None:
    expected, actual = np.load(i3d_data / f"{name}.npy"), extracted.video(name).features[:]
    assert actual.shape == expected.shape
    norms = np.linalg.norm(actual, axis=1) * np.linalg.norm(expected, axis=1)
    # Frames are resized without antialiasing here, and with it in the reference.
    lowest = ((actual * expected).sum(1) / norms).min()
    print(f"{name}: lowest cosine similarity {lowest:.5f}")
    assert lowest > 0.995


@pytest.mark.parametrize("name", CLASSES)
def test_extracted_features_give_the_class_of_the_video(
    converted: tuple[Path, ExtractorCheckpoint], extracted: DataSet, i3d_data: Path, name: str
) -> None:
    weights = converted[1].weights
    kernel, bias = weights["logits.weight"].numpy()[:, :, 0, 0, 0], weights["logits.bias"].numpy()
    expected_class, probability = CLASSES[name]
    for features, tolerance in ((np.load(i3d_data / f"{name}.npy"), 0.005), (extracted.video(name).features[:], 0.03)):
        # The scores of 16 frames are those of their feature, because the average pooling covers all positions.
        window_classes = (features @ kernel.T + bias).argmax(1)
        assert np.bincount(window_classes).argmax() == expected_class
        logits = features.mean(0) @ kernel.T + bias
        scores = np.exp(logits - logits.max())
        actual = scores[expected_class] / scores.sum()
        print(
            f"{name}: class {expected_class} in {(window_classes == expected_class).sum()} of {len(features)} windows"
        )
        print(f"{name}: probability {actual:.3f} for the mean feature")
        assert actual == pytest.approx(probability, abs=tolerance)


@pytest.mark.parametrize("name", CLASSES)
def test_features_equal_reference_with_the_same_resize(
    converted: tuple[Path, ExtractorCheckpoint], i3d_data: Path, real_videos: Path, name: str
) -> None:
    """The middle window of each video, resized by PIL as the reference was."""
    expected = np.load(i3d_data / f"{name}.npy")
    middle = len(expected) // 2
    video = probe(real_videos / f"{name}.mp4")
    sides = (video.height, video.width)
    height, width = (round(side * 256 / min(sides)) for side in sides)
    frames = list(itertools.islice(read_frames(video, ResizeCrop(sides, sides)), 64 * middle, 64 * middle + 16))
    top, left = (height - 224) // 2, (width - 224) // 2
    clip = np.stack(
        [
            np.asarray(Image.fromarray(frame).resize((width, height), Image.Resampling.BILINEAR))[
                top : top + 224, left : left + 224
            ]
            for frame in frames
        ]
    )
    model = converted[1].model()
    with torch.inference_mode():
        actual = model(torch.from_numpy(clip[None])).numpy()[0]
    print(f"{name}: largest difference {np.abs(actual - expected[middle]).max():.1e} with PIL's resize")
    assert actual == pytest.approx(expected[middle], abs=1e-4)
