"""Compare training steps with eager steps in mmaction2's style, as ratios of one run.

Both learn from the same batches, which lie ready in memory, and take turns, so that a busy machine slows both alike.
What delivers the batches is timed apart.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.training_baseline import EagerTraining, Sample
from runtime.core.cli import command
from runtime.core.cpu_info import cpu_name
from runtime.core.errors import GroundingError
from runtime.core.io.atomic_files import write_json
from runtime.datasets.dataset import DataSet
from train.backend import torch_device
from train.checkpoints import load_checkpoint
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

# Of a loss, relative: sums in another order, over a few steps.
SAME = 1e-3
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
    """Time training steps of every stage against eager ones, what stage 2 computes once, and the delivery of batches.

    Args:
        data: directory of a data set (docs/formats.md); a small one of full width is made up when not given.
        checkpoint: drn.pt to start from; a fresh network of the published size when not given.
        queries: of the training split that are drawn, at most.
        steps: of each kind and stage; the median counts.
        batch_size: queries per step.
        stages: which stages to time.
        device: cpu, or a GPU, where nothing stands beside our steps.
        threads: CPU threads.
        output: JSON file for the figures.
    """
    torch.set_num_threads(threads)
    target = torch_device(device)
    with tempfile.TemporaryDirectory() as scratch:
        if data is None:
            data = simulate(Path(scratch) / "data", videos=48, seed=0)
        training, config = _load(data, checkpoint, queries, Path(scratch))
        if len(training) < batch_size:
            raise GroundingError(
                f"{data} holds {len(training)} queries, too few for a step; lower --batch-size.", code="too_few_queries"
            )
        model = load_checkpoint(checkpoint).model() if checkpoint else fresh_model(config, 0)
        report: dict[str, Any] = {
            "date": date.today().isoformat(),
            "machine": cpu_name() if target.type == "cpu" else torch.cuda.get_device_name(target),
            "threads": threads,
            "versions": {name: importlib.metadata.version(name) for name in ("torch", "numpy")},
            "queries": len(training),
            "batch size": batch_size,
        }
        epoch = _epoch(training, batch_size, steps + 2)
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
    for name, entry in report.items():
        print(f"{name}: {_readable(entry)}")
    if output:
        write_json(output, report)
    return report


def _load(data: Path, checkpoint: Path | None, queries: int, cache: Path) -> tuple[TrainingData, DRNConfig]:
    data_set = DataSet(data)
    annotations = data_set.annotations("train", invalid="drop")
    # Those of some videos, as many for each video as there are.
    videos = np.random.default_rng(0).permutation(sorted({annotation.video for annotation in annotations}))
    place = {video: index for index, video in enumerate(videos.tolist())}
    annotations = sorted(annotations, key=lambda annotation: place[annotation.video])[:queries]
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
    """Return the indices of so many batches, over as many epochs as it takes."""
    batches: list[np.ndarray] = []
    while len(batches) < steps:
        batches += training.epoch(batch_size, (0, len(batches)))
    return batches[:steps]


def _stage(
    stage: Stage, model: DRN, training: TrainingData, epoch: list[np.ndarray], device: torch.device
) -> dict[str, float]:
    """Return milliseconds per step and what follows from them."""
    trainer = _trainer(stage, model, len(epoch[0]), device)
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
    ours: dict[str, Callable[[int], Any]] = {"ours": lambda i: _take(trainer, batches[i], device)}
    if device.type == "cpu":
        eager = EagerTraining(_copy(model), stage)
        samples = [list(_samples(training, chosen)) for chosen in epoch]
        _check_equal(_trainer(stage, model, len(epoch[0]), device), eager, HostSource(training, device), epoch, samples)
        square = torch.rand(512, 4096), torch.rand(4096, 4096)
        ours |= {"eager": lambda i: eager.step(samples[i]), "gemm": lambda i: square[0] @ square[1]}
    turns = _interleave(ours, len(epoch))
    seconds = {name: float(np.median(taken)) for name, taken in turns.items()}
    # A stage computes its stems once for all of its epochs.
    share = once * len(epoch[0]) / stage.epochs
    step = seconds["ours"] + share
    result = {"ms per step": 1e3 * step}
    if stage.freezes_stem:
        result |= {"of which its share of what is computed once": 1e3 * share, "ms per query, once": 1e3 * once}
    result["multiply-adds per step, 1e9"] = multiply_adds / 1e9
    if device.type == "cpu":
        limit = multiply_adds / (512 * 4096 * 4096) * seconds["gemm"]
        result |= {
            "ms per step, eager": 1e3 * seconds["eager"],
            # Of neighbours in time, since a shared machine is not as fast in all turns.
            "times eager": float(np.median(turns["eager"] / (turns["ours"] + share))),
            "ms at the rate of a large matrix product": 1e3 * limit,
            "of that rate": limit / seconds["ours"],
        }
    return result


def _trainer(stage: Stage, model: DRN, batch_size: int, device: torch.device) -> StageTrainer:
    recipe = RECIPES["mmaction2"]
    settings = TrainingSettings(
        recipe="mmaction2",
        stages=(stage,),
        batch_size=batch_size,
        clip_norm=recipe.clip_norm,
        losses=recipe.losses,
        precision="fp32",
        seed=0,
        faithful=False,
        processes=1,
        synchronised=True,
    )
    trainer = StageTrainer(stage, settings, Processes(), _copy(model).to(device))
    trainer.model.train()
    return trainer


def _copy(model: DRN) -> DRN:
    copy = DRN(model.config)
    copy.load_state_dict(model.state_dict())
    return copy


def _samples(training: TrainingData, chosen: np.ndarray) -> Iterator[Sample]:
    """Yield queries as mmaction2's loader hands them over, one by one."""
    for index in chosen:
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
    """A faster step that learns something else is no gain."""
    for (inputs, truth), published in zip(source.batches(epoch[:2]), samples[:2], strict=True):
        found = trainer.step(inputs, truth)[:3].tolist()
        wanted = list(eager.step(published).values())
        if not np.allclose(found, wanted, rtol=SAME, atol=1e-5):
            raise GroundingError(
                f"Losses of stage {eager.stage.number} differ: {found} here and {wanted} in the eager step; "
                "one of the two is wrong.",
                code="models_differ",
            )


