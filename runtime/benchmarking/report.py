"""Describe the results of a benchmark: values for a file, tables for a terminal and for a parity report."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from runtime.benchmarking.system_info import SystemState
from runtime.benchmarking.timing import Latency, Ratio, WarmUp
from runtime.core.agreement import VISIBLE_S, moment_deviation
from runtime.core.errors import ModelFileError, printable_line, reading
from runtime.core.io.input_files import read_json
from runtime.core.io.text_files import check_format
from runtime.core.moments import Moment

FORMAT = "drn-benchmark/1"

TimingScope = Literal["gpu", "host", "end to end"]
TIMING_SCOPES: dict[str, str] = {
    "gpu": "GPU (its own events, without copies)",
    "host": "host (network with copies)",
    "end to end": "end to end (text in, moments out)",
}
ONE_QUERY, BATCH_SIZE, PER_VIDEO, LENGTH = "one query", "batch size", "queries per video", "query length"

# In the order of the flow. The first group is done once for a video, the second for every query.
VIDEO_PHASES = ("segment", "encode")
NETWORK_PHASES = ("encode", "network")
PHASES = ("tokenise", "segment", "encode", "collate", "network", "decode", "NMS", "seconds")


@dataclasses.dataclass(frozen=True)
class BenchmarkCase:
    """One thing that is measured.

    Attributes:
        group: what it is part of: one query, batch size, queries per video, query length.
        name: what is called.
        boundary: what is inside of the time.
        size: its place in its group: a number of queries, or of words.
        queries: answered by one call.
    """

    group: str
    name: str
    boundary: TimingScope
    size: int = 1
    queries: int = 1


@dataclasses.dataclass(frozen=True)
class Timing:
    """The latency of a case with one model.

    Attributes:
        case: what was measured.
        model: the model's label.
        latency: of one call; None where it failed.
        warm_up: what went before.
        speedup: times faster than the first model, in the same rounds; None for the first.
        failed: why there are no samples, in a sentence.
    """

    case: BenchmarkCase
    model: str
    latency: Latency | None
    warm_up: WarmUp | None = None
    speedup: Ratio | None = None
    failed: str = ""

    @property
    def settled(self) -> bool:
        """Return whether the warm-up had converged before samples were taken."""
        return self.warm_up is None or self.warm_up.settled

    @property
    def queries_per_s(self) -> float | None:
        """Queries over the time of all calls, the slowest included."""
        if self.latency is None or not self.latency.mean_ms:
            return None
        return 1e3 * self.case.queries / self.latency.mean_ms

    def to_dict(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "queries_per_s": self.queries_per_s}


@dataclasses.dataclass(frozen=True)
class Phases:
    """The time of each phase of a call that answers `queries` at once, each about another video that was not encoded
    before.

    Attributes:
        model: its label.
        queries, videos: in one call.
        samples: how many calls.
        ms: phase -> median over the calls; what the flow of this model lacks is not there.
    """

    model: str
    queries: int
    videos: int
    samples: int
    ms: Mapping[str, float]

    def overhead_share(self, known: bool) -> float:
        """Return the share of the time that is not the network's; `known` leaves out what is done once for a video."""
        counted = {name: ms for name, ms in self.ms.items() if not (known and name in VIDEO_PHASES)}
        total = sum(counted.values())
        return sum(ms for name, ms in counted.items() if name not in NETWORK_PHASES) / total if total else 0.0

    def to_dict(self) -> dict[str, Any]:
        return {
            **dataclasses.asdict(self),
            "share_around_network_new_videos": self.overhead_share(known=False),
            "share_around_network_known_videos": self.overhead_share(known=True),
        }


@dataclasses.dataclass(frozen=True)
class Memory:
    """The memory of a model, in bytes; None if it is unknown.

    Attributes:
        files: of all its files.
        rss_growth: by how much the process grew when it was opened and answered once.
        plan, device, pinned: as its backend reports: plan, buffers on the GPU, page-locked memory.
        gpu_growth: by how much the GPU's used memory grew meanwhile, as nvidia-smi reports (others count too).
    """

    files: int
    rss_growth: int | None = None
    plan: int | None = None
    device: int | None = None
    pinned: int | None = None
    gpu_growth: int | None = None


