"""Test `runtime.media.video_file`: frames at their times, upright and in the right size; rejected files."""

from __future__ import annotations

import logging
import sys
import tracemalloc
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.artifacts.extractor_manifest import ResizeCrop
from runtime.core.errors import DeviceError, VideoFileError
from runtime.core.pooling import ClipTiming
from runtime.infer import infer
from runtime.media import container
from runtime.media import video_file as footage_module
from runtime.media.clip_writer import write_clips
from runtime.media.container import check_one_file
from runtime.media.frames import FrameResizer, clips
from runtime.media.video_file import VideoFile, frames_at, offset_of, probe, read_frames
from tests.films import film, holed, joined, oriented, scene, sound_only, trimmed, truncated
from tests.raising import check_error, raises, records

AS_IT_IS = ResizeCrop((48, 64), (48, 64))
"""Neither resized nor cropped."""


def bilinear(frame: np.ndarray, height: int, width: int) -> np.ndarray:
    """Return a frame resized pixel by pixel, from the four pixels around each center."""
    result = np.empty((height, width, 3))
    for row in range(height):
        for column in range(width):
            y = min(max((row + 0.5) * frame.shape[0] / height - 0.5, 0), frame.shape[0] - 1)
            x = min(max((column + 0.5) * frame.shape[1] / width - 0.5, 0), frame.shape[1] - 1)
            top, left = int(y), int(x)
            below, right = min(top + 1, frame.shape[0] - 1), min(left + 1, frame.shape[1] - 1)
            upper = frame[top, left] * (1 - (x - left)) + frame[top, right] * (x - left)
            lower = frame[below, left] * (1 - (x - left)) + frame[below, right] * (x - left)
            result[row, column] = upper * (1 - (y - top)) + lower * (y - top)
    return result


def with_spare_byte(frame: np.ndarray) -> np.ndarray:
    return np.concatenate((frame, np.full((*frame.shape[:2], 1), 255, np.uint8)), -1)


def all_frames(video_file: VideoFile) -> np.ndarray:
    return np.stack(list(read_frames(video_file, AS_IT_IS)))


def assert_like(actual: np.ndarray, expected: np.ndarray) -> None:
    """Assert that frames are equal but for lossy compression."""
    assert actual.shape == expected.shape
    assert np.abs(actual.astype(int) - expected).mean() < 12


def partial_frames(video_file: VideoFile) -> list[np.ndarray]:
    """Return the frames that a damaged file has, after asserting that it is rejected without `partial`."""
    with raises(VideoFileError, "truncated_video", video_file.path, "--partial"):
        list(read_frames(video_file, AS_IT_IS))
    return list(read_frames(video_file, AS_IT_IS, partial=True))


@pytest.mark.parametrize(("height", "width"), [(48, 64), (15, 20), (90, 31)])
def test_frame_resizer_crops_center_of_resized_frame(height: int, width: int) -> None:
    frame = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    expected = bilinear(frame, 30, 41)[3:27, 8:32]
    resizer = FrameResizer(height, width, ResizeCrop((30, 41), (24, 24)))
    actual = resizer.resize(with_spare_byte(frame))
    assert actual.shape == (24, 24, 3)
    assert np.abs(actual - expected).max() <= 1
    for value in (0, 255):
        assert (resizer.resize(np.full((height, width, 4), value, np.uint8)) == value).all()


def test_c3d_crop_matches_caffe() -> None:
    # The crop of 128 x 171 is rows 8 to 119 and columns 29 to 140, because halves are rounded down.
    frame = np.zeros((128, 171, 4), np.uint8)
    frame[8:120, 29:141] = 255
    assert (FrameResizer(128, 171, ResizeCrop()).resize(frame) == 255).all()
    frame[7, :], frame[120, :], frame[:, 28], frame[:, 141] = 255, 255, 255, 255
    frame[8, 29], frame[119, 140] = 1, 2
    actual = FrameResizer(128, 171, ResizeCrop()).resize(frame)
    assert (actual[0, 0, 0], actual[-1, -1, 0]) == (1, 2)


