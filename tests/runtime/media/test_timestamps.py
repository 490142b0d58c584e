"""Test `runtime.media.timestamps`: frames follow each other for any clock of a stream."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.media.timestamps import Part, SoundShift, Stamp, shifts, shown_times, split, usual_step

UNIT = 0.001
STEP = 40


def coded(times: list[int], reordered: int, gop: int = 12) -> list[Stamp]:
    """Return packets of frames in decoding order: groups of `reordered` + 1, the last frame first."""
    order: list[int] = [0]
    for first in range(1, len(times), reordered + 1):
        group = list(range(first, min(first + reordered + 1, len(times))))
        order += [group[-1], *group[:-1]]
    # Decoding starts early enough for the first displayed frame.
    delay = max((order.index(number) - number for number in range(len(times))), default=0)
    decoded = [times[0] - STEP * (delay - number) for number in range(delay)] + times[: len(times) - delay]
    led = {index for index in range(len(order)) if index == 0 or order[index] > max(order[:index])}
    keys = {index for index in led if index % gop == 0}
    return [Stamp(times[number], decoded[index], index in keys) for index, number in enumerate(order)]


def laid_out(stamps: list[Stamp], **options: object) -> tuple[np.ndarray, tuple[Part, ...]]:
    parts = split(stamps, UNIT, usual_step(stamps, STEP), STEP, **options)  # type: ignore[arg-type]
    return shown_times(stamps, parts, STEP), parts


STEPS = st.lists(st.integers(20, 60), min_size=8, max_size=40)
REORDERED = st.integers(0, 3)


def rising(start: int, steps: list[int]) -> list[int]:
    return [start + sum(steps[:count]) for count in range(len(steps))]


@given(st.integers(-(10**6), 10**9), st.lists(st.integers(1, 9000), min_size=1, max_size=40), REORDERED, st.booleans())
def test_increasing_timestamps_are_unchanged(start: int, steps: list[int], reordered: int, broadcast: bool) -> None:
    times = rising(start, steps)
    actual, parts = laid_out(coded(times, reordered), broadcast=broadcast)
    assert actual.tolist() == times
    assert [part.shift for part in parts] == [0]


@given(
    st.lists(st.tuples(st.integers(0, 2**33 // 90), STEPS), min_size=2, max_size=5),
    REORDERED,
    st.booleans(),
    st.booleans(),
)
def test_restarting_or_jumping_parts_are_concatenated(
    recordings: list[tuple[int, list[int]]], reordered: int, broadcast: bool, estimated: bool
) -> None:
    complete, stamps, joints = [], [], 0
    for start, steps in recordings:
        times = rising(start, steps)
        before = max(stamp.pts for stamp in stamps[joints:]) if stamps else None  # type: ignore[type-var]
        # Other steps are gaps, which are not changed.
        if before is not None and before - 100 <= start <= before + (10_001 if broadcast else 10_000_001):
            continue
        joints = len(stamps)
        packets = coded(times, reordered)
        # Matroska stores no decoding times, and libavformat's estimates are wrong after a restart.
        stamps += [stamp._replace(dts=stamp.pts) for stamp in packets] if estimated and joints else packets
        complete.append(times)
    actual, parts = laid_out(stamps, broadcast=broadcast)
    assert len(parts) == len(complete)
    assert len(actual) == sum(map(len, complete))
    assert (np.diff(actual) > 0).all()
    offset = 0
    for times in complete:
        part = actual[offset : offset + len(times)]
        assert np.diff(part).tolist() == np.diff(times).tolist()
        if offset:
            assert 20 <= part[0] - actual[offset - 1] <= 60
        offset += len(times)
    assert [stamp.time + shift for stamp, shift in zip(stamps, shifts(parts), strict=False)] == pytest.approx(  # type: ignore[operator]
        [actual[index] for index in _positions(stamps, parts, actual)]
    )


def _positions(stamps: list[Stamp], parts: tuple[Part, ...], actual: np.ndarray) -> list[int]:
    corrected = [stamp.time + shift for stamp, shift in zip(stamps, shifts(parts), strict=False)]  # type: ignore[operator]
    return [int(np.searchsorted(actual, time)) for time in corrected]


def test_recording_joined_to_itself_doubles_in_length() -> None:
    once = coded(rising(500, [STEP] * 125), 2)
    actual, parts = laid_out(once + once, broadcast=True)
    assert actual.tolist() == rising(500, [STEP] * 250)
    assert [part.shift for part in parts] == [0, 5000]


@pytest.mark.parametrize("reordered", [0, 1, 3])
def test_jump_of_ten_hours_is_removed(reordered: int) -> None:
    times = [*rising(0, [STEP] * 50), *rising(36_000_000, [STEP] * 51)]
    for broadcast in (True, False):
        actual, _ = laid_out(coded(times, reordered), broadcast=broadcast)
        assert actual[-1] - actual[0] == pytest.approx(100 * STEP, abs=2 * STEP * reordered)
        assert len(actual) == 101


@pytest.mark.parametrize("number", [0, 10, 41, 99])
@pytest.mark.parametrize("wrong", [-47_000_000, 47_000_000])
def test_one_wrong_time_of_showing_does_not_lengthen_the_video(number: int, wrong: int) -> None:
    stamps = coded(rising(50_000_000, [STEP] * 100), 3)
    stamps[number] = stamps[number]._replace(pts=50_000_000 + wrong)
    actual, _ = laid_out(stamps, broadcast=True)
    assert len(actual) == 100
    assert actual[-1] - actual[0] < 110 * STEP


@pytest.mark.parametrize(("seconds", "broadcast", "stays"), [(8, True, True), (30, True, False), (3600, False, True)])
def test_long_still_frame_is_distinguished_from_jump(seconds: int, broadcast: bool, stays: bool) -> None:
    times = [*rising(0, [STEP] * 50), *rising(2000 + 1000 * seconds, [STEP] * 50)]
    actual, _ = laid_out(coded(times, 0), broadcast=broadcast)
    assert (actual.tolist() == times) is stays
    # If the audio continues, only the video has a gap.
    actual, _ = laid_out(coded(times, 0), broadcast=broadcast, others=np.arange(0, seconds + 4, 0.1))
    assert actual.tolist() == times
    # Audio that jumps with the video does not prove a gap.
    others = [*np.arange(0, 2.5, 0.1), *np.arange(1.5 + seconds, 4 + seconds, 0.1)]
    actual, _ = laid_out(coded(times, 0), broadcast=broadcast, others=others)
    assert (actual.tolist() == times) is stays
    # Slides of 30 seconds are no jumps.
    times = rising(0, [30_000] * 10)
    assert laid_out(coded(times, 0, gop=1), broadcast=broadcast)[0].tolist() == times


def test_frames_hidden_by_edit_list_are_excluded() -> None:
    stamps = coded(rising(0, [STEP] * 40), 2)
    stamps = [stamp._replace(is_shown=number >= 13) for number, stamp in enumerate(stamps)]
    actual, parts = laid_out(stamps)
    assert actual.tolist() == rising(13 * STEP, [STEP] * 27)
    assert len(parts) == 1


def test_frame_packets_without_timestamp_are_counted() -> None:
    assert laid_out([Stamp(None, None)] * 5)[0].tolist() == rising(0, [STEP] * 5)
    # Every fourth packet has a time stamp, and each packet is a frame.
    stamps = [Stamp(time if time % 160 == 0 else None, None) for time in rising(0, [STEP] * 40)]
    assert laid_out(stamps)[0].tolist() == rising(0, [STEP] * 40)
    # Every second packet has one, because the others are second fields.
    stamps = list(itertools.chain.from_iterable((Stamp(time, time), Stamp(None, None)) for time in range(0, 1600, 40)))
    assert laid_out(stamps)[0].tolist() == rising(0, [STEP] * 40)


def test_sound_shift_matches_its_video_part() -> None:
    parts = [Part(0, 0, 0, 5000), Part(125, 5040, 0, 5000), Part(250, -25_000, 36_000, 41_000)]
    shift = SoundShift(parts, UNIT)
    # Audio of the second part starts before the last packet of the first part is read.
    actual = [shift.shift_at(time) for time in (-0.1, 2.0, 4.9, 5.3, 0.0, 3.0, 5.2, 35.9, 40.0)]
    assert actual == pytest.approx([0, 0, 0, 0, 5.04, 5.04, 5.04, -25, -25])
