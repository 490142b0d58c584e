"""Open engines of a small network on a simulated machine with a GPU, and compare them with their graphs."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.fake_tensorrt import Driver, Library, write_plan
from runtime.artifacts.encoded_video import EncodedVideo
from runtime.artifacts.engine_metadata import metadata_path, with_digest
from runtime.artifacts.manifest import METADATA_KEY, Manifest
from runtime.backends import open_backend
from runtime.backends.batch_shapes import AXES
from runtime.backends.cuda_driver import Cuda
from runtime.backends.tensorrt_backend import TensorRTBackend, TensorRTPair, open_engine
from runtime.core.batch import Batch, Heads
from runtime.core.io.digests import sha256

LONGEST = 12
# Batch sizes change how ONNX Runtime sums.
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


@dataclasses.dataclass(frozen=True)
class Graphs:
    """A small network as ONNX, complete and in two parts."""

    whole: Path
    video: Path
    query: Path
    manifest: Manifest
    query_manifest: Manifest

    @classmethod
    def trace(cls, directory: Path) -> Graphs:
        """Trace the network, split it, and write all graphs to a directory."""
        import onnx

        from calib.graph.split_model import split_graph, write_split_model
        from export.tracing.tracer import export_model
        from tests.export.conftest import TINY, lively, manifest

        path, about = directory / "drn.onnx", manifest(TINY)
        model = export_model(lively(TINY), about)
        onnx.save(model, path)
        video, query = write_split_model(*split_graph(model), path)
        metadata = {entry.key: entry.value for entry in onnx.load(query).metadata_props}
        return cls(path, video, query, about, Manifest.from_json(metadata[METADATA_KEY]))

    @functools.cached_property
    def _backend(self) -> Any:
        return open_backend(self.whole, "cpu", 1)

    def reference(self, batch: Batch) -> Heads:
        """Return the heads of the complete graph in ONNX Runtime."""
        return self._backend.run(batch)

    def unroll(self, graph: Path, tokens: int) -> Path:
        """Return a copy of a graph for queries of this length, which is written once."""
        import onnx

        from calib.graph.unroll_lstm import unroll_lstm

        path = graph.with_name(f"{graph.stem}.{tokens}.onnx")
        if not path.exists():
            onnx.save(unroll_lstm(onnx.load(graph), tokens), path)
        return path


def batch_of(lengths: Sequence[int], seed: int = 0, width: int = 0) -> Batch:
    """Return random queries of these lengths, padded to `width`, each on a video of its own."""
    from tests.export.conftest import TINY, random_inputs

    longest = max(width, max(lengths))
    return Batch(*(values.numpy() for values in random_inputs(TINY, list(lengths), longest, seed)))


def profile(
    batch: tuple[int, int, int], part: str = "whole", videos: tuple[int, int, int] = (1, 2, 3)
) -> dict[str, Any]:
    """Return an optimization profile as a metadata file records it."""
    sizes = {"batch": batch, "query_length": (2, 8, LONGEST), "video": videos}
    tails = {"segment_features": (16, 16), "segment_spans": (16, 2), "encoded_features": (16, 16)}
    shapes = {
        name: [[*(sizes[axis][index] for axis in axes), *tails.get(name, ())] for index in range(3)]
        for name, axes in AXES[part].items()
    }
    return {"name": "p", "batch": batch, "query_length": sizes["query_length"], "shapes": shapes}


def with_tokens(built: dict[str, Any], tokens: int) -> dict[str, Any]:
    """Return a profile for queries that are padded to exactly this length."""
    shapes = {**built["shapes"], "query_tokens": [[size[0], tokens] for size in built["shapes"]["query_tokens"]]}
    return {**built, "query_length": (tokens,) * 3, "shapes": shapes}


PROFILES = [profile((1, 1, 1)), profile((2, 4, 8))]


class Bench:
    """A simulated machine, and engines that are open on it."""

    def __init__(self, directory: Path, graphs: Graphs, version: str = "10.16.1.11") -> None:
        self.directory, self.graphs, self.version = directory, graphs, version
        self.driver = Driver()
        self.library = Library(self.driver, version)
        self.cuda = Cuda(self.driver)

    def whole(
        self, profiles: Sequence[dict[str, Any]] = PROFILES, unroll: Sequence[int] = (), **content: Any
    ) -> TensorRTBackend:
        """Write and open the complete network, with short-query plans for the lengths of `unroll`."""
        plan = self.directory / "drn.fp32.engine"
        self._write(plan, self.graphs.whole, profiles, self.graphs.manifest, unroll, **content)
        return self.open(plan)

    def pair(
        self,
        videos: int = 3,
        types: dict[str, str] | None = None,
        profiles: Sequence[dict[str, Any]] | None = None,
        unroll: Sequence[int] = (),
    ) -> TensorRTPair:
        """Write and open the split network, whose query plans store `videos` encodings."""
        (name,) = self.graphs.query_manifest.video_part
        video_plan, plan = (self.directory / name).with_suffix(".engine"), self.directory / "drn.query.engine"
        manifest = dataclasses.replace(self.graphs.manifest, part="video")
        self._write(video_plan, self.graphs.video, [profile((1, 1, 1), "video")], manifest, types=types)
        if profiles is None:
            profiles = [profile(batch, "query", (1, 2, videos)) for batch in ((1, 1, 1), (2, 4, 8))]
        self._write(plan, self.graphs.query, profiles, self.graphs.query_manifest, unroll, types)
        return self.open(plan)

    def _write(
        self,
        plan: Path,
        graph: Path,
        profiles: Sequence[dict[str, Any]],
        manifest: Manifest,
        unroll: Sequence[int] = (),
        types: dict[str, str] | None = None,
        **content: Any,
    ) -> None:
        """Write a plan and its short-query plans."""
        digests = {}
        for tokens in unroll:
            shorter = plan.with_name(f"{plan.stem}.{tokens}.engine")
            short_profiles = [with_tokens(each, tokens) for each in profiles]
            write_plan(shorter, self.graphs.unroll(graph, tokens), short_profiles, manifest, self.version, types)
            digests[shorter.name] = sha256(shorter)
        content |= {"unrolled": digests} if digests else {}
        write_plan(plan, graph, profiles, manifest, self.version, types, **content)

    def open(self, plan: Path) -> Any:
        return open_engine(plan, library=self.library, cuda=self.cuda)

    def check(self, backend: Any, batch: Batch, **tolerance: float) -> None:
        """Assert that a backend returns the heads of the complete graph."""
        assert_same(backend.run(batch), self.graphs.reference(batch), **tolerance)

    def calls(self, run: Callable[[], Any]) -> list[str]:
        """Return the driver's calls that something makes."""
        before = len(self.driver.calls)
        run()
        return [name for name in self.driver.calls[before:] if not name.startswith("cuCtx")]


def edit_metadata(plan: Path, **changed: Any) -> None:
    """Change entries of the metadata file of a plan, and its digest."""
    content = json.loads(metadata_path(plan).read_text())
    metadata_path(plan).write_text(json.dumps(with_digest({**content, **changed})))


def encode_all(pair: TensorRTPair, batch: Batch) -> list[EncodedVideo]:
    """Return the encoding of the video of each row."""
    encoded = pair.encode(batch.segment_features)
    return [EncodedVideo(features, spans, 1.0) for features, spans in zip(encoded, batch.segment_spans, strict=True)]


def assert_same(actual: Heads, expected: Heads, **tolerance: float) -> None:
    """Assert that heads are float32 and close, by default as close as two batch sizes in ONNX Runtime."""
    for name, values in vars(expected).items():
        actual_values = getattr(actual, name)
        assert (actual_values.dtype, actual_values.shape) == (np.float32, values.shape)
        np.testing.assert_allclose(actual_values, values, **(tolerance or CLOSE), err_msg=name)