def test_resize_of_shorter_side_keeps_aspect_ratio() -> None:
    assert ResizeCrop(224, (224, 224)).resized(360, 480) == (224, 299)
    assert ResizeCrop(224, (224, 224)).resized(480, 360) == (299, 224)
    with raises(VideoFileError, "invalid_setting", (100, 171), (112, 112)):
        ResizeCrop((100, 171), (112, 112))


@pytest.mark.parametrize("name", ["steady.mkv", "steady.mp4", "steady.avi"])
def test_constant_rate_video_returns_its_frames(tmp_path: Path, name: str) -> None:
    frames = scene(40)
    video_file = probe(film(tmp_path / name, frames, rate=Fraction(30000, 1001)))
    # Matroska stores whole milliseconds.
    assert video_file.frame_rate == pytest.approx(30000 / 1001, rel=1e-3)
    assert video_file.num_frames == 40
    assert video_file.duration == pytest.approx(40 * 1001 / 30000, rel=1e-3)
    assert (video_file.height, video_file.width, video_file.quarter_turns, video_file.damage) == (48, 64, 0, "")
    actual = all_frames(video_file)
    if name.endswith("mkv"):
        assert (actual == frames).all()
    else:
        assert_like(actual, frames)


MATRICES = [
    (1, 0, 0, 1),
    (-1, 0, 0, 1),
    (-1, 0, 0, -1),
    (1, 0, 0, -1),
    (0, 1, 1, 0),
    (0, -1, 1, 0),
    (0, -1, -1, 0),
    (0, 1, -1, 0),
]
"""The eight orientations of Exif, 1 to 8, as (a, b, c, d): (x, y) is shown at (a x + c y, b x + d y)."""


def as_shown(stored: np.ndarray, matrix: tuple[int, ...]) -> np.ndarray:
    """Apply a display matrix to a (height, width, 3) image, pixel by pixel."""
    a, b, c, d = matrix
    height, width = stored.shape[:2]
    y, x = np.mgrid[:height, :width]
    across, down = a * x + c * y, b * x + d * y
    across, down = across - across.min(), down - down.min()
    shown = np.empty((down.max() + 1, across.max() + 1, 3), np.uint8)
    shown[down, across] = stored
    return shown


@pytest.mark.parametrize("matrix", MATRICES)
def test_every_orientation_is_read_upright(tmp_path: Path, matrix: tuple[int, ...]) -> None:
    stored = scene(3)
    video_file = probe(oriented(tmp_path / "clip.mp4", matrix, stored))
    expected = as_shown(stored[1], matrix)
    size = expected.shape[:2]
    assert_like(list(read_frames(video_file, ResizeCrop(size, size)))[1], expected)
    (still,) = frames_at(video_file, [0.05], size[0])
    assert_like(still, expected)
    assert frames_at(video_file, [0.0], 24)[0].shape == (24, round(24 * size[1] / size[0]), 3)
    write_clips(video_file, [(0.05, 0.1)], [tmp_path / "cut.mp4"])
    created = probe(tmp_path / "cut.mp4")
    assert (created.quarter_turns, created.mirrored) == (0, False)
    assert_like(next(read_frames(created, ResizeCrop(size, size))), expected)


@pytest.mark.parametrize(("matrix", "turns"), [((0, 0, 0, 0), 0), ((0.6, 0.8, -0.8, 0.6), 3)])
def test_orientation_that_is_not_quarter_turn_is_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, matrix: tuple[float, ...], turns: int
) -> None:
    video_file = probe(oriented(tmp_path / "clip.mp4", matrix, 3))
    assert (video_file.quarter_turns, video_file.mirrored) == (turns, False)
    assert "clip.mp4" in caplog.text


def test_variable_rate_is_resampled_to_constant_rate(tmp_path: Path) -> None:
    # Ten frames in 0.4 s, then ten in 2 s: the grid omits frames of the first part and repeats those of the second.
    times = [40 * number for number in range(10)] + [400 + 200 * number for number in range(10)]
    frames = scene(20)
    video_file = probe(film(tmp_path / "varying.mkv", frames, times=times))
    assert video_file.frame_rate == pytest.approx(19 / 2.2)
    actual = list(read_frames(video_file, AS_IT_IS))
    assert len(actual) == video_file.num_frames == 20
    for index, picture in enumerate(actual):
        (shown,) = np.nonzero((frames == picture).all(axis=(1, 2, 3)))[0]
        # A frame is at most half a grid position late, and the next one starts no more than half a position earlier.
        assert times[shown] / 1000 <= (index + 0.5) / video_file.frame_rate
        after = times[shown + 1] if shown < 19 else np.inf
        assert after / 1000 >= (index - 0.5) / video_file.frame_rate