@dataclasses.dataclass(frozen=True)
class ModelInfo:
    """A model file that was measured.

    Attributes:
        label: how tables call it.
        sha256: of the file that was named.
        files: all files it consists of, to SHA-256.
        precision, kind: of its manifest; a pair encodes videos once.
        device: where the network ran.
        open_s, first_answer_s: seconds in this process, from opening it until it was open, and to its first answer.
        cold_start_s: seconds from the start of a fresh process to its first answer; None where that failed.
        memory: what it takes.
    """

    label: str
    sha256: str
    files: Mapping[str, str]
    precision: str
    kind: Literal["whole", "pair"]
    device: str
    open_s: float
    first_answer_s: float
    cold_start_s: float | None
    memory: Memory


@dataclasses.dataclass(frozen=True)
class Agreement:
    """The deviation of a model's best moments from those of the first model.

    Attributes:
        model: its label.
        queries: that both were asked.
        iou_mean, iou_min: temporal IoU of the two best moments.
        shift_max_s: seconds by which a border moves at most.
        different: queries whose best moment moves by more than `visible_s`, or that only one answers.
        visible_s: what a reader of tenths of a second can see.
    """

    model: str
    queries: int
    iou_mean: float
    iou_min: float
    shift_max_s: float
    different: int
    visible_s: float

    def sentence(self, first: str) -> str:
        """Return what a reader must know before the ratios."""
        details = (
            f"IoU of best moments {self.iou_mean:.4f} on average, {self.iou_min:.4f} at least; borders move by up to "
            f"{self.shift_max_s:.2g} s"
        )
        if not self.different:
            return f"{self.model} answers as {first} ({self.queries} queries: {details})."
        return (
            f"{self.model} answers {self.different} of {self.queries} queries differently from {first} ({details}): "
            "its ratios compare different answers; judge them with export.verify."
        )

    @classmethod
    def from_moments(
        cls,
        model: str,
        actual: Sequence[Sequence[Moment]],
        expected: Sequence[Sequence[Moment]],
        visible_s: float = VISIBLE_S,
    ) -> Agreement:
        """Compare the best moment of each query with that of the first model."""
        pairs = list(zip(actual, expected))
        best = [[(side[0].start, side[0].end) for side in pair] for pair in pairs if all(pair)]
        different = sum(bool(moments) != bool(references) for moments, references in pairs)
        if not best:
            return cls(model, len(expected), 1.0, 1.0, 0.0, different, visible_s)
        spans = np.array(best, np.float64)
        overlaps, shifts = moment_deviation(spans[:, 0], spans[:, 1])
        different += int((shifts.max(axis=1) > visible_s).sum())
        overlap = float(overlaps.mean()), float(overlaps.min())
        return cls(model, len(expected), *overlap, float(shifts.max()), different, visible_s)


@dataclasses.dataclass(frozen=True)
class Report:
    """All results of one run of the benchmark.

    Attributes:
        date: of the run, in ISO form.
        command: that does the same again.
        hardware: CPU, cores and GPU by name.
        versions: package to version.
        settings: of the run.
        inputs: what was asked, in a sentence, and whether it was made up.
        models: in the order they were named; ratios are against the first.
        agreements: of the others with the first.
        timings: in the order they were taken.
        phases: where the time goes.
        peak_rss_bytes: of the whole process.
        conditions: of the machine, from before to after.
        notes: what a reader of the figures must know.
        interrupted: whether it was ended early, so that cases are missing.
    """

    date: str
    command: str
    hardware: Mapping[str, Any]
    versions: Mapping[str, str]
    settings: Mapping[str, Any]
    inputs: Mapping[str, Any]
    models: Sequence[ModelInfo]
    agreements: Sequence[Agreement]
    timings: Sequence[Timing]
    phases: Sequence[Phases]
    peak_rss_bytes: int
    conditions: Sequence[SystemState]
    notes: Sequence[str]
    interrupted: bool

    def to_dict(self) -> dict[str, Any]:
        plain = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        for name in ("models", "agreements", "conditions"):
            plain[name] = [dataclasses.asdict(value) for value in plain[name]]
        for name in ("timings", "phases"):
            plain[name] = [value.to_dict() for value in plain[name]]
        return {"format": FORMAT, **plain, "notes": list(self.notes)}

    def text(self) -> str:
        """Return the report for a terminal."""
        sections = [
            [f"{environment_line(self.to_dict())}.", str(self.inputs["told"])],
            [agreement.sentence(self.models[0].label) for agreement in self.agreements],
            *(_timings(self.timings, group, len(self.models) > 1) for group in _groups(self.timings)),
            _phases(self.phases),
            *(_model_lines(model) for model in self.models),
            _machine(self),
            [f"Note: {note}" for note in self.notes],
        ]
        return "\n\n".join("\n".join(lines) for lines in sections if lines)


