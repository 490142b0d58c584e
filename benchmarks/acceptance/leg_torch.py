"""Run the leg `torch`: training and inference on CUDA against the CPU, and the fastest torch."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.acceptance import targets
from benchmarks.acceptance.run_config import (
    Job,
    annotations_of,
    device_of,
    fault,
    gpu_absent,
    judge,
    latency_entry,
    latency_table,
    need,
    questions,
    run_module,
    take_times,
)
from benchmarks.acceptance.step_log import Found, Leg, Skip, no_promise
from runtime.benchmarking import system_info
from runtime.benchmarking.timing import Call
from runtime.core.batch import Batch, collate, pad_queries
from runtime.core.decoding import decode
from runtime.core.moments import to_moments
from runtime.datasets.dataset import DataSet
from runtime.grounding.grounder import Grounder

if TYPE_CHECKING:
    import torch

    from benchmarks.acceptance.torch_baselines import TorchBaseline
    from runtime.core.video import Video
    from train.network.model import DRN
    from train.training.dataset import TrainingData
    from train.training.stage_trainer import StageTrainer

# Relative tolerance of losses to those in float32 on a CPU, over a few steps. Measured there at full size: float32 with
# other kernels 2e-7, bfloat16 2e-3; float16 rounds eight times as finely.
LOSSES = {"fp32": 1e-4, "bf16": 1e-2, "fp16": 2e-3}
# Halvings of the scale of float16 gradients, from 65,536, until they do not overflow.
MAX_OVERFLOWS = 16
# Tolerance relative to the largest value: TF32 and float16 both round to 5e-4, about twenty times in sequence.
BASELINE_TOLERANCE = 2e-2


def run(job: Job, leg: Leg) -> None:
    """Compare training and heads on CUDA with the CPU, and time the fastest torch baselines."""
    need(("torch",), "the leg")
    import torch

    if job.device == "cuda" and not torch.cuda.is_available():
        raise Skip(f"torch {torch.__version__} finds no GPU.")
    leg.step("machine", lambda: _torch_machine(job))
    wanted = functools.cache(functools.partial(_losses_on_cpu, job))
    for precision in ("fp32", "bf16", "fp16"):
        leg.step(f"losses, {precision}", functools.partial(_compare_losses, job, precision, wanted))
    leg.step("answers, TF32 off", lambda: _torch_answers(job, tf32=False))
    leg.step("answers, as torch comes", lambda: _torch_answers(job, tf32=True))
    leg.step("speed", lambda: torch_speed(job, ("eager", "graphs")))
    leg.step("where the time goes", lambda: _torch_profile(job))
    leg.step("fault: GPU absent", lambda: gpu_absent(job, job.checkpoint))
    leg.step("fault: threads", lambda: fault(job, leg, "threads", job.checkpoint, needs_gpu=False))
    leg.step("fault: fork", lambda: fault(job, leg, "fork", job.checkpoint))
    leg.step("fault: out of memory", lambda: fault(job, leg, "memory", job.checkpoint))
    leg.step("training speed", lambda: _training_speed(job, leg))
    # Last, because it compiles for minutes.
    leg.step("speed, torch.compile", lambda: torch_speed(job, ("compile",)))


def _torch_machine(job: Job) -> Found:
    import torch

    if job.device != "cuda":
        return no_promise(f"torch {torch.__version__} on the CPU.")
    name, capability = torch.cuda.get_device_name(), torch.cuda.get_device_capability()
    conditions = dataclasses.asdict(system_info.conditions("before"))
    summary = f"torch {torch.__version__}, CUDA {torch.version.cuda}, {name}, compute capability {capability}."
    return no_promise(summary, {"conditions": conditions})


@contextlib.contextmanager
def _tf32(on: bool) -> Iterator[None]:
    """Keep torch's default, which allows TF32 in convolutions, or turn TF32 off."""
    import torch

    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    if not on:
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def _losses_on_cpu(job: Job, number: int) -> list[float]:
    import torch

    return _losses(job, _training(job), number, "fp32", torch.device("cpu"))


