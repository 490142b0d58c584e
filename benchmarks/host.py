"""Measure the host time of one query on a GPU, with a driver and library that take no time.

The TensorRT runtime works on a stand-in for the driver and the library (`benchmarks/fake_tensorrt.py`),
which answers every shape in ONNX Runtime and then stands still. What is left is ours: tokens, staging, launch, copies,
decoding, suppression. A real driver adds a launch and a wait. Who has a GPU measures there (`runtime.benchmark`).
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import tempfile
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any, cast

import numpy as np

from benchmarks.fake_tensorrt import Driver, Library, write_plan
from export.engine.profiles import DEFAULT_CACHED_VIDEOS, part_profiles, profiles
from runtime import Grounder
from runtime.artifacts.encoded_video import EncodedVideo
from runtime.backends.cuda_driver import Cuda
from runtime.backends.tensorrt_backend import TensorRTPair, open_engine
from runtime.benchmarking.timing import Call, Latency, run_interleaved, warm_up
from runtime.core import cpu_info
from runtime.core.cli import command
from runtime.core.decoding import decode, score_proposals
from runtime.core.errors import ModelFileError
from runtime.core.io.atomic_files import check_writable, write_json
from runtime.datasets.dataset import DataSet

VERSION = "10.16.1.11"
# A CUDA graph is made at the second run of a shape.
RUNS = 3
# Different queries that are asked one at a time.
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
    """Time one query and many on encoded videos, on a GPU that takes no time.

    Args:
        model: .query.onnx file, its .video.onnx beside it.
        data: data set.
        split: whose sentences are asked.
        batch: queries that are asked at once.
        samples: of one query; of `batch` of them there are a tenth as many.
        output: JSON file for the figures.
    """
    check_writable(output)
    reference = Grounder.load(model, "cpu", 1)
    if not reference.is_pair:
        raise ModelFileError(
            f"{model} is whole; give the .query.onnx of `python -m export.to_onnx --split`.", code="query_part_required"
        )
    # As the engine is asked here, one video is one encoding.
    reference.windows = None
    data_set = DataSet(data)
    known = data_set.annotations(split, invalid="drop", quiet=True)
    chosen = [known[index % len(known)] for index in range(batch)]
    names = list(dict.fromkeys(annotation.video for annotation in chosen))[:DEFAULT_CACHED_VIDEOS]
    videos = [cast(EncodedVideo, reference.encode(data_set.video(name))) for name in names]
    pairs = [(videos[index % len(videos)], annotation.sentence) for index, annotation in enumerate(chosen)]
    seconds: dict[str, list[float]] = {ONE: [], ASKED: [], DECODED: [], many(batch): []}
    with tempfile.TemporaryDirectory() as directory:
        bench = Bench(reference, model, Path(directory), pairs)
        for name, call in bench.calls().items():
            warm_up([call])
            run_interleaved([call], samples if name != many(batch) else max(samples // 10, 1), [seconds[name]])
    divided = {name: np.array(found) / (batch if name == many(batch) else 1) for name, found in seconds.items()}
    report = {
        "date": date.today().isoformat(),
        "machine": cpu_info.cpu_name(),
        "versions": {name: importlib.metadata.version(name) for name in ("onnxruntime", "numpy")},
        "likely locations, mean": bench.likely,
        "ms": {name: dataclasses.asdict(Latency.from_samples(list(found))) for name, found in divided.items()},
    }
    for name, found in divided.items():
        print(f"{name:42}  {1e6 * np.median(found):7.1f} us")
    print(f"Of a query {bench.likely:.1f} locations are likely on average.")
    if output:
        write_json(output, report)
    return report


class Bench:
    """An engine pair on a made-up GPU that has answered everything once and then stands still."""

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
        self._asked = [
            (ids[None], np.array([len(ids)], np.int32), [video], np.zeros(1, np.int32))
            for ids, (video, _) in zip(tokens, pairs, strict=False)
        ]
        self._heads = []
        for _ in range(RUNS):
            self._heads = [self._backend.ask(*asked) for asked in self._asked]
            self._grounder.ground_batch(pairs, batch_size=len(pairs))
        kept = [score_proposals(heads, reference.manifest.decoding).scores > -np.inf for heads in self._heads]
        self.likely = float(np.mean([found.sum() for found in kept]))
        # From here on a launch and a wait do nothing, and the answers are those that `_place` puts there.
        self.driver.failing = {"cuGraphLaunch": 0, "cuStreamSynchronize": 0}

    def _opened(self, reference: Grounder, model: Path, directory: Path) -> TensorRTPair:
        (video_part,) = reference.manifest.video_part
        video_manifest = dataclasses.replace(reference.manifest, part="video", video_part={})
        shapes = profiles((1, len(self.pairs), len(self.pairs)), None, reference.manifest)
        plan = directory / model.with_suffix(".engine").name
        for graph, path, manifest in (
            (model.parent / video_part, directory / Path(video_part).with_suffix(".engine"), video_manifest),
            (model, plan, reference.manifest),
        ):
            built_for = part_profiles(manifest.part, shapes, manifest, DEFAULT_CACHED_VIDEOS, manifest.features.dim)
            write_plan(path, graph, [dataclasses.asdict(profile) for profile in built_for], manifest, VERSION)
        return cast(TensorRTPair, open_engine(plan, library=self.library, cuda=Cuda(self.driver)))

    def calls(self) -> dict[str, Call]:
        decoding = self._grounder.manifest.decoding
        return {
            ONE: Call(lambda number: self._grounder.ground(*self.pairs[number]), self._place),
            ASKED: Call(lambda number: self._backend.ask(*self._asked[number]), self._place),
            DECODED: Call(lambda number: decode(self._heads[number], decoding, 5), self._place),
            many(len(self.pairs)): Call(lambda _: self._grounder.ground_batch(self.pairs, batch_size=len(self.pairs))),
        }

    def _place(self, number: int) -> int:
        """Put the heads of one query where the GPU would have, and return which it is."""
        query = number % len(self._asked)
        for _, program in self._backend._network.contexts.states.items():
            for name, view in program.outputs.items():
                if len(view) == 1:
                    view[...] = getattr(self._heads[query], name)
        return query


def many(batch: int) -> str:
    return f"{batch} queries at once, each"


if __name__ == "__main__":
    command(host)
