"""Test `runtime.backends.tensorrt_backend` on doubles of CUDA and TensorRT: engines answer as their graphs."""

from __future__ import annotations

import dataclasses
import importlib.util
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.fake_tensorrt import VERSIONS, write_plan
from runtime.artifacts.encoded_video import EncodedVideo
from runtime.artifacts.engine_metadata import read_sidecar
from runtime.artifacts.manifest import Manifest
from runtime.backends import open_backend
from runtime.backends.cuda_driver import Cuda
from runtime.backends.tensorrt_backend import open_engine
from runtime.core.batch import Batch, Heads
from runtime.core.bfloat16 import from_bfloat16, to_bfloat16
from runtime.core.errors import DeviceError, ShapeError
from runtime.core.io.digests import sha256
from tests.raising import raises
from tests.runtime.engine_bench import (
    PROFILES,
    Bench,
    Graphs,
    assert_same,
    batch_of,
    edit_metadata,
    encode_all,
    profile,
)
from tests.runtime.number_checks import check_video_index, check_words_and_lengths
from tests.tolerances import HALF


@pytest.mark.parametrize("version", VERSIONS)
def test_engine_returns_same_heads_as_graph(tmp_path: Path, graphs: Graphs, version: str) -> None:
    bench = Bench(tmp_path, graphs, version)
    backend = bench.whole()
    # Each size runs plainly, then before its capture, and then as a CUDA graph.
    for seed in range(3):
        for lengths in ([5], [1], [12], [3, 7], [2, 5, 5, 9, 1], [4] * 8, [6] * 19):
            bench.check(backend, batch_of(lengths, seed))


@pytest.mark.parametrize("version", VERSIONS)
def test_engine_pair_equals_unsplit_graph(tmp_path: Path, graphs: Graphs, version: str) -> None:
    bench = Bench(tmp_path, graphs, version)
    pair = bench.pair()
    index = np.array([4, 4, 0, 9, 4, 0, 1, 2, 3, 9], np.int32)
    for seed in range(3):
        batch = batch_of([5, 2, 9, 1, 12, 3, 3, 8, 7, 4], seed)
        bench.check(pair, batch)
        query = batch.query_tokens, batch.query_length
        expected = graphs.reference(Batch(*query, batch.segment_features[index], batch.segment_spans[index]))
        assert_same(pair.ask(*query, encode_all(pair, batch), index), expected)


def test_short_queries_use_the_short_query_engine(bench: Bench) -> None:
    for backend in (bench.whole(unroll=(6, 3)), bench.pair(unroll=(6, 3))):
        # The shortest plan that accepts the longest query, else the loop.
        for lengths, tokens in (([2], 3), ([3], 3), ([4], 6), ([6], 6), ([7], 8), ([12], 12)):
            for _ in range(3):
                bench.check(backend, batch_of(lengths))
                assert bench.library.runs[-1]["query_tokens"] == (1, tokens)
        for lengths, tokens in (([3, 1, 2], 3), ([5, 3, 2, 6], 6), ([2] * 7 + [11], 12), ([5] * 19, 6)):
            bench.check(backend, batch_of(lengths, width=12))
            assert bench.library.runs[-1]["query_tokens"][1] == tokens


def test_batches_use_the_matching_profile(bench: Bench) -> None:
    backend = bench.whole()
    for size, expected in ((1, [1]), (2, [2]), (5, [6]), (8, [8]), (19, [8, 8, 3])):
        bench.library.runs.clear()
        backend.run(batch_of([4] * size))
        assert [run["query_length"][0] for run in bench.library.runs] == expected


def test_padding_of_earlier_batches_does_not_change_output(bench: Bench) -> None:
    backend = bench.whole([profile((3, 4, 8))])
    backend.run(batch_of([12] * 4, 1))
    for batch in (batch_of([9, 10, 11, 12], 2), batch_of([9], 3), batch_of([2, 1], 4, width=12)):
        bench.check(backend, batch)
    assert bench.library.runs[-1]["query_tokens"] == (3, 4)
    # The network's masks hide it as well.
    assert not bench.library.fed["query_tokens"][:, 2:].any()
    assert bench.library.fed["query_length"].tolist() == [2, 1, 1]


