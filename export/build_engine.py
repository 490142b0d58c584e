"""`python -m export.build_engine`: a checkpoint or a graph becomes an engine in the precision asked for, with proof."""

from __future__ import annotations

import dataclasses
import inspect
import logging
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from calib.graph.onnx_graph import read_source
from calib.graph.unroll_lstm import lstm_layers
from export.build.artifacts import ConvertedModel, cut_parts, format_shares, single_engine_part
from export.build.build_config import BuildConfig, ensure_source_graph, known_graph, validate_keep_modules
from export.build.extractor_engine import FEATURE_TOLERANCES, build_extractor, extractor_file_kind
from export.build.parity_check import ParityChecker
from export.build.reduced_precision import ConversionOptions, Precision, convert_precision
from export.engine.builder import BuildOptions, cuda_devices, runs_here, unavailable_reason
from export.engine.engine_writer import BuildState, build_part, mark_rejected
from export.engine.profiles import (
    DEFAULT_BATCH,
    DEFAULT_CACHED_VIDEOS,
    Unrolling,
    check_ranges,
    check_unroll,
    one_profile,
    unrolling,
)
from export.engine.profiles import profiles as optimization_profiles
from export.parity.model_file import ModelFile
from runtime.core.cli import command, suggest_next_command
from runtime.core.errors import CheckFailed, DeviceError, GroundingError, ModelFileError
from runtime.core.io.atomic_files import Staging, locked
from runtime.core.repeat_filter import said_once
from runtime.datasets.dataset import DataSet
from runtime.datasets.presets import query_length_of
from runtime.grounding.evaluation import askable_rows

if TYPE_CHECKING:
    import onnx

    from export.parity.parity_report import ParityReport

log = logging.getLogger("drn")

Target = Literal["auto", "tensorrt", "tensorrt-rtx", "onnxruntime"]

# Said in the command of a passport even where they are the defaults, which may change.
ALWAYS_SAID = ("precision", "target", "max_drop")


