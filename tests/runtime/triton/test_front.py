"""Test `runtime.triton.front`: batched requests get the answers of the model file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from runtime import Grounder, Moment, Video
from runtime.backends import triton_protocol
from runtime.core.errors import ModelFileError
from runtime.triton import front
from tests import tolerances
from tests.damage import damaged, random_bits
from tests.raising import quotes
from tests.runtime.triton.conftest import BOTH, QUERIES, video
from tests.tritonserver import Refused, Server


@pytest.fixture
def server(repository: Path) -> Server:
    return Server(repository)


def inputs_of(subject: Video, queries: Sequence[str] = QUERIES, **more: Any) -> dict[str, np.ndarray]:
    return {
        "QUERY": np.array([[query.encode() for query in queries]], object),
        "FEATURES": subject.features[None],
        "DURATION": np.array([[subject.duration]]),
        "NUM_FRAMES": np.array([[subject.num_frames]], np.int32),
        **{name: np.array([value]) for name, value in more.items()},
    }


def moments(answer: dict[str, np.ndarray], row: int = 0) -> list[list[Moment]]:
    return [
        [Moment(*map(float, values)) for values in actual[:count]]
        for actual, count in zip(answer["MOMENTS"][row], answer["COUNT"][row], strict=True)
    ]


def assert_alike(actual: Sequence[Sequence[Moment]], expected: Sequence[Sequence[Moment]]) -> None:
    assert [len(one) for one in actual] == [len(one) for one in expected]
    flat = [[vars(moment) for one in side for moment in one] for side in (actual, expected)]
    for ours, theirs in zip(*flat, strict=True):
        assert ours == pytest.approx(theirs, abs=tolerances.BATCHED_SECONDS)


def test_front_model_with_damaged_files_does_not_start(repository: Path) -> None:
    files = sorted((*repository.rglob("model.onnx"), *repository.rglob("about.json")))
    assert len(files) == 3
    for path in files:
        for _ in damaged(path, random_bits(path.read_bytes(), 10)):
            with pytest.raises(ModelFileError):
                front.Front(None, {"model_version": "1"}, repository / "drn" / "1")
    front.Front(None, {"model_version": "1"}, repository / "drn" / "1")


@BOTH
def test_front_model_answer_equals_model_file(server: Server, direct: Grounder) -> None:
    subject = video(40)
    expected = direct.ground_batch([(subject, query) for query in QUERIES])
    assert_alike(moments(server.infer("drn", inputs_of(subject))), expected)


@BOTH
def test_concurrent_requests_are_batched_and_separated(server: Server, direct: Grounder) -> None:
    subjects = [video(40, 1), video(23, 2), video(40, 3)]
    requests = [inputs_of(one, QUERIES[: index + 1]) for index, one in enumerate(subjects)]
    answers = server.execute("drn", requests)
    for index, (answer, subject) in enumerate(zip(answers, subjects, strict=True)):
        assert_alike(moments(answer), direct.ground_batch([(subject, query) for query in QUERIES[: index + 1]]))
    network_inputs = [inputs for name, _, inputs in server.calls if name != "drn_video"]
    assert [len(inputs["query_tokens"]) for inputs in network_inputs] == [6]


def test_request_rows_are_separate_videos(server: Server, direct: Grounder) -> None:
    first, second = (
        inputs_of(video(30, seed, 20.0), QUERIES[seed : seed + 2], TOP_K=np.array([seed + 1], np.int32))
        for seed in (0, 1)
    )
    both = {name: np.concatenate([first[name], second[name]]) for name in first}
    answer = server.infer("drn", both)
    for row in (0, 1):
        pairs = [(video(30, row, 20.0), query) for query in QUERIES[row : row + 2]]
        assert_alike(moments(answer, row), direct.ground_batch(pairs, top_k=row + 1))
    assert not answer["MOMENTS"][0, :, 1:].any()


def test_missing_frame_count_is_derived_from_clips(server: Server, direct: Grounder) -> None:
    subject = video(40)
    request = inputs_of(subject)
    del request["NUM_FRAMES"]
    counted = Video(subject.features, direct.manifest.features.clock.num_frames(40), subject.duration)
    assert_alike(moments(server.infer("drn", request)), [direct.ground(counted, query) for query in QUERIES])


def test_long_video_windows_come_from_model_or_request(server: Server, direct: Grounder) -> None:
    long = video(300)
    complete = Grounder(direct.backend)
    complete.windows = None
    assert long.duration > 60
    cut, uncut = server.execute("drn", [inputs_of(long), inputs_of(long, WINDOWS=np.array(triton_protocol.NO_WINDOWS))])
    assert_alike(moments(cut), [direct.ground(long, query) for query in QUERIES])
    assert_alike(moments(uncut), [complete.ground(long, query) for query in QUERIES])
    assert moments(cut) != moments(uncut)


def test_repeated_video_is_encoded_once(server: Server) -> None:
    for _ in range(3):
        server.execute("drn", [inputs_of(video(40)), inputs_of(video(40), ["word8"])])
    server.infer("drn", inputs_of(video(40, 1)))
    assert [name for name, _, _ in server.calls].count("drn_video") == 2


def test_long_video_is_encoded_once_per_window_setting(server: Server, direct: Grounder) -> None:
    def encoded(**more: Any) -> int:
        server.calls.clear()
        server.infer("drn", inputs_of(video(300), **more))
        return [name for name, _, _ in server.calls].count("drn_video")

    windows = len(direct.cut(video(300)))
    assert windows > 1
    assert (encoded(), encoded()) == (windows, 0)
    shorter = np.array([50.0, 20.0, 5.0])
    assert encoded(WINDOWS=shorter) > windows
    assert (encoded(WINDOWS=shorter), encoded()) == (0, 0)


def test_video_cache_distinguishes_single_feature_value() -> None:
    first, other = video(40), video(40)
    other.features[-1, -1] += 1
    kept = front._VideoCache(1 << 20)
    assert kept.video(first.features, 300, 9.0, "a") is kept.video(first.features.copy(), 300, 9.0, "b")
    assert kept.video(first.features, 300, 9.0, "a") is not kept.video(other.features, 300, 9.0, "a")
    assert kept.video(first.features, 300, 9.0, "a") is not kept.video(first.features, 301, 9.0, "a")


def test_video_cache_is_bounded_and_keeps_recent_videos() -> None:
    kept = front._VideoCache(3 * video(40).features.nbytes)
    first = kept.video(video(40).features, 300, 9.0, "first")
    for seed in (1, 2):
        kept.video(video(40, seed).features, 300, 9.0, "other")
    assert kept.video(first.features.copy(), 300, 9.0, "again") is first
    kept.video(video(40, 3).features, 300, 9.0, "one more")
    assert len(kept._videos) == 3
    # The least recently used video is evicted, which is not the first.
    assert kept.video(first.features.copy(), 300, 9.0, "again") is first


@pytest.mark.parametrize(
    ("wrong", "values"),
    [
        ({"QUERY": np.array([[b"zorb"]], object)}, ["'zorb'"]),
        ({"QUERY": np.array([[b"\xff\xfe"]], object)}, ["UTF-8", 0]),
        ({"QUERY": np.array([[b"word1 " * 13]], object)}, [13, 1, 12]),
        ({"DURATION": np.array([[0.0]])}, ["duration", 0]),
        ({"NUM_FRAMES": np.array([[1]], np.int32)}, ["frames", 1]),
        ({"NUM_FRAMES": np.array([[1312]], np.int32)}, ["NUM_FRAMES", 1312]),
        ({"DURATION": np.array([[33800.0]])}, [33800]),
        ({"FEATURES": np.ones((1, 40, 16), np.float32)}, [1, 40]),
        ({"TOP_K": np.array([[0]], np.int32)}, ["TOP_K", 0]),
        ({"FEATURES": np.full((1, 4, 16), np.nan, np.float32)}, [64]),
        ({"WINDOWS": np.array([[10.0, 40.0, 5.0]])}, ["10.0", "40.0", "5.0"]),
    ],
)
def test_invalid_request_fails_without_affecting_others(
    server: Server, direct: Grounder, wrong: dict[str, np.ndarray], values: list[object]
) -> None:
    subject = video(40)
    fine, refused = server.execute("drn", [inputs_of(subject), {**inputs_of(subject, ["word1"]), **wrong}])
    assert_alike(moments(fine), [direct.ground(subject, query) for query in QUERIES])
    assert isinstance(refused, Refused)
    assert refused.status == "INVALID_ARGUMENT"
    assert quotes(str(refused), *values)


def test_network_failure_affects_one_request(server: Server, direct: Grounder, monkeypatch: pytest.MonkeyPatch) -> None:
    """A request that makes the network's heads infinite does not affect another in the same batch."""
    call = server.call

    def poisoned(request: Any) -> Any:
        response = call(request)
        tokens = next((t.as_numpy() for t in request.inputs if t.name() == "query_tokens"), None)
        if tokens is not None and response.tensors:
            response.tensors[0].as_numpy()[(tokens[:, 0] == 20)] = np.inf
        return response

    monkeypatch.setattr(server, "call", poisoned)
    subject = video(40)
    fine, refused = server.execute("drn", [inputs_of(subject), inputs_of(subject, ["word20"])])
    assert_alike(moments(fine), [direct.ground(subject, query) for query in QUERIES])
    assert quotes(str(refused), "matching_logits")