def test_empty_batch_returns_empty_heads(bench: Bench, graphs: Graphs) -> None:
    some = batch_of([4, 4])
    none = Batch(*(values[:0] for values in vars(some).values()))
    onnx_models = (open_backend(path, "cpu", 1) for path in (graphs.whole, graphs.query))
    for backend in (bench.whole(), bench.pair(), *onnx_models):
        locations = backend.run(some).matching_logits.shape[1]
        empty = Heads(*(np.empty((0, locations, *tail), np.float32) for tail in ((), (2,), ())))
        assert_same(backend.run(none), empty)
        bench.check(backend, some)
        if hasattr(backend, "ask"):
            encoded = backend.encode(some.segment_features)
            assert backend.encode(none.segment_features).shape == (0, *encoded.shape[1:])
            for videos in (encode_all(backend, some), []):
                assert_same(backend.ask(none.query_tokens, none.query_length, videos, np.empty(0, np.int32)), empty)


def ask_row(pair: Any, batch: Batch, row: int, videos: Sequence[EncodedVideo], video: int) -> Heads:
    return pair.ask(batch.query_tokens[[row]], batch.query_length[[row]], [videos[video]], np.zeros(1, np.int32))


def test_each_engine_caches_its_own_encodings(bench: Bench, graphs: Graphs) -> None:
    pair = bench.pair(unroll=(4,))
    batch = batch_of([3, 9, 2, 7])
    videos = encode_all(pair, batch)
    for _ in range(3):
        # Short and long queries take turns, about videos that the other plan has or has not encoded.
        for row, video in ((0, 0), (1, 0), (2, 1), (3, 2), (2, 2), (1, 3), (0, 3), (3, 1), (0, 0)):
            of_video = batch.segment_features[[video]], batch.segment_spans[[video]]
            expected = graphs.reference(Batch(batch.query_tokens[[row]], batch.query_length[[row]], *of_video))
            assert_same(ask_row(pair, batch, row, videos, video), expected)


