"""Test `export.engine.precision_verdict`: contradicted by evidence only, and not proven if types are hidden."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from calib.graph.precision_audit import PrecisionStats
from export.engine.precision_verdict import ExpectedPrecision, Verdict, check_size, engine_verdict, require
from runtime.artifacts.engine_layers import (
    CONTRADICTED,
    NOT_PROVEN,
    PROVEN,
    EngineLayerStats,
    Inspection,
    ProfileView,
    count_layers,
    read_layers,
    read_layers_file,
)
from runtime.core.errors import CheckFailed
from tests.export.engine.inspector_doubles import Writer, document, layers
from tests.raising import quotes, raises

VERSIONS = ("8.6", "10.16", "11.4", "1.7")
FP16 = ExpectedPrecision("fp16", PrecisionStats({"prop_fc": {"fp16": 9}, "backbone_net.layers.0": {"fp16": 5}}, {}))
INT8 = ExpectedPrecision("int8", PrecisionStats({"prop_fc": {"int8": 9}, "query_encoder.W1": {"fp16": 1}}, {}))
# 100 MB in FP16.
SIZED = dataclasses.replace(FP16, fp32_weight_bytes=200_000_000)
PLAN_BYTES = 100_000_000
NO_SUCH_PLANS = ("no such plans", "")


@dataclasses.dataclass(frozen=True)
class Row:
    """One row of the table in docs/quantization.md.

    Attributes:
        scenario: key of `inspector_doubles.SCENARIOS`.
        cells: counts and verdict for each of `VERSIONS`.
        expected: expected precision.
        context: whether a context can be created.
        plan_bytes: size of the plan.
    """

    scenario: str
    cells: tuple[tuple[str, str], ...]
    expected: ExpectedPrecision = FP16
    context: bool = True
    plan_bytes: int = 0


UNKNOWN, GENERATED = ("6 of unknown type", NOT_PROVEN), ("6 in fp16", PROVEN)
TABLE = {
    "dynamic shapes": Row("convolutions", (("4 in fp16", PROVEN),) * 4),
    "generated kernels": Row("generated", (UNKNOWN, GENERATED, GENERATED, GENERATED)),
    "generated kernels, no context": Row("generated", (UNKNOWN, UNKNOWN, GENERATED, GENERATED), context=False),
    "one ForeignNode": Row("foreign", (("1 ForeignNode that shows nothing", NOT_PROVEN),) * 4),
    "mixed": Row("mixed", (("4 in fp16, 1 ForeignNode that shows nothing", NOT_PROVEN),) * 4),
    "int8 with FP16 borders": Row("int8", (("4 in int8, 2 in fp16", PROVEN),) * 4, INT8),
    "FP32 under an FP16 name": Row("wide", (("30 in fp32", CONTRADICTED),) * 4),
    "layer names only": Row("names", (("none that multiplies is shown", NOT_PROVEN),) * 4),
    # 11.4's lean runtime has 105 MB. TensorRT-RTX has no such plans.
    "version-compatible": Row(
        "convolutions",
        (*((("4 in fp16", PROVEN),) * 3), NO_SUCH_PLANS),
        dataclasses.replace(SIZED, version_compatible=True),
        plan_bytes=PLAN_BYTES + 105_000_000,
    ),
    "weights stored once for each of two profiles": Row(
        "convolutions", (("4 in fp16", NOT_PROVEN),) * 4, SIZED, plan_bytes=2 * PLAN_BYTES
    ),
}


def inspection(version: str, scenario: str, context: bool = True, hides: bool = False) -> Inspection:
    views = tuple(
        ProfileView(name, {}, document(version, scenario, bound=True, hides=hides) if context else None, "no context")
        for name in ("one query", "several queries")
    )
    return Inspection(document(version, scenario, bound=False), views)


@pytest.mark.parametrize("row", TABLE)
def test_layer_stats_and_verdict_match_table_per_version(row: str) -> None:
    known = TABLE[row]
    for version, cell in zip(VERSIONS, known.cells, strict=True):
        if cell != NO_SUCH_PLANS:
            inspected = inspection(version, known.scenario, known.context)
            counted, verdict = engine_verdict(inspected, known.expected, known.plan_bytes)
            assert (str(counted), verdict.name) == cell, version


def test_documentation_table_matches_computed_verdicts() -> None:
    text = (Path(__file__).parents[3] / "docs" / "quantization.md").read_text(encoding="utf-8")
    for row, known in TABLE.items():
        shown = " | ".join(f"{counted}: **{verdict}**" if verdict else counted for counted, verdict in known.cells)
        assert f"| {row} | {shown} |" in text
    _, verdict = engine_verdict(None, FP16, 0, "the plan is for another GPU")
    assert f"| for another GPU, or built without one | | | | not opened: **{verdict.name}** |" in text
    assert quotes(verdict.reason, "the plan is for another GPU")


WIDE = document("10.16", "wide", bound=True)
TF32 = WIDE.replace("f32f32_f32f32_f32", "f32f32_tf32f32_f32")
COPIES = json.dumps({"Layers": json.loads(WIDE)["Layers"][-1:]})
GOOD_PROFILE, WIDE_PROFILE = (
    ProfileView(scenario, {}, document("11.4", scenario, bound=True)) for scenario in ("convolutions", "wide")
)
OTHER_CASES = {
    "int8 that runs in FP16": (inspection("11.4", "convolutions"), INT8, CONTRADICTED),
    "one of two profiles in FP32": (Inspection("", (GOOD_PROFILE, WIDE_PROFILE)), FP16, CONTRADICTED),
    "two profiles in FP16": (Inspection("", (GOOD_PROFILE, GOOD_PROFILE)), FP16, PROVEN),
    "TF32 for FP32, allowed": (Inspection(TF32), ExpectedPrecision("fp32", tf32=True), PROVEN),
    "TF32 for FP32, not allowed": (Inspection(TF32), ExpectedPrecision("fp32"), CONTRADICTED),
    "TF32 for FP16": (Inspection(TF32), ExpectedPrecision("fp16", tf32=True), CONTRADICTED),
    "only copies": (Inspection(COPIES), FP16, NOT_PROVEN),
    # Types are inferred from weights and names of kernels.
    **{
        f"hidden types in {version}": (inspection(version, "convolutions", hides=True), FP16, PROVEN)
        for version in VERSIONS
    },
    **{
        f"{precision} without evidence": (
            inspection("10.16", "generated", hides=True),
            ExpectedPrecision(precision),
            NOT_PROVEN,
        )
        for precision in ("fp32", "fp16", "bf16", "int8", "fp8")
    },
    **{
        f"unreadable text {text[:20]!r}": (Inspection(text), FP16, NOT_PROVEN)
        for text in ("", "{}", "[]", '{"Layers": 3}', "[" * 100_000)
    },
}


@pytest.mark.parametrize("case", OTHER_CASES)
def test_verdict_follows_the_evidence(case: str) -> None:
    inspected, expected, name = OTHER_CASES[case]
    assert engine_verdict(inspected, expected, 0)[1].name == name


RECORDED = Path(__file__).parents[1] / "recorded"


@pytest.mark.parametrize(
    ("part", "expected", "verdict"),
    [
        ("video", "1 in fp16", PROVEN),
        ("query", "15 in fp16, 2 ForeignNodes that show nothing", NOT_PROVEN),
        ("query.10", "15 in fp16, 2 ForeignNodes that show nothing", NOT_PROVEN),
    ],
)
def test_recorded_tensorrt_86_layers_give_expected_verdict(part: str, expected: str, verdict: str) -> None:
    """The engines are of the full-size network (benchmarks/results/gpu-2026-11-29-nvidia-h200.md)."""
    content = read_layers_file(RECORDED / f"inspector-8.6.0-fp16-{part}.layers.json.gz")
    views = [ProfileView(view["name"], view["shapes"], json.dumps(view["bound"])) for view in content["profiles"]]
    counted, reached = engine_verdict(Inspection(json.dumps(content["unbound"]), tuple(views)), FP16, 0)
    assert (str(counted), reached.name) == (expected, verdict)
    # The rules of the test double for 8.6: hidden types despite a context, and 0x1E between nodes.
    tensors = [tensor for layer in content["profiles"][0]["bound"]["Layers"] for tensor in layer["Inputs"]]
    assert {tensor["Format/Datatype"] for tensor in tensors} == {"N/A due to dynamic shapes"}
    assert part == "video" or any("]\x1e[" in layer["Metadata"] for layer in content["profiles"][0]["bound"]["Layers"])


def test_control_characters_in_inspector_json_are_read() -> None:
    text = document("8.6", "convolutions", bound=True)
    assert "\x1e" in text
    with pytest.raises(json.JSONDecodeError):
        json.loads(text)
    assert count_layers(read_layers(text)).arithmetic == {"fp16": 4}
    (view,) = Inspection(text, (ProfileView("all queries", {}, text),)).to_dict()["profiles"]
    assert len(view["bound"]["Layers"]) == len(json.loads(text, strict=False)["Layers"])


def test_contradicted_is_exit_code_1() -> None:
    _, verdict = engine_verdict(inspection("11.4", "wide"), FP16, 0)
    with raises(CheckFailed, "precision_contradicted", "fp16"):
        require(verdict, "fp16")
    require(Verdict(PROVEN, ""), "fp16")
    require(Verdict(NOT_PROVEN, ""), "fp16")


def test_tensorrt_8_layers_are_counted_for_one_profile() -> None:
    assert count_layers(read_layers(document("8.6", "convolutions", bound=True, profiles=3))).arithmetic == {"fp16": 4}


def test_fp32_modules_of_the_graph_do_not_contradict() -> None:
    kept = PrecisionStats(
        {"backbone_net.layers.0": {"fp32": 1}, "backbone_net.layers.1": {"fp16": 1}, "prop_fc": {"fp16": 9}}, {}
    )
    wide = json.loads(document("10.16", "wide", bound=True))["Layers"]
    narrow = [
        layer
        for layer in json.loads(document("10.16", "convolutions", bound=True))["Layers"]
        if "layers.0" not in layer["Name"]
    ]

    def verdict(layers: list[object]) -> str:
        return engine_verdict(Inspection(json.dumps({"Layers": layers})), ExpectedPrecision("fp16", kept), 0)[1].name

    # Every third layer is layers.0, which is FP32 in the graph.
    assert verdict([*narrow, *wide[0:30:3]]) == PROVEN
    assert verdict([*narrow, *wide[1:30:3]]) == CONTRADICTED


@pytest.mark.parametrize(("kind", "expected"), [("fp32", PROVEN), ("fp16", NOT_PROVEN)])
def test_nodes_in_fp32_must_not_be_narrower(kind: str, expected: str) -> None:
    expected_precision = ExpectedPrecision(
        "fp16", FP16.graph, fp32_nodes=frozenset({"fcos.head/Mul_4", "fcos.head/Exp"})
    )
    known_layers = [*layers(Writer("11.4", bound=True), "convolutions")]
    known_layers.append(
        Writer("11.4", bound=True).layer("PWN(fcos.head/Mul_4, fcos.head/Exp)", "PointWise", "fp16", kind)
    )
    _, verdict = engine_verdict(Inspection(json.dumps({"Layers": known_layers})), expected_precision, 0)
    assert verdict.name == expected
    assert ("fcos.head/Exp" in verdict.reason) == (expected == NOT_PROVEN)
    # 8.6 hides the types of such layers, and fused layers do not count.
    for hidden in (
        Writer("8.6", bound=True).layer("PWN(fcos.head/Exp)", "PointWise", "fp16", kind),
        Writer("11.4", bound=True).layer("PWN(fcos.head/Exp, fcos.head/Add)", "PointWise", "fp16", kind),
    ):
        _, verdict = engine_verdict(
            Inspection(json.dumps({"Layers": [*known_layers[:-1], hidden]})), expected_precision, 0
        )
        assert verdict.name == PROVEN


def test_engine_size_over_expectation_is_only_a_warning() -> None:
    weights = 200_000_000
    expected_precision = ExpectedPrecision("fp16", FP16.graph, weights)
    inspected = inspection("11.4", "convolutions")
    assert engine_verdict(inspected, expected_precision, 105_000_000)[1].name == PROVEN
    # Kernels are larger than a small network.
    assert not check_size(21_500_000, ExpectedPrecision("fp16", None, 10_000), 1)
    # One copy of the weights for each profile.
    assert quotes(check_size(208_000_000, expected_precision, 2), 2)
    _, verdict = engine_verdict(inspected, expected_precision, 208_000_000)
    assert verdict.name == NOT_PROVEN
    assert not quotes(check_size(208_000_000, expected_precision, 1), 2)
    # 11.4's lean runtime has 105 MB.
    assert check_size(105_000_000 + 105_000_000, expected_precision, 1)
    assert not check_size(
        105_000_000 + 105_000_000, ExpectedPrecision("fp16", None, weights, version_compatible=True), 1
    )


def test_both_inspector_formats_are_read() -> None:
    together = count_layers(read_layers(document("10.16", "int8", bound=True)), 7)
    apart = count_layers(read_layers(document("11.4", "int8", bound=True)), 7)
    assert (
        together
        == apart
        == EngineLayerStats({"fp16": 7, "fp32": 1}, {"fp32": 2, "int8": 4, "fp16": 2}, 7, {"int8": 4, "fp16": 2})
    )


@pytest.mark.parametrize(
    ("kernel", "kind"),
    [
        ("cutlass3x_sm100_sptensorop_i128x128x64spgemm_s8_s8_s32_f16_f16_128x128x128_0_align32_1sm", "int8"),
        ("cutlass3x_sm100_sptensorop_i128x128x64spgemm_s8_s8_s32_bf16_bf16_128x128x128_0_align32_1sm", "int8"),
        ("cutlass3x_sm90_tensorop_s64x128x16gemm_f16_f16_f32_f32_f32_64x128x64", "fp16"),
        ("cutlass3x_sm90_tensorop_s64x128x32gemm_e4m3_e4m3_f32_bf16_bf16_64x128x128", "fp8"),
    ],
)  # fmt: skip
def test_cutlass_kernel_names_reveal_input_types(kernel: str, kind: str) -> None:
    """The first two names start like names in libtensorrt_rtx.so of 1.7.1: INT8 products with FP16 and BF16 output."""
    layer = {
        "Name": "prop_fc.conv/Conv", "LayerType": "CaskConvolution", "TacticName": kernel, "Weights": {"Type": "Int8"},
    }  # fmt: skip
    assert count_layers(read_layers(json.dumps({"Layers": [layer]}))).arithmetic == {kind: 1}
