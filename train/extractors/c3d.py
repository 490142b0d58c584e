"""Define C3D, a network behind published clip features, and read its published weights.

Source: Tran et al., Learning Spatiotemporal Features with 3D Convolutional Networks (ICCV 2015). The features are the
outputs of fc6 after its ReLU.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from train.extractors.published import ClipInput, ExtractorCheckpoint, Mean, as_tensor, check_sizes, published_array

WINDOW = 16
CROP = (112, 112)
LAYERS = ("1a", "2a", "3a", "3b", "4a", "4b", "5a", "5b")

Layout = Literal["plain", "mmaction2"]

# Means of the frames that each layout was trained on, in the order red, green, blue.
# plain: Caffe's Sports-1M weights, trained on BGR frames. Source: sport1m_train16_128_mean.binaryproto of facebook/C3D;
# its means are in issue 1 of DavideA/c3d-pytorch.
# mmaction2: RGB frames. Source: data_preprocessor in configs/recognition/c3d of mmaction2.
MEANS: Mapping[Layout, Mean] = {
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

    # fc6 reads all positions of a clip, so its length is fixed.
    INPUT: ClassVar[ClipInput] = ClipInput((WINDOW, WINDOW), (128, 171), CROP)
    KIND: ClassVar[str] = "C3D"

    widths: tuple[int, ...] = (64, 128, 256, 256, 512, 512, 512, 512)
    dim: int = 4096

    def __post_init__(self) -> None:
        object.__setattr__(self, "widths", tuple(self.widths))
        check_sizes((*self.widths, self.dim), len(LAYERS) + 1)

    @property
    def summary(self) -> str:
        """The sizes as text."""
        return f"convolutions {', '.join(map(str, self.widths))}"

    def network(self, mean: Mean) -> C3D:
        """Return a network of these sizes with random weights."""
        return C3D(self, mean)


class C3D(nn.Module):
    """Eight 3x3x3 convolutions, five max poolings, and one linear layer.

    The first pooling keeps the time axis. The last pads height and width by 1 on each side, so that 7 becomes 4.
    """

    mean: Tensor

    def __init__(self, config: C3DConfig, mean: Mean) -> None:
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


def published_layout(names: Mapping[str, Any]) -> Layout | None:
    """Return the code base that uses these tensor names, or None if they are not those of a C3D."""
    if any(re.fullmatch(r"(backbone\.)?conv1a\.conv\.weight", name) for name in names):
        return "mmaction2"
    return "plain" if "conv1.weight" in names and "fc6.weight" in names else None


def from_published(arrays: Mapping[str, np.ndarray], source: str) -> ExtractorCheckpoint:
    """Convert a published state dict, of a layout of `published_layout`, to a C3D for RGB frames.

    The layers after fc6 are left out. The plain weights expect BGR frames, so their first layer is flipped.

    Raises:
        CheckpointError: a tensor is missing, or contains other values than finite floats.
    """
    layout = published_layout(arrays)
    assert layout is not None
    prefix = "backbone." if any(name.startswith("backbone.") for name in arrays) else ""
    plain_names = {"1a": "1", "2a": "2"}
    published = {"fc6": "fc6"}
    for layer in LAYERS:
        published[f"conv{layer}"] = (
            f"conv{layer}.conv" if layout == "mmaction2" else f"conv{plain_names.get(layer, layer)}"
        )
    weights: dict[str, Tensor] = {}
    for module, name in published.items():
        for kind in ("weight", "bias"):
            array = published_array(arrays, f"{prefix}{name}.{kind}", source, "C3D")
            weights[f"{module}.{kind}"] = as_tensor(array)
    if layout == "plain":
        weights["conv1a.weight"] = weights["conv1a.weight"].flip(1).contiguous()
    config = C3DConfig(tuple(len(weights[f"conv{layer}.bias"]) for layer in LAYERS), len(weights["fc6.bias"]))
    owner = {"mmaction2": "mmaction2's", "plain": "the plain"}[layout]
    return ExtractorCheckpoint(config, MEANS[layout], weights, layout=f"{owner} layout")
