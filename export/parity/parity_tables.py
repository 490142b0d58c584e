"""Format a parity report as tables, for the terminal and the HTML report."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from export.parity.compare_layers import LayerComparison
from export.parity.compare_shapes import ShapeCheck
from export.parity.parity_result import CONFIDENCE, AccuracyBudget, ParityResult, format_interval, format_points
from runtime.core.agreement import VISIBLE_S

if TYPE_CHECKING:
    from calib.calibration_table import CalibrationTable
    from calib.graph.precision_audit import PrecisionStats

WORST_QUERIES = "Worst queries"


@dataclasses.dataclass(frozen=True)
class Table:
    """A table of a parity report.

    Attributes:
        title: title of its section; adjacent tables with the same title share a section.
        header: column names.
        rows: cells as text; the first cell of a row is its name.
        notes: sentences about the table.
        folded: whether the HTML report hides the rows until the reader opens them.
    """

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str] = ()
    folded: bool = False

    def text(self) -> str:
        """Return the table and its notes for a terminal, with numbers aligned to the right."""
        lines = []
        if self.rows:
            columns = list(zip(self.header, *self.rows))
            widths = [max(map(len, column)) for column in columns]
            left = [index == 0 or any(_is_word(cell) for cell in column[1:]) for index, column in enumerate(columns)]
            for row in (self.header, *self.rows):
                cells = (f"{cell:<{w}}" if to_left else f"{cell:>{w}}" for cell, w, to_left in zip(row, widths, left))
                lines.append("  ".join(cells).rstrip())
        return "\n".join([*lines, *self.notes])


def _is_word(cell: str) -> bool:
    return cell[:1].isalpha() and cell not in ("none", "nan", "inf")


def parity_tables(
    parity: ParityResult,
    names: Sequence[str],
    split: str,
    budget: AccuracyBudget,
    layers: LayerComparison | None = None,
) -> list[Table]:
    """Return the tables of a comparison.

    Args:
        names: names of the reference and of the model.
        budget: limits for the plans of an engine.
        layers: comparison of all tensors, if it was made.
    """
    return [
        _recall(parity, names, split),
        _flips(parity),
        *_deviations(parity),
        *([_plans(parity, budget)] if parity.plans else []),
        *([_layers(layers)] if layers else []),
        _worst(parity, names),
    ]


def _recall(parity: ParityResult, names: Sequence[str], split: str) -> Table:
    reports = [(names[0], parity.reference), (names[1], parity.other)]
    notes = [f"{parity.queries} queries of {split}, protocol {parity.protocol}."]
    if parity.prior:
        reports.append(("prior", parity.prior))
        notes.append("The prior answers every query with the same moments, fitted on the training split.")
    if parity.fallbacks:
        notes.append(
            f"{parity.fallbacks} of them have no likely location in either model, so their agreement is no evidence."
        )
    metrics = list(parity.reference.values)
    rows = [(name, *(f"{100 * scored.values[name]:.2f}" for _, scored in reports)) for name in metrics]
    return Table("Recall", ("percent", *(label for label, _ in reports)), rows, notes)


def _flips(parity: ParityResult) -> Table:
    rows = []
    for name, interval in parity.differences.items():
        flips = parity.flips.get(name)
        counts = (str(len(flips.gained)), str(len(flips.lost)), f"{flips.p_value:.3g}") if flips else ("", "", "")
        rows.append((name, *counts, format_points(interval.mean), format_interval(interval)))
    header = ("flips", "gained", "lost", "McNemar p", "points", f"{100 * CONFIDENCE:g} % confidence interval")
    return Table("Flips per query", header, rows)


def _deviations(parity: ParityResult) -> list[Table]:
    title = "Heads and moments"
    outputs = [
        (name, f"{error.max:.2e}", f"{error.p99:.2e}", f"{error.largest:.3g}", str(error.not_finite))
        for name, error in parity.heads.items()
    ]
    shifts = [
        (label, *(f"{seconds:.2g}" for seconds in (shift.p50, shift.p99, shift.max)))
        for label, shift in (("of best moments", parity.boundaries), ("at each location", parity.locations))
    ]
    overlap, order = parity.overlap, parity.order
    notes = (
        f"Temporal IoU of the best moments: mean {overlap.mean:.4f}, 1st percentile {overlap.p1:.4f}, minimum "
        f"{overlap.min:.4f}.",
        f"The best moment is the same for {100 * order.first:.2f} % of the queries, the order of the best five for "
        f"{100 * order.five:.2f} %.",
    )
    scores = parity.scores
    score_note = (
        f"Scores of the best moments: median change {scores.p50:.2e}, 99th percentile {scores.p99:.2e}; "
        f"Kolmogorov-Smirnov statistic {scores.ks:.4f}."
    )
    if scores.threshold is not None:
        score_note += (
            f" At the no-match threshold of {scores.threshold:.3f}, {scores.refused} queries are refused and "
            f"{scores.answered} answered by the model only."
        )
    return [
        Table(title, ("output", "max error", "99th percentile", "max value", "non-finite"), outputs),
        Table(title, ("boundary shift, seconds", "median", "99th percentile", "max"), shifts, (*notes, score_note)),
    ]


def _plans(parity: ParityResult, budget: AccuracyBudget) -> Table:
    rows = []
    for check in parity.plans:
        counts = (f"<= {check.max_query_length}", str(check.answered), str(check.checked))
        rows.append((check.name, *counts, *check.verdict(parity.queries, budget)))
    return Table("Plans of the engine", ("plan", "tokens", "answered", "checked", "verdict", "reason"), rows)


def _layers(layers: LayerComparison) -> Table:
    rows = [
        (
            entry.module,
            f"{entry.worst.relative:.1e}",
            f"{entry.worst.max:.1e}",
            entry.worst.tensor,
            "above tolerance" if entry.wrong else "",
        )
        for entry in layers.modules
    ]
    header = ("module", "relative error", "absolute error", "worst tensor", "")
    notes = (layers.sentence(), f"All common tensors were compared for {layers.queries} queries.")
    return Table("Layers", header, rows, notes, folded=True)


def _worst(parity: ParityResult, names: Sequence[str]) -> Table:
    shown = [row for row in parity.worst if row.shift >= VISIBLE_S]
    if not shown:
        largest = max((row.shift for row in parity.worst), default=0.0)
        note = f"No boundary of a best moment shifts by {VISIBLE_S:g} s or more; the maximum is {largest:.1e} s."
        return Table(WORST_QUERIES, (), [], [note])
    rows = []
    for row in shown:
        spans = [row.truth, *((m.start, m.end) if m else None for m in (row.reference, row.other))]
        cells = (f"{span[0]:.1f} - {span[1]:.1f}" if span else "none" for span in spans)
        rows.append((str(row.line), *cells, row.query))
    return Table(
        WORST_QUERIES, ("line", "truth", *names, "query"), rows, ["Queries whose best moments agree least, in seconds."]
    )


def speed_table(speed: Mapping[str, Any] | None) -> Table:
    """Return the measured speed of a model relative to the one that it replaces; see `ParityReport.speed`."""
    if speed is None:
        return Table("Speed", (), [], ["The speed was not measured."])
    if not speed["reference"]:
        return Table("Speed", (), [], [speed["sentence"]])
    rows = [
        (label, *(f"{speed[key][name]:.2f}" for name in ("median", "low", "high")))
        for label, key in (("one query", "single"), ("batch", "batched"))
    ]
    note = (
        f"Timed in turns on {speed['machine']}: {speed['verdict']}. One query or a batch must have "
        f"{speed['min_speedup']:g} times the speed."
    )
    return Table("Speed", (f"times that of {speed['reference']}", "median", "from", "to"), rows, [note])


def calibration_coverage(table: CalibrationTable) -> Table:
    """Return the calibration queries of a table by stratum of each property, and the words that they cover."""
    coverage, title = table.coverage, "Calibration"
    notes = [f"Method {table.key['method']}; {len(table.ranges)} ranges, measured on queries of {table.key['split']}."]
    if not coverage:
        return Table(title, (), [], [*notes, "The calibration table has no coverage."])
    held_out, words = coverage["held_out"], coverage["words"]
    notes += [
        f"{coverage['sentences']} queries of {coverage['videos']} videos; {words['covered']} of {words['of']} words, "
        f"{100 * words['of_all_tokens']:.1f} % of all tokens.",
        f"Held out to compare methods: {held_out['sentences']} queries of {held_out['videos']} other videos.",
    ]
    rows = [
        (f"{axis} {entry['from']:.3g}–{entry['to']:.3g}", str(entry["samples"]), str(entry["of"]))
        for axis, strata in coverage["axes"].items()
        for entry in strata
    ]
    return Table(title, ("stratum", "calibrated", "usable"), rows, notes, folded=True)


def shapes_table(shapes: Sequence[ShapeCheck]) -> Table:
    """Return the deviations of the outputs at the limits of the model's shapes."""
    rows = [(f"{check.batch} x {check.tokens}", f"{check.deviation:.1e}", f"{check.tolerance:g}") for check in shapes]
    note = "Outputs of a batch, compared with those of its queries one at a time, as a fraction of the largest value."
    return Table("Shapes", ("queries x tokens", "deviation", "tolerance"), rows, [note])


