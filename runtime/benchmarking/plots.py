"""Plot the results of a benchmark."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from runtime.benchmarking.report import BATCH_SIZE, LENGTH, ONE_QUERY, PER_VIDEO, Report, Timing, environment_line
from runtime.core.cli import check_plots
from runtime.core.errors import printable_line
from runtime.core.io.atomic_files import atomic_write


def draw(report: Report, path: Path) -> None:
    """Plot latency of one query, throughput by batch size and queries per video, and latency by query length."""
    check_plots(path)
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 9), layout="constrained")
    panels = figure.subplots(2, 2).ravel()
    _draw_percentiles(panels[0], report.timings)
    for axes, group in zip(panels[1:], (BATCH_SIZE, PER_VIDEO, LENGTH)):
        _draw_sizes(axes, report.timings, group)
    names = ", ".join(printable_line(model.label) for model in report.models)
    ended = " (ended early)" if report.interrupted else ""
    figure.suptitle(f"{names}{ended}\n{environment_line(report.to_dict())}", fontsize=9, wrap=True, parse_math=False)
    with atomic_write(path) as temporary:
        figure.savefig(temporary, dpi=120, format="png")


def _draw_percentiles(axes: Any, timings: Sequence[Timing]) -> None:
    names = ("p50", "p90", "p95", "p99", "max")
    for timing in timings:
        if timing.case.group == ONE_QUERY and timing.latency:
            values = [getattr(timing.latency, f"{name}_ms") for name in names]
            shown = [(index, value) for index, value in enumerate(values) if value is not None]
            label = f"{timing.case.boundary}: {timing.case.name} ({timing.model})"
            axes.plot(*zip(*shown), marker="o", label=label)
    axes.set_xticks(range(len(names)), names)
    axes.set_title("one query", loc="left")
    axes.set_ylabel("milliseconds")
    axes.set_ylim(bottom=0)
    _finish(axes)


def _draw_sizes(axes: Any, timings: Sequence[Timing], group: str) -> None:
    lines: dict[str, list[tuple[int, float]]] = {}
    for timing in timings:
        if timing.case.group == group and timing.latency:
            rate = timing.queries_per_s
            value = timing.latency.p50_ms if group == LENGTH else rate
            if value is not None:
                label = f"{timing.case.boundary}: {timing.case.name} ({timing.model})"
                lines.setdefault(label, []).append((timing.case.size, value))
    for label, values in lines.items():
        axes.plot(*zip(*values), marker="o", label=label)
    axes.set_title("time with query length" if group == LENGTH else f"throughput with {group}", loc="left")
    axes.set_xlabel("words" if group == LENGTH else "queries")
    axes.set_ylabel("milliseconds, p50" if group == LENGTH else "queries per second")
    axes.set_ylim(bottom=0)
    if lines and group != LENGTH:
        sizes = sorted({size for values in lines.values() for size, _ in values})
        axes.set_xscale("log", base=2)
        axes.set_xticks(sizes, [str(size) for size in sizes])
    _finish(axes)


def _finish(axes: Any) -> None:
    axes.grid(alpha=0.3)
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        # Labels may contain dollar signs, which must not start a formula, or control characters.
        for text in axes.legend(handles, labels, fontsize=7).get_texts():
            text.set_parse_math(False)
            text.set_text(printable_line(text.get_text()))
