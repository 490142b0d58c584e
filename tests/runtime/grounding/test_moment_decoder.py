"""Test `runtime.grounding.moment_decoder`: one rule of decoding for videos of one window and of several."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.core.batch import Heads
from runtime.core.decoding import BLOCK, decode
from runtime.core.moments import Moment, to_moments
from runtime.core.presence import Presence
from runtime.core.sliding_windows import Window
from runtime.grounding.moment_decoder import MomentDecoder
from tests.runtime.planted import QUARTER, PlantedBackend, random_heads

WINDOWS = tuple(Window(9 * i, 9 * i + 9, 100, 10.0 * i, 20.0) for i in range(5))


def part(batch: Heads, rows: Sequence[int]) -> Heads:
    return Heads(*(values[list(rows)] for values in vars(batch).values()))


@pytest.mark.parametrize("rows", [1, 2, 3, BLOCK + 5])
def test_videos_of_one_window_are_decoded_as_published(rows: int) -> None:
    manifest, batch = PlantedBackend().manifest, random_heads(rows, np.random.default_rng(0))
    decoder = MomentDecoder([QUARTER] * rows, [()] * rows, manifest, 5, presence=True)
    # Rows come in any order of the pairs.
    order = np.random.default_rng(1).permutation(rows).tolist()
    decoder.add(order, [0] * rows, batch)
    expected = [to_moments(detections, QUARTER.duration) for detections in decode(batch, manifest.decoding, 5)]
    assert [decoder.moments[pair] for pair in order] == expected


@given(st.permutations(range(10)), st.integers(1, 10))
def test_moments_do_not_depend_on_the_order_of_windows(order: list[int], size: int) -> None:
    manifest, batch = PlantedBackend().manifest, random_heads(10, np.random.default_rng(0))
    # Many proposals have equal scores, and NMS takes the first of them.
    np.round(batch.matching_logits, out=batch.matching_logits)
    batch.iou_logits[:] = 2

    def decoded(rows: list[int], size: int) -> list[list[Moment]]:
        decoder = MomentDecoder([QUARTER] * 2, [WINDOWS] * 2, manifest, 5, presence=True)
        for start in range(0, 10, size):
            chosen = rows[start : start + size]
            # A pair has moments once all its windows are there, and not before.
            assert all(bool(moments) == (set(range(5 * i, 5 * i + 5)) <= set(rows[:start]))
                       for i, moments in enumerate(decoder.moments))  # fmt: skip
            decoder.add([row // 5 for row in chosen], [row % 5 for row in chosen], part(batch, chosen))
        return decoder.moments

    assert decoded(order, size) == decoded(list(range(10)), 10)


@pytest.mark.parametrize("windows", [(), WINDOWS[:1], WINDOWS])
def test_unlikely_query_gets_the_full_video(windows: Sequence[Window]) -> None:
    video, rows = dataclasses.replace(QUARTER, offset=4.0), max(1, len(windows))
    nothing = Heads(np.full((rows, 56), -9, np.float32), np.ones((rows, 56, 2), np.float32), np.zeros((rows, 56)))
    for top_k in (0, 1, 5):
        decoder = MomentDecoder([video], [windows], PlantedBackend().manifest, top_k, presence=True)
        decoder.add([0] * rows, list(range(rows)), nothing)
        assert decoder.moments == [[Moment(4.0, 64.0, 1.0)][:top_k]]


@pytest.mark.parametrize("windows", [(), WINDOWS])
def test_score_equal_to_threshold_passes_in_float32(windows: Sequence[Window]) -> None:
    manifest = PlantedBackend().manifest
    rows, batch = max(1, len(windows)), random_heads(5, np.random.default_rng(0))

    def best(threshold: float | None) -> list[Moment]:
        presence = None if threshold is None else Presence(threshold, 0.9, 0.9, 9, 9)
        decoder = MomentDecoder(
            [QUARTER], [windows], dataclasses.replace(manifest, presence=presence), 1, presence=True
        )
        decoder.add([0] * rows, list(range(rows)), part(batch, range(rows)))
        return decoder.moments[0]

    (moment,) = best(None)
    # A threshold is stored as a double, but scores are float32.
    assert best(moment.score + 1e-12) == [moment]
    assert best(moment.score + 1e-3) == []
