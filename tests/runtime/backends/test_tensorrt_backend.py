"""Test `runtime.backends.tensorrt_backend` on doubles of CUDA and TensorRT: engines answer as their graphs."""

from __future__ import annotations

import contextlib
import ctypes.util
import dataclasses
import functools
import gc
import importlib.util
import inspect
import json
import logging
import os
import threading
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.fake_tensorrt import (
    NOT_CAPTURABLE,
    VERSIONS,
    Driver,
    Engine,
    Library,
    counted,
    write_plan,
)
from runtime.artifacts.encoded_video import EncodedVideo
from runtime.artifacts.engine_metadata import Sidecar, metadata_path, read_sidecar, with_digest
from runtime.artifacts.manifest import Manifest
from runtime.backends import engine_compatibility, open_backend
from runtime.backends import tensorrt_engine as network_module
from runtime.backends.batch_shapes import (
    ALIGNMENT,
    AXES,
    MIN_PADDED_LENGTH,
    OptimizationProfile,
    bucket,
    choose_profile,
    pack_tensors,
    profile_from_shapes,
    referenced_videos,
    row_slices,
    row_slices_by_video,
)
from runtime.backends.cuda_driver import SIGNATURES, Cuda, CudaError, OutOfDeviceMemory
from runtime.backends.encoding_cache import EncodingSlots
from runtime.backends.execution_contexts import MAX_EXECUTION_STATES
from runtime.backends.tensorrt_backend import TensorRTBackend, TensorRTPair, open_engine
from runtime.backends.tensorrt_engine import close_all
from runtime.core.batch import Batch, Heads
from runtime.core.bfloat16 import from_bfloat16, to_bfloat16
from runtime.core.errors import DeviceError, DeviceMemoryError, ModelFileError, ShapeError
from runtime.core.io.digests import sha256
from runtime.grounding.grounder import Grounder
from tests.raising import quotes, raises, records
from tests.tolerances import HALF

LONGEST = 12
# Batch sizes change how ONNX Runtime sums.
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


@dataclasses.dataclass(frozen=True)
class Graphs:
    """A small network as ONNX, whole and in two parts."""

    whole: Path
    video: Path
    query: Path
    manifest: Manifest
    query_manifest: Manifest


@pytest.fixture(scope="module")
def graphs(tmp_path_factory: pytest.TempPathFactory) -> Graphs:
    for name in ("torch", "onnx", "onnxruntime"):
        pytest.importorskip(name, reason=f"{name} makes and computes the graphs")
    import onnx

    from calib.graph.split_model import split_graph, write_split_model
    from export.tracing.tracer import export_model
    from runtime.artifacts.manifest import METADATA_KEY
    from tests.export.conftest import TINY, lively, manifest

    path = tmp_path_factory.mktemp("graphs") / "drn.onnx"
    about = manifest(TINY)
    model = export_model(lively(TINY), about)
    onnx.save(model, path)
    video, query = write_split_model(*split_graph(model), path)
    metadata = {entry.key: entry.value for entry in onnx.load(query).metadata_props}
    return Graphs(path, video, query, about, Manifest.from_json(metadata[METADATA_KEY]))


def batch_of(lengths: Sequence[int], seed: int = 0, width: int = 0) -> Batch:
    """Return random queries of these lengths, padded to `width`, each on a video of its own."""
    from tests.export.conftest import TINY, random_inputs

    longest = max(width, max(lengths))
    return Batch(*(values.numpy() for values in random_inputs(TINY, list(lengths), longest, seed)))


def profile(
    batch: tuple[int, int, int], part: str = "whole", videos: tuple[int, int, int] = (1, 2, 3)
) -> dict[str, Any]:
    sizes = {"batch": batch, "query_length": (2, 8, LONGEST), "video": videos}
    tails = {"segment_features": (16, 16), "segment_spans": (16, 2), "encoded_features": (16, 16)}
    shapes = {
        name: [[*(sizes[axis][place] for axis in axes), *tails.get(name, ())] for place in range(3)]
        for name, axes in AXES[part].items()
    }
    return {"name": "p", "batch": batch, "query_length": sizes["query_length"], "shapes": shapes}


PROFILES = [profile((1, 1, 1)), profile((2, 4, 8))]
# Queries of four tokens go through a plan of their own, or not.
unrolled_or_not = pytest.mark.parametrize("unroll", [(), (5,)], ids=["loop", "unrolled"])


def exactly(built: dict[str, Any], tokens: int) -> dict[str, Any]:
    """A profile for queries padded to so many tokens."""
    shapes = {**built["shapes"], "query_tokens": [[size[0], tokens] for size in built["shapes"]["query_tokens"]]}
    return {**built, "query_length": (tokens,) * 3, "shapes": shapes}


class Bench:
    """A simulated machine, and engines that are open on it."""

    def __init__(self, directory: Path, graphs: Graphs, version: str = "10.16.1.11") -> None:
        self.directory, self.graphs = directory, graphs
        self.driver = Driver()
        self.library = Library(self.driver, version)
        self.cuda = Cuda(self.driver)
        self.version = version

    def whole(
        self, profiles: Sequence[dict[str, Any]] = PROFILES, unroll: Sequence[int] = (), **content: Any
    ) -> TensorRTBackend:
        plan = self.directory / "drn.fp32.engine"
        content |= self.unrolled(plan, self.graphs.whole, profiles, self.graphs.manifest, unroll)
        write_plan(plan, self.graphs.whole, profiles, self.graphs.manifest, self.version, **content)
        return self.open(plan)

    def pair(
        self,
        videos: int = 3,
        types: dict[str, str] | None = None,
        profiles: Sequence[dict[str, Any]] | None = None,
        unroll: Sequence[int] = (),
    ) -> TensorRTPair:
        (name,) = self.graphs.query_manifest.video_part
        video_manifest = dataclasses.replace(self.graphs.manifest, part="video")
        write_plan(
            (self.directory / name).with_suffix(".engine"),
            self.graphs.video,
            [profile((1, 1, 1), "video", (1, 2, 3))],
            video_manifest,
            self.version,
            types,
        )
        plan = self.directory / "drn.query.engine"
        both = [profile((1, 1, 1), "query", (1, 2, videos)), profile((2, 4, 8), "query", (1, 2, videos))]
        content = self.unrolled(plan, self.graphs.query, profiles or both, self.graphs.query_manifest, unroll, types)
        write_plan(
            plan, self.graphs.query, profiles or both, self.graphs.query_manifest, self.version, types, **content
        )
        return self.open(plan)

    def unrolled(
        self,
        plan: Path,
        graph: Path,
        profiles: Sequence[dict[str, Any]],
        manifest: Manifest,
        steps: Sequence[int],
        types: dict[str, str] | None = None,
    ) -> dict[str, Any]:
        """Write plans for short queries, and return what the sidecar of the longer one says of them."""
        import onnx

        from calib.graph.unroll_lstm import unroll_lstm

        named = {}
        for tokens in steps:
            written = self.directory / f"{graph.stem}.{tokens}.onnx"
            onnx.save(unroll_lstm(onnx.load(graph), tokens), written)
            path = plan.with_name(f"{plan.stem}.{tokens}.engine")
            write_plan(path, written, [exactly(one, tokens) for one in profiles], manifest, self.version, types)
            named[path.name] = sha256(path)
        return {"unrolled": named} if named else {}

    def open(self, plan: Path) -> Any:
        return open_engine(plan, library=self.library, cuda=self.cuda)

    def calls(self, run: Callable[[], Any]) -> list[str]:
        """Return the driver's calls that something makes."""
        before = len(self.driver.calls)
        run()
        return [name for name in self.driver.calls[before:] if not name.startswith("cuCtx")]


@pytest.fixture
def bench(tmp_path: Path, graphs: Graphs) -> Bench:
    return Bench(tmp_path, graphs)


def known(pair: TensorRTPair, batch: Batch) -> list[EncodedVideo]:
    encoded = pair.encode(batch.segment_features)
    return [EncodedVideo(features, spans, 1.0) for features, spans in zip(encoded, batch.segment_spans, strict=True)]


