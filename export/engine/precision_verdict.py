"""Check the precision of an engine by its layers: proven, not proven or contradicted.

Only layers that multiply in a known data type wider than that of the graph contradict a precision. If the inspector
does not show the types, the precision is "not proven", which never rejects an engine.
"""

from __future__ import annotations

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

# Minimum share of the layers that multiply whose type is known and not wider than in the graph. The names of kernels
# for small matrix products may not show their type.
MIN_KNOWN_SHARE = 0.9
# A plan also contains kernels: 21 MB of them in TensorRT-RTX even for a network of a few kilobytes.
KERNEL_BYTES = 24_000_000
# A version-compatible plan contains the lean runtime: 105 MB in TensorRT 11.4 (libnvinfer_lean.so), less in older ones.
LEAN_RUNTIME_BYTES = 120_000_000
# Maximum size of the weights in a plan, relative to FP32 weights.
_MAX_WEIGHTS = {"fp32": 1.6, "fp16": 0.8, "bf16": 0.8, "int8": 0.6, "fp8": 0.6}


@dataclasses.dataclass(frozen=True)
class Verdict:
    """The verdict on the precision of an engine.

    Attributes:
        name: one of `runtime.artifacts.engine_layers.VERDICTS`.
        reason: the evidence, or what could not be measured, as a clause.
    """

    name: str
    reason: str

    def __str__(self) -> str:
        return f"{self.name} ({self.reason})"


@dataclasses.dataclass(frozen=True)
class ExpectedPrecision:
    """The precision that an engine must have.

    Attributes:
        precision: fp32, fp16, bf16, int8 or fp8.
        graph: data types of the graph that the engine was built from; None if they are not known.
        fp32_weight_bytes: size of the weights of the graph in FP32.
        tf32: whether TF32 is allowed for FP32.
        strongly_typed: whether the library takes the type of each layer from the graph.
        version_compatible: whether the plan contains the lean runtime.
        fp32_nodes: nodes that stay in FP32; see `calib.graph.half_precision.fp32_nodes`.
    """

    precision: str
    graph: PrecisionStats | None = None
    fp32_weight_bytes: int = 0
    tf32: bool = False
    strongly_typed: bool = True
    version_compatible: bool = False
    fp32_nodes: frozenset[str] = frozenset()


def engine_verdict(
    inspection: Inspection | None, expected: ExpectedPrecision, plan_bytes: int, not_inspected_reason: str = ""
) -> tuple[EngineLayerStats | None, Verdict]:
    """Return the layer statistics of the first profile of an engine, and the verdict over all profiles.

    Args:
        inspection: output of the inspector; None if the plan was not opened.
        expected: precision that the engine must have, and the data types of its graph.
        not_inspected_reason: reason for a missing inspection, as a clause.
    """
    if inspection is None:
        reason = f"the layers could not be read: {not_inspected_reason or 'the plan was not opened'}"
        return None, Verdict(NOT_PROVEN, _with_other_evidence(reason, expected, plan_bytes, 1))
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
        verdicts.append(_verdict(layers, stats, expected))
    # The profile with the worst verdict decides.
    order = (CONTRADICTED, NOT_PROVEN, PROVEN)
    verdict = min(verdicts, key=lambda verdict: order.index(verdict.name))
    if verdict.name == NOT_PROVEN:
        unbound = inspection.reason()
        reason = f"{verdict.reason}; {unbound}" if unbound else verdict.reason
        verdict = Verdict(NOT_PROVEN, _with_other_evidence(reason, expected, plan_bytes, len(verdicts)))
    elif verdict.name == PROVEN:
        size_warning = check_size(plan_bytes, expected, len(verdicts))
        verdict = Verdict(NOT_PROVEN, f"{verdict.reason}, but {size_warning}") if size_warning else verdict
    return (counted[0] if counted else None), verdict


def require(verdict: Verdict, precision: str) -> None:
    """Raise CheckFailed if the evidence contradicts the required precision."""
    if verdict.name == CONTRADICTED:
        raise CheckFailed(
            f"The layers of the engine contradict {precision}: {verdict.reason}.",
            code="precision_contradicted",
        )


def check_size(plan_bytes: int, expected: ExpectedPrecision, num_profiles: int) -> str:
    """Return a clause if a plan is larger than its precision allows; else an empty string.

    A plan may store the weights once for each profile, so the size alone never contradicts a precision.
    """
    weights = _MAX_WEIGHTS[expected.precision] * expected.fp32_weight_bytes
    fixed = KERNEL_BYTES + (LEAN_RUNTIME_BYTES if expected.version_compatible else 0)
    limit = weights + fixed
    if not expected.fp32_weight_bytes or plan_bytes <= limit:
        return ""
    sizes = f"the plan has {plan_bytes / 1e6:.0f} MB instead of at most {limit / 1e6:.0f} MB"
    if plan_bytes <= num_profiles * weights + fixed:
        return f"{sizes} (the weights may be stored once for each of {num_profiles} profiles)"
    return f"{sizes}, so weights are stored in a wider type or more than once"


