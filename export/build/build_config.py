"""Define the configuration of one build: its files and target, and the errors that are known before any work."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from calib.calibration_set import LEAST_SAMPLES
from calib.graph.onnx_graph import read_extractor, read_source
from calib.graph.split_model import pair_paths
from export.build.reduced_precision import Precision
from export.engine.builder import BuildOptions, check_options
from export.engine.engine_part import short_query_engine_path
from export.engine.profiles import Profile, SizeRange, Unrolling, check_ranges, profiles
from runtime.artifacts import engine_metadata
from runtime.artifacts.engine_layers import layers_path
from runtime.backends.base import MAX_THREADS
from runtime.core.errors import DeviceError, GroundingError, ModelFileError, OutputError, ShapeError
from runtime.core.io.atomic_files import check_writable
from runtime.core.io.digests import sha256
from runtime.core.io.input_files import check_file

if TYPE_CHECKING:
    import onnx

    from runtime.artifacts.manifest import Manifest

log = logging.getLogger("drn")

SUFFIXES = (".pth", ".pt", ".onnx", ".tar", ".pickle")


@dataclasses.dataclass(frozen=True)
class BuildConfig:
    """The files of one build."""

    model: Path
    precision: Precision
    target: Literal["tensorrt", "tensorrt-rtx", "onnxruntime"]
    data: Path | None
    given_output: Path | None
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
        if self.given_output:
            return self.given_output
        suffix = "onnx" if self.target == "onnxruntime" else "engine"
        part = "query." if self.split else ""
        return self.stem.with_name(f"{self.stem.name}.{self.precision}.{part}{suffix}")

    @property
    def twin(self) -> Path:
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

    def beside(self, ending: str) -> Path:
        """Return the path of a file that goes with the output, as drn.int8.plan.json."""
        stem = self.twin.with_suffix("")
        return stem.with_name(f"{stem.name}.{ending}")

    def rejected(self, suffix: str) -> Path:
        """Return where what breaks its promise is kept."""
        return self.beside(f"rejected.{suffix}")

    def check(
        self,
        table: Path | None,
        plan: Path | None,
        limit: int | None,
        keep: Sequence[str],
        max_drop: float,
        samples: int,
        threads: int | None,
    ) -> None:
        """Raise what can be known to be wrong before any work is done."""
        check_file(self.model, "The model file", ModelFileError)
        if not self.model.name.endswith(SUFFIXES):
            raise ModelFileError(
                f"{self.model.name} should end in .onnx, .pt, .pth, .pth.tar or .pickle.", code="wrong_suffix"
            )
        if self.output.suffix != (".onnx" if self.target == "onnxruntime" else ".engine"):
            raise OutputError(
                f"--output {self.output} should end in {'.onnx' if self.target == 'onnxruntime' else '.engine'} "
                f"for the target {self.target}.",
                code="wrong_suffix",
            )
        if self.split and not self.output.name.endswith((".query.onnx", ".query.engine")):
            raise OutputError(
                f"--output {self.output} names the query part of the pair that --split makes, and should end in "
                f".query{self.output.suffix}.",
                code="wrong_suffix",
            )
        if self.model.resolve() in (self.output.resolve(), self.twin.resolve()):
            raise OutputError(
                f"{self.model} would be overwritten by its own {self.precision} form; choose another --output.",
                code="output_is_input",
            )
        if self.target == "onnxruntime" and self.precision == "bf16":
            raise DeviceError(
                "ONNX Runtime has no bf16 kernels, so it could not open what was built; take --precision fp16, or "
                "build an engine with --target tensorrt or tensorrt-rtx.",
                code="precision_unsupported",
            )
        narrow = self.precision in ("int8", "fp8")
        if narrow and self.data is None and table is None:
            raise GroundingError(
                f"{self.precision} needs ranges: pass --data DIR to calibrate on, or --table FILE.",
                code="missing_option",
            )
        if (table or plan) and not narrow:
            raise GroundingError(
                f"--table and --plan are for int8 and fp8, and {self.precision} was asked for.",
                code="inapplicable_option",
            )
        for flag, given in (("--table", table), ("--plan", plan)):
            if given:
                check_file(given, f"The file of {flag},", GroundingError)
        if plan and not table:
            raise GroundingError(
                "--plan was found with one calibration table and holds for it alone; give that with --table.",
                code="missing_option",
            )
        if self.precision == "fp32" and keep:
            raise GroundingError(
                "--keep names modules for a higher precision than fp32, and there is none.", code="inapplicable_option"
            )
        if limit is not None and limit < 1:
            raise GroundingError(f"--limit must be at least 1, and {limit} was given.", code="invalid_option")
        if threads is not None and not 1 <= threads <= MAX_THREADS:
            raise DeviceError(f"--threads must be 1 to {MAX_THREADS}, and {threads} was given.", code="invalid_option")
        if narrow and table is None and samples < LEAST_SAMPLES:
            raise GroundingError(
                f"--calib-samples {samples} was given and at least {LEAST_SAMPLES} are needed: single videos would set "
                "the ranges; 512 is a good number.",
                code="too_few_samples",
            )
        if not max_drop >= 0:
            raise GroundingError(
                f"--max-drop is points that may be lost, at least 0, and {max_drop} was given.", code="invalid_option"
            )
        self.check_outputs(table, plan)
        self._check_sources()

    def check_outputs(self, table: Path | None, plan: Path | None, timing_cache: Path | None = None) -> None:
        """Raise OutputError where a file of the build cannot be written, or would replace one that it reads."""
        # Ranges and a plan that are given are not written again; they may be an earlier build's of the same name.
        endings = ["parity.json", "passport.html"]
        endings += [] if table else ["calibration.json"]
        endings += [] if plan else ["plan.json"]
        reports = (self.beside(ending) for ending in endings)
        pair = pair_paths(self.twin) if self.split else ()
        shorter = [path for plan in self.unrolled for path in (plan, engine_metadata.metadata_path(plan))]
        engines = (self.output, *self.unrolled) if self.target != "onnxruntime" else ()
        layers = [layers_path(engine) for engine in engines]
        written = list(dict.fromkeys((self.output, self.twin, self.sidecar, *pair, *shorter, *layers, *reports)))
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
        check_writable(timing_cache, self.model, self.output, self.twin, *self.unrolled)
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
        lines.append(f"twin       {self.twin}")
        if self.split:
            lines.append(f"pair       {', '.join(map(str, pair_paths(self.twin)))}")
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
                f"reports    {self.beside('parity.json')}, {self.beside('passport.html')}",
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
