"""Time calls in turns, describe the machine, and create the models and inputs that benchmarks share."""

from __future__ import annotations

import importlib.metadata
import random
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from runtime.artifacts.encoded_video import EncodedVideo
from runtime.artifacts.manifest import Features, Manifest
from runtime.core.cpu_info import cpu_name
from runtime.core.decoding import Decoding
from runtime.core.tokenizer import Vocabulary

if TYPE_CHECKING:
    from train.network.model import DRNConfig

Name = TypeVar("Name", bound=Hashable)


def environment(threads: int, packages: Sequence[str] = ("torch", "onnxruntime", "numpy")) -> dict[str, Any]:
    """Return date, machine, threads and versions, as every report begins."""
    return {
        "date": date.today().isoformat(),
        "machine": cpu_name(),
        "threads": threads,
        "versions": {name: importlib.metadata.version(name) for name in packages},
    }


def interleave(
    runs: Mapping[Name, Callable[[int], Any]],
    count: int,
    warm_up: int = 1,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[Name, np.ndarray]:
    """Time calls in turns, so that a busy machine slows all of them.

    The order within a turn is random, because a call that empties the caches slows the next one.

    Args:
        runs: name to a function of the turn, from 0 to `count` - 1.
        count: turns that count.
        warm_up: turns before these.
        clock: `time.process_time` excludes other processes.

    Returns:
        Name to (count,) seconds.
    """
    order = random.Random(0)
    seconds: dict[Name, list[float]] = {name: [] for name in runs}
    for turn in range(warm_up + count):
        for name in order.sample(list(runs), len(runs)):
            started = clock()
            runs[name](turn % count)
            seconds[name].append(clock() - started)
    return {name: np.array(values[warm_up:]) for name, values in seconds.items()}


def medians(seconds: Mapping[Name, np.ndarray]) -> dict[Name, float]:
    """Return the median of each."""
    return {name: float(np.median(values)) for name, values in seconds.items()}


def readable(value: Any, width: int = 52) -> str:
    """Return a value of a report as text: four digits, one line per entry of a table."""
    if isinstance(value, dict):
        return "".join(f"\n  {name:<{width}} {readable(entry)}" for name, entry in value.items())
    return format(value, ".4g") if isinstance(value, float) else str(value)


def print_report(report: Mapping[str, Any]) -> None:
    """Print a report of values and tables."""
    for name, value in report.items():
        print(f"{name}: {readable(value)}")


def sparse_features(rng: np.random.Generator, *shape: int) -> np.ndarray:
    """Return random features with about 80 % zeros, as of C3D, float32."""
    return np.maximum(rng.standard_normal(shape, np.float32) - np.float32(0.84), 0)


def random_encoded_video(config: DRNConfig) -> EncodedVideo:
    """Return an encoded video of half a minute."""
    edges = np.linspace(0, 1, config.num_segments + 1, dtype=np.float32)
    features = np.random.default_rng(0).standard_normal((config.feature_dim, config.num_segments), np.float32)
    return EncodedVideo(features, np.stack((edges[:-1], edges[1:]), 1), 30.0)


def write_untrained_model(config: DRNConfig, path: Path) -> Path:
    """Write an untrained split model, whose vocabulary is word1, word2, ..., and return its query part."""
    from calib.graph.split_model import pair_paths, split_graph, write_split_model
    from export.tracing.tracer import export_model
    from train.training.trainer import fresh_model

    vocabulary = Vocabulary({f"word{index}": index for index in range(1, config.vocab_size + 1)})
    decoding = Decoding(num_segments=config.num_segments, strides=config.strides)
    model = export_model(fresh_model(config, 0), Manifest(vocabulary, decoding, Features(dim=config.feature_dim)))
    write_split_model(*split_graph(model), path)
    return pair_paths(path)[1]
