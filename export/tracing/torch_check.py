"""Check an exported graph against torch on batches of every size and length."""

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
"""Largest difference between ONNX Runtime and torch, as a share of the output's largest value (or of 1 where that is
smaller). Folded and merged layers round once more, over sums of up to 12,288 products; ten times less is usual."""

BATCH_SIZES = (1, 2, 3, 8, 17)


def check_against_torch(path: Path, model: DRN, max_query_length: int) -> dict[str, float]:
    """Return, for each output, the largest difference between an ONNX file and torch, relative as in `TOLERANCE`.

    Raises:
        CheckFailed: one is beyond `TOLERANCE`, or the graph does not run.
    """
    session = open_session(path, optimized=True)
    questions = ((batch, list(range(len(batch)))) for batch in validation_batches(model.config, max_query_length))
    return _differences(model, questions, lambda batch, _: session.run(list(HEAD_NAMES), vars(batch)))


def check_pair_against_torch(
    video: onnx.ModelProto, query: onnx.ModelProto, model: DRN, max_query_length: int
) -> dict[str, float]:
    """Return the largest differences between a split graph and torch, as `check_against_torch`.

    The queries of a batch ask fewer videos than there are queries, some several times, in any order.
    """
    encoder, asker = (open_session(part, optimized=True) for part in (video, query))

    def ask(batch: Batch, videos: list[int]) -> list[np.ndarray]:
        distinct, index = np.unique(videos, return_inverse=True)
        (encoded,) = encoder.run([ENCODED_FEATURES], {"segment_features": batch.segment_features[distinct]})
        feed = {
            "query_tokens": batch.query_tokens,
            "query_length": batch.query_length,
            VIDEO_INDEX: index.astype(np.int32),
            ENCODED_FEATURES: encoded,
            "segment_spans": batch.segment_spans[distinct],
        }
        return asker.run(list(HEAD_NAMES), feed)

    def questions() -> Iterator[tuple[Batch, list[int]]]:
        rng = np.random.default_rng(1)
        for batch in validation_batches(model.config, max_query_length):
            # Every second batch asks one video alone.
            kinds = rng.integers(1, len(batch) + 1) if batch.query_tokens.shape[1] % 2 else 1
            yield batch, rng.integers(0, kinds, len(batch)).tolist()

    return _differences(model, questions(), ask)


def _differences(
    model: DRN,
    questions: Iterator[tuple[Batch, list[int]]],
    answer: Callable[[Batch, list[int]], Sequence[np.ndarray]],
) -> dict[str, float]:
    """Return the largest difference of each output between `answer` and torch; see `check_against_torch`.

    A question is a batch, and for each of its queries the row of the batch whose video it is about.
    """
    import torch
    from tqdm import tqdm

    differences = dict.fromkeys(HEAD_NAMES, 0.0)
    training = model.training
    model.eval()
    try:
        for batch, videos in tqdm(
            list(questions), desc="Checking against torch", unit="batch", leave=False, disable=None
        ):
            requested = Batch(
                batch.query_tokens, batch.query_length, batch.segment_features[videos], batch.segment_spans[videos]
            )
            with torch.inference_mode():
                inputs = [torch.from_numpy(getattr(requested, name)) for name in INPUT_NAMES]
                expected = model(*inputs)
                _check_finite(model, inputs, expected)
            try:
                result = answer(batch, videos)
            # ONNX Runtime's exceptions share no base class below Exception.
            except Exception as error:
                raise CheckFailed(
                    f"The graph does not run for {len(batch)} queries of up to {batch.query_tokens.shape[1]} words "
                    f"({str(error).splitlines()[0]}); nothing was kept.",
                    code="graph_does_not_run",
                ) from error
            for name, ours, theirs in zip(HEAD_NAMES, result, expected):
                difference = relative_difference(ours, theirs.numpy())
                # `not <=` also refuses NaN.
                if not difference <= TOLERANCE:
                    raise CheckFailed(
                        f"{name} of the graph differs from torch by {difference:.1e} of its largest value for "
                        f"{len(batch)} queries of {batch.query_length.tolist()} words, and {TOLERANCE:.0e} is allowed; "
                        "nothing was kept.",
                        code="parity_failed",
                    )
                differences[name] = max(differences[name], difference)
    finally:
        model.train(training)
    return differences


