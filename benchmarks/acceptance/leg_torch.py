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
    LATENCY_HEADER,
    Job,
    annotations_of,
    device_of,
    fault,
    gpu_absent,
    judge,
    latency_row,
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

    from benchmarks.acceptance.torch_baselines import Rival
    from runtime.core.video import Video
    from train.network.model import DRN
    from train.training.dataset import TrainingData
    from train.training.stage_trainer import StageTrainer

# Relative, of losses against float32 on a CPU, over a few steps at the rate that a training begins with. There, at full
# size, float32 with other kernels was seen within 2e-7 and bfloat16 within 2e-3; float16 rounds eight times as finely.
LOSSES = {"fp32": 1e-4, "bf16": 1e-2, "fp16": 2e-3}
LOSS_STEPS = 3
# Halvings of the scale of float16 gradients, from 65,536, until they do not overflow.
MOST_OVERFLOWS = 16
# Relative to the largest value: TF32 and float16 both round to 5e-4, some twenty times over.
RIVALS_AGREE = 2e-2


def run(job: Job, leg: Leg) -> None:
    """Training and answers on CUDA against the CPU, and how fast torch is at its best."""
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
    # Last, since it compiles for minutes.
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
    """Allow TF32 in place of float32, or not; on is what torch comes with, for convolutions."""
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
    """Take the same steps on the CPU in float32 and on the device in `precision`, and compare the losses."""
    import torch

    if precision == "fp16" and job.device == "cpu":
        raise Skip("Mixed precision in fp16 is for CUDA.")
    training = _training(job)
    values: dict[str, Any] = {}
    worst = 0.0
    for number in (1, 2, 3):
        wanted = on_cpu(number)
        with _tf32(precision != "fp32"):
            found = _losses(job, training, number, precision, torch.device(job.device))
        values[f"stage {number}"] = {"cpu fp32": wanted, f"{job.device} {precision}": found}
        away = (abs(ours - theirs) / max(abs(theirs), 1e-9) for ours, theirs in zip(found, wanted))
        worst = max(worst, *away)
    limit = LOSSES[precision]
    # Not `worst > limit`, which a loss that is no number would pass.
    broken = [] if worst <= limit else [f"a loss differs by {worst:.1e} where {limit:g} is allowed"]
    off = ", TF32 off" if precision == "fp32" else ""
    summary = (
        f"{LOSS_STEPS} steps of each stage on {job.device} in {precision}{off}: losses are within {worst:.1e} of the "
    )
    return Found(f"{summary}CPU's in fp32 (relative; {limit:g} allowed).", {**values, "worst": worst}, broken)


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
    """Return the total loss of each of a few steps; stage 1 begins with fresh weights, the others with trained ones."""
    from train.checkpoints import load_checkpoint
    from train.training.batch_sources import HostSource
    from train.training.trainer import fresh_model

    loaded = load_checkpoint(job.checkpoint)
    model = fresh_model(loaded.config, 0) if number == 1 else loaded.model()
    trainer = _trainer(number, precision, model.to(device))
    epoch = training.epoch(16, (0, number))[:LOSS_STEPS]
    losses = []
    for batch in HostSource(training, device).batches(epoch):
        for _ in range(MOST_OVERFLOWS):
            *found, _, taken = trainer.step(*batch).tolist()
            # A step that overflowed was left out, and is taken again at half the scale.
            if taken:
                break
        losses.append(sum(found))
    return losses


def _trainer(number: int, precision: Any, model: DRN) -> StageTrainer:
    from train.training.distributed import Processes
    from train.training.options import TrainingSettings
    from train.training.recipes import RECIPES
    from train.training.stage_trainer import StageTrainer

    recipe = RECIPES["mmaction2"]
    stage = recipe.stages[number - 1]
    # As a training does; at the full rate Adam soon makes a difference of every rounding.
    stage = dataclasses.replace(stage, learning_rate=stage.learning_rate_at(0))
    settings = TrainingSettings(
        recipe="mmaction2",
        stages=(stage,),
        batch_size=16,
        clip_norm=recipe.clip_norm,
        losses=dataclasses.replace(recipe.losses, iou_target="all"),
        precision=precision,
        seed=0,
        faithful=False,
        processes=1,
        synchronised=True,
    )
    trainer = StageTrainer(stage, settings, Processes(), model)
    model.train()
    return trainer


def _torch_answers(job: Job, tf32: bool) -> Found:
    from train.backend import open_checkpoint

    reference = Grounder(open_checkpoint(job.checkpoint, "cpu"))
    with _tf32(tf32):
        other = Grounder(open_checkpoint(job.checkpoint, device_of(job)))
        return judge(job, reference, other, "fp32", ("torch on the CPU", f"torch on {job.device}"))


@dataclasses.dataclass(frozen=True)
class Asked:
    """Some queries for the network: word ids and lengths, and the segments of each query's video."""

    tokens: Any
    lengths: Any
    features: Any
    spans: Any

    @classmethod
    def of(cls, grounder: Grounder, pairs: Sequence[tuple[Video, str]]) -> Asked:
        queries = [grounder.encode_query(query) for _, query in pairs]
        return cls(*vars(collate(queries, [grounder.segments(video) for video, _ in pairs])).values())


def rivals(job: Job, kinds: Sequence[str]) -> dict[str, Rival]:
    """Return ways to run the network in torch; the whole network unless the name says otherwise."""
    import torch

    from benchmarks.acceptance.torch_baselines import Rival
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
        name: Rival(model, kind, dtype, encoded) for kind in kinds for name, (dtype, encoded) in chosen[kind].items()
    }


