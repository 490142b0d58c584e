"""Render a parity report as one HTML page that needs no other file.

The page follows the reader's light or dark setting, and fits a phone.
"""

from __future__ import annotations

import html
import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from export.parity.model_file import ModelFile, provenance
from export.parity.parity_report import ParityReport
from export.parity.parity_result import GATED_METRICS, AccuracyBudget, Disagreement, ParityResult, format_points
from export.parity.parity_tables import WORST_QUERIES, Table
from runtime.core.agreement import VISIBLE_S
from runtime.core.moments import Moment


def render_html_report(
    report: ParityReport,
    precision: Table | None = None,
    latency: Table | None = None,
    engine: ModelFile | None = None,
    commands: Sequence[str] = (),
) -> str:
    """Return the page.

    Args:
        report: the parity check; the page is about its model.
        precision: of the model, by module or by layer.
        latency: of the model.
        engine: that was built of the model; the page is then about the engine.
        commands: that reproduce the report.
    """
    parity, model, names = report.parity, report.model, report.names
    title = f"Passport of {(engine or model).path.name}"
    if precision is None:
        note = f"{model.manifest.precision}, as the manifest records; the layers were not counted."
        precision = Table("Precision", (), [], (note,))
    tables = [precision, *report.tables(), *([latency] if latency else [])]
    kept = not report.broken
    simulated = _paragraph("Features are simulated: recall is not comparable with published numbers.", "simulated")
    limits = [*([f"{report.precision}."] if report.precision else []), *_limits(parity, report.budget)]
    return "\n".join(
        [
            '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{_text(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>",
            f"<h1>{_text(title)}</h1>",
            _paragraph(
                (f"Its graph {model.path.name} was compared" if engine else "Compared")
                + f" with {names[0]} on {parity.queries} queries of {report.split}, protocol {parity.protocol}."
            ),
            _paragraph(_cpu(report.cpu)) if report.cpu else "",
            simulated if parity.simulated else "",
            f'<div class="verdict {"kept" if kept else "broken"}">',
            f"<strong>{'Promises kept' if kept else 'Promises broken'}</strong>",
            _list(limits if kept else report.broken),
            "</div>",
            _lineage(*(file for file in (report.reference, model, engine) if file)),
            *(
                _section(heading, "".join(_content(table, parity, names) for table in group))
                for heading, group in itertools.groupby(tables, lambda table: table.title)
            ),
            _section("To see the same again", "".join(f"<pre><code>{_text(line)}</code></pre>" for line in commands))
            if commands
            else "",
            "</main>\n</body>\n</html>\n",
        ]
    )


def _content(table: Table, parity: ParityResult, names: Sequence[str]) -> str:
    """Return a table with its notes; of the worst queries a time line each."""
    notes = "".join(_paragraph(note) for note in table.notes)
    if not table.rows:
        return notes
    if table.title == WORST_QUERIES:
        return "".join(_time_line(row, names) for row in parity.worst if row.shift >= VISIBLE_S)
    if table.folded:
        return notes + f"<details><summary>All rows</summary>{_table(table)}</details>"
    return _table(table) + notes


def _cpu(cpu: Mapping[str, Any]) -> str:
    features = cpu["features"]
    listed = "features unknown" if features is None else ", ".join(features)
    return f"Judged on {cpu['name']} ({cpu['architecture']}; {listed})."


def _limits(parity: ParityResult, budget: AccuracyBudget) -> list[str]:
    rows = []
    for name in GATED_METRICS:
        change = format_points(parity.differences[name].mean)
        rows.append(f"{name} changes by {change} points; {budget.max_drop:g} may be lost.")
    if budget.boundary_p99 is not None:
        rows.append(
            f"99 % of the boundaries of best moments stay within {parity.boundaries.p99:.3f} s; "
            f"{budget.boundary_p99:g} s is allowed."
        )
    return rows


def _lineage(*files: ModelFile) -> str:
    items: dict[str, str] = {}
    for file in files:
        for name, digest in file.manifest.sources.items():
            items.setdefault(digest, f"<b>{_text(name)}</b><code>{_text(digest)}</code>")
        about = f"{file.manifest.precision}, stage {file.manifest.stage}, {file.size / 2**20:.1f} MiB"
        created = ", ".join(f"{name} {version}" for name, version in file.manifest.producer.items())
        # A file judged here says more of itself than one that is only named as a source.
        items[file.sha256] = (
            f"<b>{_text(file.path.name)}</b> <span>{_text(about)}</span><code>{_text(file.sha256)}</code>"
            f"<small>{_text(f'made with {created}' if created else '')}</small>"
        )
    chain = "".join(f"<li>{item}</li>" for item in items.values())
    return _section("Lineage", f'<ol class="chain">{chain}</ol>' + _paragraph(provenance(*files[:2])[1]))


