"""Leg `tensorrt`: engines in every precision, what they are made of, whether they answer as their twins, the bar."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import importlib.util
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from benchmarks.acceptance.job import (
    LATENCY_HEADER,
    MAX_DROP,
    Job,
    benchmark_step,
    fault,
    gpu_absent,
    judge,
    latency_row,
    ms,
    need,
    questions,
    run_module,
    skipped,
    take_times,
    there,
)
from benchmarks.acceptance.on_torch import of_one_length, one_query, rivals
from benchmarks.acceptance.steps import Found, Leg, Skip, no_promise
from runtime import machine
from runtime.errors import DeviceError
from runtime.files import sha256, write_json
from runtime.grounder import Grounder
from runtime.sidecar import path_beside, read_sidecar, sealed
from runtime.timing import Call, speed_ratio

# Bars in absolute times are for GPUs of this class.
CLASS = ("H100", "H200", "B200", "B300")
ONE_QUERY_P50_MS, ONE_QUERY_P99_MS, GPU_PART_MS, PAIRS_PER_S = 0.25, 0.4, 0.12, 60_000
TIMES_EAGER, TIMES_BEST_TORCH = 20.0, 2.0
PRECISIONS = ("fp16", "fp32", "int8", "bf16", "fp8")
# Precisions that are also built whole, as the ones people compare.
WHOLE = ("fp16", "fp32")
TARGETS: tuple[Literal["tensorrt", "tensorrt-rtx"], ...] = ("tensorrt", "tensorrt-rtx")


def run(job: Job, leg: Leg) -> None:
    """Engines in every precision, what they are made of, whether they answer as their twins, and the bar."""
    need(("onnx",), "the leg")
    from export.builder import why_not

    reasons = {target: why_not(target) for target in TARGETS}
    ready = [target for target, reason in reasons.items() if reason is None]
    if job.device == "cuda":
        from export.builder import cuda_devices

        if not cuda_devices():
            raise Skip("CUDA finds no GPU here.")
    if not ready:
        raise Skip(" ".join(str(reason) for reason in reasons.values()))
    for target, reason in reasons.items():
        if reason:
            leg.step(f"{target}", functools.partial(skipped, reason))
    if job.device != "cuda":
        _rehearse_builds(job, leg, ready)
        return
    target = ready[0]
    # What the bar is about comes first, in case that time is short.
    _engines(job, leg, target, PRECISIONS[:1])
    pair, whole = (job.output / target / f"drn.fp16{part}.engine" for part in (".query", ""))
    leg.step("the bar", lambda: _bar(job, pair))
    leg.step("where the time goes", lambda: _engine_profile(job, pair))
    leg.step("fault: GPU absent", functools.partial(_without_gpu, job, pair))
    leg.step("fault: an engine of another version", lambda: _other_version(job, pair))
    for name, said in (("threads", "threads"), ("fork", "fork"), ("memory", "out of memory"), ("opening", "opening")):
        leg.step(f"fault: {said}", functools.partial(_engine_fault, job, leg, name, pair))
    _engines(job, leg, target, PRECISIONS)
    built = [job.output / target / f"drn.{precision}.query.engine" for precision in PRECISIONS]
    models = [path for path in (whole, *built) if path.is_file()]
    leg.step("speed", lambda: _compare_speeds(job, leg, [job.checkpoint, *models]))
    leg.step("tests that need a GPU", lambda: _tests(job, leg))
    # The other library's engines stand beside, and come last.
    for other in ready[1:]:
        _engines(job, leg, other, PRECISIONS)


def _without_gpu(job: Job, pair: Path) -> Found:
    there(pair)
    return gpu_absent(job, pair)


def _engine_fault(job: Job, leg: Leg, name: str, model: Path) -> Found:
    there(model)
    return fault(job, leg, name, model)


def _rehearse_builds(job: Job, leg: Leg, ready: Sequence[str]) -> None:
    """Build for a GPU that is not here, which TensorRT-RTX can; nothing is run."""
    if "tensorrt-rtx" not in ready:
        raise Skip("Only TensorRT-RTX builds without a GPU, and it cannot be imported.")
    for precision in ("fp16",) if job.small else ("fp16", "fp32"):
        build = functools.partial(_build, job, leg, "tensorrt-rtx", precision, split=True)
        leg.step(f"tensorrt-rtx, {precision}, pair", build)
    leg.step("the bar", lambda: skipped("Engines run on a GPU only."))


def _engines(job: Job, leg: Leg, target: str, precisions: Sequence[str]) -> None:
    for precision in precisions:
        for split in (True, False) if precision in WHOLE else (True,):
            what = f"{target}, {precision}, {'pair' if split else 'whole'}"
            if leg.step(what, functools.partial(_build, job, leg, target, precision, split)):
                leg.step(f"{what}, answers", functools.partial(_engine_answers, job, target, precision, split))


def _engine_path(job: Job, target: str, precision: str, split: bool) -> Path:
    return job.output / target / f"drn.{precision}{'.query' if split else ''}.engine"


def _build(job: Job, leg: Leg, target: Any, precision: Any, split: bool) -> Found:
    """Build an engine, or a pair, and tell what it is made of."""
    from export.builder import BuildOptions, check_options

    capabilities = () if job.device == "cuda" else ("8.6",)
    options = BuildOptions(target=target, precision=precision, profiles=(), compute_capabilities=capabilities)
    try:
        check_options(options)
    except DeviceError as error:
        raise Skip(str(error)) from error
    output = _engine_path(job, target, precision, split)
    largest = str(job.sizes.batches[-1])
    words: list[object] = ["--model", job.graph, "--precision", precision, "--target", target, "--output", output]
    words += ["--data", job.data, "--max-drop", MAX_DROP, "--batch", 1, largest, largest]
    words += ["--calib-samples", job.sizes.calibration]
    words += ["--split"] if split else []
    words += ["--query-length", *job.sizes.query_length]
    words += ["--compute-capability", *capabilities] if capabilities else []
    words += ["--timing-cache", output.with_name("timing.cache")] if target == "tensorrt" else []
    run_module(job, leg, "export.build_engine", *words, most=400)
    parts = [output, output.with_name(output.name.replace(".query.", ".video."))] if split else [output]
    census = {path.name: read_sidecar(path).content["census"] for path in parts}
    layers = [f"{name}: {_layers(counted)}" for name, counted in census.items()]
    size = sum(path.stat().st_size for path in parts) / 1e6
    return Found(f"{size:.1f} MB; {'; '.join(layers)}.", {"census": census})


def _layers(counted: Mapping[str, Any]) -> str:
    engine = counted.get("engine")
    if engine:
        return ", ".join(f"{count} layers in {kind}" for kind, count in engine["layers"].items())
    shares = counted["twin"]["shares"]
    return ", ".join(f"{100 * share:.1f} % in {kind}" for kind, share in shares.items()) + " (the twin's)"


def _engine_answers(job: Job, target: str, precision: str, split: bool) -> Found:
    """Hold an engine against its own twin, as it stands, on the CPU."""
    from export.verify import open_model

    path = _engine_path(job, target, precision, split)
    twin = path.with_name(f"drn.{precision}.onnx")
    engine = Grounder.load(path, "cuda")
    return judge(job, open_model(twin, "cpu", None), engine, precision, (twin.name, path.name))


def _bar(job: Job, pair: Path) -> Found:
    """Time the FP16 pair against the bar, in turns with torch at its best where torch is here."""

    there(pair)
    grounder = Grounder.load(pair, "cuda")
    pairs = questions(job, job.sizes.batches[-1])
    encoded = {id(video): grounder.encode(video) for video, _ in pairs}
    known = [(encoded[id(video)], query) for video, query in pairs]
    alike = [(encoded[id(video)], query) for video, query in of_one_length(grounder, pairs)]
    ours = f"{pair.name}, encoded videos"
    calls: dict[str, Call] = {ours: Call(lambda number: grounder.ground(*alike[number % len(alike)]))}
    notes = []
    if importlib.util.find_spec("torch"):
        from train.backend import open_checkpoint

        eager = Grounder(open_checkpoint(job.checkpoint, "cuda"))
        calls |= one_query(job, eager, rivals(job, ("graphs", "compile")))
    else:
        notes.append("torch cannot be imported, so that nothing stands beside it.")
    entries, rows = [], []
    one = take_times(job, calls)
    for name, seconds in one.items():
        values, row = latency_row(name, "end to end", 1, seconds)
        if name != ours:
            values["times as fast"] = dataclasses.asdict(speed_ratio(one[ours], seconds))
        entries.append(values)
        rows.append(row)
    alone = take_times(job, {ours: calls[ours]})[ours]
    backend: Any = grounder.backend
    backend.time_gpu(True)
    gpu = take_times(job, {ours: dataclasses.replace(calls[ours], told=lambda: backend.gpu_ms / 1e3)})[ours]
    backend.time_gpu(False)
    size = len(known)
    bulk = take_times(job, {ours: Call(lambda _: grounder.ground_batch(known, batch_size=size))})[ours]
    for label, boundary, count, seconds in (
        (f"{ours}, alone", "end to end", 1, alone),
        (ours, "gpu", 1, gpu),
        (ours, "end to end", size, bulk),
    ):
        values, row = latency_row(label, boundary, count, seconds)
        entries.append(values)
        rows.append(row)
    latency, part, rate = entries[-3], entries[-2]["p50_ms"], entries[-1]["queries_per_s"]
    ratios = {e["case"]: e["times as fast"]["median"] for e in entries if "times as fast" in e}
    told = (
        f"One query end to end: p50 {latency['p50_ms']:.3f} ms, p99 {ms(latency['p99_ms'])} ms, on the GPU {part:.3f} "
        f"ms; {rate:,.0f} pairs a second at batch {size}."
    )
    told += "".join(f" {ratio:.1f} times {name}." for name, ratio in ratios.items())
    # As CUDA calls it, which is there where nvidia-smi is not.
    gpu_name = str(backend.gpu_name)
    if not of_class(gpu_name):
        notes.append(f"Bars in absolute times are for {', '.join(CLASS)}, and this is {gpu_name}.")
    missed = missed_bars(gpu_name, latency["p50_ms"], latency["p99_ms"], part, rate, ratios)
    broken = [] if job.rehearsal else missed
    values = {"timings": entries, "conditions": dataclasses.asdict(machine.conditions("after"))}
    return Found(" ".join([told, *notes]), values, broken, not job.rehearsal, (LATENCY_HEADER, rows))


def of_class(gpu: str) -> bool:
    return any(name in gpu for name in CLASS)


def missed_bars(
    gpu: str, p50: float, p99: float | None, part: float, rate: float, ratios: Mapping[str, float]
) -> list[str]:
    """Return a clause for each bar that is missed.

    Args:
        gpu: its name; bars in absolute times hold for those of `CLASS` alone.
        p50, p99, part: milliseconds of one query, end to end and on the GPU.
        rate: pairs a second in bulk.
        ratios: times as fast as each rival.
    """
    missed = []
    if of_class(gpu):
        limits = (("p50", p50, ONE_QUERY_P50_MS), ("p99", p99, ONE_QUERY_P99_MS), ("the GPU part", part, GPU_PART_MS))
        for name, value, most in limits:
            if value is None or not value <= most:
                missed.append(f"{name} of one query is {ms(value)} ms where {most:g} is the bar")
        if not rate >= PAIRS_PER_S:
            missed.append(f"{rate:,.0f} pairs a second where {PAIRS_PER_S:,} is the bar")
    # Rivals run the whole network, as people do; encoded videos are ours, and stand beside.
    for name, ratio in ratios.items():
        least = TIMES_EAGER if name.startswith("eager") else TIMES_BEST_TORCH
        if "encoded" not in name and not ratio >= least:
            missed.append(f"{ratio:.1f} times {name} where {least:g} is the bar")
    return missed


def _engine_profile(job: Job, pair: Path) -> Found:
    """Say which layers take the time of one query, from TensorRT's own profiler."""

    there(pair)
    grounder = Grounder.load(pair, "cuda")
    library = importlib.import_module("tensorrt_rtx" if pair.parent.name == "tensorrt-rtx" else "tensorrt")
    if not hasattr(library, "IProfiler"):
        raise Skip(f"{library.__name__} has no profiler of layers.")
    spent: dict[str, list[float]] = {}

    class Profiler(library.IProfiler):  # type: ignore[misc,name-defined]
        def __init__(self) -> None:
            library.IProfiler.__init__(self)

        def report_layer_time(self, layer_name: str, ms: float) -> None:
            spent.setdefault(layer_name, []).append(ms)

    video, query = questions(job, 1)[0]
    known = grounder.encode(video)
    grounder.ground(known, query)
    # What is captured in a graph is not told layer by layer, so the context is run as it is.
    backend: Any = grounder.backend
    network = backend._network
    (program,) = list(network._programs.values())[-1:]
    profiler = Profiler()
    program.context.profiler = profiler
    with network.cuda.current():
        for _ in range(20):
            program.context.execute_async_v3(network._stream)
            network.cuda.synchronize(network._stream)
    if not spent:
        raise Skip(f"{library.__name__} {library.__version__} told the time of no layer.")
    medians = {name: sorted(values)[len(values) // 2] for name, values in spent.items()}
    total = sum(medians.values())
    top = sorted(medians.items(), key=lambda entry: -entry[1])
    rows = [[name[:120], f"{ms:.4f}", f"{100 * ms / total:.1f}"] for name, ms in top[:20]]
    told = f"{len(medians)} layers take {total:.3f} ms without a CUDA graph; the longest is {top[0][0][:80]}."
    return no_promise(told, {"ms": dict(top)}, (("layer", "ms", "%"), rows))


def _other_version(job: Job, pair: Path) -> Found:
    """An engine that another version built: refused with both versions and the command that rebuilds."""

    there(pair)
    with contextlib.ExitStack() as stack:
        place = job.output / "another-version"
        stack.callback(shutil.rmtree, place, True)
        place.mkdir(exist_ok=True)
        for path in pair.parent.glob("drn.fp16.*"):
            if path.suffix in (".engine", ".onnx", ".json"):
                shutil.copyfile(path, place / path.name)
        copied = place / pair.name
        content = dict(read_sidecar(copied).content)
        content["library"] = f"{content['library'].split()[0]} 99.1.0.1"
        content["sha256"] = {**content["sha256"], copied.name: sha256(copied)}
        write_json(path_beside(copied), sealed(content))
        try:
            Grounder.load(copied, "cuda")
        except DeviceError as error:
            said = str(error)
        else:
            return Found("", broken=["it was loaded"])
    lacking = [word for word in ("99.1.0.1", "export.build_engine") if word not in said]
    return Found(f"It says: {said}", broken=[f"the message lacks {word}" for word in lacking])


def _tests(job: Job, leg: Leg) -> Found:
    need(("pytest", "hypothesis"), "the test suite")
    told = run_module(job, leg, "pytest", "-m", "gpu or trt", "-q", "-p", "no:cacheprovider", most=240, ok=(0, 1, 5))
    last = [line for line in told.splitlines() if line.strip()][-1].strip("= ")
    passed, bad = "passed" in last, "failed" in last or "error" in last
    if not passed and not bad:
        raise Skip(f"No test ran: {last}.")
    return Found(f"{last}.", broken=["tests failed"] if bad else [])


def _compare_speeds(job: Job, leg: Leg, models: Sequence[Path]) -> Found:
    if not models[1:]:
        raise Skip("No engine was built.")
    if importlib.util.find_spec("torch") is None:
        models = models[1:]
    return benchmark_step(job, leg, "tensorrt", models)