def torch_speed(job: Job, kinds: Sequence[str]) -> Found:
    """Time torch at its best: network alone by the GPU's events, with copies, and one query from text to moments."""
    from train.backend import open_checkpoint

    if job.device != "cuda":
        if "compile" in kinds:
            raise Skip("torch.compile is timed on a GPU only.")
        kinds = [kind for kind in kinds if kind != "graphs"]
    eager = Grounder(open_checkpoint(job.checkpoint, device_of(job)))
    found, entries, rows, broken = rivals(job, kinds), [], [], []
    # A CPU is so slow in half precision that only its answers are rehearsed.
    timed = {name: rival for name, rival in found.items() if job.device == "cuda" or "FP16" not in name}
    for size in job.sizes.batches:
        asked = Asked.of(eager, questions(job, size))
        if "compile" in kinds and size not in (job.sizes.batches[0], job.sizes.batches[-1]):
            continue
        broken += _disagreeing(eager, found, asked)
        placed = {name: rival.place(asked.features, asked.spans) for name, rival in timed.items()}
        boundaries = {
            "host": {name: Call(functools.partial(_ask, timed[name], asked, place)) for name, place in placed.items()}
        }
        if job.device == "cuda":
            boundaries["gpu"] = {name: _gpu_call(timed[name], asked, place) for name, place in placed.items()}
        for boundary, calls in boundaries.items():
            for name, seconds in take_times(job, calls).items():
                values, row = latency_row(name, boundary, size, seconds)
                entries.append(values)
                rows.append(row)
    for name, seconds in take_times(job, one_query(job, eager, timed)).items():
        values, row = latency_row(name, "end to end", 1, seconds)
        entries.append(values)
        rows.append(row)
    fastest = min((e for e in entries if e["boundary"] == "end to end"), key=lambda e: e["p50_ms"])
    summary = f"One query end to end takes {fastest['p50_ms']:.3f} ms (p50) in torch at its fastest: {fastest['case']}."
    left_out = "" if job.device == "cuda" else " CUDA graphs were left out, which need a GPU."
    title = f"torch: {', '.join(kinds)}"
    return Found(summary + left_out, {"timings": entries}, broken, tables={title: (LATENCY_HEADER, rows)})


def _ask(rival: Rival, asked: Asked, placed: Any, _: object) -> Any:
    return rival.ask(asked.tokens, asked.lengths, placed)


def _gpu_call(rival: Rival, asked: Asked, placed: Any) -> Call:
    """Return a call whose time is what the GPU's events say, inputs on the device, outputs left there."""
    import torch

    inputs = [torch.from_numpy(array).to(rival.device) for array in (asked.tokens, asked.lengths)]
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def run(_: object) -> None:
        begin.record()
        rival.run([*inputs, *placed])
        end.record()
        end.synchronize()

    return Call(run, device_seconds=lambda: begin.elapsed_time(end) / 1e3)


def _disagreeing(eager: Grounder, found: Mapping[str, Rival], asked: Asked) -> list[str]:
    """Return a clause for each rival that answers otherwise: a fast one that is wrong is no rival."""

    batch = Batch(asked.tokens, asked.lengths, asked.features, asked.spans)
    wanted = vars(eager.backend.run(batch))
    broken = []
    for name, rival in found.items():
        heads = vars(rival.heads(batch))
        away = max(float(np.abs(heads[key] - wanted[key]).max() / np.abs(wanted[key]).max()) for key in wanted)
        if not away <= RIVALS_AGREE:
            broken.append(
                f"{name} answers otherwise, by {away:.1e} of the largest value, with {len(asked.lengths)} queries"
            )
    return broken


def one_query(job: Job, eager: Grounder, found: Mapping[str, Rival]) -> dict[str, Call]:
    """Return calls that answer one query, text in and moments out, about videos whose features are pooled already.

    Eager PyTorch as a Grounder has it takes them from the host, as people do; the others have them on the device.
    """

    pairs = of_one_length(eager, questions(job, 64))
    calls = {
        "eager PyTorch, FP32, features from the host": Call(lambda number: eager.ground(*pairs[number % len(pairs)]))
    }
    singles = [Asked.of(eager, [pair]) for pair in pairs]
    for name, rival in found.items():
        placed = [rival.place(asked.features, asked.spans) for asked in singles]

        def answer(number: int, rival: Rival = rival, placed: Any = placed) -> Any:
            video, query = pairs[number % len(pairs)]
            heads = rival.ask(*pad_queries([eager.encode_query(query)]), placed[number % len(pairs)])
            return to_moments(decode(heads, eager.manifest.decoding, 5)[0], video.duration)

        calls[name] = Call(answer)
    return calls


def of_one_length(grounder: Grounder, pairs: Sequence[tuple[Video, str]]) -> list[tuple[Video, str]]:
    """Return the pairs whose queries have as many words as most have: torch.compile takes a minute for each length."""
    lengths = [len(grounder.encode_query(query)) for _, query in pairs]
    chosen = max(set(lengths), key=lengths.count)
    return [pair for pair, length in zip(pairs, lengths) if length == chosen]


def _torch_profile(job: Job) -> Found:
    """Say which kernels take the time of one query in eager mode, and how many there are."""
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
    """Time training steps with `benchmarks.training`, and hold the delivery of batches against them."""
    report = job.output / "training.json"
    words: list[object] = ["--data", job.data, "--checkpoint", job.checkpoint, "--device", job.device]
    words += ["--steps", 2 if job.rehearsal else 40, "--output", report]
    run_module(job, leg, "benchmarks.training", *words, most=240)
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
