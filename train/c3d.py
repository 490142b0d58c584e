"""C3D, the network behind the published clip features: its layers in order, its checkpoints, and published weights.

Source: Tran et al., Learning Spatiotemporal Features with 3D Convolutional Networks (ICCV 2015). Features are those of
fc6 after its ReLU.
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
# Tensors of larger networks have sizes that do not fit 64 bits.
MAX_CHANNELS = 1 << 20
LAYERS = ("1a", "2a", "3a", "3b", "4a", "4b", "5a", "5b")

Layout = Literal["plain", "mmaction2"]

# What each layout's weights were trained on, in the order red, green, blue.
# plain: Caffe's Sports-1M weights, which met OpenCV's blue-green-red frames less a mean volume; its mean over the
# volume is 90.25, 97.66, 101.41 in that order. Source: sport1m_train16_128_mean.binaryproto of facebook/C3D; its means
# in DavideA/c3d-pytorch, issue 1.
# mmaction2: RGB frames less 104, 117, 128. Source: configs/recognition/c3d of mmaction2, its data_preprocessor.
MEANS: Mapping[Layout, tuple[float, float, float]] = {
    "plain": (101.41, 97.66, 90.25),
    "mmaction2": (104.0, 117.0, 128.0),
}


@dataclasses.dataclass(frozen=True)
class C3DConfig:
    """The shape of a C3D.

    Attributes:
        widths: channels of the eight convolutions.
        dim: D, of the features.
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
                f"a C3D has {len(LAYERS)} convolutions and features of 1 to {MAX_CHANNELS} channels each, and "
                f"{excerpt(sizes)} was given"
            )


class C3D(nn.Module):
    """Eight 3x3x3 convolutions, five poolings, one linear layer.

    The first pooling leaves time alone; the last pads one row and column of each side, so that 7 becomes 4.
    """

    mean: Tensor

    def __init__(self, config: C3DConfig, mean: tuple[float, float, float]) -> None:
        super().__init__()
        self.config = config
        self.register_buffer("mean", torch.tensor(mean).reshape(3, 1, 1, 1), persistent=False)
        channels = (3, *config.widths)
        for layer, taken, given in zip(LAYERS, channels, channels[1:], strict=False):
            setattr(self, f"conv{layer}", nn.Conv3d(taken, given, 3, padding=1))
        self.pool1 = nn.MaxPool3d((1, 2, 2))
        self.pool2 = nn.MaxPool3d(2)
        self.pool3 = nn.MaxPool3d(2)
        self.pool4 = nn.MaxPool3d(2)
        self.pool5 = nn.MaxPool3d(2, padding=(0, 1, 1))
        self.fc6 = nn.Linear(config.widths[-1] * 4 * 4, config.dim)

    def forward(self, clips: Tensor) -> Tensor:
        """Return (N, D) features of clips, (N, 16, 112, 112, 3) in RGB from 0 to 255, of any type of number."""
        # Numbers first: TensorRT takes bytes into a cast and into nothing else.
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
    """The content of a `c3d.pt`: the weights, for RGB frames, and the mean to subtract from the frames."""

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
        """Return what a file made of this checkpoint says of itself."""
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
    """Write a `c3d.pt`, whole or not at all."""
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
    """Read a `c3d.pt`; CheckpointError if it is none. Nothing in it is run."""
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
    # The values of a damaged file are of any kind, tensors among them.
    except Exception as error:
        raise CheckpointError(
            f"{path} is damaged ({type(error).__name__}: {one_line(error)}); convert it again.",
            code="damaged_file",
        ) from error
    check_c3d_weights(checkpoint.weights, config, str(path))
    return checkpoint


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise TypeError(f"the mean should be finite numbers, and {excerpt(value)} is one of them")
    return float(value)


def is_c3d_file(path: Path) -> bool:
    """Return whether a torch file is a `c3d.pt`, without reading tensors; False for files that cannot be opened."""
    try:
        torch_reader.check(path)
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    # Whoever opens the file in earnest says what is wrong with it.
    except Exception:
        return False
    return isinstance(content, dict) and content.get("format") == FORMAT


def published_layout(names: Mapping[str, Any]) -> Layout | None:
    """Return whose names these are, or None if they are of no C3D."""
    if any(re.fullmatch(r"(backbone\.)?conv1a\.conv\.weight", name) for name in names):
        return "mmaction2"
    return "plain" if "conv1.weight" in names and "fc6.weight" in names else None


def from_published(
    arrays: Mapping[str, np.ndarray], layout: Layout, source: str, sources: Mapping[str, str]
) -> C3DCheckpoint:
    """Return the C3D of a published state dict, its first layer turned to RGB where it was trained on BGR.

    Layers after fc6 are left out.

    Raises:
        CheckpointError: a tensor is missing, misshapen, or holds no finite floats.
    """
    weights: dict[str, Tensor] = {}
    for layer in LAYERS:
        theirs = (
            f"conv{layer}.conv"
            if layout == "mmaction2"
            else f"conv{'1' if layer == '1a' else '2' if layer == '2a' else layer}"
        )
        for kind in ("weight", "bias"):
            weights[f"conv{layer}.{kind}"] = _tensor(arrays, f"{theirs}.{kind}", source)
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
        raise CheckpointError(
            f"{source} looks like a C3D and lacks {name}; give the whole checkpoint.", code="missing_tensor"
        )
    if array.dtype.kind != "f" or not array.size or not np.isfinite(array).all():
        raise CheckpointError(
            f"{source} should hold finite floating-point weights, and does not in {name}.", code="impossible_weights"
        )
    return torch.from_numpy(np.array(array, np.float32, order="C"))


def check_c3d_weights(weights: Any, config: C3DConfig, source: str) -> None:
    """Raise CheckpointError, naming a tensor, unless `weights` has just the tensors of such a network."""
    if not isinstance(weights, Mapping) or not all(isinstance(tensor, Tensor) for tensor in weights.values()):
        raise CheckpointError(
            f"{source} is damaged: its weights are not named tensors; convert it again.", code="damaged_file"
        )
    with torch.device("meta"):
        expected = {name: tuple(tensor.shape) for name, tensor in C3D(config, (0.0, 0.0, 0.0)).state_dict().items()}
    for name in {**expected, **weights}:
        result = tuple(weights[name].shape) if name in weights else None
        if result != expected.get(name):
            raise CheckpointError(
                f"The tensors of {source} are not those of a C3D of its size: {name} is {result or 'missing'} and "
                f"should be {expected.get(name) or 'left out'}.",
                code="tensor_mismatch",
            )
