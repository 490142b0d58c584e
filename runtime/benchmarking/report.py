"""Define the results of a benchmark, as JSON and as tables for a terminal and for a parity report."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
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

# In order of execution. `VIDEO_PHASES` run once for a video.
VIDEO_PHASES = ("segment", "encode")
NETWORK_PHASES = ("encode", "network")
PHASES = ("tokenise", "segment", "encode", "collate", "network", "decode", "NMS", "seconds")


@dataclasses.dataclass(frozen=True)
class BenchmarkCase:
    """One measurement.

    Attributes:
        group: "one query", "batch size", "queries per video" or "query length".
        boundary: the timing scope: which steps a call includes.
        size: number of queries, or of words in the group "query length".
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
        latency: latency of one call; None if the case failed.
        speedup: speed relative to the first model, in the same rounds; None for the first.
        failed: error message if there are no samples; else None.
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
        """Return the throughput from the mean latency; None if the case failed."""
        if self.latency is None or not self.latency.mean_ms:
            return None
        return 1e3 * self.case.queries / self.latency.mean_ms

    def to_dict(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "queries_per_s": self.queries_per_s}


@dataclasses.dataclass(frozen=True)
class Phases:
    """The time of each phase of a call that grounds `queries` together, about videos that were not encoded before.

    Attributes:
        queries, videos: numbers in one call.
        ms: median over the calls by phase, in milliseconds; without phases that the model does not have.
    """

    model: str
    queries: int
    videos: int
    samples: int
    ms: Mapping[str, float]

    def overhead_share(self, known: bool) -> float:
        """Return the fraction of the time outside the network; without `VIDEO_PHASES` if the videos are `known`."""
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
    """The memory of a model, in bytes; None if unknown.

    Attributes:
        files: size of all its files.
        rss_growth: growth of the process while the model was opened and grounded one query.
        plan, device, pinned: plan, buffers on the GPU and page-locked memory, as the backend reports them.
        gpu_growth: growth of the GPU's used memory in the same time (nvidia-smi, all processes).
    """

    files: int
    rss_growth: int | None = None
    plan: int | None = None
    device: int | None = None
    pinned: int | None = None
    gpu_growth: int | None = None


@dataclasses.dataclass(frozen=True)
class ModelInfo:
    """A measured model.

    Attributes:
        sha256: SHA-256 of the file on the command line.
        files: file name to SHA-256, for all files of the model.
        kind: "pair" for a split model, which encodes videos once.
        open_s, first_answer_s: seconds in this process until the model was open, and until its first query was done.
        cold_start_s: seconds from the start of a new process until its first query was done; None if that failed.
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
    """The difference between the best moments of a model and those of the first model.

    Attributes:
        iou_mean, iou_min: temporal IoU of the two best moments.
        shift_max_s: maximum shift of a start or end, in seconds.
        different: number of queries with a shift above `visible_s`, or with a moment of one model only.
        visible_s: smallest shift that is visible in times of one decimal, in seconds.
    """

    model: str
    queries: int
    iou_mean: float
    iou_min: float
    shift_max_s: float
    different: int
    visible_s: float

    def sentence(self, first: str) -> str:
        """Return a sentence on the agreement with the model of label `first`."""
        details = (
            f"IoU of best moments: mean {self.iou_mean:.4f}, minimum {self.iou_min:.4f}; maximum shift "
            f"{self.shift_max_s:.2g} s"
        )
        if not self.different:
            return f"{self.model} and {first} return the same moments ({self.queries} queries; {details})."
        return (
            f"{self.model} and {first} return different moments for {self.different} of {self.queries} queries "
            f"({details}). Compare their accuracy with export.verify."
        )

    @classmethod
    def from_moments(
        cls, model: str, actual: Sequence[Sequence[Moment]], expected: Sequence[Sequence[Moment]]
    ) -> Agreement:
        """Compare the best moments of a model with those of the first model.

        Args:
            actual, expected: moments of each query, best first, of this and of the first model.
        """
        pairs = list(zip(actual, expected))
        best = [[(side[0].start, side[0].end) for side in pair] for pair in pairs if all(pair)]
        different = sum(bool(moments) != bool(references) for moments, references in pairs)
        if not best:
            return cls(model, len(expected), 1.0, 1.0, 0.0, different, VISIBLE_S)
        spans = np.array(best, np.float64)
        overlaps, shifts = moment_deviation(spans[:, 0], spans[:, 1])
        different += int((shifts.max(axis=1) > VISIBLE_S).sum())
        overlap = float(overlaps.mean()), float(overlaps.min())
        return cls(model, len(expected), *overlap, float(shifts.max()), different, VISIBLE_S)


@dataclasses.dataclass(frozen=True)
class Report:
    """All results of one run of the benchmark.

    Attributes:
        date: date of the run, YYYY-MM-DD.
        models: measured models, in the order of the command line; ratios refer to the first.
        timings: latency of each case and model, in the order of measurement.
        interrupted: whether the run ended early, so that cases are missing.
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
        values = {"format": FORMAT, **vars(self), "notes": list(self.notes)}
        for name in ("models", "agreements", "conditions"):
            values[name] = [dataclasses.asdict(value) for value in values[name]]
        for name in ("timings", "phases"):
            values[name] = [value.to_dict() for value in values[name]]
        return values

    def text(self) -> str:
        """Return the report for a terminal."""
        groups = dict.fromkeys(timing.case.group for timing in self.timings)
        sections = [
            [f"{environment_line(self.to_dict())}.", str(self.inputs["told"])],
            [agreement.sentence(self.models[0].label) for agreement in self.agreements],
            *(_timings(self.timings, group, len(self.models) > 1) for group in groups),
            _phases(self.phases),
            *(_model_lines(model) for model in self.models),
            _machine(self),
            [f"Note: {note}" for note in self.notes],
        ]
        return "\n\n".join("\n".join(lines) for lines in sections if lines)