def _compare_losses(job: Job, precision: str, on_cpu: Callable[[int], list[float]]) -> Found:
    """Compare the losses of the same steps on the CPU in float32 and on the device in `precision`."""
    import torch

    if precision == "fp16" and job.device == "cpu":
        raise Skip("Mixed precision in fp16 is for CUDA.")
    training = _training(job)
    values: dict[str, Any] = {}
    worst = 0.0
    for number in (1, 2, 3):
        expected = on_cpu(number)
        with _tf32(precision != "fp32"):
            actual = _losses(job, training, number, precision, torch.device(job.device))
        values[f"stage {number}"] = {"cpu fp32": expected, f"{job.device} {precision}": actual}
        worst = max(worst, *(abs(loss - other) / max(abs(other), 1e-9) for loss, other in zip(actual, expected)))
    limit = LOSSES[precision]
    # Not `worst > limit`, which is false for NaN.
    broken = [] if worst <= limit else [f"a loss differs by {worst:.1e} where {limit:g} is allowed"]
    off = ", TF32 off" if precision == "fp32" else ""
    summary = (
        f"Steps of each stage on {job.device} in {precision}{off}, {job.sizes.loss_steps} each: losses are within "
    )
    return Found(
        f"{summary}{worst:.1e} of the CPU's in fp32 (relative; {limit:g} allowed).", {**values, "worst": worst}, broken
    )


def _training(job: Job) -> TrainingData:
    from train.checkpoints import load_checkpoint
    from train.training.dataset import TrainingData, pool

    loaded = load_checkpoint(job.checkpoint)
    known = annotations_of(job, "train")
    videos = sorted({annotation.video for annotation in known})
    data_set = DataSet(job.data)
    pooled = pool(data_set, videos, loaded.config.num_segments, loaded.features, job.data / "cache")
    return TrainingData(data_set, known, pooled, loaded.vocabulary)


def _losses(job: Job, training: TrainingData, number: int, precision: str, device: torch.device) -> list[float]:
    """Return the total loss of a few steps; stage 1 starts from an untrained network, the others from a trained one."""
    from train.checkpoints import load_checkpoint
    from train.training.batch_sources import HostSource
    from train.training.trainer import fresh_model

    loaded = load_checkpoint(job.checkpoint)
    model = fresh_model(loaded.config, 0) if number == 1 else loaded.model()
    trainer = _trainer(number, precision, model, device)
    epoch = training.epoch(16, (0, number))[: job.sizes.loss_steps]
    losses = []
    for batch in HostSource(training, device).batches(epoch):
        for _ in range(MAX_OVERFLOWS):
            *values, _, taken = trainer.step(*batch).tolist()
            # A step that overflowed was skipped, and is repeated at half the scale.
            if taken:
                break
        losses.append(sum(values))
    return losses


def _trainer(number: int, precision: Any, model: DRN, device: torch.device) -> StageTrainer:
    from benchmarks.training import stage_trainer
    from train.network.losses import LossOptions
    from train.training.recipes import RECIPES

    stage = RECIPES["mmaction2"].stages[number - 1]
    # As at the start of a training; at the full rate, Adam amplifies every rounding.
    stage = dataclasses.replace(stage, learning_rate=stage.learning_rate_at(0))
    return stage_trainer(stage, model, 16, device, precision, LossOptions("all"))


def _torch_answers(job: Job, tf32: bool) -> Found:
    from train.backend import open_checkpoint

    reference = Grounder(open_checkpoint(job.checkpoint, "cpu"))
    with _tf32(tf32):
        other = Grounder(open_checkpoint(job.checkpoint, device_of(job)))
        return judge(job, reference, other, "fp32", ("torch on the CPU", f"torch on {job.device}"))


@dataclasses.dataclass(frozen=True)
class QueryInputs:
    """Inputs of the network: word ids and lengths of queries, and the segments of the video of each query."""

    tokens: Any
    lengths: Any
    features: Any
    spans: Any

    @classmethod
    def of(cls, grounder: Grounder, pairs: Sequence[tuple[Video, str]]) -> QueryInputs:
        queries = [grounder.encode_query(query) for _, query in pairs]
        return cls(*vars(collate(queries, [grounder.segments(video) for video, _ in pairs])).values())


