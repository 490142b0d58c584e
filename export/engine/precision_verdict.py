"""Decide from an engine's layers whether it has the precision that its name says: proven, not proven or contradicted.

Only evidence contradicts: layers that multiply, whose data type is known, and is wider than the graph's. What the
inspector does not show is a reason for "not proven", never for a rejection.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from calib.graph.naming import drn_modules
from calib.graph.precision_audit import PrecisionStats
from runtime.artifacts.engine_layers import (
    CONTRADICTED,
    NOT_PROVEN,
    PROVEN,
    WIDTHS,
    EngineLayerStats,
    Inspection,
    Layer,
    count_layers,
    read_layers,
)
from runtime.core.errors import CheckFailed, ModelFileError

# Share of the layers that multiply whose type must be known, and as in the graph, to prove a precision. Small matrix
# products may be compiled into kernels without a telling name.
MIN_KNOWN_SHARE = 0.9
# Kernels come on top of the weights: TensorRT-RTX brings 21 MB of them even to a network of a few kilobytes.
KERNEL_BYTES = 24_000_000
# A version-compatible plan brings the lean runtime along: 105 MB in TensorRT 11.4 (libnvinfer_lean.so), less in older.
LEAN_RUNTIME_BYTES = 120_000_000
# Largest share of the FP32 weights that a plan should hold, by precision.
_LARGEST_PLAN = {"fp32": 1.6, "fp16": 0.8, "bf16": 0.8, "int8": 0.6, "fp8": 0.6}


@dataclasses.dataclass(frozen=True)
class Verdict:
    """The verdict on the precision of an engine.

    Attributes:
        name: of `runtime.artifacts.engine_layers.VERDICTS`.
        reason: what was counted, or what could not be, as a clause.
    """

    name: str
    reason: str

    def __str__(self) -> str:
        return f"{self.name} ({self.reason})"


@dataclasses.dataclass(frozen=True)
class Promise:
    """The precision that an engine must have.

    Attributes:
        precision: in its name.
        graph: what was counted in the graph that it is built of; None where that is not known.
        fp32_weight_bytes: size of the graph's weights in FP32.
        tf32: whether FP32 may be computed in TF32.
        strongly_typed: whether the library takes each layer's type from the graph.
        version_compatible: whether the plan contains the lean runtime.
        fp32_nodes: of the graph those that stay in FP32; see `calib.graph.half_precision.fp32_nodes`.
    """

    precision: str
    graph: PrecisionStats | None = None
    fp32_weight_bytes: int = 0
    tf32: bool = False
    strongly_typed: bool = True
    version_compatible: bool = False
    fp32_nodes: frozenset[str] = frozenset()


def engine_verdict(
    inspection: Inspection | None, promise: Promise, plan_bytes: int, why_not_inspected: str = ""
) -> tuple[EngineLayerStats | None, Verdict]:
    """Return what was counted in an engine (its first profile), and the verdict over all its profiles.

    Args:
        inspection: what the inspector wrote; None where the plan was not opened.
        promise: what it is held to.
        plan_bytes: size of the plan.
        why_not_inspected: the reason where there is no inspection, as a clause.
    """
    if inspection is None:
        reason = why_not_inspected or "the plan was not opened"
        return None, Verdict(NOT_PROVEN, _joined(f"no layer could be counted: {reason}", promise, plan_bytes, 1))
    counted: list[EngineLayerStats] = []
    verdicts: list[Verdict] = []
    for index, text in enumerate(inspection.views()):
        try:
            layers = read_layers(text, index)
        except ModelFileError as error:
            verdicts.append(Verdict(NOT_PROVEN, str(error).rstrip(".")))
            continue
        stats = count_layers(layers, plan_bytes)
        counted.append(stats)
        verdicts.append(_verdict(layers, stats, promise))
    # The worst profile decides.
    order = (CONTRADICTED, NOT_PROVEN, PROVEN)
    verdict = min(verdicts, key=lambda verdict: order.index(verdict.name))
    if verdict.name == NOT_PROVEN:
        unbound = inspection.reason()
        reason = f"{verdict.reason}; {unbound}" if unbound else verdict.reason
        verdict = Verdict(NOT_PROVEN, _joined(reason, promise, plan_bytes, len(verdicts)))
    elif verdict.name == PROVEN:
        size_warning = check_size(plan_bytes, promise, len(verdicts))
        verdict = Verdict(NOT_PROVEN, f"{verdict.reason}, but {size_warning}") if size_warning else verdict
    return (counted[0] if counted else None), verdict


def require(verdict: Verdict, precision: str) -> None:
    """Raise CheckFailed if the evidence contradicts the precision."""
    if verdict.name == CONTRADICTED:
        raise CheckFailed(
            f"{precision} was requested, but the engine computes otherwise: {verdict.reason}.",
            code="precision_contradicted",
        )


def check_size(plan_bytes: int, promise: Promise, num_profiles: int) -> str:
    """Return what the size of a plan says against its precision, as a clause; empty if nothing.

    Weights may be stored once for each profile, so that size alone contradicts nothing.
    """
    weights = _LARGEST_PLAN[promise.precision] * promise.fp32_weight_bytes
    fixed = KERNEL_BYTES + (LEAN_RUNTIME_BYTES if promise.version_compatible else 0)
    expected = weights + fixed
    if not promise.fp32_weight_bytes or plan_bytes <= expected:
        return ""
    message = f"the plan has {plan_bytes / 1e6:.0f} MB where {expected / 1e6:.0f} MB are expected"
    if plan_bytes <= num_profiles * weights + fixed:
        return f"{message} (the weights may be stored once for each of {num_profiles} profiles)"
    return f"{message}, so that weights are stored in a wider type or more than once"


def _joined(reason: str, promise: Promise, plan_bytes: int, num_profiles: int) -> str:
    """Return a reason together with what the size says, and with what the graph still proves."""
    parts = [reason, check_size(plan_bytes, promise, num_profiles)]
    if promise.strongly_typed:
        parts.append("the library is strongly typed and takes each type from the graph")
    return "; ".join(filter(None, parts))


def _verdict(layers: Sequence[Layer], stats: EngineLayerStats, promise: Promise) -> Verdict:
    """Return the verdict over the layers of one profile."""
    precision, types = promise.precision, _types_by_module(promise)
    in_precision = wider = narrower = others = 0
    examples: collections.Counter[str] = collections.Counter()
    for layer in layers:
        if layer.computes is None:
            continue
        computes = "fp32" if layer.computes == "tf32" and promise.tf32 else layer.computes
        expected = _expected_widths(layer, types)
        if WIDTHS[computes] > max(expected):
            wider += 1
            examples[computes] += 1
        elif WIDTHS[computes] < min(expected):
            narrower += 1
        elif computes == precision:
            in_precision += 1
        else:
            others += 1
    hidden = stats.unknown + stats.foreign
    known = in_precision + wider + narrower + others
    if wider > in_precision:
        kinds = " and ".join(examples)
        return Verdict(CONTRADICTED, f"{wider} layers compute in {kinds}, wider than in the graph ({stats})")
    in_graph = promise.graph is None or precision in promise.graph.total()
    if known and not hidden and not in_precision and in_graph:
        return Verdict(CONTRADICTED, f"no layer computes in {precision} ({stats})")
    if not layers:
        return Verdict(NOT_PROVEN, "the engine lists the names of its layers only")
    if not known and not hidden:
        return Verdict(NOT_PROVEN, "no layer that multiplies is shown")
    narrowed = _narrowed(layers, promise)
    if narrowed:
        return Verdict(NOT_PROVEN, f"{', '.join(narrowed)} in a narrower type than FP32, which the graph has ({stats})")
    enough = known - wider >= MIN_KNOWN_SHARE * (known + stats.unknown)
    if stats.foreign or narrower or not enough or (in_graph and not in_precision):
        return Verdict(NOT_PROVEN, f"layers that multiply: {stats}")
    return Verdict(PROVEN, f"layers that multiply: {stats}")


def _narrowed(layers: Sequence[Layer], promise: Promise) -> list[str]:
    """Return nodes that stay in FP32 in the graph, and whose layer writes something narrower.

    A layer may also compute nodes that are not FP32 in the graph; of its types nothing follows.
    """
    return [
        node
        for layer in layers
        if layer.nodes and promise.fp32_nodes.issuperset(layer.nodes) and layer.writes and "fp32" not in layer.writes
        for node in layer.nodes
    ]


def _types_by_module(promise: Promise) -> Mapping[str, Iterable[str]]:
    """Return the data types that each DRN module has in the graph; under "" all of them."""
    if promise.graph is None:
        return {"": (promise.precision,)}
    every = tuple(kind for kind in promise.graph.total() if kind in WIDTHS)
    return {**{module: tuple(kinds) for module, kinds in promise.graph.macs.items()}, "": every or (promise.precision,)}


def _expected_widths(layer: Layer, types: Mapping[str, Iterable[str]]) -> list[int]:
    """Return the widths of the types that the graph has in the modules that a layer computes.

    A layer whose name shows no module may be of any type that the graph has.
    """
    modules = {module for node in layer.nodes for module in drn_modules(node)} & types.keys()
    results = [WIDTHS[kind] for module in modules or ("",) for kind in types[module] if kind in WIDTHS]
    return results or list(WIDTHS.values())


def layer_stats_content(graph: PrecisionStats, engine: EngineLayerStats | None, verdict: Verdict) -> dict[str, Any]:
    """Return the `census` of an engine's metadata."""
    return {
        "twin": graph.to_dict(),
        "engine": engine.to_dict() if engine else None,
        "verdict": verdict.name,
        "reason": verdict.reason,
    }
