"""Compare an exported graph with torch on batches of several sizes and every query length."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from calib.graph.onnx_session import open_session
from runtime.core.batch import ENCODED_FEATURES, HEAD_NAMES, INPUT_NAMES, VIDEO_INDEX, Batch
from runtime.core.errors import CheckFailed

if TYPE_CHECKING:
    import onnx

    from train.network.model import DRN, DRNConfig


TOLERANCE = 1e-4
"""Maximum difference between ONNX Runtime and torch, relative to the largest value of an output, or to 1 if that is
smaller. Folded layers round once more, over sums of up to 12,288 products; a tenth of the tolerance is typical."""

BATCH_SIZES = (1, 2, 3, 8, 17)
"""Batch sizes that are checked."""


def check_against_torch(path: Path, model: DRN, max_query_length: int) -> dict[str, float]:
    """Return the largest difference between an ONNX file and torch for each output, relative as in `TOLERANCE`.

    Raises:
        CheckFailed: a difference exceeds `TOLERANCE`, torch computes non-finite values, or the graph does not run.
    """
    session = open_session(path, optimized=True)
    cases = ((batch, list(range(len(batch)))) for batch in validation_batches(model.config, max_query_length))
    return _differences(model, cases, lambda batch, _: session.run(list(HEAD_NAMES), vars(batch)))


def check_pair_against_torch(
    video: onnx.ModelProto, query: onnx.ModelProto, model: DRN, max_query_length: int
) -> dict[str, float]:
    """Return the largest difference between a split graph and torch for each output, relative as in `TOLERANCE`.

    A batch has fewer videos than queries, which refer to the videos in any order.

    Args:
        video, query: graphs of the two parts.

    Raises:
        CheckFailed: a difference exceeds `TOLERANCE`, torch computes non-finite values, or a graph does not run.
    """
    video_session, query_session = (open_session(part, optimized=True) for part in (video, query))

    def run(batch: Batch, videos: list[int]) -> list[np.ndarray]:
        distinct, index = np.unique(videos, return_inverse=True)
        (encoded,) = video_session.run([ENCODED_FEATURES], {"segment_features": batch.segment_features[distinct]})
        feed = {
            "query_tokens": batch.query_tokens,
            "query_length": batch.query_length,
            VIDEO_INDEX: index.astype(np.int32),
            ENCODED_FEATURES: encoded,
            "segment_spans": batch.segment_spans[distinct],
        }
        return query_session.run(list(HEAD_NAMES), feed)

    def cases() -> Iterator[tuple[Batch, list[int]]]:
        rng = np.random.default_rng(1)
        for batch in validation_batches(model.config, max_query_length):
            # Batches of an even query length have a single video.
            num_videos = rng.integers(1, len(batch) + 1) if batch.query_tokens.shape[1] % 2 else 1
            yield batch, rng.integers(0, num_videos, len(batch)).tolist()

    return _differences(model, cases(), run)


def _differences(
    model: DRN,
    cases: Iterator[tuple[Batch, list[int]]],
    run: Callable[[Batch, list[int]], Sequence[np.ndarray]],
) -> dict[str, float]:
    """Return the largest difference of each output between `run` and torch; see `check_against_torch`.

    Each case is a batch with the row of the video of each query.
    """
    import torch
    from tqdm import tqdm

    differences = dict.fromkeys(HEAD_NAMES, 0.0)
    training = model.training
    model.eval()
    try:
        for batch, videos in tqdm(list(cases), desc="Checking against torch", unit="batch", leave=False, disable=None):
            requested = Batch(
                batch.query_tokens, batch.query_length, batch.segment_features[videos], batch.segment_spans[videos]
            )
            with torch.inference_mode():
                inputs = [torch.from_numpy(getattr(requested, name)) for name in INPUT_NAMES]
                expected = model(*inputs)
                _check_finite(model, inputs, expected)
            try:
                actual = run(batch, videos)
            # ONNX Runtime's exceptions share no base class below Exception.
            except Exception as error:
                raise CheckFailed(
                    f"ONNX Runtime cannot run the graph for {len(batch)} queries of up to "
                    f"{batch.query_tokens.shape[1]} tokens ({str(error).splitlines()[0]}). No file was written. "
                    "Try another version of ONNX Runtime.",
                    code="graph_does_not_run",
                ) from error
            for name, output, reference in zip(HEAD_NAMES, actual, expected):
                difference = relative_difference(output, reference.numpy())
                inputs_text = f"{len(batch)} queries of {batch.query_length.tolist()} tokens"
                check_difference(name, difference, inputs_text)
                differences[name] = max(differences[name], difference)
    finally:
        model.train(training)
    return differences


def _check_finite(model: DRN, inputs: Sequence[Any], heads: Sequence[Any]) -> None:
    """Raise CheckFailed with the name of the first module whose output in torch has non-finite values, if any."""
    if all(bool(head.isfinite().all()) for head in heads):
        return
    import torch

    non_finite: list[str] = []

    def hook(name: str) -> Callable[..., None]:
        def check(module: Any, inputs: Any, output: Any) -> None:
            tensors = output if isinstance(output, tuple) else (output,)
            if any(isinstance(entry, torch.Tensor) and not entry.isfinite().all() for entry in tensors):
                non_finite.append(name)

        return check

    # A module ends after its submodules, so the first entry is the innermost module.
    hooks = [module.register_forward_hook(hook(name)) for name, module in model.named_modules() if name]
    try:
        model(*inputs)
    finally:
        for handle in hooks:
            handle.remove()
    first = f"first in {non_finite[0]}" if non_finite else "after its last module"
    raise CheckFailed(
        f"The network computes non-finite values in torch for random inputs, {first}. "
        "Train or convert the checkpoint again.",
        code="non_finite_output",
    )


def check_difference(output: str, difference: float, inputs: str) -> None:
    """Raise CheckFailed if the relative difference of an output exceeds `TOLERANCE`; `inputs` is for the message."""
    # `not <=` also rejects NaN.
    if not difference <= TOLERANCE:
        raise CheckFailed(
            f"Expected {output} of the graph within {TOLERANCE:.0e} of torch, got a relative difference of "
            f"{difference:.1e} for {inputs}. No file was written. Try another version of ONNX Runtime.",
            code="parity_failed",
        )


def relative_difference(actual: np.ndarray, expected: np.ndarray) -> float:
    """Return the largest absolute difference, relative to the largest absolute value of `expected` or to 1.

    Infinite for arrays of different shapes.
    """
    if actual.shape != expected.shape:
        return float("inf")
    return float(np.abs(actual - expected).max() / max(1.0, np.abs(expected).max()))


def format_differences(differences: dict[str, float]) -> str:
    """Return a table of the largest difference of each output, as `check_against_torch` returns them."""
    lines = [f"{'output':<20} {'max difference':>14} {'tolerance':>10}"]
    lines += [f"{name:<20} {difference:>14.1e} {TOLERANCE:>10.0e}" for name, difference in differences.items()]
    return "\n".join(lines)


def validation_batches(config: DRNConfig, max_query_length: int) -> Iterator[Batch]:
    """Yield batches of random queries and videos: every query length, and the sizes of `BATCH_SIZES`."""
    rng = np.random.default_rng(0)
    for length in range(1, max_query_length + 1):
        # Odd lengths get a second query of at most the same length, first or last.
        others = rng.integers(1, length + 1, length % 2)
        yield _random_batch(config, rng.permutation([length, *others]), rng)
    for size in BATCH_SIZES:
        lengths = rng.integers(1, max_query_length + 1, size)
        lengths[rng.integers(size)] = max_query_length
        yield _random_batch(config, lengths, rng)


def _random_batch(config: DRNConfig, lengths: np.ndarray, rng: np.random.Generator) -> Batch:
    """Return random tokens, and features distributed like those of C3D: about 80 % zeros, the others positive."""
    count, segments, channels = len(lengths), config.num_segments, config.feature_dim
    tokens = rng.integers(1, config.vocab_size + 1, (count, lengths.max()), dtype=np.int32)
    tokens[np.arange(lengths.max()) >= lengths[:, None]] = 0
    gains = rng.lognormal(0, 0.5, channels).astype(np.float32)
    features = np.maximum(rng.standard_normal((count, segments, channels), dtype=np.float32) - 0.84, 0) ** 1.3 * gains
    borders = np.linspace(0, 1, segments + 1) * (1 - rng.uniform(0, 0.01, (count, 1)))
    spans = np.stack((borders[:, :-1], borders[:, 1:]), axis=-1).astype(np.float32)
    return Batch(tokens, lengths.astype(np.int32), features, spans)