def reference(graphs: Graphs, batch: Batch) -> Heads:
    return open_backend(graphs.whole, "cpu", 1).run(batch)


def assert_same(actual: Heads, expected: Heads, **close: float) -> None:
    for name, values in vars(expected).items():
        given_values = getattr(actual, name)
        assert given_values.dtype == np.float32
        assert given_values.shape == values.shape
        np.testing.assert_allclose(given_values, values, **(close or CLOSE), err_msg=name)


@pytest.mark.parametrize("version", VERSIONS)
def test_engine_gives_same_moments_as_graph(tmp_path: Path, graphs: Graphs, version: str) -> None:
    backend = Bench(tmp_path, graphs, version).whole()
    model = open_backend(graphs.whole, "cpu", 1)
    from runtime.core.decoding import decode

    # Every kind of size three times: plainly, with what is then captured, and from the graph.
    for seed in range(3):
        for lengths in ([5], [1], [12], [3, 7], [2, 5, 5, 9, 1], [4] * 8, [6] * 19):
            batch = batch_of(lengths, seed)
            actual, expected = backend.run(batch), model.run(batch)
            assert_same(actual, expected)
            decoding = backend.manifest.decoding
            np.testing.assert_allclose(decode(actual, decoding, 5), decode(expected, decoding, 5), atol=1e-4)


@pytest.mark.parametrize("version", VERSIONS)
def test_engine_pair_equals_unsplit_graph(tmp_path: Path, graphs: Graphs, version: str) -> None:
    pair = Bench(tmp_path, graphs, version).pair()
    for seed in range(3):
        batch = batch_of([5, 2, 9, 1, 12, 3, 3, 8, 7, 4], seed)
        expected = reference(graphs, batch)
        assert_same(pair.run(batch), expected)
        encoded = pair.encode(batch.segment_features)
        assert encoded.shape == (10, 16, 16)
        videos = known(pair, batch)
        index = np.array([4, 4, 0, 9, 4, 0, 1, 2, 3, 9], np.int32)
        asked = Batch(batch.query_tokens, batch.query_length, batch.segment_features[index], batch.segment_spans[index])
        assert_same(pair.ask(batch.query_tokens, batch.query_length, videos, index), reference(graphs, asked))


@pytest.mark.parametrize("part", ["whole", "pair"])
def test_grounder_with_engine_equals_graph(bench: Bench, graphs: Graphs, part: str) -> None:
    from runtime import Video

    rng = np.random.default_rng(0)
    videos = [Video(rng.random((40 + index, 16), np.float32), 400, 30.0) for index in range(5)]
    engine = Grounder(getattr(bench, part)())
    graph = Grounder.load(graphs.whole if part == "whole" else graphs.query, "cpu", 1)
    queries = ("word1 word2", "word3 word7 word1 word5 word9", "word4")
    theirs = graph.ground_batch([(video, query) for video in videos for query in queries])
    for seen in (videos, [engine.encode(video) for video in videos] if part == "pair" else videos):
        ours = engine.ground_batch([(video, query) for video in seen for query in queries])
        for actual, expected in zip(ours, theirs, strict=True):
            for moment, other in zip(actual, expected, strict=True):
                assert (moment.start, moment.end) == pytest.approx((other.start, other.end), abs=1e-3)
        assert len(engine.ground(seen[0], "word4")) == len(graph.ground(videos[0], "word4"))


@pytest.mark.parametrize("version", VERSIONS)
def test_short_queries_use_the_short_query_engine(tmp_path: Path, graphs: Graphs, version: str) -> None:
    bench = Bench(tmp_path, graphs, version)
    for backend in (bench.whole(unroll=(6, 3)), bench.pair(unroll=(6, 3))):
        # What each call meets: the smallest number of tokens that fits its longest query, or the loop.
        for lengths, tokens in (([2], 3), ([3], 3), ([4], 6), ([6], 6), ([7], 8), ([12], 12)):
            batch = batch_of(lengths)
            for _ in range(3):
                assert_same(backend.run(batch), reference(graphs, batch))
                assert bench.library.runs[-1]["query_tokens"] == (1, tokens)
        for lengths, tokens in (([3, 1, 2], 3), ([5, 3, 2, 6], 6), ([2] * 7 + [11], 12), ([5] * 19, 6)):
            batch = batch_of(lengths, width=12)
            assert_same(backend.run(batch), reference(graphs, batch))
            assert bench.library.runs[-1]["query_tokens"][1] == tokens


def test_each_engine_caches_its_own_encodings(bench: Bench, graphs: Graphs) -> None:
    pair = bench.pair(unroll=(4,))
    batch = batch_of([3, 9, 2, 7])
    videos = known(pair, batch)
    for _ in range(3):
        # Short and long queries take turns, about videos that the other plan was asked about, or was not.
        for row, video in ((0, 0), (1, 0), (2, 1), (3, 2), (2, 2), (1, 3), (0, 3), (3, 1), (0, 0)):
            index = np.zeros(1, np.int32)
            actual = pair.ask(batch.query_tokens[[row]], batch.query_length[[row]], [videos[video]], index)
            of_video = (batch.segment_features[[video]], batch.segment_spans[[video]])
            asked_of = Batch(batch.query_tokens[[row]], batch.query_length[[row]], *of_video)
            assert_same(actual, reference(graphs, asked_of))


def test_video_part_as_short_query_engine_is_rejected(bench: Bench, tmp_path: Path) -> None:
    bench.pair().close()
    plan, (video,) = tmp_path / "drn.query.engine", tmp_path.glob("*.video.engine")
    content = json.loads(metadata_path(plan).read_text())
    metadata_path(plan).write_text(json.dumps(with_digest({**content, "unrolled": {video.name: sha256(video)}})))
    with raises(ModelFileError, "digest_mismatch", video, plan.name):
        bench.open(plan)


def test_short_query_engine_must_exist_and_match_the_build(bench: Bench, tmp_path: Path) -> None:
    backend = bench.whole(unroll=(6,))
    held = bench.driver.held()
    backend.close()
    plan, shorter = tmp_path / "drn.fp32.engine", tmp_path / "drn.fp32.6.engine"
    bench.open(plan).close()
    contents = shorter.read_bytes(), metadata_path(shorter).read_text()
    # A plan of another build matches its own metadata file, but not the recorded hash.
    other = write_plan(shorter, bench.graphs.whole, PROFILES, bench.graphs.manifest, bench.version, note="another")
    other.write_bytes(other.read_bytes() + b" ")
    content = json.loads(metadata_path(other).read_text())
    content["sha256"][other.name] = sha256(other)
    metadata_path(other).write_text(json.dumps(with_digest(content)))
    with raises(ModelFileError, "digest_mismatch", shorter, plan.name, "--unroll 6"):
        bench.open(plan)
    shorter.write_bytes(contents[0])
    metadata_path(shorter).write_text(contents[1])
    backend = bench.open(plan)
    assert bench.driver.held() == held
    backend.close()
    assert not bench.driver.held()


@pytest.mark.parametrize("part", ["whole", "pair"])
@pytest.mark.parametrize("missing", ["plan", "sidecar"])
def test_missing_short_query_engine_is_a_warning(
    bench: Bench, graphs: Graphs, tmp_path: Path, caplog: pytest.LogCaptureFixture, part: str, missing: str
) -> None:
    backend = getattr(bench, part)(unroll=(3, 6))
    plan = backend._network.path
    backend.close()
    shorter = plan.with_name(f"{plan.stem}.6.engine")
    (shorter if missing == "plan" else metadata_path(shorter)).unlink()
    caplog.clear()
    backend = bench.open(plan)
    (warning,) = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert quotes(warning, shorter.name, 6)
    for lengths, tokens in (([2], 3), ([5], 6), ([11], 12)):
        batch = batch_of(lengths)
        assert_same(backend.run(batch), reference(graphs, batch))
        assert bench.library.runs[-1]["query_tokens"][1] == tokens
    assert [use.max_query_length for use in backend.plan_uses()] == [3, 12]
    backend.close()
    assert not bench.driver.held()