def torch_baselines(job: Job, kinds: Sequence[str]) -> dict[str, TorchBaseline]:
    """Return baselines that run the network in torch, with encoded videos if the name says so."""
    import torch

    from benchmarks.acceptance.torch_baselines import TorchBaseline
    from train.checkpoints import load_checkpoint

    model = load_checkpoint(job.checkpoint).model().to(job.device)
    half, single = torch.float16, torch.float32
    chosen = {
        "eager": {"eager PyTorch, FP32": (single, False), "eager PyTorch, FP16": (half, False)},
        "graphs": {
            "CUDA graphs, FP32": (single, False),
            "CUDA graphs, FP16": (half, False),
            "CUDA graphs, FP16, encoded videos": (half, True),
        },
        "compile": {
            "torch.compile, FP32": (single, False),
            "torch.compile, FP16": (half, False),
            "torch.compile, FP16, encoded videos": (half, True),
        },
    }
    return {
        name: TorchBaseline(model, kind, dtype, encoded)
        for kind in kinds
        for name, (dtype, encoded) in chosen[kind].items()
    }


def torch_speed(job: Job, kinds: Sequence[str]) -> Found:
    """Time torch baselines: the network by GPU events, with copies, and one query from text to moments."""
    from train.backend import open_checkpoint

    if job.device != "cuda":
        if "compile" in kinds:
            raise Skip("torch.compile is timed on a GPU only.")
        kinds = [kind for kind in kinds if kind != "graphs"]
    eager = Grounder(open_checkpoint(job.checkpoint, device_of(job)))
    baselines, entries, broken = torch_baselines(job, kinds), [], []
    # A CPU is too slow in half precision for timing.
    timed = {name: baseline for name, baseline in baselines.items() if job.device == "cuda" or "FP16" not in name}
    for size in job.sizes.batches:
        inputs = QueryInputs.of(eager, questions(job, size))
        if "compile" in kinds and size not in (job.sizes.batches[0], job.sizes.batches[-1]):
            continue
        broken += _disagreeing(eager, baselines, inputs)
        on_device = {name: baseline.to_device(inputs.features, inputs.spans) for name, baseline in timed.items()}
        boundaries = {
            "host": {
                name: Call(functools.partial(_ask, timed[name], inputs, arrays)) for name, arrays in on_device.items()
            }
        }
        if job.device == "cuda":
            boundaries["gpu"] = {name: _gpu_call(timed[name], inputs, arrays) for name, arrays in on_device.items()}
        for boundary, calls in boundaries.items():
            times = take_times(job, calls)
            entries += [latency_entry(name, boundary, size, seconds) for name, seconds in times.items()]
    times = take_times(job, one_query(job, eager, timed))
    entries += [latency_entry(name, "end to end", 1, seconds) for name, seconds in times.items()]
    fastest = min((e for e in entries if e["boundary"] == "end to end"), key=lambda e: e["p50_ms"])
    summary = f"One query end to end takes {fastest['p50_ms']:.3f} ms (p50) in torch at its fastest: {fastest['case']}."
    skipped = "" if job.device == "cuda" else " CUDA graphs were skipped, because they need a GPU."
    title = f"torch: {', '.join(kinds)}"
    return Found(summary + skipped, {"timings": entries}, broken, tables={title: latency_table(entries)})


def _ask(baseline: TorchBaseline, inputs: QueryInputs, on_device: Any, _: object) -> Any:
    return baseline.ask(inputs.tokens, inputs.lengths, on_device)


def _gpu_call(baseline: TorchBaseline, inputs: QueryInputs, on_device: Any) -> Call:
    """Return a call that is timed by GPU events, with inputs and outputs in device memory."""
    import torch

    queries = [torch.from_numpy(array).to(baseline.device) for array in (inputs.tokens, inputs.lengths)]
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def run(_: object) -> None:
        begin.record()
        baseline.run([*queries, *on_device])
        end.record()
        end.synchronize()

    return Call(run, device_seconds=lambda: begin.elapsed_time(end) / 1e3)


def _disagreeing(eager: Grounder, baselines: Mapping[str, TorchBaseline], inputs: QueryInputs) -> list[str]:
    """Return a clause for each baseline with other heads."""
    batch = Batch(inputs.tokens, inputs.lengths, inputs.features, inputs.spans)
    expected = vars(eager.backend.run(batch))
    broken = []
    for name, baseline in baselines.items():
        heads = vars(baseline.heads(batch))
        difference = max(
            float(np.abs(heads[key] - expected[key]).max() / np.abs(expected[key]).max()) for key in expected
        )
        if not difference <= BASELINE_TOLERANCE:
            broken.append(
                f"the heads of {name} differ by {difference:.1e} of the largest value at batch {len(inputs.lengths)}"
            )
    return broken


