"""Define the configuration of one build: its files and target, and the errors that are known before any work."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from calib.calibration_set import MIN_SAMPLES
from calib.graph.onnx_graph import read_extractor, read_source
from calib.graph.split_model import pair_paths
from calib.range_estimation import MethodOption
from export.build.reduced_precision import Precision
from export.engine.builder import BuildOptions, check_options
from export.engine.engine_part import short_query_engine_path
from export.engine.profiles import (
    DEFAULT_BATCH,
    DEFAULT_CACHED_VIDEOS,
    Profile,
    SizeRange,
    Unrolling,
    check_ranges,
    profiles,
)
from runtime.artifacts import engine_metadata
from runtime.artifacts.engine_layers import layers_path
from runtime.backends.base import MAX_THREADS
from runtime.core.errors import DeviceError, GroundingError, ModelFileError, OutputError, ShapeError
from runtime.core.io.atomic_files import check_writable
from runtime.core.io.digests import sha256
from runtime.core.io.input_files import check_file
from runtime.core.terminal import command_line

if TYPE_CHECKING:
    import onnx

    from runtime.artifacts.manifest import Manifest

log = logging.getLogger("drn")

SUFFIXES = (".pth", ".pt", ".onnx", ".tar", ".pickle")


Target = Literal["auto", "tensorrt", "tensorrt-rtx", "onnxruntime"]
# Named in the command that reproduces a build even if they are the defaults, which may change.
ALWAYS_NAMED = ("precision", "target", "max_drop")


@dataclasses.dataclass(frozen=True)
class BuildRequest:
    """The options of `python -m export.build_engine`, which documents each."""

    model: Path
    precision: Precision = "fp16"
    target: Target = "auto"
    data: Path | None = None
    output: Path | None = None
    vocabulary: Path | None = None
    batch: tuple[int, int, int] = DEFAULT_BATCH
    query_length: tuple[int, int, int] | None = None
    table: Path | None = None
    plan: Path | None = None
    keep: tuple[str, ...] = ()
    calib_samples: int = 512
    calib_method: MethodOption = "auto"
    max_drop: float = 0.2
    split: bool = False
    videos: int = DEFAULT_CACHED_VIDEOS
    unroll: tuple[int, ...] = ()
    parity_split: str = "test"
    limit: int | None = None
    profiles: Literal[1, 2] = 2
    optimization_level: int | None = None
    workspace: float | None = None
    timing_cache: Path | None = None
    version_compatible: bool = False
    hardware_compatible: bool = False
    tf32: bool = False
    compute_capability: tuple[str, ...] = ()
    threads: int | None = None
    dry_run: bool = False

    def given(self) -> dict[str, Any]:
        """Return the options that are not the default, by name."""
        values = ((field, getattr(self, field.name)) for field in dataclasses.fields(self))
        return {field.name: value for field, value in values if value != field.default}

    def command(self) -> str:
        """Return the command that builds the same again."""
        given = self.given()
        names = [field.name for field in dataclasses.fields(self) if field.name != "dry_run"]
        named = {name: getattr(self, name) for name in names if name in given or name in ALWAYS_NAMED}
        return command_line("export.build_engine", named)

    def check(self) -> None:
        """Raise what can be known to be wrong with the options alone, before any work is done."""
        quantizes = self.precision in ("int8", "fp8")
        if quantizes and self.data is None and self.table is None:
            raise GroundingError(
                f"{self.precision} needs ranges: pass --data DIR to calibrate on, or --table FILE.",
                code="missing_option",
            )
        if (self.table or self.plan) and not quantizes:
            raise GroundingError(
                f"--table and --plan are for int8 and fp8, and {self.precision} was asked for.",
                code="inapplicable_option",
            )
        for flag, path in (("--table", self.table), ("--plan", self.plan)):
            if path:
                check_file(path, f"The file of {flag},", GroundingError)
        if self.plan and not self.table:
            raise GroundingError(
                "--plan is valid for one calibration table only. Give that with --table.", code="missing_option"
            )
        if self.precision == "fp32" and self.keep:
            raise GroundingError(
                "--keep names modules for a higher precision than fp32, and there is none.", code="inapplicable_option"
            )
        self._check_numbers()

    def _check_numbers(self) -> None:
        for flag, number in (("--limit", self.limit), ("--videos", self.videos)):
            if number is not None and number < 1:
                raise GroundingError(f"{flag} must be at least 1, and {number} was given.", code="invalid_option")
        if self.threads is not None and not 1 <= self.threads <= MAX_THREADS:
            raise DeviceError(
                f"--threads must be 1 to {MAX_THREADS}, and {self.threads} was given.", code="invalid_option"
            )
        if self.precision in ("int8", "fp8") and self.table is None and self.calib_samples < MIN_SAMPLES:
            raise GroundingError(
                f"--calib-samples {self.calib_samples} was given and at least {MIN_SAMPLES} are needed: single "
                "videos would set the ranges; 512 is a good number.",
                code="too_few_samples",
            )
        # `not >=` also refuses NaN.
        if not self.max_drop >= 0:
            raise GroundingError(
                f"Expected --max-drop of at least 0 points, got {self.max_drop}. Correct the option.",
                code="invalid_option",
            )


@dataclasses.dataclass(frozen=True)
class BuildConfig:
    """The files of one build."""

    model: Path
    precision: Precision
    target: Literal["tensorrt", "tensorrt-rtx", "onnxruntime"]
    data: Path | None
    requested_output: Path | None
    split: bool = False
    unroll: tuple[int, ...] = ()

    @property
    def stem(self) -> Path:
        """MODEL without what says its format, as runs/drn for runs/drn.pt and published.pth.tar."""
        name = self.model.name
        for suffix in (".pth.tar", *SUFFIXES):
            name = name.removesuffix(suffix)
        return self.model.with_name(name)

    @property
    def output(self) -> Path:
        """Return the file to run: for a split model the query part."""
        if self.requested_output:
            return self.requested_output
        suffix = "onnx" if self.target == "onnxruntime" else "engine"
        part = "query." if self.split else ""
        return self.stem.with_name(f"{self.stem.name}.{self.precision}.{part}{suffix}")

    @property
    def graph_path(self) -> Path:
        """The whole graph in the precision asked for."""
        if self.target == "onnxruntime" and not self.split:
            return self.output
        stem = self.output.with_suffix("")
        if self.split:
            # The pair takes its names from the whole.
            return stem.with_name(f"{stem.name.removesuffix('.query')}.onnx")
        if not stem.name.endswith(f".{self.precision}"):
            stem = stem.with_name(f"{stem.name}.{self.precision}")
        return stem.with_name(f"{stem.name}.onnx")

    @property
    def sidecar(self) -> Path:
        return engine_metadata.metadata_path(self.output)

    @property
    def unrolled(self) -> list[Path]:
        """Engines for short queries."""
        return [short_query_engine_path(self.output, steps) for steps in self.unroll]

    @property
    def kind(self) -> Literal["onnx", "checkpoint", "published"]:
        name = self.model.name
        if name.endswith(".onnx"):
            return "onnx"
        return "checkpoint" if name.endswith(".pt") else "published"

    def sibling_path(self, ending: str) -> Path:
        """Return the path of a file that goes with the output, as drn.int8.plan.json."""
        stem = self.graph_path.with_suffix("")
        return stem.with_name(f"{stem.name}.{ending}")

    def rejected(self, suffix: str) -> Path:
        """Return where what breaks its promise is kept."""
        return self.sibling_path(f"rejected.{suffix}")

    def check(self, request: BuildRequest) -> None:
        """Raise what can be known to be wrong before any work is done."""
        check_file(self.model, "The model file", ModelFileError)
        self._check_names()
        if self.target == "onnxruntime" and self.precision == "bf16":
            raise DeviceError(
                "ONNX Runtime has no bf16 kernels, so it could not open what was built; take --precision fp16, or "
                "build an engine with --target tensorrt or tensorrt-rtx.",
                code="precision_unsupported",
            )
        request.check()
        self.check_outputs(request.table, request.plan)
        self._check_sources()

    def _check_names(self) -> None:
        """Raise ModelFileError or OutputError if the model or the output has a name that a build cannot use."""
        if not self.model.name.endswith(SUFFIXES):
            raise ModelFileError(
                f"{self.model.name} should end in .onnx, .pt, .pth, .pth.tar or .pickle.", code="wrong_suffix"
            )
        suffix = ".onnx" if self.target == "onnxruntime" else ".engine"
        if self.output.suffix != suffix:
            raise OutputError(
                f"--output {self.output} should end in {suffix} for the target {self.target}.", code="wrong_suffix"
            )
        if self.split and not self.output.name.endswith(f".query{suffix}"):
            raise OutputError(
                f"--output {self.output} names the query part of the pair that --split makes, and should end in "
                f".query{suffix}.",
                code="wrong_suffix",
            )
        if self.model.resolve() in (self.output.resolve(), self.graph_path.resolve()):
            raise OutputError(
                f"{self.model} would be overwritten by its own {self.precision} form; choose another --output.",
                code="output_is_input",
            )

    def check_outputs(self, table: Path | None, plan: Path | None, timing_cache: Path | None = None) -> None:
        """Raise OutputError where a file of the build cannot be written, or would replace one that it reads."""
        # Ranges and a plan that are given are not written again; they may be an earlier build's of the same name.
        endings = ["parity.json", "passport.html"]
        endings += [] if table else ["calibration.json"]
        endings += [] if plan else ["plan.json"]
        reports = (self.sibling_path(ending) for ending in endings)
        pair = pair_paths(self.graph_path) if self.split else ()
        shorter = [path for plan in self.unrolled for path in (plan, engine_metadata.metadata_path(plan))]
        engines = (self.output, *self.unrolled) if self.target != "onnxruntime" else ()
        layers = [layers_path(engine) for engine in engines]
        written = list(dict.fromkeys((self.output, self.graph_path, self.sidecar, *pair, *shorter, *layers, *reports)))
        for path in written:
            check_writable(path, self.model, table, plan, timing_cache, *(other for other in {*written} - {path}))

    def _check_sources(self) -> None:
        """Raise OutputError where exporting MODEL would write over a file that is not known to come from it."""
        if self.kind == "published":
            for created in (self.checkpoint, self.source):
                if created.exists():
                    raise OutputError(
                        f"{created} is there already, and {self.model.name} would be converted to it; give it as "
                        "--model, or move it away.",
                        code="output_exists",
                    )
        if self.kind == "checkpoint" and self.source.exists() and not self.is_exported:
            raise OutputError(
                f"{self.source} is there already and was not exported from this {self.model.name}; give it as --model, "
                "or move it away.",
                code="output_exists",
            )

    @property
    def checkpoint(self) -> Path:
        """The drn.pt that MODEL is, or is converted to."""
        return self.model if self.kind == "checkpoint" else self.stem.with_name(f"{self.stem.name}.pt")

    @property
    def source(self) -> Path:
        """The FP32 graph that MODEL is, or is exported to."""
        return self.model if self.kind == "onnx" else self.stem.with_name(f"{self.stem.name}.onnx")

    @property
    def is_exported(self) -> bool:
        """Return whether the FP32 graph next to a checkpoint was exported from that file."""
        for read in (read_source, read_extractor):
            with contextlib.suppress(GroundingError):
                return sha256(self.checkpoint) in read(self.source)[1].sources.values()
        return False

    def check_options(self, options: BuildOptions, timing_cache: Path | None, why: str, profiles: int = 2) -> None:
        """Raise what the library of the target, or the GPU, cannot do; also before any work."""
        if self.target == "onnxruntime":
            flags = {
                "--optimization-level": options.optimization_level,
                "--workspace": options.workspace_gib,
                "--timing-cache": timing_cache,
                "--version-compatible": options.version_compatible,
                "--hardware-compatible": options.hardware_compatible,
                "--compute-capability": options.compute_capabilities,
                "--unroll": self.unroll,
                "--profiles": () if profiles == 2 else (profiles,),
            }
            given = [flag for flag, value in flags.items() if value not in (None, False, ())]
            if given:
                raise GroundingError(
                    f"{', '.join(given)}: of engines, and the target is onnxruntime ({why.rstrip('.')}); leave it out, "
                    "or name a --target that builds one.",
                    code="inapplicable_option",
                )
            return
        if timing_cache and self.target == "tensorrt-rtx":
            raise GroundingError(
                "--timing-cache is TensorRT's; TensorRT-RTX chooses kernels where it runs. Leave it out.",
                code="inapplicable_option",
            )
        check_writable(timing_cache, self.model, self.output, self.graph_path, *self.unrolled)
        check_options(options)

    def early_profiles(
        self, batch: SizeRange, query_length: SizeRange | None, keep: Sequence[str] = ()
    ) -> tuple[list[Profile], Manifest] | None:
        """Return the optimization profiles, and the manifest that they follow from; None where both are known only
        after a published file is converted.

        Raises:
            ShapeError: a range does not rise, or there is no module of a name to keep.
        """
        check_ranges(batch, query_length)
        if self.kind == "published":
            return None
        if self.kind == "onnx":
            graph, manifest = read_source(self.model)
            validate_keep_modules(graph, self.precision, keep)
            return profiles(batch, query_length, manifest), manifest
        from train.checkpoints import load_checkpoint

        checkpoint = load_checkpoint(self.model)
        longest = max(query_length[2] if query_length else 0, checkpoint.longest_query)
        manifest = checkpoint.manifest(longest)
        return profiles(batch, query_length, manifest), manifest

    def describe(
        self,
        why: str,
        shapes: Sequence[Profile] | None,
        options: BuildOptions,
        samples: int | None,
        proof: str = "the precision alone (no --data for parity)",
        unrolling: Unrolling | None = None,
    ) -> str:
        """Return what a build would do, for --dry-run; `proof` is what it comes to without --data."""
        lines = [
            f"model      {self.model} ({self.kind})",
            f"precision  {self.precision}",
            f"target     {self.target}: {why}",
        ]
        if self.precision in ("int8", "fp8"):
            message = f"{samples} training queries of {self.data}" if samples else "by the table given"
            lines.append(f"ranges     {message}")
        lines.append(f"twin       {self.graph_path}")
        if self.split:
            lines.append(f"pair       {', '.join(map(str, pair_paths(self.graph_path)))}")
        if self.target != "onnxruntime":
            lines += [f"engine     {self.output}", f"sidecar    {self.sidecar}"]
            lines += [f"unrolled   {plan}" for plan in self.unrolled]
            lines += [f"lengths    {unrolling.reason}"] if unrolling else []
        if options.compute_capabilities:
            lines.append(f"for        compute capability {', '.join(options.compute_capabilities)}")
        if shapes is None:
            lines.append("profiles   known once the checkpoint is converted")
        for profile in shapes or ():
            lines.append(f"profile    {profile.name}: smallest, best, largest")
            lines += [f"  {name:<17}{' '.join(map(str, trio))}" for name, trio in profile.shapes.items()]
        if self.target == "onnxruntime" and shapes:
            lines.append("           (of an engine; ONNX Runtime takes any batch)")
        if self.data:
            lines += [
                f"proof      parity with FP32 on {self.data}",
                f"reports    {self.sibling_path('parity.json')}, {self.sibling_path('passport.html')}",
            ]
        else:
            lines.append(f"proof      {proof}")
        return "\n".join(lines)


def ensure_source_graph(job: BuildConfig, vocabulary: Path | None, longest: int) -> Path:
    """Return the FP32 graph, exporting and converting first where MODEL is a checkpoint.

    It takes queries of `longest` tokens, and of those that its data set has.
    """
    if job.kind == "onnx":
        return job.model
    if job.kind == "published":
        from train.convert import convert

        convert(job.model, job.checkpoint, vocabulary)
    from train.checkpoints import load_checkpoint

    longest = max(longest, load_checkpoint(job.checkpoint).longest_query)
    if fits(job.source, longest):
        log.info("%s was exported from this %s already.", job.source, job.checkpoint.name)
        return job.source
    from export.tracing.checkpoint_to_onnx import ExportOptions, export_checkpoint

    return export_checkpoint(ExportOptions(job.checkpoint, job.source, max_query_length=longest))


def fits(source: Path, longest: int) -> bool:
    """Return whether an exported graph is there that takes queries of `longest` tokens."""
    return source.exists() and read_source(source)[1].max_query_length >= longest


def known_graph(job: BuildConfig, longest: int) -> onnx.ModelProto | None:
    """Return the FP32 graph of `ensure_source_graph` if it exists before any work; else None."""
    if job.kind == "published":
        return None
    if job.kind == "checkpoint":
        from train.checkpoints import load_checkpoint

        if not fits(job.source, max(longest, load_checkpoint(job.checkpoint).longest_query)):
            return None
    return read_source(job.source)[0]


def validate_keep_modules(graph: onnx.ModelProto, precision: str, keep: Sequence[str]) -> None:
    """Raise what a build would raise for modules to keep that a graph has not."""
    if not keep:
        return
    if precision in ("int8", "fp8"):
        from calib.qdq_quantizer import QuantizationPolicy, find_quantizable_ops

        find_quantizable_ops(graph, QuantizationPolicy(keep=tuple(keep)), "fp8" if precision == "fp8" else "int8")
        return
    from calib.graph.half_precision import modules

    unknown = set(keep) - modules(graph)
    if unknown:
        raise ShapeError(
            f"There is no module {', '.join(sorted(unknown))}; this graph has {', '.join(sorted(modules(graph)))}.",
            code="unknown_module",
        )