@pytest.mark.parametrize("part", ["whole", "pair"])
def test_short_query_engine_over_memory_is_a_warning(
    bench: Bench, graphs: Graphs, caplog: pytest.LogCaptureFixture, part: str
) -> None:
    backend = getattr(bench, part)()
    needed = bench.driver.allocated()
    backend.close()
    backend = getattr(bench, part)(unroll=(3, 6))
    plan = backend._network.path
    one_more = bench.driver.allocated() - needed
    backend.close()
    for room, answering in ((needed + 100, [12]), (needed + one_more - 100, [3, 12])):
        caplog.clear()
        bench.driver.room = room
        backend = bench.open(plan)
        warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
        assert [use.max_query_length for use in backend.plan_uses()] == answering
        assert len(warnings) == 3 - len(answering)
        assert all(any(f".{steps}.engine" in warning for warning in warnings) for steps in {3, 6} - {*answering})
        bench.driver.room = 1 << 32
        batch = batch_of([2, 5])
        assert_same(backend.run(batch), reference(graphs, batch))
        backend.close()
        assert not bench.driver.held()
    # The plan that answers every query is needed.
    bench.driver.room = 100
    with raises(DeviceMemoryError, "out_of_memory"):
        bench.open(plan)
    assert not bench.driver.held()


def test_rebuild_command_includes_short_query_engines(bench: Bench, tmp_path: Path) -> None:
    bench.pair(unroll=(6, 3)).close()
    plan, shorter = (tmp_path / f"drn.query{tokens}.engine" for tokens in ("", ".6"))
    expected = engine_compatibility.rebuild_command(plan, read_sidecar(plan), 20)
    assert f"--query-length 2 8 20 --unroll 3 6 --split --output {plan}" in expected
    assert engine_compatibility.rebuild_command(shorter, read_sidecar(shorter), 20) == expected
    # Alone it is all there is; and beside one that does not know it, it is one of its own.
    content = json.loads(metadata_path(plan).read_text())
    metadata_path(plan).write_text(json.dumps(with_digest({**content, "unrolled": {}})))
    alone = engine_compatibility.rebuild_command(shorter, read_sidecar(shorter))
    plan.unlink()
    assert engine_compatibility.rebuild_command(shorter, read_sidecar(shorter)) == alone
    assert alone.endswith(f"--query-length 6 6 6 --unroll 0 --split --output {shorter}")


def test_rejected_short_query_engines_keep_length_in_name() -> None:
    names = (
        "drn.fp16.12.engine",
        "drn.6.engine",
        "drn.fp16.9.rejected.engine",
        "8.engine",
        "drn.²5.engine",
        "x.engine",
    )
    assert engine_compatibility.unrolled_steps({"unrolled": dict.fromkeys(names, "")}) == [6, 9, 12]
    assert engine_compatibility.unrolled_steps({}) == []


def test_time_and_memory_include_short_query_engines(bench: Bench) -> None:
    alone = bench.whole().memory_report()
    backend = bench.whole(unroll=(6,))
    both = backend.memory_report()
    assert both.plan > alone.plan
    assert both.device > 1.5 * alone.device
    backend.time_gpu(True)
    for lengths in ([5], [9]):
        backend.run(batch_of(lengths))
        assert backend.gpu_ms == bench.library.network_ms


def test_padding_of_earlier_batches_does_not_change_output(bench: Bench, graphs: Graphs) -> None:
    backend = bench.whole([profile((3, 4, 8))])
    backend.run(batch_of([12] * 4, 1))
    for batch in (batch_of([9, 10, 11, 12], 2), batch_of([9], 3), batch_of([2, 1], 4, width=12)):
        assert_same(backend.run(batch), reference(graphs, batch))
    assert bench.library.runs[-1]["query_tokens"] == (3, 4)
    # The network's masks hide it as well.
    assert not bench.library.fed["query_tokens"][:, 2:].any()
    assert bench.library.fed["query_length"].tolist() == [2, 1, 1]


def test_fp16_encodings_stay_fp16(tmp_path: Path, graphs: Graphs) -> None:
    import onnx

    from calib.graph.half_precision import convert_to_half
    from calib.graph.split_model import split_graph, write_split_model

    half = convert_to_half(onnx.load(graphs.whole), "fp16")
    video, query = write_split_model(*split_graph(half), tmp_path / "drn.onnx")
    manifest = dataclasses.replace(graphs.query_manifest, video_part={video.name: sha256(video)})
    pair = Bench(tmp_path, dataclasses.replace(graphs, video=video, query=query, query_manifest=manifest)).pair()
    batch = batch_of([5, 2, 7])
    assert pair.encode(batch.segment_features).dtype == np.float16
    graph = open_backend(query, "cpu", 1)
    for _ in range(3):
        assert_same(pair.run(batch), graph.run(batch), rtol=HALF, atol=HALF)


def test_bfloat16_encodings_are_exchanged_as_float32(tmp_path: Path, graphs: Graphs) -> None:
    pair = Bench(tmp_path, graphs).pair(types={"encoded_features": "BF16"})
    batch = batch_of([5, 2])
    encoded = pair.encode(batch.segment_features)
    assert encoded.dtype == np.float32
    assert not np.any(encoded.view(np.uint32) & 0xFFFF)
    assert_same(pair.run(batch), reference(graphs, batch), rtol=0.05, atol=0.1)


@given(st.floats(width=32, allow_nan=False, allow_infinity=False, min_value=-(2.0**126), max_value=2.0**126))
def test_to_bfloat16_rounds_to_nearest(value: float) -> None:
    numbers = np.array([value], np.float32)
    bits = to_bfloat16(numbers)
    near = [from_bfloat16((bits.astype(np.int64) + step).astype(np.uint16))[0] for step in (-1, 0, 1)]
    errors = [abs(float(number) - value) for number in near if np.isfinite(number)]
    assert abs(float(near[1]) - value) == min(errors)
    assert np.array_equal(to_bfloat16(from_bfloat16(bits)), bits)


def test_run_allocates_nothing_and_synchronizes_once(bench: Bench) -> None:
    backend = bench.whole()
    batch = batch_of([5, 7, 3])
    plain = ["cuMemcpyHtoDAsync_v2", "cuMemcpyDtoHAsync_v2", "cuStreamSynchronize"]
    # A new context waits for its profile once.
    assert bench.calls(lambda: backend.run(batch)) == ["cuStreamSynchronize", *plain]
    captured = ["cuStreamBeginCapture_v2", *plain[:2], "cuStreamEndCapture", "cuGraphInstantiateWithFlags"]
    assert bench.calls(lambda: backend.run(batch)) == [*plain, *captured, "cuGraphDestroy"]
    for seed in range(3):
        again = batch_of([6, 8, 1], seed)
        assert bench.calls(lambda again=again: backend.run(again)) == ["cuGraphLaunch", "cuStreamSynchronize"]
    assert counted(bench.driver.calls)["cuMemAlloc_v2"] == 3


def test_service_batch_sizes_fit_the_execution_states() -> None:
    batches, lengths = ({bucket(size) for size in range(1, most + 1)} for most in (32, 16))
    assert len(batches) * len({max(length, MIN_PADDED_LENGTH) for length in lengths}) <= MAX_EXECUTION_STATES


