"""Compare every tensor that two ONNX models share, and name the first DRN module that differs.

Polygraphy's runners and comparator do the work: the same that compare TensorRT engines, should one need a closer look.
"""

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
from runtime.core.errors import DeviceError, ModelFileError

TOLERANCES: Mapping[str, float] = {"fp32": 1e-4, "fp16": 2e-2, "bf16": 1e-1, "int8": 2e-1, "fp8": 3e-1}
"""What is still right in a precision, as a share of a tensor's largest value. Rounding alone is 5e-4 in FP16, 4e-3 in
BF16 and INT8 and 6e-2 in FP8, and adds up over a dozen layers; one that overflows, or has a wrong range, is off
by its whole range."""


@dataclasses.dataclass(frozen=True)
class TensorDeviation:
    """The deviation of one tensor.

    Attributes:
        tensor: its name, in both models.
        max: largest absolute error.
        relative: that over the reference's largest absolute value; infinite where the other holds NaN or infinity.
    """

    tensor: str
    max: float
    relative: float


@dataclasses.dataclass(frozen=True)
class ModuleDeviation:
    """The worst tensor of one DRN module, `wrong` when it is beyond the tolerance."""

    module: str
    worst: TensorDeviation
    tensors: int
    wrong: bool


@dataclasses.dataclass(frozen=True)
class LayerComparison:
    """The result of comparing all tensors, by module in the order of the reference's computation.

    Attributes:
        modules: by DRN module.
        tolerance: relative error up to which a tensor is right.
        first_wrong: the module and the tensor where it goes wrong first, in the order of computing; None where it does
            not.
        unmatched: tensors of the reference that the other model does not compute, as after fusion.
        queries: how many were asked.
    """

    modules: tuple[ModuleDeviation, ...]
    tolerance: float
    first_wrong: tuple[str, TensorDeviation] | None
    unmatched: int
    queries: int

    def sentence(self) -> str:
        """Return the answer to "where does it go wrong"."""
        if self.first_wrong is None:
            worst = max(self.modules, key=lambda module: module.worst.relative)
            return (
                f"No module goes wrong: the largest relative error is {worst.worst.relative:.1e} in {worst.module} "
                f"({self.tolerance:.0e} is allowed)."
            )
        module, tensor = self.first_wrong
        return (
            f"It goes wrong first in {module}: {tensor.tensor} is off by {tensor.relative:.1e} of its largest value "
            f"({self.tolerance:.0e} is allowed)."
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
    """Raise DeviceError where Polygraphy is missing, before any work is done."""
    try:
        import onnx  # noqa: F401
        import polygraphy  # noqa: F401
    except ImportError as error:
        raise DeviceError(
            f"Comparing layers needs onnx and polygraphy, and one cannot be imported ({error}); "
            "run `pip install '.[engine]'` in the drn-deploy directory.",
            code="missing_library",
        ) from error


def compare_layers(
    reference: Path,
    other: Path,
    batches: Sequence[Batch],
    *,
    tolerance: float | None = None,
    on_progress: Callable[[int], Any] = lambda batches: None,
) -> LayerComparison:
    """Run two ONNX files with every tensor as an output, and compare those of one name.

    ONNX Runtime's own optimisations are off: they would fuse away what is to be seen, and add errors of their own.
    Channels that 8-bit graphs have balanced by powers of two (`calib.graph.channel_equalization`) are compared without
    these.

    Args:
        reference, other: `.onnx` files of ours.
        batches: what to ask, small ones: all tensors of one batch are held at a time.
        tolerance: relative error up to which a tensor is right; that of the other's precision when None.
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
            f"{reference.name} and {other.name} have no tensor in common, so their layers cannot be compared; "
            "compare a model with one made from it."
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
    """Yield the error of each tensor in each batch, as Polygraphy finds it."""
    from polygraphy.comparator import IterationResult, SimpleCompareFunc

    # Its own verdict is not asked for: it judges each number by itself, and most tensors hold some that are near zero.
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
                difference = float(compare(*sides)[tensor].max_absdiff)
                yield TensorDeviation(tensor, difference, _relative(difference, float(np.abs(a).max(initial=0))))
            on_progress(1)


def _without_gains(values: np.ndarray, like: np.ndarray) -> np.ndarray:
    """Return (B, C, ...) values, each channel over the power of two that brings its reach nearest to the other's."""
    axes = (0, *range(2, values.ndim))
    reach, expected = (np.abs(side).max(axis=axes, keepdims=True, initial=0) for side in (values, like))
    nonzero = (reach > 0) & (expected > 0)
    exponents = np.log2(np.where(nonzero, reach, 1) / np.where(nonzero, expected, 1)).round()
    return values / np.exp2(exponents.clip(-LARGEST_EXPONENT, LARGEST_EXPONENT))


def _runner(model: Any, tensors: Sequence[str]) -> Any:
    """Return Polygraphy's runner of a model that gives all of `tensors`."""
    import onnxruntime
    from polygraphy.backend.onnx import BytesFromOnnx, ModifyOutputs
    from polygraphy.backend.onnxrt import OnnxrtRunner, SessionFromOnnx

    return OnnxrtRunner(
        SessionFromOnnx(
            BytesFromOnnx(ModifyOutputs(model, outputs=list(tensors), copy=True)),
            graph_optimization_level=onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL,
        )
    )


def _relative(difference: float, largest: float) -> float:
    if difference == 0:
        return 0.0
    return difference / largest if largest else math.inf


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
    """Return a number that JSON can hold: None for infinity."""
    return value if math.isfinite(value) else None


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep Polygraphy from logging every tensor it compares."""
    from polygraphy.logger import G_LOGGER

    with G_LOGGER.verbosity(G_LOGGER.CRITICAL + 1), np.errstate(all="ignore"):
        yield
