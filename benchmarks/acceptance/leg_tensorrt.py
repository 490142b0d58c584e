"""Run the leg `tensorrt`: build engines in every precision, verify precision and accuracy, measure speed."""

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

import numpy as np

from benchmarks.acceptance import targets
from benchmarks.acceptance.engines import (
    COMPUTED_ONLY,
    DEFAULT_EFFORT,
    NARROW,
    build,
    build_computed_only,
    built_engine,
    engine_path,
    layers_step,
    make_builder,
    time_rejected,
)
from benchmarks.acceptance.leg_torch import of_one_length, one_query, torch_baselines
from benchmarks.acceptance.run_config import (
    Job,
    benchmark_step,
    device_of,
    fault,
    gpu_absent,
    judge,
    latency_entry,
    latency_table,
    ms,
    need,
    questions,
    run_module,
    skipped,
    take_times,
)
from benchmarks.acceptance.step_log import Found, Leg, Skip, Table, no_promise
from runtime.artifacts.engine_metadata import metadata_path, read_sidecar, with_digest
from runtime.benchmarking import system_info
from runtime.benchmarking.phases import time_phases
from runtime.benchmarking.timing import Call, speed_ratio
from runtime.core.errors import DeviceError
from runtime.core.gpu_info import cuda_gpu
from runtime.core.io.atomic_files import write_json
from runtime.core.io.digests import sha256
from runtime.core.video import Video
from runtime.grounding.grounder import Grounder

# See `benchmarks.acceptance.fault_injection`.
ENGINE_FAULTS = {
    "threads": "threads",
    "fork": "fork",
    "ending": "the process ends under a call",
    "memory": "out of memory",
    "opening": "opening",
}
# Tolerance relative to the largest value: both forms round to half precision, in different orders.
FORM_TOLERANCE = 2e-2
# Batches of the largest size in a throughput measurement.
BULK_BATCHES = 8
PROFILED_RUNS = 20
# Files with tests that need a GPU; collecting the complete suite takes tens of seconds.
GPU_TESTS = tuple(
    Path(__file__).parents[2] / path
    for path in ("tests/runtime/backends/test_tensorrt_backend.py", "tests/parity/test_kernels.py")
)
# Runs of a batch through all phases, of which the first warm up.
PHASE_RUNS, WARM_UP_RUNS = 40, 10
PRECISIONS = ("fp16", "fp32", "int8", "bf16", "fp8")
# Precisions that are also built without a split.
WHOLE = ("fp16", "fp32")
TARGETS: tuple[Literal["tensorrt", "tensorrt-rtx"], ...] = ("tensorrt", "tensorrt-rtx")


