"""Run one engine build: plan it, convert and check the graph, build and check the engine, write all or nothing."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from calib.graph.onnx_graph import read_source
from calib.graph.unroll_lstm import lstm_layers
from export.build.artifacts import ConvertedModel, cut_parts, format_shares, single_engine_part
from export.build.build_config import (
    BuildConfig,
    BuildRequest,
    Target,
    ensure_source_graph,
    known_graph,
    validate_keep_modules,
)
from export.build.extractor_engine import FEATURE_TOLERANCES, build_extractor, extractor_file_kind
from export.build.parity_check import ParityChecker
from export.build.reduced_precision import ConversionOptions, convert_precision
from export.engine.builder import BuildOptions, cuda_devices, runs_here, unavailable_reason
from export.engine.engine_part import EnginePart
from export.engine.engine_writer import BuildState, build_part, mark_rejected
from export.engine.profiles import Profile, Unrolling, check_ranges, check_unroll, one_profile, profiles, unrolling
from export.parity.model_file import ModelFile
from runtime.artifacts.manifest import Manifest
from runtime.core.cli import suggest_next_command
from runtime.core.errors import CheckFailed, DeviceError, GroundingError, ModelFileError
from runtime.core.io.atomic_files import Staging, locked
from runtime.core.repeat_filter import said_once
from runtime.datasets.dataset import Annotation, DataSet
from runtime.datasets.presets import query_length_of
from runtime.grounding.evaluation import askable_rows

if TYPE_CHECKING:
    import onnx

    from export.parity.parity_report import ParityReport

log = logging.getLogger("drn")

# Options of a build that apply to a feature extractor too.
OF_EXTRACTORS = frozenset(
    ("model", "precision", "target", "output", "batch", "keep", "optimization_level", "workspace", "timing_cache",
     "version_compatible", "hardware_compatible", "tf32", "compute_capability", "threads", "dry_run")
)  # fmt: skip


def run(request: BuildRequest) -> Path:
    """Run a build, and return the path of the engine, or of the graph for ONNX Runtime.

    Raises:
        GroundingError: an input is missing, or options contradict each other.
        CheckFailed: the precision or the accuracy check failed.
    """
    build = _EngineBuild.plan(request)
    if build.is_extractor:
        return _run_extractor(build)
    if request.dry_run:
        print(build.dry_run_summary())
        return build.job.output
    log.info("Target %s: %s", build.job.target, build.reason)
    return build.with_source_graph().run()


def _run_extractor(build: _EngineBuild) -> Path:
    """Build the engine of a feature extractor; see `run`."""
    request, job = build.request, build.job
    check_ranges(request.batch, request.query_length)
    if request.dry_run:
        print(job.describe(build.reason, (), build.options, None, "features of synthetic clips compared with FP32"))
        return job.output
    log.info("Target %s: %s", job.target, build.reason)
    return build_extractor(job, build.options, request.batch, request.keep, request.timing_cache, request.threads)


@dataclasses.dataclass(frozen=True)
class _EngineBuild:
    """One build, as far as it is decided.

    Attributes:
        request: what the command was given, with its target resolved.
        reason: why this target, as a sentence.
        job: the files.
        options: of the library that builds engines.
        is_extractor: whether the model is a feature extractor, to which what follows does not apply.
        data_set: of `--data`.
        annotations: queries of the accuracy check.
        profiles: optimization profiles; None if they follow from a graph that does not exist yet.
        short: engines for short queries; None as `profiles`.
        source: file of the FP32 graph; None until it was exported.
        graph, manifest: of the source.
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
    def plan(cls, request: BuildRequest) -> _EngineBuild:
        """Return what can be decided, and raise what can be known to be wrong, before any work."""
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
        job.check(request)
        job.check_options(options, request.timing_cache, reason, request.profiles)
        build = cls(resolved, reason, job, options, is_extractor)
        return build if is_extractor else build._with_queries()

    def _with_queries(self) -> _EngineBuild:
        """Return the build with its data set, and with what follows from the manifest if the model has one already."""
        request = self.request
        early = self.job.early_profiles(request.batch, request.query_length, request.keep)
        data_set = DataSet(request.data) if request.data else None
        annotations = data_set.annotations(request.parity_split)[: request.limit] if data_set else []
        build = dataclasses.replace(self, data_set=data_set, annotations=annotations)
        return build._with_profiles(*early) if early else build

    def _with_profiles(self, shapes: Sequence[Profile], manifest: Manifest) -> _EngineBuild:
        shapes = one_profile(shapes) if self.request.profiles == 1 else shapes
        short = self._unrolling(shapes[0].query_length[2], manifest)
        return dataclasses.replace(self, profiles=shapes)._with_short(short)

    def _unrolling(self, longest: int, manifest: Manifest | None) -> Unrolling:
        request = self.request
        return unrolling(request.unroll, self.job.target, longest, manifest, self.data_set, request.parity_split)

    def _with_short(self, short: Unrolling) -> _EngineBuild:
        """Return the build with engines for short queries; OutputError if one of their files cannot be written."""
        if short.steps == self.job.unroll:
            return dataclasses.replace(self, short=short)
        job = dataclasses.replace(self.job, unroll=short.steps)
        job.check_outputs(self.request.table, self.request.plan, self.request.timing_cache)
        return dataclasses.replace(self, short=short, job=job)

    def dry_run_summary(self) -> str:
        """Return what the build would do."""
        request = self.request
        longest = request.query_length[2] if request.query_length else 0
        short = self.short or self._unrolling(longest or query_length_of({})[2], None)
        graph = known_graph(self.job, longest) if short.steps else None
        build = self._with_short(_supported_unrolling(short, graph) if graph else short)
        samples = request.calib_samples if request.table is None else None
        return build.job.describe(self.reason, build.profiles, self.options, samples, unrolling=build.short)

    def with_source_graph(self) -> _EngineBuild:
        """Return the build with its FP32 graph, which is exported first if the model is a checkpoint."""
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
            print(_about_short(short))
        return dataclasses.replace(
            build, source=source, graph=graph, annotations=[self.annotations[row] for row in rows]
        )

    def command(self, steps: Sequence[int]) -> str:
        """Return the command that builds the same again, with unrolled engines for these query lengths.

        Lengths that the data set determined are named, so that other data does not change the engine.
        """
        named = tuple(steps) or ((0,) if self.job.target == "tensorrt" else ())
        return dataclasses.replace(self.request, output=self.job.output, unroll=named).command()

    def run(self) -> Path:
        """Build, and return the path of what runs.

        All files are written to a staging directory and renamed at the end, so that a build that fails replaces none.
        """
        assert self.source is not None
        job = self.job
        with said_once(), locked(job.output.parent, job.output.name), Staging() as staging:
            staged = dataclasses.replace(job, requested_output=staging.path(job.output))
            try:
                report, has_engine = self._build(staged)
            except CheckFailed:
                # A calibration table and a plan cost minutes, and stay valid.
                staging.settle(lambda name: ".rejected." in name or name.endswith((".calibration.json", ".plan.json")))
                raise
            settled = staging.settle()
        print(f"Written: {', '.join(path.name for path in settled)}.")
        if report:
            print(f"{report.sentence()} The report is {job.sibling_path('passport.html')}.")
        else:
            log.warning("The accuracy was not checked. Pass --data DIR to compare the answers with FP32.")
        self._suggest_next(has_engine)
        print(job.output)
        return job.output

    def _build(self, staged: BuildConfig) -> tuple[ParityReport | None, bool]:
        """Write and check the graph and the engines in a staging directory.

        Returns:
            The report of the last check, None without queries; and whether an engine was built.
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
            for_cpu=job.target == "onnxruntime",
        )  # fmt: skip
        converted = convert_precision(self.graph, request.precision, conversion, self.data_set, str(self.source))
        if request.tf32:
            converted = dataclasses.replace(converted, facts={**converted.facts, "tf32": True})
        created = ConvertedModel.of(staged, self.source, self.graph, converted)
        size = len(created.content) / self.source.stat().st_size
        print(f"{job.graph_path.name}: {format_shares(created.precision_stats)}, {size:.2f} of FP32.")
        report = _checked_graph(staged, checker, created)
        created.save(staged.graph_path)
        parts = [single_engine_part(staged, created, converted, self.profiles)]
        if request.split:
            parts = cut_parts(staged, created, self.graph, self.profiles, request.videos)
        if job.target == "onnxruntime":
            if report:
                checker.write_reports(report, created, None)
            return report, False
        return self._build_engines(parts, checker, created, report), True

    def _build_engines(
        self, parts: Sequence[EnginePart], checker: ParityChecker, created: ConvertedModel, report: ParityReport | None
    ) -> ParityReport | None:
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
            # What was left out does not build the next time either.
            checker = dataclasses.replace(checker, command=self.command(steps))
            report = dataclasses.replace(report, command=checker.command) if report else None
        if self.data_set and runs_here(self.options):
            report = _checked_engine(checker, created, engines)
        if report:
            assert isinstance(last.manifest, Manifest)
            checker.write_reports(report, created, ModelFile.of(last.engine, last.manifest), engines)
        return report

    def _suggest_next(self, has_engine: bool) -> None:
        output = self.job.output
        if has_engine and not runs_here(self.options):
            suggest_next_command("runtime.describe", output)
        elif self.data_set:
            first = self.annotations[0]
            query = ("--video", first.video, "--query", first.sentence)
            suggest_next_command("runtime.infer", "--model", output, "--data", self.request.data, *query)
        else:
            models = ("--reference", self.source, "--model", self.job.graph_path)
            suggest_next_command("export.verify", *models, "--data", "DIR")


def _supported_unrolling(short: Unrolling, graph: onnx.ModelProto) -> Unrolling:
    """Return `short`, or no lengths where they are a default and the LSTM of a graph cannot be written out.

    Raises:
        ModelFileError: it cannot, and --unroll asks for it.
    """
    if not short.steps:
        return short
    try:
        lstm_layers(graph)
    except ModelFileError as error:
        if not short.automatic:
            raise
        log.warning("%s The engine is built with TensorRT's LSTM loop alone.", error)
        return Unrolling((), "the LSTM of this graph cannot be written out", automatic=True)
    return short


def _about_short(short: Unrolling) -> str:
    """Return which engines with a written-out LSTM are built, for a terminal."""
    if not short.steps:
        return f"No engine with a written-out LSTM is built ({short.reason})."
    lengths = " and ".join(map(str, short.steps))
    off = " --unroll 0 builds none." if short.automatic else ""
    return f"Engines with a written-out LSTM for at most {lengths} tokens ({short.reason}).{off}"


def _checked_graph(job: BuildConfig, checker: ParityChecker, converted: ConvertedModel) -> ParityReport | None:
    """Return the report of a graph that has its precision and answers as FP32; None without queries.

    Raises:
        CheckFailed: it does not; it is then kept as rejected.
    """
    from calib.graph.precision_audit import MIN_SHARES, require_precision

    rejected = job.rejected("onnx")
    attainable = 1.0
    if job.precision in ("int8", "fp8"):
        from calib.qdq_quantizer import attainable_share

        attainable = attainable_share(checker.graph, "fp8" if job.precision == "fp8" else "int8")
    try:
        name = require_precision(converted.precision_stats, job.precision, attainable)
    except CheckFailed as error:
        converted.save(rejected)
        raise CheckFailed(
            f"{error} It is kept as {rejected.name}; keep fewer modules, or, where the network itself is too small for "
            f"{job.precision}, build fp16.",
            code=error.code,
        ) from error
    if converted.precision_stats.share(job.precision) < MIN_SHARES[job.precision]:
        log.warning(
            "%s: the network is so narrow that at most %.1f %% can be; FP16 or FP32 may be as fast, so measure them.",
            name,
            100 * attainable,
        )
    if not checker.data_set:
        return None
    proof = dataclasses.replace(checker.check_graph(converted), precision=name)
    print(proof.text())
    if proof.broken:
        converted.save(rejected)
        proof = dataclasses.replace(proof, model=converted.file(rejected))
        checker.write_reports(proof, converted, None)
        raise CheckFailed(
            f"{proof.sentence()} Keep the costliest modules in higher precision (--keep; `python -m calib.rank_layers` "
            "finds them), or raise --max-drop.",
            code="parity_failed",
        )
    return proof


def _checked_engine(checker: ParityChecker, converted: ConvertedModel, engines: Sequence[Path]) -> ParityReport:
    """Return the proof of an engine that answers as FP32 on this machine's GPU.

    Args:
        checker: holds the engine against the FP32 graph.
        converted: the converted graph.
        engines: every plan that was built, what runs last.

    Raises:
        CheckFailed: it does not; it is then kept as rejected.
    """
    proof = checker.check_engine(converted)
    print(proof.text())
    if proof.broken:
        retained = [mark_rejected(engine) for engine in engines]
        proof = dataclasses.replace(proof, model=ModelFile.of(retained[-1], converted.manifest))
        checker.write_reports(proof, converted, None)
        raise CheckFailed(
            f"{proof.sentence()} Its graph does, so the loss is in the engine's kernels; build it with another "
            "--optimization-level, or keep modules.",
            code="parity_failed",
        )
    return proof


def choose_target(
    target: Target, capabilities: Sequence[str] = ()
) -> tuple[Literal["tensorrt", "tensorrt-rtx", "onnxruntime"], str]:
    """Return the target and why it is taken.

    Raises:
        DeviceError: a target was asked for that this machine cannot build for.
    """
    if target == "onnxruntime":
        return target, "the converted graph is the model, and ONNX Runtime optimizes it for the machine that loads it."
    if target != "auto":
        reason = unavailable_reason(target)
        if reason is None and target == "tensorrt-rtx" and not capabilities and not cuda_devices():
            reason = "Without a GPU, --target tensorrt-rtx needs --compute-capability, as 8.6 8.9."
        if reason:
            raise DeviceError(reason, code="target_unavailable")
        return target, "as asked for."
    reason = unavailable_reason("tensorrt")
    if reason is None:
        return "tensorrt", "TensorRT and a GPU are here."
    if capabilities:
        rtx = unavailable_reason("tensorrt-rtx")
        if rtx is None:
            return "tensorrt-rtx", "compute capabilities were named, and TensorRT-RTX builds for them without a GPU."
        reason = rtx
    return "onnxruntime", f"no engine can be built here ({reason.rstrip('.')})."


def _check_extractor(request: BuildRequest) -> None:
    """Raise GroundingError if options do not apply to a feature extractor."""
    name = request.model.name
    if request.precision not in FEATURE_TOLERANCES:
        raise GroundingError(
            f"{name} is a feature extractor, which is built in {', '.join(FEATURE_TOLERANCES)}. {request.precision} "
            "needs ranges, which are measured on queries.",
            code="precision_unsupported",
        )
    others = [f"--{name.replace('_', '-')}" for name in request.given() if name not in OF_EXTRACTORS]
    if others:
        raise GroundingError(
            f"{', '.join(others)} applies to DRN models only, and {name} is a feature extractor. Remove the option.",
            code="inapplicable_option",
        )