def build_engine(
    model: Path,
    *,
    precision: Precision = "fp16",
    target: Target = "auto",
    data: Path | None = None,
    output: Path | None = None,
    vocabulary: Path | None = None,
    batch: tuple[int, int, int] = DEFAULT_BATCH,
    query_length: tuple[int, int, int] | None = None,
    table: Path | None = None,
    plan: Path | None = None,
    keep: tuple[str, ...] = (),
    calib_samples: int = 512,
    calib_method: Literal["auto", "minmax", "percentile", "entropy", "mse"] = "auto",
    max_drop: float = 0.2,
    split: bool = False,
    videos: int = DEFAULT_CACHED_VIDEOS,
    unroll: tuple[int, ...] = (),
    parity_split: str = "test",
    limit: int | None = None,
    profiles: Literal[1, 2] = 2,
    optimization_level: int | None = None,
    workspace: float | None = None,
    timing_cache: Path | None = None,
    version_compatible: bool = False,
    hardware_compatible: bool = False,
    tf32: bool = False,
    compute_capability: tuple[str, ...] = (),
    threads: int | None = None,
    dry_run: bool = False,
) -> Path:
    """Build an engine: convert, export, calibrate, change precision, build, and check accuracy.

    The graph in the requested precision is written as MODEL.PRECISION.onnx, which ONNX Runtime runs on any machine;
    the engine is built from it. The command exits with 1 if a check fails: the precision of the graph and of the
    engine, and with --data the accuracy compared with the FP32 graph. The rejected model is saved as
    MODEL.PRECISION.rejected, and the final name is not written.

    With --data the command also writes MODEL.PRECISION.parity.json and the HTML report
    MODEL.PRECISION.passport.html. int8 and fp8 also write their calibration table and, if modules were restored,
    the quantization plan.

    Example:
        python -m export.build_engine --model drn.pt --precision int8 --target tensorrt --data charades

    Args:
        model: drn.pt, an FP32 drn.onnx, or a published checkpoint (.pth, .pth.tar); or a clip feature extractor
            (c3d.pt, c3d.onnx or a published C3D), whose features are compared with FP32.
        precision: fp32, fp16, bf16, int8 (other layers in FP16; FP32 for onnxruntime) or fp8 (other layers in
            FP16).
        target: runtime of the engine; auto selects TensorRT on a machine with TensorRT and a GPU, else ONNX
            Runtime.
        data: directory of a data set (docs/formats.md) for calibration, the range scan and the accuracy check.
        output: engine to write, or for onnxruntime the graph. Default: next to MODEL.
        vocabulary: word table of a published checkpoint.
        batch: MIN OPT MAX of the number of queries, or of clips for an extractor.
        query_length: MIN OPT MAX of the number of tokens. Default: those of the training data set (Charades-STA: 1
            8 32).
        table: calibration table of this graph, to skip the calibration.
        plan: quantization plan from `python -m calib.restore`, with the modules to leave out of INT8.
        keep: DRN modules to keep in higher precision: FP16 for int8 and fp8, FP32 for fp16 and bf16.
        calib_samples: number of training queries to calibrate on.
        calib_method: how to choose activation ranges; auto takes the method with the smallest loss on held-out
            training videos.
        max_drop: maximum loss of R@1 IoU=0.7 and of mIoU compared with FP32, in points. For int8 and fp8 the
            smallest set of modules is restored to FP16 until the loss on held-out training videos is within it; the
            final check uses the parity split.
        split: also split the model for videos with several queries: MODEL.PRECISION.video encodes a video, and
            MODEL.PRECISION.query answers queries and is the file to run.
        videos: number of encoded videos that a split engine keeps in GPU memory.
        unroll: query lengths, such as 6 10: build one more engine for each, with an unrolled LSTM, for queries of
            at most that many tokens. TensorRT's LSTM is a loop; it handles longer queries, but cannot be captured
            in a CUDA graph. Default for tensorrt: the 90 % and 99 % quantiles of the query lengths in the training
            split of --data, or of the model's training data set. 0, the default for tensorrt-rtx, builds none.
        parity_split: split to check the accuracy on.
        limit: use only the first N queries of it.
        profiles: number of optimization profiles: 2, for one query and for several, or 1 for both. Engines of
            TensorRT 8.6 with two profiles may fail to load; then an engine with one is built automatically.
        optimization_level: TensorRT's builder optimization level, 0 to 5.
        workspace: maximum scratch memory of the builder, in GiB.
        timing_cache: file of measured kernel times to read, if it exists, and update.
        version_compatible: build a TensorRT plan that later minor versions can load.
        hardware_compatible: build a TensorRT plan for Ampere and later GPUs.
        tf32: allow TF32 (10-bit mantissa) for FP32 operations, in engines and in ONNX Runtime on a GPU.
        compute_capability: for tensorrt-rtx, GPU architectures such as 8.6 8.9. Default: the GPU of this machine.
        threads: number of CPU threads for calibration and the accuracy check.
        dry_run: print what would be built, and stop.

    Returns:
        The path of the engine, or of the graph for onnxruntime.

    Raises:
        GroundingError: an input is missing, or options contradict each other.
        CheckFailed: the precision or the accuracy check failed.
    """
    given = dict(locals())
    compute_capability = tuple(dict.fromkeys(compute_capability))
    unroll = check_unroll(unroll)
    chosen, why = choose_target(target, compute_capability)
    job = BuildConfig(model, precision, chosen, data, output, split, tuple(length for length in unroll if length))
    options = BuildOptions(
        target="tensorrt-rtx" if chosen == "tensorrt-rtx" else "tensorrt",
        precision=precision,
        profiles=(),
        optimization_level=optimization_level,
        workspace_gib=workspace,
        version_compatible=version_compatible,
        hardware_compatible=hardware_compatible,
        tf32=tf32,
        compute_capabilities=compute_capability,
    )
    extractor = extractor_file_kind(model)
    if extractor:
        _check_extractor(given)
    job.check(table, plan, limit, keep, max_drop, calib_samples, threads)
    if videos < 1:
        raise GroundingError(f"--videos must be at least 1, and {videos} was given.")
    job.check_options(options, timing_cache, why, profiles)
    if extractor:
        check_ranges(batch, query_length)
        if dry_run:
            print(job.describe(why, (), options, None, "features of made-up clips against FP32's"))
            return job.output
        log.info("Target %s: %s", chosen, why)
        return build_extractor(job, options, batch, keep, timing_cache, threads)
    early = job.early_profiles(batch, query_length, keep)
    data_set = DataSet(data) if data else None
    annotations = data_set.annotations(parity_split)[:limit] if data_set else []
    shapes, short = None, None
    if early:
        shapes, about = early
        shapes = one_profile(shapes) if profiles == 1 else shapes
        short = unrolling(unroll, chosen, shapes[0].query_length[2], about, data_set, parity_split)
        job = _with_short(job, short, table, plan, timing_cache)
    if dry_run:
        longest = query_length[2] if query_length else 0
        if not short:
            short = unrolling(unroll, chosen, longest or query_length_of({})[2], None, data_set, parity_split)
        graph = known_graph(job, longest) if short.steps else None
        short = _writable_out(short, graph) if graph else short
        job = _with_short(job, short, table, plan, timing_cache)
        print(job.describe(why, shapes, options, calib_samples if table is None else None, unrolling=short))
        return job.output
    log.info("Target %s: %s", chosen, why)
    source = ensure_source_graph(job, vocabulary, query_length[2] if query_length else 0)
    graph, manifest = read_source(source)
    annotations = [annotations[row] for row in askable_rows(manifest.vocabulary, annotations)]
    validate_keep_modules(graph, precision, keep)
    if not shapes or not short:
        shapes = optimization_profiles(batch, query_length, manifest)
        shapes = one_profile(shapes) if profiles == 1 else shapes
        short = unrolling(unroll, chosen, shapes[0].query_length[2], manifest, data_set, parity_split)
    short = _writable_out(short, graph)
    job = _with_short(job, short, table, plan, timing_cache)
    if chosen == "tensorrt":
        print(_about_short(short))
    # Lengths that the data set determined are named, so that other data does not change the engine.
    named = job.unroll or ((0,) if chosen == "tensorrt" else ())
    given = {**given, "target": chosen, "output": job.output}
    command_line = _reproduction_command({**given, "unroll": named})
    with said_once(), locked(job.output.parent, job.output.name), Staging() as staging:
        # All is written apart and takes its place at the end, so that nothing there now is lost to half of a build.
        staged = dataclasses.replace(job, given_output=staging.path(job.output))
        checker = ParityChecker(
            staged, job.output, source, graph, data_set, annotations, parity_split, max_drop, command_line, threads
        )
        conversion = ConversionOptions(
            keep, table, plan, calib_samples, calib_method, max_drop, threads, staged.beside("calibration.json"),
            staged.beside("plan.json"), for_cpu=chosen == "onnxruntime",
        )  # fmt: skip
        try:
            converted_graph = convert_precision(graph, precision, conversion, data_set, str(source))
            if tf32:
                converted_graph = dataclasses.replace(converted_graph, facts={**converted_graph.facts, "tf32": True})
            created = ConvertedModel.of(staged, source, graph, converted_graph)
            size = len(created.content) / source.stat().st_size
            print(f"{job.twin.name}: {format_shares(created.census)}, {size:.2f} of FP32.")
            proof = _checked_graph(staged, checker, created)
            created.save(staged.twin)
            parts = [single_engine_part(staged, created, converted_graph, shapes)]
            if split:
                parts = cut_parts(staged, created, graph, shapes, videos)
            engine, engines = None, []
            if chosen != "onnxruntime":
                state = BuildState()
                parts = [part.with_unrolled(job.unroll, short.automatic) for part in parts]
                built = [build_part(part, staged.precision, options, timing_cache, state) for part in parts]
                engine, engines = built[-1].file, [path for part in built for path in part.engines]
                if built[-1].unrolled_steps != job.unroll:
                    # What was left out does not build the next time either.
                    command_line = _reproduction_command({**given, "unroll": built[-1].unrolled_steps or (0,)})
                    checker = dataclasses.replace(checker, again=command_line)
                    proof = dataclasses.replace(proof, again=command_line) if proof else None
                if data_set and runs_here(options):
                    proof = _proven_engine(checker, created, engines)
            if proof:
                checker.write_reports(proof, created, engine, engines)
        except CheckFailed:
            # Ranges and a plan cost minutes and are good whatever came of them.
            staging.settle(lambda name: ".rejected." in name or name.endswith((".calibration.json", ".plan.json")))
            raise
        settled = staging.settle()
    print(f"Written: {', '.join(path.name for path in settled)}.")
    if proof:
        print(f"{proof.sentence()} {job.beside('passport.html')} tells all.")
    else:
        log.warning("Parity was not checked: pass --data DIR to prove on its queries that nothing was lost.")
    if engine and not runs_here(options):
        suggest_next_command("runtime.describe", job.output)
    elif data_set:
        first = annotations[0]
        words = ("--model", job.output, "--data", data, "--video", first.video, "--query", first.sentence)
        suggest_next_command("runtime.infer", *words)
    else:
        suggest_next_command("export.verify", "--reference", source, "--model", job.twin, "--data", "DIR")
    print(job.output)
    return job.output


