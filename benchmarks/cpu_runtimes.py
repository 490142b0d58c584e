"""Compare eager PyTorch, torch.compile and model files on CPU cores, as ratios within one run."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.measurement import environment, interleave, medians
from benchmarks.pytorch_baseline import EagerBaseline
from calib.graph.split_model import pair_paths
from runtime import Grounder, Video
from train.checkpoints import Checkpoint

EAGER, COMPILED = "eager PyTorch", "torch.compile"


def compare_runtimes(
    loaded: Checkpoint,
    files: Sequence[Path],
    questions: Sequence[tuple[Video, str]],
    samples: int,
    batch: int,
    threads: int,
) -> dict[str, Any]:
    """Time one query, one query on an encoded video, and a batch on one encoded video, with all models in turns.

    PyTorch runs one query at a time, as mmaction2 does. With one thread, times are CPU time, which excludes other
    processes.

    Args:
        loaded: the checkpoint.
        files: unsplit model files of the same network, with their parts in the same directory.
        questions: videos and queries, at least `samples` and `batch`.
        samples: turns; the result has medians.
        batch: queries of the batch.
        threads: number of CPU threads.
    """
    clock = time.process_time if threads == 1 else time.perf_counter
    eager, compiled = EagerBaseline(loaded), EagerBaseline(loaded, compiled=True)
    # Compiles for all query lengths.
    for question in questions:
        compiled.ground(*question)
    torch_runs = {EAGER: lambda i: eager.ground(*questions[i]), COMPILED: lambda i: compiled.ground(*questions[i])}
    cases: dict[str, dict[str, Any]] = {name: dict(torch_runs) for name in case_names(batch)}
    one, encoded_one, encoded_batch = cases.values()
    for path in files:
        whole, pair = (Grounder.load(file, "cpu", threads) for file in (path, pair_paths(path)[1]))
        encoded = [(pair.encode(video), query) for video, query in questions]
        group = [(encoded[0][0], query) for _, query in questions[:batch]]
        one[path.name] = lambda i, whole=whole: whole.ground(*questions[i])
        encoded_one[path.name] = lambda i, pair=pair, encoded=encoded: pair.ground(*encoded[i])
        encoded_batch[path.name] = lambda i, pair=pair, group=group: pair.ground_batch(group, batch_size=batch)
    seconds = [medians(interleave(runs, samples, max(3, samples // 10), clock)) for runs in cases.values()]
    for name in seconds[-1].keys() - torch_runs.keys():
        seconds[-1][name] /= batch
    measured = dict(zip(cases, seconds, strict=True))
    return {
        **environment(threads, ("torch", "onnxruntime", "openvino", "numpy")),
        "clock": clock.__name__,
        "ms per query": {case: {name: 1e3 * value for name, value in row.items()} for case, row in measured.items()},
        "times eager": {
            case: {name: row[EAGER] / value for name, value in row.items()} for case, row in measured.items()
        },
    }


def case_names(batch: int) -> tuple[str, str, str]:
    """Return the names of the three measurements."""
    return "one query", "one query on an encoded video", f"{batch} queries on one encoded video"
