"""`python -m benchmarks.cpu`: grounding on CPU cores, side by side with what people run today, as ratios of one run.

Models take turns, query by query, so that a busy machine slows all alike.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import platform
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.baseline import EagerBaseline
from runtime import Grounder, Video
from runtime.command import command
from runtime.errors import GroundingError
from runtime.files import write_json
from runtime.tensors import collate
from train.checkpoints import load_checkpoint
from train.losses import divide, loss_sums
from train.stages import RECIPES

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
    samples: int = 60,
    batch: int = 32,
    threads: int = 1,
    training: bool = True,
    output: Path | None = None,
) -> dict[str, Any]:
    """Time text in to moments out, and what of it is not the network; then training steps.

    Args:
        checkpoint: drn.pt of a network of any size.
        onnx: the same network, exported.
        samples: queries per model; the median counts.
        batch: queries of the batched runs.
        threads: CPU threads for every model.
        training: whether training steps are timed too (full size: about a minute).
        output: JSON file for the figures.
    """
    torch.set_num_threads(threads)
    loaded = load_checkpoint(checkpoint)
    words = list(loaded.vocabulary.words)
    known = [s for s in SENTENCES if all(word in loaded.vocabulary.words for word in s.split())]
    rng = np.random.default_rng(0)
    sentences = known or [" ".join(rng.choice(words, 5)) for _ in range(8)]
    videos = [_video(rng, loaded.features.dim, index) for index in range(8)]
    pairs = [(videos[i % len(videos)], sentences[i % len(sentences)]) for i in range(max(samples, batch))]
    eager, grounder = EagerBaseline(loaded), Grounder.load(onnx, "cpu", threads)
    _check_equal(eager, grounder, pairs[:16])

    single = _interleave(
        {
            "eager PyTorch, list NMS": lambda i: eager.ground(*pairs[i]),
            "ONNX Runtime": lambda i: grounder.ground(*pairs[i]),
            "of which the network": _network_alone(grounder, pairs, 1),
        },
        samples,
    )
    group = pairs[:batch]
    batched = _interleave(
        {
            "ONNX Runtime": lambda i: grounder.ground_batch(group, batch_size=batch),
            "of which the network": _network_alone(grounder, group, batch),
        },
        max(5, samples // batch * 3),
    )
    batched = {name: value / batch for name, value in batched.items()}
    around = {
        "batch 1": _around(grounder, pairs[:1]) / single["of which the network"],
        f"batch {batch}": _around(grounder, group) / batch / batched["of which the network"],
    }
    report: dict[str, Any] = {
        "date": date.today().isoformat(),
        "machine": _cpu_name(),
        "threads": threads,
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "onnxruntime", "numpy")},
        "ms per query, batch 1": {name: 1e3 * value for name, value in single.items()},
        f"ms per query, batch {batch}": {name: 1e3 * value for name, value in batched.items()},
        "speed-up over eager, batch 1": single["eager PyTorch, list NMS"] / single["ONNX Runtime"],
        f"speed-up over eager, batch {batch}": single["eager PyTorch, list NMS"] / batched["ONNX Runtime"],
        "all around the network, relative to it": around,
    }
    if training:
        report["ms per training step of 16"] = {
            f"stage {s.number}": 1e3 * _step(loaded, s) for s in RECIPES["mmaction2"].stages
        }
    _print(report)
    if output:
        write_json(output, report)
    return report


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
    """Return the median seconds of each, taking turns; the first tenth warms up."""
    warm = max(3, samples // 10)
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for index in range(samples + warm):
        for name, run in runs.items():
            started = time.perf_counter()
            run(index % samples)
            seconds[name].append(time.perf_counter() - started)
    return {name: float(np.median(values[warm:])) for name, values in seconds.items()}


def _network_alone(grounder: Grounder, pairs: list[tuple[Video, str]], size: int) -> Callable[[int], Any]:
    batches = [
        collate([grounder.encode_query(q) for _, q in chosen], [grounder.segments(v) for v, _ in chosen])
        for chosen in (pairs[start : start + size] for start in range(0, len(pairs) - size + 1, size))
    ]
    return lambda index: grounder.backend.run(batches[index % len(batches)])


def _around(grounder: Grounder, pairs: list[tuple[Video, str]], repeats: int = 50) -> float:
    """Return the median seconds of all but the network for one batch: tokenise, collate, decode, NMS."""
    heads = grounder.backend.run(
        collate([grounder.encode_query(q) for _, q in pairs], [grounder.segments(v) for v, _ in pairs])
    )

    class Still:
        manifest = grounder.manifest

        def run(self, batch: Any) -> Any:
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
                print(f"  {key:<28} {entry if isinstance(entry, str) else format(entry, '.4g')}")
        else:
            print(f"{name}: {value if not isinstance(value, float) else format(value, '.4g')}")


if __name__ == "__main__":
    command(benchmark)
