"""Measure the time per pair of a corpus with one process and with two, in turns, with an untrained network."""

from __future__ import annotations

import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import ray
from tqdm import tqdm

from benchmarks.measurement import environment, sparse_features, write_untrained_model
from benchmarks.multiply_adds import c3d_multiply_adds, drn_multiply_adds
from runtime.core.batch import Heads
from runtime.core.cli import command
from runtime.core.io.atomic_files import check_writable, write_json
from runtime.core.io.digests import json_digest
from runtime.corpus.feature_sources import open_source
from runtime.corpus.queries import Question, read_questions
from runtime.corpus.ray_runner import LOOPBACK_ONLY, NO_STATISTICS, OBJECT_STORE_BYTES, run_on_ray
from runtime.corpus.sharding import Settings, Shard, plan
from runtime.corpus.worker import CorpusJob, Worker
from train.extractors.c3d import C3DConfig
from train.network.model import DRNConfig

WORDS, QUERY_LENGTH, CLIPS, SECONDS = 1301, 7, 110, 30.0


def corpus(
    *,
    videos: int = 12,
    sentences: int = 64,
    rounds: int = 3,
    feature_dim: int = 4096,
    fpn_dim: int = 512,
    output: Path | None = None,
) -> dict[str, Any]:
    """Time shards on one process and on two, with one CPU thread each, and the parts of their time.

    Args:
        videos: number of videos of half a minute; each is a shard.
        sentences: sentences per video.
        rounds: number of turns; the report has medians.
        feature_dim: feature channels D.
        fpn_dim: channels of the pyramid and the heads.
        output: JSON file for the report.
    """
    check_writable(output)
    config = DRNConfig(WORDS, feature_dim=feature_dim, fpn_dim=fpn_dim)
    with tempfile.TemporaryDirectory(prefix="corpus-") as scratch:
        directory = Path(scratch)
        model = write_untrained_model(config, directory / "untrained.onnx")
        queries = _inputs(directory / "features", feature_dim, videos, sentences)
        few, many = (_job(model, directory / "features", queries, directory / name, n) for name, n in
                     (("few", 2), ("many", sentences)))  # fmt: skip
        parts, size = _parts(*few, *many, rounds, config)
        rates = _rates(*many, rounds)
    report = {
        **environment(1),
        "network": {"D": feature_dim, "pyramid": fpn_dim, "words": QUERY_LENGTH, "T": config.num_segments},
        "corpus": {"videos": videos, "sentences of each": sentences, "clips of each": CLIPS},
        "load": os.getloadavg()[0],
        "pairs per second": rates,
        "two processes over one": rates["2"] / rates["1"],
        "ms of processor time": parts,
        "bytes of a row": size,
        "multiply-adds": {
            **drn_multiply_adds(config, QUERY_LENGTH),
            "C3D, a clip": c3d_multiply_adds(C3DConfig()),
        },
    }
    print(json.dumps(report, indent=2))
    if output:
        write_json(output, report)
    return report


def _inputs(directory: Path, dim: int, videos: int, sentences: int) -> Path:
    """Write features and sentences, and return the file of sentences."""
    rng = np.random.default_rng(0)
    directory.mkdir()
    names = [f"video{index:03d}" for index in range(videos)]
    for name in names:
        np.save(directory / f"{name}.npy", sparse_features(rng, CLIPS, dim).astype(np.float16))
    write_json(directory / "durations.json", dict.fromkeys(names, SECONDS))
    queries = directory.parent / "queries.jsonl"
    rows = (" ".join(f"word{word}" for word in rng.integers(1, WORDS + 1, QUERY_LENGTH)) for _ in range(sentences))
    queries.write_text("".join(json.dumps({"query": row}) + "\n" for row in rows), encoding="utf-8")
    return queries


def _job(model: Path, features: Path, queries: Path, output: Path, sentences: int) -> tuple[CorpusJob, list[Shard]]:
    """Return a job with a shard per video, as `runtime.corpus.job.ground` plans it."""
    questions: list[Question] = read_questions(queries)[:sentences]
    common, shards = plan(open_source(features).listing(), questions, sentences)
    output.mkdir()
    write_json(output / "corpus.json", {})
    manifest = json_digest({})
    return CorpusJob(
        model, features, output, tuple(common), len(shards), Settings(shard_pairs=sentences), manifest
    ), shards