def run(job: Job, leg: Leg) -> None:
    """Build engines in every precision, check their layers and parity, and time them against the bar."""
    need(("onnx",), "the leg")
    from export.engine.builder import unavailable_reason

    reasons = {target: unavailable_reason(target) for target in TARGETS}
    ready = [target for target, reason in reasons.items() if reason is None]
    if job.device == "cuda" and cuda_gpu() is None:
        raise Skip("CUDA finds no GPU.")
    if not ready:
        raise Skip(" ".join(str(reason) for reason in reasons.values()))
    for target, reason in reasons.items():
        if reason:
            leg.step(f"{target}", functools.partial(skipped, reason))
    if job.device != "cuda":
        _rehearse_builds(job, leg, ready)
        return
    target = ready[0]
    leg.step("builder", lambda: make_builder(target))
    # The engine of the bar comes first, because time may be short.
    _engines(job, leg, target, PRECISIONS[:1])
    leg.step("layers, fp16", lambda: layers_step(job, target, "fp16"))
    pair, whole = (job.output / target / f"drn.fp16{part}.engine" for part in (".query", ""))
    leg.step("the bar", lambda: _bar(job, pair))
    leg.step("the LSTM as a loop and written out", lambda: _lstm_forms(job, pair))
    leg.step("where the time goes: phases", lambda: _phases(job, pair))
    leg.step("where the time goes: layers", lambda: _engine_profile(job, pair))
    leg.step("rejected engines", lambda: time_rejected(job, target))
    leg.step("fault: GPU absent", functools.partial(_without_gpu, job, pair))
    leg.step("fault: an engine of another version", lambda: _other_version(job, pair))
    for name, said in ENGINE_FAULTS.items():
        leg.step(f"fault: {said}", functools.partial(_engine_fault, job, leg, name, pair))
    leg.step("the bar, torch.compile", lambda: _bar_compiled(job, pair))
    _engines(job, leg, target, PRECISIONS)
    int8 = engine_path(job, target, "int8", split=True)
    leg.step("layers, int8", lambda: layers_step(job, target, "int8"))
    leg.step("the bar, int8", lambda: _bar_row(job, int8))
    computed_only = engine_path(job, target, "int8", split=True, variant=COMPUTED_ONLY)
    leg.step(f"{target}, int8 without stored weights, pair", lambda: build_computed_only(job, leg, target))
    leg.step("the bar, int8 without stored weights", lambda: _bar_row(job, computed_only))
    if job.is_lease:
        thorough = functools.partial(build, job, leg, target, "fp16", split=True, variant=DEFAULT_EFFORT)
        leg.step(f"{target}, fp16, pair, default effort", thorough)
        built = engine_path(job, target, "fp16", split=True, variant=DEFAULT_EFFORT)
        leg.step("the bar, default effort", lambda: _bar_row(job, built))
    engines = {precision: engine_path(job, target, precision, split=True) for precision in PRECISIONS}
    leg.step("speed", lambda: _compare_speeds(job, leg, "fp16", [whole, *(engines[p] for p in ("fp16", *NARROW))]))
    wide = [engines[precision] for precision in ("fp16", "bf16", "fp32")]
    leg.step("speed, other precisions", lambda: _compare_speeds(job, leg, "others", wide))
    leg.step("tests that need a GPU", lambda: _tests(job, leg))
    # The engines of the other library come last.
    for other in ready[1:]:
        _engines(job, leg, other, PRECISIONS)


def _without_gpu(job: Job, pair: Path) -> Found:
    pair = built_engine(pair)
    return gpu_absent(job, pair)


def _engine_fault(job: Job, leg: Leg, name: str, model: Path) -> Found:
    model = built_engine(model)
    return fault(job, leg, name, model)


def _rehearse_builds(job: Job, leg: Leg, ready: Sequence[str]) -> None:
    """Build engines without a GPU, which TensorRT-RTX supports, and do not run them."""
    if "tensorrt-rtx" not in ready:
        raise Skip("Only TensorRT-RTX builds without a GPU, and it cannot be imported.")
    for precision in ("fp16",) if job.small else ("fp16", "fp32"):
        make = functools.partial(build, job, leg, "tensorrt-rtx", precision, split=True)
        leg.step(f"tensorrt-rtx, {precision}, pair", make)
    leg.step("the bar", lambda: skipped("Engines run on a GPU only."))


def _engines(job: Job, leg: Leg, target: str, precisions: Sequence[str]) -> None:
    for precision in precisions:
        for split in (True, False) if precision in WHOLE else (True,):
            what = f"{target}, {precision}, {'pair' if split else 'whole'}"
            built = leg.step(what, functools.partial(build, job, leg, target, precision, split))
            # In a lease a rejected engine is also checked, because there is no time to build another.
            if built or job.is_lease:
                leg.step(f"{what}, answers", functools.partial(_engine_answers, job, target, precision, split))


def _engine_answers(job: Job, target: str, precision: str, split: bool) -> Found:
    """Check the parity of an engine with its ONNX model on the CPU; in a lease, of FP16 with FP32, which is faster."""
    from export.parity.run_parity import load_for_comparison

    path = built_engine(engine_path(job, target, precision, split))
    twin = path.with_name(f"drn.{precision}.onnx")
    if not twin.is_file() or (job.is_lease and precision not in NARROW):
        twin = job.graph
    engine = Grounder.load(path, "cuda")
    return judge(job, load_for_comparison(twin, "cpu", None), engine, precision, (twin.name, path.name))


