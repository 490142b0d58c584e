"""Compare training steps with eager steps as mmaction2 takes them, in turns on the same batches in memory.

The delivery of batches is timed separately.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.measurement import environment, interleave, medians, print_report
from benchmarks.training_baseline import EagerTraining, Sample
from runtime.core.cli import command
from runtime.core.errors import GroundingError
from runtime.core.io.atomic_files import write_json
from runtime.datasets.dataset import DataSet
from train.backend import torch_device
from train.checkpoints import load_checkpoint
from train.network.losses import LossOptions
from train.network.model import DRN, DRNConfig
from train.simulate import simulate
from train.training.batch_sources import (
    CachedStemSource,
    DeviceSource,
    HostSource,
    Source,
    StemContinuation,
    open_source,
)
from train.training.dataset import TrainingData, pool
from train.training.distributed import Processes
from train.training.options import TrainingSettings
from train.training.recipes import RECIPES, Stage
from train.training.stage_trainer import StageTrainer
from train.training.trainer import fresh_model

# Relative tolerance of a loss after a few steps; sums are in another order.
TOLERANCE = 1e-3
WARM_UP = 2
# Rows, inner size and columns of the matrix product that gives the rate of the machine.
PRODUCT = (512, 4096, 4096)
MAP, MEMORY, STEMS = "from the memory map", "from the device's memory", "stems, computed already"


def benchmark(
    *,
    data: Path | None = None,
    checkpoint: Path | None = None,
    queries: int = 1024,
    steps: int = 12,
    batch_size: int = 16,
    stages: tuple[int, ...] = (1, 2, 3),
    device: str = "cpu",
    threads: int = 1,
    output: Path | None = None,
) -> dict[str, Any]:
    """Time training steps of every stage and eager ones, the cached stem of stage 2, and the delivery of batches.

    Args:
        data: directory of a data set (docs/formats.md). Default: a small simulated one with features of full width.
        checkpoint: drn.pt to start from. Default: an untrained network of the published size.
        queries: maximum number of queries of the training split.
        steps: steps per stage and kind; the report has medians.
        batch_size: queries per step.
        stages: stages to time.
        device: cpu, or cuda, where eager steps are not timed.
        threads: number of CPU threads.
        output: JSON file for the report.
    """
    torch.set_num_threads(threads)
    target = torch_device(device)
    with tempfile.TemporaryDirectory() as scratch:
        if data is None:
            data = simulate(Path(scratch) / "data", videos=48, seed=0)
        training, config = _load(data, checkpoint, queries, Path(scratch))
        if len(training) < batch_size:
            raise GroundingError(
                f"{data} has {len(training)} queries, too few for a step. Pass a smaller --batch-size.",
                code="too_few_queries",
            )
        model = load_checkpoint(checkpoint).model() if checkpoint else fresh_model(config, 0)
        report: dict[str, Any] = {
            **environment(threads, ("torch", "numpy")),
            **({} if target.type == "cpu" else {"machine": torch.cuda.get_device_name(target)}),
            "queries": len(training),
            "batch size": batch_size,
        }
        epoch = _epoch(training, batch_size, steps + WARM_UP)
        for number in stages:
            stage = RECIPES["mmaction2"].stages[number - 1]
            report[f"stage {number}"] = _stage(stage, model, training, epoch, target)
        delivered = _delivery(model, training, batch_size, target)
        report["queries delivered a second"] = delivered
        report["times what steps take"] = {
            f"{name}, stage {number}": delivered[name] * report[f"stage {number}"]["ms per step"] / 1e3 / batch_size
            for number in stages
            for name in ((STEMS,) if number == 2 else (MAP, MEMORY))
        }
    print_report(report)
    if output:
        write_json(output, report)
    return report


def _load(data: Path, checkpoint: Path | None, queries: int, cache: Path) -> tuple[TrainingData, DRNConfig]:
    """Return all queries of some videos of the training split, and the network configuration."""
    data_set = DataSet(data)
    annotations = data_set.annotations("train", invalid="drop")
    names = np.random.default_rng(0).permutation(sorted({annotation.video for annotation in annotations}))
    order = {video: index for index, video in enumerate(names.tolist())}
    annotations = sorted(annotations, key=lambda annotation: order[annotation.video])[:queries]
    vocabulary, features = data_set.vocabulary, data_set.features()
    config = DRNConfig(vocab_size=len(vocabulary), feature_dim=features.dim)
    if checkpoint:
        loaded = load_checkpoint(checkpoint)
        vocabulary, config = loaded.vocabulary, loaded.config
        features = dataclasses.replace(features, pooling=loaded.features.pooling)
    videos = sorted({annotation.video for annotation in annotations})
    pooled = pool(data_set, videos, config.num_segments, features, cache)
    return TrainingData(data_set, annotations, pooled, vocabulary), config


def _epoch(training: TrainingData, batch_size: int, steps: int) -> list[np.ndarray]:
    """Return the indices of `steps` batches, over as many epochs as necessary."""
    batches: list[np.ndarray] = []
    while len(batches) < steps:
        batches += training.epoch(batch_size, (0, len(batches)))
    return batches[:steps]


def _stage(
    stage: Stage, model: DRN, training: TrainingData, epoch: list[np.ndarray], device: torch.device
) -> dict[str, float]:
    """Return milliseconds per step, alone and relative to eager steps and to a matrix product."""
    trainer = stage_trainer(stage, model, len(epoch[0]), device)
    once, source = 0.0, None
    if stage.freezes_stem:
        started = time.perf_counter()
        source = CachedStemSource(training, trainer.model, device, None)
        _finish(device)
        once = (time.perf_counter() - started) / len(training)
        trainer.set_network(StemContinuation(trainer.model))
    source = source or open_source(training, device)
    batches = list(source.batches(epoch))
    multiply_adds = _multiply_adds(trainer, batches[0])
    runs: dict[str, Callable[[int], Any]] = {"ours": lambda i: _take(trainer, batches[i], device)}
    if device.type == "cpu":
        eager = EagerTraining(copy.deepcopy(model), stage)
        samples = [list(_samples(training, indices)) for indices in epoch]
        other = stage_trainer(stage, model, len(epoch[0]), device)
        _check_equal(other, eager, HostSource(training, device), epoch, samples)
        left, right = torch.rand(PRODUCT[:2]), torch.rand(PRODUCT[1:])
        runs |= {"eager": lambda i: eager.step(samples[i]), "gemm": lambda i: left @ right}
    turns = interleave(runs, len(epoch) - WARM_UP, WARM_UP)
    seconds = medians(turns)
    # A stage computes its stems once for all epochs.
    share = once * len(epoch[0]) / stage.epochs
    step = seconds["ours"] + share
    result = {"ms per step": 1e3 * step}
    if stage.freezes_stem:
        result |= {"of which its share of what is computed once": 1e3 * share, "ms per query, once": 1e3 * once}
    result["multiply-adds per step, 1e9"] = multiply_adds / 1e9
    if device.type == "cpu":
        limit = multiply_adds / math.prod(PRODUCT) * seconds["gemm"]
        result |= {
            "ms per step, eager": 1e3 * seconds["eager"],
            # The median of ratios within a turn, because the speed of a shared machine varies.
            "times eager": float(np.median(turns["eager"] / (turns["ours"] + share))),
            "ms at the rate of a large matrix product": 1e3 * limit,
            "of that rate": limit / seconds["ours"],
        }
    return result


def stage_trainer(
    stage: Stage,
    model: DRN,
    batch_size: int,
    device: torch.device,
    precision: Literal["fp32", "bf16", "fp16"] = "fp32",
    losses: LossOptions | None = None,
) -> StageTrainer:
    """Return a trainer of a copy of the model, with the settings of mmaction2's recipe."""
    recipe = RECIPES["mmaction2"]
    settings = TrainingSettings(
        recipe="mmaction2",
        stages=(stage,),
        batch_size=batch_size,
        clip_norm=recipe.clip_norm,
        losses=losses or LossOptions(),
        precision=precision,
        seed=0,
        faithful=False,
        processes=1,
        synchronised=True,
    )
    trainer = StageTrainer(stage, settings, Processes(), copy.deepcopy(model).to(device))
    trainer.model.train()
    return trainer


