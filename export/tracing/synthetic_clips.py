"""Generate clips on which two feature extractors are compared."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from runtime.artifacts.extractor_manifest import ExtractorManifest


def synthetic_clips(manifest: ExtractorManifest) -> Iterator[np.ndarray]:
    """Yield single clips, (1, window, height, width, 3) uint8: three smooth ones, noise, white, black.

    The clips are the same in every call.
    """
    shape = 1, manifest.window, *manifest.crop, 3
    rng = np.random.default_rng(0)
    for _ in range(3):
        yield smooth_clips(rng, shape)
    yield rng.integers(0, 256, shape, dtype=np.uint8)
    yield np.full(shape, 255, np.uint8)
    yield np.zeros(shape, np.uint8)


def smooth_clips(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Return (N, window, height, width, 3) uint8 clips of full contrast, constant in 4 frames and 8 x 8 pixels."""
    size, window, height, width, colors = shape
    coarse = rng.integers(0, 256, (size, -(-window // 4), -(-height // 8), -(-width // 8), colors), dtype=np.uint8)
    return np.ascontiguousarray(coarse.repeat(4, 1).repeat(8, 2).repeat(8, 3)[:, :window, :height, :width])
