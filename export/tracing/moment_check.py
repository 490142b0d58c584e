"""Compare the moments that a graph returns with those that the runtime decodes from its heads."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from calib.graph.moments import COUNT
from calib.graph.onnx_session import open_session
from export.tracing.torch_check import validation_batches
from runtime.artifacts.manifest import Manifest
from runtime.core.batch import DURATION, HEAD_NAMES, MOMENT_COUNT, MOMENTS, Heads
from runtime.core.decoding import decode
from runtime.core.errors import CheckFailed

if TYPE_CHECKING:
    from train.network.model import DRNConfig

TOLERANCE = 1e-5
"""Maximum difference of times, relative to the duration, and of scores: the exponential functions of ONNX Runtime and
NumPy differ by up to 2 units in the last place, which is 2.4e-7 of a score, and float32 seconds are rounded once."""

MAX_SHARE = 0.05
"""Maximum share of random queries with other moments. Scores of an untrained network may differ by so little that
rounding changes their order; a wrong graph changes nearly all moments."""


def check_moments(path: Path, config: DRNConfig, manifest: Manifest) -> None:
    """Check the moments of an ONNX file on random queries and videos.

    Args:
        path: .onnx file of `calib.graph.moments.with_moments`.

    Raises:
        CheckFailed: the moments of more than `MAX_SHARE` of the queries differ from those of the runtime.
    """
    session = open_session(path, optimized=True)
    outputs = [*HEAD_NAMES, MOMENTS, MOMENT_COUNT]
    equal: list[bool] = []
    for batch in validation_batches(config, manifest.max_query_length):
        durations = np.linspace(5, 200, len(batch), dtype=np.float32)
        *heads, moments, counts = session.run(outputs, {**vars(batch), DURATION: durations})
        expected = decode_moments(Heads(*heads), manifest, durations)
        equal += equal_moments((moments, counts), expected, durations).tolist()
    different = len(equal) - sum(equal)
    if different > MAX_SHARE * len(equal):
        raise CheckFailed(
            f"The graph returns other moments than the runtime for {different} of {len(equal)} random queries. No file "
            "was written. Try another version of ONNX Runtime.",
            code="parity_failed",
        )


def decode_moments(heads: Heads, manifest: Manifest, durations: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return what the graph should return for B queries, computed by the runtime.

    Args:
        heads: heads of the B queries, all finite.
        durations: (B,) float32 seconds.

    Returns:
        Moments (B, K, 3), zeros after the last, and their numbers (B,); 0 if the model's no-match threshold is not met.
    """
    picks = decode(heads, manifest.decoding, COUNT)
    counts = (~np.isnan(picks[..., 2])).sum(axis=1)
    if manifest.presence:
        is_fallback = (picks[:, 0] == (0, 1, 1)).all(axis=1)
        counts[is_fallback | (picks[:, 0, 2] < np.float32(manifest.presence.threshold))] = 0
    moments = np.nan_to_num(picks)
    moments[..., :2] *= durations[:, None, None]
    return moments, counts


def equal_moments(
    actual: tuple[np.ndarray, np.ndarray], expected: tuple[np.ndarray, np.ndarray], durations: np.ndarray
) -> np.ndarray:
    """Return for each of B queries whether moments and their number are equal within `TOLERANCE`, (B,) bool.

    Args:
        actual, expected: moments (B, K, 3) and their numbers (B,).
        durations: (B,) seconds.
    """
    scale = np.stack((durations, durations, np.ones_like(durations)), axis=1)[:, None]
    close = (np.abs(actual[0] - expected[0]) <= TOLERANCE * scale).all(axis=(1, 2))
    return close & (actual[1] == expected[1])