def _samples(training: TrainingData, indices: np.ndarray) -> Iterator[Sample]:
    """Yield queries one by one, as mmaction2's loader does."""
    for index in indices:
        row = int(training.video_rows[index])
        yield Sample(
            torch.from_numpy(training.queries[index].astype(np.int64)),
            torch.from_numpy(training.features(np.array([row]))[0]),
            torch.from_numpy(training.pooled.spans[row]),
            torch.from_numpy(training.truth[index]),
        )


def _check_equal(
    trainer: StageTrainer, eager: EagerTraining, source: Source, epoch: list[np.ndarray], samples: list[list[Sample]]
) -> None:
    """Raise GroundingError unless the losses of both are equal in two steps."""
    for (inputs, truth), published in zip(source.batches(epoch[:2]), samples[:2], strict=True):
        actual = trainer.step(inputs, truth)[:3].tolist()
        expected = list(eager.step(published).values())
        if not np.allclose(actual, expected, rtol=TOLERANCE, atol=1e-5):
            raise GroundingError(
                f"Expected the losses {expected} of the eager step of stage {eager.stage.number}, got {actual}. "
                "Correct one of the two implementations.",
                code="models_differ",
            )


def _take(trainer: StageTrainer, batch: Any, device: torch.device) -> None:
    trainer.step(*batch)
    _finish(device)


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _multiply_adds(trainer: StageTrainer, batch: Any) -> float:
    """Return the multiply-adds of a step, as torch counts them in matrix products and convolutions."""
    counter = FlopCounterMode(display=False)
    with counter:
        trainer.step(*batch)
    return counter.get_total_flops() / 2


def _delivery(model: DRN, training: TrainingData, batch_size: int, device: torch.device) -> dict[str, float]:
    """Return the queries per second of each source, in its second epoch."""
    sources: dict[str, Callable[[], Source]] = {
        MAP: lambda: HostSource(training, device, workers=0 if device.type == "cpu" else 2),
        MEMORY: lambda: DeviceSource(training, device),
        STEMS: lambda: CachedStemSource(training, copy.deepcopy(model).to(device), device, None),
    }
    rates = {}
    for name, open_named in sources.items():
        source = open_named()
        epoch = _epoch(training, batch_size, max(40, len(training) // batch_size))
        for _ in range(2):
            started = time.perf_counter()
            for _ in source.batches(epoch):
                pass
            _finish(device)
            rates[name] = batch_size * len(epoch) / (time.perf_counter() - started)
    return rates


if __name__ == "__main__":
    command(benchmark)