@pytest.mark.parametrize("name", ["late.mkv", "late.mp4"])
def test_frames_starting_after_sound_have_an_offset(tmp_path: Path, name: str) -> None:
    times = [4000 + 40 * number for number in range(50)]
    path = film(tmp_path / name, 50, times=times, sound=6)
    video_file = probe(path)
    assert video_file.offset == pytest.approx(4, abs=0.03)
    assert offset_of(path) == pytest.approx(video_file.offset, abs=2e-3)
    assert video_file.duration == pytest.approx(2, abs=1e-3)
    assert probe(film(tmp_path / f"on-time-{name}", 50, sound=2)).offset == pytest.approx(0, abs=0.03)
    alone = probe(film(tmp_path / f"alone-{name}", 50, times=times))
    assert (alone.num_frames, alone.offset) == (50, 0)
    assert_like(all_frames(alone), scene(50))


def test_duration_ends_with_the_last_frame(tmp_path: Path) -> None:
    # The mean step is 0.49 s, and the last frame lasts as long as the previous one, 0.04 s.
    times = [0, 2000, *range(2040, 2200, 40)]
    video_file = probe(film(tmp_path / "odd.mp4", len(times), times=times))
    last = (times[-1] - times[0]) / 1000
    assert video_file.num_frames / video_file.frame_rate > last + 0.3
    assert last < video_file.duration <= last + 0.05


def test_read_frames_every_returns_subset_of_frames(tmp_path: Path) -> None:
    times = sorted(np.random.default_rng(0).choice(3000, 50, replace=False).tolist())
    video_file = probe(film(tmp_path / "odd.mkv", 50, times=times))
    every = list(read_frames(video_file, AS_IT_IS))
    fourth = list(read_frames(video_file, AS_IT_IS, every=4))
    assert (np.stack(every)[::4] == np.stack(fourth)).all()