def _time_line(row: Disagreement, names: Sequence[str]) -> str:
    truth = Moment(*row.truth, 1.0)
    lines = (
        ("truth", truth, "truth", ""),
        (names[0], row.reference, "reference", f"IoU {row.reference_iou:.2f}"),
        (names[1], row.other, "other", f"IoU {row.other_iou:.2f}"),
    )
    parts = []
    for label, moment, kind, note in lines:
        bar = ""
        message = "no moment"
        if moment:
            start, end = (min(100 * seconds / row.duration, 100) for seconds in (moment.start, moment.end))
            message = f"{moment.start:.1f}–{moment.end:.1f} s"
            bar = f'<rect class="{kind}" x="{start:.2f}%" width="{max(end - start, 0.4):.2f}%" height="14" rx="2"/>'
        described = _text(f"{label}: {message} of {row.duration:.1f} s")
        parts.append(
            f"<dt>{_text(label)}</dt><dd>"
            f'<svg role="img" aria-label="{described}" width="100%" height="14">'
            f'<rect class="video" width="100%" height="14" rx="2"/>{bar}</svg>'
            f"<span>{message}</span> <span>{note}</span></dd>"
        )
    heading = f"“{row.query}”"
    about = f"line {row.line}, {row.video}, {row.duration:.1f} s; the two overlap by {row.overlap:.2f}"
    caption = f"{_text(heading)} <small>{_text(about)}</small>"
    return f"<figure><figcaption>{caption}</figcaption><dl>{''.join(parts)}</dl></figure>"


def _section(title: str, content: str) -> str:
    return f"<section>\n<h2>{_text(title)}</h2>\n{content}\n</section>"


def _paragraph(text: str, kind: str = "") -> str:
    return f'<p class="{kind}">{_text(text)}</p>' if kind else f"<p>{_text(text)}</p>"


def _list(rows: Iterable[str]) -> str:
    return "<ul>" + "".join(f"<li>{_text(row)}</li>" for row in rows) + "</ul>"


def _table(table: Table) -> str:
    head = "".join(f'<th scope="col">{_text(name)}</th>' for name in table.header)
    body = []
    for first, *others in table.rows:
        cells = "".join(f"<td>{_text(cell)}</td>" for cell in others)
        body.append(f'<tr><th scope="row">{_text(first)}</th>{cells}</tr>')
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{"".join(body)}</tbody></table></div>'


def _text(text: str) -> str:
    """Return text for HTML: names and queries are not ours, and may hold anything."""
    return html.escape(str(text))


STYLE = """
:root { color-scheme: light dark; --paper: #fff; --ink: #1b1f24; --faint: #5c6670; --line: #d5dae0; --wash: #f1f3f5;
  --good: #1a7f37; --bad: #b42318; --truth: #2e8b57; --reference: #3572b0; --other: #c2630c; }
@media (prefers-color-scheme: dark) { :root { --paper: #14171b; --ink: #e4e7eb; --faint: #9aa4ae; --line: #343b43;
  --wash: #1f242a; --good: #4cc26c; --bad: #ff7b6e; --truth: #4fb981; --reference: #6aa8e6; --other: #f0954a; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 58rem; margin: 0 auto; padding: 1.5rem 1rem 4rem; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 .25rem; overflow-wrap: anywhere; }
h2 { font-size: 1.1rem; margin: 2.25rem 0 .5rem; padding-bottom: .25rem; border-bottom: 1px solid var(--line); }
p { margin: .5rem 0; }
.simulated { color: var(--bad); font-weight: 600; }
.verdict { margin: 1rem 0; padding: .6rem 1rem; border-left: .35rem solid; background: var(--wash);
  border-radius: .25rem; }
.verdict.kept { border-color: var(--good); } .verdict.kept strong { color: var(--good); }
.verdict.broken { border-color: var(--bad); } .verdict.broken strong { color: var(--bad); }
ul { margin: .25rem 0; padding-left: 1.2rem; }
.wide { overflow-x: auto; margin: .75rem 0; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .9rem; }
th, td { text-align: right; padding: .3rem .6rem; border-bottom: 1px solid var(--line); white-space: nowrap; }
th:first-child { text-align: left; padding-left: 0; }
thead th { color: var(--faint); font-weight: 500; white-space: normal; vertical-align: bottom; }
tbody th { font-weight: 500; }
code { font: .8rem/1.4 ui-monospace, monospace; }
summary { cursor: pointer; color: var(--faint); }
.chain { list-style: none; margin: .75rem 0; padding: 0; }
.chain li { padding: 0 0 .9rem 1.1rem; border-left: 2px solid var(--line); position: relative; }
.chain li:last-child { border-color: transparent; padding-bottom: 0; }
.chain li::before { content: ""; position: absolute; left: -.36rem; top: .5rem; width: .6rem; height: .6rem;
  border-radius: 50%; background: var(--faint); }
.chain li:last-child::before { background: var(--good); }
.chain code, .chain small { display: block; overflow-wrap: anywhere; }
.chain span, .chain code { color: var(--faint); }
pre { margin: .5rem 0; padding: .6rem .8rem; background: var(--wash); border-radius: .25rem; white-space: pre-wrap;
  overflow-wrap: anywhere; }
figure { margin: 1.25rem 0; } figcaption { margin-bottom: .35rem; } small { color: var(--faint); white-space: normal; }
dl { display: grid; grid-template-columns: minmax(4rem, 9rem) 1fr; gap: .2rem .75rem; margin: 0; font-size: .85rem; }
dt { color: var(--faint); overflow-wrap: anywhere; } dd { margin: 0; display: grid;
  grid-template-columns: 1fr 7.5rem 4.2rem; gap: .6rem; align-items: center; font-variant-numeric: tabular-nums; }
@media (max-width: 34rem) { table { font-size: .8rem; } th, td { padding: .3rem; }
  dl { grid-template-columns: 1fr; } dd { grid-template-columns: 1fr 1fr; }
  dd svg { grid-column: 1 / -1; } dd span:last-child { text-align: right; } }
rect.video { fill: var(--wash); } rect.truth { fill: var(--truth); } rect.reference { fill: var(--reference); }
rect.other { fill: var(--other); }
"""
