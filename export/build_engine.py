"""`python -m export.build_engine`: a checkpoint or a graph becomes an engine in the precision asked for, with proof."""

from __future__ import annotations

import logging
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from export.builder import BuildOptions, cuda_devices, why_not
from export.court import Court
from export.engines import build_part, reject
from export.job import Job, source_graph
from export.made import Made, counted_text, cut_parts, read_source, whole_part
from export.profiles import DEFAULT_BATCH, DEFAULT_QUERY_LENGTH, VIDEOS, profiles
from export.twin import Precision, Wishes, make_twin
from runtime.annotations import DataSet
from runtime.command import command, next_command
from runtime.errors import DeviceError, GroundingError, PromiseBroken

log = logging.getLogger("drn")

Target = Literal["auto", "tensorrt", "tensorrt-rtx", "onnxruntime"]


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
    split: bool = False,
    videos: int = VIDEOS,
    parity_split: str = "test",
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
            modules go back to FP16 until it holds on held-out training videos; then the parity split is the judge.
        split: also cut the model in two, for videos that are asked more than once: MODEL.PRECISION.video, which encodes
            a video, and MODEL.PRECISION.query, which answers and is what runs.
        videos: encoded videos that a split engine keeps on the GPU.
        parity_split: whose queries prove parity.
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
    job = Job(model, precision, chosen, data, output, split)
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
    if videos < 1:
        raise GroundingError(f"--videos must be at least 1, and {videos} was given.")
    job.check_options(options, timing_cache, why)
    shapes = job.early_profiles(batch, query_length)
    if dry_run:
        print(job.describe(why, shapes, options, calib_samples if table is None else None))
        return job.output
    log.info("Target %s: %s", chosen, why)
    data_set = DataSet(data) if data else None
    annotations = data_set.annotations(parity_split)[:limit] if data_set else []
    source = source_graph(job, vocabulary, query_length[2])
    graph, manifest = read_source(source)
    shapes = shapes or profiles(batch, query_length, manifest)
    wishes = Wishes(
        keep, table, plan, calib_samples, calib_method, max_drop, threads, job.beside("calibration.json"),
        job.beside("plan.json"),
    )  # fmt: skip
    twin = make_twin(graph, precision, wishes, data_set, str(source))
    made = Made.of(job, source, graph, twin)
    print(f"{job.twin}: {counted_text(made.census)}, {len(made.content) / source.stat().st_size:.2f} of FP32.")
    again = _again(job, parity_split, limit, max_drop)
    court = Court(job, source, graph, data_set, annotations, parity_split, max_drop, again, threads)
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
    parts = cut_parts(job, made, twin, graph, shapes, videos) if split else [whole_part(job, made, twin, shapes)]
    engine = None
    if chosen != "onnxruntime":
        for part in parts:
            engine = build_part(job, part, options, timing_cache)
        if data_set and cuda_devices():
            proof = court.judge_engine(made)
            print(proof.text())
            if proof.broken:
                kept = [reject(part.engine) for part in parts]
                court.write_reports(proof, made, None)
                raise PromiseBroken(
                    f"{proof.sentence()} Its twin {job.twin.name} does, so its kernels lose it. It is kept as "
                    f"{', '.join(path.name for path in kept)}; build it with another --optimization-level, or keep "
                    "modules."
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


def _again(job: Job, split: str, limit: int | None, max_drop: float) -> str:
    """Return the command that builds the same again."""
    words: list[Any] = ["python", "-m", "export.build_engine", "--model", job.model, "--precision", job.precision]
    words += ["--target", job.target, "--data", job.data, "--output", job.output, "--max-drop", max_drop]
    words += ["--split"] if job.split else []
    words += ["--parity-split", split] if split != "test" else []
    words += ["--limit", limit] if limit else []
    return shlex.join(map(str, words))


if __name__ == "__main__":
    command(build_engine)
