"""`python -m calib.rank_layers`: rank DRN modules by the accuracy that INT8 costs in each of them alone."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from calib.accuracy import AccuracyDelta, AccuracyEvaluator, format_deltas
from calib.calibrate import measure_table
from calib.calibration_set import HELD_OUT, sample_calibration_set, sample_held_out
from calib.calibration_table import CalibrationTable
from calib.errors import CalibrationError
from calib.graph.onnx_graph import load_fp32_graph, read_manifest
from calib.graph.precision_audit import count_macs
from calib.qdq_quantizer import QuantDtype, QuantizationPolicy, find_quantizable_ops, insert_qdq, modules
from runtime.core.cli import command, report_written, suggest_next_command
from runtime.core.errors import excerpt, one_line
from runtime.core.io.atomic_files import write_json
from runtime.core.io.input_files import read_json
from runtime.core.io.text_files import check_format
from runtime.datasets.dataset import DataSet

if TYPE_CHECKING:
    import onnx

log = logging.getLogger("drn")

FORMAT = "drn-layer-ranking/1"


@dataclasses.dataclass(frozen=True)
class LayerSensitivity:
    """The accuracy loss of a graph in which one module alone is quantized.

    Attributes:
        module: name of the module.
        share: its share of the multiply-adds, 0 to 1.
        cost: loss against the FP32 graph.
    """

    module: str
    share: float
    cost: AccuracyDelta


def rank_layers(
    onnx: Path,
    data: Path,
    *,
    table: Path | None = None,
    output: Path | None = None,
    held_out: int = HELD_OUT,
    seed: int = 0,
    kind: QuantDtype = "int8",
    threads: int | None = None,
) -> list[LayerSensitivity]:
    """Quantize one module at a time, and rank the modules by their loss of accuracy on held-out training queries.

    Args:
        onnx: FP32 graph from `python -m export.to_onnx`.
        data: directory of a data set (docs/formats.md). Only its training split is read.
        table: calibration table from `python -m calib.calibrate`. Default: calibrate first.
        output: JSON file to write the ranking to, for `python -m calib.restore --ranking`.
        held_out: number of held-out queries to measure the loss on.
        seed: random seed of the choice of queries.
        kind: 8-bit data type to quantize to.
        threads: number of CPU threads. Default: set by ONNX Runtime.

    Returns:
        The modules, most sensitive first.
    """
    model = load_fp32_graph(onnx)
    data_set = DataSet(data)
    calibration = given_table(model, data_set, table, seed, threads, str(onnx))
    queries = sample_held_out(data_set, read_manifest(model), held_out, seed, exclude=calibration.videos)
    evaluator = AccuracyEvaluator(model, data_set, queries, threads)
    everything = evaluator.cost(insert_qdq(model, calibration, kind=kind), "all")
    ranking = measure_sensitivity(model, calibration, evaluator, kind=kind)
    rows = [(f"{entry.module} ({100 * entry.share:.1f} %)", entry.cost) for entry in ranking]
    print(format_deltas([*rows, ("all of them", everything)]))
    print(
        f"Change in points from FP32 on {everything.queries} queries of held-out training videos, lowest agreement "
        "first."
    )
    if output:
        write_json(output, _ranking_json(ranking, everything, calibration, kind))
    report_written(output)
    given = ("--model", onnx, "--data", data, "--table", table or "TABLE")
    suggest_next_command("calib.restore", *given, *(("--ranking", output) if output else ()), "--output", "plan.json")
    return ranking


def measure_sensitivity(
    model: onnx.ModelProto,
    table: CalibrationTable,
    evaluator: AccuracyEvaluator,
    policy: QuantizationPolicy | None = None,
    kind: QuantDtype = "int8",
) -> list[LayerSensitivity]:
    """Quantize each module of a policy alone, and return the modules by agreement with FP32, lowest first.

    Args:
        model: FP32 graph.
        policy: modules to quantize; the default policy when None.
    """
    policy = policy or QuantizationPolicy()
    macs = count_macs(model)
    total = sum(operator.count for operator in macs.values())
    work: dict[str, int] = {}
    for site in find_quantizable_ops(model, policy, kind):
        work[site.module] = work.get(site.module, 0) + (macs[site.node].count if site.node in macs else 0)
    ranking = []
    for module in tqdm(modules(model, policy, kind), desc="ranking", unit="module", leave=False, disable=None):
        alone = insert_qdq(model, table, policy.only(module), kind)
        ranking.append(LayerSensitivity(module, work[module] / total, evaluator.cost(alone, module)))
    return sorted(ranking, key=lambda entry: entry.cost.agreement)


def _ranking_json(
    ranking: list[LayerSensitivity], everything: AccuracyDelta, table: CalibrationTable, kind: QuantDtype
) -> dict[str, Any]:
    """Return a ranking as JSON values of the format `FORMAT`."""
    return {
        "format": FORMAT,
        "kind": kind,
        "table": table.digest,
        "all": everything.to_dict(),
        "modules": [
            {"module": entry.module, "share of multiply-adds": round(entry.share, 6), **entry.cost.to_dict()}
            for entry in ranking
        ],
    }


def ranked_names(path: Path, table: CalibrationTable, kind: QuantDtype) -> list[str]:
    """Return the modules in a ranking file, most sensitive first.

    Args:
        path: file that `python -m calib.rank_layers --output` wrote.
        table: calibration table that the ranking must belong to.

    Raises:
        CalibrationError: the file is not a ranking, or is of another table or kind.
    """
    value = read_json(path, "layer ranking", CalibrationError)
    check_format(value, FORMAT, f"{path}", CalibrationError, "make a ranking with `python -m calib.rank_layers`")
    try:
        actual = value["kind"], value["table"]
        names = [str(entry["module"]) for entry in value["modules"]]
    except (KeyError, TypeError) as error:
        raise CalibrationError(
            f"{path} is a damaged layer ranking ({type(error).__name__}: {one_line(error)}). Make one with "
            "`python -m calib.rank_layers`.",
            code="damaged_file",
        ) from error
    if actual != (kind, table.digest):
        raise CalibrationError(
            f"{path} is of another precision or calibration table: expected {kind} and {table.digest[:12]}…, got "
            f"{excerpt(actual[0])} and {excerpt(str(actual[1])[:12])}. Make one with "
            "`python -m calib.rank_layers --table`.",
            code="ranking_of_another_table",
        )
    return names


def given_table(
    model: onnx.ModelProto, data_set: DataSet, table: Path | None, seed: int, threads: int | None, source: str
) -> CalibrationTable:
    """Return a calibration table that belongs to the graph, read from a file or calibrated now.

    Args:
        model: FP32 graph.
        data_set: data set to calibrate on; its test split must not contain videos of the table.
        table: file of the table; None calibrates.
        seed: random seed of the calibration set.
        source: name of the graph, for messages.
    """
    if table is None:
        return measure_table(model, sample_calibration_set(data_set, read_manifest(model), seed=seed), threads=threads)
    calibration = CalibrationTable.load(table)
    calibration.check(model, source)
    calibration.check_videos(data_set)
    return calibration


if __name__ == "__main__":
    command(rank_layers)
