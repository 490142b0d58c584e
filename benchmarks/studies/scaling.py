"""Measure how processor time grows with segments, query length and queries per video, with an untrained network."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from benchmarks.measurement import (
    environment,
    interleave,
    medians,
    random_encoded_video,
    sparse_features,
    write_untrained_model,
)
from benchmarks.multiply_adds import drn_multiply_adds
from runtime import Grounder
from runtime.backends.onnx_backend import OnnxPair
from runtime.core.cli import check_plots, command
from runtime.core.errors import GroundingError
from runtime.core.io.atomic_files import atomic_write, check_writable, write_json
from train.network.model import DRNConfig

WORDS, QUERY_LENGTH = 1301, 8
SEGMENTS, QUERY_LENGTHS, QUERIES = (32, 64, 128, 256), (2, 4, 8, 16, 32, 64), (1, 2, 4, 8, 16, 32, 64)
# Names in the report.
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
    """Time the two parts of split networks that differ in T only, in ONNX Runtime on this CPU.

    Args:
        segments: values of T; the other measurements use the first.
        feature_dim: feature channels D.
        fpn_dim: channels of the pyramid and the heads.
        samples: runs of each; the report has medians.
        threads: number of CPU threads.
        output: JSON file for the report.
        plot: PNG file for the curves.
    """
    if not segments or any(count < 4 or count % 4 for count in segments):
        raise GroundingError(f"Expected --segments to be multiples of 4, got {segments}.", code="invalid_option")
    check_writable(output, plot)
    check_writable(plot)
    if plot:
        check_plots(plot)
    with tempfile.TemporaryDirectory() as directory:
        parts = {}
        for count in tqdm(segments, "exporting", unit="network", leave=False, disable=None):
            config = DRNConfig(WORDS, num_segments=count, feature_dim=feature_dim, fpn_dim=fpn_dim)
            parts[count] = (config, _opened(config, Path(directory) / f"{count}.onnx", threads))
        seconds = _timed(dict(_runs(parts)), samples)
    first = parts[segments[0]][0]
    curves: dict[str, dict[str, dict[int, float]]] = {}
    for (over, case, value), median in seconds.items():
        curves.setdefault(over, {}).setdefault(case, {})[value] = 1e3 * median
    for queries, encoding in curves[BY_QUERIES][ENCODED_FOR].items():
        curves[BY_QUERIES][ENCODED_FOR][queries] = encoding / queries + curves[BY_QUERIES][EACH][queries]
    report = {
        **environment(threads),
        "network": {"D": feature_dim, "pyramid": fpn_dim, "words": QUERY_LENGTH, "T": first.num_segments},
        "ms": curves,
        "1e6 multiply-adds": {
            count: {part: work / 1e6 for part, work in drn_multiply_adds(config, QUERY_LENGTH).items()}
            for count, (config, _) in parts.items()
        },
    }
    print(_table(curves))
    if output:
        write_json(output, report)
    if plot:
        _draw(curves, first, plot)
    return report


def _opened(config: DRNConfig, path: Path, threads: int) -> OnnxPair:
    """Return an untrained split network."""
    pair = Grounder.load(write_untrained_model(config, path), "cpu", threads).backend
    assert isinstance(pair, OnnxPair)
    return pair


def _runs(
    parts: dict[int, tuple[DRNConfig, OnnxPair]],
) -> Iterator[tuple[tuple[str, str, int], tuple[Callable[[], Any], int]]]:
    """Yield (variable, case, value), and a call with the number that its time is divided by."""
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


def _asking(config: DRNConfig, pair: OnnxPair, queries: int, length: int) -> Callable[[], Any]:
    """Return a call of the query part."""
    video = random_encoded_video(config)
    tokens = np.random.default_rng(0).integers(1, WORDS + 1, (queries, length), dtype=np.int32)
    lengths, index = np.full(queries, length, np.int32), np.zeros(queries, np.int32)
    return lambda: pair.ask(tokens, lengths, [video], index)


def _encoding(config: DRNConfig, pair: OnnxPair) -> Callable[[], Any]:
    """Return a call of the video part."""
    features = sparse_features(np.random.default_rng(0), 1, config.num_segments, config.feature_dim)
    return lambda: pair.encode(features)


def _timed(runs: dict[Any, tuple[Callable[[], Any], int]], samples: int) -> dict[Any, float]:
    """Return the median seconds of each, divided by its number."""
    calls = {key: lambda turn, call=call: call() for key, (call, _) in runs.items()}
    seconds = medians(interleave(calls, samples, clock=time.process_time))
    return {key: seconds[key] / share for key, (_, share) in runs.items()}


def _table(curves: dict[str, dict[str, dict[int, float]]]) -> str:
    lines = []
    for over, cases in curves.items():
        values = list(next(iter(cases.values())))
        lines.append(f"{'ms of processor time':<32}" + "".join(f"{value:>9}" for value in values) + f"  {over}")
        for case, curve in cases.items():
            lines.append(f"  {case:<30}" + "".join(f"{curve[value]:>9.2f}" for value in values))
    return "\n".join(lines)


def _draw(curves: dict[str, dict[str, dict[int, float]]], config: DRNConfig, path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.6), layout="constrained")
    panels = figure.subplots(1, len(curves))
    for axes, (over, cases) in zip(panels, curves.items(), strict=True):
        for case, curve in cases.items():
            axes.plot(list(curve), list(curve.values()), marker="o", markersize=4, label=case)
        axes.set_xscale("log", base=2)
        axes.set_xticks(list(next(iter(cases.values()))))
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.set_ylim(bottom=0)
        axes.set_xlabel("T, segments" if over == BY_SEGMENTS else over)
        axes.set_ylabel("ms")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    defaults = f"D = {config.feature_dim}, {QUERY_LENGTH} words and T = {config.num_segments} unless varied"
    figure.suptitle(f"Processor time of the network, FP32, one CPU: {defaults}", fontsize=10)
    with atomic_write(path) as temporary:
        figure.savefig(temporary, dpi=110, format="png")


if __name__ == "__main__":
    command(growth)
