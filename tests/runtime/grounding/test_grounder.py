"""Test `runtime.grounding.grounder`: sentences and videos in, moments in seconds out."""

from __future__ import annotations

import dataclasses
import threading
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime import Grounder, Moment, Video
from runtime.core.batch import Batch, Heads
from runtime.core.decoding import NON_FINITE, Decoding
from runtime.core.errors import DeviceMemoryError, FeatureError, GroundingError, ModelFileError, QueryError
from runtime.core.moments import to_moments
from runtime.core.sliding_windows import Windows
from tests.raising import raises
from tests.runtime.planted import CHANNELS, PAIRS, QUARTER, Exponential, PlantedBackend, video


@pytest.fixture
def grounder() -> Grounder:
    return Grounder(PlantedBackend())


def test_ground_returns_planted_moment_in_seconds(grounder: Grounder) -> None:
    best, second = grounder.ground(QUARTER, "person dog")
    assert (best.start, best.end) == (15.0, 30.0)
    assert best.score == pytest.approx(0.982, abs=1e-3)
    assert (second.start, second.end) == (30.0, 60.0)
    assert second.score < best.score
    assert isinstance(best, Moment)


@given(st.floats(9, 2000))
@settings(max_examples=20)
def test_moments_scale_with_the_duration(duration: float) -> None:
    best = Grounder(PlantedBackend()).ground(video(duration, dog=(8, 15)), "dog")[0]
    assert (best.start, best.end) == (0.25 * duration, 0.5 * duration)


def test_ground_returns_top_k_moments_best_first(grounder: Grounder) -> None:
    everything = grounder.ground(QUARTER, "dog", top_k=5)
    assert len(everything) == 2
    assert everything[0].score > everything[1].score
    assert grounder.ground(QUARTER, "dog", top_k=1) == everything[:1]
    assert grounder.ground(QUARTER, "dog", np.int64(1)) == everything[:1]  # type: ignore[arg-type]
    assert grounder.ground(QUARTER, "dog", 0) == []


@pytest.mark.parametrize(("top_k", "count"), [(1, 1), (5, 5), (6, 6), (20, 20), (99, 56)])
def test_top_k_may_exceed_published_six(top_k: int, count: int) -> None:
    def all_likely(heads: Heads) -> None:
        heads.matching_logits[:] = np.linspace(-1, 1, 56, dtype=np.float32)

    assert len(Grounder(PlantedBackend(after=all_likely)).ground(QUARTER, "dog", top_k)) == count


def test_query_without_proposals_returns_full_video(grounder: Grounder) -> None:
    # Six words bring the second half below the threshold of the planted model.
    strict = Grounder(type(grounder.backend)(Decoding(score_threshold=0.9)))
    (moment,) = strict.ground(video(60.0), "person runs dog opens door cat")
    assert moment == Moment(0.0, 60.0, 1.0)


def test_mixed_query_lengths_and_videos_keep_their_order(grounder: Grounder) -> None:
    answers = grounder.ground_batch(PAIRS)
    spans = [(moments[0].start, moments[0].end) for moments in answers]
    assert spans == [(15, 30), (6.25, 10), (15, 30), (0, 12.5), (0, 1.25), (62, 64)]


@given(st.permutations(range(len(PAIRS))), st.integers(1, 7))
@settings(max_examples=25)
def test_pair_order_and_batch_size_do_not_change_moments(order: list[int], batch_size: int) -> None:
    backend = PlantedBackend()
    grounder = Grounder(backend)
    pairs = [PAIRS[index] for index in order]
    answers = grounder.ground_batch(pairs, batch_size=batch_size)
    sizes = [len(batch) for batch in backend.batches]
    assert (sum(sizes), max(sizes) <= batch_size) == (len(PAIRS), True)
    assert answers == [grounder.ground(*pair) for pair in pairs]
    assert grounder.ground_batch([]) == []


def test_queries_of_similar_length_share_a_batch() -> None:
    backend = PlantedBackend()
    Grounder(backend).ground_batch(PAIRS, batch_size=3)
    # Three queries of one token need no padding.
    assert [batch.query_tokens.shape for batch in backend.batches] == [(3, 1), (3, 4)]


def test_features_of_wrong_width_are_rejected_naming_both(grounder: Grounder) -> None:
    with raises(FeatureError, "feature_width_mismatch", "dog", "planted", 9, 8):
        grounder.ground(video(10.0, dim=9, dog=(0, 3)), "dog")


@pytest.mark.parametrize(
    ("query", "code", "values"),
    [
        ("...", "no_words", ["'...'"]),
        ("zorbs frimly", "unknown_content_words", ["'zorbs frimly'"]),
        ("dog " * 7, "query_too_long", [7, 1, 6]),
    ],
)
def test_invalid_query_is_rejected_first(grounder: Grounder, query: str, code: str, values: list[object]) -> None:
    with raises(QueryError, code, *values):
        grounder.ground(QUARTER, query)
    assert not grounder.backend.batches  # type: ignore[attr-defined]
    assert grounder.ground(QUARTER, "dog " * 6)[0].start == 15


@pytest.mark.parametrize("name", ["unknown_words", "unheard"])
def test_encode_query_counts_unknown_words(grounder: Grounder, name: str, caplog: pytest.LogCaptureFixture) -> None:
    counts: Counter[str] = Counter()
    assert grounder.encode_query("dog zorbs", **{name: counts}).tolist() == [CHANNELS["dog"]]  # type: ignore[arg-type]
    assert counts == {"zorbs": 1}
    assert not caplog.records