def _with_short(
    job: BuildConfig, short: Unrolling, table: Path | None, plan: Path | None, timing_cache: Path | None
) -> BuildConfig:
    """Return the job with engines for short queries; OutputError where one of their files cannot be written."""
    if short.steps == job.unroll:
        return job
    job = dataclasses.replace(job, unroll=short.steps)
    job.check_outputs(table, plan, timing_cache)
    return job


def _writable_out(short: Unrolling, graph: onnx.ModelProto) -> Unrolling:
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
    """Return the proof of a twin that has its precision and answers as FP32; None without queries.

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
        name = require_precision(converted.census, job.precision, attainable)
    except CheckFailed as error:
        converted.save(rejected)
        raise CheckFailed(
            f"{error} It is kept as {rejected.name}; keep fewer modules, or, where the network itself is too small for "
            f"{job.precision}, build fp16.",
            code=error.code,
        ) from error
    if converted.census.share(job.precision) < MIN_SHARES[job.precision]:
        log.warning(
            "%s: the network is so narrow that at most %.1f %% can be; FP16 or FP32 may be as fast, so measure them.",
            name,
            100 * attainable,
        )
    if not checker.data_set:
        return None
    proof = dataclasses.replace(checker.judge_twin(converted), precision=name)
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


def _proven_engine(checker: ParityChecker, converted: ConvertedModel, engines: Sequence[Path]) -> ParityReport:
    """Return the proof of an engine that answers as FP32 on this machine's GPU.

    Args:
        checker: holds the engine against the FP32 graph.
        converted: the twin.
        engines: every plan that was built, what runs last.

    Raises:
        CheckFailed: it does not; it is then kept as rejected.
    """
    proof = checker.judge_engine(converted)
    print(proof.text())
    if proof.broken:
        retained = [mark_rejected(engine) for engine in engines]
        proof = dataclasses.replace(proof, model=ModelFile.of(retained[-1], converted.manifest))
        checker.write_reports(proof, converted, None)
        raise CheckFailed(
            f"{proof.sentence()} Its twin does, so the engine's kernels lose it; build it with another "
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
        return target, "the twin is the model, and ONNX Runtime optimises it for the machine that loads it."
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


# Options of a build that concern an extractor of clip features too.
OF_EXTRACTORS = frozenset(
    ("model", "precision", "target", "output", "batch", "keep", "optimization_level", "workspace", "timing_cache",
     "version_compatible", "hardware_compatible", "tf32", "compute_capability", "threads", "dry_run")
)  # fmt: skip


def _check_extractor(given: Mapping[str, Any]) -> None:
    """Raise GroundingError where an extractor was given together with what it has no use for."""
    name = given["model"].name
    if given["precision"] not in FEATURE_TOLERANCES:
        raise GroundingError(
            f"{name} makes clip features, and is built in {', '.join(FEATURE_TOLERANCES)}; {given['precision']} needs "
            "ranges, which are measured on queries.",
            code="precision_unsupported",
        )
    parameters = inspect.signature(build_engine).parameters
    others = [
        f"--{option.replace('_', '-')}"
        for option, parameter in parameters.items()
        if option not in OF_EXTRACTORS and given[option] != parameter.default
    ]
    if others:
        raise GroundingError(
            f"{', '.join(others)}: of a DRN, and {name} makes clip features; leave it out.", code="inapplicable_option"
        )


def _reproduction_command(given: Mapping[str, Any]) -> str:
    """Return the command that builds the same again: all that was given and is not the default."""
    words: list[Any] = ["python", "-m", "export.build_engine"]
    for name, parameter in inspect.signature(build_engine).parameters.items():
        value = given[name]
        if name == "dry_run" or value is None or (value == parameter.default and name not in ALWAYS_SAID):
            continue
        words.append(f"--{name.replace('_', '-')}")
        if isinstance(value, tuple):
            words += value
        elif value is not True:
            words.append(value)
    return shlex.join(map(str, words))


if __name__ == "__main__":
    command(build_engine)
