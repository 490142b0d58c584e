"""Test `runtime.media.extraction` and `runtime.extract`: from video files to a data set directory."""

from __future__ import annotations

import dataclasses
import importlib
import json
import logging
import os
import shlex
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from runtime import Grounder
from runtime.core.errors import GroundingError, ModelFileError, QueryError, VideoFileError
from runtime.core.video import load_features
from runtime.datasets.dataset import FEATURE_DIRECTORY, DataSet
from runtime.extract import extract
from runtime.grounding import plotting
from runtime.infer import infer
from runtime.media import extraction
from runtime.media.extraction import load_or_extract
from runtime.media.extractors import ClipExtractor, open_extractor
from runtime.media.video_file import probe, read_frames
from tests.films import film, truncated
from tests.raising import check_error, raises, records
from tests.runtime.media.extractor_graphs import CLIPS, IMAGES, mixing, write_clips, write_images
from tests.written import logged_lines

# `runtime` has a function of the same name.
infer_module = importlib.import_module("runtime.infer")
pytest.importorskip("onnxruntime", reason="ONNX Runtime runs the extractors of these tests")


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Number of clips of each run of an extractor."""
    counts: list[int] = []
    run = ClipExtractor.extract

    def counted(self: ClipExtractor, clips: np.ndarray) -> np.ndarray:
        counts.append(len(clips))
        return run(self, clips)

    monkeypatch.setattr(ClipExtractor, "extract", counted)
    return counts


def test_ground_video_answers_as_infer_once(tmp_path: Path, tiny: Path, tiny_model: Path, runs: list[int]) -> None:
    source, queries = film(tmp_path / "hall.mkv", 60), ("dog sits", "person opens the door")
    grounder = Grounder.load(tiny_model, "cpu", 1)
    with pytest.raises(QueryError):
        grounder.ground_video(source, ["dog sits", ""], tiny)
    assert not runs
    moments = grounder.ground_video(source, queries, tiny, top_k=2)
    count = len(runs)
    assert count > 0
    answers = infer_module.infer(tiny_model, queries, video=str(source), extractor=tiny, top_k=2)
    assert moments == [list(answer.moments) for answer in answers]
    assert len(runs) == count


def expected_features(path: Path) -> np.ndarray:
    """Return the features of `tiny`, computed from all frames at once."""
    frames = np.stack(list(read_frames(probe(path), CLIPS.framing))).astype(float)
    starts = range(0, len(frames) - 15, 8)
    return np.stack([frames[start : start + 16].mean(axis=(0, 1, 2)) for start in starts]) @ mixing()


@pytest.mark.parametrize("count", [16, 23, 24, 95])
def test_streamed_features_equal_full_file_features(tmp_path: Path, tiny: Path, count: int) -> None:
    path = film(tmp_path / "hall.mkv", count)
    output = extract((path,), tiny, tmp_path / "data", batch_size=3)
    features = load_features(output / FEATURE_DIRECTORY / "hall.npy")
    assert features.dtype == np.float32
    assert features.shape == ((count - 16) // 8 + 1, 16)
    assert features == pytest.approx(expected_features(path), rel=1e-4)


def test_frames_are_decoded_while_the_network_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = film(tmp_path / "hall.mkv", 120)
    decoded: list[int] = []
    more = threading.Event()

    def counted(*arguments: Any, **options: Any) -> Iterator[np.ndarray]:
        for picture in read_frames(*arguments, **options):
            decoded.append(1)
            if len(decoded) > 24:
                more.set()
            yield picture

    def busy(clips: np.ndarray) -> np.ndarray:
        # Without prefetching, only the 16 frames of one clip would be decoded before it is complete.
        assert more.wait(30)
        return np.zeros((len(clips), 16), np.float32)

    monkeypatch.setattr(extraction, "read_frames", counted)
    network: Any = SimpleNamespace(manifest=CLIPS, extract=busy)
    assert extraction.extract(probe(path), network, tmp_path / "hall.npy", batch_size=1) == (14, 120)


def test_extract_output_opens_as_data_set(tmp_path: Path, tiny: Path, mini: Path, runs: list[int]) -> None:
    videos = (film(tmp_path / "hall.mkv", 40, rate=20), film(tmp_path / "yard.mp4", 50))
    before = DataSet(mini).durations
    extract(videos[:1], tiny, mini)
    assert DataSet(mini).durations == {**before, "hall": pytest.approx(2)}
    data = DataSet(extract(videos, tiny, tmp_path / "data"))
    assert data.durations == {"hall": pytest.approx(2), "yard": pytest.approx(2)}
    assert data.num_frames == {"hall": 40, "yard": 50}
    assert json.loads((tmp_path / "data" / "Charades_fps_dict.json").read_text()) == {"hall": "20", "yard": "25"}
    assert data.video("yard").features.shape == (5, 16)
    count = sum(runs)
    # A file is extracted once, even if a directory contains it too.
    extract((videos[1], videos[1], tmp_path), tiny, tmp_path / "twice")
    assert sum(runs) == count + 4 + 5


def interrupt_at_yard(videos: tuple[Path, ...], extractor: Path, output: Path) -> None:
    """Extract videos until the one called yard."""
    run = extraction.extract

    def interrupted(video_file: Any, *arguments: Any, **options: Any) -> Any:
        if video_file.path.stem == "yard":
            raise KeyboardInterrupt
        return run(video_file, *arguments, **options)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(extraction, "extract", interrupted)
        with pytest.raises(KeyboardInterrupt):
            extract(videos, extractor, output)


def test_existing_features_are_not_extracted_again(tmp_path: Path, tiny: Path, runs: list[int]) -> None:
    videos = (film(tmp_path / "hall.mkv", 40), film(tmp_path / "yard.mkv", 48))
    interrupt_at_yard(videos, tiny, tmp_path / "data")
    assert sum(runs) == 4
    extract(videos, tiny, tmp_path / "data")
    assert sum(runs) == 4 + 5
    extract(videos, tiny, tmp_path / "data")
    assert sum(runs) == 4 + 5
    other = write_clips(tmp_path / "other.onnx", dataclasses.replace(CLIPS, kind="other"))
    # Another extractor, or deleted features, require another extraction.
    extract(videos, other, tmp_path / "data")
    assert sum(runs) == 4 + 5 + 4 + 5
    (tmp_path / "data" / FEATURE_DIRECTORY / "yard.npy").unlink()
    extract(videos[1:], other, tmp_path / "data")
    assert sum(runs) == 4 + 5 + 4 + 5 + 5


def tree(directory: Path) -> dict[str, bytes]:
    """Return the content of every file in a directory."""
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


@pytest.fixture
def two(tmp_path: Path, tiny: Path) -> tuple[tuple[Path, Path], Path, Path]:
    """Two videos, a directory of their features, and a second extractor."""
    videos = (film(tmp_path / "hall.mkv", 40), film(tmp_path / "yard.mkv", 48))
    output = extract(videos, tiny, tmp_path / "data")
    return videos, output, write_clips(tmp_path / "other.onnx", dataclasses.replace(CLIPS, resize=(112, 112)))


def test_other_extractor_replaces_all_features_or_none(
    tmp_path: Path, two: tuple[tuple[Path, Path], Path, Path], runs: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    (hall, yard), output, other = two
    new, count = film(tmp_path / "new.mkv", 40), len(runs)
    before, features = tree(output), DataSet(output).video("yard").features
    for chosen in ((hall,), (yard,), (new,), (hall, new)):
        with raises(VideoFileError, "mixed_extractors"):
            extract(chosen, other, output)
        assert (tree(output), len(runs)) == (before, count)
    extract((hall, yard, new), other, output)
    data = DataSet(output)
    assert [len(data.video(name).features) for name in ("hall", "yard", "new")] == [4, 5, 4]
    assert not np.allclose(data.video("yard").features, features)
    assert not records(caplog, logging.WARNING)


def test_mixed_extractors_warn(two: tuple[tuple[Path, Path], Path, Path], caplog: pytest.LogCaptureFixture) -> None:
    videos, output, other = two
    interrupt_at_yard(videos, other, output)
    data = DataSet(output)
    for name in ("hall", "yard", "hall"):
        data.video(name)
    data.offsets()
    assert len(records(caplog, logging.WARNING, output, 2)) == 1
    caplog.clear()
    # The same command resumes.
    extract(videos, other, output)
    DataSet(output).video("hall")
    assert not records(caplog, logging.WARNING)


def test_extractor_changed_by_another_process_is_rejected(
    two: tuple[tuple[Path, Path], Path, Path], tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    videos, _, other = two
    output, seen = tmp_path / "shared", extraction.extract

    def beside(video_file: Any, *arguments: Any, **options: Any) -> Any:
        monkeypatch.setattr(extraction, "extract", seen)
        extract(videos[1:], tiny, output)
        return seen(video_file, *arguments, **options)

    monkeypatch.setattr(extraction, "extract", beside)
    with raises(VideoFileError, "mixed_extractors"):
        extract(videos[:1], other, output)
    assert DataSet(output).durations.keys() == {"yard"}


BAD_NAMES = (
    os.fsdecode(b"caf\xe9.mkv"), "a\nb.mkv", "a\rb.mkv", "a\x1b[31mb.mkv", "a\u2028b.mkv", "a" * 251 + ".mkv",
    "ä" * 126 + ".mp", "...mkv", " .mkv",
)  # fmt: skip


def test_extract_rejects_invalid_video_names(tmp_path: Path, tiny: Path, runs: list[int], refused: Any) -> None:
    good, output = film(tmp_path / "good.mkv", 40), tmp_path / "data"
    bad = [Path(shutil.copy(good, tmp_path / name)) for name in BAD_NAMES]
    for path in bad:
        with raises(VideoFileError, "invalid_video_name"):
            extract((good, path), tiny, output)
        assert not output.exists()
    assert not runs
    extract((good,), tiny, output)
    before = tree(output)
    check_error(refused(extract, bad[0], "--extractor", tiny, "--output", output), "invalid_video_name")
    assert tree(output) == before


def test_extract_accepts_unusual_valid_video_names(tmp_path: Path, tiny: Path) -> None:
    names = ["ä" * 125, "=1+1", "-x", "sp ace", "dot.", "%s%d{0}", ".hidden"]
    good = film(tmp_path / "good.mkv", 40)
    videos = tuple(Path(shutil.copy(good, tmp_path / f"{name}.mp4")) for name in names)
    data = DataSet(extract(videos, tiny, tmp_path / "data"))
    assert {name: data.video(name).features.shape for name in data.durations} == dict.fromkeys(names, (4, 16))


@pytest.mark.parametrize("name", ["-x", "--x", "it's a name"])
def test_next_command_of_extract_runs(
    tmp_path: Path, tiny: Path, tiny_model: Path, caplog: pytest.LogCaptureFixture, name: str, run_command: Any
) -> None:
    video = film(tmp_path / "good.mkv", 40).rename(tmp_path / f"{name}.mkv")
    with caplog.at_level("INFO", "drn"):
        extract((video,), tiny, tmp_path / "data")
    (line,) = (record.getMessage() for record in caplog.records if "Next:" in record.getMessage())
    words = shlex.split(line.split("runtime.infer", 1)[1])
    own = {"drn.onnx": str(tiny_model), "a sentence": "person opens the door"}
    outcome = run_command(infer, *[own.get(word, word) for word in words])
    assert name in outcome.out


@pytest.mark.parametrize("names", [("hall", "Hall"), ("vid\u00e9o", "vide\u0301o")])
def test_names_merged_by_the_file_system_are_rejected(
    tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch, names: tuple[str, str]
) -> None:
    first, second = (film(tmp_path / f"{name}.mkv", frames) for name, frames in zip(names, (40, 48), strict=True))
    module = importlib.import_module("runtime.extract")
    monkeypatch.setattr(module, "merges_names", lambda directory: True)
    with raises(VideoFileError, "ambiguous_video_name"):
        extract((first, second), tiny, tmp_path / "data")
    assert not (tmp_path / "data").exists()
    extract((first,), tiny, tmp_path / "data")
    before = tree(tmp_path / "data")
    with raises(VideoFileError, "ambiguous_video_name"):
        extract((second,), tiny, tmp_path / "data")
    assert tree(tmp_path / "data") == before
    monkeypatch.setattr(module, "merges_names", lambda directory: False)
    extract((second,), tiny, tmp_path / "data")
    assert len(list((tmp_path / "data").rglob("*.npy"))) == 2


@pytest.mark.parametrize(
    "names", [("good.mkv", "good.avi.mkv"), ("good.avi.mkv", "good.mkv"), ("good.mkv", "good.mp4")]
)
def test_two_videos_of_one_name_are_rejected(
    tmp_path: Path, tiny: Path, runs: list[int], names: tuple[str, str], refused: Any
) -> None:
    first, second = (film(tmp_path / name, frames) for name, frames in zip(names, (40, 48), strict=True))
    output = tmp_path / "data"
    line = ("--extractor", tiny, "--output", output)
    check_error(refused(extract, first, second, *line), "ambiguous_video_name", first, second)
    assert not output.exists()
    extract((first,), tiny, output)
    before, count = tree(output), sum(runs)
    check_error(refused(extract, second, *line), "ambiguous_video_name", second, "--output")
    assert (tree(output), sum(runs)) == (before, count)


def test_extract_and_infer_reject_a_playlist(
    tmp_path: Path, tiny: Path, tiny_model: Path, refused: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    film(tmp_path / "part.mp4", 40)
    script = tmp_path / "v.ffconcat"
    script.write_text("ffconcat version 1.0\nfile part.mp4\n")
    for options in (("--extractor", tiny), ("--extractor", tiny, "--partial")):
        error = refused(extract, script, *options, "--output", tmp_path / "data")
        check_error(error, "refers_to_files", script)
        error = refused(infer, "--model", tiny_model, "--video", script, *options, "--query", "a person")
        check_error(error, "refers_to_files", script)
        assert not (tmp_path / "data").exists()
    # Features that an earlier version extracted are not reused either.
    with monkeypatch.context() as patch:
        patch.setattr("runtime.media.container.REFERRING_FORMATS", frozenset())
        extract((script,), tiny, tmp_path / "data")
    with raises(VideoFileError, "refers_to_files"):
        extract((script,), tiny, tmp_path / "data")


def test_extract_non_finite_features_are_refused(tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    video, output = probe(film(tmp_path / "a.mkv", 40)), tmp_path / "a.npy"
    monkeypatch.setattr(ClipExtractor, "extract", lambda self, clips: np.full((len(clips), CLIPS.dim), np.nan))
    with raises(ModelFileError, "non_finite_output", video.path):
        extraction.extract(video, open_extractor(tiny, "cpu"), output)
    assert not output.exists()


def test_image_encoder_uses_every_eighth_frame(tmp_path: Path) -> None:
    path = film(tmp_path / "hall.mkv", 41)
    output = extract((path,), write_images(tmp_path / "clip.onnx"), tmp_path / "data")
    features = load_features(output / FEATURE_DIRECTORY / "hall.npy")
    frames = np.stack(list(read_frames(probe(path), IMAGES.framing)))[::8]
    pixels = (frames / 255 - np.array(IMAGES.mean)) / np.array(IMAGES.std)
    assert features.shape == (6, 16)
    assert features == pytest.approx(pixels.mean(axis=(1, 2)) @ mixing(), rel=1e-3, abs=1e-6)
    assert DataSet(output).num_frames == {"hall": 41}


def cut_film(path: Path) -> Path:
    return truncated(film(path.with_name("w.mp4"), 90, options={"movflags": "faststart"}), path)


BAD_VIDEOS: list[tuple[Callable[[Path], Any], str]] = [
    (lambda path: path.write_text("no video"), "damaged_file"),
    (lambda path: film(path, 15), "video_too_short"),
    (cut_film, "truncated_video"),
]


@pytest.mark.parametrize(("make", "code"), BAD_VIDEOS)
def test_invalid_video_is_rejected_without_extraction_and_output(
    tmp_path: Path, tiny: Path, tiny_model: Path, runs: list[int], refused: Any, make: Callable[[Path], Any], code: str
) -> None:
    good, bad = film(tmp_path / "good.mkv", 20), tmp_path / "bad.mp4"
    make(bad)
    before = sorted(tmp_path.iterdir())
    check_error(refused(extract, good, bad, "--extractor", tiny, "--output", tmp_path / "data"), code, bad)
    line = ("--model", tiny_model, "--video", bad, "--extractor", tiny, "--query", "dog sits")
    error = refused(infer, *line, "--plot", tmp_path / "plot.png", "--cut", tmp_path / "clips")
    check_error(error, code, bad)
    assert not runs
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("query", ["...", "xyzzy plugh"])
def test_invalid_query_is_rejected_before_decoding(
    tmp_path: Path, tiny: Path, tiny_model: Path, cache: Path, refused: Any, query: str
) -> None:
    line = ("--model", tiny_model, "--video", film(tmp_path / "good.mkv", 20), "--extractor", tiny)
    code = "no_words" if query == "..." else "unknown_content_words"
    check_error(refused(infer, *line, "--query", "dog sits", query), code, repr(query))
    assert not cache.exists()


def test_partial_extraction_is_not_reused_as_complete(tmp_path: Path, tiny: Path, cache: Path) -> None:
    complete = film(tmp_path / "w.mp4", 90, options={"movflags": "faststart"})
    path = truncated(complete, tmp_path / "cut.mp4")
    extractor = open_extractor(tiny, "cpu")
    video = load_or_extract(path, extractor, partial=True)
    assert 20 < video.num_frames < 80
    assert len(video.features) == (video.num_frames - 16) // 8 + 1
    assert video.duration == pytest.approx(video.num_frames / 25)
    assert video.features == pytest.approx(load_or_extract(complete, extractor).features[: len(video.features)])
    # Cached partial features must not be used for a complete video.
    with raises(VideoFileError, "truncated_video", path, "--partial"):
        load_or_extract(path, extractor)
    # What can be decoded is shorter than a clip.
    short = truncated(film(tmp_path / "w.mkv", 60), tmp_path / "short.mkv", 1 / 6)
    with pytest.raises(VideoFileError) as caught:
        load_or_extract(short, extractor, partial=True)
    assert "--partial" not in str(caught.value)


def test_feature_cache_is_keyed_by_video_content(tmp_path: Path, tiny: Path, runs: list[int], cache: Path) -> None:
    extractor = open_extractor(tiny, "cpu")
    path = film(tmp_path / "hall.mkv", 40)
    with logged_lines() as lines:
        first = load_or_extract(path, extractor)
    assert {Path(line.removeprefix("Written: ")) for line in lines} == set(cache.iterdir())
    assert sum(runs) == 4
    with logged_lines() as lines:
        again = load_or_extract(path.rename(tmp_path / "renamed.mkv"), extractor)
    assert not any(line.startswith("Written: ") for line in lines)
    assert sum(runs) == 4
    assert again.name == "renamed"
    assert (again.features == first.features).all()
    load_or_extract(film(tmp_path / "hall.mkv", 41), extractor)
    assert sum(runs) == 8


def late_film(path: Path, count: int = 200, after: int = 4000) -> Path:
    """Write a video whose first frame is some milliseconds after the start of its audio."""
    return film(path, count, times=[after + 40 * number for number in range(count)], sound=after / 1000 + count / 25)


def test_late_start_video_has_player_time(tmp_path: Path, tiny: Path, tiny_model: Path, run_command: Any) -> None:
    on_time, late = late_film(tmp_path / "a" / "hall.mkv", after=0), late_film(tmp_path / "b" / "hall.mkv", after=4000)

    def times(*video: object) -> list[float]:
        line = ("--model", tiny_model, "--query", "person opens the door", "--format", "json")
        outcome = run_command(infer, *line, *video)
        moments = json.loads(outcome.out)[0]["moments"]
        return [second for moment in moments for second in (moment["start"], moment["end"])]

    expected = [second + 4 for second in times("--video", on_time, "--extractor", tiny)]
    assert len(expected) >= 2
    first = times("--video", late, "--extractor", tiny)
    assert first == pytest.approx(expected, abs=5e-3)
    # From the cache, and from a directory.
    assert times("--video", late, "--extractor", tiny) == first
    data = extract((late,), tiny, tmp_path / "data")
    assert times("--data", data, "--video", "hall") == first
    features = ("--features", data / FEATURE_DIRECTORY / "hall.npy", "--num-frames", 200)
    features += ("--duration", DataSet(data).durations["hall"])
    assert times(*features, "--footage", late) == first
    assert times(*features) == pytest.approx([second - 4 for second in first], abs=5e-3)


def test_late_start_moment_is_cut_and_drawn_in_player_time(
    tmp_path: Path, tiny: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    late = late_film(tmp_path / "hall.mkv")
    cuts: list[Any] = []
    shown: list[Any] = []
    monkeypatch.setattr(infer_module, "write_clips", lambda video_file, spans, *rest, **options: cuts.extend(spans))

    def noted(video_file: Any, times: list[float], *rest: Any, **options: Any) -> list[np.ndarray]:
        shown.append(times)
        return [np.zeros((9, 16, 3), np.uint8)] * len(times)

    monkeypatch.setattr(plotting, "frames_at", noted)
    (answer,) = infer(
        tiny_model, ("dog sits",), video=str(late), extractor=tiny, cut=tmp_path / "clips", plot=tmp_path / "plot.png"
    )
    best = answer.moments[0]
    assert answer.duration == pytest.approx(12, abs=0.05)
    assert best.start >= 3.98
    assert cuts == [(pytest.approx(best.start - 4, abs=0.03), pytest.approx(best.end - 4, abs=0.03))]
    strip = shown[-1]
    assert strip[0] == 0
    assert strip[-1] == pytest.approx(12 * (len(strip) - 0.5) / len(strip) - 4, abs=0.05)


def test_mismatched_extractor_is_rejected_before_decoding(tmp_path: Path, tiny_model: Path, refused: Any) -> None:
    wide = write_clips(tmp_path / "wide.onnx", dataclasses.replace(CLIPS, dim=24))
    error = refused(
        infer, "--model", tiny_model, "--video", tmp_path / "none.mp4", "--extractor", wide, "--query", "dog"
    )
    check_error(error, "feature_width_mismatch", 24, 16)


def test_options_conflicting_with_video_file_are_rejected(
    tmp_path: Path, tiny: Path, tiny_model: Path, mini: Path, refused: Any
) -> None:
    line = ("--model", tiny_model, "--query", "door", "--extractor", tiny)
    hall, of_mini = ("--video", tmp_path / "hall.mp4"), ("--data", mini, "--video", "AAAA1")
    check_error(refused(infer, *line), "conflicting_options", "--extractor", "--video FILE")
    check_error(refused(infer, *line, *of_mini), "conflicting_options", "--extractor", "--video FILE")
    check_error(refused(infer, *line, *hall, "--duration", 3), "conflicting_options", "--duration", "--num-frames")
    check_error(refused(infer, *line[:4], *of_mini, "--partial"), "conflicting_options", "--partial")
    check_error(refused(infer, *line, *hall, "--footage", hall[1]), "conflicting_options", "--footage")
    check_error(refused(infer, *line, *hall), "missing_file", hall[1])


def halve_mean(encoder: Path) -> None:
    path = encoder.with_name("clip.onnx.json")
    description = json.loads(path.read_text())
    description["mean"] = [value / 2 for value in description["mean"]]
    path.write_text(json.dumps(description))


def double_weights(encoder: Path) -> None:
    weights = encoder.with_name("clip.onnx.data")
    weights.write_bytes((np.frombuffer(weights.read_bytes(), np.float32) * np.float32(2)).tobytes())


@pytest.mark.parametrize("change", [halve_mean, double_weights])
def test_changed_encoder_extracts_again(tmp_path: Path, change: Callable[[Path], None]) -> None:
    onnx = pytest.importorskip("onnx", reason="onnx moves the weights into a file of their own")
    video, encoder, output = film(tmp_path / "hall.mkv", 41), write_images(tmp_path / "clip.onnx"), tmp_path / "data"
    onnx.save(onnx.load(encoder), encoder, save_as_external_data=True, location="clip.onnx.data", size_threshold=0)

    def features() -> tuple[np.ndarray, np.ndarray]:
        """Return the features by `infer --video` and by `runtime.extract`."""
        extract((video,), encoder, output)
        cached = load_or_extract(video, open_extractor(encoder, "cpu")).features
        return cached, load_features(output / FEATURE_DIRECTORY / "hall.npy")

    before = features()
    change(encoder)
    after = features()
    for old, new in zip(before, after, strict=True):
        assert np.abs(old - new).max() > 1e-3
    assert (after[0] == after[1]).all()


def damage(path: Path, key: bytes) -> bytes:
    """Change one bit of features, or one digit after `key` of a record; return the content before."""
    good = path.read_bytes()
    offset = len(good) * 3 // 4 if path.suffix == ".npy" else good.index(key) + len(key) - 1
    path.write_bytes(good[:offset] + bytes([good[offset] ^ 1]) + good[offset + 1 :])
    return good


@pytest.mark.parametrize("suffix", [".npy", ".json"])
def test_damaged_cache_entry_is_extracted_again(tmp_path: Path, tiny: Path, cache: Path, suffix: str) -> None:
    video, extractor = film(tmp_path / "hall.mkv", 40), open_extractor(tiny, "cpu")
    first = load_or_extract(video, extractor)
    (entry,) = cache.glob(f"*{suffix}")
    good = damage(entry, b'"num_frames": 4')
    again = load_or_extract(video, extractor)
    assert (again.features == first.features).all()
    assert (again.num_frames, again.duration) == (first.num_frames, first.duration)
    assert entry.read_bytes() == good


@pytest.mark.parametrize(
    ("name", "code"), [(f"{FEATURE_DIRECTORY}/hall.npy", "damaged_features"), ("extracted.json", "damaged_note")]
)
def test_damaged_features_in_directory_are_extracted_again(tmp_path: Path, tiny: Path, name: str, code: str) -> None:
    video = film(tmp_path / "hall.mkv", 40)
    data = extract((video,), tiny, tmp_path / "data")
    assert DataSet(data).video("hall").num_frames == 40
    good = damage(data / name, b'"num_frames": 4')
    with raises(GroundingError, code):
        DataSet(data).video("hall")
    extract((video,), tiny, data)
    assert (data / name).read_bytes() == good
    # A record of an earlier version has no digests.
    notes = json.loads((data / "extracted.json").read_bytes())
    del notes["videos"]["hall"]["digest"], notes["videos"]["hall"]["features"]
    (data / "extracted.json").write_text(json.dumps(notes))
    assert DataSet(data).video("hall").offset == 0.0
