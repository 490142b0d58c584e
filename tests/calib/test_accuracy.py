"""Test `calib.accuracy` and `calib.restore`: loss of quantized graphs, choice of method, modules to restore."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

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


@pytest.fixture(scope="module")
def evaluator(model: onnx.ModelProto, data_set: DataSet, drawn: CalibrationSet) -> AccuracyEvaluator:
    return AccuracyEvaluator(model, data_set, drawn.held_out, threads=1)


@pytest.mark.parametrize("narrowed", [False, True])
def test_split_graph_answers_as_the_whole_one(
    model: onnx.ModelProto, table: CalibrationTable, batch: Batch, narrowed: bool
) -> None:
    whole = insert_qdq(model, table) if narrowed else model
    actual = InMemorySplitBackend(*split_graph(whole), 1).run(batch)
    expected = InMemoryBackend(whole, 1).run(batch)
    for name in HEAD_NAMES:
        np.testing.assert_array_equal(getattr(actual, name), getattr(expected, name))


def test_reference_graph_has_zero_cost(evaluator: AccuracyEvaluator, model: onnx.ModelProto) -> None:
    cost = evaluator.cost(model, "itself")
    assert cost == AccuracyDelta(0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 48)


def test_evaluator_keeps_encodings_per_graph(evaluator: AccuracyEvaluator, model: onnx.ModelProto) -> None:
    other = onnx.ModelProto()
    other.CopyFrom(altered(model))
    tensor = next(entry for entry in other.graph.initializer if entry.name == "prop_fc.bias")
    tensor.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(tensor) + 3, tensor.name))
    first = evaluator.cost(other, "other")
    assert first.agreement < 0.99
    assert evaluator.cost(model, "itself").agreement == 1
    assert evaluator.cost(other, "other") == first


def test_cost_matches_hand_computed_values(evaluator: AccuracyEvaluator) -> None:
    expected = evaluator.reference
    moved = {threshold: picks.copy() for threshold, picks in expected.detections.items()}
    truth = expected.truth.copy()
    # Query 0 becomes wrong by half a video; query 1 becomes right.
    for picks in moved.values():
        picks[0, 0, :2] = truth[0] + (0.5 if truth[0, 0] < 0.5 else -0.5)
        picks[1, 0, :2] = truth[1]
    before = {threshold: picks.copy() for threshold, picks in expected.detections.items()}
    for picks in before.values():
        picks[0, 0, :2] = truth[0]
        picks[1, 0, :2] = (0, 1) if truth[1, 1] - truth[1, 0] < 0.4 else (0, 0.01)
    kept = evaluator.reference
    evaluator.reference = dataclasses.replace(kept, detections=before)
    try:
        cost = evaluator.compare(dataclasses.replace(kept, detections=moved))
    finally:
        evaluator.reference = kept
    assert (cost.lost_50, cost.gained_50, cost.lost_70, cost.gained_70) == (1, 1, 1, 1)
    assert cost.drop_50 == cost.drop_70 == 0
    assert cost.shift_median == 0
    assert cost.shift_p99 > 0
    assert cost.agreement == pytest.approx((46 + overlap(moved[0.5][:2, 0], before[0.5][:2, 0])) / 48, abs=1e-6)


def overlap(a: np.ndarray, b: np.ndarray) -> float:
    shared = np.maximum(0, np.minimum(a[:, 1], b[:, 1]) - np.maximum(a[:, 0], b[:, 0]))
    return float((shared / (a[:, 1] - a[:, 0] + b[:, 1] - b[:, 0] - shared)).sum())


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
    assert all(costs[best].agreement >= cost.agreement for cost in costs.values())
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


def test_sensitivity_ranks_modules_by_agreement(
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


class Scripted:
    """An evaluator for which a graph loses 1 point for each of these modules that is quantized."""

    def __init__(self, *harmful: str) -> None:
        self.harmful = harmful
        self.annotations = list(range(1000))
        self.asked = 0

    def cost(self, model: onnx.ModelProto, label: str) -> AccuracyDelta:
        self.asked += 1
        narrowed = {node.name.rpartition("/")[0] for node in model.graph.node if node.op_type == "DequantizeLinear"}
        drop = float(len(narrowed & set(self.harmful)))
        return AccuracyDelta(drop, drop, drop, 0, 0, 0, 0, 0, 0, 1 - drop / 10, 1000)


def test_no_module_is_restored_within_budget(model: onnx.ModelProto, table: CalibrationTable) -> None:
    evaluator = Scripted()
    plan, steps = find_layers_to_restore(model, table, evaluator, 0.2)  # type: ignore[arg-type]
    assert plan.keep == ()
    assert evaluator.asked == len(steps) == 1


@pytest.mark.parametrize("order", [None, ["fpn.layer_blocks.1", "qInput.0", "fcos.head.towers.0", "prop_fc"]])
def test_smallest_module_set_is_restored(
    model: onnx.ModelProto, table: CalibrationTable, order: list[str] | None
) -> None:
    evaluator = Scripted("fpn.layer_blocks.1", "fcos.head.towers.0")
    plan, steps = find_layers_to_restore(model, table, evaluator, 0.2, order)  # type: ignore[arg-type]
    assert set(plan.keep) == {"fpn.layer_blocks.1", "fcos.head.towers.0"}
    assert plan.measured["cost"]["drop of mIoU, points"] == 0
    assert len(plan.measured["steps"]) == len(steps)
    # Each point of the budget saves a module.
    assert len(find_layers_to_restore(model, table, evaluator, 1.0, order)[0].keep) == 1  # type: ignore[arg-type]


NOTHING_LOST = AccuracyDelta(0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 1000)


class Sets:
    """The callbacks of `minimal_keep_set`: a test defines which sets suffice; each set is measured once."""

    def __init__(self, enough: Callable[[set[str]], bool], ranked: str = "ABCDE") -> None:
        self.enough, self.ranked = enough, ranked
        self.asked: list[frozenset[str]] = []

    def cost(self, keep: Sequence[str], label: str) -> AccuracyDelta:
        assert len(set(keep)) == len(keep)
        assert frozenset(keep) not in self.asked
        assert len(keep) < len(self.ranked), "nothing would be narrow"
        self.asked.append(frozenset(keep))
        return dataclasses.replace(NOTHING_LOST, drop_70=0 if self.enough(set(keep)) else 1)

    def fewest(self) -> list[str] | None:
        actual, steps = minimal_keep_set(lambda: list(self.ranked), self.cost, lambda cost: cost.worst_drop <= 0)
        assert len(steps) == len(self.asked) <= 4 * len(self.ranked)
        if actual is not None:
            # The last step that holds belongs to the result.
            assert [asked for asked in self.asked if self.enough(set(asked))][-1] == set(actual)
        return actual


def test_minimal_keep_set_prefers_one_sufficient_module() -> None:
    sets = Sets(lambda keep: "D" in keep or {"A", "B"} <= keep)
    assert sets.fewest() == ["D"]
    # The empty set, A, AB; B (A is known); C and D.
    assert len(sets.asked) == 6


def test_last_ranked_module_alone_can_be_restored() -> None:
    assert Sets(lambda keep: "E" in keep).fewest() == ["E"]
    assert Sets(lambda keep: "E" in keep or {"A", "B", "C"} <= keep).fewest() == ["E"]
    assert Sets(lambda keep: "B" in keep, ranked="AB").fewest() == ["B"]


def test_last_two_ranked_modules_can_be_restored() -> None:
    assert Sets(lambda keep: {"D", "E"} <= keep).fewest() == ["D", "E"]


def test_first_sufficient_set_needs_no_further_evaluation() -> None:
    sets = Sets(lambda keep: "A" in keep)
    assert sets.fewest() == ["A"]
    assert len(sets.asked) == 2
    sets = Sets(lambda keep: True)
    assert sets.fewest() == []
    assert len(sets.asked) == 1


def test_search_without_solution_returns_none() -> None:
    sets = Sets(lambda keep: False)
    assert sets.fewest() is None
    assert len(sets.asked) == 9
    assert {asked for asked in sets.asked if len(asked) == 4} == set(map(frozenset, itertools.combinations("ABCDE", 4)))
    assert Sets(lambda keep: "A" in keep, ranked="A").fewest() is None


@pytest.mark.parametrize("needed", [set(some) for n in (1, 2, 3, 4) for some in itertools.combinations("ABCDE", n)])
def test_search_returns_exactly_the_needed_modules(needed: set[str]) -> None:
    actual = Sets(lambda keep: needed <= keep).fewest()
    assert actual is not None
    assert set(actual) == needed


def test_miou_drop_counts_against_the_budget(model: onnx.ModelProto, table: CalibrationTable) -> None:
    class OfMiou(Scripted):
        def cost(self, model: onnx.ModelProto, label: str) -> AccuracyDelta:
            return dataclasses.replace(super().cost(model, label), drop_50=0.0, drop_70=0.0)

    plan, _ = find_layers_to_restore(model, table, OfMiou("fpn.layer_blocks.1"), 0.2)  # type: ignore[arg-type]
    assert plan.keep == ("fpn.layer_blocks.1",)
    assert dataclasses.replace(NOTHING_LOST, drop_miou=2.0).worst_drop == 2.0
    assert dataclasses.replace(NOTHING_LOST, drop_70=2.0).worst_drop == 2.0


def test_budget_below_one_query_counts_only_losses_beyond_chance() -> None:
    few = dataclasses.replace(NOTHING_LOST, queries=112)
    two = dataclasses.replace(few, lost_70=2, drop_70=200 / 112)
    assert two.within(0.2)
    assert not two.within(0)
    assert not two.within(0.9)  # one of 112 queries is 0.893 points, so that this budget is resolved
    assert not dataclasses.replace(few, lost_70=6, drop_70=600 / 112).within(0.2)
    assert dataclasses.replace(few, drop_miou=0.5, miou_error=0.3).within(0.2)
    assert not dataclasses.replace(few, drop_miou=0.5, miou_error=0.1).within(0.2)
    assert not dataclasses.replace(NOTHING_LOST, queries=500, lost_70=2, drop_70=0.4).within(0.2)


def test_unreachable_budget_raises_check_failed(model: onnx.ModelProto, table: CalibrationTable) -> None:
    evaluator = Scripted(*modules(model, QuantizationPolicy()))
    with raises(CheckFailed, "budget_exceeded", "INT8", "1.00", 0.2, "--max-drop"):
        find_layers_to_restore(model, table, evaluator, 0.2)  # type: ignore[arg-type]


def test_plan_of_another_graph_or_table_is_rejected(model: onnx.ModelProto, table: CalibrationTable, tmp_path) -> None:  # type: ignore[no-untyped-def]
    plan, _ = find_layers_to_restore(model, table, Scripted("prop_fc"), 0.2)  # type: ignore[arg-type]
    plan.save(tmp_path / "plan.json")
    again = QuantizationPlan.load(tmp_path / "plan.json")
    assert again == plan
    assert again.checked(model, table, "int8").keep == ("prop_fc",)
    with raises(CalibrationError, "table_of_another_model", weights_hash(altered(model))[:12]):
        again.checked(altered(model), table, "int8")
    with raises(CalibrationError, "plan_of_another_table", table.digest[:12]):
        again.checked(model, dataclasses.replace(table, ranges={}), "int8")
    with raises(CalibrationError, "precision_mismatch", "int8", "fp8"):
        again.checked(model, table, "fp8")
    # The key of a table does not depend on its ranges.
    name, actual = next(iter(table.ranges.items()))
    tighter = {**table.ranges, name: dataclasses.replace(actual, high=actual.high / 2)}
    with raises(CalibrationError, "plan_of_another_table", table.digest[:12]):
        again.checked(model, dataclasses.replace(table, ranges=tighter), "int8")
    (tmp_path / "plan.json").write_text("{}")
    with raises(CalibrationError, "unknown_format", tmp_path / "plan.json"):
        QuantizationPlan.load(tmp_path / "plan.json")


@pytest.mark.parametrize(
    ("fields", "code", "values"),
    [
        ({"keep": []}, "digest_mismatch", ()),
        ({"keep": ["prop_fc", "fpn"]}, "digest_mismatch", ()),
        ({"kind": "fp8"}, "digest_mismatch", ()),
        ({"table": "0" * 64}, "digest_mismatch", ()),
        ({"measured": {}}, "digest_mismatch", ()),
        ({"digest": None}, "digest_mismatch", ()),
        ({"keep": "fpn"}, "invalid_plan", ("'fpn'",)),
        ({"keep": [7]}, "invalid_plan", ("[7]",)),
        ({"keep": None}, "invalid_plan", (None,)),
        ({"key": "x"}, "invalid_plan", ("'key'", "'measured'")),
        ({"measured": []}, "invalid_plan", ("'key'", "'measured'")),
        ({"keep": {"prop_fc": 1}}, "invalid_plan", ("'prop_fc'",)),
        ({"key": {"graph": 7}}, "invalid_plan", ("'kind'", "'table'")),
        ({"key": {"graph": ["2"]}}, "invalid_plan", ("'kind'", "'table'")),
        ({"kind": ["int8"]}, "invalid_plan", ("'kind'", "'table'")),
        ({"kind": "int4"}, "invalid_plan", ("'kind'", "'table'")),
        ({"table": 10**400}, "invalid_json", ()),
        ({"table": None}, "invalid_plan", ("'kind'", "'table'")),
        ({"measured": {"max_drop": float("nan")}}, "invalid_json", ()),
    ],
)
def test_edited_plan_is_rejected(tmp_path: Path, fields: dict[str, Any], code: str, values: tuple[str, ...]) -> None:
    path = tmp_path / "plan.json"
    plan = QuantizationPlan(
        ("prop_fc",), "int8", "1" * 64, {"graph": "2"}, {"max_drop": 0.2, "steps": [{"step": "all narrow"}]}
    )
    plan.save(path)
    assert QuantizationPlan.load(path) == plan
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))
    # The message names the command that makes a plan.
    advice = () if code == "invalid_json" else ("calib.restore",)
    with raises(CalibrationError, code, path, *values, *advice):
        QuantizationPlan.load(path)


@pytest.mark.parametrize("field", ["keep", "kind", "table", "key", "measured", "digest"])
def test_plan_with_missing_field_is_rejected(tmp_path: Path, field: str) -> None:
    path = tmp_path / "plan.json"
    QuantizationPlan(("prop_fc",), "int8", "1" * 64, {}, {}).save(path)
    value = json.loads(path.read_text())
    del value[field]
    path.write_text(json.dumps(value))
    with raises(CalibrationError, "missing_field", path, f"'{field}'"):
        QuantizationPlan.load(path)
