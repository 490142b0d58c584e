"""Lay out what a parity report contains as tables, which the terminal and the HTML report both show."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from export.parity.compare_layers import LayerComparison
from export.parity.parity_result import CONFIDENCE, AccuracyBudget, ParityResult, format_points
from runtime.core.agreement import VISIBLE_S

if TYPE_CHECKING:
    from calib.graph.precision_audit import PrecisionStats

WORST_QUERIES = "Worst queries"


@dataclasses.dataclass(frozen=True)
class Table:
    """A table of a parity report.

    Attributes:
        title: of the section of the report; neighbours with one title share it.
        header: names of the columns.
        rows: cells as text; the first of each names the row.
        notes: sentences about the table.
        folded: whether the HTML report shows the rows only on request.
    """

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str] = ()
    folded: bool = False

    def text(self) -> str:
        """Return the table and its notes for a terminal, numbers to the right."""
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
        parity: the comparison.
        names: of the reference and of the model.
        split: of which the queries are.
        budget: that the plans of an engine are checked against.
        layers: the comparison of layers, if there is one.
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
    if parity.whole:
        notes.append(f"{parity.whole} of them have no likely location in either model: their agreement proves nothing.")
    metrics = list(parity.reference.values)
    rows = [(name, *(f"{100 * scored.values[name]:.2f}" for _, scored in reports)) for name in metrics]
    return Table("Recall", ("percent", *(label for label, _ in reports)), rows, notes)


def _flips(parity: ParityResult) -> Table:
    rows = []
    for name, interval in parity.differences.items():
        flips = parity.flips.get(name)
        counts = (str(len(flips.gained)), str(len(flips.lost)), f"{flips.p_value:.3g}") if flips else ("", "", "")
        spread = f"{format_points(interval.low)} to {format_points(interval.high)}"
        rows.append((name, *counts, format_points(interval.mean), spread))
    header = ("flips", "gained", "lost", "McNemar p", "points", f"{100 * CONFIDENCE:g} % interval")
    return Table("Flips, query by query", header, rows)


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
        f"Temporal IoU of the best moments: mean {overlap.mean:.4f}, 1 % below {overlap.p1:.4f}, minimum "
        f"{overlap.min:.4f}.",
        f"The same moment comes first for {100 * order.first:.2f} % of the queries, the same five in the same order "
        f"for {100 * order.five:.2f} %.",
    )
    return [
        Table(title, ("output", "largest error", "99 % within", "largest value", "not finite"), outputs),
        Table(title, ("boundaries, seconds", "half within", "99 % within", "largest"), shifts, notes),
    ]


def _plans(parity: ParityResult, budget: AccuracyBudget) -> Table:
    rows = []
    for check in parity.plans:
        counts = (f"<= {check.max_query_length}", str(check.answered), str(check.checked))
        rows.append((check.name, *counts, *check.verdict(parity.queries, budget)))
    return Table("Plans of the engine", ("plan", "tokens", "answered", "checked alone", "verdict", "reason"), rows)


_WRONG = {True: "wrong", False: ""}


def _layers(layers: LayerComparison) -> Table:
    rows = [
        (entry.module, f"{entry.worst.relative:.1e}", f"{entry.worst.max:.1e}", entry.worst.tensor, _WRONG[entry.wrong])
        for entry in layers.modules
    ]
    header = ("module", "relative", "absolute", "worst tensor", "")
    notes = (layers.sentence(), f"Every tensor of {layers.queries} queries was compared.")
    return Table("Layers", header, rows, notes, folded=True)


def _worst(parity: ParityResult, names: Sequence[str]) -> Table:
    shown = [row for row in parity.worst if row.shift >= VISIBLE_S]
    if not shown:
        farthest = max((row.shift for row in parity.worst), default=0.0)
        note = f"No best moment moves by {VISIBLE_S:g} s or more. The farthest moves by {farthest:.1e} s."
        return Table(WORST_QUERIES, (), [], [note])
    rows = []
    for row in shown:
        spans = [row.truth, *((m.start, m.end) if m else None for m in (row.reference, row.other))]
        cells = (f"{span[0]:.1f} - {span[1]:.1f}" if span else "none" for span in spans)
        rows.append((str(row.line), *cells, row.query))
    return Table(WORST_QUERIES, ("line", "truth", *names, "query"), rows, ["Worst queries, in seconds."])


def precision_table(stats: PrecisionStats) -> Table:
    """Return the multiply-adds of a graph by DRN module and data type."""
    total = stats.total()
    kinds = sorted(total, key=total.__getitem__, reverse=True)
    shares = ", ".join(f"{100 * stats.share(kind):.1f} % in {kind}" for kind in kinds)
    weights = ", ".join(f"{size / 2**20:.1f} MiB in {kind}" for kind, size in stats.weight_bytes.items())
    rows = [
        (module, *(f"{by_kind[kind] / 1e6:.2f}" if by_kind.get(kind) else "" for kind in kinds))
        for module, by_kind in {**stats.macs, "all": total}.items()
    ]
    note = f"Of its multiply-adds {shares}; of its weights {weights}."
    return Table("Precision", ("million multiply-adds of one query", *kinds), rows, (note,), folded=True)


def engine_precision_table(census: Mapping[str, Any]) -> Table | None:
    """Return the precision verdict of an engine and its layers by type; the shares of its graph where no GPU counted
    layers.

    Args:
        census: in the engine's metadata.
    """
    verdict = "The precision of the engine is {verdict}: {reason}.".format_map(census) if "verdict" in census else ""
    engine = census.get("engine")
    shares = census.get("twin", {}).get("shares", {})
    if engine:
        keys = (("multiply in it", "arithmetic"), ("write it", "layers"), ("read it", "quantised_inputs"))
        results = [(name, engine[key]) for name, key in keys if key in engine]
        kinds = sorted({kind for _, counts in results for kind in counts})
        rows = [(name, *(str(counts.get(kind, "")) for kind in kinds)) for name, counts in results]
        message = ", ".join(f"{count} in {kind}" for kind, count in engine["layers"].items()) or "no type shown"
        note = f"Layers of the engine by what they write, as its inspector shows them: {message}."
        header = ("layers that", *kinds)
    elif shares:
        message = ", ".join(f"{100 * share:.1f} % in {kind}" for kind, share in shares.items())
        rows = [(kind, f"{100 * share:.1f}") for kind, share in shares.items()]
        note = f"Of the multiply-adds of its graph {message}; its own layers can be counted on the GPU only."
        header = ("type", "percent of the multiply-adds")
    else:
        return None
    return Table("Precision", header, rows, [sentence for sentence in (verdict, note) if sentence], folded=True)
