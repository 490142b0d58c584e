"""Run one build: convert and check the graph, build and check the engines, and write all files or none."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from calib.graph.onnx_graph import read_source
from calib.graph.precision_audit import MIN_SHARES, require_precision
from calib.graph.unroll_lstm import lstm_layers
from calib.qdq_quantizer import attainable_share
from export.build.artifacts import ConvertedModel, format_shares, split_engine_parts
from export.build.build_config import (
    BuildConfig,
    BuildRequest,
    ResolvedTarget,
    Target,
    ensure_source_graph,
    known_graph,
)
from export.build.extractor_engine import FEATURE_TOLERANCES, build_extractor, extractor_file_kind
from export.build.parity_check import ParityChecker
from export.build.reduced_precision import ConversionOptions, convert_precision, validate_keep_modules
from export.build.speed_check import SpeedCheck, check_speed
from export.engine.builder import BuildOptions, runs_here, unavailable_reason
from export.engine.engine_part import EnginePart
from export.engine.engine_writer import BuildState, build_part, mark_rejected
from export.engine.profiles import Profile, Unrolling, check_ranges, check_unroll, one_profile, profiles, unrolling
from export.parity.model_file import ModelFile
from runtime.artifacts.manifest import Manifest
from runtime.backends.openvino_session import import_openvino
from runtime.core.cli import report_written, suggest_next_command
from runtime.core.errors import CheckFailed, DeviceError, GroundingError, ModelFileError
from runtime.core.gpu_info import cuda_gpu
from runtime.core.io.atomic_files import locked
from runtime.core.io.staging import Staging
from runtime.core.repeat_filter import logged_once
from runtime.datasets.dataset import Annotation, DataSet
from runtime.datasets.presets import query_length_of
from runtime.grounding.evaluation import askable_rows

if TYPE_CHECKING:
    import onnx

    from export.parity.parity_report import ParityReport

log = logging.getLogger("drn")

# Options that also apply to a feature extractor.
EXTRACTOR_OPTIONS = frozenset(
    ("model", "precision", "target", "output", "batch", "keep", "calib_method", "calib_videos", "optimization_level",
     "workspace", "timing_cache", "version_compatible", "hardware_compatible", "tf32", "compute_capability", "threads",
     "dry_run")
)  # fmt: skip


def run(request: BuildRequest) -> Path:
    """Run a build, and return the path of the engine, or of the graph for ONNX Runtime.

    Raises:
        GroundingError: an input is missing, or options contradict each other.
        CheckFailed: the precision, the accuracy or the speed check failed. After the last the model is written.
    """
    output, speed = run_with_speed(request)
    check_faster(output, speed)
    return output


def check_faster(output: Path, speed: SpeedCheck | None) -> None:
    """Raise CheckFailed if a model that was written is slower than `--min-speedup`."""
    if speed and speed.verdict == "not faster":
        raise CheckFailed(f"{output.name} was written. {speed.sentence()}", code="not_faster")


def run_with_speed(request: BuildRequest) -> tuple[Path, SpeedCheck | None]:
    """Run a build, and return the path of the model to run, and its speed; None if --min-speedup is 0."""
    build = EngineBuild.from_request(request)
    if build.is_extractor:
        return _run_extractor(build), None
    if request.dry_run:
        print(build.dry_run_summary())
        return build.job.output, None
    log.info("Target %s: %s", build.job.target, build.reason)
    return build.with_source_graph().run()


def _run_extractor(build: EngineBuild) -> Path:
    request, job = build.request, build.job
    check_ranges(request.batch, request.query_length)
    if request.dry_run:
        print(job.describe(build.reason, (), build.options, None, "features of synthetic clips compared with FP32"))
        return job.output
    log.info("Target %s: %s", job.target, build.reason)
    return build_extractor(job, build.options, request)


@dataclasses.dataclass(frozen=True)
class EngineBuild:
    """The state of one build. Later steps replace the defaults.

    Attributes:
        request: options of the command, with the target resolved.
        reason: why the target was chosen, as a sentence.
        job: files of the build.
        options: builder options of the engine.
        is_extractor: whether the model is a feature extractor, which uses none of the fields below.
        data_set: data set of `--data`.
        annotations: queries of the accuracy check.
        profiles: optimization profiles; None before the export of a published model.
        short: engines for short queries; None before the export of a published model.
        source: path of the FP32 graph; None before the export.
        graph: the FP32 graph; None before the export.
    """

    request: BuildRequest
    reason: str
    job: BuildConfig
    options: BuildOptions
    is_extractor: bool = False
    data_set: DataSet | None = None
    annotations: Sequence[Annotation] = ()
    profiles: Sequence[Profile] | None = None
    short: Unrolling | None = None
    source: Path | None = None
    graph: onnx.ModelProto | None = None

    @classmethod
    def from_request(cls, request: BuildRequest) -> EngineBuild:
        """Check the options and choose target and files, before any work."""
        capabilities = tuple(dict.fromkeys(request.compute_capability))
        lengths = check_unroll(request.unroll)
        target, reason = choose_target(request.target, capabilities)
        resolved = dataclasses.replace(request, target=target, unroll=lengths, compute_capability=capabilities)
        job = BuildConfig(
            request.model, request.precision, target, request.data, request.output, request.split,
            tuple(length for length in lengths if length),
        )  # fmt: skip
        options = BuildOptions(
            target="tensorrt-rtx" if target == "tensorrt-rtx" else "tensorrt",
            precision=request.precision,
            profiles=(),
            optimization_level=request.optimization_level,
            workspace_gib=request.workspace,
            version_compatible=request.version_compatible,
            hardware_compatible=request.hardware_compatible,
            tf32=request.tf32,
            compute_capabilities=capabilities,
        )
        is_extractor = extractor_file_kind(request.model) is not None
        if is_extractor:
            _check_extractor(request)
        elif request.calib_videos:
            raise GroundingError(
                f"--calib-videos applies to feature extractors only, but {request.model.name} is not one. Use --data.",
                code="inapplicable_option",
            )
        job.check(request)
        job.check_options(options, request.timing_cache, reason, request.profiles)
        build = cls(resolved, reason, job, options, is_extractor)
        return build if is_extractor else build._with_queries()

    def _with_queries(self) -> EngineBuild:
        """Return the build with its data set, and with its profiles if the model has a manifest."""
        request = self.request
        early = self.job.early_profiles(request.batch, request.query_length, request.keep)
        data_set = DataSet(request.data) if request.data else None
        annotations = data_set.annotations(request.parity_split)[: request.limit] if data_set else []
        build = dataclasses.replace(self, data_set=data_set, annotations=annotations)
        return build._with_profiles(*early) if early else build

    def _with_profiles(self, shapes: Sequence[Profile], manifest: Manifest) -> EngineBuild:
        shapes = one_profile(shapes) if self.request.profiles == 1 else shapes
        short = self._unrolling(shapes[0].query_length[2], manifest)
        return dataclasses.replace(self, profiles=shapes)._with_short(short)

    def _unrolling(self, longest: int, manifest: Manifest | None) -> Unrolling:
        request = self.request
        return unrolling(request.unroll, self.job.target, longest, manifest, self.data_set, request.parity_split)

    def _with_short(self, short: Unrolling) -> EngineBuild:
        """Return the build with engines for short queries; raise OutputError if a file cannot be written."""
        if short.steps == self.job.unroll:
            return dataclasses.replace(self, short=short)
        job = dataclasses.replace(self.job, unroll=short.steps)
        job.check_outputs(self.request.table, self.request.plan, self.request.timing_cache)
        return dataclasses.replace(self, short=short, job=job)

    def dry_run_summary(self) -> str:
        """Return the plan of the build, for --dry-run."""
        request = self.request
        longest = request.query_length[2] if request.query_length else 0
        short = self.short or self._unrolling(longest or query_length_of({})[2], None)
        graph = known_graph(self.job, longest) if short.steps else None
        build = self._with_short(_supported_unrolling(short, graph) if graph else short)
        samples = request.calib_samples if request.table is None else None
        return build.job.describe(self.reason, build.profiles, self.options, samples, unrolling=build.short)

    def with_source_graph(self) -> EngineBuild:
        """Return the build with its FP32 graph, after exporting the model if it is a checkpoint."""
        request = self.request
        longest = request.query_length[2] if request.query_length else 0
        source = ensure_source_graph(self.job, request.vocabulary, longest)
        graph, manifest = read_source(source)
        rows = askable_rows(manifest.vocabulary, self.annotations)
        validate_keep_modules(graph, request.precision, request.keep)
        build = self
        if build.profiles is None or build.short is None:
            build = build._with_profiles(profiles(request.batch, request.query_length, manifest), manifest)
        assert build.short is not None
        short = _supported_unrolling(build.short, graph)
        build = build._with_short(short)
        if build.job.target == "tensorrt":
            print(_describe_unrolling(short))
        return dataclasses.replace(
            build, source=source, graph=graph, annotations=[self.annotations[row] for row in rows]
        )

    def command(self, steps: Sequence[int]) -> str:
        """Return the command line that reproduces the build, with the query lengths of its unrolled engines.

        They are recorded even if they are a default, because the default depends on the data set.
        """
        unroll = tuple(steps) or ((0,) if self.job.target == "tensorrt" else ())
        return dataclasses.replace(self.request, output=self.job.output, unroll=unroll).command()

    def run(self) -> tuple[Path, SpeedCheck | None]:
        """Build, and return the path of the model to run, and its speed if that was checked.

        Files are written to a staging directory and renamed at the end, so that a failed build replaces no file.
        """
        assert self.source is not None
        job = self.job
        with logged_once(), locked(job.output.parent, job.output.name), Staging() as staging:
            staged = dataclasses.replace(job, requested_output=staging.path(job.output))
            try:
                report, has_engine, speed = self._build(staged)
            except CheckFailed:
                # A calibration table and a plan take minutes to compute and remain valid.
                report_written(
                    *staging.commit(
                        lambda name: ".rejected." in name or name.endswith((".calibration.json", ".plan.json"))
                    )
                )
                raise
            written = staging.commit()
        report_written(*written)
        if report:
            print(f"{report.sentence()} The report is {job.sibling_path('passport.html')}.")
        else:
            log.warning("The accuracy was not checked. Add --data DIR to compare the model with FP32.")
        if speed:
            print(speed.sentence())
        self._suggest_next(has_engine)
        print(job.output)
        return job.output, speed

    def _build(self, staged: BuildConfig) -> tuple[ParityReport | None, bool, SpeedCheck | None]:
        """Write and check the graph and the engines in a staging directory.

        Returns:
            The report of the last check (None without queries), whether there is an engine, and the speed, if checked.
        """
        assert self.source is not None
        assert self.graph is not None
        assert self.profiles is not None
        request, job = self.request, self.job
        command = self.command(job.unroll)
        checker = ParityChecker(
            request, staged, job.output, command, self.source, self.graph, self.data_set, self.annotations
        )
        conversion = ConversionOptions(
            request.keep, request.table, request.plan, request.calib_samples, request.calib_method, request.max_drop,
            request.threads, staged.sibling_path("calibration.json"), staged.sibling_path("plan.json"),
            library=job.library,
        )  # fmt: skip
        converted = convert_precision(self.graph, request.precision, conversion, self.data_set, str(self.source))
        if request.tf32:
            converted = dataclasses.replace(converted, facts={**converted.facts, "tf32": True})
        model = ConvertedModel.of(staged, self.source, self.graph, converted)
        ratio = len(model.content) / self.source.stat().st_size
        print(f"{job.graph_path.name}: {format_shares(model.precision_stats)}; {ratio:.2f} of the size in FP32.")
        report = _check_graph(staged, checker, model)
        model.save(staged.graph_path)
        if request.split:
            parts = split_engine_parts(staged, model, self.graph, self.profiles, request.videos)
        else:
            file = model.file(staged.graph_path)
            parts = [
                EnginePart(
                    converted.graph, model.manifest, file.path, file.sha256, staged.output, self.profiles,
                    model.precision_stats, model.fp32_weight_bytes,
                )
            ]  # fmt: skip
        if job.library:
            speed = self._check_speed(staged, model)
            if report:
                checker.write_reports(_with_speed(report, speed), model, None)
            return report, False, speed
        return self._build_engines(parts, checker, model, report)

    def _check_speed(self, staged: BuildConfig, model: ConvertedModel) -> SpeedCheck | None:
        assert self.source is not None
        assert self.graph is not None
        return check_speed(self.request, staged, self.job.output.name, self.options, (self.source, self.graph), model)

    def _build_engines(
        self, parts: Sequence[EnginePart], checker: ParityChecker, model: ConvertedModel, report: ParityReport | None
    ) -> tuple[ParityReport | None, bool, SpeedCheck | None]:
        """Build the engines of a checked graph, check them if a GPU is available, and write the reports."""
        assert self.short is not None
        state = BuildState()
        parts = [part.with_unrolled(self.job.unroll, self.short.automatic) for part in parts]
        built = [
            build_part(part, self.request.precision, self.options, self.request.timing_cache, state) for part in parts
        ]
        engines = [path for part in built for path in part.engines]
        last = built[-1]
        steps = tuple(other.max_query_length for other in last.unrolled)
        if steps != self.job.unroll:
            # Engines that could not be built are not part of the recorded command.
            checker = dataclasses.replace(checker, command=self.command(steps))
            report = dataclasses.replace(report, command=checker.command) if report else None
        if self.data_set and runs_here(self.options):
            report = _check_engine(checker, model, engines)
        speed = self._check_speed(checker.job, model)
        if report:
            assert isinstance(last.manifest, Manifest)
            engine = ModelFile.of(last.engine, last.manifest)
            checker.write_reports(_with_speed(report, speed), model, engine, engines)
        return report, True, speed

    def _suggest_next(self, has_engine: bool) -> None:
        output = self.job.output
        if has_engine and not runs_here(self.options):
            suggest_next_command("runtime.describe", output)
        elif self.data_set:
            models = ("--model", self.source, "--compare", output)
            suggest_next_command("runtime.benchmark", *models, "--data", self.request.data)
        else:
            models = ("--reference", self.source, "--model", self.job.graph_path)
            suggest_next_command("export.verify", *models, "--data", "DIR")


def _with_speed(report: ParityReport, speed: SpeedCheck | None) -> ParityReport:
    return dataclasses.replace(report, speed=speed.to_dict()) if speed else report


def _supported_unrolling(short: Unrolling, graph: onnx.ModelProto) -> Unrolling:
    """Return `short`, or no lengths if they are a default and the LSTM of the graph cannot be unrolled.

    Raises:
        ModelFileError: the LSTM cannot be unrolled, and --unroll requests it.
    """
    if not short.steps:
        return short
    try:
        lstm_layers(graph)
    except ModelFileError as error:
        if not short.automatic:
            raise
        log.warning("%s No engine with an unrolled LSTM is built.", error)
        return Unrolling((), "the LSTM of this graph cannot be unrolled", automatic=True)
    return short


def _describe_unrolling(short: Unrolling) -> str:
    """Return which engines with an unrolled LSTM are built, as one or two sentences."""
    if not short.steps:
        return f"No engine with an unrolled LSTM is built ({short.reason})."
    lengths = " and ".join(map(str, short.steps))
    hint = " --unroll 0 builds none." if short.automatic else ""
    return f"Engines with an unrolled LSTM are built for at most {lengths} tokens ({short.reason}).{hint}"


def _check_graph(job: BuildConfig, checker: ParityChecker, converted: ConvertedModel) -> ParityReport | None:
    """Check the precision of a converted model, and its accuracy if there are queries; return the report of the latter.

    Raises:
        CheckFailed: a check failed; the model is saved as MODEL.PRECISION.rejected.onnx.
    """
    rejected = job.rejected_path("onnx")
    attainable = 1.0
    if job.precision in ("int8", "fp8"):
        attainable = attainable_share(checker.graph, "fp8" if job.precision == "fp8" else "int8")
    try:
        name = require_precision(converted.precision_stats, job.precision, attainable)
    except CheckFailed as error:
        converted.save(rejected)
        raise CheckFailed(
            f"{error} The graph was saved as {rejected.name}. Remove modules from --keep, or choose --precision fp16.",
            code=error.code,
        ) from error
    if converted.precision_stats.share(job.precision) < MIN_SHARES[job.precision]:
        log.warning(
            "%s: the maximum for this narrow network is %.1f %%. Compare its latency with FP16 and FP32.",
            name,
            100 * attainable,
        )
    if not checker.data_set:
        return None
    report = dataclasses.replace(checker.check_graph(converted), precision=name)
    print(report.text())
    if report.violations:
        converted.save(rejected)
        report = dataclasses.replace(report, model=converted.file(rejected))
        checker.write_reports(report, converted, None)
        raise CheckFailed(
            f"{report.sentence()} Add modules to --keep (see `python -m calib.rank_layers`), or raise --max-drop.",
            code="parity_failed",
        )
    return report


def _check_engine(checker: ParityChecker, converted: ConvertedModel, engines: Sequence[Path]) -> ParityReport:
    """Check the accuracy of an engine, the last of all engines of the build, on the GPU of this machine.

    Raises:
        CheckFailed: the check failed; the engines are renamed to NAME.rejected.engine.
    """
    report = checker.check_engine(converted)
    print(report.text())
    if report.violations:
        rejected = [mark_rejected(engine) for engine in engines]
        report = dataclasses.replace(report, model=ModelFile.of(rejected[-1], converted.manifest))
        checker.write_reports(report, converted, None)
        raise CheckFailed(
            f"{report.sentence()} The graph passed the check, so try another --optimization-level, or --keep.",
            code="parity_failed",
        )
    return report


def choose_target(target: Target, capabilities: Sequence[str] = ()) -> tuple[ResolvedTarget, str]:
    """Return the target of a build, and why it was chosen, as a sentence.

    Raises:
        DeviceError: this machine cannot build for the requested target.
    """
    if target == "onnxruntime":
        return target, "ONNX Runtime runs the converted graph and optimizes it on the machine that loads it."
    if target == "openvino":
        import_openvino()
        return target, "OpenVINO runs the converted graph and compiles it on the machine that loads it."
    if target != "auto":
        reason = unavailable_reason(target)
        if reason is None and target == "tensorrt-rtx" and not capabilities and cuda_gpu() is None:
            reason = "--target tensorrt-rtx needs --compute-capability without a GPU. Add it, as 8.6 8.9."
        if reason:
            raise DeviceError(reason, code="target_unavailable")
        return target, "requested."
    reason = unavailable_reason("tensorrt")
    if reason is None:
        return "tensorrt", "TensorRT and a GPU are available."
    if capabilities:
        rtx_reason = unavailable_reason("tensorrt-rtx")
        if rtx_reason is None:
            return "tensorrt-rtx", "--compute-capability was given; TensorRT-RTX needs no GPU for the build."
        reason = rtx_reason
    return "onnxruntime", f"no engine can be built on this machine ({reason.rstrip('.')})."


def _check_extractor(request: BuildRequest) -> None:
    """Raise GroundingError if options do not apply to a feature extractor."""
    name = request.model.name
    if request.precision not in FEATURE_TOLERANCES:
        raise GroundingError(
            f"Feature extractors such as {name} do not support {request.precision}. "
            f"Choose --precision from {', '.join(FEATURE_TOLERANCES)}.",
            code="precision_unsupported",
        )
    others = [f"--{name.replace('_', '-')}" for name in request.given() if name not in EXTRACTOR_OPTIONS]
    if request.precision == "int8" and not request.calib_videos:
        raise GroundingError(
            f"--precision int8 needs clips to calibrate {name} on. Add --calib-videos FILE, two or more videos.",
            code="missing_option",
        )
    if request.target == "openvino":
        raise GroundingError(
            f"--target openvino applies to DRN models only, and {name} is a feature extractor. Choose --target "
            "onnxruntime.",
            code="inapplicable_option",
        )
    if others:
        raise GroundingError(
            f"{', '.join(others)} applies to DRN models only, and {name} is a feature extractor. Remove the option.",
            code="inapplicable_option",
        )