def _check_finite(model: DRN, inputs: Sequence[Any], heads: Sequence[Any]) -> None:
    """Raise CheckFailed, naming the first module that gives it, if torch computes a number that is not finite."""
    if all(bool(head.isfinite().all()) for head in heads):
        return
    import torch

    culprits: list[str] = []

    def watch(name: str) -> Callable[..., None]:
        def look(module: Any, given: Any, output: Any) -> None:
            tensors = output if isinstance(output, tuple) else (output,)
            if any(isinstance(entry, torch.Tensor) and not entry.isfinite().all() for entry in tensors):
                culprits.append(name)

        return look

    # Modules with modules inside end after these: the first that is heard of is the innermost.
    hooks = [module.register_forward_hook(watch(name)) for name, module in model.named_modules() if name]
    try:
        model(*inputs)
    finally:
        for hook in hooks:
            hook.remove()
    first = f"first in {culprits[0]}" if culprits else "after its last module"
    raise CheckFailed(
        f"The network computes numbers that are not finite in torch, {first}, for made-up queries; nothing was kept. "
        "Train or convert the checkpoint again.",
        code="non_finite_output",
    )


def relative_difference(actual: np.ndarray, expected: np.ndarray) -> float:
    """Return the largest difference of two arrays of one shape over the largest of `wanted`, or over 1 if larger."""
    if actual.shape != expected.shape:
        return float("inf")
    return float(np.abs(actual - expected).max() / max(1.0, np.abs(expected).max()))


def format_differences(differences: dict[str, float]) -> str:
    """Return the table of largest differences per output."""
    lines = [f"{'output':<20} {'largest difference':>18} {'allowed':>8}"]
    lines += [f"{name:<20} {difference:>18.1e} {TOLERANCE:>8.0e}" for name, difference in differences.items()]
    return "\n".join(lines)


def validation_batches(config: DRNConfig, max_query_length: int) -> Iterator[Batch]:
    """Yield batches of random queries and videos: every query length, and the batch sizes of `BATCH_SIZES`."""
    rng = np.random.default_rng(0)
    for longest in range(1, max_query_length + 1):
        # Alone and beside a shorter or equal one, which comes first half of the time.
        others = rng.integers(1, longest + 1, longest % 2)
        yield _check_batch(config, rng.permutation([longest, *others]), rng)
    for size in BATCH_SIZES:
        lengths = rng.integers(1, max_query_length + 1, size)
        lengths[rng.integers(size)] = max_query_length
        yield _check_batch(config, lengths, rng)


def _check_batch(config: DRNConfig, lengths: np.ndarray, rng: np.random.Generator) -> Batch:
    """Return random words, and features as C3D gives them: about 80 % zeros, the others positive, some large."""
    count, segments, channels = len(lengths), config.num_segments, config.feature_dim
    tokens = rng.integers(1, config.vocab_size + 1, (count, lengths.max()), dtype=np.int32)
    tokens[np.arange(lengths.max()) >= lengths[:, None]] = 0
    gains = rng.lognormal(0, 0.5, channels).astype(np.float32)
    features = np.maximum(rng.standard_normal((count, segments, channels), dtype=np.float32) - 0.84, 0) ** 1.3 * gains
    borders = np.linspace(0, 1, segments + 1) * (1 - rng.uniform(0, 0.01, (count, 1)))
    spans = np.stack((borders[:, :-1], borders[:, 1:]), axis=-1).astype(np.float32)
    return Batch(tokens, lengths.astype(np.int32), features, spans)