def environment_line(report: Mapping[str, Any]) -> str:
    """Return hardware, threads, versions and date of a report, as it is or as it was read, in a phrase."""
    hardware, threads = report["hardware"], report["settings"]["threads"]
    on_gpu = any(model["device"] == "cuda" for model in report["models"]) and hardware["gpu"]
    parts = [str(hardware["gpu"])] if on_gpu else []
    parts.append(f"{hardware['cpu']}, {hardware['cores']} cores")
    parts.append("threads as the library chooses" if threads is None else f"{threads} thread{'s' * (threads > 1)}")
    parts += [f"{name} {version}" for name, version in report["versions"].items()]
    return ", ".join([*parts, str(report["date"])])


def latency_table(report: Mapping[str, Any], sha256: str) -> tuple[Sequence[str], Sequence[Sequence[str]]]:
    """Return the header and rows of what a written report contains about one model, for its parity report.

    Args:
        report: as `read_report` returns it.
        sha256: of the model file.

    Raises:
        ModelFileError: another model was measured, or nothing of this one.
    """
    measured_model = next((model for model in report["models"] if model["sha256"] == sha256), None)
    timings = [
        t for t in report["timings"] if measured_model and t["model"] == measured_model["label"] and t["latency"]
    ]
    if measured_model is None or not timings:
        measured = (
            ", ".join(printable_line(f"{model['label']} ({model['sha256'][:12]}…)") for model in report["models"])
            or "nothing"
        )
        raise ModelFileError(
            f"The latency report is of {measured} and not of the model with SHA-256 {sha256[:12]}…; measure that "
            "one with `python -m runtime.benchmark --model MODEL --output REPORT.json`.",
            code="report_of_another_model",
        )
    rows = []
    for timing in timings:
        latency, case = timing["latency"], timing["case"]
        cells = (_ms(latency[f"{name}_ms"]) for name in ("p50", "p90", "p95", "p99", "max"))
        rows.append((_row_name(case), *cells, str(latency["samples"]), _rate(timing["queries_per_s"])))
    ended = " Ended early." if report["interrupted"] else ""
    header = (f"Milliseconds: {environment_line(report)}.{ended}", "p50", "p90", "p95", "p99", "max", "calls")
    return (*header, "queries/s"), rows