def _bar(job: Job, pair: Path) -> Found:
    """Time the split FP16 engine against the bar, in turns with torch baselines if torch can be imported."""
    pair = built_engine(pair)
    grounder = Grounder.load(pair, "cuda")
    pairs = questions(job, job.sizes.batches[-1])
    encoded = {id(video): grounder.encode(video) for video, _ in pairs}
    known = [(encoded[id(video)], query) for video, query in pairs]
    ours, one = _one_query(grounder, pairs)
    backend: Any = grounder.backend
    entries, ratios = _against(job, grounder, pairs, ("graphs",))
    alone, gpu = _end_to_end_and_gpu(job, backend, one)
    size = len(known)
    # With several batches, one runs while the previous one is decoded, as in bulk use.
    many = known * BULK_BATCHES
    bulk, one_batch = (
        take_times(job, {ours: Call(lambda _, asked=asked: grounder.ground_batch(asked, batch_size=size))})[ours]
        for asked in (many, known)
    )
    entries += [
        latency_entry(f"{ours}, alone", "end to end", 1, alone),
        latency_entry(ours, "gpu", 1, gpu),
        latency_entry(f"{ours}, one batch", "end to end", size, one_batch),
        latency_entry(f"{ours}, in batches of {size}", "end to end", len(many), bulk),
    ]
    latency, part, rate = entries[-4], entries[-3]["p50_ms"], entries[-1]["queries_per_s"]
    absolute = {
        targets.P50: latency["p50_ms"],
        targets.P99: latency["p99_ms"],
        targets.GPU_PART: part,
        targets.RATE: rate,
    }
    summary = (
        f"One query end to end: p50 {latency['p50_ms']:.3f} ms, p99 {ms(latency['p99_ms'])} ms, on the GPU {part:.3f} "
        f"ms; {rate:,.0f} pairs a second at batch {size}, of {len(many)} pairs of {len({query for _, query in known})} "
        f"sentences. In CUDA graphs: {_graphs(backend._active_plans)}."
    )
    return _judged(job, backend.gpu_name, summary, absolute | ratios, entries, {"the bar": latency_table(entries)})


def _end_to_end_and_gpu(job: Job, backend: Any, call: Call) -> tuple[list[float], list[float]]:
    """Return the seconds of a call by the clock of the host, and those of its part on the GPU."""
    end_to_end = take_times(job, {"call": call})["call"]
    backend.time_gpu(True)
    gpu = take_times(job, {"call": dataclasses.replace(call, device_seconds=lambda: backend.gpu_ms / 1e3)})["call"]
    backend.time_gpu(False)
    return end_to_end, gpu


def _bar_row(job: Job, pair: Path) -> Found:
    """Time one query on another split engine as for the bar, without baselines."""
    grounder = Grounder.load(built_engine(pair), "cuda")
    ours, one = _one_query(grounder, questions(job, job.sizes.batches[-1]))
    alone, gpu = _end_to_end_and_gpu(job, grounder.backend, one)
    entries = [latency_entry(ours, "end to end", 1, alone), latency_entry(ours, "gpu", 1, gpu)]
    summary = f"One query end to end: p50 {ms(entries[0]['p50_ms'])} ms, on the GPU {ms(entries[1]['p50_ms'])} ms."
    return no_promise(summary, {"timings": entries}, {f"the bar: {ours}, {pair.parent.name}": latency_table(entries)})


