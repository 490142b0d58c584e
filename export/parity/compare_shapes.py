"""Check that a model answers alike at the smallest, the usual and the largest shapes that it accepts.

The comparison on a data set uses few batch sizes and query lengths. An engine has other kernels for other shapes.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from runtime.artifacts.engine_metadata import read_verified
from runtime.backends.network import Encoding
from runtime.core.batch import Heads, pad_queries
from runtime.datasets.dataset import Annotation, DataSet
from runtime.grounding.grounder import Grounder

# Distinct queries, which larger batches repeat.
QUERIES = 8
# Batch sizes of models without optimization profiles.
BATCHES = (1, 8, 32)
# Maximum difference as a fraction of the largest value: rounding in FP32, and in lower precisions what other kernels
# for another shape may round differently.
FP32_TOLERANCE, TOLERANCE = 1e-3, 0.05


@dataclasses.dataclass(frozen=True)
class ShapeCheck:
    """The heads of a batch, compared with those of the same queries run one at a time.

    Attributes:
        batch: number of queries.
        tokens: number of tokens that the queries are padded to.
        deviation: largest difference of an output, as a fraction of its largest value; inf if a value is not finite.
        tolerance: limit of the deviation.
    """

    batch: int
    tokens: int
    deviation: float
    tolerance: float

    def violation(self) -> str:
        """Return the exceeded limit as a clause; empty if the deviation is within it."""
        if self.deviation <= self.tolerance:
            return ""
        return (
            f"outputs of {self.batch} queries with {self.tokens} tokens differ by {100 * self.deviation:.2g} % from "
            f"those of the same queries one at a time, over {100 * self.tolerance:g} %"
        )


def check_shapes(
    path: Path, model: Grounder, data_set: DataSet, annotations: Sequence[Annotation]
) -> tuple[ShapeCheck, ...]:
    """Compare the outputs of batches at the limits of a model with those of single queries.

    Args:
        path: file of the model; that of an engine records its optimization profiles.
        annotations: queries whose words the model knows; the first `QUERIES` are used.

    Returns:
        One check for min, opt and max of each profile; for a model without profiles, for `BATCHES`.

    Raises:
        GroundingError: features cannot be read, or the model cannot run a shape.
    """
    selected = annotations[:QUERIES]
    # Unknown words are reported by the comparison on the data set.
    queries = [np.asarray(model.encode_query(row.sentence, Counter()), np.int32) for row in selected]
    encodings: list[Encoding] = []
    for annotation in selected:
        video = data_set.video(annotation.video)
        encodings.append(model.network.encode(model.segments(video), video.duration, video.name))
    tolerance = FP32_TOLERANCE if model.manifest.precision == "fp32" else TOLERANCE
    checks = []
    for batch, tokens in dict.fromkeys(shapes_of(path, model)):
        # The first query has exactly this many tokens, so that no plan for shorter queries runs.
        sized = [np.resize(query, tokens) if index == 0 else query[:tokens] for index, query in enumerate(queries)]
        single = [_run(model, [query], [encoding]) for query, encoding in zip(sized, encodings)]
        rows = np.arange(batch, dtype=np.int32) % len(sized)
        together = _run(model, [sized[row] for row in rows], encodings, rows)
        checks.append(ShapeCheck(batch, tokens, _deviation(single, together, rows), tolerance))
    return tuple(checks)


def shapes_of(path: Path, model: Grounder) -> Iterator[tuple[int, int]]:
    """Yield the batch size and the query length of each shape to check."""
    if path.suffix == ".engine":
        for profile in read_verified(path)["profiles"]:
            yield from zip(profile["batch"], profile["query_length"])
        return
    longest = model.manifest.max_query_length
    yield from zip(BATCHES, (1, max(1, longest // 2), longest))


def _run(
    model: Grounder, queries: Sequence[np.ndarray], encodings: Sequence[Encoding], index: np.ndarray | None = None
) -> Heads:
    tokens, lengths = pad_queries(queries)
    return model.network.run(tokens, lengths, encodings, np.zeros(1, np.int32) if index is None else index)


def _deviation(single: Sequence[Heads], together: Heads, rows: np.ndarray) -> float:
    """Return the largest difference of an output, as a fraction of its largest value."""
    worst = 0.0
    for name, actual in vars(together).items():
        expected = np.concatenate([getattr(heads, name) for heads in single])[rows]
        if not np.isfinite(actual).all() or not np.isfinite(expected).all():
            return float("inf")
        worst = max(worst, float(np.abs(actual - expected).max() / max(np.abs(expected).max(), 1e-12)))
    return worst