def read_report(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return a written report; ModelFileError if the file is none."""
    report = read_json(path, "report of runtime.benchmark", ModelFileError)
    check_format(report, FORMAT, f"{path}", ModelFileError, "write it with `python -m runtime.benchmark --output`")
    with reading(path, "a report of runtime.benchmark", ModelFileError, "measure again"):
        # Whatever is read of it later must be there.
        for model in report["models"]:
            latency_table({**report, "timings": _any_timing(report, model)}, model["sha256"])
    return report


def _any_timing(report: Mapping[str, Any], model: Mapping[str, Any]) -> list[Any]:
    latency = dataclasses.asdict(Latency(1, 1.0, 1.0, None, None, None, 1.0))
    case = dataclasses.asdict(BenchmarkCase(ONE_QUERY, "", "host"))
    filler = {"model": model["label"], "latency": latency, "case": case, "queries_per_s": None}
    return [filler, *report["timings"]]


def _groups(timings: Iterable[Timing]) -> list[str]:
    return list(dict.fromkeys(timing.case.group for timing in timings))


def _row_name(case: Mapping[str, Any]) -> str:
    if case["group"] == ONE_QUERY:
        return f"{case['boundary']}: {case['name']}"
    return f"{case['boundary']}: {case['name']}, {case['group']} {case['size']}"


def _ms(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.3f}" if value < 1 else f"{value:.2f}" if value < 100 else f"{value:.0f}"


def _rate(value: float | None) -> str:
    return "-" if value is None else f"{value:,.1f}" if value < 1000 else f"{value:,.0f}"


def _timings(timings: Sequence[Timing], group: str, several: bool) -> list[str]:
    chosen = [timing for timing in timings if timing.case.group == group]
    names = [timing.model for timing in chosen] if several else []
    width = max((len(name) for name in names), default=0)
    sized = group != ONE_QUERY
    label = max(len(group) + len(", ms a call"), *(len(timing.case.name) + 4 for timing in chosen))
    header = f"{group + ', ms a call':<{label}} {'size' if sized else '':>5} {'':<{width}}"
    columns = ("p50", "p90", "p95", "p99", "max", "calls", "ms/query", "queries/s")
    lines = [f"{header} {' '.join(f'{name:>9}' for name in columns)}{'  times as fast' if several else ''}"]
    boundary = ""
    for timing in chosen:
        case = timing.case
        if case.boundary != boundary:
            boundary = case.boundary
            lines.append(f" {TIMING_SCOPES[boundary]}")
        name = case.name if timing.settled else f"{case.name} *"
        start = f"  {name:<{label - 2}} {case.size if sized else '':>5} {timing.model if several else '':<{width}}"
        latency = timing.latency
        if latency is None:
            lines.append(f"{start} not measured: {timing.failed}")
            continue
        values = (latency.p50_ms, latency.p90_ms, latency.p95_ms, latency.p99_ms, latency.max_ms)
        cells = [*map(_ms, values), str(latency.samples), _ms(latency.p50_ms / case.queries)]
        cells.append(_rate(timing.queries_per_s))
        ratio = timing.speedup
        comparison = f"  {ratio.median:.2f} ({ratio.low:.2f} to {ratio.high:.2f})" if ratio else ""
        lines.append(f"{start} {' '.join(f'{cell:>9}' for cell in cells)}{comparison}")
    return lines


def _phases(phases: Sequence[Phases]) -> list[str]:
    if not phases:
        return []
    shown = [name for name in PHASES if any(name in row.ms for row in phases)]
    width = max(len(row.model) for row in phases)
    ends = ("around, new", "around, known")
    header = " ".join(f"{name:>9}" for name in shown)
    lines = [
        "phases, median ms a call; around: the share that is not the network's, of new videos and of known ones",
        f"  {'model':<{width}} {'queries':>8} {header} {ends[0]:>13} {ends[1]:>14}",
    ]
    for row in phases:
        cells = " ".join(f"{_ms(row.ms.get(name)):>9}" for name in shown)
        shares = [f"{100 * row.overhead_share(known):.2f} %" for known in (False, True)]
        lines.append(f"  {row.model:<{width}} {row.queries:>8} {cells} {shares[0]:>13} {shares[1]:>14}")
    return lines


def _model_lines(model: ModelInfo) -> list[str]:
    cold = "not measured" if model.cold_start_s is None else f"{model.cold_start_s:.2f} s"
    memory = model.memory
    sizes = {
        "files": memory.files,
        "the process grew by": memory.rss_growth,
        "plan": memory.plan,
        "GPU buffers": memory.device,
        "pinned": memory.pinned,
        "the GPU's used memory grew by": memory.gpu_growth,
    }
    memory_text = ", ".join(f"{name} {_mib(size)}" for name, size in sizes.items() if size is not None)
    return [
        f"{model.label} ({model.precision}, {model.kind}, on {model.device}, SHA-256 {model.sha256[:12]}…)",
        f"  cold start   {cold} from a fresh process to the first answer; here opened in {model.open_s:.2f} s, first "
        f"answer after {model.first_answer_s:.2f} s",
        f"  memory       {memory_text}",
    ]


def _mib(size: int) -> str:
    return f"{size / 2**20:.1f} MiB"


def _machine(report: Report) -> list[str]:
    lines = [f"machine: peak memory of the process {_mib(report.peak_rss_bytes)}"]
    for state in report.conditions:
        parts = []
        if state.load is not None:
            parts.append(f"load {state.load:.2f}")
        if state.cpu_mhz is not None:
            parts.append(f"CPU {state.cpu_mhz:.0f} MHz{f' ({state.governor})' if state.governor else ''}")
        if state.gpu:
            parts.append(f"SM clock {state.gpu.sm_mhz} of {state.gpu.max_sm_mhz} MHz")
            parts.append(f"{state.gpu.temperature_c} °C, {state.gpu.power_w} W")
            parts.append(f"slowed by {', '.join(state.gpu.throttled_by) or 'nothing'}")
        lines.append(f"  {state.when:<24} {', '.join(parts) or 'nothing known'}")
    return lines
