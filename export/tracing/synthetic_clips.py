"""Make clips of a shape from a seed, on which two extractors are compared."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from runtime.artifacts.extractor_manifest import ExtractorManifest

if TYPE_CHECKING:
    pass


def synthetic_clips(manifest: ExtractorManifest) -> Iterator[np.ndarray]:
    """Yield clips one by one, (1, window, height, width, 3) uint8: three as smooth as pictures, noise, white, black."""
    shape = 1, manifest.window, *manifest.crop, 3
    rng = np.random.default_rng(0)
    for _ in range(3):
        yield smooth_clips(rng, shape)
    yield rng.integers(0, 256, shape, dtype=np.uint8)
    yield np.full(shape, 255, np.uint8)
    yield np.zeros(shape, np.uint8)


def smooth_clips(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Return clips of a shape, smooth in space and time as pictures are, and of full contrast."""
    size, window, height, width, colours = shape
    coarse = rng.integers(0, 256, (size, -(-window // 4), -(-height // 8), -(-width // 8), colours), dtype=np.uint8)
    return np.ascontiguousarray(coarse.repeat(4, 1).repeat(8, 2).repeat(8, 3)[:, :window, :height, :width])
