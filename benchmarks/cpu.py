"""Compare grounding on CPU cores with PyTorch's, as ratios of one run.

Models take turns, query by query, so that a busy machine slows all alike.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import math
import platform
import random
import time
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import torch
from onnx import TensorProto, helper, numpy_helper

from benchmarks.pytorch_baseline import EagerBaseline
from calib.graph.opset import MIN_OPSET
from calib.graph.split_model import pair_paths
from runtime import EncodedVideo, Grounder, Video, Vocabulary
from runtime.core.batch import collate, pad_queries
from runtime.core.cli import command
from runtime.core.errors import GroundingError
from runtime.core.io.atomic_files import write_json
from runtime.core.tokenizer import tokenize
from train.checkpoints import load_checkpoint
from train.network.losses import divide, loss_sums
from train.network.model import DRNConfig
from train.training.recipes import RECIPES

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


def benchmark(
    checkpoint: Path,
    onnx: Path,
    *,
    int8: Path | None = None,
    samples: int = 60,
    batch: int = 32,
    pairs: int = 1000,
    videos: int = 100,
    threads: int = 1,
    training: bool = True,
    output: Path | None = None,
) -> dict[str, Any]:
    """Time text in to moments out, and what of it is not the network; then training steps.

    With NAME.query.onnx beside NAME.onnx (`export.to_onnx --split`), encoded videos and bulk are timed too.

    Args:
        checkpoint: drn.pt of a network of any size.
        onnx: the same network, exported.
        int8: the same in INT8 (`export.build_engine --precision int8 --target onnxruntime`); with its query part beside
            it, encoded videos too.
        samples: queries per model; the median counts.
        batch: queries of the batched runs.
        pairs: of the bulk run; 0 leaves it out.
        videos: that they are about.
        threads: CPU threads for every model.
        training: whether training steps are timed too (full size: about a minute).
        output: JSON file for the figures.
    """
    torch.set_num_threads(threads)
    loaded = load_checkpoint(checkpoint)
    rng = np.random.default_rng(0)
    sentences = _sentences(loaded.vocabulary, rng, max(samples, batch, pairs))
    shown = [_video(rng, loaded.features.dim, index) for index in range(8)]
    asked = [(shown[i % len(shown)], sentences[i]) for i in range(max(samples, batch))]
    eager, grounder = EagerBaseline(loaded), Grounder.load(onnx, "cpu", threads)
    query_part = pair_paths(onnx)[1]
    split = Grounder.load(query_part, "cpu", threads) if query_part.is_file() else None
    narrow = Grounder.load(int8, "cpu", threads) if int8 else None
    narrow_part = pair_paths(int8)[1] if int8 else None
    narrow_split = (
        Grounder.load(narrow_part, "cpu", threads) if split and narrow_part and narrow_part.is_file() else None
    )
    _check_equal(eager, grounder, asked[:16])
    gemm = Gemm(threads)

    runs: dict[str, Callable[[int], Any]] = {
        EAGER: lambda i: eager.ground(*asked[i]),
        "ONNX Runtime": lambda i: grounder.ground(*asked[i]),
        "of which the network": _network_alone(grounder, asked, 1),
        **gemm.runs,
        **gemm.reading,
    }
    if narrow:
        runs["INT8"] = lambda i: narrow.ground(*asked[i])
    if split:
        encoded = {video.name: split.encode(video) for video in shown}
        known = [(encoded[video.name], sentence) for video, sentence in asked]
        _check_equal(eager, split, asked[:16])
        runs["encoded video"] = lambda i: split.ground(*known[i])
        runs["encoded video, of which the network"] = _asked_alone(split, known, 1)
    if narrow_split:
        ready_narrow = {video.name: narrow_split.encode(video) for video in shown}
        known_narrow = [(ready_narrow[video.name], sentence) for video, sentence in asked]
        runs["INT8, encoded video"] = lambda i: narrow_split.ground(*known_narrow[i])
    single = _interleave(runs, samples)

    group = asked[:batch]
    runs = {
        EAGER: lambda i: eager.ground(*asked[i % len(asked)]),
        "ONNX Runtime": lambda i: grounder.ground_batch(group, batch_size=batch),
        "of which the network": _network_alone(grounder, group, batch),
        **gemm.runs,
    }
    if narrow:
        runs["INT8"] = lambda i: narrow.ground_batch(group, batch_size=batch)
    if split:
        about = [(encoded[shown[0].name], sentence) for _, sentence in group]
        runs["one video, encoded for them"] = lambda i: _encode_and_ask(split, shown[0], group, batch)
        runs["one encoded video"] = lambda i: split.ground_batch(about, batch_size=batch)
        runs["one encoded video, of which the network"] = _asked_alone(split, about, batch)
    if narrow_split:
        about_narrow = [(ready_narrow[shown[0].name], sentence) for _, sentence in group]
        runs["INT8, one encoded video"] = lambda i: narrow_split.ground_batch(about_narrow, batch_size=batch)
    batched = _interleave(runs, max(9, samples // batch * 3))
    batched = {name: value / (1 if name in (EAGER, *gemm.runs) else batch) for name, value in batched.items()}

    around = {
        "batch 1": _around(grounder, asked[:1]) / single["of which the network"],
        f"batch {batch}": _around(grounder, group) / batch / batched["of which the network"],
    }
    if split:
        around["encoded video, batch 1"] = _around(split, known[:1]) / single["encoded video, of which the network"]
        around[f"encoded video, batch {batch}"] = (
            _around(split, about) / batch / batched["one encoded video, of which the network"]
        )
    length = float(np.mean([len(grounder.encode_query(sentence)) for _, sentence in asked]))
    report: dict[str, Any] = {
        **environment(threads),
        "ms per query, batch 1": _milliseconds(single, gemm),
        f"ms per query, batch {batch}": _milliseconds(batched, gemm),
        "speed-up over eager, batch 1": single[EAGER] / single["ONNX Runtime"],
        f"speed-up over eager, batch {batch}": batched[EAGER] / batched["ONNX Runtime"],
        "all around the network, relative to it": around,
    }
    if split:
        report["times eager"] = {
            "one query": single[EAGER] / single["ONNX Runtime"],
            "one query on an encoded video": single[EAGER] / single["encoded video"],
            **{
                f"{batch} queries, {name}": batched[EAGER] / batched[name]
                for name in ("one video, encoded for them", "one encoded video")
                if name in batched
            },
        }
        if pairs:
            report["times eager"][f"{pairs} pairs over {videos} videos"] = _bulk(
                eager, split, sentences[:pairs], videos, batch
            )
    if narrow:
        pairs_of = {
            "one query": (single, "ONNX Runtime", "INT8"),
            "one query on an encoded video": (single, "encoded video", "INT8, encoded video"),
            f"{batch} queries": (batched, "ONNX Runtime", "INT8"),
            f"{batch} queries, one encoded video": (batched, "one encoded video", "INT8, one encoded video"),
        }
        measured = {case: told for case, told in pairs_of.items() if told[2] in told[0]}
        report["INT8, times FP32"] = {
            case: seconds[wide] / seconds[eight] for case, (seconds, wide, eight) in measured.items()
        }
        report["INT8, times eager"] = {
            case: seconds[EAGER] / seconds[eight] for case, (seconds, _, eight) in measured.items()
        }
    report["the limit"] = _limits(loaded.model().config, length, (single, batched), gemm, batch)
    if split:
        # One query reads every weight once; its multiply-adds cannot hide that.
        read = query_part.stat().st_size * single["reading memory"] / gemm.READ
        report["the limit"]["encoded video, batch 1: ms to read the weights"] = 1e3 * read
        report["the limit"]["encoded video, batch 1: of both together"] = (
            1e-3 * report["the limit"]["encoded video, batch 1: ms at that rate"] + read
        ) / single["encoded video"]
    if training:
        report["ms per training step of 16"] = {
            f"stage {s.number}": 1e3 * _step(loaded, s) for s in RECIPES["mmaction2"].stages
        }
    _print(report)
    if output:
        write_json(output, report)
    return report


def environment(threads: int) -> dict[str, Any]:
    """Return what figures were measured with."""
    return {
        "date": date.today().isoformat(),
        "machine": _cpu_name(),
        "threads": threads,
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "onnxruntime", "numpy")},
    }


class Gemm:
    """A matrix product of the size of the network's layers, and a pass over memory: what the machine can do.

    In torch, since NumPy's takes all cores whatever models are given; and in ONNX Runtime, which packs weights ahead.
    """

    SIZES = (512, 4608, 512)
    READ = 1 << 27

    def __init__(self, threads: int) -> None:
        rows, inner, columns = self.SIZES
        rng = np.random.default_rng(0)
        left, right = (rng.random(shape, np.float32) for shape in ((rows, inner), (inner, columns)))
        a, b = torch.from_numpy(left), torch.from_numpy(right)
        packed = _product(right, threads)
        self.runs: dict[str, Callable[[int], Any]] = {
            "GEMM": lambda i: a @ b,
            "GEMM, packed": lambda i: packed.run(None, {"left": left}),
        }
        # Far more than any cache holds, so that what is measured is how fast weights can come from memory.
        long = torch.ones(self.READ // 4)
        self.reading: dict[str, Callable[[int], Any]] = {"reading memory": lambda i: long @ long}

    def rate(self, seconds: dict[str, float], name: str = "GEMM") -> float:
        """Return multiply-adds per second."""
        return math.prod(self.SIZES) / seconds[name]


def _product(right: np.ndarray, threads: int) -> ort.InferenceSession:
    """Return a matrix product by this constant."""
    inner, columns = right.shape
    left, product = (
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["rows", width])
        for name, width in (("left", inner), ("product", columns))
    )
    node = helper.make_node("MatMul", ["left", "right"], ["product"])
    graph = helper.make_graph([node], "product", [left], [product], [numpy_helper.from_array(right, "right")])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", MIN_OPSET)], ir_version=8)
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def multiply_adds(config: DRNConfig, query_length: float) -> dict[str, float]:
    """Return the multiply-adds for one query that no rewriting saves, by what they depend on.

    `video`: prop_fc. `first`: the first convolution over gated features. `rest`: everything else, for a query of
    `query_length` words. What positions cost is left out: it is folded to next to nothing, and so is what stands in the
    gaps between levels.
    """
    width, segments, pyramid, hidden = config.feature_dim, config.num_segments, config.fpn_dim, config.hidden_dim
    lengths = [segments // stride for stride in config.strides]
    locations = sum(lengths)
    levels = (256, 512, 1024)
    backbone = sum(
        3 * levels[level - 1] * levels[level] * lengths[level] for level in (1, 2)
    )  # the two convolutions after the first
    lateral = sum(channels * pyramid * length for channels, length in zip(levels, lengths, strict=True))
    towers = 2 * config.head_convs * 3 * pyramid**2 * locations
    head = (3 * 3 * pyramid + 2 * pyramid**2 + 3 * pyramid * pyramid // 2 + pyramid // 2) * locations
    words = query_length * 2 * 4 * hidden * (config.embed_dim + hidden)
    words += (config.lstm_layers - 1) * query_length * 2 * 4 * hidden * 3 * hidden
    sentence = 4 * hidden * hidden + 3 * hidden * 2 * hidden + 2 * hidden * (width + 256 + 512)
    return {
        "video": width**2 * segments,
        "first": 3 * 256 * width * segments,
        "rest": backbone + lateral + 3 * pyramid**2 * locations + towers + head + words + sentence,
    }


def _limits(
    config: DRNConfig, length: float, measured: tuple[dict[str, float], dict[str, float]], gemm: Gemm, batch: int
) -> dict[str, Any]:
    """Return what the remaining multiply-adds would take at the rate of a matrix product, and how near we are."""
    work = multiply_adds(config, length)
    asked = work["first"] + work["rest"]
    needed = {
        "ONNX Runtime": work["video"] + asked,
        "encoded video": asked,
        "one video, encoded for them": work["video"] / batch + asked,
        "one encoded video": asked,
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


def _bulk(eager: EagerBaseline, split: Grounder, sentences: list[str], count: int, batch: int) -> float:
    """Return how many times faster a long list of pairs is than one query after the other in eager mode.

    A tenth of the videos with their queries at a time, so that both take turns.
    """
    rng = np.random.default_rng(1)
    ours, theirs = 0.0, []
    parts = 10 if count >= 10 else 1
    per_part = len(sentences) // parts
    for part in range(parts):
        videos = [_video(rng, split.manifest.features.dim, index) for index in range(count // parts)]
        for video in videos:
            split.segments(video)
        chosen = sentences[part * per_part : (part + 1) * per_part]
        pairs = [(videos[i % len(videos)], sentence) for i, sentence in enumerate(chosen)]
        theirs += [_seconds(eager.ground, *pair) for pair in pairs[:5]]
        ours += _seconds(split.ground_batch, pairs, batch_size=batch)
        theirs += [_seconds(eager.ground, *pair) for pair in pairs[5:10]]
    return float(np.median(theirs)) / (ours / (parts * per_part))


def _seconds(function: Callable[..., Any], *arguments: Any, **options: Any) -> float:
    started = time.perf_counter()
    function(*arguments, **options)
    return time.perf_counter() - started


def _encode_and_ask(split: Grounder, video: Video, group: list[tuple[Video, str]], batch: int) -> Any:
    encoded = split.encode(video)
    return split.ground_batch([(encoded, sentence) for _, sentence in group], batch_size=batch)


def _milliseconds(seconds: dict[str, float], gemm: Gemm) -> dict[str, float]:
    return {name: 1e3 * value for name, value in seconds.items() if name not in (*gemm.runs, *gemm.reading)}


def _sentences(vocabulary: Vocabulary, rng: np.random.Generator, count: int) -> list[str]:
    """Return as many sentences, no two alike: real ones where the words are known, then words of the table."""
    known = [s for s in SENTENCES if all(word in vocabulary.words for word in s.split())]
    # Plain words only: what the tokenizer takes apart is not in the table as it stands there.
    words = [word for word in vocabulary.words if word.isalpha() and len(tokenize(word)) == 1]
    # Charades-STA queries have 2 to 12 words, 6 on average, and a few more here.
    lengths = np.clip(rng.normal(7, 2, count).round().astype(int), 2, 12)
    made = dict.fromkeys(known)
    while len(made) < count:
        made[" ".join(rng.choice(words, lengths[len(made) % count]))] = None
    return list(made)[:count]


def _video(rng: np.random.Generator, dim: int, index: int) -> Video:
    """A video of half a minute with features as sparse as C3D's."""
    features = np.maximum(rng.standard_normal((110, dim)) - 0.84, 0).astype(np.float16)
    return Video(features, 896, 30.0, f"video {index}")