def decoded(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Return a list that receives the time of every decoded frame."""
    seen: list[float] = []
    decode = footage_module._decoded

    def noted(*arguments: object, **options: object) -> object:
        for frame in decode(*arguments, **options):  # type: ignore[arg-type]
            seen.append(frame.time)
            yield frame

    monkeypatch.setattr(footage_module, "_decoded", noted)
    return seen


@pytest.mark.parametrize("name", ["long.mkv", "long.mp4", "long.ts", "long.avi"])
def test_frames_at_decodes_few_other_frames(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    frames = scene(200)
    video_file = probe(film(tmp_path / name, frames))
    seen = decoded(monkeypatch)
    times = [0.0, 0.02, 2.0, 5.019, 7.96, 9.0]
    actual = frames_at(video_file, times, 48)
    for time, picture in zip(times, actual, strict=True):
        expected = frames[min(int(time * 25 + 1e-6), 199)]
        assert np.abs(picture.astype(int) - expected).mean() < 12, time
    # MPEG-4 has a key frame every 12 frames; all frames of FFV1 are key frames.
    assert len(seen) < 100


def test_frames_at_handles_variable_rate_and_late_start(tmp_path: Path) -> None:
    times = [5000, 5040, 5900, 6000, 8000]
    frames = scene(5)
    video_file = probe(film(tmp_path / "odd.mkv", frames, times=times))
    assert video_file.start == pytest.approx(5)
    actual = frames_at(video_file, [0.0, 0.5, 0.95, 2.0, 3.5], 48)
    assert [next(n for n in range(5) if (frames[n] == picture).all()) for picture in actual] == [0, 1, 2, 3, 4]


@given(st.integers(0, 60), st.integers(1, 20), st.integers(1, 20))
def test_clips_are_complete_windows_of_consecutive_frames(count: int, window: int, stride: int) -> None:
    frames = np.arange(count)[:, None, None, None]
    actual = list(clips(iter(frames), window, stride))
    starts = range(0, count - window + 1, stride)
    assert [clip[:, 0, 0, 0].tolist() for clip in actual] == [list(range(start, start + window)) for start in starts]
    if count >= window:
        assert len(actual) == ClipTiming(window, stride).num_clips(count)


def test_memory_does_not_grow_with_video_length(tmp_path: Path) -> None:
    def peak(count: int) -> int:
        video_file = probe(film(tmp_path / f"{count}.mp4", count))
        tracemalloc.start()
        number = sum(1 for _ in clips(read_frames(video_file, ResizeCrop()), 16, 8))
        _, peak_bytes = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert number == (count - 16) // 8 + 1
        return peak_bytes

    peak(40)
    short, long = peak(40), peak(400)
    # One image has 38 kB, so 360 more would have 13 MB.
    assert long - short < 100_000


@pytest.mark.parametrize(
    ("make", "code"),
    [
        (lambda path: path.write_text("no video"), "damaged_file"),
        (lambda path: path.write_bytes(b""), "empty_file"),
        (lambda path: None, "missing_file"),
        (lambda path: path.mkdir(), "not_a_file"),
        (sound_only, "no_video_stream"),
        (lambda path: truncated(film(path.with_name("whole.mp4"), 60), path), "damaged_file"),
    ],
)
def test_invalid_video_file_is_rejected(tmp_path: Path, make: Callable[[Path], Any], code: str) -> None:
    path = tmp_path / "clip.mp4"
    make(path)
    with raises(VideoFileError, code, path):
        probe(path)
    assert probe(film(tmp_path / "one.mp4", 1)).num_frames == 1


@pytest.mark.parametrize(("name", "options"), [("cut.mp4", {"movflags": "faststart"}), ("cut.mkv", {})])
def test_truncated_file_is_read_only_with_partial(tmp_path: Path, name: str, options: dict[str, str]) -> None:
    complete = film(tmp_path / f"whole{name[-4:]}", 100, options=options)
    video_file = probe(truncated(complete, tmp_path / name))
    assert "cut" in video_file.damage
    actual = partial_frames(video_file)
    assert 30 < len(actual) < 80
    every = list(read_frames(probe(complete), AS_IT_IS))
    assert all((ours == theirs).all() for ours, theirs in zip(actual, every, strict=False))
    # The last frame fills the missing ones.
    first, last, after = frames_at(video_file, [0.0, 3.5, 3.9], 48)
    assert (last == after).all()
    assert (first != last).any()


@pytest.mark.parametrize("suffix", [".mp4", ".avi"])
def test_frames_reported_damaged_are_rejected(tmp_path: Path, suffix: str) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (48, 48, 64, 3), np.uint8)
    complete = film(tmp_path / f"whole{suffix}", noise)
    for number in (12, 30):
        video_file = probe(holed(complete, tmp_path / f"hole{suffix}", number))
        assert len(partial_frames(video_file)) == 48
        with pytest.raises(VideoFileError):
            frames_at(video_file, [0.0, number / 25 + 0.02], 48, partial=False)
        assert len(frames_at(video_file, [0.0, 1.5], 48)) == 2


def test_damaged_video_is_plotted_and_cut_only_with_partial(
    tmp_path: Path, tiny_model: Path, refused: Any, run_command: Any
) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (100, 48, 64, 3), np.uint8)
    hole = film(tmp_path / "whole.mp4", noise)
    for number in range(5, 100, 5):
        hole = holed(hole, tmp_path / "hole.mp4", number)
    np.save(tmp_path / "f.npy", np.random.default_rng(1).random((11, 16), np.float32))
    line = ("--model", tiny_model, "--query", "dog sits", "--features", tmp_path / "f.npy", "--duration", 4)
    for output in (("--plot", tmp_path / "plot.png"), ("--cut", tmp_path / "clips")):
        check_error(refused(infer, *line, "--footage", hole, *output), "truncated_video", hole, "--partial")
        assert not output[1].exists()
        run_command(infer, *line, "--footage", hole, *output, "--partial")
        assert output[1].exists()


@pytest.mark.parametrize("name", ["begin.ts", "begin.mpg"])
def test_recording_starting_between_key_frames_is_undamaged(tmp_path: Path, name: str) -> None:
    complete = film(tmp_path / f"whole{Path(name).suffix}", 100)
    content, block = complete.read_bytes(), 188 if name.endswith("ts") else 2048
    (tmp_path / name).write_bytes(content[len(content) * 2 // 5 // block * block :])
    video_file = probe(tmp_path / name)
    assert video_file.damage == ""
    assert 40 < len(list(read_frames(video_file, AS_IT_IS))) < 80


@pytest.mark.parametrize(("suffix", "parts"), [("ts", 3), ("mpg", 3), ("vob", 3), ("webm", 2), ("mkv", 2)])
def test_joined_files_are_complete(tmp_path: Path, suffix: str, parts: int, caplog: pytest.LogCaptureFixture) -> None:
    frames = scene(110)
    first = film(tmp_path / f"first.{suffix}", frames[:70])
    second = film(tmp_path / f"second.{suffix}", frames[70:])
    video_file = probe(joined(tmp_path / f"whole.{suffix}", *(first, second, first)[:parts]))
    count = (110, 180)[parts - 2]
    assert (video_file.num_frames, video_file.damage) == (count, "")
    assert video_file.duration == pytest.approx(count / 25, abs=0.01)
    assert len(records(caplog, logging.WARNING, f"whole.{suffix}", parts - 1)) == 1
    expected = np.concatenate([frames, frames[:70]]).astype(int)[:count]
    actual = np.stack(list(read_frames(video_file, AS_IT_IS)))
    assert np.abs(actual - expected).mean(axis=(1, 2, 3)).max() < 30
    numbers = (0, 69, 70, 109, count - 1)
    for number, still in zip(numbers, frames_at(video_file, [(n + 0.2) / 25 for n in numbers], 48), strict=True):
        assert np.abs(still - expected[number]).mean() < 30
    caplog.clear()
    assert probe(first).num_frames == 70
    assert not caplog.text


@pytest.mark.parametrize(
    ("suffix", "parts", "frames"), [("flv", 2, 60), ("mp4", 2, 60), ("mkv", 3, 120), ("webm", 3, 120)]
)
def test_concatenated_files_with_unread_part_are_rejected(tmp_path: Path, suffix: str, parts: int, frames: int) -> None:
    first = film(tmp_path / f"first.{suffix}", 60)
    assert probe(first).damage == ""
    assert len(partial_frames(probe(joined(tmp_path / f"whole.{suffix}", *[first] * parts)))) == frames


@pytest.mark.parametrize("name", ["jump.mkv", "jump.mp4", "jump.ts"])
def test_timestamp_jump_of_ten_hours_is_skipped(tmp_path: Path, name: str) -> None:
    frames = scene(100)
    times = [40 * number + (36_000_000 if number >= 50 else 0) for number in range(100)]
    video_file = probe(film(tmp_path / name, frames, times=times))
    assert video_file.num_frames == 100
    assert_like(all_frames(video_file), frames)


@pytest.mark.parametrize(
    ("name", "count", "options"),
    [
        ("talk.mkv", 20, {"sound": 4}),
        # 33 bits at 90 kHz end after 95,443.7 s.
        ("a.ts", 150, {"options": {"output_ts_offset": "95440"}}),
    ],
)
def test_long_sound_and_new_clock_are_valid(tmp_path: Path, name: str, count: int, options: dict[str, Any]) -> None:
    actual = probe(film(tmp_path / name, count, **options))
    assert (actual.num_frames, actual.damage, actual.offset) == (count, "", pytest.approx(0, abs=0.03))


def test_still_frame_of_30_seconds_keeps_its_duration(tmp_path: Path) -> None:
    times = [*range(0, 1000, 40), *range(31_000, 32_000, 40)]
    for name in ("still.mkv", "still.mp4"):
        video_file = probe(film(tmp_path / name, 50, times=times))
        assert video_file.duration == pytest.approx(32, abs=0.1)
        assert not video_file.is_continued


def test_recorded_files_have_known_times(faults: Path) -> None:
    late, several = probe(faults / "late.mp4"), probe(faults / "joined.mpg")
    assert (late.offset, late.duration) == (pytest.approx(4), pytest.approx(5))
    assert several.duration == pytest.approx(10)
    assert len(list(read_frames(several, AS_IT_IS))) == 300
    assert len(partial_frames(probe(faults / "hole_h264.mp4"))) == 120


def test_trimmed_file_returns_frames_shown_by_players(tmp_path: Path) -> None:
    frames = scene(100)
    video_file = probe(trimmed(film(tmp_path / "whole.mp4", frames), tmp_path / "trimmed.mp4", 1.2))
    assert (video_file.num_frames, video_file.damage) == (70, "")
    assert_like(all_frames(video_file), frames[30:])
    (still,) = frames_at(video_file, [2.0], 48)
    assert_like(still, frames[80])
    assert 10 < len(partial_frames(probe(truncated(video_file.path, tmp_path / "cut.mp4")))) < 60


def test_metadata_in_another_encoding_is_accepted(tmp_path: Path) -> None:
    import av

    path = film(tmp_path / "title.avi", 20)
    with av.open(str(path)) as reader, av.open(str(tmp_path / "latin.avi"), "w") as writer:
        stream = reader.streams.video[0]
        writer.metadata["title"] = "Ca?e"
        copy = writer.add_stream_from_template(stream)
        for packet in reader.demux(stream):
            if packet.size:
                packet.stream = copy
                writer.mux(packet)
    content = (tmp_path / "latin.avi").read_bytes()
    assert b"Ca?e" in content
    (tmp_path / "latin.avi").write_bytes(content.replace(b"Ca?e", "Café".encode("latin-1")))
    assert probe(tmp_path / "latin.avi").num_frames == 20


def test_file_name_with_colon_is_not_a_protocol(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    film(tmp_path / "clip.mp4", 20).rename(tmp_path / "concat:clip.mp4")
    assert probe(Path("concat:clip.mp4")).num_frames == 20


def referring(directory: Path, name: str) -> Path:
    """Write a file that refers to a video or images, and these files."""
    path, contents = directory / name, {
        "v.ffconcat": "ffconcat version 1.0\nfile part.mp4\n",
        "disguised.mp4": "ffconcat version 1.0\nfile part.mp4\n",
        "v.m3u8": "#EXTM3U\n#EXT-X-TARGETDURATION:4\n#EXTINF:4,\npart.ts\n#EXT-X-ENDLIST\n",
        "network.m3u8": "#EXTM3U\n#EXT-X-TARGETDURATION:4\n#EXTINF:4,\nhttp://127.0.0.1:9/a.ts\n#EXT-X-ENDLIST\n",
        "v.sdp": "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 5004 RTP/AVP 96\n",
        "v.idx": "# VobSub index file, v7 (do not modify this line!)\n",
    }  # fmt: skip
    film(directory / "part.mp4", 40)
    film(directory / "part.ts", 40)
    if name == "p%03d.png":
        for number in range(40):
            (directory / f"p{number:03}.png").write_bytes(png(number))
        path.write_bytes(png(0))
    else:
        path.write_text(contents[name])
    return path


def png(shade: int) -> bytes:
    """Return an image of 64 by 48 pixels in one shade."""
    import av

    codec = av.CodecContext.create("png", "w")
    codec.width, codec.height, codec.pix_fmt, codec.time_base = 64, 48, "rgb24", Fraction(1, 25)
    frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), shade, np.uint8), format="rgb24")
    return b"".join(bytes(packet) for packet in (*codec.encode(frame), *codec.encode(None)))


@pytest.mark.parametrize(
    "name", ["v.ffconcat", "disguised.mp4", "v.m3u8", "network.m3u8", "v.sdp", "v.idx", "p%03d.png"]
)
def test_file_referring_to_other_files_is_rejected(tmp_path: Path, name: str) -> None:
    path = referring(tmp_path, name)
    for read in (probe, offset_of, check_one_file):
        with raises(VideoFileError, "refers_to_files", path):
            read(path)


def test_referring_formats_exist_in_ffmpeg() -> None:
    import av

    # A misspelled name would accept a format.
    assert {"concat", "hls", "image2", "mlv", "sdp", "vobsub"} <= container.REFERRING_FORMATS & set(
        av.formats_available
    )


def with_cover(path: Path, pictures_too: bool, marked: bool) -> Path:
    """Write a file with audio whose first stream is a cover picture."""
    import av

    with av.open(str(path), "w") as container:
        cover = container.add_stream("mjpeg", rate=25)
        cover.height, cover.width, cover.pix_fmt = 16, 16, "yuvj420p"
        if marked:
            cover.disposition = av.stream.Disposition.attached_pic
        moving = container.add_stream("mpeg4", rate=25) if pictures_too else None
        if moving is not None:
            moving.height, moving.width, moving.pix_fmt = 48, 64, "yuv420p"
        voices = container.add_stream("aac", rate=16000)
        voices.layout = "mono"
        container.mux(cover.encode(av.VideoFrame.from_ndarray(np.zeros((16, 16, 3), np.uint8), format="rgb24")))
        container.mux(cover.encode())
        for pixels in scene(30) if moving is not None else ():
            container.mux(moving.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        for start in range(0, 16000, 1024):
            sound = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.int16), format="s16", layout="mono")
            sound.sample_rate, sound.pts = 16000, start
            container.mux(voices.encode(sound))
        for stream in (moving, voices):
            if stream is not None:
                container.mux(stream.encode())
    return path


@pytest.mark.parametrize("marked", [True, False])
def test_cover_picture_is_not_read_as_video(tmp_path: Path, marked: bool) -> None:
    video_file = probe(with_cover(tmp_path / "cover.mp4", pictures_too=True, marked=marked))
    assert (video_file.num_frames, video_file.width) == (30, 64)
    with raises(VideoFileError, "no_video_stream", tmp_path / "sound.mp4"):
        probe(with_cover(tmp_path / "sound.mp4", pictures_too=False, marked=True))


def test_missing_pyav_error_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = film(tmp_path / "clip.mp4", 20)
    monkeypatch.setitem(sys.modules, "av", None)
    with raises(DeviceError, "missing_library", "pip install '.[video]'"):
        probe(path)


@pytest.mark.parametrize(
    ("name", "num_frames", "duration"),
    [("univtg_charades", 460, 30.697), ("v_GGSY1Qvo990", 355, 18.094), ("v_ZNVhz7ctTq0", 420, 14.0)],
)
def test_real_videos_have_expected_durations(real_videos: Path, name: str, num_frames: int, duration: float) -> None:
    video_file = probe(real_videos / f"{name}.mp4")
    assert (video_file.num_frames, video_file.damage) == (num_frames, "")
    assert video_file.duration == pytest.approx(duration, abs=1e-3)
    assert sum(1 for _ in clips(read_frames(video_file, ResizeCrop()), 16, 8)) == (num_frames - 16) // 8 + 1


@pytest.mark.parametrize("rate", [Fraction(1, 2), 500])
def test_unsupported_frame_rate_is_rejected_before_decoding(tmp_path: Path, rate: Any) -> None:
    path = film(tmp_path / "odd.mkv", 40, rate=rate)
    with raises(VideoFileError, "frame_rate_out_of_range", path):
        probe(path)


def test_gap_in_constant_rate_video_is_reported_and_filled(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    frames, complete = scene(40), [40 * number for number in range(40)]
    probe(film(tmp_path / "whole.mkv", frames, times=complete))
    # At a variable rate no step is a gap.
    unsteady = [510 * (number // 5) + (0, 20, 60, 150, 450)[number % 5] for number in range(40)]
    probe(film(tmp_path / "unsteady.mkv", 40, times=unsteady))
    assert not caplog.messages
    gap = probe(film(tmp_path / "gap.mkv", frames, times=[time + 400 * (time > 800) for time in complete]))
    assert records(caplog, logging.WARNING, "gap.mkv", "0.44", "0.80")
    # The previous frame fills the gap.
    assert gap.frame_rate == pytest.approx(25)
    assert (all_frames(gap) == np.concatenate([frames[:21], frames[20:21].repeat(10, 0), frames[21:]])).all()
