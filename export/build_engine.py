"""`python -m export.build_engine`: a checkpoint or a graph becomes an engine in the precision asked for, with proof."""

from __future__ import annotations

import dataclasses
import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from export.builder import BuildOptions, Plan, build, cuda_devices, explained, why_not
from export.profiles import DEFAULT_BATCH, DEFAULT_QUERY_LENGTH, Profile, profiles
from runtime import sidecar
from runtime.annotations import DataSet
from runtime.command import command, next_command
from runtime.errors import DeviceError, GroundingError, ModelFileError, OutputError, PromiseBroken
from runtime.files import check_writable, replace_when_whole, sha256, write_json
from runtime.manifest import METADATA_KEY, Manifest

if TYPE_CHECKING:
    import onnx

    from export.census import Census

log = logging.getLogger("drn")

Precision = Literal["fp32", "fp16", "bf16", "int8", "fp8"]
Target = Literal["auto", "tensorrt", "tensorrt-rtx", "onnxruntime"]

# FP16 around Q/DQ needs opset 19, BF16 convolutions 22; TensorRT 8.6 reads 17 at most, so no more than is needed.
OPSETS = {"fp32": 17, "fp16": 17, "bf16": 22, "int8": 19, "fp8": 19}
SCAN_QUERIES = 128


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
    engine is built of it. What was measured of both goes into the sidecar, and a promise that does not hold is exit
    code 1: the precision counted in the graph and in the engine, and with --data the parity with the FP32 graph.

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
        max_drop: points of R@1 IoU=0.7, and of mIoU, that may be lost against FP32.
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
    job.check(table, plan, limit, keep)
    capabilities = compute_capability if chosen == "tensorrt-rtx" else ()
    if dry_run:
        shapes = _dry_profiles(model, batch, query_length)
        print(job.describe(why, shapes, capabilities))
        return job.output
    log.info("Target %s: %s", chosen, why)
    import onnx

    source = job.source_graph(vocabulary, query_length[2])
    graph, manifest = _read(source)
    shapes = profiles(batch, query_length, manifest)
    twin, facts = _twin(job, graph, manifest, table, plan, keep, calib_samples, calib_method, threads)
    counted = _census(twin)
    from export import census

    census.check(counted, precision)
    _set_manifest(twin, manifest, precision, source, facts)
    with replace_when_whole(job.twin) as temporary:
        onnx.save(twin, temporary)
    print(f"{job.twin}: {_counted(counted)}, {job.twin.stat().st_size / source.stat().st_size:.2f} of FP32.")
    engine = None
    if chosen != "onnxruntime":
        options = BuildOptions(
            target=chosen,
            precision=precision,
            profiles=shapes,
            optimization_level=optimization_level,
            workspace_gib=workspace,
            version_compatible=version_compatible,
            hardware_compatible=hardware_compatible,
            compute_capabilities=capabilities,
        )
        engine = _build(job, twin, graph, options, timing_cache)
        _write_engine(job, engine, options, counted, graph)
    _parity(job, source, twin, max_drop, split, limit, threads)
    if engine is None:
        next_command("runtime.evaluate", "--model", job.output, "--data", data or "DIR")
    else:
        next_command("export.verify", "--reference", source, "--model", job.twin, "--data", data or "DIR")
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

    def check(self, table: Path | None, plan: Path | None, limit: int | None, keep: Sequence[str]) -> None:
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
        if self.precision == "fp32" and keep:
            raise GroundingError("--keep names modules for a higher precision than fp32, and there is none.")
        if limit is not None and limit < 1:
            raise GroundingError(f"--limit must be at least 1, and {limit} was given.")
        check_writable(self.output)
        check_writable(self.twin)

    def describe(self, why: str, shapes: Sequence[Profile] | None, capabilities: Sequence[str]) -> str:
        """Return what a build would do, for --dry-run."""
        lines = [
            f"model      {self.model} ({self.kind})",
            f"precision  {self.precision}",
            f"target     {self.target}: {why}",
            f"twin       {self.twin}",
        ]
        if self.target != "onnxruntime":
            lines += [f"engine     {self.output}", f"sidecar    {self.sidecar}"]
        if capabilities:
            lines.append(f"for        compute capability {', '.join(capabilities)}")
        if shapes is None:
            lines.append("profiles   known once the checkpoint is exported")
        for profile in shapes or ():
            lines.append(f"profile    {profile.name}: smallest, best, largest")
            lines += [f"  {name:<17}{' '.join(map(str, trio))}" for name, trio in profile.shapes.items()]
        proof = f"parity with FP32 on {self.data}" if self.data else "the precision alone (no --data for parity)"
        lines.append(f"proof      {proof}")
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
        return to_onnx(checkpoint, graph, max_query_length=max(longest, 64))