def test_similar_sizes_share_cuda_graph_up_to_limit(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("runtime.backends.execution_contexts.MAX_EXECUTION_STATES", 16)
    backend = bench.whole([profile((1, 4, 64))])
    before = bench.library.contexts
    for length in (5, 6):
        for size in (7, 8):
            backend.run(batch_of([length] * size))
    assert bench.library.contexts - before == 1
    for size in (1, 2, 3, 4, 6, 8, 12, 16, 24):
        for length in (4, 8):
            for _ in range(2):
                backend.run(batch_of([length] * size))
    assert len(backend._network.contexts.states) == 16
    assert bench.driver.held()["graphs"] == 16


def test_contexts_share_a_profile_if_version_allows(tmp_path: Path, graphs: Graphs) -> None:
    for version, num_contexts in (("8.6.1", 1), ("10.16.1.11", 2)):
        bench = Bench(tmp_path, graphs, version)
        backend = bench.whole([profile((1, 4, 8))])
        for _ in range(3):
            for lengths in ([3, 3], [9, 9, 9]):
                batch = batch_of(lengths)
                assert_same(backend.run(batch), reference(graphs, batch))
        assert len(backend._network.contexts.states) == num_contexts


def test_rtx_engine_skips_explicit_graph_capture(tmp_path: Path, graphs: Graphs) -> None:
    bench = Bench(tmp_path, graphs, "1.7.1.116")
    backend = bench.whole()
    for _ in range(3):
        backend.run(batch_of([5]))
    assert "cuStreamBeginCapture_v2" not in bench.driver.calls


def test_batches_use_the_matching_profile(bench: Bench) -> None:
    backend = bench.whole()
    for size, expected in ((1, [1]), (2, [2]), (5, [6]), (8, [8]), (19, [8, 8, 3])):
        bench.library.runs.clear()
        backend.run(batch_of([4] * size))
        assert [run["query_length"][0] for run in bench.library.runs] == expected


def test_only_encodings_not_on_gpu_are_copied(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    pair = bench.pair(videos=3)
    batch = batch_of([3] * 5)
    videos = known(pair, batch)

    copied: list[str] = []
    upload = pair._network.buffers.upload
    monkeypatch.setattr(pair._network.buffers, "upload", lambda *where: copied.append(where[0]) or upload(*where))

    def copies(*asked: int) -> int:
        before, rows = len(copied), slice(0, len(asked))
        pair.ask(batch.query_tokens[rows], batch.query_length[rows], videos, np.array(asked, np.int32))
        # Of each video its features and its spans.
        return (len(copied) - before) // 2

    assert [copies(0), copies(0), copies(0, 1, 2), copies(2, 0, 1)] == [1, 0, 2, 0]
    # There is room for three, and the one not asked for longest went.
    assert [copies(1, 0), copies(3), copies(0, 1), copies(2)] == [0, 1, 0, 1]
    assert copies(0, 1, 2, 3, 4) >= 2


def test_gpu_time_excludes_copies(bench: Bench) -> None:
    backend = bench.whole()
    batch = batch_of([4] * 19)
    backend.run(batch)
    assert backend.gpu_ms == 0
    backend.time_gpu(True)
    for _ in range(4):
        backend.run(batch)
        assert backend.gpu_ms == 3 * bench.library.network_ms
    assert_same(backend.run(batch), reference(bench.graphs, batch))
    backend.time_gpu(False)
    assert_same(backend.run(batch), reference(bench.graphs, batch))
    assert backend.gpu_ms == 0


def test_memory_is_reported_and_freed_on_close(bench: Bench) -> None:
    for open_one in (bench.whole, bench.pair):
        backend = open_one()
        for _ in range(2):
            backend.run(batch_of([4, 4]))
        report = backend.memory_report()
        assert report.device == bench.driver.allocated()
        assert report.total - report.free == report.device
        assert report.plan > 0
        assert report.pinned > 0
        backend.close()
        assert bench.driver.held() == {}
        backend.close()
        # At exit, and when it is deleted.
        backend = open_one()
        backend.run(batch_of([4]))
        close_all()
        assert bench.driver.held() == {}
        backend = open_one()
        backend.run(batch_of([4]))
        del backend
        assert bench.driver.held() == {}


def test_close_all_waits_for_running_calls(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = batch_of([4, 4])
    queries, both = (batch.query_tokens, batch.query_length), np.arange(2, dtype=np.int32)
    for is_pair in (False, True):
        backend: Any = bench.pair() if is_pair else bench.whole()
        videos = known(backend, batch) if is_pair else []
        ask = functools.partial(*((backend.ask, *queries, videos, both) if is_pair else (backend.run, batch)))
        ask()
        begun, ends = threading.Event(), threading.Event()
        synchronize = bench.cuda.synchronize

        def slowly(stream: int, begun: Any = begun, ends: Any = ends, synchronize: Any = synchronize) -> None:
            begun.set()
            assert ends.wait(60)
            synchronize(stream)

        monkeypatch.setattr(bench.cuda, "synchronize", slowly)
        actual: list[Heads] = []
        asking = threading.Thread(target=lambda ask=ask, actual=actual: actual.append(ask()))
        asking.start()
        assert begun.wait(60)
        held = bench.driver.held()
        # A call that does not end keeps what it works on.
        monkeypatch.setattr(network_module, "EXIT_TIMEOUT_SECONDS", 0.05)
        close_all()
        assert bench.driver.held() == held
        # One that ends is waited for, and then all is freed.
        monkeypatch.setattr(network_module, "EXIT_TIMEOUT_SECONDS", 60.0)
        closing = threading.Thread(target=close_all)
        closing.start()
        ends.set()
        asking.join()
        closing.join()
        assert_same(actual[0], reference(bench.graphs, batch))
        assert bench.driver.held() == {}
        monkeypatch.undo()


def test_query_beyond_the_engine_names_range_and_command(bench: Bench) -> None:
    backend = bench.whole()
    with raises(ShapeError, "query_length_out_of_range", 13, 2, 12, "--query-length 2 8 13"):
        backend.run(batch_of([13]))
    # What is past the longest query is padding, and is left away.
    assert len(backend.run(batch_of([4], width=30))) == 1


def test_features_of_another_width_are_rejected(bench: Bench) -> None:
    backend = bench.whole()
    batch = batch_of([4])
    for features in (batch.segment_features[:, :, :1], batch.segment_features[:, :8]):
        with raises(ShapeError, "shape_mismatch", "segment_features", features.shape):
            backend.run(dataclasses.replace(batch, segment_features=features))
    assert_same(backend.run(batch), reference(bench.graphs, batch))


def test_encoding_of_another_shape_is_rejected_uncached(bench: Bench) -> None:
    pair = bench.pair()
    batch = batch_of([4])
    odd = EncodedVideo(np.zeros((8, 16), np.float32), batch.segment_spans[0], 1.0)
    for _ in range(2):
        with raises(ShapeError, "shape_mismatch", "encoded_features", (8, 16), (16, 16)):
            pair.ask(batch.query_tokens, batch.query_length, [odd], np.zeros(1, np.int32))
    assert_same(pair.run(batch), reference(bench.graphs, batch))


def test_failed_capture_keeps_results_and_warns_once(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    backend = bench.whole()
    bench.library.failing["capture"] = "operation not permitted when stream is capturing"
    with caplog.at_level(logging.WARNING, "drn"):
        for seed in range(4):
            for lengths in ([5], [2, 3]):
                batch = batch_of(lengths, seed)
                assert_same(backend.run(batch), reference(bench.graphs, batch))
    failure = "operation not permitted when stream is capturing"
    assert len(caplog.records) == len(records(caplog, logging.WARNING, failure, "--unroll 6 10")) == 1
    assert "cuGraphLaunch" not in bench.driver.calls
    # What is written out already has another reason.
    caplog.clear()
    written = bench.whole(unroll=(6,))
    with caplog.at_level(logging.WARNING, "drn"):
        for _ in range(3):
            written.run(batch_of([5]))
    (warning,) = [record.message for record in caplog.records]
    assert quotes(warning, "drn.fp32.6.engine", failure)
    assert "--unroll" not in warning


@pytest.mark.parametrize("kept_errors", [0, 1])
def test_failed_capture_leaves_a_working_model(bench: Bench, kept_errors: int) -> None:
    backend = bench.whole()
    bench.library.failing["capture"] = NOT_CAPTURABLE
    first, second = batch_of([5]), batch_of([2, 3])
    for _ in range(2):
        assert_same(backend.run(first), reference(bench.graphs, first))
    # The library reports the error of the capture once more, in whichever context runs next.
    bench.library.kept_errors = kept_errors
    for batch in (first, second, first, second):
        assert_same(backend.run(batch), reference(bench.graphs, batch))


def test_pending_errors_without_failed_capture_are_raised(bench: Bench) -> None:
    backend = bench.whole()
    backend.run(batch_of([5]))
    bench.library.kept_errors = 1
    with pytest.raises(DeviceError):
        backend.run(batch_of([5]))
    # An error that stays is reported, also after a failed capture.
    bench.library.failing["capture"] = NOT_CAPTURABLE
    for _ in range(2):
        backend.run(batch_of([5]))
    bench.library.kept_errors = 9
    with pytest.raises(DeviceError):
        backend.run(batch_of([5]))


def test_tensorrt_8_captures_only_unrolled_lstms(
    tmp_path: Path, graphs: Graphs, caplog: pytest.LogCaptureFixture
) -> None:
    bench = Bench(tmp_path, graphs, "8.6.1")
    backend = bench.whole()
    with caplog.at_level(logging.WARNING, "drn"):
        for seed in range(4):
            batch = batch_of([5], seed)
            assert_same(backend.run(batch), reference(graphs, batch))
    # 8.6 breaks the line within its error.
    assert caplog.messages
    assert not any("\n" in message for message in caplog.messages)
    assert "cuGraphLaunch" not in bench.driver.calls
    written = bench.whole(unroll=(6,))
    for _ in range(4):
        written.run(batch_of([5]))
    assert "cuGraphLaunch" in bench.driver.calls


def test_failed_hardware_compatible_engine_names_the_remedy(bench: Bench) -> None:
    backend = bench.whole(options={"version_compatible": False, "hardware_compatible": True})
    # pytorch/TensorRT#4481.
    bench.library.failing["execute_async_v3"] = "Error Code 1: Cask (Cask convolution execution)"
    with pytest.raises(DeviceError) as caught:
        backend.run(batch_of([5]))
    assert "export.build_engine" in str(caught.value)
    assert "--hardware-compatible" not in str(caught.value)
    # Of other plans the failure is what it is.
    other = bench.whole()
    with pytest.raises(DeviceError) as caught:
        other.run(batch_of([5]))
    assert "export.build_engine" not in str(caught.value)


def test_engine_for_another_gpu_raises_device_error(tmp_path: Path, graphs: Graphs) -> None:
    bench = Bench(tmp_path, graphs, "1.7.1.116")
    with pytest.raises(DeviceError):
        bench.whole(compute_capabilities=["8.6"])
    batch = batch_of([5])
    assert_same(bench.whole(compute_capabilities=["8.6", "9.0"]).run(batch), reference(graphs, batch))


@pytest.mark.parametrize(
    ("call", "message", "code", "values"),
    [
        ("create_execution_context", "Assertion status == kSUCCESS", "gpu_call_failed", ["export.build_engine"]),
        ("create_execution_context", "OutOfMemory (Requested size was 9 bytes.)", "out_of_memory", ["--batch"]),
        ("deserialize_cuda_engine", "version 239 does not match 240", "gpu_call_failed", ["export.build_engine"]),
        ("Runtime", "CUDA initialization failure with error: 35", "driver_too_old", ["CUDA 13.0"]),
    ],
)
def test_engine_that_cannot_be_opened_frees_all_memory(
    bench: Bench, call: str, message: str, code: str, values: list[str]
) -> None:
    bench.library.failing[call] = message
    subject = "tensorrt 10.16.1.11" if code == "driver_too_old" else "drn.fp32.engine"
    with raises(DeviceError, code, subject, message.rstrip(")."), *values) as caught:
        bench.whole()
    assert ("export.build_engine" in str(caught.value)) == ("export.build_engine" in values)
    assert bench.driver.held() == {}


def test_engine_for_another_or_a_small_gpu_frees_all_memory(bench: Bench) -> None:
    with raises(DeviceError, "incompatible_engine", "tensorrt 10.16.1.11", "NVIDIA T4"):
        bench.whole(gpu="NVIDIA T4, 1, 1 MiB, 7.5")
    assert bench.library.calls == []
    bench.driver.room = 6000
    with raises(DeviceError, "out_of_memory", "drn.fp32.engine", "--batch"):
        bench.whole()
    assert bench.driver.held() == {}


def test_engine_larger_than_host_memory_raises_one_error(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = bench.whole()
    path, read = backend._network.path, Path.read_bytes

    def full(file: Path) -> bytes:
        if file.suffix == ".engine":
            raise MemoryError
        return read(file)

    monkeypatch.setattr(Path, "read_bytes", full)
    with pytest.raises(DeviceMemoryError):
        bench.open(path)


@pytest.mark.parametrize("call", ["cuStreamBeginCapture_v2", "cuStreamEndCapture", "cuGraphInstantiateWithFlags"])
def test_driver_without_graph_capture_still_runs(bench: Bench, call: str) -> None:
    backend = bench.whole()
    bench.driver.failing[call] = 801
    for seed in range(3):
        batch = batch_of([5, 2], seed)
        assert_same(backend.run(batch), reference(bench.graphs, batch))


def test_ctrl_c_during_capture_leaves_a_working_model(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    backend, batch, begin = bench.whole(), batch_of([5, 2]), bench.cuda.begin_capture

    def interrupted(stream: int) -> None:
        begin(stream)
        raise KeyboardInterrupt

    backend.run(batch)
    with monkeypatch.context() as patch:
        patch.setattr(bench.cuda, "begin_capture", interrupted)
        with pytest.raises(KeyboardInterrupt):
            backend.run(batch)
    for _ in range(2):
        assert_same(backend.run(batch), reference(bench.graphs, batch))


@unrolled_or_not
def test_full_memory_frees_caches_and_halves_the_batch(bench: Bench, unroll: Sequence[int]) -> None:
    backend = bench.whole(unroll=unroll)
    network = backend.network_for(4)
    for lengths in ([4], [4], [9, 9]):
        backend.run(batch_of(lengths))
    failing = iter([True, False, False])
    create = Engine._create

    def sometimes(engine: Engine) -> Any:
        if next(failing, False):
            engine._logger.log(1, "CUDA error 2: out of memory")
            return None
        return create(engine)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Engine, "_create", sometimes)
        network._engine.create_execution_context = lambda strategy: sometimes(network._engine)
        batch = batch_of([4] * 8, 1)
        bench.library.runs.clear()
        assert_same(backend.run(batch), reference(bench.graphs, batch))
    assert [run["query_length"] for run in bench.library.runs] == [(4,), (4,)]
    # Contexts of other shapes and plans were released first.
    assert sum(len(each.contexts.states) for each in backend._networks) == len(network.contexts.states) == 1


@unrolled_or_not
def test_persistent_full_memory_raises_and_model_survives(bench: Bench, unroll: Sequence[int]) -> None:
    backend = bench.whole(unroll=unroll)
    batch = batch_of([4] * 4)
    bench.library.failing["execute_async_v3"] = "Requested amount of GPU memory: CUDA out of memory"
    with raises(DeviceError, "out_of_memory", 2):
        backend.run(batch)
    del bench.library.failing["execute_async_v3"]
    assert_same(backend.run(batch), reference(bench.graphs, batch))


@unrolled_or_not
def test_threads_can_share_an_engine(bench: Bench, unroll: Sequence[int]) -> None:
    backend = bench.whole(unroll=unroll)
    batches = [batch_of([3 + seed, 5], seed) for seed in range(4)]
    expected = [reference(bench.graphs, batch) for batch in batches]
    actual: list[list[Heads]] = [[] for _ in batches]

    def ask(index: int) -> None:
        actual[index] += [backend.run(batches[index]) for _ in range(10)]

    threads = [threading.Thread(target=ask, args=(index,)) for index in range(len(batches))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for answers, heads in zip(actual, expected, strict=True):
        assert len(answers) == 10
        for answer in answers:
            assert_same(answer, heads)


def test_threads_that_share_a_pair_get_their_own_videos(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    pair = bench.pair()
    batches = [batch_of([5, 2], seed) for seed in range(2)]
    encode, actual = pair.encode, {}

    def then_another(features: np.ndarray) -> np.ndarray:
        # While one call encodes, another begins, ends, and leaves its videos on the GPU.
        monkeypatch.setattr(pair, "encode", encode)
        other = threading.Thread(target=lambda: actual.update({1: pair.run(batches[1])}))
        other.start()
        other.join()
        return encode(features)

    monkeypatch.setattr(pair, "encode", then_another)
    actual[0] = pair.run(batches[0])
    for index, batch in enumerate(batches):
        assert_same(actual[index], reference(bench.graphs, batch))


def test_closed_model_raises_without_driver_calls(bench: Bench) -> None:
    batch = batch_of([4, 4])
    for open_one in (bench.whole, bench.pair):
        backend: Any = open_one()
        backend.run(batch)
        backend.close()
        calls = len(bench.driver.calls)
        for use, given_to in ((backend.run, (batch,)), (backend.memory_report, ()), (backend.time_gpu, (True,))):
            with raises(DeviceError, "model_closed"):
                use(*given_to)
        assert set(bench.driver.calls[calls:]) <= {"cuCtxPushCurrent_v2", "cuCtxPopCurrent_v2"}


def test_forked_process_raises_and_makes_no_driver_calls(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = bench.whole()
    here = os.getpid()
    monkeypatch.setattr(os, "getpid", lambda: here + 1)
    with raises(DeviceError, "forked_process", here, here + 1):
        backend.run(batch_of([4]))
    calls = len(bench.driver.calls)
    # Who held it when the process was forked will never let go.
    with backend._lock:
        backend.close()
        close_all()
    assert len(bench.driver.calls) == calls
    monkeypatch.undo()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
@unrolled_or_not
@pytest.mark.parametrize("what", ["whole", "pair"])
def test_forked_process_destroys_no_tensorrt_objects(bench: Bench, what: str, unroll: Sequence[int]) -> None:
    backend = getattr(bench, what)(unroll=unroll)
    backend.run(batch_of([4]))
    network = backend.network_for(4)
    (_, program), *_ = network.contexts.states.items()
    things = [weakref.ref(thing) for thing in (program.context, network._engine)]
    del network
    child = os.fork()
    if not child:
        with contextlib.suppress(BaseException):
            backend.close()
            del backend, program
            gc.collect()
            os._exit(sum(thing() is None for thing in things))
        os._exit(99)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    del backend, program
    assert [thing() for thing in things] == [None, None]


def test_cuda_context_of_the_caller_is_restored(bench: Bench) -> None:
    theirs = 9
    bench.driver.stack().append(theirs)
    batch = batch_of([4, 4])
    for open_one in (bench.whole, bench.pair):
        backend = open_one()
        assert bench.driver.stack() == [theirs]
        backend.time_gpu(True)
        backend.run(batch)
        assert backend.memory_report().device > 0
        bench.library.failing["execute_async_v3"] = "shape mismatch"
        with raises(DeviceError, "gpu_call_failed", "tensorrt 10.16.1.11", "shape mismatch"):
            backend.run(batch)
        bench.library.failing.clear()
        assert bench.driver.stack() == [theirs]
        backend.close()
        assert bench.driver.stack() == [theirs]
    bench.driver.room = 6000
    with raises(DeviceError, "out_of_memory"):
        bench.whole()
    assert bench.driver.stack() == [theirs]


@pytest.mark.parametrize("version", VERSIONS)
def test_empty_batch_returns_empty_heads(tmp_path: Path, graphs: Graphs, version: str) -> None:
    bench, some = Bench(tmp_path, graphs, version), batch_of([4, 4])
    none = Batch(*(values[:0] for values in vars(some).values()))
    for backend in (
        bench.whole(),
        bench.pair(),
        open_backend(graphs.whole, "cpu", 1),
        open_backend(graphs.query, "cpu", 1),
    ):
        locations = backend.run(some).matching_logits.shape[1]
        assert_same(backend.run(none), Heads(*(np.empty((0, locations, *tail), np.float32) for tail in ((), (2,), ()))))
        assert_same(backend.run(some), reference(graphs, some))
        if hasattr(backend, "ask"):
            encoded = backend.encode(some.segment_features)
            assert backend.encode(none.segment_features).shape == (0, *encoded.shape[1:])
            for videos in (known(backend, some), []):
                heads = backend.ask(none.query_tokens, none.query_length, videos, np.empty(0, np.int32))
                assert heads.boundary_distances.shape == (0, locations, 2)


def test_encoding_caches_stay_separate_when_memory_is_full(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch that finds no memory is asked again in halves through another profile, whose bank is another."""
    pair = bench.pair(profiles=[profile((1, 1, 1), "query", (1, 1, 1)), profile((2, 4, 8), "query", (1, 2, 3))])
    batch = batch_of([4, 4])
    # The first half asks for what is second in the bank of the whole.
    videos, both = known(pair, batch)[::-1], np.array([1, 0], np.int32)
    asked_for = batch.query_tokens, batch.query_length, videos
    create, failing = pair._network.contexts.create, iter([True])

    def sometimes(*arguments: Any) -> Any:
        if next(failing, False):
            raise OutOfDeviceMemory("CUDA error 2: out of memory.")
        return create(*arguments)

    monkeypatch.setattr(pair._network.contexts, "create", sometimes)
    assert_same(pair.ask(*asked_for, both), reference(bench.graphs, batch))
    # What was put into the first bank is what it holds.
    assert_same(pair.ask(*asked_for, both), reference(bench.graphs, batch))


@unrolled_or_not
def test_failed_pair_opening_frees_all_memory(bench: Bench, unroll: Sequence[int]) -> None:
    profiles = [profile((1, 1, 1), "query", (1, 1, 1)), profile((2, 4, 8), "query", (1, 2, 3))]
    allocations = ("cuMemAlloc_v2", "cuMemAllocHost_v2")
    bench.pair(profiles=profiles).close()
    at_first = sum(name in allocations for name in bench.driver.calls)
    bench.driver.calls.clear()
    bench.pair(profiles=profiles, unroll=unroll).close()
    count = sum(name in allocations for name in bench.driver.calls)
    assert count >= 2 * (2 + 4) + 4
    for nth in range(count):
        bench.driver.full_at = nth
        # Only a plan for short queries can be left out, which is opened last.
        needed = nth < at_first
        with pytest.raises(DeviceMemoryError) if needed else contextlib.nullcontext():
            pair = bench.pair(profiles=profiles, unroll=unroll)
            assert [use.max_query_length for use in pair.plan_uses()] == [LONGEST]
            pair.close()
        assert bench.driver.held() == {}, nth
    bench.driver.full_at = None
    assert_same(
        bench.pair(profiles=profiles, unroll=unroll).run(batch_of([4, 4])), reference(bench.graphs, batch_of([4, 4]))
    )


def test_changed_engine_is_not_loaded(bench: Bench) -> None:
    bench.whole().close()
    plan = bench.directory / "drn.fp32.engine"
    plan.write_bytes(plan.read_bytes() + b" ")
    bench.library.calls.clear()
    with raises(ModelFileError, "digest_mismatch", plan):
        bench.open(plan)
    assert bench.library.calls == []


def test_host_code_is_allowed_only_by_metadata(bench: Bench) -> None:
    batch = batch_of([5])
    for options in ({}, {"version_compatible": True, "hardware_compatible": False}):
        assert_same(bench.whole(options=options).run(batch), reference(bench.graphs, batch))
    opened = [call for call in bench.library.calls if call[0] == "deserialize_cuda_engine"]
    assert opened == [("deserialize_cuda_engine", False), ("deserialize_cuda_engine", True)]


def test_engine_with_other_tensors_is_rejected(bench: Bench, graphs: Graphs) -> None:
    plan = bench.directory / "odd.engine"
    write_plan(plan, graphs.video, [profile((1, 1, 1), "video")], graphs.manifest, bench.version)
    with raises(ModelFileError, "unexpected_tensors", plan, "query_tokens"):
        bench.open(plan)
    assert bench.driver.held() == {}


def test_pair_with_missing_or_foreign_video_part_is_rejected(bench: Bench) -> None:
    bench.pair().close()
    query, video = bench.directory / "drn.query.engine", bench.directory / "drn.video.engine"
    with raises(ModelFileError, "model_part", video, query):
        bench.open(video)
    about = json.loads(metadata_path(video).read_text())
    about["sha256"] = {video.name: about["sha256"][video.name]}
    metadata_path(video).write_text(json.dumps(with_digest(about)))
    with raises(ModelFileError, "digest_mismatch", video, query.name):
        bench.open(query)
    video.unlink()
    with raises(ModelFileError, "missing_file", query, video.name):
        bench.open(query)


def test_engine_on_cpu_is_rejected(bench: Bench) -> None:
    bench.whole()
    with raises(DeviceError, "gpu_required", "drn.fp32.engine"):
        open_backend(bench.directory / "drn.fp32.engine", "cpu")


def test_engine_suffix_opens_tensorrt_backend(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.whole()
    monkeypatch.setattr("runtime.backends.tensorrt_backend.Cuda", lambda: bench.cuda)
    monkeypatch.setattr(
        "runtime.backends.tensorrt_backend._import", lambda names: ({("tensorrt",): bench.library}[names], "")
    )
    grounder = Grounder.load(bench.directory / "drn.fp32.engine", "cuda", 2)
    assert isinstance(grounder.backend, TensorRTBackend)
    assert grounder.backend.device == "cuda"


def test_tensorrt_is_not_imported_without_gpu(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.whole()

    def absent() -> Cuda:
        raise DeviceError("There is no CUDA driver here.")

    monkeypatch.setattr("runtime.backends.tensorrt_backend.Cuda", absent)
    monkeypatch.setattr("runtime.backends.tensorrt_backend._import", lambda names: pytest.fail(f"imports {names}"))
    with raises(DeviceError, "incompatible_engine", "There is no CUDA driver here", bench.directory / "drn.onnx"):
        open_backend(bench.directory / "drn.fp32.engine")


H100 = engine_compatibility.HostInfo("tensorrt 10.16.0", "NVIDIA H100", "9.0")


def sidecar_of(**content: Any) -> Sidecar:
    from tests.export.conftest import TINY, manifest

    about = dataclasses.replace(manifest(TINY), precision="int8", sources={"drn.pt": "0", "drn.onnx": "1"})
    profiles = [
        {"name": "one query", "batch": [1, 1, 1], "query_length": [1, 8, 16]},
        {"name": "several queries", "batch": [2, 8, 32], "query_length": [1, 8, 16]},
    ]
    known = {
        "library": "tensorrt 10.16.0",
        "target": "tensorrt",
        "gpu": "NVIDIA H100, 580.1, 81559 MiB, 9.0",
        "compute_capabilities": [],
        "options": {"version_compatible": False, "hardware_compatible": False},
        "profiles": profiles,
        "sha256": {"drn.int8.engine": "2", "drn.int8.onnx": "3"},
    }
    return Sidecar(about, {**known, **content})


COMPATIBLE = {"options": {"version_compatible": True}}
HARDWARE = {"options": {"hardware_compatible": True}}
RTX = {"target": "tensorrt-rtx", "library": "tensorrt_rtx 1.7.1", "gpu": None, "compute_capabilities": ["8.6", "8.9"]}


@pytest.mark.parametrize(
    ("content", "changed", "values"),
    [
        ({}, {}, None),
        ({}, {"gpu": "NVIDIA H100 MIG 1g.10gb"}, ["NVIDIA H100 MIG 1g.10gb"]),
        ({}, {"gpu": "NVIDIA H200"}, ["NVIDIA H100 (9.0)", "NVIDIA H200 (9.0)"]),
        ({}, {"capability": "8.0"}, ["NVIDIA H100 (9.0)", "NVIDIA H100 (8.0)"]),
        ({}, {"library": "tensorrt 10.16.1"}, ["tensorrt 10.16.0", "NVIDIA H100 (9.0)", "tensorrt 10.16.1"]),
        ({}, {"library": "tensorrt_rtx 1.7.1"}, ["tensorrt_rtx 1.7.1", "tensorrt 10.16.0"]),
        ({}, {"library": None, "library_error": "No module"}, ["No module"]),
        ({}, {"gpu": None, "gpu_error": "no driver"}, ["no driver"]),
        (COMPATIBLE, {"library": "tensorrt 10.16.1"}, None),
        (COMPATIBLE, {"library": "tensorrt 10.20.0"}, None),
        (COMPATIBLE, {"library": "tensorrt_lean 10.16.0"}, None),
        (COMPATIBLE, {"library": "tensorrt 10.9.0"}, ["tensorrt 10.16.0", "tensorrt 10.9.0"]),
        (COMPATIBLE, {"library": "tensorrt 11.4.0"}, ["tensorrt 10.16.0", "tensorrt 11.4.0"]),
        (COMPATIBLE, {"gpu": "NVIDIA H200"}, ["NVIDIA H100", "NVIDIA H200"]),
        (HARDWARE, {"gpu": "NVIDIA A100", "capability": "8.0"}, None),
        (HARDWARE, {"gpu": "NVIDIA B200", "capability": "10.0"}, None),
        (HARDWARE, {"gpu": "NVIDIA T4", "capability": "7.5"}, ["Ampere", "NVIDIA T4"]),
        (RTX, {"library": "tensorrt_rtx 1.7.1", "gpu": "RTX 3090", "capability": "8.6"}, None),
        (RTX, {"library": "tensorrt_rtx 1.7.1"}, ["8.6, 8.9", "NVIDIA H100"]),
        ({"gpu": None}, {"gpu": "anything", "capability": "8.0"}, None),
    ],
)
def test_incompatibility_names_engine_and_machine(
    content: dict[str, Any], changed: dict[str, Any], values: list[str] | None
) -> None:
    machine = dataclasses.replace(H100, **changed)
    reason = engine_compatibility.incompatibility(Path("models/drn.int8.engine"), sidecar_of(**content), machine)
    if values is None:
        assert reason is None
    else:
        assert quotes(str(reason), "drn.int8.engine", *values)
        assert quotes(str(reason), "python -m export.build_engine") or quotes(str(reason), "models/drn.int8.onnx")


def test_rebuild_command_is_complete_with_existing_flags() -> None:
    pytest.importorskip("onnx")
    from export.build_engine import build_engine

    plan = Path("models/drn.int8.engine")
    command = engine_compatibility.rebuild_command(
        plan, sidecar_of(options={"version_compatible": True, "hardware_compatible": True})
    )
    assert command == (
        "python -m export.build_engine --model models/drn.onnx --precision int8 --target tensorrt --data DIR "
        "--batch 1 8 32 --query-length 1 8 16 --unroll 0 --version-compatible --hardware-compatible "
        "--output models/drn.int8.engine"
    )
    known = inspect.signature(build_engine).parameters
    flags = [word[2:].replace("-", "_") for word in command.split() if word.startswith("--")]
    assert set(flags) <= set(known)


@pytest.mark.parametrize("part", ["video", "query"])
def test_rebuild_command_of_a_part_builds_the_split_model(part: Any) -> None:
    whole = sidecar_of()
    sources = {"drn.pt": "0" * 64, "drn.onnx": "1" * 64, "drn.int8.onnx": "2" * 64}
    manifest = dataclasses.replace(whole.manifest, part=part, sources=sources)
    command = engine_compatibility.rebuild_command(
        Path(f"models/drn.int8.{part}.engine"), Sidecar(manifest, whole.content)
    )
    assert "--model models/drn.onnx " in command
    assert command.endswith("--split --output models/drn.int8.query.engine")


def test_lean_runtime_is_used_only_for_compatible_engines() -> None:
    assert engine_compatibility.libraries({"target": "tensorrt"}) == ("tensorrt",)
    assert engine_compatibility.libraries({"target": "tensorrt", **COMPATIBLE}) == ("tensorrt", "tensorrt_lean")
    assert engine_compatibility.libraries(RTX) == ("tensorrt_rtx",)
    assert engine_compatibility.libraries({"target": "abacus"}) == ()


@given(st.integers(1, 5000))
def test_bucket_pads_by_at_most_a_third(size: int) -> None:
    padded = bucket(size)
    assert size <= padded
    assert padded - size <= padded / 3
    assert bucket(padded) == padded
    # Few sizes need few CUDA graphs.
    assert padded in {factor << power for factor in (1, 3) for power in range(14)}


def profiles_of(*batches: tuple[int, int, int]) -> list[OptimizationProfile]:
    profiles = []
    for index, batch in enumerate(batches):
        shapes = {name: [tuple(shape) for shape in trio] for name, trio in profile(batch)["shapes"].items()}
        profiles.append(profile_from_shapes(index, AXES["whole"], shapes))
    return profiles


@pytest.mark.parametrize(
    ("batch", "length", "index", "padded"),
    [(1, 1, 0, (1, 4)), (2, 5, 1, (2, 6)), (5, 9, 1, (6, 12)), (7, 12, 1, (8, 12)), (10, 11, 2, (12, 12))],
)
def test_profile_with_least_padding_is_chosen(batch: int, length: int, index: int, padded: tuple[int, int]) -> None:
    chosen, sizes = choose_profile(
        profiles_of((1, 1, 1), (2, 4, 8), (6, 16, 30)), {"batch": batch, "query_length": length}
    )
    assert chosen.index == index
    assert (sizes["batch"], sizes["query_length"]) == padded


def test_request_beyond_all_profiles_names_their_ranges() -> None:
    with raises(ShapeError, "shape_mismatch", "batch 1 to 1, query_length 2 to 12", "batch 2 to 8", "batch 9"):
        choose_profile(profiles_of((1, 1, 1), (2, 4, 8)), {"batch": 9, "query_length": 3})


@given(st.lists(st.integers(0, 9), min_size=1, max_size=60), st.integers(1, 8), st.integers(1, 4))
def test_slices_contain_each_row_once_and_limit_videos(which: list[int], largest: int, most: int) -> None:
    index, videos = np.array(which, np.int32), max(which) + 1
    parts = list(row_slices_by_video(index, largest, most, videos))
    assert sorted(np.concatenate(parts).tolist()) == list(range(len(which)))
    for rows in parts:
        assert 1 <= len(rows) <= largest
        needed, row_asks = referenced_videos(index[rows], videos, most)
        assert len(needed) <= most
        assert np.array_equal(needed[row_asks], index[rows])
    plain = [row for part in row_slices(len(which), largest) for row in part.tolist()]
    assert plain == list(range(len(which)))


@given(st.lists(st.tuples(st.integers(1, 40), st.sampled_from(["f4", "f2", "i4"])), min_size=1, max_size=6))
def test_packed_tensors_are_aligned_and_do_not_overlap(tensors: list[tuple[int, str]]) -> None:
    shapes = {str(number): (size, 3) for number, (size, _) in enumerate(tensors)}
    dtypes = {str(number): np.dtype(kind) for number, (_, kind) in enumerate(tensors)}
    regions, size = pack_tensors(shapes, dtypes)
    buffer = np.zeros(size, np.uint8)
    for region in regions.values():
        assert region.offset % ALIGNMENT == 0
        view = region.view(buffer)
        assert view.shape == region.shape
        assert not view.any()
        view[...] = 1


@given(st.integers(1, 5), st.lists(st.lists(st.sampled_from("abcdefgh"), min_size=1, max_size=5, unique=True)))
def test_encoding_slots_hold_the_last_used_keys(slots: int, asked: list[list[str]]) -> None:
    cache, content = EncodingSlots(slots), {}
    recent: list[str] = []
    for keys in (some[:slots] for some in asked):
        places, missing = cache.acquire(keys)
        assert len(set(places.tolist())) == len(keys)
        for position in missing:
            content[int(places[position])] = keys[position]
        assert [content[slot] for slot in places.tolist()] == keys
        # Those asked for last are there still.
        recent = [key for key in recent if key not in keys] + keys
        assert set(recent[-slots:]) == set(content.values())


def test_failed_cuda_call_is_named_with_driver_message() -> None:
    driver = Driver()
    cuda = Cuda(driver)
    assert (cuda.name, cuda.capability, cuda.driver) == ("NVIDIA H100", "9.0", "13.0")
    with raises(CudaError, "gpu_call_failed", "cuMemFree_v2", "CUDA_ERROR_INVALID_CONTEXT", 201):
        cuda.free(3)
    with cuda.current():
        with raises(CudaError, "gpu_call_failed", "cuMemFree_v2", "CUDA_ERROR_INVALID_VALUE", 1):
            cuda.free(3)
        driver.room = 100
        with raises(OutOfDeviceMemory, "out_of_memory", "CUDA_ERROR_OUT_OF_MEMORY"):
            cuda.allocate(200)


def test_driver_without_gpus_or_too_old_raises_error() -> None:
    with raises(DeviceError, "gpu_unavailable", "CUDA_VISIBLE_DEVICES"):
        Cuda(Driver(devices=0))
    driver = Driver()
    names = {name: getattr(driver, name) for name in SIGNATURES if name != "cuGraphInstantiateWithFlags"}
    with raises(DeviceError, "driver_too_old", "cuGraphInstantiateWithFlags"):
        Cuda(type("Old", (), {name: staticmethod(call) for name, call in names.items()}))


def test_missing_cuda_driver_raises_gpu_unavailable() -> None:
    if ctypes.util.find_library("cuda"):
        pytest.skip("this machine has a CUDA driver")
    with raises(DeviceError, "gpu_unavailable", "libcuda.so.1"):
        Cuda()


@pytest.mark.gpu
@pytest.mark.trt
@pytest.mark.parametrize("split", [False, True])
def test_real_engine_equals_its_graph(tmp_path: Path, graphs: Graphs, split: bool) -> None:
    """As `test_engine_gives_same_moments_as_graph`, with TensorRT's own kernels and CUDA's own graphs."""
    if not any(importlib.util.find_spec(name) for name in ("tensorrt", "tensorrt_rtx")):
        pytest.skip("neither TensorRT nor TensorRT-RTX is installed")
    try:
        cuda = Cuda()
    except DeviceError as error:
        pytest.skip(f"an engine runs on a GPU: {error}")
    plan = real_plan(tmp_path / "drn.engine", graphs.whole, PROFILES, graphs.manifest, cuda)
    if split:
        about = dataclasses.replace(graphs.manifest, part="video")
        real_plan(tmp_path / "drn.video.engine", graphs.video, [profile((1, 1, 1), "video")], about, cuda)
        both = [profile((1, 1, 1), "query"), profile((2, 4, 8), "query")]
        plan = real_plan(tmp_path / "drn.query.engine", graphs.query, both, graphs.query_manifest, cuda)
    backend = open_engine(plan)
    for seed in range(4):
        for lengths in ([5], [3, 7], [2, 5, 5, 9, 2], [6] * 19):
            batch = batch_of(lengths, seed)
            expected = reference(graphs, batch)
            for name, values in vars(backend.run(batch)).items():
                largest = float(np.abs(getattr(expected, name)).max())
                np.testing.assert_allclose(values, getattr(expected, name), atol=HALF * largest, rtol=HALF)
    backend.time_gpu(True)
    backend.run(batch_of([5]))
    assert 0 < backend.gpu_ms < 1000
    backend.close()


def real_plan(plan: Path, graph: Path, shapes: Sequence[dict[str, Any]], manifest: Manifest, cuda: Cuda) -> Path:
    """Build a plan for the GPU that is here, with whichever TensorRT is."""
    from export.engine.builder import BuildOptions, build, unavailable_reason
    from export.engine.profiles import Profile

    target = "tensorrt-rtx" if unavailable_reason("tensorrt") else "tensorrt"
    profiles = [
        Profile(p["name"], p["batch"], p["query_length"], {n: tuple(map(tuple, s)) for n, s in p["shapes"].items()})
        for p in shapes
    ]
    built = build(graph.read_bytes(), BuildOptions(target=target, precision="fp32", profiles=profiles))
    gpu = f"{cuda.name}, 0, 0, {cuda.capability}"
    write_plan(plan, graph, shapes, manifest, library=built.library, target=target, gpu=gpu)
    plan.write_bytes(built.plan)
    about = json.loads(metadata_path(plan).read_text())
    about["sha256"][plan.name] = sha256(plan)
    metadata_path(plan).write_text(json.dumps(with_digest(about)))
    return plan
