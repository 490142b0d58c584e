"""Define what the networks behind clip features share, and read single tensors of their published checkpoints."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import ClassVar, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from runtime.artifacts.extractor_manifest import ExtractorManifest
from runtime.core.errors import CheckpointError, excerpt
from runtime.core.pooling import ClipTiming

# Means of red, green and blue, for pixels from 0 to 255.
Mean = tuple[float, float, float]
# The tensor sizes of larger networks overflow 64 bits.
MAX_CHANNELS = 1 << 20


@dataclasses.dataclass(frozen=True)
class ClipInput:
    """The clips that a network was trained on.

    Attributes:
        windows: minimum and maximum number of frames of a clip.
        resize: height and width of a frame before the crop, or its shorter side.
        crop: height and width of the crop.
        std: divisor of red, green and blue after the mean is subtracted.
    """

    windows: tuple[int, int]
    resize: tuple[int, int] | int
    crop: tuple[int, int]
    std: Mean = (1.0, 1.0, 1.0)


class ExtractorConfig(Protocol):
    """The sizes of one network; a frozen dataclass whose fields are numbers and tuples of numbers."""

    KIND: ClassVar[str]
    INPUT: ClassVar[ClipInput]

    @property
    def dim(self) -> int:
        """Channels D of the features."""

    @property
    def summary(self) -> str:
        """The sizes as text, such as `convolutions 64, 128`."""

    def network(self, mean: Mean) -> nn.Module:
        """Return a network of these sizes with random weights."""


@dataclasses.dataclass(frozen=True)
class ExtractorCheckpoint:
    """The content of a `c3d.pt` or `i3d.pt`.

    Attributes:
        config: sizes of the network.
        mean: mean of red, green and blue to subtract from frames.
        weights: state dict, for RGB frames.
        sources: {file name: SHA-256} of the published checkpoint.
        layout: description of the layout of the published checkpoint; empty after loading.
    """

    config: ExtractorConfig
    mean: Mean
    weights: Mapping[str, Tensor]
    sources: Mapping[str, str] = dataclasses.field(default_factory=dict)
    layout: str = ""

    def model(self) -> nn.Module:
        """Return the network in evaluation mode, on the CPU."""
        model = self.config.network(self.mean)
        model.load_state_dict(dict(self.weights))
        return model.eval()

    def manifest(self, sources: Mapping[str, str], clock: ClipTiming | None = None) -> ExtractorManifest:
        """Return the manifest of a model file exported from this checkpoint.

        Args:
            sources: {file name: SHA-256} of further files.
            clock: clip timing; None for 16 frames every 8.

        Raises:
            CheckpointError: the network does not accept clips of this length.
        """
        clock, accepted = clock or ClipTiming(), self.config.INPUT
        shortest, longest = accepted.windows
        if not shortest <= clock.window <= longest:
            lengths = f"{shortest}" if shortest == longest else f"{shortest} to {longest}"
            raise CheckpointError(
                f"{self.config.KIND} needs clips of {lengths} frames, got {clock.window}. Correct --clock.",
                code="invalid_option",
            )
        return ExtractorManifest(
            kind=self.config.KIND,
            dim=self.config.dim,
            window=clock.window,
            stride=clock.stride,
            resize=accepted.resize,
            crop=accepted.crop,
            mean=self.mean,
            std=accepted.std,
            sources={**self.sources, **sources},
        )


def check_sizes(sizes: tuple[object, ...], count: int) -> None:
    """Raise ValueError unless `sizes` are `count` numbers of channels."""
    if len(sizes) != count or not all(type(size) is int and 1 <= size <= MAX_CHANNELS for size in sizes):
        raise ValueError(f"expected {count} sizes of 1 to {MAX_CHANNELS} channels, got {excerpt(sizes)}")


def published_array(arrays: Mapping[str, np.ndarray], name: str, source: str, kind: str) -> np.ndarray:
    """Return one array of a published state dict.

    Args:
        arrays: state dict, name to array.
        source: name of the file in messages.
        kind: name of the network in messages.

    Raises:
        CheckpointError: the array is missing, or contains other values than finite floats.
    """
    array = arrays.get(name)
    if array is None:
        raise CheckpointError(
            f"{source} is a checkpoint of {kind} without {name}. Pass the complete checkpoint.", code="missing_tensor"
        )
    if array.dtype.kind != "f" or not array.size or not np.isfinite(array).all():
        raise CheckpointError(
            f"{source}: expected finite floating-point weights, got other values in {name}. Pass an undamaged "
            "checkpoint.",
            code="impossible_weights",
        )
    return array


def as_tensor(array: np.ndarray) -> Tensor:
    """Return a float32 copy of an array as a tensor; values beyond float32 become infinite."""
    with np.errstate(over="ignore"):
        return torch.from_numpy(np.array(array, np.float32, order="C"))
