"""Compare eager PyTorch, torch.compile and model files on CPU cores, as ratios within one run."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.machine_rates import Gemm, Int8Convolution
from benchmarks.measurement import environment, interleave, medians
from benchmarks.pytorch_baseline import EagerBaseline
from calib.graph.onnx_graph import load_onnx
from calib.graph.precision_audit import audit_graph
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
    processes. The limit of a file is the time of its multiply-adds at the rates of this machine in the same turns, and
    of one pass over its weights.

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
    gemm, int8 = Gemm(threads), Int8Convolution(threads)
    machine_runs = {**gemm.runs, **gemm.reading, **int8.runs}
    torch_runs = {EAGER: lambda i: eager.ground(*questions[i]), COMPILED: lambda i: compiled.ground(*questions[i])}
    cases: dict[str, dict[str, Any]] = {name: {**torch_runs, **machine_runs} for name in case_names(batch)}
    one, encoded_one, encoded_batch = cases.values()
    for path in files:
        whole, pair = (Grounder.load(file, "cpu", threads) for file in (path, pair_paths(path)[1]))
        encoded = [(pair.encode(video), query) for video, query in questions]
        group = [(encoded[0][0], query) for _, query in questions[:batch]]
        one[path.name] = lambda i, whole=whole: whole.ground(*questions[i])
        encoded_one[path.name] = lambda i, pair=pair, encoded=encoded: pair.ground(*encoded[i])
        encoded_batch[path.name] = lambda i, pair=pair, group=group: pair.ground_batch(group, batch_size=batch)
    seconds = [medians(interleave(runs, samples, max(3, samples // 10), clock)) for runs in cases.values()]
    machine = [{name: row.pop(name) for name in machine_runs} for row in seconds]
    for path in files:
        seconds[-1][path.name] /= batch
    words = round(sum(len(whole.encode_query(query)) for _, query in questions) / len(questions))
    limits = [
        {path.name: _limit(part(path), words, queries, times, gemm, int8) / row[path.name] for path in files}
        for part, queries, times, row in zip(
            (Path, _query_part, _query_part), (1, 1, batch), machine, seconds, strict=True
        )
    ]
    return {
        **environment(threads, ("torch", "onnxruntime", "openvino", "numpy")),
        "clock": clock.__name__,
        "1e9 multiply-adds per second": {
            "FP32, ONNX Runtime": gemm.rate(machine[-1], Gemm.PACKED) / 1e9,
            "INT8, OpenVINO": int8.rate(machine[-1]) / 1e9,
        },
        "ms per query": {
            case: {name: 1e3 * value for name, value in row.items()} for case, row in zip(cases, seconds, strict=True)
        },
        "times eager": {
            case: {name: row[EAGER] / value for name, value in row.items()}
            for case, row in zip(cases, seconds, strict=True)
        },
        "share of the limit": dict(zip(cases, limits, strict=True)),
    }


def _query_part(path: Path) -> Path:
    return pair_paths(path)[1]


def _limit(
    path: Path, words: int, queries: int, seconds: Mapping[str, float], gemm: Gemm, int8: Int8Convolution
) -> float:
    """Return the seconds per query of a file at the rates of the machine.

    Args:
        path: ONNX file.
        words: words of a query.
        queries: number of queries that share one pass over the weights.
        seconds: times of the runs of `gemm` and `int8`.
    """
    counts = dict(audit_graph(load_onnx(path), words).total())
    arithmetic = counts.pop("int8", 0) / int8.rate(seconds)
    arithmetic += sum(counts.values()) / gemm.rate(seconds, Gemm.PACKED)
    (reading,) = (seconds[name] for name in gemm.reading)
    return arithmetic + path.stat().st_size / Gemm.READ * reading / queries


def case_names(batch: int) -> tuple[str, str, str]:
    """Return the names of the three measurements."""
    return "one query", "one query on an encoded video", f"{batch} queries on one encoded video"
