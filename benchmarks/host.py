"""Measure the host time of one query on a GPU, with doubles of the driver and of TensorRT that take no time.

The doubles (`benchmarks/fake_tensorrt.py`) compute every shape once in ONNX Runtime, then do nothing. The time that
remains is that of tokens, staging, copies, decoding and NMS. On a real GPU, use `runtime.benchmark`.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np

from benchmarks.fake_tensorrt import Driver, Library, write_plan
from benchmarks.measurement import environment
from export.engine.profiles import DEFAULT_CACHED_VIDEOS, part_profiles, profiles
from runtime import Grounder
from runtime.artifacts.encoded_video import EncodedVideo
from runtime.backends.cuda_driver import Cuda
from runtime.backends.tensorrt_backend import TensorRTPair, open_engine
from runtime.benchmarking.timing import Call, Latency, run_interleaved, warm_up
from runtime.core.cli import command
from runtime.core.decoding import decode, score_proposals
from runtime.core.errors import ModelFileError
from runtime.core.io.atomic_files import check_writable, write_json
from runtime.datasets.dataset import DataSet

VERSION = "10.16.1.11"
# A CUDA graph is captured in the second run of a shape.
RUNS = 3
# Distinct queries that run one at a time.
QUERIES = 64
ONE = "one query, text to moments"
ASKED, DECODED = "of it: tokens in, heads out", "of it: moments of the heads"


def host(
    model: Path,
    data: Path,
    *,
    split: str = "test",
    batch: int = 256,
    samples: int = 2000,
    output: Path | None = None,
) -> dict[str, Any]:
    """Time one query and a batch on encoded videos, on a GPU that takes no time.

    Args:
        model: .query.onnx file, with its .video.onnx beside it.
        data: directory of a data set.
        split: split of the queries.
        batch: queries of the batch.
        samples: samples of one query; the batch has a tenth of them.
        output: JSON file for the report.
    """
    check_writable(output)
    reference = Grounder.load(model, "cpu", 1)
    if not reference.is_pair:
        raise ModelFileError(
            f"{model} is not a query part. Pass the .query.onnx of `python -m export.to_onnx --split`.",
            code="query_part_required",
        )
    # The pairs below have one encoding per video.
    reference.windows = None
    data_set = DataSet(data)
    annotations = data_set.annotations(split, invalid="drop", quiet=True)
    queries = [annotations[index % len(annotations)] for index in range(batch)]
    names = list(dict.fromkeys(query.video for query in queries))[:DEFAULT_CACHED_VIDEOS]
    videos = [cast(EncodedVideo, reference.encode(data_set.video(name))) for name in names]
    pairs = [(videos[index % len(videos)], query.sentence) for index, query in enumerate(queries)]
    seconds: dict[str, list[float]] = {ONE: [], ASKED: [], DECODED: [], many(batch): []}
    with tempfile.TemporaryDirectory() as directory:
        bench = Bench(reference, model, Path(directory), pairs)
        for name, call in bench.calls().items():
            warm_up([call])
            run_interleaved([call], samples if name != many(batch) else max(samples // 10, 1), [seconds[name]])
    per_query = {name: np.array(values) / (batch if name == many(batch) else 1) for name, values in seconds.items()}
    report = {
        **environment(1, ("onnxruntime", "numpy")),
        "likely locations, mean": bench.likely,
        "ms": {name: dataclasses.asdict(Latency.from_samples(list(values))) for name, values in per_query.items()},
    }
    for name, values in per_query.items():
        print(f"{name:42}  {1e6 * np.median(values):7.1f} us")
    print(f"Locations above the score threshold per query: {bench.likely:.1f} on average.")
    if output:
        write_json(output, report)
    return report


class Bench:
    """A split engine on the doubles, which have computed all pairs once and then do nothing.

    Attributes:
        likely: mean number of locations above the score threshold.
    """

    def __init__(
        self, reference: Grounder, model: Path, directory: Path, pairs: Sequence[tuple[EncodedVideo, str]]
    ) -> None:
        self.pairs = pairs
        self.driver = Driver()
        self.driver.room = 1 << 40
        self.library = Library(self.driver, VERSION)
        self._backend = self._opened(reference, model, directory)
        self._grounder = Grounder(self._backend)
        tokens = [reference.encode_query(query) for _, query in pairs[:QUERIES]]
        self._inputs = [
            (ids[None], np.array([len(ids)], np.int32), [video], np.zeros(1, np.int32))
            for ids, (video, _) in zip(tokens, pairs, strict=False)
        ]
        self._heads = []
        for _ in range(RUNS):
            self._heads = [self._backend.ask(*inputs) for inputs in self._inputs]
            self._grounder.ground_batch(pairs, batch_size=len(pairs))
        likely = [score_proposals(heads, reference.manifest.decoding).scores > -np.inf for heads in self._heads]
        self.likely = float(np.mean([each.sum() for each in likely]))
        # From here on, launches and waits do nothing, and `_write_heads` provides the outputs.
        self.driver.failing = {"cuGraphLaunch": 0, "cuStreamSynchronize": 0}

    def _opened(self, reference: Grounder, model: Path, directory: Path) -> TensorRTPair:
        """Write engines of both parts, and open them."""
        (video_part,) = reference.manifest.video_part
        video_manifest = dataclasses.replace(reference.manifest, part="video", video_part={})
        shapes = profiles((1, len(self.pairs), len(self.pairs)), None, reference.manifest)
        plan = directory / model.with_suffix(".engine").name
        for graph, path, manifest in (
            (model.parent / video_part, directory / Path(video_part).with_suffix(".engine"), video_manifest),
            (model, plan, reference.manifest),
        ):
            ranges = part_profiles(manifest.part, shapes, manifest, DEFAULT_CACHED_VIDEOS, manifest.features.dim)
            write_plan(path, graph, [dataclasses.asdict(profile) for profile in ranges], manifest, VERSION)
        return cast(TensorRTPair, open_engine(plan, library=self.library, cuda=Cuda(self.driver)))

    def calls(self) -> dict[str, Call]:
        """Return the calls to time, by name."""
        decoding = self._grounder.manifest.decoding
        return {
            ONE: Call(lambda number: self._grounder.ground(*self.pairs[number]), self._write_heads),
            ASKED: Call(lambda number: self._backend.ask(*self._inputs[number]), self._write_heads),
            DECODED: Call(lambda number: decode(self._heads[number], decoding, 5), self._write_heads),
            many(len(self.pairs)): Call(lambda _: self._grounder.ground_batch(self.pairs, batch_size=len(self.pairs))),
        }

    def _write_heads(self, number: int) -> int:
        """Write the heads of a query to the output buffers, as a GPU would, and return its index."""
        query = number % len(self._inputs)
        for _, program in self._backend._network.contexts.states.items():
            for name, view in program.outputs.items():
                if len(view) == 1:
                    view[...] = getattr(self._heads[query], name)
        return query


def many(batch: int) -> str:
    """Return the name of the call of a batch."""
    return f"{batch} queries at once, each"


if __name__ == "__main__":
    command(host)
