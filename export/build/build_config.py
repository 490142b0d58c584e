"""Define the options and files of one build, and check them before any work."""

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
from export.build.reduced_precision import Precision, validate_keep_modules
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
from runtime.artifacts.manifest import LIBRARIES, Library
from runtime.backends.base import MAX_THREADS
from runtime.core.errors import DeviceError, GroundingError, ModelFileError, OutputError, check_option
from runtime.core.io.atomic_files import check_writable
from runtime.core.io.digests import sha256
from runtime.core.io.input_files import check_file, is_same_file
from runtime.core.terminal import command_line

if TYPE_CHECKING:
    import onnx

    from runtime.artifacts.manifest import Manifest

log = logging.getLogger("drn")

SUFFIXES = (".pth", ".pt", ".onnx", ".tar", ".pickle")
# Default of --min-speedup for int8 and fp8, which cost accuracy.
MIN_SPEEDUP = 1.05
Target = Literal["auto", "tensorrt", "tensorrt-rtx", "onnxruntime", "openvino"]
ResolvedTarget = Literal["tensorrt", "tensorrt-rtx", "onnxruntime", "openvino"]
# OpenVINO computes FP16 in FP32 on a CPU, and BF16 too unless the CPU has BF16 instructions.
UNSUPPORTED = {"onnxruntime": ("bf16",), "openvino": ("fp16", "bf16", "fp8")}
# Options that a recorded command contains even if they have their default, which may change.
ALWAYS_RECORDED = ("precision", "target", "max_drop")


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
    calib_videos: tuple[Path, ...] = ()
    max_drop: float = 0.2
    min_speedup: float | None = None
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

    @property
    def required_speed(self) -> float:
        """Return `--min-speedup` or its default for the precision; 0 if the speed is not measured."""
        if self.min_speedup is not None:
            return self.min_speedup
        return MIN_SPEEDUP if self.precision in ("int8", "fp8") else 0.0

    def given(self) -> dict[str, Any]:
        """Return the options that differ from their default, by name."""
        values = ((field, getattr(self, field.name)) for field in dataclasses.fields(self))
        return {field.name: value for field, value in values if value != field.default}

    def command(self) -> str:
        """Return the command line that reproduces the build."""
        recorded = {*self.given(), *ALWAYS_RECORDED} - {"dry_run"}
        names = (field.name for field in dataclasses.fields(self))
        return command_line("export.build_engine", {name: getattr(self, name) for name in names if name in recorded})

    def check(self) -> None:
        """Check the options, without the files of the model.

        Raises:
            GroundingError: an option is invalid, missing or inapplicable, or a library that it needs is not installed.
        """
        quantizes = self.precision in ("int8", "fp8")
        if quantizes and self.data is None and self.table is None and not self.calib_videos:
            raise GroundingError(
                f"--precision {self.precision} needs calibration data. Add --data DIR, or --table FILE.",
                code="missing_option",
            )
        if (self.table or self.plan) and not quantizes:
            raise GroundingError(
                f"--table and --plan apply to int8 and fp8 only, got --precision {self.precision}. Remove the option.",
                code="inapplicable_option",
            )
        for flag, path in (("--table", self.table), ("--plan", self.plan)):
            if path:
                check_file(path, f"The file of {flag},", GroundingError)
        if self.plan and not self.table:
            raise GroundingError(
                "--plan needs the calibration table it was made with. Add --table FILE.", code="missing_option"
            )
        if self.precision == "fp32" and self.keep:
            raise GroundingError(
                "--keep does not apply to --precision fp32, the highest precision. Remove the option.",
                code="inapplicable_option",
            )
        if self.data:
            from export.parity.html_report import require_jinja

            require_jinja()
        self._check_numbers()

    def _check_numbers(self) -> None:
        check_option("--threads", self.threads, 1, MAX_THREADS, DeviceError)
        if self.precision in ("int8", "fp8") and self.table is None and self.calib_samples < MIN_SAMPLES:
            raise GroundingError(
                f"Expected --calib-samples of at least {MIN_SAMPLES}, got {self.calib_samples}. "
                "Choose more; the default is 512.",
                code="too_few_samples",
            )
        check_option("--limit", self.limit, 1)
        check_option("--videos", self.videos, 1)
        check_option("--max-drop", self.max_drop, 0)
        check_option("--min-speedup", self.min_speedup, 0)