def _lstm_forms(job: Job, pair: Path) -> Found:
    """Time the network with the LSTM as a loop and unrolled, for queries of the maximum length of each plan."""
    pair = built_engine(pair)
    loop, written = (Grounder.load(pair, "cuda") for _ in range(2))
    backends: dict[str, Any] = {"loop": loop.backend, "written out": written.backend}
    steps = [network.query_length[2] for network in backends["written out"]._active_plans[:-1]]
    if not steps:
        raise Skip("No engine was built for short queries.")
    # The last plan accepts queries of any length.
    backends["loop"]._active_plans = backends["loop"]._active_plans[-1:]
    for backend in backends.values():
        backend.time_gpu(True)
    entries, summary, broken = [], [], []
    for size in dict.fromkeys((1, job.sizes.batches[-1])):
        videos = [video for video, _ in questions(job, size)]
        encoded = {id(video): written.encode(video) for video in {id(video): video for video in videos}.values()}
        slots = {key: slot for slot, key in enumerate(encoded)}
        index = np.array([slots[id(video)] for video in videos], np.int32)
        for tokens in steps:
            words = np.random.default_rng(0).integers(1, len(written.manifest.vocabulary) + 1, (size, tokens))
            inputs = (words.astype(np.int32), np.full(size, tokens, np.int32), list(encoded.values()), index)
            heads = [vars(backend.ask(*inputs)) for backend in backends.values()]
            # np.max propagates NaN, unlike Python's max.
            difference = np.max(
                [np.abs(heads[1][key] - values).max() / np.abs(values).max() for key, values in heads[0].items()]
            )
            if not difference <= FORM_TOLERANCE:
                broken.append(
                    f"unrolled for {tokens} tokens, the heads differ by {difference:.1e} of the largest value"
                )
            calls = {
                f"{form}, {tokens} tokens": Call(
                    functools.partial(_ask, backend, inputs),
                    device_seconds=functools.partial(lambda backend: backend.gpu_ms / 1e3, backend),
                )
                for form, backend in backends.items()
            }
            times = take_times(job, calls)
            entries += [latency_entry(name, "gpu", size, seconds) for name, seconds in times.items()]
            ratio = speed_ratio(*(times[name] for name in reversed(times))).median
            summary.append(f"{ratio:.2f} times as fast for {size} of {tokens} tokens")
    captured = {form: _graphs(backend._active_plans) for form, backend in backends.items()}
    graphs = ", ".join(f"{form}: {found}" for form, found in captured.items())
    sentence = f"Written out, the network is {'; '.join(summary)}. In CUDA graphs: {graphs}."
    title = "the LSTM as a loop and written out"
    return Found(sentence, {"timings": entries, "captured": captured}, broken, tables={title: latency_table(entries)})


def _graphs(networks: Sequence[Any]) -> str:
    """Return whether the runs used CUDA graphs that the runtime captured."""
    if any(hasattr(network._trt, "CudaGraphStrategy") for network in networks):
        return "as TensorRT-RTX decides"
    programs = [program for network in networks for _, program in network.contexts.states.items()]
    return "yes" if programs and all(program.graph is not None for program in programs) else "no"


def _ask(backend: Any, inputs: Sequence[Any], _: object) -> Any:
    return backend.ask(*inputs)


def _bar_compiled(job: Job, pair: Path) -> Found:
    """Time the split FP16 engine in turns with torch.compile, which compiles for minutes."""
    pair = built_engine(pair)
    need(("torch",), "torch.compile")
    grounder = Grounder.load(pair, "cuda")
    entries, ratios = _against(job, grounder, questions(job, job.sizes.batches[-1]), ("compile",))
    summary = f"One query end to end is {ratios[targets.COMPILED]:.1f} times as fast as with torch.compile."
    backend: Any = grounder.backend
    tables = {"the bar: torch.compile": latency_table(entries)}
    return _judged(job, backend.gpu_name, summary, {targets.COMPILED: ratios[targets.COMPILED]}, entries, tables)


def _one_query(grounder: Grounder, pairs: Sequence[tuple[Video, str]]) -> tuple[str, Call]:
    """Return the name and the call of one query on an encoded video, from text to moments."""
    alike = of_one_length(grounder, pairs)
    encoded = {id(video): grounder.encode(video) for video, _ in alike}
    known = [(encoded[id(video)], query) for video, query in alike]
    name = f"{grounder.manifest.precision} pair, encoded videos"
    return name, Call(lambda number: grounder.ground(*known[number % len(known)]))