def one_query(job: Job, eager: Grounder, baselines: Mapping[str, TorchBaseline]) -> dict[str, Call]:
    """Return calls of one query from text to moments, on videos with pooled features.

    The features are in host memory for the eager Grounder, and in device memory for the baselines.
    """
    pairs = of_one_length(eager, questions(job, 64))
    calls = {
        "eager PyTorch, FP32, features from the host": Call(lambda number: eager.ground(*pairs[number % len(pairs)]))
    }
    singles = [QueryInputs.of(eager, [pair]) for pair in pairs]
    for name, baseline in baselines.items():
        on_device = [baseline.to_device(inputs.features, inputs.spans) for inputs in singles]

        def answer(number: int, baseline: TorchBaseline = baseline, on_device: Any = on_device) -> Any:
            video, query = pairs[number % len(pairs)]
            heads = baseline.ask(*pad_queries([eager.encode_query(query)]), on_device[number % len(pairs)])
            return to_moments(decode(heads, eager.manifest.decoding, 5)[0], video.duration)

        calls[name] = Call(answer)
    return calls


def of_one_length(grounder: Grounder, pairs: Sequence[tuple[Video, str]]) -> list[tuple[Video, str]]:
    """Return the pairs of the most frequent query length, because torch.compile takes a minute per length."""
    lengths = [len(grounder.encode_query(query)) for _, query in pairs]
    chosen = max(set(lengths), key=lengths.count)
    return [pair for pair, length in zip(pairs, lengths) if length == chosen]


def _torch_profile(job: Job) -> Found:
    """List the kernels that take the most time of one query in eager mode."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    from train.backend import open_checkpoint

    on_gpu = job.device == "cuda"
    grounder = Grounder(open_checkpoint(job.checkpoint, device_of(job)))
    pairs = questions(job, 8)
    for pair in pairs:
        grounder.ground(*pair)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities) as profiler:
        for pair in pairs:
            grounder.ground(*pair)
        if on_gpu:
            torch.cuda.synchronize()
    key = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    events = sorted(profiler.key_averages(), key=lambda event: -getattr(event, key))
    events = [event for event in events if getattr(event, key) > 0]
    total = sum(getattr(event, key) for event in events) / 1e3 / len(pairs)
    count = sum(event.count for event in events) / len(pairs)
    top = [(event.key, getattr(event, key) / 1e3 / len(pairs), event.count / len(pairs)) for event in events[:15]]
    rows = [[name[:100], f"{ms:.4f}", f"{100 * ms / total:.1f}", f"{times:.1f}"] for name, ms, times in top]
    where = "GPU" if on_gpu else "CPU"
    summary = f"A query in eager mode keeps the {where} busy for {total:.3f} ms in {count:.0f} calls."
    values = {"ms": total, "calls": count, "top": [{"name": n, "ms": ms, "calls": c} for n, ms, c in top]}
    header = (f"on the {where}", "ms a query", "% of that", "calls a query")
    return no_promise(summary, values, {"torch in eager mode: where the time goes": (header, rows)})


def _training_speed(job: Job, leg: Leg) -> Found:
    """Time training steps and the delivery of batches with `benchmarks.training`."""
    report = job.output / "training.json"
    words: list[object] = ["--data", job.data, "--model", job.checkpoint, "--device", job.device]
    words += ["--output", report, *(["--steps", 2, "--stages", 1] if job.rehearsal else ["--steps", 40])]
    run_module(job, leg, "benchmarks.training", *words, max_seconds=240)
    found = json.loads(report.read_text(encoding="utf-8"))
    step_ms = found["stage 1"]["ms per step"]
    consumed = 1e3 * found["batch size"] / step_ms
    delivered = max(
        found["queries delivered a second"][key] for key in ("from the memory map", "from the device's memory")
    )
    ratio = delivered / consumed
    summary = (
        f"A step of stage 1 takes {step_ms:.2f} ms; batches are delivered {ratio:.1f} times as fast as it takes them."
    )
    if job.rehearsal:
        return no_promise(summary, found)
    entries = targets.held(found["machine"], {targets.DELIVERY: ratio})
    return Found(summary, {**found, "bars": entries}, targets.missed(entries))