def test_only_encodings_not_on_gpu_are_copied(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    pair = bench.pair(videos=3)
    batch = batch_of([3] * 5)
    videos = encode_all(pair, batch)
    copied: list[str] = []
    upload = pair._network.buffers.upload
    monkeypatch.setattr(pair._network.buffers, "upload", lambda *where: copied.append(where[0]) or upload(*where))

    def copies(*index: int) -> int:
        before, rows = len(copied), slice(0, len(index))
        pair.ask(batch.query_tokens[rows], batch.query_length[rows], videos, np.array(index, np.int32))
        # Features and spans of each video.
        return (len(copied) - before) // 2

    assert [copies(0), copies(0), copies(0, 1, 2), copies(2, 0, 1)] == [1, 0, 2, 0]
    # There are three slots, and the least recently used one is replaced.
    assert [copies(1, 0), copies(3), copies(0, 1), copies(2)] == [0, 1, 0, 1]
    assert copies(0, 1, 2, 3, 4) >= 2


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
    expected = open_backend(query, "cpu", 1).run(batch)
    for _ in range(3):
        assert_same(pair.run(batch), expected, rtol=HALF, atol=HALF)


def test_bfloat16_encodings_are_exchanged_as_float32(bench: Bench) -> None:
    pair = bench.pair(types={"encoded_features": "BF16"})
    batch = batch_of([5, 2])
    encoded = pair.encode(batch.segment_features)
    assert encoded.dtype == np.float32
    assert not np.any(encoded.view(np.uint32) & 0xFFFF)
    bench.check(pair, batch, rtol=0.05, atol=0.1)


@given(st.floats(width=32, allow_nan=False, allow_infinity=False, min_value=-(2.0**126), max_value=2.0**126))
def test_to_bfloat16_rounds_to_nearest(value: float) -> None:
    bits = to_bfloat16(np.array([value], np.float32))
    near = [from_bfloat16((bits.astype(np.int64) + step).astype(np.uint16))[0] for step in (-1, 0, 1)]
    errors = [abs(float(number) - value) for number in near if np.isfinite(number)]
    assert abs(float(near[1]) - value) == min(errors)
    assert np.array_equal(to_bfloat16(from_bfloat16(bits)), bits)


def test_query_beyond_the_engine_names_range_and_command(bench: Bench) -> None:
    backend = bench.whole()
    with raises(ShapeError, "query_length_out_of_range", 13, 2, 12, "--query-length 2 8 13"):
        backend.run(batch_of([13]))
    # Columns after the longest query are padding, which is removed.
    bench.check(backend, batch_of([4], width=30))


def test_numbers_out_of_range_are_rejected(bench: Bench) -> None:
    for backend in (bench.whole(), bench.pair()):
        check_words_and_lengths(backend, batch_of([4, 4]))
    check_video_index(bench.pair(), batch_of([4, 4]))


def test_features_of_another_width_are_rejected(bench: Bench) -> None:
    backend = bench.whole()
    batch = batch_of([4])
    for features in (batch.segment_features[:, :, :1], batch.segment_features[:, :8]):
        with raises(ShapeError, "shape_mismatch", "segment_features", features.shape):
            backend.run(dataclasses.replace(batch, segment_features=features))
    bench.check(backend, batch)


def test_encoding_of_another_shape_is_rejected_uncached(bench: Bench) -> None:
    pair = bench.pair()
    batch = batch_of([4])
    odd = EncodedVideo(np.zeros((8, 16), np.float32), batch.segment_spans[0], 1.0)
    for _ in range(2):
        with raises(ShapeError, "shape_mismatch", "encoded_features", (8, 16), (16, 16)):
            ask_row(pair, batch, 0, [odd], 0)
    bench.check(pair, batch)


def test_threads_can_share_an_engine(bench: Bench) -> None:
    backend = bench.whole(unroll=(5,))
    batches = [batch_of([3 + seed, 5], seed) for seed in range(4)]
    actual: list[list[Heads]] = [[] for _ in batches]

    def run(index: int) -> None:
        actual[index] += [backend.run(batches[index]) for _ in range(10)]

    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(batches))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for results, batch in zip(actual, batches, strict=True):
        assert len(results) == 10
        for heads in results:
            assert_same(heads, bench.graphs.reference(batch))


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
        assert_same(actual[index], bench.graphs.reference(batch))


@pytest.mark.gpu
@pytest.mark.trt
@pytest.mark.parametrize("split", [False, True])
def test_real_engine_equals_its_graph(tmp_path: Path, graphs: Graphs, split: bool) -> None:
    """As `test_engine_returns_same_heads_as_graph`, with TensorRT's own kernels and CUDA's own graphs."""
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
            expected = graphs.reference(batch)
            for name, values in vars(backend.run(batch)).items():
                largest = float(np.abs(getattr(expected, name)).max())
                np.testing.assert_allclose(values, getattr(expected, name), atol=HALF * largest, rtol=HALF)
    backend.time_gpu(True)
    backend.run(batch_of([5]))
    assert 0 < backend.gpu_ms < 1000
    backend.close()


def real_plan(plan: Path, graph: Path, shapes: Sequence[dict[str, Any]], manifest: Manifest, cuda: Cuda) -> Path:
    """Build a plan for the GPU of this machine, with the TensorRT that is installed."""
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
    digests = read_sidecar(plan).content["sha256"]
    plan.write_bytes(built.plan)
    edit_metadata(plan, sha256={**digests, plan.name: sha256(plan)})
    return plan