def _check_equal(eager: EagerBaseline, grounder: Grounder, pairs: list[tuple[Video, str]]) -> None:
    """A faster wrong answer is no gain."""
    for video, query in pairs:
        wanted = eager.ground(video, query)[:5]
        found = [dataclasses.astuple(moment) for moment in grounder.ground(video, query)]
        if len(wanted) != len(found) or not np.allclose(wanted, found, atol=1e-3):
            raise GroundingError(f"The two models answer {query!r} differently; give the .pt and its own .onnx.")


def _interleave(runs: dict[str, Callable[[int], Any]], samples: int) -> dict[str, float]:
    """Return the median seconds of each, taking turns; the first tenth warms up.

    In random order, since whoever comes after finds other caches: a pass over memory empties them.
    """
    warm = max(3, samples // 10)
    turns = random.Random(0)
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for index in range(samples + warm):
        for name in turns.sample(list(runs), len(runs)):
            started = time.perf_counter()
            runs[name](index % samples)
            seconds[name].append(time.perf_counter() - started)
    return {name: float(np.median(values[warm:])) for name, values in seconds.items()}


def _network_alone(grounder: Grounder, pairs: list[tuple[Video, str]], size: int) -> Callable[[int], Any]:
    batches = [
        collate([grounder.encode_query(q) for _, q in chosen], [grounder.segments(v) for v, _ in chosen])
        for chosen in (pairs[start : start + size] for start in range(0, len(pairs) - size + 1, size))
    ]
    return lambda index: grounder.backend.run(batches[index % len(batches)])


def _asked_alone(split: Grounder, pairs: Sequence[tuple[EncodedVideo, str]], size: int) -> Callable[[int], Any]:
    questions = [
        (
            *pad_queries([split.encode_query(query) for _, query in chosen]),
            list({id(video): video for video, _ in chosen}.values()),
            np.zeros(size, np.int32),
        )
        for chosen in (pairs[start : start + size] for start in range(0, len(pairs) - size + 1, size))
    ]
    pair: Any = split.backend
    return lambda index: pair.ask(*questions[index % len(questions)])


def _around(grounder: Grounder, pairs: Sequence[Any], repeats: int = 50) -> float:
    """Return the median seconds of all but the network for one batch: tokenise, collate, decode, NMS."""
    queries = [grounder.encode_query(query) for _, query in pairs]
    if grounder.is_pair:
        pair: Any = grounder.backend
        video = pairs[0][0]
        heads = pair.ask(*pad_queries(queries), [video], np.zeros(len(pairs), np.int32))
    else:
        heads = grounder.backend.run(collate(queries, [grounder.segments(video) for video, _ in pairs]))

    class Still:
        manifest = grounder.manifest

        def run(self, batch: Any) -> Any:
            return heads

        def ask(self, *question: Any) -> Any:
            return heads

    still = Grounder(Still())
    return _interleave({"around": lambda i: still.ground_batch(pairs, batch_size=len(pairs))}, repeats)["around"]


def _step(loaded: Any, stage: Any, batch: int = 16, repeats: int = 4) -> float:
    model = loaded.model().train()
    stage.freeze(model)
    learnt = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(learnt, lr=1e-6, fused=True)
    config = model.config
    generator = torch.Generator().manual_seed(0)
    inputs = (
        torch.randint(1, config.vocab_size + 1, (batch, 8), generator=generator),
        torch.full((batch,), 8),
        torch.relu(torch.randn(batch, config.num_segments, config.feature_dim, generator=generator) - 0.84),
        torch.rand(batch, config.num_segments, 2, generator=generator).sort(-1)[0],
    )
    truth = torch.rand(batch, 2, generator=generator).sort(-1)[0]

    def step(_: int) -> None:
        optimizer.zero_grad(set_to_none=True)
        divide(loss_sums(model(*inputs), truth, config, stage.trains_iou_head)).total().backward()
        torch.nn.utils.clip_grad_norm_(learnt, 5.0)
        optimizer.step()

    return _interleave({"step": step}, repeats)["step"]


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _print(report: dict[str, Any]) -> None:
    for name, value in report.items():
        if isinstance(value, dict):
            print(name)
            for key, entry in value.items():
                print(f"  {key:<52} {entry if isinstance(entry, str) else format(entry, '.4g')}")
        else:
            print(f"{name}: {value if not isinstance(value, float) else format(value, '.4g')}")


if __name__ == "__main__":
    command(benchmark)
