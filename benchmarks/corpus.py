"""Measure the time per pair of a corpus with one process and with two, and estimate a large corpus.

A fresh network of full size and made-up features: they decide the answers, not the time. One process and two take
turns, on a Ray that is started once for all.
"""

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

from benchmarks.cpu import environment, multiply_adds
from calib.graph.split_model import pair_paths, split_graph, write_split_model
from export.tracing.tracer import export_model
from runtime import Vocabulary
from runtime.artifacts.manifest import Features, Manifest
from runtime.core.batch import Heads
from runtime.core.cli import command
from runtime.core.decoding import Decoding
from runtime.core.io.atomic_files import check_writable, write_json
from runtime.core.io.digests import json_digest
from runtime.corpus.feature_sources import open_source
from runtime.corpus.queries import Question, read_questions
from runtime.corpus.ray_runner import LOOPBACK_ONLY, NO_STATISTICS, OBJECT_STORE_BYTES, run_on_ray
from runtime.corpus.sharding import Settings, Shard, plan
from runtime.corpus.worker import CorpusJob, Worker
from train.c3d import CROP, STRIDE, WINDOW, C3DConfig
from train.network.model import DRNConfig
from train.training.trainer import fresh_model

WORDS, QUERY_LENGTH, CLIPS, SECONDS = 1301, 7, 110, 30.0
FRAMES_A_SECOND = 30
# The shape of what C3D's convolutions see, in frames and in 112 x 112 pixels halved so many times; see
# `train.c3d`.
SEEN = ((1, 1), (1, 2), (2, 4), (2, 4), (4, 8), (4, 8), (8, 16), (8, 16))


def corpus(
    *,
    videos: int = 12,
    sentences: int = 64,
    rounds: int = 3,
    feature_dim: int = 4096,
    fpn_dim: int = 512,
    output: Path | None = None,
) -> dict[str, Any]:
    """Time shards on one process and on two with one CPU thread each, and the parts that their cost is made of.

    Args:
        videos: of half a minute; a shard each.
        sentences: asked of every video.
        rounds: of all that is timed; medians count.
        feature_dim: D.
        fpn_dim: width of the pyramid and the head.
        output: JSON file for the figures.
    """
    check_writable(output)
    config = DRNConfig(WORDS, feature_dim=feature_dim, fpn_dim=fpn_dim)
    with tempfile.TemporaryDirectory(prefix="corpus-") as place:
        directory = Path(place)
        model = _model(config, directory / "fresh.onnx")
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
            **multiply_adds(config, QUERY_LENGTH),
            "C3D, a clip": c3d_multiply_adds(C3DConfig()),
        },
    }
    print(json.dumps(report, indent=2))
    if output:
        write_json(output, report)
    return report


def c3d_multiply_adds(config: C3DConfig) -> float:
    """Return the multiply-adds of the features of one clip."""
    total, before = 0.0, 3
    for channels, (in_time, in_space) in zip(config.widths, SEEN, strict=True):
        places = (WINDOW // in_time) * (CROP[0] // in_space) * (CROP[1] // in_space)
        total += 27 * before * channels * places
        before = channels
    # What the last pooling leaves: one frame of 4 x 4.
    return total + 16 * before * config.dim


def clips_an_hour() -> float:
    """Return the clips of an hour of video."""
    return (3600 * FRAMES_A_SECOND - WINDOW) // STRIDE + 1


def _model(config: DRNConfig, path: Path) -> Path:
    vocabulary = Vocabulary({f"word{index}": index for index in range(1, WORDS + 1)})
    decoding = Decoding(num_segments=config.num_segments, strides=config.strides)
    model = export_model(fresh_model(config, 0), Manifest(vocabulary, decoding, Features(dim=config.feature_dim)))
    write_split_model(*split_graph(model), path)
    return pair_paths(path)[1]


def _inputs(directory: Path, dim: int, videos: int, sentences: int) -> Path:
    """Write features as sparse as C3D's and sentences of every video, and return the file of these."""
    rng = np.random.default_rng(0)
    directory.mkdir()
    names = [f"video{index:03d}" for index in range(videos)]
    for name in names:
        np.save(directory / f"{name}.npy", np.maximum(rng.standard_normal((CLIPS, dim)) - 0.84, 0).astype(np.float16))
    write_json(directory / "durations.json", dict.fromkeys(names, SECONDS))
    queries = directory.parent / "queries.jsonl"
    rows = (" ".join(f"word{word}" for word in rng.integers(1, WORDS + 1, QUERY_LENGTH)) for _ in range(sentences))
    queries.write_text("".join(json.dumps({"query": row}) + "\n" for row in rows), encoding="utf-8")
    return queries


def _job(model: Path, features: Path, queries: Path, output: Path, sentences: int) -> tuple[CorpusJob, list[Shard]]:
    """Return a corpus of a shard for each video, as `runtime.corpus.job.ground` plans it."""
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
    """Return the milliseconds of processor time that a video costs before it is asked, that a pair costs, and how much
    of that is not the network: reading sentences, collating, decoding, NMS and writing the row; and the bytes of a
    row with five moments."""
    asked, alike = Worker(few), Worker(many)
    empty = _without_network(Worker(many), config)
    seconds: dict[str, list[float]] = {"few": [], "many": [], "around": []}
    for turn in tqdm(range(rounds + 1), "timing parts", unit="round", leave=False, disable=None):
        for name, worker, shards in (
            ("few", asked, few_shards),
            ("many", alike, many_shards),
            ("around", empty, many_shards),
        ):
            for shard in shards[: 4 if turn else 1]:
                spent, size = _made(worker, shard)
                seconds[name].append(spent)
    few_s, many_s, around_s = (float(np.median(values[1:])) for values in seconds.values())
    pair = (many_s - few_s) / (len(many_shards[0]) - len(few_shards[0]))
    told = {
        "a video": 1e3 * (few_s - len(few_shards[0]) * pair),
        "a pair": 1e3 * pair,
        "a pair, around the network": 1e3 * around_s / len(many_shards[0]),
    }
    # Of the last that was made, which is without a network, and so with as many moments as there can be.
    return told, size / len(many_shards[0])


def _made(worker: Worker, shard: Shard) -> tuple[float, int]:
    """Return the processor seconds that a shard takes, and its bytes."""
    started = time.process_time()
    done = worker(shard)
    seconds = time.process_time() - started
    assert done.problem is None, done.problem
    path = worker.job.path(shard)
    size = path.stat().st_size
    path.unlink()
    return seconds, size


def _without_network(worker: Worker, config: DRNConfig) -> Worker:
    """Return a worker whose network answers at once, with heads of which half are likely."""
    rng = np.random.default_rng(0)
    locations = sum(config.num_segments // stride for stride in config.strides)
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
    """Return pairs per second against processes, once each has made its first shard: medians over rounds."""
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
    ended, pairs = [], []
    for done in run_on_ray(job, shards, actors, None):
        assert done.problem is None, done.problem
        ended.append(time.monotonic())
        pairs.append(done.pairs)
    for shard in shards:
        job.path(shard).unlink()
    # The first of each process opens the model, and while the last is made the others have nothing to do.
    first, last = 2 * actors - 1, len(ended) - actors
    return sum(pairs[first + 1 : last + 1]) / (ended[last] - ended[first])


if __name__ == "__main__":
    command(corpus)
