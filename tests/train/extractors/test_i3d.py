"""Test `train.extractors.i3d`: outputs equal an independent implementation, and both published layouts convert."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

from runtime.core.errors import CheckpointError
from runtime.core.pooling import ClipTiming
from tests.damage import flip
from tests.export.narrow_i3d import TINY, Arrays, flat, pytorch_i3d
from tests.raising import raises
from train.convert import convert
from train.extractors.checkpoint import is_extractor_file, load_extractor
from train.extractors.i3d import I3D, I3DConfig, pad_same

STEM_POOL, LATER_POOL, LAST_POOL = ((1, 3, 3), (1, 2, 2)), ((3, 3, 3), (2, 2, 2)), ((2, 2, 2), (2, 2, 2))


def as_state(arrays: Arrays) -> dict[str, Any]:
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def save_torch(arrays: Arrays, path: Path) -> Path:
    torch.save(as_state(arrays), path)
    return path


def save_flat(arrays: Arrays, path: Path) -> Path:
    np.savez(path, **arrays)
    return path


def same(x: Any, kernel: tuple[int, ...], stride: tuple[int, ...], value: float) -> Any:
    """Pad as TensorFlow documents "SAME": the rest of a division, and the smaller half first."""
    for axis, (taps, step) in enumerate(zip(kernel, stride, strict=True), 2):
        size = x.shape[axis]
        total = max(taps - (size % step or step), 0)
        before, after = ([*x.shape[:axis], count, *x.shape[axis + 1 :]] for count in (total // 2, total - total // 2))
        x = torch.cat((torch.full(before, value), x, torch.full(after, value)), axis)
    return x


def reference(arrays: Arrays, clips: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return features and logits of clips, from the published description with batch norms and infinite padding."""
    state = as_state(arrays)

    def unit(x: Any, name: str, stride: int = 1) -> Any:
        weight = state[f"{name}.conv3d.weight"]
        x = functional.conv3d(same(x, weight.shape[2:], (stride,) * 3, 0.0), weight, stride=stride)
        parts = (state[f"{name}.bn.{part}"] for part in ("running_mean", "running_var", "weight", "bias"))
        return functional.batch_norm(x, *parts, eps=1e-3).clamp(min=0)

    def pool(x: Any, kernel: tuple[int, ...], stride: tuple[int, ...]) -> Any:
        return functional.max_pool3d(same(x, kernel, stride, -torch.inf), kernel, stride)

    def block(x: Any, name: str) -> Any:
        pooled = pool(x, (3, 3, 3), (1, 1, 1))
        branches = (
            unit(x, f"{name}.b0"),
            unit(unit(x, f"{name}.b1a"), f"{name}.b1b"),
            unit(unit(x, f"{name}.b2a"), f"{name}.b2b"),
            unit(pooled, f"{name}.b3b"),
        )
        return torch.cat(branches, 1)

    x = torch.from_numpy(clips.astype(np.float32) / 255 * 2 - 1).permute(0, 4, 1, 2, 3)
    x = pool(unit(x, "Conv3d_1a_7x7", 2), *STEM_POOL)
    x = pool(unit(unit(x, "Conv3d_2b_1x1"), "Conv3d_2c_3x3"), *STEM_POOL)
    x = pool(block(block(x, "Mixed_3b"), "Mixed_3c"), *LATER_POOL)
    for name in "bcdef":
        x = block(x, f"Mixed_4{name}")
    x = block(block(pool(x, *LAST_POOL), "Mixed_5b"), "Mixed_5c")
    pooled = torch.nn.AvgPool3d((2, 7, 7), 1)(x) if x.shape[-1] >= 7 else x
    logits = functional.conv3d(pooled, state["logits.conv3d.weight"], state["logits.conv3d.bias"])
    return x.mean((2, 3, 4)).numpy(), logits.mean((2, 3, 4)).numpy()


@pytest.fixture
def clips() -> np.ndarray:
    return np.random.default_rng(3).integers(0, 256, (2, 16, 48, 40, 3), dtype=np.uint8)