def _parts(
    few: CorpusJob, few_shards: list[Shard], many: CorpusJob, many_shards: list[Shard], rounds: int, config: DRNConfig
) -> tuple[dict[str, float], float]:
    """Return milliseconds of processor time, and the bytes of a row with five moments.

    The times are those of a video without its queries, of a pair, and of a pair without the network.
    """
    workers = (
        ("few", Worker(few), few_shards),
        ("many", Worker(many), many_shards),
        ("around", _without_network(Worker(many), config), many_shards),
    )
    seconds: dict[str, list[float]] = {name: [] for name, *_ in workers}
    for turn in tqdm(range(rounds + 1), "timing parts", unit="round", leave=False, disable=None):
        for name, worker, shards in workers:
            for shard in shards[: 4 if turn else 1]:
                spent, size = _run_shard(worker, shard)
                seconds[name].append(spent)
    few_s, many_s, around_s = (float(np.median(values[1:])) for values in seconds.values())
    pair = (many_s - few_s) / (len(many_shards[0]) - len(few_shards[0]))
    milliseconds = {
        "a video": 1e3 * (few_s - len(few_shards[0]) * pair),
        "a pair": 1e3 * pair,
        "a pair, around the network": 1e3 * around_s / len(many_shards[0]),
    }
    # The last shard has the maximum number of moments, because it was written without the network.
    return milliseconds, size / len(many_shards[0])


def _run_shard(worker: Worker, shard: Shard) -> tuple[float, int]:
    """Return the processor seconds and the bytes of a shard."""
    started = time.process_time()
    done = worker(shard)
    seconds = time.process_time() - started
    assert done.problem is None, done.problem
    path = worker.job.path(shard)
    size = path.stat().st_size
    path.unlink()
    return seconds, size


def _without_network(worker: Worker, config: DRNConfig) -> Worker:
    """Replace the network of a worker by constant heads, half of them likely."""
    rng, locations = np.random.default_rng(0), config.num_locations
    heads = Heads(
        rng.standard_normal((64, locations), np.float32),
        rng.uniform(1, 8, (64, locations, 2)).astype(np.float32),
        rng.standard_normal((64, locations), np.float32),
    )
    backend: Any = worker._grounder.backend
    encoded = np.zeros((1, config.feature_dim, config.num_segments), np.float32)
    backend.encode = lambda features: encoded
    backend.ask = lambda tokens, lengths, *_: Heads(*(values[: len(lengths)] for values in vars(heads).values()))
    return worker


def _rates(job: CorpusJob, shards: list[Shard], rounds: int) -> dict[str, float]:
    """Return number of processes to median pairs per second, without the first shard of each process."""
    for name, value in {**NO_STATISTICS, **LOOPBACK_ONLY}.items():
        os.environ.setdefault(name, value)
    ray.init(
        "local", num_cpus=2, include_dashboard=False, logging_level="error", object_store_memory=OBJECT_STORE_BYTES
    )
    rates: dict[int, list[float]] = {1: [], 2: []}
    try:
        for turn in tqdm(range(rounds), "timing processes", unit="round", leave=False, disable=None):
            for actors in ((1, 2), (2, 1))[turn % 2]:
                rates[actors].append(_rate(job, shards, actors))
    finally:
        ray.shutdown()
    return {str(actors): float(np.median(values)) for actors, values in rates.items()}


def _rate(job: CorpusJob, shards: list[Shard], actors: int) -> float:
    """Return the pairs per second of one run."""
    ended, pairs = [], []
    for done in run_on_ray(job, shards, actors, None):
        assert done.problem is None, done.problem
        ended.append(time.monotonic())
        pairs.append(done.pairs)
    for shard in shards:
        job.path(shard).unlink()
    # The first shard of a process includes opening the model; during the last ones, other processes are idle.
    first, last = 2 * actors - 1, len(ended) - actors
    return sum(pairs[first + 1 : last + 1]) / (ended[last] - ended[first])


if __name__ == "__main__":
    command(corpus)