def _take(trainer: StageTrainer, batch: Any, device: torch.device) -> None:
    trainer.step(*batch)
    _finish(device)


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _multiply_adds(trainer: StageTrainer, batch: Any) -> float:
    """Return the multiply-adds that a step does, as torch counts them in matrix products and convolutions."""
    counter = FlopCounterMode(display=False)
    with counter:
        trainer.step(*batch)
    return counter.get_total_flops() / 2


def _interleave(runs: dict[str, Callable[[int], Any]], count: int) -> dict[str, np.ndarray]:
    """Return the seconds of each in every turn but the first two, which warm up."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for index in range(count):
        for name, run in runs.items():
            started = time.perf_counter()
            run(index)
            seconds[name].append(time.perf_counter() - started)
    return {name: np.array(values[2:]) for name, values in seconds.items()}


def _delivery(model: DRN, training: TrainingData, batch_size: int, device: torch.device) -> dict[str, float]:
    """Return how many queries each source delivers in a second, the second time it is asked."""
    sources: dict[str, Callable[[], Source]] = {
        MAP: lambda: HostSource(training, device, workers=0 if device.type == "cpu" else 2),
        MEMORY: lambda: DeviceSource(training, device),
        STEMS: lambda: CachedStemSource(training, _copy(model).to(device), device, None),
    }
    rates = {}
    for name, open_it in sources.items():
        source = open_it()
        epoch = _epoch(training, batch_size, max(40, len(training) // batch_size))
        for _ in range(2):
            started = time.perf_counter()
            for _ in source.batches(epoch):
                pass
            _finish(device)
            rates[name] = batch_size * len(epoch) / (time.perf_counter() - started)
    return rates


def _readable(entry: Any) -> str:
    if isinstance(entry, dict):
        return "".join(f"\n  {name:<46} {_readable(value)}" for name, value in entry.items())
    return format(entry, ".4g") if isinstance(entry, float) else str(entry)


if __name__ == "__main__":
    command(benchmark)
