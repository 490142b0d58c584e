"""Run a benchmark: open the models, compare their answers, time the cases, and collect the report."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from runtime.artifacts.manifest import Manifest
from runtime.backends.base import MAX_THREADS, Device
from runtime.benchmarking import system_info
from runtime.benchmarking.cases import CASE_GROUPS, SWEEP_SECONDS, CaseInputs, TimedCase, phases_call
from runtime.benchmarking.model_opening import cold_start, model_labels, open_model
from runtime.benchmarking.report import Agreement, ModelInfo, Phases, Report, Timing
from runtime.benchmarking.timing import TOLERANCE, Call, Latency, WarmUp, run_interleaved, speed_ratio, warm_up
from runtime.benchmarking.workload import (
    BenchmarkedModel,
    Workload,
    dataset_workload,
    pairs_with_known_words,
    synthetic_workload,
)
from runtime.core import cpu_info
from runtime.core.errors import DeviceError, GroundingError, ModelFileError, QueryError, check_option
from runtime.core.io.input_files import check_file
from runtime.core.repeat_filter import logged_once
from runtime.core.terminal import command_line

log = logging.getLogger("drn")

SAMPLES = 500
MAX_BATCH = 4096
# Minimum number of calls of a sweep case, regardless of the time limit.
MIN_CALLS = 10


@dataclasses.dataclass(frozen=True)
class BenchmarkOptions:
    """The options of one benchmark; see `runtime.benchmark.benchmark`."""

    models: tuple[Path, ...]
    data: Path | None
    video: str | None
    query: tuple[str, ...]
    samples: int
    batch: int
    device: Device
    threads: int | None

    def validate(self) -> None:
        """Raise GroundingError for options out of range, options that need others, and missing model files."""
        if not self.models:
            raise ModelFileError("No model was given. Pass --model FILE or --compare FILE FILE.", code="missing_option")
        check_option("--samples", self.samples, 1)
        check_option("--batch", self.batch, 1, MAX_BATCH)
        check_option("--threads", self.threads, 1, MAX_THREADS, DeviceError)
        if self.video is not None and self.data is None:
            raise GroundingError("--video needs a data set. Pass --data DIR too.", code="missing_option")
        if self.query and self.video is None:
            raise QueryError("--query needs a video. Pass --data DIR and --video NAME too.", code="missing_option")
        for path in self.models:
            check_file(path, "The model file", ModelFileError)

    def command(self) -> str:
        """Return the command line of this benchmark."""
        names = ("samples", "batch", "device", "data", "video", "threads", "query")
        others = {name: getattr(self, name) for name in names}
        return command_line("runtime.benchmark", {"model": self.models[0], "compare": tuple(self.models[1:]), **others})


class BenchmarkRun:
    """A run of the benchmark; `report` returns the results so far, also after an interruption."""

    def __init__(self, options: BenchmarkOptions) -> None:
        self._options = options
        self._labels = model_labels(options.models)
        self._workload = Workload((), "No queries were selected.", synthetic=False)
        self._models: list[BenchmarkedModel] = []
        self._infos: list[ModelInfo] = []
        self._agreements: list[Agreement] = []
        self._timings: list[Timing] = []
        self._phases: list[Phases] = []
        self._notes: list[str] = []
        self._states = [system_info.conditions("before")]

    def measure(self) -> None:
        """Open the models and measure everything."""
        with logged_once():
            self._open_models()
            self._compare_answers()
            inputs = CaseInputs(self._models, self._options.batch, self._note)
            for name, cases in CASE_GROUPS:
                # Closing the generator ends the timing on the GPU after an interruption.
                with contextlib.closing(cases(inputs)) as timed_cases:
                    for timed_case in timed_cases:
                        self._time(timed_case)
                self._states.append(system_info.conditions(f"after {name}"))
            for size in dict.fromkeys((1, self._options.batch)):
                self._time_phases(size)
            self._states.append(system_info.conditions("after all phases"))

    def report(self, interrupted: bool) -> Report:
        """Return the results so far."""
        options, first = self._options, self._states[0]
        last = system_info.conditions("after") if interrupted else self._states[-1]
        cores = cpu_info.cores()
        hardware = {
            "cpu": cpu_info.cpu_name(),
            "cores": cores,
            "gpu": first.gpu.name if first.gpu else None,
            "gpu_driver": first.gpu.driver if first.gpu else None,
        }
        return Report(
            date=datetime.date.today().isoformat(),
            command=options.command(),
            hardware=hardware,
            versions=system_info.versions(),
            settings={name: getattr(options, name) for name in ("samples", "batch", "device", "threads")},
            inputs=self._workload.to_dict(),
            models=self._infos,
            agreements=self._agreements,
            timings=self._timings,
            phases=self._phases,
            peak_rss_bytes=system_info.peak_rss_bytes(),
            conditions=[*self._states, last] if interrupted else self._states,
            notes=self._all_notes(first, last, cores, interrupted),
            interrupted=interrupted,
        )

    def _all_notes(
        self, first: system_info.SystemState, last: system_info.SystemState, cores: int, interrupted: bool
    ) -> list[str]:
        samples, threads = self._options.samples, self._options.threads
        notes = ["The run was interrupted, so results are missing."] if interrupted else []
        if samples < SAMPLES:
            notes.append(f"{samples} samples were taken; with fewer than {SAMPLES}, high percentiles vary.")
        notes.append(
            f"Cases other than one query end after {SWEEP_SECONDS:g} s each, so their number of calls differs. "
            "Percentiles that need more calls are omitted."
        )
        busy = system_info.background_load_warning(first.load, last.load, cores, min(threads or cores, cores))
        reasons = system_info.throttling([*self._states, last])
        unsettled = sum(not timing.settled for timing in self._timings)
        if busy:
            notes.append(busy)
        if reasons:
            notes.append(f"The GPU's clock was reduced by {', '.join(reasons)}.")
        if unsettled:
            notes.append(
                f"{unsettled} of {len(self._timings)} timings, marked *, varied by more than {100 * TOLERANCE:g} % at "
                "the end of the warm-up."
            )
        return notes + self._notes

    def _note(self, note: str) -> None:
        if note not in self._notes:
            self._notes.append(note)

    def _open_models(self) -> None:
        options = self._options
        if options.data is not None:
            self._workload = dataset_workload(options.data, options.video, options.query)
        cold = [self._cold_start(path) for path in options.models]
        grounders = []
        for path, label, cold_start_s in zip(options.models, self._labels, cold):
            grounder, info = open_model(
                path, label, options.device, options.threads, self._workload.pairs, cold_start_s
            )
            grounders.append(grounder)
            self._infos.append(info)
        manifests = [grounder.manifest for grounder in grounders]
        _check_comparable(self._labels, manifests)
        if options.data is None:
            self._workload = synthetic_workload(manifests, options.batch)
        if not options.query:
            pairs = pairs_with_known_words(self._workload.pairs, grounders)
            self._workload = dataclasses.replace(self._workload, pairs=pairs)
        self._models = [
            BenchmarkedModel.from_grounder(label, grounder, self._workload.pairs)
            for label, grounder in zip(self._labels, grounders)
        ]

    def _cold_start(self, path: Path) -> float | None:
        try:
            return cold_start(path, self._options.device, self._options.threads)
        except DeviceError as error:
            self._note(str(error))
            return None

    def _compare_answers(self) -> None:
        """Compare the moments of each model with those of the first."""
        if len(self._models) < 2:
            return
        moments = [
            model.grounder.ground_batch(model.pairs, batch_size=self._options.batch, presence=False)
            for model in self._models
        ]
        for model, actual in zip(self._models[1:], moments[1:]):
            agreement = Agreement.from_moments(model.label, actual, moments[0])
            self._agreements.append(agreement)
            log.info("%s", agreement.sentence(self._models[0].label))

    def _time(self, timed: TimedCase) -> None:
        """Warm up and time a case with all models that support it, interleaved."""
        case = timed.case
        calls = {model: call for model, call in timed.calls.items() if self._works(timed, model)}
        if not calls:
            return
        models = list(calls)
        samples: list[list[float]] = [[] for _ in models]
        description = f"{case.boundary}, {case.name} {case.size}"
        warm: list[WarmUp] = []
        try:
            warm = warm_up(list(calls.values()))
            self._run_interleaved(description, list(calls.values()), samples, timed.max_seconds)
        except GroundingError as error:
            self._note(f"{description} ended early: {error}")
        finally:
            for index, model in enumerate(models):
                if samples[index]:
                    has_baseline = index and models[0] is self._models[0] and samples[0]
                    ratio = speed_ratio(samples[index], samples[0]) if has_baseline else None
                    latency = Latency.from_samples(samples[index])
                    self._timings.append(Timing(case, model.label, latency, warm[index], ratio))

    def _works(self, timed: TimedCase, model: BenchmarkedModel) -> bool:
        """Return whether one call succeeds, and record its error; an engine may not accept the size of the case."""
        try:
            timed.calls[model].seconds(0)
        except GroundingError as error:
            self._timings.append(Timing(timed.case, model.label, None, failed=str(error)))
            return False
        return True

    def _run_interleaved(
        self, description: str, calls: Sequence[Call], samples: Sequence[list[float]], max_seconds: float | None
    ) -> None:
        limit = None if max_seconds is None else max_seconds * len(calls)
        # tqdm draws no bar if stderr is no terminal.
        if not sys.stderr.isatty():
            log.info("Timing %s ...", description)
        rounds = self._options.samples
        with tqdm(total=rounds, desc=description, unit="round", leave=False, disable=None) as bar:
            run_interleaved(calls, rounds, samples, max_seconds=limit, min_rounds=MIN_CALLS, on_round=bar.update)

    def _time_phases(self, size: int) -> None:
        description = f"phases of {size} queries"
        samples: dict[BenchmarkedModel, list[dict[str, float]]] = {}
        calls = []
        for model in self._models:
            model_samples: list[dict[str, float]] = []
            call = phases_call(model, size, model_samples)
            try:
                call.seconds(0)
            except GroundingError as error:
                self._note(f"{model.label}: {description} were not measured: {error}")
            else:
                samples[model] = model_samples
                calls.append(call)
        if not calls:
            return
        try:
            try:
                warm_up(calls)
            finally:
                for model_samples in samples.values():
                    model_samples.clear()
            self._run_interleaved(description, calls, [[] for _ in calls], SWEEP_SECONDS)
        except GroundingError as error:
            self._note(f"{description} ended early: {error}")
        finally:
            for model, model_samples in samples.items():
                if model_samples:
                    phases = model_samples[0]
                    ms = {
                        phase: 1e3 * float(np.median([sample[phase] for sample in model_samples])) for phase in phases
                    }
                    videos = len({id(video) for video, _ in model.unseen_pairs(0, size)})
                    self._phases.append(Phases(model.label, size, videos, len(model_samples), ms))


def _check_comparable(labels: Sequence[str], manifests: Sequence[Manifest]) -> None:
    first = manifests[0].features
    for label, manifest in zip(labels, manifests):
        if manifest.features.dim != first.dim:
            raise ModelFileError(
                f"Expected models for the same features, got width {first.dim} for {labels[0]} and width "
                f"{manifest.features.dim} for {label}. Compare models of one kind of features.",
                code="models_differ",
            )
