"""`python -m export.build_engine`: a checkpoint or a graph becomes an engine in the precision asked for, with proof."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from export.builder import BuildOptions, Plan, build, check_options, cuda_devices, cuda_version, explained, why_not
from export.profiles import DEFAULT_BATCH, DEFAULT_QUERY_LENGTH, Profile, Range, profiles
from export.twin import Precision, Twin, Wishes, make_twin
from runtime import sidecar
from runtime.annotations import DataSet
from runtime.command import command, next_command
from runtime.errors import DeviceError, GroundingError, ModelFileError, OutputError, PromiseBroken
from runtime.files import check_writable, replace_when_whole, sha256, write_json
from runtime.manifest import METADATA_KEY, Manifest

if TYPE_CHECKING:
    import onnx

    from export.census import Census
    from export.passport import ModelFile
    from export.verify import Proof

log = logging.getLogger("drn")

Target = Literal["auto", "tensorrt", "tensorrt-rtx", "onnxruntime"]

# Tokens that an exported checkpoint takes, unless more are asked for.
LONGEST_QUERY = 64


def build_engine(
    model: Path,
    *,
    precision: Precision = "fp16",
    target: Target = "auto",
    data: Path | None = None,
    output: Path | None = None,
    vocabulary: Path | None = None,
    batch: tuple[int, int, int] = DEFAULT_BATCH,
    query_length: tuple[int, int, int] = DEFAULT_QUERY_LENGTH,
    table: Path | None = None,
    plan: Path | None = None,
    keep: tuple[str, ...] = (),
    calib_samples: int = 512,
    calib_method: Literal["auto", "minmax", "percentile", "entropy", "mse"] = "auto",
    max_drop: float = 0.2,
    split: str = "test",
    limit: int | None = None,
    optimization_level: int | None = None,
    workspace: float | None = None,
    timing_cache: Path | None = None,
    version_compatible: bool = False,
    hardware_compatible: bool = False,
    compute_capability: tuple[str, ...] = (),
    threads: int | None = None,
    dry_run: bool = False,
) -> Path:
    """Build an engine in one command: convert, trace, calibrate, write the graph in that precision, build, prove.

    The graph in the precision asked for (the twin, MODEL.PRECISION.onnx) runs in ONNX Runtime on any machine; an
    engine is built of it. A promise that does not hold is exit code 1: the precision counted in the graph and in the
    engine, and with --data the parity with the FP32 graph. What breaks it is kept as MODEL.PRECISION.rejected, for a
    closer look, and nothing stands under the name that it did not earn.

    With --data a report and the model's passport are written beside it: MODEL.PRECISION.parity.json and
    MODEL.PRECISION.passport.html; int8 and fp8 also leave their ranges and, where modules had to be restored, the plan.

    Args:
        model: drn.pt, an FP32 drn.onnx, or a published checkpoint (.pth, .pth.tar).
        precision: fp32, fp16, bf16, int8 (with FP16 around it) or fp8 (likewise).
        target: what the engine is for; auto takes TensorRT where this machine has it and a GPU, else ONNX Runtime.
        data: directory in the Charades-STA layout: for calibration, the range scan and parity.
        output: the engine, or for onnxruntime the twin; beside MODEL when not given.
        vocabulary: word table of a published checkpoint.
        batch: MIN OPT MAX queries.
        query_length: MIN OPT MAX tokens.
        table: calibration table measured on this graph, in place of calibrating.
        plan: of `python -m calib.restore`: modules that stay out of INT8.
        keep: DRN modules that stay in higher precision: FP16 for int8 and fp8, FP32 for fp16 and bf16.
        calib_samples: training queries to calibrate on.
        calib_method: how ranges are chosen; auto measures which costs least on held-out training videos.
        max_drop: points of R@1 IoU=0.7, and of mIoU, that may be lost against FP32. For int8 and fp8 the fewest
            modules go back to FP16 until it holds on held-out training videos; then SPLIT is the judge.
        split: whose queries prove parity.
        limit: only the first so many of them.
        optimization_level: TensorRT's, 0 to 5.
        workspace: most scratch memory of the builder, in GiB.
        timing_cache: file of measured kernel times, read if there and written back.
        version_compatible: a TensorRT plan that later versions of the same major load.
        hardware_compatible: a TensorRT plan for Ampere and later.
        compute_capability: for tensorrt-rtx, as 8.6 8.9; this machine's GPU when not given.
        threads: CPU threads for calibration and parity.
        dry_run: say what would be built, and stop.

    Returns:
        The path of the engine (of the twin for onnxruntime).

    Raises:
        GroundingError: something is missing or does not go together.
        PromiseBroken: precision or parity is not what was promised.
    """
    chosen, why = choose_target(target, compute_capability)
    job = Job(model, precision, chosen, data, output)
    options = BuildOptions(
        target="tensorrt-rtx" if chosen == "tensorrt-rtx" else "tensorrt",
        precision=precision,
        profiles=(),
        optimization_level=optimization_level,
        workspace_gib=workspace,
        version_compatible=version_compatible,
        hardware_compatible=hardware_compatible,
        compute_capabilities=compute_capability,
    )
    job.check(table, plan, limit, keep, max_drop)
    job.check_options(options, timing_cache, why)
    shapes = job.early_profiles(batch, query_length)
    if dry_run:
        print(job.describe(why, shapes, options, calib_samples if table is None else None))
        return job.output
    log.info("Target %s: %s", chosen, why)
    data_set = DataSet(data) if data else None
    annotations = data_set.annotations(split)[:limit] if data_set else []
    source = job.source_graph(vocabulary, query_length[2])
    graph, manifest = _read(source)
    options = dataclasses.replace(options, profiles=shapes or profiles(batch, query_length, manifest))
    wishes = Wishes(
        keep, table, plan, calib_samples, calib_method, max_drop, threads, job.beside("calibration.json"),
        job.beside("plan.json"),
    )  # fmt: skip
    twin = make_twin(graph, precision, wishes, data_set, str(source))
    made = Made.of(job, source, manifest, twin)
    print(f"{job.twin}: {_counted(made.census)}, {len(made.content) / source.stat().st_size:.2f} of FP32.")
    court = Court(job, source, data_set, annotations, split, max_drop, _again(job, split, limit, max_drop), threads)
    proof = None
    if data_set:
        proof = court.judge_twin(made)
        print(proof.text())
        if proof.broken:
            made.save(job.rejected("onnx"))
            court.write_reports(proof, made, None)
            raise PromiseBroken(
                f"{proof.sentence()} It is kept as {job.rejected('onnx').name}; keep the costliest modules in higher "
                "precision (--keep; `python -m calib.rank_layers` finds them), or raise --max-drop."
            )
    made.save(job.twin)
    engine = None
    if chosen != "onnxruntime":
        engine = _engine(job, made, twin, options, timing_cache)
        if data_set and cuda_devices():
            proof = court.judge_engine(made)
            print(proof.text())
            if proof.broken:
                _rename_engine(job.output, job.rejected("engine"))
                court.write_reports(proof, made, None)
                raise PromiseBroken(
                    f"{proof.sentence()} Its twin {job.twin.name} does, so its kernels lose it. It is kept as "
                    f"{job.rejected('engine').name}; build it with another --optimization-level, or keep modules."
                )
    if proof:
        court.write_reports(proof, made, engine)
        print(f"{proof.sentence()} {job.beside('passport.html')} tells all.")
    else:
        log.warning("Parity was not checked: pass --data DIR to prove on its queries that nothing was lost.")
    if engine and not cuda_devices():
        next_command("runtime.describe", job.output)
    elif data_set:
        first = annotations[0]
        words = ("--model", job.output, "--data", data, "--video", first.video, "--query", first.sentence)
        next_command("runtime.infer", *words)
    else:
        next_command("export.verify", "--reference", source, "--model", job.twin, "--data", "DIR")
    print(job.output)
    return job.output


def choose_target(
    target: Target, capabilities: Sequence[str] = ()
) -> tuple[Literal["tensorrt", "tensorrt-rtx", "onnxruntime"], str]:
    """Return the target and why it is taken.

    Raises:
        DeviceError: a target was asked for that this machine cannot build for.
    """
    if target == "onnxruntime":
        return target, "the twin is the model, and ONNX Runtime optimises it for the machine that loads it."
    if target != "auto":
        reason = why_not(target)
        if reason is None and target == "tensorrt-rtx" and not capabilities and not cuda_devices():
            reason = "Without a GPU, --target tensorrt-rtx needs --compute-capability, as 8.6 8.9."
        if reason:
            raise DeviceError(reason)
        return target, "as asked for."
    reason = why_not("tensorrt")
    if reason is None:
        return "tensorrt", "TensorRT and a GPU are here."
    if capabilities:
        rtx = why_not("tensorrt-rtx")
        if rtx is None:
            return "tensorrt-rtx", "compute capabilities were named, and TensorRT-RTX builds for them without a GPU."
        reason = rtx
    return "onnxruntime", f"no engine can be built here ({reason.rstrip('.')})."


@dataclasses.dataclass(frozen=True)
class Job:
    """The files of one build."""

    model: Path
    precision: Precision
    target: Literal["tensorrt", "tensorrt-rtx", "onnxruntime"]
    data: Path | None
    given_output: Path | None

    @property
    def stem(self) -> Path:
        """MODEL without what says its format, as runs/drn for runs/drn.pt and published.pth.tar."""
        name = self.model.name
        for suffix in (".pth.tar", ".pth", ".pt", ".onnx", ".tar"):
            name = name.removesuffix(suffix)
        return self.model.with_name(name)

    @property
    def output(self) -> Path:
        if self.given_output:
            return self.given_output
        suffix = "onnx" if self.target == "onnxruntime" else "engine"
        return self.stem.with_name(f"{self.stem.name}.{self.precision}.{suffix}")

    @property
    def twin(self) -> Path:
        """The graph in the precision asked for."""
        if self.target == "onnxruntime":
            return self.output
        stem = self.output.with_suffix("")
        if not stem.name.endswith(f".{self.precision}"):
            stem = stem.with_name(f"{stem.name}.{self.precision}")
        return stem.with_name(f"{stem.name}.onnx")

    @property
    def sidecar(self) -> Path:
        return sidecar.path_beside(self.output)

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
        self, table: Path | None, plan: Path | None, limit: int | None, keep: Sequence[str], max_drop: float
    ) -> None:
        """Raise what can be known to be wrong before any work is done."""
        if not self.model.is_file():
            raise ModelFileError(f"The model file {self.model} does not exist; check the path.")
        if not self.model.name.endswith((".onnx", ".pt", ".pth", ".tar")):
            raise ModelFileError(f"{self.model.name} should end in .onnx, .pt, .pth or .pth.tar.")
        if self.output.suffix != (".onnx" if self.target == "onnxruntime" else ".engine"):
            raise OutputError(
                f"--output {self.output} should end in {'.onnx' if self.target == 'onnxruntime' else '.engine'} "
                f"for the target {self.target}."
            )
        if self.model.resolve() in (self.output.resolve(), self.twin.resolve()):
            raise OutputError(
                f"{self.model} would be overwritten by its own {self.precision} form; choose another --output."
            )
        narrow = self.precision in ("int8", "fp8")
        if narrow and self.data is None and table is None:
            raise GroundingError(f"{self.precision} needs ranges: pass --data DIR to calibrate on, or --table FILE.")
        if (table or plan) and not narrow:
            raise GroundingError(f"--table and --plan are for int8 and fp8, and {self.precision} was asked for.")
        for given in (table, plan):
            if given and not given.is_file():
                raise GroundingError(f"{given} does not exist; check the path.")
        if plan and not table:
            raise GroundingError(
                "--plan was found with one calibration table and holds for it alone; give that with --table."
            )
        if self.precision == "fp32" and keep:
            raise GroundingError("--keep names modules for a higher precision than fp32, and there is none.")
        if limit is not None and limit < 1:
            raise GroundingError(f"--limit must be at least 1, and {limit} was given.")
        if not max_drop >= 0:
            raise GroundingError(f"--max-drop is points that may be lost, at least 0, and {max_drop} was given.")
        written = [self.output, self.twin, self.sidecar]
        for path in written:
            check_writable(path, self.model, table, plan, *(other for other in {*written} - {path}))

    def check_options(self, options: BuildOptions, timing_cache: Path | None, why: str) -> None:
        """Raise what the library of the target, or the GPU, cannot do; also before any work."""
        if self.target == "onnxruntime":
            flags = {
                "--optimization-level": options.optimization_level,
                "--workspace": options.workspace_gib,
                "--timing-cache": timing_cache,
                "--version-compatible": options.version_compatible,
                "--hardware-compatible": options.hardware_compatible,
                "--compute-capability": options.compute_capabilities,
            }
            given = [flag for flag, value in flags.items() if value not in (None, False, ())]
            if given:
                raise GroundingError(
                    f"{', '.join(given)}: of engines, and the target is onnxruntime ({why.rstrip('.')}); leave it out, "
                    "or name a --target that builds one."
                )
            return
        check_options(options)

    def early_profiles(self, batch: Range, query_length: Range) -> list[Profile] | None:
        """Return the optimization profiles; None where they are known only after a published file is converted."""
        if self.kind == "published":
            return None
        if self.kind == "onnx":
            return profiles(batch, query_length, _read(self.model)[1])
        from train.checkpoints import load_checkpoint

        return profiles(batch, query_length, load_checkpoint(self.model).manifest(max(query_length[2], LONGEST_QUERY)))

    def describe(self, why: str, shapes: Sequence[Profile] | None, options: BuildOptions, samples: int | None) -> str:
        """Return what a build would do, for --dry-run."""
        lines = [
            f"model      {self.model} ({self.kind})",
            f"precision  {self.precision}",
            f"target     {self.target}: {why}",
        ]
        if self.precision in ("int8", "fp8"):
            told = f"{samples} training queries of {self.data}" if samples else "by the table given"
            lines.append(f"ranges     {told}")
        lines.append(f"twin       {self.twin}")
        if self.target != "onnxruntime":
            lines += [f"engine     {self.output}", f"sidecar    {self.sidecar}"]
        if options.compute_capabilities:
            lines.append(f"for        compute capability {', '.join(options.compute_capabilities)}")
        if shapes is None:
            lines.append("profiles   known once the checkpoint is converted")
        for profile in shapes or ():
            lines.append(f"profile    {profile.name}: smallest, best, largest")
            lines += [f"  {name:<17}{' '.join(map(str, trio))}" for name, trio in profile.shapes.items()]
        if self.target == "onnxruntime":
            lines.append("           (of an engine; ONNX Runtime takes any batch)")
        if self.data:
            lines += [
                f"proof      parity with FP32 on {self.data}",
                f"reports    {self.beside('parity.json')}, {self.beside('passport.html')}",
            ]
        else:
            lines.append("proof      the precision alone (no --data for parity)")
        return "\n".join(lines)

    def source_graph(self, vocabulary: Path | None, longest: int) -> Path:
        """Return the FP32 graph, exporting and converting first where MODEL is a checkpoint."""
        if self.kind == "onnx":
            return self.model
        from export.to_onnx import to_onnx

        checkpoint = self.model
        if self.kind == "published":
            from train.convert import convert

            checkpoint = self.stem.with_name(f"{self.stem.name}.pt")
            convert(self.model, checkpoint, vocabulary)
        graph = self.stem.with_name(f"{self.stem.name}.onnx")
        return to_onnx(checkpoint, graph, max_query_length=max(longest, LONGEST_QUERY))


@dataclasses.dataclass(frozen=True)
class Made:
    """A twin that has the precision it is called by, not yet on disk.

    Attributes:
        content: the file's bytes.
        manifest: what it says of itself.
        census: what was counted in it.
        fp32_weight_bytes: size of the source's weights.
    """

    content: bytes
    manifest: Manifest
    census: Census
    fp32_weight_bytes: int

    @classmethod
    def of(cls, job: Job, source: Path, manifest: Manifest, twin: Twin) -> Made:
        """Count what a twin is computed in, and seal it; PromiseBroken unless it is what was asked for."""
        from onnx.helper import set_model_props

        from export.census import census, check

        counted = census(twin.graph)
        check(counted, job.precision)
        shares = {kind: round(counted.share(kind), 6) for kind in counted.total()}
        about = dataclasses.replace(
            manifest,
            precision=job.precision,
            sources={**manifest.sources, source.name: sha256(source)},
            training={**manifest.training, "precision": {**twin.facts, "multiply-adds": shares}},
        )
        del twin.graph.metadata_props[:]
        set_model_props(twin.graph, {METADATA_KEY: about.to_json()})
        weights = sum(census(_read(source)[0]).weight_bytes.values())
        return cls(twin.graph.SerializeToString(), about, counted, weights)

    def file(self, path: Path) -> ModelFile:
        """Return the file that these bytes are, or will be."""
        from export.passport import ModelFile

        return ModelFile(path, hashlib.sha256(self.content).hexdigest(), len(self.content), self.manifest)

    def save(self, path: Path) -> Path:
        with replace_when_whole(path) as temporary:
            temporary.write_bytes(self.content)
        return path


def _read(path: Path) -> tuple[onnx.ModelProto, Manifest]:
    from calib.graphs import manifest_of, read_graph

    graph = read_graph(path)
    return graph, manifest_of(graph, str(path))


def _counted(counted: Census) -> str:
    shares = sorted(counted.total(), key=lambda kind: -counted.share(kind))
    return ", ".join(f"{100 * counted.share(kind):.1f} % {kind}" for kind in shares) + " of the multiply-adds"


def _again(job: Job, split: str, limit: int | None, max_drop: float) -> str:
    """Return the command that builds the same again."""
    words: list[Any] = ["python", "-m", "export.build_engine", "--model", job.model, "--precision", job.precision]
    words += ["--target", job.target, "--data", job.data, "--output", job.output, "--max-drop", max_drop]
    words += ["--split", split] if split != "test" else []
    words += ["--limit", limit] if limit else []
    return shlex.join(map(str, words))


@dataclasses.dataclass(frozen=True)
class Court:
    """What a twin and an engine are held against: the FP32 graph's answers to a split.

    Attributes:
        job: the build.
        source: the FP32 graph.
        data_set, annotations, split: the queries; None and empty without --data.
        max_drop: points that may be lost.
        again: the command that builds the same again.
        threads: CPU threads.
    """

    job: Job
    source: Path
    data_set: DataSet | None
    annotations: Sequence[Any]
    split: str
    max_drop: float
    again: str
    threads: int | None

    def judge_twin(self, made: Made) -> Proof:
        """Hold the twin, as it will be on disk, against the FP32 graph; on the CPU."""
        import onnx

        from calib.graphs import GraphBackend
        from export.precision import emulated
        from runtime.grounder import Grounder

        # ONNX Runtime has no BF16 kernels on a CPU. Its own fusions of Q/DQ compute something else than engines do, so
        # they are in only where ONNX Runtime is what will answer.
        graph = emulated(onnx.load_from_string(made.content))
        optimised = self.job.target == "onnxruntime" or self.job.precision in ("fp32", "fp16", "bf16")
        return self._judge(Grounder(GraphBackend(graph, self.threads, optimised)), made.file(self.job.twin))

    def judge_engine(self, made: Made) -> Proof:
        """Hold the engine against the FP32 graph; on the GPU."""
        from export.passport import ModelFile
        from runtime.grounder import Grounder

        judged = Grounder.load(self.job.output, "cuda")
        return self._judge(judged, ModelFile.of(self.job.output, made.manifest))

    def _judge(self, judged: Any, file: ModelFile) -> Proof:
        from export.parity import Budget
        from export.passport import ModelFile
        from export.verify import prove
        from runtime.grounder import Grounder

        assert self.data_set is not None
        log.info("Asking %s and %s %d queries ...", self.source.name, file.path.name, len(self.annotations))
        reference = Grounder.load(self.source, "cpu", self.threads)
        return prove(
            (reference, judged),
            (ModelFile.of(self.source, reference.manifest), file),
            self.data_set,
            self.annotations,
            Budget.of(self.job.precision, self.max_drop),
            split=self.split,
            again=self.again,
        )

    def write_reports(self, proof: Proof, made: Made, engine: ModelFile | None) -> None:
        """Write the JSON report and the passport of what was judged."""
        from export.verify import census_table, engine_census_table

        census = census_table(made.census)
        if engine:
            told = engine_census_table(sidecar.read_sidecar(engine.path).content["census"])
            census = (f"{census[0]} {told[0]}" if told else census[0], census[1])
            if proof.model.path == engine.path:
                engine = None
        commands = (self.again, shlex.join(("python", "-m", "runtime.describe", str(self.job.output))))
        proof.write(self.job.beside("parity.json"), self.job.beside("passport.html"), census, engine, commands)


def _engine(job: Job, made: Made, twin: Twin, options: BuildOptions, cache: Path | None) -> ModelFile:
    """Build the engine, count its precision, and write plan and sidecar."""
    from export.census import check_engine, engine_census
    from export.passport import ModelFile

    built = _build(twin, options, cache)
    found = engine_census(built.inspector, len(built.plan)) if built.inspector else None
    content = _sidecar_content(job, made, built, options, found, cache)
    try:
        if found:
            check_engine(found, job.precision, made.fp32_weight_bytes)
    except PromiseBroken as error:
        _write_engine(job.rejected("engine"), built.plan, content)
        raise PromiseBroken(f"{error} The engine is kept as {job.rejected('engine').name}.") from error
    _write_engine(job.output, built.plan, content)
    measured = (
        "engine layers: " + ", ".join(f"{n} {kind}" for kind, n in found.layers.items())
        if found
        else "its layers can be counted on the GPU only; the twin's are"
    )
    print(f"{job.output}: {len(built.plan) / 1e6:.1f} MB, {built.library}; {measured}.")
    return ModelFile.of(job.output, made.manifest)


def _rename_engine(path: Path, new: Path) -> None:
    content = dict(sidecar.read_sidecar(path).content)
    content["sha256"] = {name: digest for name, digest in content["sha256"].items() if name != path.name}
    _write_engine(new, path.read_bytes(), content)
    for old in (sidecar.path_beside(path), path):
        old.unlink()


def _build(twin: Twin, options: BuildOptions, cache: Path | None) -> Plan:
    from export.builder import is_strongly_typed, load_library

    library = load_library(options.target)
    # A weakly typed TensorRT takes the graph without casts and its own flags; what is in the twin would be cast twice.
    given = twin.graph if is_strongly_typed(library) else twin.weak
    log.info("Building with %s %s ...", library.__name__, library.__version__)
    known = cache.read_bytes() if cache and cache.is_file() else None
    options = dataclasses.replace(options, in_fp32=tuple(twin.facts.get("held back in FP32", ())))
    with explained("Building the engine"):
        built = build(given.SerializeToString(), options, known)
    if cache and built.timing_cache:
        with replace_when_whole(cache) as temporary:
            temporary.write_bytes(built.timing_cache)
    return built


def _sidecar_content(
    job: Job, made: Made, built: Plan, options: BuildOptions, found: Any, cache: Path | None
) -> dict[str, Any]:
    return {
        "format": sidecar.FORMAT,
        "manifest": made.manifest.to_dict(),
        "library": built.library,
        "cuda": cuda_version(),
        "python": sys.version.split()[0],
        "strongly_typed": built.strongly_typed,
        "target": options.target,
        "gpu": _gpu(),
        "compute_capabilities": list(options.compute_capabilities),
        "profiles": [dataclasses.asdict(profile) for profile in options.profiles],
        "options": {
            "optimization_level": options.optimization_level,
            "workspace_gib": options.workspace_gib,
            "version_compatible": options.version_compatible,
            "hardware_compatible": options.hardware_compatible,
        },
        "timing_cache": sha256(cache) if cache and cache.is_file() else None,
        "census": {"twin": made.census.to_dict(), "engine": found.to_dict() if found else None},
        "sha256": {job.twin.name: made.file(job.twin).sha256},
    }


def _write_engine(path: Path, plan: bytes, content: dict[str, Any]) -> None:
    """Write plan and sidecar: both are whole before either takes its place, so that no old pair is lost to half a new
    one."""
    hashes = {path.name: hashlib.sha256(plan).hexdigest(), **content["sha256"]}
    with replace_when_whole(sidecar.path_beside(path)) as beside, replace_when_whole(path) as temporary:
        temporary.write_bytes(plan)
        write_json(beside, {**content, "sha256": hashes})


def _gpu() -> str | None:
    """Return the name and compute capability of the first GPU, as nvidia-smi tells them."""
    if not cuda_devices():
        return None
    from runtime.doctor import gpus

    return next((finding.seen for finding in gpus() if finding.works), None)


if __name__ == "__main__":
    command(build_engine)