def _against(
    job: Job, grounder: Grounder, pairs: Sequence[tuple[Video, str]], kinds: Sequence[str]
) -> tuple[list[dict[str, Any]], dict[str, float | None]]:
    """Time one query in turns with torch baselines, and return timings and speed ratios."""
    ours, one = _one_query(grounder, pairs)
    calls = {ours: one}
    if importlib.util.find_spec("torch"):
        from train.backend import open_checkpoint

        calls |= one_query(job, Grounder(open_checkpoint(job.checkpoint, device_of(job))), torch_baselines(job, kinds))
    times = take_times(job, calls)
    entries, ratios = [latency_entry(name, "end to end", 1, seconds) for name, seconds in times.items()], {}
    for entry in entries:
        if entry["case"] != ours:
            ratio = speed_ratio(times[ours], times[entry["case"]])
            entry["times as fast"] = dataclasses.asdict(ratio)
            ratios[entry["case"]] = ratio.median
    return entries, dict(targets.fastest(ratios))


def _judged(
    job: Job,
    gpu: str,
    summary: str,
    found: Mapping[str, float | None],
    timings: Sequence[Mapping[str, Any]],
    tables: Mapping[str, Table],
) -> Found:
    """Compare timings with their bars, which do not apply to a rehearsal. `gpu` is the name that CUDA reports."""
    entries = targets.held(gpu, found)
    values = {"timings": timings, "bars": entries, "conditions": dataclasses.asdict(system_info.conditions("after"))}
    notes = [f"{sentence}." for sentence in targets.missed(entries)] if job.rehearsal else []
    if targets.EAGER not in found and targets.COMPILED not in found:
        notes.append("Without torch baselines, because torch cannot be imported.")
    if any(entry["verdict"] == "not judged" for entry in entries):
        notes.append(f"Absolute bars apply to {', '.join(targets.CLASS)}, not to {gpu}.")
    missed = [] if job.rehearsal else targets.missed(entries)
    return Found(" ".join([summary, *notes]), values, missed, not job.rehearsal, tables)


def _phases(job: Job, pair: Path) -> Found:
    """Measure the phases of one query and of a batch, including encoding of the videos."""
    pair = built_engine(pair)
    grounder = Grounder.load(pair, "cuda")
    spent: dict[int, dict[str, float]] = {}
    for size in dict.fromkeys((1, job.sizes.batches[-1])):
        pairs = questions(job, size)
        splits = [time_phases(grounder, pairs)[1] for _ in range(PHASE_RUNS)][WARM_UP_RUNS:]
        spent[size] = {phase: 1e3 * float(np.median([split[phase] for split in splits])) for phase in splits[0]}
    header = ("phase", *(f"ms, batch {size}" for size in spent), *(f"%, batch {size}" for size in spent))
    sums = {size: sum(phases.values()) for size, phases in spent.items()}
    rows = [
        [
            phase,
            *(ms(phases[phase]) for phases in spent.values()),
            *(f"{100 * phases[phase] / sums[size]:.1f}" for size, phases in spent.items()),
        ]
        for phase in spent[1]
    ]
    summary = "; ".join(
        f"A batch of {size} takes {sums[size]:.3f} ms, {phases['network']:.3f} of them the network with its copies"
        for size, phases in spent.items()
    )
    return no_promise(f"{summary}.", {"ms": spent}, {"phases": (header, rows)})


