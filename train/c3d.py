"""Define C3D, the network behind the published clip features, and read and write its checkpoints.

Source: Tran et al., Learning Spatiotemporal Features with 3D Convolutional Networks (ICCV 2015). The features are the
outputs of fc6 after its ReLU.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from runtime.artifacts.extractor_manifest import FORMAT, ExtractorManifest
from runtime.core.errors import CheckpointError, excerpt, one_line
from runtime.core.io import torch_reader
from runtime.core.io.text_files import check_format
from train.checkpoints import load, save

WINDOW, STRIDE = 16, 8
RESIZE, CROP = (128, 171), (112, 112)
# The tensor sizes of larger networks overflow 64 bits.
MAX_CHANNELS = 1 << 20
LAYERS = ("1a", "2a", "3a", "3b", "4a", "4b", "5a", "5b")

Layout = Literal["plain", "mmaction2"]

# Means of the frames that each layout was trained on, in the order red, green, blue.
# plain: Caffe's Sports-1M weights, trained on BGR frames. Source: sport1m_train16_128_mean.binaryproto of facebook/C3D;
# its means are in issue 1 of DavideA/c3d-pytorch.
# mmaction2: RGB frames. Source: data_preprocessor in configs/recognition/c3d of mmaction2.
MEANS: Mapping[Layout, tuple[float, float, float]] = {
    "plain": (101.41, 97.66, 90.25),
    "mmaction2": (104.0, 117.0, 128.0),
}


@dataclasses.dataclass(frozen=True)
class C3DConfig:
    """Sizes of a C3D.

    Attributes:
        widths: output channels of the eight convolutions.
        dim: channels D of the features.
    """

    widths: tuple[int, ...] = (64, 128, 256, 256, 512, 512, 512, 512)
    dim: int = 4096

    def __post_init__(self) -> None:
        object.__setattr__(self, "widths", tuple(self.widths))
        sizes = (*self.widths, self.dim)
        if len(self.widths) != len(LAYERS) or not all(
            type(size) is int and 1 <= size <= MAX_CHANNELS for size in sizes
        ):
            raise ValueError(
                f"expected {len(LAYERS)} convolutions and features of 1 to {MAX_CHANNELS} channels each, got "
                f"{excerpt(sizes)}"
            )


class C3D(nn.Module):
    """Eight 3x3x3 convolutions, five max poolings, and one linear layer.

    The first pooling keeps the time axis. The last pads height and width by 1 on each side, so that 7 becomes 4.
    """

    mean: Tensor

    def __init__(self, config: C3DConfig, mean: tuple[float, float, float]) -> None:
        super().__init__()
        self.config = config
        self.register_buffer("mean", torch.tensor(mean).reshape(3, 1, 1, 1), persistent=False)
        for layer, inputs, outputs in zip(LAYERS, (3, *config.widths[:-1]), config.widths, strict=True):
            setattr(self, f"conv{layer}", nn.Conv3d(inputs, outputs, 3, padding=1))
        self.pool1 = nn.MaxPool3d((1, 2, 2))
        self.pool2 = nn.MaxPool3d(2)
        self.pool3 = nn.MaxPool3d(2)
        self.pool4 = nn.MaxPool3d(2)
        self.pool5 = nn.MaxPool3d(2, padding=(0, 1, 1))
        self.fc6 = nn.Linear(config.widths[-1] * 4 * 4, config.dim)

    def forward(self, clips: Tensor) -> Tensor:
        """Return (N, D) features of (N, 16, 112, 112, 3) clips in RGB from 0 to 255, of any number type."""
        # The cast comes first because TensorRT accepts uint8 inputs only into a cast.
        x = clips.to(self.mean.dtype).permute(0, 4, 1, 2, 3) - self.mean
        x = self.pool1(functional.relu(self.conv1a(x)))
        x = self.pool2(functional.relu(self.conv2a(x)))
        x = functional.relu(self.conv3a(x))
        x = self.pool3(functional.relu(self.conv3b(x)))
        x = functional.relu(self.conv4a(x))
        x = self.pool4(functional.relu(self.conv4b(x)))
        x = functional.relu(self.conv5a(x))
        x = self.pool5(functional.relu(self.conv5b(x)))
        return functional.relu(self.fc6(x.flatten(1)))


@dataclasses.dataclass(frozen=True)
class C3DCheckpoint:
    """The content of a `c3d.pt`: weights for RGB frames, and the mean (red, green, blue) to subtract from them."""

    config: C3DConfig
    mean: tuple[float, float, float]
    weights: Mapping[str, Tensor]
    sources: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def model(self) -> C3D:
        """Return the network in evaluation mode, on the CPU."""
        model = C3D(self.config, self.mean)
        model.load_state_dict(dict(self.weights))
        return model.eval()

    def manifest(self, sources: Mapping[str, str]) -> ExtractorManifest:
        """Return the manifest of a model file exported from this checkpoint."""
        return ExtractorManifest(
            kind="C3D",
            dim=self.config.dim,
            window=WINDOW,
            stride=STRIDE,
            resize=RESIZE,
            crop=CROP,
            mean=self.mean,
            sources={**self.sources, **sources},
        )


def save_c3d(path: Path, checkpoint: C3DCheckpoint) -> None:
    """Write a `c3d.pt` atomically."""
    save(
        path,
        {
            "format": FORMAT,
            "kind": "C3D",
            "config": {"widths": list(checkpoint.config.widths), "dim": checkpoint.config.dim},
            "mean": [float(value) for value in checkpoint.mean],
            "sources": dict(checkpoint.sources),
            "weights": dict(checkpoint.weights),
        },
    )


def load_c3d(path: Path) -> C3DCheckpoint:
    """Read a `c3d.pt` without running code in it.

    Raises:
        CheckpointError: the file is missing, damaged, or not a `c3d.pt`.
    """
    content = load(path)
    check_format(
        content, FORMAT, f"{path}", CheckpointError, "convert published weights with `python -m train.convert`"
    )
    if content.get("kind") != "C3D":
        raise CheckpointError(
            f"{path}: expected the kind 'C3D', got {excerpt(content.get('kind'))}. Convert published weights with "
            "`python -m train.convert`.",
            code="unknown_format",
        )
    try:
        red, green, blue = map(_number, content["mean"])
        config = C3DConfig(tuple(content["config"]["widths"]), content["config"]["dim"])
        checkpoint = C3DCheckpoint(config, (red, green, blue), content["weights"], dict(content["sources"]))
    # A damaged file may contain values of any type.
    except Exception as error:
        raise CheckpointError(
            f"{path} is damaged ({type(error).__name__}: {one_line(error)}). Convert it again.",
            code="damaged_file",
        ) from error
    check_c3d_weights(checkpoint.weights, config, str(path))
    return checkpoint


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise TypeError(f"expected finite numbers in the mean, got {excerpt(value)}")
    return float(value)


def is_c3d_file(path: Path) -> bool:
    """Return whether a file is a `c3d.pt`, without reading tensors; False if it cannot be opened."""
    try:
        torch_reader.check(path)
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    # The reader that loads the file reports the error.
    except Exception:
        return False
    return isinstance(content, dict) and content.get("format") == FORMAT


def published_layout(names: Mapping[str, Any]) -> Layout | None:
    """Return the code base that uses these tensor names, or None if they are not those of a C3D."""
    if any(re.fullmatch(r"(backbone\.)?conv1a\.conv\.weight", name) for name in names):
        return "mmaction2"
    return "plain" if "conv1.weight" in names and "fc6.weight" in names else None


def from_published(
    arrays: Mapping[str, np.ndarray], layout: Layout, source: str, sources: Mapping[str, str]
) -> C3DCheckpoint:
    """Convert a published state dict to a C3D for RGB frames, without the layers after fc6.

    Args:
        arrays: state dict, name to array.
        layout: code base whose names it has. The plain weights expect BGR frames, so their first layer is flipped.
        source: name of the file in messages.
        sources: {file name: SHA-256} to record.

    Raises:
        CheckpointError: a tensor is missing, has the wrong shape, or contains other values than finite floats.
    """
    weights: dict[str, Tensor] = {}
    plain_names = {"1a": "1", "2a": "2"}
    for layer in LAYERS:
        published = f"conv{layer}.conv" if layout == "mmaction2" else f"conv{plain_names.get(layer, layer)}"
        for kind in ("weight", "bias"):
            weights[f"conv{layer}.{kind}"] = _tensor(arrays, f"{published}.{kind}", source)
    for kind in ("weight", "bias"):
        weights[f"fc6.{kind}"] = _tensor(arrays, f"fc6.{kind}", source)
    if layout == "plain":
        weights["conv1a.weight"] = weights["conv1a.weight"].flip(1).contiguous()
    widths = tuple(len(weights[f"conv{layer}.bias"]) for layer in LAYERS)
    config = C3DConfig(widths, len(weights["fc6.bias"]))
    check_c3d_weights(weights, config, source)
    return C3DCheckpoint(config, MEANS[layout], weights, sources)


def _tensor(arrays: Mapping[str, np.ndarray], name: str, source: str) -> Tensor:
    array = arrays.get(name, arrays.get(f"backbone.{name}"))
    if array is None:
        raise CheckpointError(f"{source} is a C3D without {name}. Pass the complete checkpoint.", code="missing_tensor")
    if array.dtype.kind != "f" or not array.size or not np.isfinite(array).all():
        raise CheckpointError(
            f"{source}: expected finite floating-point weights, got other values in {name}. Pass an undamaged "
            "checkpoint.",
            code="impossible_weights",
        )
    return torch.from_numpy(np.array(array, np.float32, order="C"))


def check_c3d_weights(weights: Any, config: C3DConfig, source: str) -> None:
    """Raise CheckpointError unless the names and shapes of `weights` are those of a C3D of these sizes."""
    if not isinstance(weights, Mapping) or not all(isinstance(tensor, Tensor) for tensor in weights.values()):
        raise CheckpointError(
            f"{source} is damaged: its weights are not named tensors. Convert it again.", code="damaged_file"
        )
    with torch.device("meta"):
        expected = {name: tuple(tensor.shape) for name, tensor in C3D(config, (0.0, 0.0, 0.0)).state_dict().items()}
    for name in {**expected, **weights}:
        actual = tuple(weights[name].shape) if name in weights else None
        if actual != expected.get(name):
            raise CheckpointError(
                f"{source}: expected {expected.get(name) or 'no tensor'} for {name} of a C3D, got "
                f"{actual or 'no tensor'}. Convert it again.",
                code="tensor_mismatch",
            )
