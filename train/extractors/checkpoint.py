"""Read and write the checkpoints of clip feature extractors, `c3d.pt` and `i3d.pt`, and recognize published ones."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from runtime.artifacts.extractor_manifest import FORMAT, ExtractorManifest
from runtime.core.errors import CheckpointError, excerpt, one_line
from runtime.core.io import torch_reader
from runtime.core.io.text_files import check_format
from runtime.core.pooling import ClipTiming
from train.checkpoints import load, save
from train.extractors import c3d, i3d
from train.extractors.published import ExtractorConfig, Mean

CONFIGS: Mapping[str, type[c3d.C3DConfig | i3d.I3DConfig]] = {
    config.KIND: config for config in (c3d.C3DConfig, i3d.I3DConfig)
}
_ADVICE = "convert published weights with `python -m train.convert`"


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


def save_extractor(path: Path, checkpoint: ExtractorCheckpoint) -> None:
    """Write a `c3d.pt` or `i3d.pt` atomically."""
    save(
        path,
        {
            "format": FORMAT,
            "kind": checkpoint.config.KIND,
            # As lists, because JSON has no tuples.
            "config": json.loads(json.dumps(dataclasses.asdict(checkpoint.config))),  # type: ignore[call-overload]
            "mean": [float(value) for value in checkpoint.mean],
            "sources": dict(checkpoint.sources),
            "weights": dict(checkpoint.weights),
        },
    )


def load_extractor(path: Path) -> ExtractorCheckpoint:
    """Read a `c3d.pt` or `i3d.pt` without running code in it.

    Raises:
        CheckpointError: the file is missing, damaged, or not the checkpoint of an extractor.
    """
    content = load(path)
    check_format(content, FORMAT, f"{path}", CheckpointError, _ADVICE)
    kind = content.get("kind")
    if not isinstance(kind, str) or kind not in CONFIGS:
        raise CheckpointError(
            f"{path}: expected the kind {' or '.join(CONFIGS)}, got {excerpt(kind)}. Convert published weights with "
            "`python -m train.convert`.",
            code="unknown_format",
        )
    try:
        red, green, blue = map(_number, content["mean"])
        config = CONFIGS[kind](**content["config"])
        checkpoint = ExtractorCheckpoint(config, (red, green, blue), content["weights"], dict(content["sources"]))
    # A damaged file may contain values of any type.
    except Exception as error:
        raise CheckpointError(
            f"{path} is damaged ({type(error).__name__}: {one_line(error)}). Convert it again.",
            code="damaged_file",
        ) from error
    check_extractor_weights(checkpoint.weights, config, str(path))
    return checkpoint


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise TypeError(f"expected finite numbers in the mean, got {excerpt(value)}")
    return float(value)


def is_extractor_file(path: Path) -> bool:
    """Return whether a file is a `c3d.pt` or `i3d.pt`, without reading tensors; False if it cannot be opened."""
    try:
        torch_reader.check(path)
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    # The reader that loads the file reports the error.
    except Exception:
        return False
    return isinstance(content, dict) and content.get("format") == FORMAT


def is_published_extractor(names: Mapping[str, Any]) -> bool:
    """Return whether these are the tensor names of a published C3D or I3D."""
    return i3d.is_published(names) or c3d.published_layout(names) is not None


def from_published(arrays: Mapping[str, np.ndarray], source: str, sources: Mapping[str, str]) -> ExtractorCheckpoint:
    """Convert a published state dict.

    Args:
        arrays: state dict, name to array, for which `is_published_extractor` is true.
        source: name of the file in messages.
        sources: {file name: SHA-256} to record.

    Raises:
        CheckpointError: a tensor is missing, has the wrong shape, or contains other values than finite floats.
    """
    published = (i3d if i3d.is_published(arrays) else c3d).from_published(arrays, source)
    check_extractor_weights(published.weights, published.config, source)
    return ExtractorCheckpoint(published.config, published.mean, published.weights, sources, published.layout)


def check_extractor_weights(weights: Any, config: ExtractorConfig, source: str) -> None:
    """Raise CheckpointError unless the names and shapes of `weights` are those of a network of these sizes."""
    if not isinstance(weights, Mapping) or not all(isinstance(tensor, Tensor) for tensor in weights.values()):
        raise CheckpointError(
            f"{source} is damaged: its weights are not named tensors. Convert it again.", code="damaged_file"
        )
    with torch.device("meta"):
        expected = {name: tuple(tensor.shape) for name, tensor in config.network((0.0,) * 3).state_dict().items()}
    for name in {**expected, **weights}:
        actual = tuple(weights[name].shape) if name in weights else None
        if actual != expected.get(name):
            raise CheckpointError(
                f"{source}: expected {expected.get(name) or 'no tensor'} for {name} of {config.KIND}, got "
                f"{actual or 'no tensor'}. Convert it again.",
                code="tensor_mismatch",
            )
        if not weights[name].isfinite().all():
            raise CheckpointError(
                f"{source}: expected finite weights, got other values in {name}. Convert it again.",
                code="impossible_weights",
            )
