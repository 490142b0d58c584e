"""Measure the time of decoding and NMS inside the graph against NumPy, and compare the moments on a data set."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.measurement import environment, interleave, medians, print_report
from calib.graph.moments import COUNT, moment_graph
from calib.graph.onnx_session import open_session
from calib.graph.opset import MIN_OPSET
from export.tracing.moment_check import decode_moments, equal_moments
from runtime.core.batch import DURATION, HEAD_NAMES, MOMENT_COUNT, MOMENTS, Batch, Heads
from runtime.core.cli import command
from runtime.core.decoding import decode
from runtime.core.io.atomic_files import check_writable, write_json
from runtime.datasets.dataset import DataSet
from runtime.grounding.evaluation import batches_of
from runtime.grounding.grounder import Grounder

OUTPUTS = [MOMENTS, MOMENT_COUNT]
NUMPY, GRAPH = "decoding in NumPy", "decoding in ONNX Runtime"
NETWORK, COMPLETE = "network alone", "graph with moments"
# The network takes a hundred times as long as decoding.
NETWORK_SHARE = 10


def moments_in_graph(
    model: Path,
    data: Path,
    *,
    split: str = "test",
    limit: int | None = None,
    sizes: tuple[int, ...] = (1, 32),
    samples: int = 200,
    threads: int = 1,
    output: Path | None = None,
) -> dict[str, Any]:
    """Compare the moments of drn.moments.onnx with those of the runtime, then time both.

    Args:
        model: drn.onnx, with its drn.moments.onnx in the same directory.
        data: directory of a data set.
        split: split of the queries.
        limit: maximum number of queries to compare.
        sizes: numbers of queries that run together.
        samples: samples of the time of decoding; the network has a tenth of them.
        threads: number of CPU threads.
        output: JSON file for the report.
    """
    check_writable(output)
    grounder, data_set = Grounder.load(model, "cpu", threads), DataSet(data)
    annotations = data_set.annotations(split, invalid="drop", quiet=True)[:limit]
    network = open_session(model, threads, optimized=True)
    complete = open_session(model.with_suffix(".moments.onnx"), threads, optimized=True)
    equal = 0
    for rows, batch in batches_of(grounder, data_set, annotations):
        durations = np.array([data_set.durations[annotations[row].video] for row in rows], np.float32)
        *heads, moments, counts = complete.run([*HEAD_NAMES, *OUTPUTS], {**vars(batch), DURATION: durations})
        expected = decode_moments(Heads(*heads), grounder.manifest, durations)
        equal += int(equal_moments((moments, counts), expected, durations).sum())

    alone = open_session(moment_graph(grounder.manifest, MIN_OPSET), threads, optimized=True)
    times: dict[str, dict[str, float]] = {}
    for size in sizes:
        _, batch = next(batches_of(grounder, data_set, annotations[:size], size))
        batch = _resized(batch, size)
        heads = Heads(*network.run(list(HEAD_NAMES), vars(batch)))
        durations = np.full(size, 30, np.float32)
        seconds = _times(
            {
                NUMPY: functools.partial(decode, heads, grounder.manifest.decoding, COUNT),
                GRAPH: functools.partial(alone.run, OUTPUTS, {**vars(heads), DURATION: durations}),
            },
            samples,
        ) | _times(
            {
                NETWORK: functools.partial(network.run, list(HEAD_NAMES), vars(batch)),
                COMPLETE: functools.partial(complete.run, OUTPUTS, {**vars(batch), DURATION: durations}),
            },
            max(1, samples // NETWORK_SHARE),
        )
        times[f"us of CPU time per query, {size} at once"] = {
            name: 1e6 * value / size for name, value in seconds.items()
        }
    report = {
        **environment(threads, ("onnxruntime", "numpy")),
        "queries": len(annotations),
        "queries with the moments of the runtime": equal,
        **times,
    }
    print_report(report)
    if output:
        write_json(output, report)
    return report


def _times(calls: dict[str, Callable[[], Any]], samples: int) -> dict[str, float]:
    """Return the median CPU time of each call in seconds; the calls take turns."""
    runs = {name: lambda _, call=call: call() for name, call in calls.items()}
    return medians(interleave(runs, samples, clock=time.process_time))


def _resized(batch: Batch, size: int) -> Batch:
    """Return a batch of `size` queries, which repeats those of a smaller one."""
    return Batch(*(np.resize(values, (size, *values.shape[1:])) for values in vars(batch).values()))


if __name__ == "__main__":
    command(moments_in_graph)
