"""Compare every tensor that two ONNX models share with Polygraphy, and name the first DRN module that differs."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from calib.graph.channel_equalization import LARGEST_EXPONENT
from calib.graph.naming import drn_modules
from calib.graph.onnx_graph import load_onnx, manifest_of
from runtime.core.batch import Batch
from runtime.core.errors import ModelFileError, importing

TOLERANCES: Mapping[str, float] = {"fp32": 1e-4, "fp16": 2e-2, "bf16": 1e-1, "int8": 2e-1, "fp8": 3e-1}
"""Relative error that is accepted in a precision, as a share of the largest value of a tensor. Rounding alone causes
5e-4 in FP16, 4e-3 in BF16 and INT8 and 6e-2 in FP8, and accumulates over a dozen layers."""


@dataclasses.dataclass(frozen=True)
class TensorDeviation:
    """The deviation of one tensor.

    Attributes:
        tensor: name in both models.
        max: largest absolute error.
        relative: `max` divided by the largest absolute value of the reference; infinite if the other tensor has
            non-finite values.
    """

    tensor: str
    max: float
    relative: float


@dataclasses.dataclass(frozen=True)
class ModuleDeviation:
    """The worst tensor of one DRN module; `wrong` if its relative error exceeds the tolerance."""

    module: str
    worst: TensorDeviation
    tensors: int
    wrong: bool


@dataclasses.dataclass(frozen=True)
class LayerComparison:
    """The result of comparing all tensors of two models.

    Attributes:
        modules: one entry for each DRN module, in the order of execution in the reference.
        tolerance: maximum relative error.
        first_wrong: module and tensor that exceed the tolerance first in the order of execution; None if none does.
        unmatched: number of tensors of the reference that the other model lacks, for example after fusion.
        queries: number of queries.
    """

    modules: tuple[ModuleDeviation, ...]
    tolerance: float
    first_wrong: tuple[str, TensorDeviation] | None
    unmatched: int
    queries: int

    def sentence(self) -> str:
        """Return the first module that exceeds the tolerance, or the largest error if none does, in one sentence."""
        if self.first_wrong is None:
            worst = max(self.modules, key=lambda module: module.worst.relative)
            return (
                f"All modules are within the tolerance of {self.tolerance:.0e}: the largest relative error is "
                f"{worst.worst.relative:.1e} in {worst.module}."
            )
        module, tensor = self.first_wrong
        return (
            f"The first module above the tolerance of {self.tolerance:.0e} is {module}: the relative error of "
            f"{tensor.tensor} is {tensor.relative:.1e}."
        )

    def to_dict(self) -> dict[str, Any]:
        return {
            "queries": self.queries,
            "tolerance": self.tolerance,
            "unmatched_tensors": self.unmatched,
            "first_wrong": self.first_wrong[0] if self.first_wrong else None,
            "modules": [
                {
                    "module": module.module,
                    "tensors": module.tensors,
                    "wrong": module.wrong,
                    "worst_tensor": module.worst.tensor,
                    "max": _number(module.worst.max),
                    "relative": _number(module.worst.relative),
                }
                for module in self.modules
            ],
        }


def require_polygraphy() -> None:
    """Raise DeviceError if onnx or Polygraphy is not installed."""
    with importing("onnx or polygraphy for --layers", "engine"):
        import onnx  # noqa: F401
        import polygraphy  # noqa: F401


def compare_layers(
    reference: Path,
    other: Path,
    batches: Sequence[Batch],
    *,
    tolerance: float | None = None,
    on_progress: Callable[[int], Any] = lambda batches: None,
) -> LayerComparison:
    """Run two ONNX files with every tensor as an output, and compare tensors of the same name.

    ONNX Runtime's optimizations are off, because fusion removes tensors and adds errors. The channel scales of 8-bit
    graphs (`calib.graph.channel_equalization`) are divided out first.

    Args:
        reference, other: `.onnx` files of DRN models.
        batches: inputs; all tensors of one batch are in memory at a time.
        tolerance: maximum relative error; None selects the tolerance for the precision of `other`.
        on_progress: called with the number of batches compared since the last call.

    Raises:
        ModelFileError: a file is not ONNX, or the two have no tensor in common.
        DeviceError: Polygraphy is not installed.
    """
    require_polygraphy()
    models = [load_onnx(path) for path in (reference, other)]
    producers = {tensor: node.name for node in models[0].graph.node for tensor in node.output}
    theirs = {tensor for node in models[1].graph.node for tensor in node.output}
    common = [tensor for tensor in producers if tensor in theirs]
    if not common:
        raise ModelFileError(
            f"{reference.name} and {other.name} have no common tensor. Compare a model with a conversion of it.",
            code="models_differ",
        )
    precision = manifest_of(models[1], str(other)).precision
    gated = {name for name in common if producers[name].startswith(("qInput.", "backbone_net/"))}
    balanced = gated if precision in ("int8", "fp8") else frozenset[str]()
    worst: dict[str, TensorDeviation] = {}
    for error in _tensor_errors(models, common, balanced, batches, on_progress):
        before = worst.get(error.tensor)
        if before is None or not error.relative <= before.relative:
            worst[error.tensor] = error
    if tolerance is None:
        tolerance = TOLERANCES.get(precision, max(TOLERANCES.values()))
    errors = [worst[tensor] for tensor in common]
    module_of = {tensor: " + ".join(drn_modules(producers[tensor])) or "drn" for tensor in common}
    wrong = next((error for error in errors if not error.relative <= tolerance), None)
    return LayerComparison(
        modules=tuple(_by_module(errors, module_of, tolerance)),
        tolerance=tolerance,
        first_wrong=(module_of[wrong.tensor], wrong) if wrong else None,
        unmatched=len(producers) - len(common),
        queries=sum(map(len, batches)),
    )


def _tensor_errors(
    models: Sequence[Any],
    tensors: Sequence[str],
    balanced: Collection[str],
    batches: Sequence[Batch],
    on_progress: Callable[[int], Any],
) -> Iterator[TensorDeviation]:
    from polygraphy.comparator import IterationResult, SimpleCompareFunc

    # Polygraphy's own verdict is not used: it compares element by element, and most tensors have values near zero.
    compare = SimpleCompareFunc(check_error_stat="max", fail_fast=False)
    with _quiet(), _runner(models[0], tensors) as ours, _runner(models[1], tensors) as theirs:
        for batch in batches:
            expected, result = (dict(runner.infer(dict(vars(batch)))) for runner in (ours, theirs))
            for tensor in tensors:
                a, b = (np.asarray(side[tensor]).astype(np.float64) for side in (expected, result))
                if a.shape != b.shape or not np.isfinite(b).all():
                    yield TensorDeviation(tensor, math.inf, math.inf)
                    continue
                if tensor in balanced:
                    b = _without_gains(b, a)
                sides = (IterationResult({tensor: wide}) for wide in (a, b))
                error = float(compare(*sides)[tensor].max_absdiff)
                largest = float(np.abs(a).max(initial=0))
                yield TensorDeviation(tensor, error, error / largest if largest else (math.inf if error else 0.0))
            on_progress(1)


def _without_gains(values: np.ndarray, like: np.ndarray) -> np.ndarray:
    """Return (B, C, ...) values, each channel divided by the power of two that brings its maximum closest to `like`."""
    axes = (0, *range(2, values.ndim))
    actual, expected = (np.abs(side).max(axis=axes, keepdims=True, initial=0) for side in (values, like))
    nonzero = (actual > 0) & (expected > 0)
    exponents = np.log2(np.where(nonzero, actual, 1) / np.where(nonzero, expected, 1)).round()
    return values / np.exp2(exponents.clip(-LARGEST_EXPONENT, LARGEST_EXPONENT))


def _runner(model: Any, tensors: Sequence[str]) -> Any:
    """Return Polygraphy's ONNX Runtime runner for a model with all of `tensors` as outputs."""
    import onnxruntime
    from polygraphy.backend.onnx import BytesFromOnnx, ModifyOutputs
    from polygraphy.backend.onnxrt import OnnxrtRunner, SessionFromOnnx

    return OnnxrtRunner(
        SessionFromOnnx(
            BytesFromOnnx(ModifyOutputs(model, outputs=list(tensors), copy=True)),
            graph_optimization_level=onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL,
        )
    )


def _by_module(
    errors: Sequence[TensorDeviation], module_of: Mapping[str, str], tolerance: float
) -> Iterator[ModuleDeviation]:
    grouped: dict[str, list[TensorDeviation]] = {}
    for error in errors:
        grouped.setdefault(module_of[error.tensor], []).append(error)
    for name, members in grouped.items():
        worst = max(members, key=lambda error: error.relative)
        yield ModuleDeviation(name, worst, len(members), not worst.relative <= tolerance)


def _number(value: float) -> float | None:
    """Return a finite number, or None, because JSON has no infinity."""
    return value if math.isfinite(value) else None


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Suppress Polygraphy's log line for every tensor."""
    from polygraphy.logger import G_LOGGER

    with G_LOGGER.verbosity(G_LOGGER.CRITICAL + 1), np.errstate(all="ignore"):
        yield
