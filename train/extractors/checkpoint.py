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

from runtime.artifacts.extractor_manifest import FORMAT
from runtime.core.errors import CheckpointError, excerpt, one_line
from runtime.core.io import torch_reader
from runtime.core.io.text_files import check_format
from train.checkpoints import check_weights, load, save
from train.extractors import c3d, i3d
from train.extractors.published import ExtractorCheckpoint

CONFIGS: Mapping[str, type[c3d.C3DConfig | i3d.I3DConfig]] = {
    config.KIND: config for config in (c3d.C3DConfig, i3d.I3DConfig)
}
_ADVICE = "convert published weights with `python -m train.convert`"


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
    _check_weights(checkpoint, str(path))
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
    _check_weights(published, source)
    return dataclasses.replace(published, sources=sources)


def _check_weights(checkpoint: ExtractorCheckpoint, source: str) -> None:
    check_weights(checkpoint.weights, lambda: checkpoint.config.network(checkpoint.mean), source)
