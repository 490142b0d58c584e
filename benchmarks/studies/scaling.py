"""Measure how the time of a full-size network grows with segments, query length, batch and queries per video.

Everything takes turns in one run, in random order, and processor time is counted, so that a busy machine disturbs
little. Weights are fresh: they decide the answers, not the time.
"""

from __future__ import annotations

import random
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from benchmarks.cpu import environment, multiply_adds
from calib.graph.split_model import pair_paths, split_graph, write_split_model
from export.tracing.tracer import export_model
from runtime import EncodedVideo, Grounder, Vocabulary
from runtime.artifacts.manifest import Features, Manifest
from runtime.backends.onnxruntime_backend import OnnxRuntimePair
from runtime.core.cli import check_plots, command
from runtime.core.decoding import Decoding
from runtime.core.errors import GroundingError
from runtime.core.io.atomic_files import atomic_write, check_writable, write_json
from train.network.model import DRNConfig
from train.training.trainer import fresh_model

WORDS, QUERY_LENGTH = 1301, 8
SEGMENTS, QUERY_LENGTHS, QUERIES = (32, 64, 128, 256), (2, 4, 8, 16, 32, 64), (1, 2, 4, 8, 16, 32, 64)
# What is timed over these, and the unit of what comes out.
BY_SEGMENTS, BY_LENGTH, BY_QUERIES = "segments", "words of a query", "queries at once"
ENCODE, ONE, MANY = "encode a video", "one query on an encoded video", "32 queries on one, each"
EACH, ENCODED_FOR = "on one encoded video, each", "on one video, encoded for them, each"


def growth(
    *,
    segments: tuple[int, ...] = SEGMENTS,
    feature_dim: int = 4096,
    fpn_dim: int = 512,
    samples: int = 15,
    threads: int = 1,
    output: Path | None = None,
    plot: Path | None = None,
) -> dict[str, Any]:
    """Time the two parts of networks that differ in T alone, on this CPU in ONNX Runtime.

    Args:
        segments: values of T, the first of which is used for all else.
        feature_dim: D.
        fpn_dim: width of the pyramid and the head.
        samples: runs of each; the median counts.
        threads: CPU threads.
        output: JSON file for the figures.
        plot: PNG file for the curves.
    """
    if not segments or any(count < 4 or count % 4 for count in segments):
        raise GroundingError(f"--segments are multiples of 4, and {segments} was given.", code="invalid_option")
    check_writable(output, plot)
    check_writable(plot)
    if plot:
        check_plots(plot)
    with tempfile.TemporaryDirectory() as directory:
        parts = {}
        for count in tqdm(segments, "exporting", unit="network", leave=False, disable=None):
            config = DRNConfig(WORDS, num_segments=count, feature_dim=feature_dim, fpn_dim=fpn_dim)
            parts[count] = (config, _opened(config, Path(directory) / f"{count}.onnx", threads))
        runs = dict(_runs(parts))
        seconds = _timed(runs, samples)
    first = parts[segments[0]][0]
    curves: dict[str, dict[str, dict[int, float]]] = {}
    for (over, case, value), found in seconds.items():
        curves.setdefault(over, {}).setdefault(case, {})[value] = 1e3 * found
    for queries, encoding in curves[BY_QUERIES][ENCODED_FOR].items():
        curves[BY_QUERIES][ENCODED_FOR][queries] = encoding / queries + curves[BY_QUERIES][EACH][queries]
    report = {
        **environment(threads),
        "network": {"D": feature_dim, "pyramid": fpn_dim, "words": QUERY_LENGTH, "T": first.num_segments},
        "ms": curves,
        "1e6 multiply-adds": {
            count: {part: work / 1e6 for part, work in multiply_adds(config, QUERY_LENGTH).items()}
            for count, (config, _) in parts.items()
        },
    }
    print(_table(curves))
    if output:
        write_json(output, report)
    if plot:
        _draw(curves, first, plot)
    return report


def _opened(config: DRNConfig, path: Path, threads: int) -> OnnxRuntimePair:
    """Return the pair of a fresh network of this shape."""
    vocabulary = Vocabulary({f"word{index}": index for index in range(1, WORDS + 1)})
    decoding = Decoding(num_segments=config.num_segments, strides=config.strides)
    model = export_model(fresh_model(config, 0), Manifest(vocabulary, decoding, Features(dim=config.feature_dim)))
    write_split_model(*split_graph(model), path)
    pair = Grounder.load(pair_paths(path)[1], "cpu", threads).backend
    assert isinstance(pair, OnnxRuntimePair)
    return pair