def _with_other_evidence(reason: str, expected: ExpectedPrecision, plan_bytes: int, num_profiles: int) -> str:
    """Return a reason with the evidence of the plan's size and of strong typing."""
    parts = [reason, check_size(plan_bytes, expected, num_profiles)]
    if expected.strongly_typed:
        parts.append("the library is strongly typed and takes each type from the graph")
    return "; ".join(filter(None, parts))


def _verdict(layers: Sequence[Layer], stats: EngineLayerStats, expected: ExpectedPrecision) -> Verdict:
    """Return the verdict over the layers of one profile."""
    precision, types = expected.precision, _types_by_module(expected)
    in_precision = wider = narrower = others = 0
    wider_types: dict[str, None] = {}
    for layer in layers:
        if layer.computes is None:
            continue
        computes = "fp32" if layer.computes == "tf32" and expected.tf32 else layer.computes
        widths = _expected_widths(layer, types)
        if WIDTHS[computes] > max(widths):
            wider += 1
            wider_types[computes] = None
        elif WIDTHS[computes] < min(widths):
            narrower += 1
        elif computes == precision:
            in_precision += 1
        else:
            others += 1
    hidden = stats.unknown + stats.foreign
    known = in_precision + wider + narrower + others
    if wider > in_precision:
        kinds = " and ".join(wider_types)
        return Verdict(CONTRADICTED, f"{wider} layers compute in {kinds}, wider than in the graph ({stats})")
    in_graph = expected.graph is None or precision in expected.graph.total()
    if known and not hidden and not in_precision and in_graph:
        return Verdict(CONTRADICTED, f"no layer computes in {precision} ({stats})")
    if not layers:
        return Verdict(NOT_PROVEN, "the inspector shows only the names of the layers")
    if not known and not hidden:
        return Verdict(NOT_PROVEN, "the inspector shows no layer that multiplies")
    narrowed = _narrowed_nodes(layers, expected)
    if narrowed:
        return Verdict(NOT_PROVEN, f"{', '.join(narrowed)} in a narrower type than FP32 of the graph ({stats})")
    enough = known - wider >= MIN_KNOWN_SHARE * (known + stats.unknown)
    if stats.foreign or narrower or not enough or (in_graph and not in_precision):
        return Verdict(NOT_PROVEN, f"layers that multiply: {stats}")
    return Verdict(PROVEN, f"layers that multiply: {stats}")


def _narrowed_nodes(layers: Sequence[Layer], expected: ExpectedPrecision) -> list[str]:
    """Return the nodes that are FP32 in the graph and whose layer writes a narrower type.

    The types of a layer that also computes other nodes are no evidence.
    """
    return [
        node
        for layer in layers
        if layer.nodes and expected.fp32_nodes.issuperset(layer.nodes) and layer.writes and "fp32" not in layer.writes
        for node in layer.nodes
    ]


def _types_by_module(expected: ExpectedPrecision) -> Mapping[str, Iterable[str]]:
    """Return the data types of each DRN module in the graph, and under "" those of all modules."""
    if expected.graph is None:
        return {"": (expected.precision,)}
    every = tuple(kind for kind in expected.graph.total() if kind in WIDTHS) or (expected.precision,)
    return {**{module: tuple(kinds) for module, kinds in expected.graph.macs.items()}, "": every}


def _expected_widths(layer: Layer, types: Mapping[str, Iterable[str]]) -> list[int]:
    """Return the widths of the data types that the modules of a layer have in the graph.

    A layer whose name shows no module may have any type of the graph.
    """
    modules = {module for node in layer.nodes for module in drn_modules(node)} & types.keys()
    results = [WIDTHS[kind] for module in modules or ("",) for kind in types[module] if kind in WIDTHS]
    return results or list(WIDTHS.values())


def layer_stats_content(graph: PrecisionStats, engine: EngineLayerStats | None, verdict: Verdict) -> dict[str, Any]:
    """Return the content of `census`, the key of an engine's metadata with its precision.

    Args:
        graph: data types of the graph that the engine was built from.
        engine: layers of the engine by data type; None if it was not inspected.
        verdict: verdict on its precision.
    """
    return {
        "twin": graph.to_dict(),
        "engine": engine.to_dict() if engine else None,
        "verdict": verdict.name,
        "reason": verdict.reason,
    }
