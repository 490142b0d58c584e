"""Compare grounding on CPU cores with eager PyTorch, as ratios within one run. All models take turns."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.cpu_runtimes import compare_runtimes
from benchmarks.machine_rates import Gemm, Runs
from benchmarks.measurement import environment, interleave, medians, print_report, sparse_features
from benchmarks.multiply_adds import drn_multiply_adds
from benchmarks.pytorch_baseline import EagerBaseline
from benchmarks.training import stage_trainer
from calib.graph.split_model import pair_paths
from runtime import EncodedVideo, Grounder, Video, Vocabulary
from runtime.core.batch import collate, pad_queries
from runtime.core.cli import command
from runtime.core.errors import GroundingError
from runtime.core.io.atomic_files import write_json
from runtime.core.tokenizer import tokenize
from train.checkpoints import Checkpoint, load_checkpoint
from train.network.model import DRNConfig
from train.training.recipes import RECIPES, Stage

EAGER = "eager PyTorch, list NMS"

SENTENCES = (
    "person opens the door",
    "a person is putting a book on a shelf",
    "person turns on the light",
    "person takes a cup from the table",
    "a person is sitting in a chair with a laptop",
    "person closes the refrigerator",
    "person starts eating a sandwich",
    "the person washes the dishes",
)

Pairs = Sequence[tuple[Video, str]]
Seconds = dict[str, float]


def benchmark(
    checkpoint: Path,
    onnx: Path,
    *,
    int8: Path | None = None,
    compare: tuple[Path, ...] = (),
    samples: int = 60,
    batch: int = 32,
    pairs: int = 1000,
    videos: int = 100,
    threads: int = 1,
    training: bool = True,
    output: Path | None = None,
) -> dict[str, Any]:
    """Time queries from text to moments, the share of the network, and training steps.

    If NAME.query.onnx is beside NAME.onnx (`export.to_onnx --split`), encoded videos and many pairs are timed too.

    Args:
        checkpoint: drn.pt of a network of any size.
        onnx: the same network, exported.
        int8: the same network in INT8 (`export.build_engine --precision int8 --target onnxruntime`).
        compare: model files, such as drn.onnx drn.int8.onnx drn.int8.openvino.onnx, with their split parts in the same
            directory: time only these, eager PyTorch and torch.compile.
        samples: queries per model; the report has medians.
        batch: queries of the batched runs.
        pairs: number of pairs of the run with many pairs; 0 to skip it.
        videos: number of videos of these pairs.
        threads: number of CPU threads for every model.
        training: also time training steps (full size: about a minute).
        output: JSON file for the report.
    """
    torch.set_num_threads(threads)
    loaded = load_checkpoint(checkpoint)
    rng = np.random.default_rng(0)
    sentences = _sentences(loaded.vocabulary, rng, max(samples, batch, pairs))
    shown = [_video(rng, loaded.features.dim, index) for index in range(8)]
    questions = [(shown[i % len(shown)], sentences[i]) for i in range(max(samples, batch))]
    if compare:
        return _reported(compare_runtimes(loaded, compare, questions, samples, batch, threads), output)
    models, gemm = Models.open(loaded, onnx, int8, threads), Gemm(threads)
    for grounder in filter(None, (models.fp32, models.split)):
        _check_equal(models.eager, grounder, questions[:16])
    single = medians(interleave(_single_runs(models, questions, gemm), samples, max(3, samples // 10)))
    batched = medians(interleave(_batch_runs(models, questions[:batch], gemm), max(9, samples // batch * 3), 3))
    batched = {name: value / (1 if name in (EAGER, *gemm.runs) else batch) for name, value in batched.items()}
    report: dict[str, Any] = {
        **environment(threads),
        "ms per query, batch 1": _milliseconds(single, gemm),
        f"ms per query, batch {batch}": _milliseconds(batched, gemm),
        "speed-up over eager, batch 1": single[EAGER] / single["ONNX Runtime"],
        f"speed-up over eager, batch {batch}": batched[EAGER] / batched["ONNX Runtime"],
        "all around the network, relative to it": _shares_around(models, questions[:batch], single, batched),
    }
    if models.split:
        report["times eager"] = _times_eager(single, batched, batch)
        if pairs:
            report["times eager"][f"{pairs} pairs over {videos} videos"] = _many_pairs(
                models.eager, models.split, sentences[:pairs], videos, batch
            )
    if models.int8:
        report |= _int8_ratios(single, batched, batch)
    length = float(np.mean([len(models.fp32.encode_query(sentence)) for _, sentence in questions]))
    report["the limit"] = _limits(loaded.model().config, length, (single, batched), gemm, batch)
    if models.split:
        report["the limit"] |= _memory_limit(pair_paths(onnx)[1], single, report["the limit"], gemm)
    if training:
        report["ms per training step of 16"] = {
            f"stage {stage.number}": 1e3 * _step(loaded, stage) for stage in RECIPES["mmaction2"].stages
        }
    return _reported(report, output)


def _reported(report: dict[str, Any], output: Path | None) -> dict[str, Any]:
    print_report(report)
    if output:
        write_json(output, report)
    return report


@dataclasses.dataclass(frozen=True)
class Models:
    """One network as checkpoint, FP32 graph and INT8 graph, and the split models of these if there are any."""

    eager: EagerBaseline
    fp32: Grounder
    split: Grounder | None
    int8: Grounder | None
    int8_split: Grounder | None

    @classmethod
    def open(cls, loaded: Checkpoint, onnx: Path, int8: Path | None, threads: int) -> Models:
        """Open the models, and the query parts beside them."""

        def split_of(path: Path | None) -> Grounder | None:
            part = path and pair_paths(path)[1]
            return Grounder.load(part, "cpu", threads) if part and part.is_file() else None

        split = split_of(onnx)
        return cls(
            EagerBaseline(loaded),
            Grounder.load(onnx, "cpu", threads),
            split,
            Grounder.load(int8, "cpu", threads) if int8 else None,
            split_of(int8) if split else None,
        )


def _single_runs(models: Models, questions: Pairs, gemm: Gemm) -> Runs:
    """Return the runs of one query at a time."""
    runs: Runs = {
        EAGER: lambda i: models.eager.ground(*questions[i]),
        "ONNX Runtime": lambda i: models.fp32.ground(*questions[i]),
        "of which the network": _network(models.fp32, questions, 1),
        **gemm.runs,
        **gemm.reading,
    }
    if int8 := models.int8:
        runs["INT8"] = lambda i: int8.ground(*questions[i])
    if split := models.split:
        encoded = _encoded(split, questions)
        runs["encoded video"] = lambda i: split.ground(*encoded[i])
        runs["encoded video, of which the network"] = _query_part(split, encoded, 1)
    if int8_split := models.int8_split:
        encoded_int8 = _encoded(int8_split, questions)
        runs["INT8, encoded video"] = lambda i: int8_split.ground(*encoded_int8[i])
    return runs


def _batch_runs(models: Models, group: Pairs, gemm: Gemm) -> Runs:
    """Return the runs of a batch, and of one query in eager mode."""
    batch, video = len(group), group[0][0]
    runs: Runs = {
        EAGER: lambda i: models.eager.ground(*group[i % batch]),
        "ONNX Runtime": lambda i: models.fp32.ground_batch(group, batch_size=batch),
        "of which the network": _network(models.fp32, group, batch),
        **gemm.runs,
    }
    if int8 := models.int8:
        runs["INT8"] = lambda i: int8.ground_batch(group, batch_size=batch)
    one_video = [(video, sentence) for _, sentence in group]
    if split := models.split:
        encoded = _encoded(split, one_video)
        runs["one video, encoded for them"] = lambda i: split.ground_batch(_encoded(split, one_video), batch_size=batch)
        runs["one encoded video"] = lambda i: split.ground_batch(encoded, batch_size=batch)
        runs["one encoded video, of which the network"] = _query_part(split, encoded, batch)
    if int8_split := models.int8_split:
        encoded_int8 = _encoded(int8_split, one_video)
        runs["INT8, one encoded video"] = lambda i: int8_split.ground_batch(encoded_int8, batch_size=batch)
    return runs


def _encoded(split: Grounder, pairs: Pairs) -> list[tuple[EncodedVideo, str]]:
    """Return the pairs with encoded videos, each encoded once."""
    encodings = {video.name: split.encode(video) for video in {video.name: video for video, _ in pairs}.values()}
    return [(encodings[video.name], sentence) for video, sentence in pairs]


def _shares_around(models: Models, group: Pairs, single: Seconds, batched: Seconds) -> dict[str, float]:
    """Return the time of everything but the network, relative to that of the network."""
    batch, network = len(group), "of which the network"
    shares = {
        "batch 1": _around(models.fp32, group[:1]) / single[network],
        f"batch {batch}": _around(models.fp32, group) / batch / batched[network],
    }
    if models.split:
        encoded = _encoded(models.split, [(group[0][0], sentence) for _, sentence in group])
        for size, seconds, name in ((1, single, "encoded video"), (batch, batched, "one encoded video")):
            around = _around(models.split, encoded[:size]) / size
            shares[f"encoded video, batch {size}"] = around / seconds[f"{name}, of which the network"]
    return shares


def _times_eager(single: Seconds, batched: Seconds, batch: int) -> dict[str, float]:
    return {
        "one query": single[EAGER] / single["ONNX Runtime"],
        "one query on an encoded video": single[EAGER] / single["encoded video"],
        **{
            f"{batch} queries, {name}": batched[EAGER] / batched[name]
            for name in ("one video, encoded for them", "one encoded video")
        },
    }


def _int8_ratios(single: Seconds, batched: Seconds, batch: int) -> dict[str, dict[str, float]]:
    cases = {
        "one query": (single, "ONNX Runtime", "INT8"),
        "one query on an encoded video": (single, "encoded video", "INT8, encoded video"),
        f"{batch} queries": (batched, "ONNX Runtime", "INT8"),
        f"{batch} queries, one encoded video": (batched, "one encoded video", "INT8, one encoded video"),
    }
    measured = {case: entry for case, entry in cases.items() if entry[2] in entry[0]}
    return {
        "INT8, times FP32": {case: seconds[fp32] / seconds[int8] for case, (seconds, fp32, int8) in measured.items()},
        "INT8, times eager": {case: seconds[EAGER] / seconds[int8] for case, (seconds, _, int8) in measured.items()},
    }


def _limits(
    config: DRNConfig, length: float, measured: tuple[Seconds, Seconds], gemm: Gemm, batch: int
) -> dict[str, Any]:
    """Return the time of the multiply-adds at the rate of a matrix product, relative to the measured time."""
    work = drn_multiply_adds(config, length)
    query = work["first"] + work["rest"]
    needed = {
        "ONNX Runtime": work["video"] + query,
        "encoded video": query,
        "one video, encoded for them": work["video"] / batch + query,
        "one encoded video": query,
    }
    limits: dict[str, Any] = {"mean words of a query": length}
    for label, seconds in zip(("batch 1", f"batch {batch}"), measured, strict=True):
        rate = gemm.rate(seconds)
        limits[f"GEMM, 1e9 multiply-adds a second, {label}"] = rate / 1e9
        packed = gemm.rate(seconds, "GEMM, packed")
        limits[f"GEMM of weights packed ahead, 1e9 multiply-adds a second, {label}"] = packed / 1e9
        for name, count in needed.items():
            if name in seconds:
                limits[f"{name}, {label}: 1e6 multiply-adds"] = count / 1e6
                limits[f"{name}, {label}: ms at that rate"] = 1e3 * count / rate
                limits[f"{name}, {label}: of the limit"] = count / rate / seconds[name]
    return limits


def _memory_limit(query_part: Path, single: Seconds, limits: dict[str, float], gemm: Gemm) -> dict[str, float]:
    """Return the time to read the weights, which one query reads once, so that its arithmetic cannot hide it."""
    label = "encoded video, batch 1"
    reading = query_part.stat().st_size * single["reading memory"] / gemm.READ
    both = 1e-3 * limits[f"{label}: ms at that rate"] + reading
    return {
        f"{label}: ms to read the weights": 1e3 * reading,
        f"{label}: of both together": both / single["encoded video"],
    }


def _many_pairs(eager: EagerBaseline, split: Grounder, sentences: list[str], count: int, batch: int) -> float:
    """Return the speed of many pairs relative to eager mode, in turns of a tenth of the videos."""
    rng = np.random.default_rng(1)
    total, baseline = 0.0, []
    parts = 10 if count >= 10 else 1
    per_part = len(sentences) // parts
    for part in range(parts):
        videos = [_video(rng, split.manifest.features.dim, index) for index in range(count // parts)]
        for video in videos:
            split.segments(video)
        chosen = sentences[part * per_part : (part + 1) * per_part]
        pairs = [(videos[i % len(videos)], sentence) for i, sentence in enumerate(chosen)]
        runs: Runs = {
            "eager": lambda i, pairs=pairs: [eager.ground(*pair) for pair in pairs[:10]],  # type: ignore[misc]
            "split": lambda i, pairs=pairs: split.ground_batch(pairs, batch_size=batch),  # type: ignore[misc]
        }
        seconds = interleave(runs, 1, 0)
        baseline.append(seconds["eager"][0] / len(pairs[:10]))
        total += seconds["split"][0]
    return float(np.median(baseline)) / (total / (parts * per_part))


def _milliseconds(seconds: Seconds, gemm: Gemm) -> dict[str, float]:
    return {name: 1e3 * value for name, value in seconds.items() if name not in (*gemm.runs, *gemm.reading)}


def _sentences(vocabulary: Vocabulary, rng: np.random.Generator, count: int) -> list[str]:
    """Return distinct sentences: real ones if their words are known, then random words."""
    known = [sentence for sentence in SENTENCES if all(word in vocabulary.words for word in sentence.split())]
    # Only words that the tokenizer does not split.
    words = [word for word in vocabulary.words if word.isalpha() and len(tokenize(word)) == 1]
    # Charades-STA queries have 2 to 12 words.
    lengths = np.clip(rng.normal(7, 2, count).round().astype(int), 2, 12)
    sentences = dict.fromkeys(known)
    while len(sentences) < count:
        sentences[" ".join(rng.choice(words, lengths[len(sentences) % count]))] = None
    return list(sentences)[:count]


def _video(rng: np.random.Generator, dim: int, index: int) -> Video:
    """Return a video of half a minute."""
    return Video(sparse_features(rng, 110, dim).astype(np.float16), 896, 30.0, f"video {index}")


def _check_equal(eager: EagerBaseline, grounder: Grounder, pairs: Pairs) -> None:
    """Raise GroundingError unless both models return the same moments."""
    for video, query in pairs:
        expected = eager.ground(video, query)[:5]
        actual = [dataclasses.astuple(moment) for moment in grounder.ground(video, query)]
        if len(expected) != len(actual) or not np.allclose(expected, actual, atol=1e-3):
            raise GroundingError(
                f"The two models return different moments for {query!r}. Pass a checkpoint and its own ONNX file.",
                code="models_differ",
            )


def _network(grounder: Grounder, pairs: Pairs, size: int) -> Callable[[int], Any]:
    """Return a function that runs the network on batches of `size` pairs."""
    batches = [
        collate([grounder.encode_query(q) for _, q in chosen], [grounder.segments(v) for v, _ in chosen])
        for chosen in (pairs[start : start + size] for start in range(0, len(pairs) - size + 1, size))
    ]
    return lambda index: grounder.backend.run(batches[index % len(batches)])


def _query_part(split: Grounder, pairs: Sequence[tuple[EncodedVideo, str]], size: int) -> Callable[[int], Any]:
    """Return a function that runs the query part on batches of `size` pairs with one video each."""
    batches = [
        (*pad_queries([split.encode_query(query) for _, query in chosen]), [chosen[0][0]], np.zeros(size, np.int32))
        for chosen in (pairs[start : start + size] for start in range(0, len(pairs) - size + 1, size))
    ]
    pair: Any = split.backend
    return lambda index: pair.ask(*batches[index % len(batches)])


def _around(grounder: Grounder, pairs: Sequence[Any]) -> float:
    """Return the median seconds of everything but the network for one batch: tokens, collation, decoding, NMS."""
    queries = [grounder.encode_query(query) for _, query in pairs]
    if grounder.is_pair:
        pair: Any = grounder.backend
        heads = pair.ask(*pad_queries(queries), [pairs[0][0]], np.zeros(len(pairs), np.int32))
    else:
        heads = grounder.backend.run(collate(queries, [grounder.segments(video) for video, _ in pairs]))

    class Constant:
        manifest = grounder.manifest

        def run(self, batch: Any) -> Any:
            return heads

        def ask(self, *arguments: Any) -> Any:
            return heads

    without_network = Grounder(Constant())
    run = {"around": lambda i: without_network.ground_batch(pairs, batch_size=len(pairs))}
    return medians(interleave(run, 50, 5))["around"]


def _step(loaded: Checkpoint, stage: Stage, batch: int = 16) -> float:
    """Return the median seconds of a training step."""
    trainer = stage_trainer(stage, loaded.model(), batch, torch.device("cpu"))
    config = loaded.config
    generator = torch.Generator().manual_seed(0)
    inputs = (
        torch.randint(1, config.vocab_size + 1, (batch, 8), generator=generator),
        torch.full((batch,), 8),
        torch.relu(torch.randn(batch, config.num_segments, config.feature_dim, generator=generator) - 0.84),
        torch.rand(batch, config.num_segments, 2, generator=generator).sort(-1)[0],
    )
    truth = torch.rand(batch, 2, generator=generator).sort(-1)[0]
    return medians(interleave({"step": lambda i: trainer.step(inputs, truth)}, 4, 3))["step"]


if __name__ == "__main__":
    command(benchmark)