def _dry_profiles(model: Path, batch: Any, query_length: Any) -> list[Profile] | None:
    if not model.name.endswith(".onnx"):
        return None
    return profiles(batch, query_length, _read(model)[1])


def _read(path: Path) -> tuple[onnx.ModelProto, Manifest]:
    from calib.graphs import manifest_of, read_graph

    graph = read_graph(path)
    return graph, manifest_of(graph, str(path))


def _twin(
    job: Job,
    graph: onnx.ModelProto,
    manifest: Manifest,
    table: Path | None,
    plan: Path | None,
    keep: Sequence[str],
    samples: int,
    method: Any,
    threads: int | None,
) -> tuple[onnx.ModelProto, dict[str, Any]]:
    """Return the graph in the precision asked for, and what decided it."""
    from export import precision as half

    facts: dict[str, Any] = {}
    graph = half.raise_opset(graph, OPSETS[job.precision])
    if job.precision == "fp32":
        return graph, facts
    held: tuple[str, ...] = ()
    if job.data:
        held = _held_back(graph, manifest, job.data, "bf16" if job.precision == "bf16" else "fp16")
        facts["held back in FP32"] = list(held)
    if job.precision in ("fp16", "bf16"):
        facts["kept by request"] = list(keep)
        return half.to_half(graph, job.precision, (*keep, *held)), facts
    from calib.plan import Plan as KeepPlan
    from calib.qdq import Policy, quantize
    from calib.table import CalibrationTable

    if table:
        ranges = CalibrationTable.load(table)
    else:
        from calib.batches import draw
        from calib.calibrate import measure_table

        drawn = draw(DataSet(job.data), manifest, samples)
        ranges = measure_table(_read(_source_of(job))[0], drawn, method, threads=threads)
        ranges.save(job.twin.with_suffix(".calibration.json"))
    original = _read(_source_of(job))[0]
    ranges.check(original, str(job.model))
    if plan:
        keep = (*keep, *KeepPlan.load(plan).checked(original, ranges, job.precision, str(job.model)).keep)
    quantised = quantize(
        original, ranges, Policy(keep=tuple(dict.fromkeys(keep))), job.precision, OPSETS[job.precision]
    )
    facts |= {"calibration": ranges.digest, "method": ranges.key["method"], "kept out of 8 bits": list(keep)}
    return half.to_half(quantised, "fp16", held), facts


def _source_of(job: Job) -> Path:
    return job.model if job.kind == "onnx" else job.stem.with_name(f"{job.stem.name}.onnx")


def _held_back(graph: onnx.ModelProto, manifest: Manifest, data: Path, kind: Any) -> tuple[str, ...]:
    """Return the modules that come too near the largest FP16 number on training queries, and say so."""
    from calib.batches import draw
    from export.precision import overflowing, scan

    if kind == "bf16":
        return ()
    log.info("Scanning ranges on %d training queries ...", SCAN_QUERIES)
    drawn = draw(DataSet(data), manifest, SCAN_QUERIES)
    scanned = scan(graph, drawn.batches(manifest))
    held = overflowing(scanned, kind)
    for module in held:
        log.warning(
            "%s reaches %.3g, too near the largest FP16 number (65504), and stays in FP32.", module, scanned[module]
        )
    largest = max(scanned, key=lambda module: scanned[module])
    log.info("Largest magnitude: %.3g in %s; %d modules held back.", scanned[largest], largest, len(held))
    return held


def _census(twin: onnx.ModelProto) -> Census:
    from export.census import census

    return census(twin)


def _counted(counted: Census) -> str:
    shares = sorted(counted.total(), key=lambda kind: -counted.share(kind))
    return ", ".join(f"{100 * counted.share(kind):.1f} % {kind}" for kind in shares) + " of the multiply-adds"