def test_failing_network_returns_internal_error(server: Server) -> None:
    server.broken = "CUDA error:\n out of memory."
    with pytest.raises(Refused) as refused:
        server.infer("drn", inputs_of(video(40)))
    assert quotes(str(refused.value), 1, "CUDA error: out of memory")
    assert refused.value.status == "INTERNAL"


def test_request_waits_for_late_networks(server: Server, direct: Grounder, monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[str] = []

    def is_ready(name: str, version: int) -> bool:
        looked.append(name)
        assert (version, server.calls) == (1, [])
        return len(looked) > 3

    monkeypatch.setattr(server, "is_ready", is_ready)
    for _ in range(2):
        assert_alike(moments(server.infer("drn", inputs_of(video(40)))), [direct.ground(video(40), q) for q in QUERIES])
    assert set(looked) == server.models.keys() - {"drn"}
    assert len(looked) > 3


def test_wait_for_missing_network_times_out(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(front, "LOAD_SECONDS", 0.1)
    monkeypatch.setattr(server, "is_ready", lambda name, version: False)
    server.broken = "it is not ready"
    with pytest.raises(Refused) as refused:
        server.infer("drn", inputs_of(video(40)))
    assert quotes(str(refused.value), 1, "it is not ready")


def test_text_may_be_str_or_bytes() -> None:
    assert front._text("word") == front._text(b"word") == "word"
