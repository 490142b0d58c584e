"""Test `calib.accuracy` and `calib.restore`: loss of quantized graphs, choice of method, modules to restore."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import onnx
import pytest

from calib.accuracy import AccuracyDelta, AccuracyEvaluator, Candidate, choose_candidate, format_deltas, table_of
from calib.calibration_set import CalibrationSet
from calib.calibration_table import CalibrationTable
from calib.errors import CalibrationError
from calib.graph.onnx_graph import weights_hash
from calib.graph.onnx_session import InMemoryBackend, InMemorySplitBackend
from calib.graph.split_model import split_graph
from calib.qdq_quantizer import QuantizationPolicy, insert_qdq, modules
from calib.quantization_plan import QuantizationPlan
from calib.range_estimation import METHODS, ActivationStatistics, Histogram
from calib.rank_layers import measure_sensitivity
from calib.restore import find_layers_to_restore, minimal_keep_set
from runtime.core.batch import HEAD_NAMES, Batch
from runtime.core.errors import CheckFailed
from runtime.datasets.dataset import DataSet
from tests.calib.conftest import altered
from tests.raising import raises

NO_LOSS = AccuracyDelta(0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 1000)


@pytest.fixture(scope="module")
def evaluator(model: onnx.ModelProto, data_set: DataSet, drawn: CalibrationSet) -> AccuracyEvaluator:
    return AccuracyEvaluator(model, data_set, drawn.held_out, threads=1)


def test_split_int8_graph_equals_unsplit_graph(model: onnx.ModelProto, table: CalibrationTable, batch: Batch) -> None:
    int8 = insert_qdq(model, table)
    actual = InMemorySplitBackend(*split_graph(int8), 1).run(batch)
    expected = InMemoryBackend(int8, 1).run(batch)
    for name in HEAD_NAMES:
        np.testing.assert_array_equal(getattr(actual, name), getattr(expected, name))


def test_evaluator_uses_the_encodings_of_each_graph(evaluator: AccuracyEvaluator, model: onnx.ModelProto) -> None:
    same = AccuracyDelta(0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 48)
    other = altered(model, by=3)
    first = evaluator.cost(other, "other")
    assert first.agreement < 0.99
    assert evaluator.cost(model, "itself") == same
    assert evaluator.cost(other, "other") == first


def test_cost_matches_hand_computed_values(evaluator: AccuracyEvaluator, monkeypatch: pytest.MonkeyPatch) -> None:
    reference, truth = evaluator.reference, evaluator.reference.truth
    before, after = (
        {threshold: spans.copy() for threshold, spans in reference.detections.items()} for _ in ("before", "after")
    )
    # Query 0 becomes wrong by half a video; query 1 becomes right.
    for threshold in before:
        before[threshold][0, 0, :2] = truth[0]
        after[threshold][0, 0, :2] = truth[0] + (0.5 if truth[0, 0] < 0.5 else -0.5)
        before[threshold][1, 0, :2] = (0, 1) if truth[1, 1] - truth[1, 0] < 0.4 else (0, 0.01)
        after[threshold][1, 0, :2] = truth[1]
    monkeypatch.setattr(evaluator, "reference", dataclasses.replace(reference, detections=before))
    cost = evaluator.compare(dataclasses.replace(reference, detections=after))
    assert (cost.lost_50, cost.gained_50, cost.lost_70, cost.gained_70) == (1, 1, 1, 1)
    assert (cost.drop_50, cost.drop_70, cost.shift_median) == (0, 0, 0)
    assert cost.shift_p99 > 0
    first, second = after[0.5][:2, 0], before[0.5][:2, 0]
    shared = np.maximum(0, np.minimum(first[:, 1], second[:, 1]) - np.maximum(first[:, 0], second[:, 0]))
    overlaps = shared / (first[:, 1] - first[:, 0] + second[:, 1] - second[:, 0] - shared)
    assert cost.agreement == pytest.approx((46 + overlaps.sum()) / 48, abs=1e-6)


def test_evaluator_rejects_test_sentences(model: onnx.ModelProto, data_set: DataSet) -> None:
    leaked = data_set.annotations("test")[:4]
    with raises(CalibrationError, "test_videos_used", leaked[0].video):
        AccuracyEvaluator(model, data_set, leaked)


def test_choose_candidate_selects_highest_agreement(
    model: onnx.ModelProto, statistics: ActivationStatistics, drawn: CalibrationSet, evaluator: AccuracyEvaluator
) -> None:
    best, costs = choose_candidate(model, statistics, drawn, evaluator)
    assert {candidate.method for candidate in costs if candidate.equalize} == set(METHODS)
    assert sum(not candidate.equalize for candidate in costs) == 1
    equalized = {candidate: cost.agreement for candidate, cost in costs.items() if candidate.equalize}
    (other,) = costs.keys() - equalized.keys()
    first = max(equalized, key=lambda candidate: equalized[candidate])
    assert other.method == first.method
    # Equalization is given up only for more than the error of the measurement.
    limit = equalized[first] + costs[first].agreement_error
    assert best == (other if costs[other].agreement > limit else first)
    assert "agreement" in format_deltas([(str(candidate), cost) for candidate, cost in costs.items()])
    assert not table_of(model, statistics, drawn, Candidate("mse", equalize=False)).gains
    # An outlier that no held-out video contains affects only min-max.
    spoilt = {}
    for name, histogram in statistics.equalized.items():
        spoilt[name] = Histogram()
        arrays = {"counts": histogram.counts.copy(), "energies": histogram.energies.copy()}
        spoilt[name].__dict__.update({**vars(histogram), **arrays})
        spoilt[name].add(np.full(1, 60 * histogram.magnitude, np.float32))
    statistics = ActivationStatistics(spoilt, spoilt, {})
    best, costs = choose_candidate(model, statistics, drawn, evaluator, methods=("minmax", "percentile"))
    assert best == Candidate("percentile")
    assert costs[Candidate("minmax")].agreement < costs[best].agreement - 0.05


@pytest.mark.parametrize(("gain", "equalize"), [(0.0005, True), (0.002, False)])
def test_choose_candidate_drops_equalization_only_beyond_error(
    model: onnx.ModelProto, statistics: ActivationStatistics, drawn: CalibrationSet, gain: float, equalize: bool
) -> None:
    cost = AccuracyDelta(*[0.0] * 9, agreement=0.98, queries=100, agreement_error=0.001)
    costs = iter([cost, dataclasses.replace(cost, agreement=0.98 + gain)])
    evaluator = cast(AccuracyEvaluator, SimpleNamespace(cost=lambda graph, label: next(costs)))
    best, _ = choose_candidate(model, statistics, drawn, evaluator, methods=("mse",))
    assert best == Candidate("mse", equalize)


def test_sensitivity_ranks_modules(
    model: onnx.ModelProto, table: CalibrationTable, evaluator: AccuracyEvaluator
) -> None:
    # The module whose input range is far too narrow must be first.
    tensor = "fpn/Add"
    tight = dataclasses.replace(table.ranges[tensor], low=0.0, high=table.ranges[tensor].high / 30)
    ranking = measure_sensitivity(model, dataclasses.replace(table, ranges={**table.ranges, tensor: tight}), evaluator)
    assert ranking[0].module == "fpn.layer_blocks.1"
    assert {entry.module for entry in ranking} == set(modules(model, QuantizationPolicy()))
    assert [entry.cost.agreement for entry in ranking] == sorted(entry.cost.agreement for entry in ranking)
    assert sum(entry.share for entry in ranking) < 1
    assert ranking[0].share > 0


class ScriptedEvaluator:
    """Report a drop of 1 point for each harmful module that is quantized, in the given measures."""

    def __init__(self, *harmful: str, measures: Sequence[str] = ("drop_50", "drop_70", "drop_miou")) -> None:
        self.harmful, self.measures = harmful, measures
        self.annotations = list(range(1000))
        self.calls = 0

    def cost(self, model: onnx.ModelProto, label: str) -> AccuracyDelta:
        self.calls += 1
        quantized = {node.name.rpartition("/")[0] for node in model.graph.node if node.op_type == "DequantizeLinear"}
        drop = float(len(quantized & set(self.harmful)))
        return dataclasses.replace(NO_LOSS, agreement=1 - drop / 10, **dict.fromkeys(self.measures, drop))


@pytest.mark.parametrize("order", [None, ["fpn.layer_blocks.1", "qInput.0", "fcos.head.towers.0", "prop_fc"]])
def test_smallest_set_is_restored(model: onnx.ModelProto, table: CalibrationTable, order: list[str] | None) -> None:
    evaluator = ScriptedEvaluator("fpn.layer_blocks.1", "fcos.head.towers.0")
    plan, steps = find_layers_to_restore(model, table, evaluator, 0.2, order)
    assert set(plan.keep) == {"fpn.layer_blocks.1", "fcos.head.towers.0"}
    assert plan.measured["cost"]["drop of mIoU, points"] == 0
    assert len(plan.measured["steps"]) == len(steps)
    # Each point of the budget saves a module.
    assert len(find_layers_to_restore(model, table, evaluator, 1.0, order)[0].keep) == 1


def test_budget_that_is_met_or_unreachable_needs_no_plan(model: onnx.ModelProto, table: CalibrationTable) -> None:
    evaluator = ScriptedEvaluator()
    plan, steps = find_layers_to_restore(model, table, evaluator, 0.2)
    assert plan.keep == ()
    assert evaluator.calls == len(steps) == 1
    harmful = ScriptedEvaluator(*modules(model, QuantizationPolicy()))
    with raises(CheckFailed, "budget_exceeded", "INT8", "1.00", 0.2, "--max-drop"):
        find_layers_to_restore(model, table, harmful, 0.2)


class KeepSetSearch:
    """Run `minimal_keep_set` with a predicate in place of measurements, and check that it measures no set twice."""

    def __init__(self, suffices: Callable[[set[str]], bool], ranked: str = "ABCDE") -> None:
        self.suffices, self.ranked = suffices, ranked
        self.measured: list[frozenset[str]] = []

    def cost(self, keep: Sequence[str], label: str) -> AccuracyDelta:
        assert len(set(keep)) == len(keep)
        assert frozenset(keep) not in self.measured
        assert len(keep) < len(self.ranked), "nothing would be quantized"
        self.measured.append(frozenset(keep))
        return dataclasses.replace(NO_LOSS, drop_70=0 if self.suffices(set(keep)) else 1)

    def run(self) -> list[str] | None:
        actual, steps = minimal_keep_set(lambda: list(self.ranked), self.cost, lambda cost: cost.worst_drop <= 0)
        assert len(steps) == len(self.measured) <= 4 * len(self.ranked)
        if actual is not None:
            # The last sufficient set is the result.
            assert [keep for keep in self.measured if self.suffices(set(keep))][-1] == set(actual)
        return actual


@pytest.mark.parametrize(
    ("suffices", "ranked", "expected", "measurements"),
    [
        pytest.param(lambda keep: True, "ABCDE", [], 1, id="nothing to restore"),
        pytest.param(lambda keep: "A" in keep, "ABCDE", ["A"], 2, id="first module"),
        # The empty set, A, AB; B (A is known); C and D.
        pytest.param(lambda keep: "D" in keep or {"A", "B"} <= keep, "ABCDE", ["D"], 6, id="one instead of two"),
        pytest.param(
            lambda keep: "E" in keep or {"A", "B", "C"} <= keep, "ABCDE", ["E"], 10, id="one instead of three"
        ),
        pytest.param(lambda keep: "B" in keep, "AB", ["B"], 3, id="last of two"),
        pytest.param(lambda keep: "A" in keep, "A", None, 1, id="only module"),
        # Every set of all modules but one is tried.
        pytest.param(lambda keep: False, "ABCDE", None, 9, id="no solution"),
    ],
)
def test_minimal_keep_set_measures_few_sets(
    suffices: Callable[[set[str]], bool], ranked: str, expected: list[str] | None, measurements: int
) -> None:
    search = KeepSetSearch(suffices, ranked)
    assert search.run() == expected
    assert len(search.measured) == measurements


def test_minimal_keep_set_returns_exactly_the_needed_modules() -> None:
    for count in (1, 2, 3, 4):
        for needed in itertools.combinations("ABCDE", count):
            actual = KeepSetSearch(lambda keep, needed=needed: set(needed) <= keep).run()
            assert actual is not None, needed
            assert set(actual) == set(needed)


def test_each_measure_counts_against_the_budget(model: onnx.ModelProto, table: CalibrationTable) -> None:
    evaluator = ScriptedEvaluator("fpn.layer_blocks.1", measures=["drop_miou"])
    assert find_layers_to_restore(model, table, evaluator, 0.2)[0].keep == ("fpn.layer_blocks.1",)
    for measure in ("drop_miou", "drop_70"):
        assert dataclasses.replace(NO_LOSS, **{measure: 2.0}).worst_drop == 2.0


def test_budget_below_one_query_counts_only_losses_beyond_chance() -> None:
    few = dataclasses.replace(NO_LOSS, queries=112)
    two = dataclasses.replace(few, lost_70=2, drop_70=200 / 112)
    assert two.within(0.2)
    assert not two.within(0)
    assert not two.within(0.9)  # one of 112 queries is 0.893 points, so that this budget is resolved
    assert not dataclasses.replace(few, lost_70=6, drop_70=600 / 112).within(0.2)
    assert dataclasses.replace(few, drop_miou=0.5, miou_error=0.3).within(0.2)
    assert not dataclasses.replace(few, drop_miou=0.5, miou_error=0.1).within(0.2)
    assert not dataclasses.replace(NO_LOSS, queries=500, lost_70=2, drop_70=0.4).within(0.2)


PLAN = QuantizationPlan(
    ("prop_fc",), "int8", "1" * 64, {"graph": "2"}, {"max_drop": 0.2, "steps": [{"step": "all narrow"}]}
)


def test_plan_of_another_graph_table_or_precision_is_rejected(model: onnx.ModelProto, table: CalibrationTable) -> None:
    plan, _ = find_layers_to_restore(model, table, ScriptedEvaluator("prop_fc"), 0.2)
    assert plan.checked(model, table, "int8").keep == ("prop_fc",)
    with raises(CalibrationError, "table_of_another_model", weights_hash(altered(model))[:12]):
        plan.checked(altered(model), table, "int8")
    with raises(CalibrationError, "precision_mismatch", "int8", "fp8"):
        plan.checked(model, table, "fp8")
    # The key of a table does not depend on its ranges.
    name, actual = next(iter(table.ranges.items()))
    tighter = {**table.ranges, name: dataclasses.replace(actual, high=actual.high / 2)}
    with raises(CalibrationError, "plan_of_another_table", table.digest[:12]):
        plan.checked(model, dataclasses.replace(table, ranges=tighter), "int8")


NO_DIGEST_MATCH = [{"keep": []}, {"kind": "fp8"}, {"table": "0" * 64}, {"key": {}}, {"measured": {}}, {"digest": None}]
INVALID = [
    {"keep": "fpn"},
    {"keep": [7]},
    {"keep": None},
    {"keep": {"prop_fc": 1}},
    {"key": "x"},
    {"key": {"graph": 7}},
    {"kind": ["int8"]},
    {"kind": "int4"},
    {"table": None},
    {"measured": []},
]
NOT_JSON = [{"table": 10**400}, {"measured": {"max_drop": float("nan")}}]


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        *((fields, "digest_mismatch") for fields in NO_DIGEST_MATCH),
        *((fields, "invalid_plan") for fields in INVALID),
        *((fields, "invalid_json") for fields in NOT_JSON),
        ({"format": "other/1"}, "unknown_format"),
    ],
    ids=repr,
)
def test_edited_plan_is_rejected(tmp_path: Path, fields: dict[str, Any], code: str) -> None:
    path = tmp_path / "plan.json"
    PLAN.save(path)
    assert QuantizationPlan.load(path) == PLAN
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))
    # The message names the command that makes a plan.
    advice = () if code == "invalid_json" else ("calib.restore",)
    with raises(CalibrationError, code, path, *advice):
        QuantizationPlan.load(path)


def test_plan_with_missing_field_is_rejected(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    PLAN.save(path)
    fields = json.loads(path.read_text())
    for name in ("keep", "kind", "table", "key", "measured", "digest"):
        path.write_text(json.dumps({key: value for key, value in fields.items() if key != name}))
        with raises(CalibrationError, "missing_field", path, f"'{name}'"):
            QuantizationPlan.load(path)