def _set_manifest(
    twin: onnx.ModelProto, manifest: Manifest, precision: str, source: Path, facts: dict[str, Any]
) -> None:
    from onnx.helper import set_model_props

    changed = dataclasses.replace(
        manifest,
        precision=precision,
        sources={**manifest.sources, source.name: sha256(source)},
        training={**manifest.training, "precision": facts},
    )
    del twin.metadata_props[:]
    set_model_props(twin, {METADATA_KEY: changed.to_json()})


def _build(job: Job, twin: onnx.ModelProto, graph: onnx.ModelProto, options: BuildOptions, cache: Path | None) -> Plan:
    from export.builder import is_strongly_typed, load_library

    library = load_library(options.target)
    # A weakly typed TensorRT takes the FP32 graph and its own flags; what is in the twin would be cast twice.
    given = twin if is_strongly_typed(library) or job.precision in ("int8", "fp8") else graph
    log.info("Building with %s %s ...", library.__name__, library.__version__)
    known = cache.read_bytes() if cache and cache.is_file() else None
    with explained("Building the engine"):
        engine = build(given.SerializeToString(), options, known)
    if cache and engine.timing_cache:
        with replace_when_whole(cache) as temporary:
            temporary.write_bytes(engine.timing_cache)
    return engine


def _write_engine(job: Job, engine: Plan, options: BuildOptions, counted: Census, graph: onnx.ModelProto) -> None:
    """Write plan and sidecar, the sidecar last: a plan without one is never loaded."""
    from export.census import census, check_engine, engine_census

    found = engine_census(engine.inspector, len(engine.plan)) if engine.inspector else None
    if found:
        check_engine(found, job.precision, sum(census(graph).weight_bytes.values()))
    twin_manifest = json.loads({entry.key: entry.value for entry in _load(job.twin).metadata_props}[METADATA_KEY])
    with replace_when_whole(job.output) as temporary:
        temporary.write_bytes(engine.plan)
    content = {
        "format": sidecar.FORMAT,
        "manifest": twin_manifest,
        "library": engine.library,
        "python": sys.version.split()[0],
        "strongly_typed": engine.strongly_typed,
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
        "census": {"twin": counted.to_dict(), "engine": found.to_dict() if found else None},
        "sha256": {job.output.name: sha256(job.output), job.twin.name: sha256(job.twin)},
    }
    write_json(job.sidecar, content)
    measured = (
        "engine layers: " + ", ".join(f"{n} {kind}" for kind, n in found.layers.items())
        if found
        else ("its layers can be counted on the GPU only; the twin's are")
    )
    print(f"{job.output}: {len(engine.plan) / 1e6:.1f} MB, {engine.library}; {measured}.")


def _load(path: Path) -> onnx.ModelProto:
    import onnx

    return onnx.load(path)


def _gpu() -> str | None:
    """Return the name and compute capability of the first GPU, as nvidia-smi tells them."""
    if not cuda_devices():
        return None
    from runtime.doctor import gpus

    return next((finding.seen for finding in gpus() if finding.works), None)


def _parity(
    job: Job, source: Path, twin: onnx.ModelProto, max_drop: float, split: str, limit: int | None, threads: int | None
) -> None:
    if job.data is None:
        log.warning("Parity was not checked: pass --data DIR to prove on its queries that nothing was lost.")
        return
    if job.precision == "fp32":
        return
    from tqdm import tqdm

    from calib.graphs import GraphBackend
    from export.parity import Budget, compare, verdict
    from export.precision import emulated
    from export.verify import summary
    from runtime.grounder import Grounder

    data_set = DataSet(job.data)
    annotations = data_set.annotations(split)[:limit]
    reference = Grounder.load(source, "cpu", threads)
    # ONNX Runtime has no BF16 kernels on a CPU, and its own fusions of Q/DQ compute something else than what is asked.
    judged = Grounder(GraphBackend(emulated(twin), threads, optimised=job.precision in ("fp16", "bf16")))
    with tqdm(total=len(annotations), desc="parity", unit="query", leave=False, disable=None) as bar:
        found = compare(reference, judged, data_set, annotations, on_progress=bar.update)
    print(summary(found, (source.name, job.twin.name), split))
    broken = verdict(found, Budget.of(job.precision, max_drop))
    if broken:
        raise PromiseBroken(
            f"{job.twin.name} does not answer as {source.name}: {'; '.join(broken)}. Keep the costliest modules in "
            "higher precision (--keep, or --plan of `python -m calib.restore`), or raise --max-drop."
        )


if __name__ == "__main__":
    command(build_engine)