def _runs(
    parts: dict[int, tuple[DRNConfig, OnnxRuntimePair]],
) -> Iterator[tuple[tuple[str, str, int], tuple[Callable[[], Any], int]]]:
    """Yield what is timed: (over what, case, value) to a call and by what its time is divided."""
    for count, (config, pair) in parts.items():
        for case, queries in ((ONE, 1), (MANY, 32)):
            yield (BY_SEGMENTS, case, count), (_asking(config, pair, queries, QUERY_LENGTH), queries)
        yield (BY_SEGMENTS, ENCODE, count), (_encoding(config, pair), 1)
    config, pair = next(iter(parts.values()))
    for length in QUERY_LENGTHS:
        for case, queries in ((ONE, 1), (MANY, 32)):
            yield (BY_LENGTH, case, length), (_asking(config, pair, queries, length), queries)
    for queries in QUERIES:
        yield (BY_QUERIES, EACH, queries), (_asking(config, pair, queries, QUERY_LENGTH), queries)
        yield (BY_QUERIES, ENCODED_FOR, queries), (_encoding(config, pair), 1)


def _asking(config: DRNConfig, pair: OnnxRuntimePair, queries: int, length: int) -> Callable[[], Any]:
    rng = np.random.default_rng(0)
    borders = np.linspace(0, 1, config.num_segments + 1, dtype=np.float32)
    features = rng.standard_normal((config.feature_dim, config.num_segments), np.float32)
    video = EncodedVideo(features, np.stack((borders[:-1], borders[1:]), 1), 30.0)
    tokens = rng.integers(1, WORDS + 1, (queries, length), dtype=np.int32)
    lengths, index = np.full(queries, length, np.int32), np.zeros(queries, np.int32)
    return lambda: pair.ask(tokens, lengths, [video], index)


def _encoding(config: DRNConfig, pair: OnnxRuntimePair) -> Callable[[], Any]:
    values = np.random.default_rng(0).standard_normal((1, config.num_segments, config.feature_dim), np.float32)
    features = np.maximum(values - 0.84, 0)
    return lambda: pair.encode(features)


def _timed(runs: dict[Any, tuple[Callable[[], Any], int]], samples: int) -> dict[Any, float]:
    """Return the median seconds of each; in random order, since whoever comes after finds other caches."""
    seconds: dict[Any, list[float]] = {key: [] for key in runs}
    turns = random.Random(0)
    for _ in tqdm(range(samples + 1), "timing", unit="round", leave=False, disable=None):
        for key in turns.sample(list(runs), len(runs)):
            call, share = runs[key]
            started = time.process_time()
            call()
            seconds[key].append((time.process_time() - started) / share)
    return {key: float(np.median(values[1:])) for key, values in seconds.items()}


def _table(curves: dict[str, dict[str, dict[int, float]]]) -> str:
    lines = []
    for over, cases in curves.items():
        values = list(next(iter(cases.values())))
        lines.append(f"{'ms of processor time':<32}" + "".join(f"{value:>9}" for value in values) + f"  {over}")
        for case, found in cases.items():
            lines.append(f"  {case:<30}" + "".join(f"{found[value]:>9.2f}" for value in values))
    return "\n".join(lines)


def _draw(curves: dict[str, dict[str, dict[int, float]]], config: DRNConfig, path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.6), layout="constrained")
    panels = figure.subplots(1, len(curves))
    for axes, (over, cases) in zip(panels, curves.items(), strict=True):
        for case, found in cases.items():
            axes.plot(list(found), list(found.values()), marker="o", markersize=4, label=case)
        axes.set_xscale("log", base=2)
        axes.set_xticks(list(next(iter(cases.values()))))
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.set_ylim(bottom=0)
        axes.set_xlabel("T, segments" if over == BY_SEGMENTS else over)
        axes.set_ylabel("ms")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    told = f"D = {config.feature_dim}, {QUERY_LENGTH} words and T = {config.num_segments} where not told otherwise"
    figure.suptitle(f"Processor time of the network, FP32, one CPU: {told}", fontsize=10)
    with atomic_write(path) as temporary:
        figure.savefig(temporary, dpi=110, format="png")


if __name__ == "__main__":
    command(growth)