@pytest.mark.parametrize(
    ("arguments", "kind", "code"),
    [
        ({"query": b"dog"}, QueryError, "invalid_query"),
        ({"video": np.ones((9, 8), np.float32)}, FeatureError, "invalid_argument"),
        ({"top_k": -1}, GroundingError, "invalid_argument"),
        ({"top_k": 1.5}, GroundingError, "invalid_argument"),
        ({"batch_size": 0}, GroundingError, "invalid_argument"),
        ({"pairs": (QUARTER, "dog")}, GroundingError, "invalid_argument"),
        ({"pairs": [(QUARTER,)]}, GroundingError, "invalid_argument"),
    ],
)
def test_invalid_argument_is_rejected_before_running(
    grounder: Grounder, arguments: dict[str, Any], kind: type[GroundingError], code: str
) -> None:
    pair = {"video": QUARTER, "query": "dog", **arguments}
    given = {"pairs": [(pair.pop("video"), pair.pop("query"))] * 2, **pair}
    with raises(kind, code):
        grounder.ground_batch(**given)
    assert not grounder.backend.batches  # type: ignore[attr-defined]


def test_grounder_uses_pooling_and_segments_of_model() -> None:
    backend = PlantedBackend(Decoding(num_segments=64))
    Grounder(backend).ground(QUARTER, "dog")
    assert backend.batches[0].segment_features.shape == (1, 64, 8)
    features = dataclasses.replace(backend.manifest.features, pooling="drn")
    backend.manifest = dataclasses.replace(backend.manifest, features=features)
    Grounder(backend).ground(QUARTER, "dog")
    assert backend.batches[0].segment_spans[0, 0, 0] == 0
    assert backend.batches[1].segment_spans[0, 0, 0] > 0


def test_empty_pick_rows_are_not_returned() -> None:
    picks = np.array([[0.25, 0.5, 0.9], [np.nan] * 3], np.float32)
    assert to_moments(picks, 8.0) == [Moment(2.0, 4.0, pytest.approx(0.9))]


def limited(room: int) -> Callable[[Batch], None]:
    """Return a function that raises for a batch of more than `room` queries."""

    def check(batch: Batch) -> None:
        if len(batch) > room:
            raise DeviceMemoryError("no memory left")

    return check


FIVE = [(QUARTER, query) for query in ("dog", "person dog", "cat runs", "door opens", "dog runs person")]


@pytest.mark.parametrize(("room", "sizes"), [(8, [5]), (3, [5, 2, 3])])
def test_batch_out_of_memory_is_retried_in_halves(room: int, sizes: list[int], grounder: Grounder) -> None:
    backend = PlantedBackend(before=limited(room))
    assert Grounder(backend).ground_batch(FIVE) == grounder.ground_batch(FIVE)
    assert [len(batch) for batch in backend.batches] == sizes


def test_out_of_memory_for_single_query_is_raised() -> None:
    with raises(DeviceMemoryError, "out_of_memory"):
        Grounder(PlantedBackend(before=limited(1))).ground_batch(FIVE)
    # One query has no halves.
    backend = PlantedBackend(before=limited(0))
    with raises(DeviceMemoryError, "out_of_memory"):
        Grounder(backend).ground(*FIVE[0])
    assert len(backend.batches) == 1


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_gpu_runs_next_batch_while_decoding(device: str) -> None:
    runs = [threading.Event() for _ in range(3)]
    backend = PlantedBackend(device=device, before=lambda batch: next(run for run in runs if not run.is_set()).set())
    tokens = np.array([1], np.int32)
    segments = Grounder(backend).segments(QUARTER)
    answers = Grounder(backend).run([tokens] * 5, [segments] * 5, batch_size=2)
    rows = [next(answers)[0]]
    # On a GPU, the second batch runs while the caller decodes the first.
    assert runs[1].wait(10 if device == "cuda" else 0) == (device == "cuda")
    assert not runs[2].is_set()
    rows += [row for row, _ in answers]
    assert np.concatenate(rows).tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(("batch_size", "uses_thread"), [(2, True), (3, False)])
def test_single_batch_runs_without_a_thread(batch_size: int, uses_thread: bool) -> None:
    threads: set[threading.Thread] = set()
    backend = PlantedBackend(device="cuda", before=lambda batch: threads.add(threading.current_thread()))
    Grounder(backend).ground_batch([(QUARTER, "dog")] * 3, batch_size=batch_size)
    assert (threads != {threading.current_thread()}) == uses_thread


def test_gpu_error_in_later_batch_is_raised_without_threads() -> None:
    def fail_second(batch: Batch) -> None:
        if len(backend.batches) == 2:
            raise FeatureError("the second batch fails")

    backend = PlantedBackend(device="cuda", before=fail_second)
    before = threading.active_count()
    with raises(FeatureError, "invalid_features", "the second batch fails"):
        Grounder(backend).ground_batch([(QUARTER, "dog")] * 6, batch_size=2)
    assert threading.active_count() == before


@pytest.mark.parametrize("damaged", [False, True])
@pytest.mark.parametrize("way", ["one", "batch", "windows"])
def test_ground_output_not_finite_names_true_cause(damaged: bool, way: str) -> None:
    scaled = Grounder(Exponential(PlantedBackend(), damaged))
    subject = Video(3000 * QUARTER.features, QUARTER.num_frames, 60.0, "scaled")
    if way == "windows":
        scaled.windows = Windows(30.0, 30.0, 10.0)
    pairs = [(subject, "dog"), (subject, "cat")][: 2 if way == "batch" else 1]
    expected, code = (ModelFileError, NON_FINITE) if damaged else (FeatureError, "features_out_of_scale")
    with raises(expected, code, *([] if damaged else ["3e+03"])):
        scaled.ground_batch(pairs)