def environment_line(report: Mapping[str, Any]) -> str:
    """Return hardware, threads, versions and date of a report in one phrase."""
    hardware, threads = report["hardware"], report["settings"]["threads"]
    on_gpu = any(model["device"] == "cuda" for model in report["models"]) and hardware["gpu"]
    parts = [str(hardware["gpu"])] if on_gpu else []
    parts.append(f"{hardware['cpu']}, {hardware['cores']} cores")
    parts.append("threads as the library chooses" if threads is None else f"{threads} thread{'s' * (threads > 1)}")
    parts += [f"{name} {version}" for name, version in report["versions"].items()]
    return ", ".join([*parts, str(report["date"])])


def latency_table(report: Mapping[str, Any], sha256: str) -> tuple[Sequence[str], Sequence[Sequence[str]]]:
    """Return the header and rows of the latency table of one model, for its parity report.

    Raises:
        ModelFileError: the report has no latency of this model.
    """
    labels = [model["label"] for model in report["models"] if model["sha256"] == sha256]
    timings = [timing for timing in report["timings"] if timing["model"] in labels[:1] and timing["latency"]]
    if not timings:
        measured = [printable_line(f"{model['label']} ({model['sha256'][:12]}…)") for model in report["models"]]
        raise ModelFileError(
            f"Expected a latency report of the model with SHA-256 {sha256[:12]}…, got one of "
            f"{', '.join(measured) or 'no model'}. Measure the model with `python -m runtime.benchmark --model MODEL "
            "--output REPORT.json`.",
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
    """Return the JSON object of a report that `runtime.benchmark --output` wrote.

    Raises:
        ModelFileError: the file is no report, or lacks a value that `latency_table` reads.
    """
    report = read_json(path, "report of runtime.benchmark", ModelFileError)
    check_format(report, FORMAT, f"{path}", ModelFileError, "write it with `python -m runtime.benchmark --output`")
    with reading(path, "a report of runtime.benchmark", ModelFileError, "measure again"):
        for model in report["models"]:
            # A valid timing in front, so that only missing or malformed values raise an error here.
            latency_table({**report, "timings": [_dummy_timing(model["label"]), *report["timings"]]}, model["sha256"])
    return report


def _dummy_timing(label: str) -> dict[str, Any]:
    latency = dataclasses.asdict(Latency(1, 1.0, 1.0, None, None, None, 1.0))
    case = dataclasses.asdict(BenchmarkCase(ONE_QUERY, "", "host"))
    return {"model": label, "latency": latency, "case": case, "queries_per_s": None}


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
    in_group = [timing for timing in timings if timing.case.group == group]
    names = [timing.model for timing in in_group] if several else []
    width = max((len(name) for name in names), default=0)
    sized = group != ONE_QUERY
    title = f"{group}, ms per call"
    label = max(len(title), *(len(timing.case.name) + 4 for timing in in_group))
    header = f"{title:<{label}} {'size' if sized else '':>5} {'':<{width}}"
    columns = ("p50", "p90", "p95", "p99", "max", "calls", "ms/query", "queries/s")
    lines = [f"{header} {' '.join(f'{name:>9}' for name in columns)}{'  speedup' if several else ''}"]
    boundary = ""
    for timing in in_group:
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
    ends = ("overhead, new", "overhead, known")
    header = " ".join(f"{name:>9}" for name in shown)
    lines = [
        "phases, median ms per call; overhead: share of the time outside the network, for new and known videos",
        f"  {'model':<{width}} {'queries':>8} {header} {ends[0]:>14} {ends[1]:>16}",
    ]
    for row in phases:
        cells = " ".join(f"{_ms(row.ms.get(name)):>9}" for name in shown)
        shares = [f"{100 * row.overhead_share(known):.2f} %" for known in (False, True)]
        lines.append(f"  {row.model:<{width}} {row.queries:>8} {cells} {shares[0]:>14} {shares[1]:>16}")
    return lines


def _model_lines(model: ModelInfo) -> list[str]:
    cold = "not measured" if model.cold_start_s is None else f"{model.cold_start_s:.2f} s"
    memory = model.memory
    sizes = {
        "files": memory.files,
        "growth of the process": memory.rss_growth,
        "plan": memory.plan,
        "GPU buffers": memory.device,
        "pinned": memory.pinned,
        "growth of the GPU's used memory": memory.gpu_growth,
    }
    memory_text = ", ".join(f"{name} {_mib(size)}" for name, size in sizes.items() if size is not None)
    return [
        f"{model.label} ({model.precision}, {model.kind}, on {model.device}, SHA-256 {model.sha256[:12]}…)",
        f"  cold start   {cold} in a new process until the first query; in this process opened in {model.open_s:.2f} "
        f"s, first query after {model.first_answer_s:.2f} s",
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
            parts.append(f"throttled by {', '.join(state.gpu.throttled_by) or 'nothing'}")
        lines.append(f"  {state.when:<24} {', '.join(parts) or 'unknown'}")
    return lines