def test_i3d_blocks_have_published_shapes() -> None:
    # Source: Carreira and Zisserman 2017, figure 3: strides 2, 1x2x2, 1x2x2, 2, 2 for 224 x 224 frames.
    with torch.device("meta"):
        model = I3D(I3DConfig(), (0.0, 0.0, 0.0))
    model.returns_scores = True
    seen: dict[str, tuple[int, ...]] = {}
    for name, module in model.named_children():
        module.register_forward_hook(lambda *given, name=name: seen.update({name: tuple(given[2].shape[1:])}))
    clip = torch.empty(1, 16, 224, 224, 3, device="meta", dtype=torch.uint8)
    features, scores = model(clip)
    assert seen["Conv3d_1a_7x7"] == (64, 8, 112, 112)
    assert seen["Conv3d_2c_3x3"] == (192, 8, 56, 56)
    assert seen["Mixed_3c"] == (480, 8, 28, 28)
    assert seen["Mixed_4f"] == (832, 4, 14, 14)
    assert seen["Mixed_5c"] == (1024, 2, 7, 7)
    assert (features.shape, scores.shape) == ((1, 1024), (1, 400))


@pytest.mark.parametrize(
    ("size", "kernel", "stride", "ends"),
    [
        (224, 7, 2, (2, 3)),
        (9, 7, 2, (3, 3)),
        (112, 3, 2, (0, 1)),
        (5, 3, 2, (1, 1)),
        (7, 2, 2, (0, 1)),
        (8, 3, 1, (1, 1)),
    ],
)
def test_pad_same_ends_as_tensorflow(size: int, kernel: int, stride: int, ends: tuple[int, int]) -> None:
    padded = pad_same(torch.ones(1, 1, 1, 1, size), (1, 1, kernel), (1, 1, stride)).ravel()
    assert padded.tolist() == [0.0] * ends[0] + [1.0] * size + [0.0] * ends[1]


@pytest.mark.parametrize(("window", "scaled"), [(9, False), (16, True)])
def test_converted_features_equal_unfolded(tmp_path: Path, clips: np.ndarray, window: int, scaled: bool) -> None:
    arrays = pytorch_i3d(scaled=scaled)
    model = convert(save_torch(arrays, tmp_path / "rgb_imagenet.pt"), tmp_path / "i3d.pt").model()
    expected, _ = reference(arrays, clips[:, :window])
    with torch.inference_mode():
        actual = model(torch.from_numpy(clips[:, :window])).numpy()
    assert (expected > 0.01).any()
    assert actual == pytest.approx(expected, rel=1e-4, abs=1e-4)


def test_class_scores_are_probabilities_of_logits(tmp_path: Path) -> None:
    arrays = pytorch_i3d()
    model = convert(save_torch(arrays, tmp_path / "rgb_imagenet.pt"), tmp_path / "i3d.pt").model()
    model.returns_scores = True
    # Four positions in time, over which the logits are averaged.
    clip = np.random.default_rng(4).integers(0, 256, (1, 32, 224, 224, 3), dtype=np.uint8)
    _, logits = reference(arrays, clip)
    with torch.inference_mode():
        _, scores = model(torch.from_numpy(clip))
    assert scores.sum().item() == pytest.approx(1)
    assert scores.numpy() == pytest.approx(np.exp(logits) / np.exp(logits).sum(), abs=1e-4)


def test_both_layouts_convert_to_equal_checkpoints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arrays = pytorch_i3d()
    sources = {
        "rgb_imagenet.pt": save_torch(arrays, tmp_path / "rgb_imagenet.pt"),
        "i3d.npz": save_flat(flat(arrays), tmp_path / "i3d.npz"),
    }
    first, second = (convert(path, tmp_path / f"{index}.pt") for index, path in enumerate(sources.values()))
    assert "5 classes" in capsys.readouterr().out
    for index, name in enumerate(sources):
        loaded = load_extractor(tmp_path / f"{index}.pt")
        assert is_extractor_file(tmp_path / f"{index}.pt")
        assert loaded.config == TINY
        assert list(loaded.sources) == [name]
        for key, value in first.weights.items():
            assert torch.equal(loaded.weights[key], value), key
    assert second.config == first.config
    manifest = load_extractor(tmp_path / "1.pt").manifest({})
    assert (manifest.kind, manifest.dim, manifest.window, manifest.stride) == ("I3D", 8, 16, 8)
    assert (manifest.resize, manifest.crop) == (256, (224, 224))
    assert (manifest.mean, manifest.std, manifest.white) == ((127.5,) * 3, (127.5,) * 3, 255.0)