def precision_table(stats: PrecisionStats) -> Table:
    """Return the table of the multiply-adds of a graph by DRN module and data type."""
    total = stats.total()
    kinds = sorted(total, key=total.__getitem__, reverse=True)
    shares = ", ".join(f"{100 * stats.share(kind):.1f} % in {kind}" for kind in kinds)
    weights = ", ".join(f"{size / 2**20:.1f} MiB in {kind}" for kind, size in stats.weight_bytes.items())
    rows = [
        (module, *(f"{by_kind[kind] / 1e6:.2f}" if by_kind.get(kind) else "" for kind in kinds))
        for module, by_kind in {**stats.macs, "all": total}.items()
    ]
    note = f"Multiply-adds: {shares}. Weights: {weights}."
    return Table("Precision", ("million multiply-adds per query", *kinds), rows, (note,), folded=True)


def engine_precision_table(stats: Mapping[str, Any]) -> Table | None:
    """Return the precision verdict in the `census` of an engine, and the types of its layers or of its graph."""
    verdict = "The precision of the engine is {verdict}: {reason}.".format_map(stats) if "verdict" in stats else ""
    engine = stats.get("engine")
    shares = stats.get("twin", {}).get("shares", {})
    if engine:
        keys = (("multiply in it", "arithmetic"), ("write it", "layers"), ("read it", "quantised_inputs"))
        results = [(name, engine[key]) for name, key in keys if key in engine]
        kinds = sorted({kind for _, counts in results for kind in counts})
        rows = [(name, *(str(counts.get(kind, "")) for kind in kinds)) for name, counts in results]
        listed = ", ".join(f"{count} in {kind}" for kind, count in engine["layers"].items()) or "no type shown"
        note = f"Layers of the engine by output type, as its inspector shows them: {listed}."
        header = ("layers that", *kinds)
    elif shares:
        listed = ", ".join(f"{100 * share:.1f} % in {kind}" for kind, share in shares.items())
        rows = [(kind, f"{100 * share:.1f}") for kind, share in shares.items()]
        note = f"Multiply-adds of the graph: {listed}. The layers of the engine can only be counted on its GPU."
        header = ("type", "percent of the multiply-adds")
    else:
        return None
    return Table("Precision", header, rows, [sentence for sentence in (verdict, note) if sentence], folded=True)
