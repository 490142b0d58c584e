"""Test `train.extractors.c3d`: the layers equal the published ones, and all published layouts convert."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from runtime.core.errors import CheckpointError
from tests.raising import raises
from tests.train.extractors.c3d_layouts import LAYOUTS, plain_state_dict
from train.convert import convert
from train.extractors.c3d import C3D, MEANS, C3DConfig
from train.extractors.checkpoint import is_extractor_file, load_extractor, save_extractor

TINY = C3DConfig((2, 3, 4, 4, 5, 5, 6, 6), 8)


@pytest.fixture
def tiny() -> C3D:
    torch.manual_seed(0)
    return C3D(TINY, (0.0, 0.0, 0.0)).eval()


def test_c3d_layers_have_published_shapes() -> None:
    # Source: Tran et al. 2015, figure 3 and section 3.3, and the padding of Caffe's pool5.
    with torch.device("meta"):
        model = C3D(C3DConfig(), (0.0, 0.0, 0.0))
    seen: dict[str, tuple[int, ...]] = {}
    for name, module in model.named_children():
        module.register_forward_hook(lambda *given, name=name: seen.update({name: tuple(given[2].shape[1:])}))
    features = model(torch.empty(1, 16, 112, 112, 3, device="meta", dtype=torch.uint8))
    assert " ".join(seen) == (
        "conv1a pool1 conv2a pool2 conv3a conv3b pool3 conv4a conv4b pool4 conv5a conv5b pool5 fc6"
    )
    assert (seen["conv1a"], seen["pool1"]) == ((64, 16, 112, 112), (64, 16, 56, 56))
    assert (seen["conv2a"], seen["pool2"]) == ((128, 16, 56, 56), (128, 8, 28, 28))
    assert (seen["conv3b"], seen["pool3"]) == ((256, 8, 28, 28), (256, 4, 14, 14))
    assert (seen["conv4b"], seen["pool4"]) == ((512, 4, 14, 14), (512, 2, 7, 7))
    assert (seen["conv5b"], seen["pool5"]) == ((512, 2, 7, 7), (512, 1, 4, 4))
    assert features.shape == (1, 4096)
    # Of the convolutions, 27 weights for each pair of channels and a bias; of fc6, 8192 * 4096 weights and a bias.
    assert sum(parameter.numel() for parameter in model.parameters()) == 27_655_936 + 33_558_528


def test_c3d_equals_numpy_reference(tiny: C3D) -> None:
    """Compare with a forward pass in NumPy, from the published description."""
    rng = np.random.default_rng(0)
    tiny.mean = torch.tensor([100.0, 90.0, 80.0]).reshape(3, 1, 1, 1)
    clip = rng.integers(0, 256, (16, 112, 112, 3), dtype=np.uint8)
    state = {name: value.numpy() for name, value in tiny.state_dict().items()}

    def convolved(x: np.ndarray, layer: str) -> np.ndarray:
        weight, bias = state[f"conv{layer}.weight"], state[f"conv{layer}.bias"]
        padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (1, 1)))
        time, height, width = x.shape[1:]
        total = np.zeros((len(weight), time, height, width)) + bias[:, None, None, None]
        for t, h, w in np.ndindex(3, 3, 3):
            part = padded[:, t : t + time, h : h + height, w : w + width]
            total += np.tensordot(weight[:, :, t, h, w], part, 1)
        return np.maximum(total, 0)

    def pooled(x: np.ndarray, time: int) -> np.ndarray:
        channels, length, height, width = x.shape
        parts = x.reshape(channels, length // time, time, height // 2, 2, width // 2, 2)
        return parts.max(axis=(2, 4, 6))

    x = (clip.astype(float) - [100, 90, 80]).transpose(3, 0, 1, 2)
    x = pooled(convolved(x, "1a"), 1)
    x = pooled(convolved(x, "2a"), 2)
    x = pooled(convolved(convolved(x, "3a"), "3b"), 2)
    x = pooled(convolved(convolved(x, "4a"), "4b"), 2)
    x = np.pad(convolved(convolved(x, "5a"), "5b"), ((0, 0), (0, 0), (1, 1), (1, 1)), constant_values=-np.inf)
    # 7 and one on each side are 9, so that pooling ignores the last row and column.
    x = pooled(x[:, :, :8, :8], 2)
    expected = np.maximum(state["fc6.weight"] @ x.ravel() + state["fc6.bias"], 0)
    with torch.inference_mode():
        actual = tiny(torch.from_numpy(clip)[None]).numpy()[0]
    assert actual == pytest.approx(expected, rel=1e-4, abs=1e-4)
    assert (actual > 0).any()


@pytest.mark.parametrize("name", LAYOUTS)
def test_published_layouts_convert_to_one_checkpoint_format(
    tmp_path: Path, tiny: C3D, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    LAYOUTS[name](tiny, tmp_path / name)
    converted = convert(tmp_path / name, tmp_path / "c3d.pt")
    loaded = load_extractor(tmp_path / "c3d.pt")
    assert is_extractor_file(tmp_path / "c3d.pt")
    assert loaded.config == converted.config == TINY
    assert loaded.mean == MEANS["plain" if name == "c3d.pickle" else "mmaction2"]
    assert list(loaded.sources) == [name]
    for key, value in tiny.state_dict().items():
        assert torch.equal(loaded.weights[key], value), key
    assert "2, 3, 4, 4, 5, 5, 6, 6" in capsys.readouterr().out
    manifest = loaded.manifest({"c3d.pt": "0"})
    assert (manifest.dim, manifest.window, manifest.stride) == (8, 16, 8)
    assert (manifest.resize, manifest.crop) == ((128, 171), (112, 112))


@pytest.mark.parametrize(
    ("code", "name", "tensor"),
    [
        ("missing_tensor", "conv3b.bias", None),
        ("tensor_mismatch", "conv4a.weight", torch.ones(5, 9, 3, 3, 3)),
        ("tensor_mismatch", "fc6.weight", torch.ones(8, 54)),
        ("impossible_weights", "fc6.bias", torch.full((8,), torch.nan)),
        ("impossible_weights", "conv1.weight", torch.ones(2, 3, 3, 3, 3, dtype=torch.int8)),
    ],
)
def test_incomplete_c3d_state_dict_is_rejected(tmp_path: Path, tiny: C3D, code: str, name: str, tensor: Any) -> None:
    state = {**plain_state_dict(tiny), name: tensor}
    if tensor is None:
        del state[name]
    torch.save(state, tmp_path / "c3d.pickle")
    with raises(CheckpointError, code, tmp_path / "c3d.pickle", name):
        convert(tmp_path / "c3d.pickle", tmp_path / "c3d.pt")
    assert os.listdir(tmp_path) == ["c3d.pickle"]


def test_plain_weights_swap_bgr_to_rgb_and_have_no_stage(tmp_path: Path, tiny: C3D) -> None:
    source = tmp_path / "c3d.pickle"
    LAYOUTS["c3d.pickle"](tiny, source)
    with raises(CheckpointError, "inapplicable_option", source, "--stage"):
        convert(source, tmp_path / "c3d.pt", stage=1)
    model = convert(source, tmp_path / "c3d.pt").model()
    clip = torch.randint(0, 256, (1, 16, 112, 112, 3), dtype=torch.uint8)
    weights = plain_state_dict(tiny)
    with torch.inference_mode():
        bgr = clip.flip(-1).permute(0, 4, 1, 2, 3) - torch.tensor([90.25, 97.66, 101.41]).reshape(3, 1, 1, 1)
        expected = torch.nn.functional.conv3d(bgr, weights["conv1.weight"], weights["conv1.bias"], padding=1)
        actual = model.conv1a(clip.permute(0, 4, 1, 2, 3) - model.mean)
    assert torch.allclose(actual, expected, atol=1e-3)


def test_damaged_c3d_checkpoint_is_rejected(tmp_path: Path, tiny: C3D) -> None:
    LAYOUTS["c3d.pickle"](tiny, tmp_path / "c3d.pickle")
    checkpoint = convert(tmp_path / "c3d.pickle", tmp_path / "c3d.pt")
    content = torch.load(tmp_path / "c3d.pt", weights_only=True)
    del content["digest"]
    for change, code in (
        ({"format": "other"}, "unknown_format"),
        ({"mean": [1.0]}, "damaged_file"),
        ({"weights": {}}, "tensor_mismatch"),
        ({"config": {"widths": [1], "dim": 8}}, "damaged_file"),
    ):
        torch.save({**content, **change}, tmp_path / "c3d.pt")
        with raises(CheckpointError, code, tmp_path / "c3d.pt"):
            load_extractor(tmp_path / "c3d.pt")
    save_extractor(tmp_path / "c3d.pt", checkpoint)
    assert load_extractor(tmp_path / "c3d.pt").config == TINY
    assert not is_extractor_file(tmp_path / "none.pt")
