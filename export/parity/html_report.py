"""Render a parity report as one HTML page that needs no other file."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from export.parity.model_file import ModelFile, provenance
from export.parity.parity_report import ParityReport
from export.parity.parity_result import CONFIDENCE, GATED_METRICS, Disagreement, format_interval, format_points
from export.parity.parity_tables import WORST_QUERIES, Table, speed_table
from runtime.core.agreement import VISIBLE_S
from runtime.core.errors import importing

# Distances between the ticks of a time axis, in seconds.
TICK_STEPS = (0.5, 1, 2, 5, 10, 20, 30, 60, 120, 300, 600, 1800, 3600)
MAX_TICKS = 8


def require_jinja() -> None:
    """Raise DeviceError if Jinja2, which fills in the template of the page, is not installed."""
    with importing("jinja2 for the HTML report", "engine"):
        import jinja2  # noqa: F401


def render_html_report(
    report: ParityReport,
    precision: Table | None = None,
    latency: Table | None = None,
    engine: ModelFile | None = None,
    commands: Sequence[str] = (),
    calibration: Table | None = None,
) -> str:
    """Return the page.

    Args:
        report: the parity check; the page is about its model.
        precision: data types of the model, by module or by layer.
        engine: engine that was built from the model; the page is then about the engine.
        calibration: coverage of the calibration queries of the model.

    Raises:
        DeviceError: Jinja2 is not installed.
    """
    require_jinja()
    import jinja2

    if precision is None:
        note = f"{report.model.manifest.precision}, as the manifest records; the layers were not counted."
        precision = Table("Precision", (), [], (note,))
    speed = [speed_table(report.speed)] if report.speed or not latency else []
    optional = [table for table in (calibration, latency) if table]
    tables = [precision, *speed, *report.tables(), *optional]
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    return environment.get_template("html_report.html").render(
        report=report,
        parity=report.parity,
        engine=engine,
        limits=list(_limits(report)),
        lineage=_lineage([file for file in (report.reference, report.model, engine) if file]),
        provenance=provenance(report.reference, report.model)[1],
        sections=[(title, list(group)) for title, group in itertools.groupby(tables, lambda table: table.title)],
        worst_queries=WORST_QUERIES,
        timelines=[_timeline(row, report.names) for row in report.parity.worst if row.shift >= VISIBLE_S],
        commands=commands,
    )


def _limits(report: ParityReport) -> Iterator[str]:
    """Yield each limit of a check that passed, with the measured value."""
    parity, budget = report.parity, report.budget
    if report.precision:
        yield f"{report.precision}."
    for name in GATED_METRICS:
        change = parity.differences[name]
        yield (
            f"{name} changes by {format_points(change.mean)} points ({100 * CONFIDENCE:g} % confidence interval "
            f"{format_interval(change)}). The budget is a drop of {budget.max_drop:g} points."
        )
    if report.speed:
        yield report.speed["sentence"]
    if budget.boundary_p99 is not None:
        yield (
            f"The 99th percentile of the boundary shift of best moments is {parity.boundaries.p99:.3f} s. "
            f"The budget is {budget.boundary_p99:g} s."
        )


def _lineage(files: Sequence[ModelFile]) -> list[tuple[str, str, ModelFile | None]]:
    """Return name, SHA-256 and description of the files and their sources; None describes a file that was not read."""
    entries: dict[str, tuple[str, str, ModelFile | None]] = {}
    for file in files:
        for name, digest in file.manifest.sources.items():
            entries.setdefault(digest, (name, digest, None))
        entries[file.sha256] = (file.path.name, file.sha256, file)
    return list(entries.values())


def _timeline(row: Disagreement, names: Sequence[str]) -> dict[str, Any]:
    """Return a query, its bars as (class, label, start and end in seconds, note), and the ticks of its time axis."""
    moments = [(moment.start, moment.end) if moment else None for moment in (row.reference, row.other)]
    bars = [
        ("truth", "truth", row.truth, ""),
        ("reference", names[0], moments[0], f"IoU {row.reference_iou:.2f}"),
        ("other", names[1], moments[1], f"IoU {row.other_iou:.2f}"),
    ]
    step = next((step for step in TICK_STEPS if row.duration <= MAX_TICKS * step), row.duration)
    return {"row": row, "bars": bars, "ticks": [index * step for index in range(int(row.duration / step) + 1)]}
