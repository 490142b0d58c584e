"""`python -m runtime.ground_corpus`: millions of pairs, on all GPUs or cores of a laptop or a cluster."""

from __future__ import annotations

from pathlib import Path

from runtime.backends.base import Device
from runtime.core.cli import command, suggest_next_command
from runtime.core.errors import GroundingError
from runtime.corpus.job import Result, ground
from runtime.corpus.sharding import Form, Settings
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
    """Ground every sentence of a file in its video, or in all videos, and write the moments in shards. The same command
    goes on after any interruption: a shard whose file is there is not made again.

    Args:
        model: .onnx, .engine or .pt file; of a split model the query part, so that videos are encoded once.
        features: directory of a data set; directory of .npy, .npz or .pt files and durations.json; or Parquet.
        queries: JSONL file, a sentence a line: {"query", "vid", "qid"}. Without vid it is asked of every video.
        output: directory for the shards and corpus.json.
        format: of the shards.
        actors: processes that ground, each with a model of its own: as many as there are GPUs or cores when not given.
            0 grounds in this process, without Ray.
        address: of a running Ray cluster, or auto. Ray starts here, for this job, when not given.
        device: cpu or cuda; with cuda each process takes one GPU.
        threads: CPU threads of each process.
        shard_pairs: most pairs of a shard. What an interruption loses is the shards that were being made.
        top_k: most moments of a pair.
        batch_size: pairs that go through the network together.
        window: seconds; a longer video is grounded in windows of this length. 0 grounds any video whole. The model's
            own when not given.
        overlap: seconds that neighbouring windows share; the model's own, or half a window, when not given.
    """
    for option, value, least in (
        ("--actors", actors, 0), ("--threads", threads, 1), ("--shard-pairs", shard_pairs, 1), ("--top-k", top_k, 1),
        ("--batch-size", batch_size, 1),
    ):  # fmt: skip
        if value is not None and value < least:
            raise GroundingError(f"{option} must be at least {least}, and {value} was given.", code="invalid_option")
    settings = Settings(format, shard_pairs, top_k, batch_size, window, overlap, device, threads)
    result = ground(model, features, queries, output, settings, actors=actors, address=address)
    print(result)
    suggest_next_command("runtime.describe", model)
    return result


if __name__ == "__main__":
    command(ground_corpus)