def test_clip_length_without_class_scores_is_rejected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    checkpoint = convert(save_flat(flat(pytorch_i3d()), tmp_path / "weights.npz"))
    # The default output has the name of the network.
    assert load_extractor(Path("i3d.pt")).config == TINY
    assert checkpoint.manifest({}, ClipTiming(64, 16)).window == 64
    with raises(CheckpointError, "invalid_option", 8, "--clock"):
        checkpoint.manifest({}, ClipTiming(8, 8))


FIRST = "Conv3d_1a_7x7"


@pytest.mark.parametrize(
    ("code", "name", "array", "named"),
    [
        ("missing_tensor", "Mixed_4c.b1b.bn.running_var", None, "Mixed_4c.b1b.bn.running_var"),
        ("missing_tensor", "logits.conv3d.bias", None, "logits.conv3d.bias"),
        ("tensor_mismatch", "flow.weight", np.ones(3), "flow.weight"),
        ("tensor_mismatch", "Mixed_3b.b0.conv3d.weight", np.ones((2, 9, 1, 1, 1)), "Mixed_3b.b0"),
        ("tensor_mismatch", f"{FIRST}.conv3d.weight", np.ones((4, 3)), FIRST),
        ("tensor_mismatch", f"{FIRST}.bn.bias", np.ones(3), f"{FIRST}.bn.bias"),
        ("tensor_mismatch", f"{FIRST}.bn.bias", np.array(1.0), f"{FIRST}.bn.bias"),
        ("impossible_weights", f"{FIRST}.bn.running_mean", np.full(4, np.nan), f"{FIRST}.bn.running_mean"),
        ("impossible_weights", f"{FIRST}.bn.running_var", np.full(4, -1.0), f"{FIRST}.bn.running_var"),
        ("impossible_weights", f"{FIRST}.conv3d.weight", np.full((4, 3, 7, 7, 7), 1e300), f"{FIRST}.weight"),
    ],
)
def test_damaged_i3d_state_fails(tmp_path: Path, code: str, name: str, array: np.ndarray | None, named: str) -> None:
    arrays = pytorch_i3d()
    arrays.pop(name, None)
    path = save_torch(arrays if array is None else {**arrays, name: array}, tmp_path / "rgb_imagenet.pt")
    with raises(CheckpointError, code, path, named):
        convert(path, tmp_path / "i3d.pt")
    assert [entry.name for entry in tmp_path.iterdir()] == ["rgb_imagenet.pt"]


def test_flat_archive_with_missing_or_extra_arrays_is_rejected(tmp_path: Path) -> None:
    arrays = flat(pytorch_i3d())
    lost = "batch_stats/Mixed_5c/Branch_2/Conv3d_0b_3x3/BatchNorm_0/mean"
    without = save_flat({name: array for name, array in arrays.items() if name != lost}, tmp_path / "without.npz")
    with raises(CheckpointError, "missing_tensor", without, lost):
        convert(without, tmp_path / "i3d.pt")
    more = save_flat({**arrays, "opt_state/count": np.ones(1)}, tmp_path / "more.npz")
    with raises(CheckpointError, "tensor_mismatch", more, "opt_state/count"):
        convert(more, tmp_path / "i3d.pt")
    other = save_flat({"features": np.ones((3, 4))}, tmp_path / "features.npz")
    with raises(CheckpointError, "not_a_state_dict", other):
        convert(other, tmp_path / "i3d.pt")


def test_damaged_archive_is_rejected(tmp_path: Path) -> None:
    path = save_flat(flat(pytorch_i3d()), tmp_path / "i3d.npz")
    content = path.read_bytes()
    for damaged in (b"", content[: len(content) // 2], content[:-20], flip(content, 4 * len(content))):
        path.write_bytes(damaged)
        with raises(CheckpointError, "damaged_file", path):
            convert(path, tmp_path / "i3d.pt")
        assert not (tmp_path / "i3d.pt").exists()
