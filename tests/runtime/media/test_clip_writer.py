"""Test `runtime.media.clip_writer`: clips start and end at the right frame, upright and with audio."""

from __future__ import annotations

import logging
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from runtime.core.errors import DeviceError, OutputError
from runtime.infer import infer
from runtime.media import clip_writer
from runtime.media.clip_writer import check_encoder, clip_names, write_clips
from runtime.media.video_file import frames_from, probe
from tests.films import film, joined, scene, sound_only, truncated
from tests.raising import check_error, raises, records

av: Any = pytest.importorskip("av", reason="PyAV cuts the clips of these tests")

RATE = 16000
# AAC frames have 1024 samples. The first is silence, which some containers do not hide.
AAC_PADDING = 2048


def numbered(count: int, height: int = 48, width: int = 64) -> np.ndarray:
    """Return frames that encode their number in eight vertical stripes, white for 1 and black for 0."""
    frames = np.zeros((count, height, width, 3), np.uint8)
    for number, frame in enumerate(frames):
        for bit in range(8):
            frame[:, bit * width // 8 : (bit + 1) * width // 8] = 255 * (number >> bit & 1)
    return frames


def number_of(picture: np.ndarray) -> int:
    """Return the number that a frame of `numbered` encodes."""
    middle, each = picture.shape[0] // 2, picture.shape[1] / 8
    return sum((picture[middle, int((bit + 0.5) * each)].mean() > 127) << bit for bit in range(8))


def shown(path: Path) -> list[tuple[float, int]]:
    """Return the seconds and the number of every frame of a clip."""
    return [(time, number_of(frame.to_ndarray(format="rgb24"))) for time, frame in frames_from(probe(path), 0)]


def heard(path: Path) -> tuple[np.ndarray, int]:
    """Return the samples of the first audio channel of a file, and the sample rate."""
    with av.open(str(path)) as container:
        stream = container.streams.audio[0]
        parts = [frame.to_ndarray()[0] for frame in container.decode(stream)]
        return np.concatenate(parts), stream.rate


def length(path: Path) -> float:
    """Return the times of the frames of a file, in seconds."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        return float(stream.duration * stream.time_base)


@pytest.mark.parametrize(
    ("name", "rate"), [("hall.mkv", Fraction(30000, 1001)), ("hall.mp4", 25), ("hall.ts", 25), ("hall.avi", 10)]
)
def test_clip_contains_exactly_the_frames_of_the_moment(tmp_path: Path, name: str, rate: Any) -> None:
    source = film(tmp_path / name, numbered(120), rate=rate)
    step = 1 / float(rate)
    for first, last in ((0, 119), (0, 0), (31, 74), (100, 119)):
        # The span starts a third of a frame after the first frame starts, and ends a third before the last ends.
        write_clips(probe(source), [((first + 0.33) * step, (last + 0.67) * step)], [tmp_path / "clip.mp4"])
        actual = shown(tmp_path / "clip.mp4")
        assert [number for _, number in actual] == list(range(first, last + 1))
        assert actual[0][0] == 0
        if last > first:
            assert actual[-1][0] == pytest.approx((last - first - 0.33) * step, abs=2e-3)
            assert length(tmp_path / "clip.mp4") == pytest.approx((last - first + 0.34) * step, abs=2e-3)


@pytest.mark.parametrize(
    ("name", "times", "span", "numbers", "starts"),
    [
        ("odd.mkv", [5000, 5040, 5080, 5500, 6500, 7000, 7040], (0.3, 1.8), [2, 3, 4], [0, 0.2, 1.2]),
        ("slides.mp4", [*range(0, 1000, 40), *range(1000, 8001, 1000)], (0.5, 6.5), [30], [5.5]),
    ],
)
def test_clip_of_variable_rate_keeps_times_and_length(
    tmp_path: Path, name: str, times: list[int], span: tuple[float, float], numbers: list[int], starts: list[float]
) -> None:
    video_file = probe(film(tmp_path / name, numbered(len(times)), times=times))
    write_clips(video_file, [span], [tmp_path / "clip.mp4"])
    actual = shown(tmp_path / "clip.mp4")[-len(numbers) :]
    assert [number for _, number in actual] == numbers
    assert [time for time, _ in actual] == pytest.approx(starts, abs=1e-3)
    assert length(tmp_path / "clip.mp4") == pytest.approx(span[1] - span[0], abs=1e-3)


def test_moment_shorter_than_a_frame_is_cut_as_one_frame(tmp_path: Path) -> None:
    video_file = probe(film(tmp_path / "hall.mkv", numbered(50)))
    write_clips(video_file, [(1.01, 1.01), (2.0, 2.0)], [tmp_path / "a.mp4", tmp_path / "b.mp4"])
    assert shown(tmp_path / "a.mp4")[0] == (0, 25)
    # The video has no frames after its end.
    assert shown(tmp_path / "b.mp4") == [(0, 49)]


def test_clip_of_odd_frame_size_is_cropped_to_even(tmp_path: Path) -> None:
    video_file = probe(film(tmp_path / "odd.mkv", numbered(30, 47, 65)))
    write_clips(video_file, [(0.4, 0.8)], [tmp_path / "clip.mp4"])
    created = probe(tmp_path / "clip.mp4")
    assert (created.height, created.width) == (46, 64)
    assert [number for _, number in shown(tmp_path / "clip.mp4")] == list(range(10, 20))


def beeping(path: Path, seconds: float, beeps: list[float]) -> Path:
    """Write a video of black frames with a tone of 0.1 s at each of some times."""
    samples = np.zeros(int(seconds * RATE), np.float32)
    for beep in beeps:
        beep_samples = np.arange(int(beep * RATE), int((beep + 0.1) * RATE))
        samples[beep_samples] = 0.5 * np.sin(2 * np.pi * 1000 * beep_samples / RATE)
    with av.open(str(path), "w") as container:
        pictures = container.add_stream("mpeg4", rate=25)
        pictures.height, pictures.width, pictures.pix_fmt = 48, 64, "yuv420p"
        voices = container.add_stream("pcm_s16le" if path.suffix == ".mkv" else "aac", rate=RATE)
        voices.layout = "stereo"
        for frame in scene(int(seconds * 25)):
            container.mux(pictures.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        for start in range(0, len(samples), 1024):
            part = (samples[start : start + 1024] * 32767).astype(np.int16).repeat(2)[None]
            frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(part), format="s16", layout="stereo")
            frame.sample_rate, frame.pts = RATE, start
            container.mux(voices.encode(frame))
        for stream in (pictures, voices):
            container.mux(stream.encode())
    return path


# Each part of a joined file has its seconds and the times of its tones; then the span, and its tones in the clip.
ONE = ([(6, [1.0, 2.5, 4.0])], (2.3, 4.6), [0.2, 1.7], 0.01)
JOINED = ([(4, [1.0]), (3, [2.0])], (5.5, 6.5), [0.5], 0.1)


@pytest.mark.parametrize(
    ("name", "parts", "span", "tones", "tolerance"),
    [("talk.mkv", *ONE), ("talk.mp4", *ONE), ("whole.mkv", *JOINED), ("whole.ts", *JOINED)],
)
def test_clip_sound_is_synchronized_with_frames(
    tmp_path: Path, name: str, parts: Any, span: tuple[float, float], tones: list[float], tolerance: float
) -> None:
    sources = [beeping(tmp_path / f"{number}-{name}", *part) for number, part in enumerate(parts)]
    video_file = probe(joined(tmp_path / name, *sources))
    assert video_file.duration == pytest.approx(sum(seconds for seconds, _ in parts), abs=0.05)
    write_clips(video_file, [span], [tmp_path / "clip.mp4"])
    samples, rate = heard(tmp_path / "clip.mp4")
    assert rate == RATE
    assert len(samples) / rate == pytest.approx(span[1] - span[0], abs=AAC_PADDING / rate)
    assert length(tmp_path / "clip.mp4") == pytest.approx(span[1] - span[0], abs=0.01)
    (loud,) = np.nonzero(np.abs(samples) > 0.2)
    starts = loud[np.diff(loud, prepend=-RATE) > RATE // 4] / rate
    assert starts == pytest.approx(tones, abs=tolerance)


def test_sound_ending_before_the_moment_is_accepted(tmp_path: Path) -> None:
    video_file = probe(film(tmp_path / "talk.mkv", 100, sound=1))
    write_clips(video_file, [(0.5, 3.0), (2.0, 3.0)], [tmp_path / "some.mp4", tmp_path / "none.mp4"])
    samples, rate = heard(tmp_path / "some.mp4")
    assert len(samples) / rate == pytest.approx(0.5, abs=AAC_PADDING / rate)
    assert length(tmp_path / "none.mp4") == pytest.approx(1.0, abs=1e-3)


def test_clip_colors_match_the_source(tmp_path: Path) -> None:
    stored = scene(20)
    write_clips(probe(film(tmp_path / "hall.mkv", stored)), [(0.2, 0.6)], [tmp_path / "clip.mp4"])
    _, first = next(frames_from(probe(tmp_path / "clip.mp4"), 0))
    actual = first.to_ndarray(format="rgb24").astype(int)
    # Centers of the quarters, which adjacent colors do not affect.
    for row in (12, 36):
        for column in (16, 60):
            assert np.abs(actual[row, column] - stored[5, row, column]).max() <= 12


def test_decodable_part_of_damaged_video_is_cut(tmp_path: Path) -> None:
    complete = film(tmp_path / "whole.mp4", numbered(100), options={"movflags": "faststart"})
    video_file = probe(truncated(complete, tmp_path / "cut.mp4"))
    write_clips(video_file, [(0.4, 0.8)], [tmp_path / "clip.mp4"])
    assert [number for _, number in shown(tmp_path / "clip.mp4")] == list(range(10, 20))


def test_interrupted_cutting_writes_no_clip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    video_file = probe(film(tmp_path / "hall.mkv", numbered(50)))
    (tmp_path / "clips").mkdir()
    (tmp_path / "clips" / "a.mp4").write_text("before")
    written = []

    def interrupted(*arguments: Any) -> None:
        written.append(arguments)
        if len(written) == 2:
            raise KeyboardInterrupt
        return write(*arguments)

    write = clip_writer._write
    monkeypatch.setattr(clip_writer, "_write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_clips(video_file, [(0, 1), (1, 2)], [tmp_path / "clips" / "a.mp4", tmp_path / "clips" / "b.mp4"])
    assert [path.name for path in (tmp_path / "clips").iterdir()] == ["a.mp4"]
    assert (tmp_path / "clips" / "a.mp4").read_text() == "before"
    with raises(OutputError, "unwritable_output", tmp_path / "hall.mkv" / "a.mp4"):
        write_clips(video_file, [(0, 1)], [tmp_path / "hall.mkv" / "a.mp4"])


def test_missing_encoder_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    assert check_encoder() in clip_writer.ENCODERS
    monkeypatch.setattr(av.codec, "codecs_available", {"aac", "vp9"})
    with raises(DeviceError, "missing_codec", *clip_writer.ENCODERS, "pip install '.[video]'"):
        check_encoder()
    monkeypatch.setattr(av.codec, "codecs_available", {"libx264"})
    with raises(DeviceError, "missing_codec"):
        check_encoder()


def test_missing_h264_falls_back_to_mpeg4_with_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(av.codec, "codecs_available", {"aac", "mpeg4"})
    write_clips(probe(film(tmp_path / "hall.mkv", numbered(50))), [(0.4, 0.8)], [tmp_path / "clip.mp4"])
    assert [number for _, number in shown(tmp_path / "clip.mp4")] == list(range(10, 20))
    assert records(caplog, logging.WARNING, "mpeg4")


def test_clip_names_contain_video_number_and_query_words() -> None:
    assert clip_names("hall", ["Person opens the door.", "it's a/b \\ c: d?", "男は庭で車を洗う", "…", "w " * 99]) == [
        "hall-1-person-opens-the-door.mp4",
        "hall-2-its-a-b-c-d.mp4",
        "hall-3-男は庭で車を洗う.mp4",
        "hall-4-moment.mp4",
        f"hall-5-{'w-' * 29}w.mp4",
    ]
    assert clip_names("hall", ["a"] * 10)[:2] == ["hall-01-a.mp4", "hall-02-a.mp4"]
    assert all(len(name.encode()) < 255 for name in clip_names("hall", ["\U0001d5ee" * 500]))


def test_clips_of_a_video_with_a_long_name_can_be_written(tmp_path: Path) -> None:
    path = film(tmp_path / "hall.mkv", 20)
    for video in ("h" * 251, "\U0001d5ee" * 62, "男" * 83):
        path = path.rename(tmp_path / f"{video}.mkv")
        (name,) = clip_names(video, ["person opens the door and leaves the house for good"])
        write_clips(probe(path), [(0.2, 0.4)], [tmp_path / "clips" / name])
        assert (tmp_path / "clips" / name).is_file()


def test_infer_cuts_the_best_moment_of_each_query(
    tmp_path: Path, tiny_model: Path, run_command: Any, tiny: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = film(tmp_path / "hall.mkv", numbered(200))
    queries = ("dog sits", "person opens the door")
    line = ("--model", tiny_model, "--video", source, "--extractor", tiny, "--query", *queries)
    caplog.set_level(logging.INFO, "drn")
    run_command(infer, *line, "--cut", tmp_path / "clips")
    clips = sorted((tmp_path / "clips").iterdir())
    assert [path.name for path in clips] == ["hall-1-dog-sits.mp4", "hall-2-person-opens-the-door.mp4"]
    # One line per file, because line breaks in values are escaped.
    written = [str(*record.args) for record in caplog.records if str(record.msg).startswith("Written:") and record.args]
    assert [path for path in written if path.endswith(".mp4")] == [str(path) for path in clips]
    answers = infer(tiny_model, queries, video=str(source), extractor=tiny)
    for answer, path in zip(answers, clips, strict=True):
        best = answer.moments[0]
        numbers = [number for _, number in shown(path)]
        assert numbers[0] == int(best.start * 25 + 1e-3)
        assert abs(numbers[-1] - (best.end * 25 - 0.5)) <= 1


def test_infer_cut_with_invalid_options_is_rejected(
    tmp_path: Path, tiny_model: Path, refused: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DRN_CACHE", str(tmp_path / "cache"))
    np.save(tmp_path / "f.npy", np.ones((9, 16), np.float32))
    of_features = ("--model", tiny_model, "--query", "dog sits", "--features", tmp_path / "f.npy", "--duration", 4)
    error = refused(infer, *of_features, "--cut", tmp_path / "clips")
    check_error(error, "missing_option", "--cut", "--video FILE", "--footage FILE")
    # The clip would have the name of the source.
    source = film(tmp_path / "hall-1-dog-sits.mp4", 100)
    other = source.rename(tmp_path / "hall.mp4")
    (tmp_path / "hall-1-dog-sits.mp4").symlink_to(other)
    complete = (*of_features, "--footage", other, "--cut")
    kept = other.read_bytes()
    check_error(refused(infer, *complete, tmp_path), "output_exists", tmp_path / "hall-1-dog-sits.mp4")
    assert other.read_bytes() == kept
    check_error(refused(infer, *complete, other), "unwritable_output", other)
    monkeypatch.setattr(av.codec, "codecs_available", set())
    check_error(refused(infer, *complete, tmp_path / "clips"), "missing_codec")
    assert not (tmp_path / "clips").exists()
    talk = sound_only(tmp_path / "talk.mp4")
    check_error(refused(infer, *of_features, "--footage", talk), "no_video_stream", talk)
