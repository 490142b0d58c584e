"""`python -m runtime.ground_corpus`: ground queries in many videos, on all cores or GPUs of a machine or cluster."""

from __future__ import annotations

from pathlib import Path

from runtime.backends.base import Device
from runtime.core.cli import command, report_many_written, report_written, suggest_next_command
from runtime.core.errors import check_option
from runtime.corpus.job import Result, ground
from runtime.corpus.sharding import MANIFEST, Form, Settings
from runtime.grounding.grounder import BATCH_SIZE


def ground_corpus(
    model: Path,
    features: Path,
    queries: Path,
    output: Path,
    *,
    format: Form = "jsonl",
    actors: int | None = None,
    address: str | None = None,
    device: Device = "cpu",
    threads: int = 1,
    shard_pairs: int = 5000,
    top_k: int = 5,
    batch_size: int = BATCH_SIZE,
    window: float | None = None,
    overlap: float | None = None,
) -> Result:
    """Ground queries in every video of a corpus, and write the moments in shards.

    Repeat the same command to resume an interrupted run: complete shards are skipped.

    Example:
        python -m runtime.ground_corpus --model drn.query.onnx --features charades --queries queries.jsonl --output run

    Args:
        model: .onnx, .engine or .pt file. For a split model give the query part, so that each video is encoded
            once.
        features: directory of a data set, directory of .npy, .npz or .pt files with durations.json, or Parquet
            files.
        queries: JSONL file with one query per line: {"query", "vid", "qid"}. A query without vid is grounded in
            every video.
        output: directory for the shards and corpus.json.
        format: file format of the shards.
        actors: number of worker processes, each with its own model. Default: as many as the GPUs
            or cores suffice for. 0 uses this process, without Ray.
        address: address of a running Ray cluster, or auto. Default: start Ray on this machine for this run.
        device: device that runs the model; with cuda each process uses one GPU.
        threads: number of CPU threads per process.
        shard_pairs: maximum number of query-video pairs per shard. An interruption loses only the unfinished
            shards.
        top_k: maximum number of moments per pair.
        batch_size: number of pairs per batch.
        window: window length in seconds. A longer video is grounded in overlapping windows, and their results are
            merged; 0 turns windows off. Default: set by the model.
        overlap: overlap of adjacent windows, in seconds. Default: set by the model, or half a window.
    """
    check_option("--actors", actors, 0)
    check_option("--threads", threads, 1)
    check_option("--shard-pairs", shard_pairs, 1)
    check_option("--top-k", top_k, 1)
    check_option("--batch-size", batch_size, 1)
    settings = Settings(format, shard_pairs, top_k, batch_size, window, overlap, device, threads)
    result = ground(model, features, queries, output, settings, actors=actors, address=address)
    print(result)
    report_written(output / MANIFEST)
    report_many_written("shard", result.written)
    report_many_written("digest", result.digests)
    suggest_next_command("runtime.describe", model)
    return result


if __name__ == "__main__":
    command(ground_corpus)