@dataclasses.dataclass(frozen=True)
class BuildConfig:
    """The model, precision and target of one build, and the files that follow from them.

    Attributes:
        model: checkpoint or FP32 graph.
        precision: precision of the converted graph.
        target: runtime of the engine.
        data: directory of the data set.
        requested_output: value of `--output`; None for the default path.
        split: also split the model.
        unroll: query lengths of the engines for short queries.
    """

    model: Path
    precision: Precision
    target: ResolvedTarget
    data: Path | None
    requested_output: Path | None
    split: bool = False
    unroll: tuple[int, ...] = ()

    @property
    def library(self) -> Library | None:
        """Return the library that runs the graph on a CPU; None for an engine."""
        return next((library for library in LIBRARIES if library == self.target), None)

    @property
    def stem(self) -> Path:
        """Return the path of the model without its suffixes, as runs/drn for runs/drn.pt."""
        name = self.model.name
        for suffix in (".pth.tar", *SUFFIXES):
            name = name.removesuffix(suffix)
        return self.model.with_name(name)

    @property
    def output(self) -> Path:
        """Return the file to run; for a split model this is the query part."""
        if self.requested_output:
            return self.requested_output
        suffix = "onnx" if self.library else "engine"
        library = "openvino." if self.target == "openvino" else ""
        part = "query." if self.split else ""
        return self.stem.with_name(f"{self.stem.name}.{self.precision}.{library}{part}{suffix}")

    @property
    def graph_path(self) -> Path:
        """Return the path of the full graph in the requested precision."""
        if self.library and not self.split:
            return self.output
        stem = self.output.with_suffix("")
        if self.split:
            # The names of the parts derive from that of the full graph.
            return stem.with_name(f"{stem.name.removesuffix('.query')}.onnx")
        if not stem.name.endswith(f".{self.precision}"):
            stem = stem.with_name(f"{stem.name}.{self.precision}")
        return stem.with_name(f"{stem.name}.onnx")

    @property
    def unrolled(self) -> list[Path]:
        """Return the paths of the engines for short queries."""
        return [short_query_engine_path(self.output, steps) for steps in self.unroll]

    @property
    def kind(self) -> Literal["onnx", "checkpoint", "published"]:
        """Return the kind of the model file."""
        name = self.model.name
        if name.endswith(".onnx"):
            return "onnx"
        return "checkpoint" if name.endswith(".pt") else "published"

    def sibling_path(self, ending: str) -> Path:
        """Return the path of another file of the build, as drn.int8.plan.json."""
        stem = self.graph_path.with_suffix("")
        return stem.with_name(f"{stem.name}.{ending}")

    def rejected_path(self, suffix: str) -> Path:
        """Return the path of a model that failed its check."""
        return self.sibling_path(f"rejected.{suffix}")

    def check(self, request: BuildRequest) -> None:
        """Check files and options before any work.

        Raises:
            GroundingError: the model cannot be built with these options, or a file cannot be written.
        """
        check_file(self.model, "The model file", ModelFileError)
        self._check_names()
        if self.precision in UNSUPPORTED.get(self.target, ()):
            raise DeviceError(
                f"--target {self.target} has no {self.precision} kernels. Choose another --precision or --target.",
                code="precision_unsupported",
            )
        request.check()
        self.check_outputs(request.table, request.plan)
        self._check_sources()

    def _check_names(self) -> None:
        """Raise ModelFileError or OutputError for a wrong suffix, or if the output would replace the model."""
        if not self.model.name.endswith(SUFFIXES):
            raise ModelFileError(
                f"Expected a model with the suffix .onnx, .pt, .pth, .pth.tar or .pickle, got {self.model.name}. "
                "Choose another --model.",
                code="wrong_suffix",
            )
        suffix = ".onnx" if self.library else ".engine"
        if self.output.suffix != suffix:
            raise OutputError(
                f"Expected --output with the suffix {suffix} for --target {self.target}, got {self.output}. "
                "Choose another name.",
                code="wrong_suffix",
            )
        if self.split and not self.output.name.endswith(f".query{suffix}"):
            raise OutputError(
                f"Expected --output with the suffix .query{suffix} for --split, got {self.output}. "
                "Choose another name.",
                code="wrong_suffix",
            )
        if is_same_file(self.model, self.output, self.graph_path):
            raise OutputError(
                f"The output in {self.precision} would replace {self.model}. Choose another --output.",
                code="output_is_input",
            )

    def check_outputs(self, table: Path | None, plan: Path | None, timing_cache: Path | None = None) -> None:
        """Raise OutputError if a file of the build cannot be written, or would replace one that it reads."""
        # A given table or plan is not written again, so it may have the name of an output.
        endings = ["parity.json", "passport.html"]
        endings += [] if table else ["calibration.json"]
        endings += [] if plan else ["plan.json"]
        reports = (self.sibling_path(ending) for ending in endings)
        pair = pair_paths(self.graph_path) if self.split else ()
        shorter = [path for plan in self.unrolled for path in (plan, engine_metadata.metadata_path(plan))]
        engines = () if self.library else (self.output, *self.unrolled)
        layers = [layers_path(engine) for engine in engines]
        first = (self.output, self.graph_path, engine_metadata.metadata_path(self.output))
        written = list(dict.fromkeys((*first, *pair, *shorter, *layers, *reports)))
        for path in written:
            check_writable(path, self.model, table, plan, timing_cache, *({*written} - {path}))

    def _check_sources(self) -> None:
        """Raise OutputError if exporting the model would replace a file that does not come from it."""
        replaced: list[Path] = []
        if self.kind == "published":
            replaced = [path for path in (self.checkpoint, self.source) if path.exists()]
        elif self.kind == "checkpoint" and self.source.exists() and not self.is_exported:
            replaced = [self.source]
        if replaced:
            raise OutputError(
                f"The export of {self.model.name} would replace {replaced[0]}. Give that file as --model, or move it.",
                code="output_exists",
            )

    @property
    def checkpoint(self) -> Path:
        """Return the path of the checkpoint: the model, or the file that a published model is converted to."""
        return self.model if self.kind == "checkpoint" else self.stem.with_name(f"{self.stem.name}.pt")

    @property
    def source(self) -> Path:
        """Return the path of the FP32 graph: the model, or the file that a checkpoint is exported to."""
        return self.model if self.kind == "onnx" else self.stem.with_name(f"{self.stem.name}.onnx")

    @property
    def is_exported(self) -> bool:
        """Return whether the FP32 graph was exported from the checkpoint."""
        for read in (read_source, read_extractor):
            with contextlib.suppress(GroundingError):
                return sha256(self.checkpoint) in read(self.source)[1].sources.values()
        return False

    def check_options(self, options: BuildOptions, timing_cache: Path | None, reason: str, profiles: int = 2) -> None:
        """Raise GroundingError for options that the target, its library or the GPU does not support.

        Args:
            reason: why the target was chosen, as a sentence.
        """
        if self.library:
            flags = {
                "--optimization-level": options.optimization_level,
                "--workspace": options.workspace_gib,
                "--timing-cache": timing_cache,
                "--version-compatible": options.version_compatible,
                "--hardware-compatible": options.hardware_compatible,
                "--compute-capability": options.compute_capabilities,
                "--unroll": self.unroll,
                "--profiles": () if profiles == 2 else (profiles,),
                # ONNX Runtime computes with TF32 on a GPU.
                "--tf32": options.tf32 and self.target == "openvino",
            }
            given = [flag for flag, value in flags.items() if value not in (None, False, ())]
            if given:
                raise GroundingError(
                    f"{', '.join(given)} does not apply to the target {self.target} ({reason.rstrip('.')}). Remove the "
                    "option, or choose another --target.",
                    code="inapplicable_option",
                )
            return
        if timing_cache and self.target == "tensorrt-rtx":
            raise GroundingError(
                "TensorRT-RTX has no timing cache, because it chooses kernels at run time. Remove --timing-cache.",
                code="inapplicable_option",
            )
        check_writable(timing_cache, self.model, self.output, self.graph_path, *self.unrolled)
        check_options(options)

    def early_profiles(
        self, batch: SizeRange, query_length: SizeRange | None, keep: Sequence[str] = ()
    ) -> tuple[list[Profile], Manifest] | None:
        """Return the optimization profiles and the manifest of the model; None for a published model.

        A published model has a manifest only after its conversion.

        Raises:
            ShapeError: a range is invalid, or a module of `keep` does not exist.
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
        reason: str,
        shapes: Sequence[Profile] | None,
        options: BuildOptions,
        samples: int | None,
        check: str = "precision only (no --data)",
        unrolling: Unrolling | None = None,
    ) -> str:
        """Return the plan of a build as text, for --dry-run.

        Args:
            reason: why the target was chosen, as a sentence.
            shapes: optimization profiles; None if they are not known yet.
            samples: number of calibration queries; None with --table.
            check: checks to print if there is no --data, in place of the parity with FP32.
        """
        lines = [
            f"model      {self.model} ({self.kind})",
            f"precision  {self.precision}",
            f"target     {self.target}: {reason}",
        ]
        if self.precision in ("int8", "fp8"):
            lines.append(f"ranges     {f'{samples} training queries of {self.data}' if samples else '--table'}")
        lines.append(f"graph      {self.graph_path}")
        lines += [f"parts      {', '.join(map(str, pair_paths(self.graph_path)))}"] if self.split else []
        if not self.library:
            lines += [f"engine     {self.output}", f"metadata   {engine_metadata.metadata_path(self.output)}"]
            lines += [f"unrolled   {plan}" for plan in self.unrolled]
            lines += [f"lengths    {unrolling.reason}"] if unrolling else []
        gpus = ", ".join(options.compute_capabilities)
        lines += [f"GPUs       compute capability {gpus}"] if gpus else []
        lines += [] if shapes is not None else ["profiles   known after the conversion of the checkpoint"]
        for profile in shapes or ():
            lines.append(f"profile    {profile.name}: min, opt, max")
            lines += [f"  {name:<17}{' '.join(map(str, sizes))}" for name, sizes in profile.shapes.items()]
        if self.library and shapes:
            lines.append("           (for engines; a graph accepts any batch size)")
        if self.data:
            lines += [
                f"check      parity with FP32 on {self.data}",
                f"reports    {self.sibling_path('parity.json')}, {self.sibling_path('passport.html')}",
            ]
        else:
            lines.append(f"check      {check}")
        return "\n".join(lines)


def ensure_source_graph(job: BuildConfig, vocabulary: Path | None, longest: int) -> Path:
    """Return the path of the FP32 graph, after exporting the model if it is a checkpoint.

    Args:
        vocabulary: word table of a published checkpoint.
        longest: query length that the graph must accept, in tokens.

    Raises:
        GroundingError: the model cannot be read, converted or exported.
    """
    if job.kind == "onnx":
        return job.model
    if job.kind == "published":
        from train.convert import convert

        convert(job.model, job.checkpoint, vocabulary)
    from train.checkpoints import load_checkpoint

    longest = max(longest, load_checkpoint(job.checkpoint).longest_query)
    if accepts_queries(job.source, longest):
        log.info("Using %s, which was exported from %s.", job.source, job.checkpoint.name)
        return job.source
    from export.tracing.checkpoint_to_onnx import ExportOptions, export_checkpoint

    return export_checkpoint(ExportOptions(job.checkpoint, job.source, max_query_length=longest))


def accepts_queries(source: Path, longest: int) -> bool:
    """Return whether an exported graph exists and accepts queries of `longest` tokens."""
    return source.exists() and read_source(source)[1].max_query_length >= longest


def known_graph(job: BuildConfig, longest: int) -> onnx.ModelProto | None:
    """Return the FP32 graph of `ensure_source_graph` if it exists without an export; else None."""
    if job.kind == "published":
        return None
    if job.kind == "checkpoint":
        from train.checkpoints import load_checkpoint

        if not accepts_queries(job.source, max(longest, load_checkpoint(job.checkpoint).longest_query)):
            return None
    return read_source(job.source)[0]