def _engine_profile(job: Job, pair: Path) -> Found:
    """List the layers that take the most time of one query and of a batch, by TensorRT's profiler."""
    pair = built_engine(pair)
    grounder = Grounder.load(pair, "cuda")
    library = importlib.import_module("tensorrt_rtx" if pair.parent.name == "tensorrt-rtx" else "tensorrt")
    if not hasattr(library, "IProfiler"):
        raise Skip(f"{library.__name__} has no profiler of layers.")

    class Profiler(library.IProfiler):  # type: ignore[misc,name-defined]
        def __init__(self) -> None:
            library.IProfiler.__init__(self)
            self.spent: dict[str, list[float]] = {}

        def report_layer_time(self, layer_name: str, ms: float) -> None:
            self.spent.setdefault(layer_name, []).append(ms)

    summary, values, tables = [], {}, {}
    for size in dict.fromkeys((1, job.sizes.batches[-1])):
        profiler = Profiler()
        _profile(grounder, questions(job, size), profiler)
        if not profiler.spent:
            raise Skip(f"{library.__name__} {library.__version__} reported no layer times.")
        medians = {name: sorted(spent)[len(spent) // 2] for name, spent in profiler.spent.items()}
        total = sum(medians.values())
        top = sorted(medians.items(), key=lambda entry: -entry[1])
        rows = [[name[:120], f"{taken:.4f}", f"{100 * taken / total:.1f}"] for name, taken in top[:20]]
        values[f"ms, batch {size}"] = dict(top)
        tables[f"layers, batch {size}"] = (("layer", "ms", "% of all layers"), rows)
        summary.append(
            f"{len(medians)} layers take {total:.3f} ms at batch {size} without a CUDA graph; the longest is "
            f"{top[0][0][:80]}."
        )
    return no_promise(" ".join(summary), values, tables)


def _profile(grounder: Grounder, pairs: Sequence[tuple[Video, str]], profiler: Any) -> None:
    """Run the network of a batch a few times with a profiler, without a CUDA graph.

    Times of layers are not reported for a captured graph. The context is released afterwards, because TensorRT 8 allows
    one context per profile.
    """
    backend: Any = grounder.backend
    grounder.ground_batch(pairs, batch_size=len(pairs))
    network = backend.network_for(max(len(grounder.encode_query(query)) for _, query in pairs))
    _, program = network.contexts.states.items()[-1]
    program.context.profiler = profiler
    with network.cuda.current():
        for _ in range(PROFILED_RUNS):
            program.context.execute_async_v3(network.buffers.stream)
            network.cuda.synchronize(network.buffers.stream)
    network.contexts.release()


def _other_version(job: Job, pair: Path) -> Found:
    """Open an engine of another version: the expected result is an error with the versions and the build command."""
    pair = built_engine(pair)
    with contextlib.ExitStack() as stack:
        folder = job.output / "another-version"
        stack.callback(shutil.rmtree, folder, True)
        folder.mkdir(exist_ok=True)
        for path in pair.parent.glob("drn.fp16.*"):
            if path.suffix in (".engine", ".onnx", ".json"):
                shutil.copyfile(path, folder / path.name)
        copied = folder / pair.name
        content = dict(read_sidecar(copied).content)
        content["library"] = f"{content['library'].split()[0]} 99.1.0.1"
        content["sha256"] = {**content["sha256"], copied.name: sha256(copied)}
        write_json(metadata_path(copied), with_digest(content))
        try:
            Grounder.load(copied, "cuda")
        except DeviceError as error:
            said = str(error)
        else:
            return Found("", broken=["it was loaded"])
    lacking = [word for word in ("99.1.0.1", "export.build_engine") if word not in said]
    return Found(f"Error: {said}", broken=[f"the message lacks {word}" for word in lacking])


def _tests(job: Job, leg: Leg) -> Found:
    need(("pytest", "hypothesis"), "the test suite")
    summary = run_module(
        job,
        leg,
        "pytest",
        *GPU_TESTS,
        "-m",
        "gpu or trt",
        "-q",
        "-p",
        "no:cacheprovider",
        max_seconds=240,
        ok=(0, 1, 5),
    )
    last = [line for line in summary.splitlines() if line.strip()][-1].strip("= ")
    passed, bad = "passed" in last, "failed" in last or "error" in last
    if not passed and not bad:
        raise Skip(f"No test ran: {last}.")
    return Found(f"{last}.", broken=["tests failed"] if bad else [])


def _compare_speeds(job: Job, leg: Leg, name: str, engines: Sequence[Path]) -> Found:
    """Time engines in turns; those of `fp16` include INT8 and FP8, and eager PyTorch."""
    models = [path for path in engines if path.is_file()]
    if not models:
        raise Skip("No engine was built.")
    narrow = [path for path in models if path.name.split(".")[1] in NARROW]
    if name == "fp16" and importlib.util.find_spec("torch"):
        models.insert(0, job.checkpoint)
    found = benchmark_step(job, leg, f"tensorrt-{name}", models)
    if name != "fp16":
        return found
    # The bar counts the precisions that were timed; the build step reports one that this GPU does not support.
    entries = targets.held("", {targets.NARROW: float(len(narrow))})
    return dataclasses.replace(found, values={**found.values, "bars": entries})
