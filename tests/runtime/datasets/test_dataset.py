"""Test `runtime.datasets.dataset`: data sets in published layouts."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from runtime.core.errors import AnnotationError, FeatureError
from runtime.core.pooling import ClipTiming
from runtime.core.video import check_frame_rate
from runtime.datasets.dataset import CHECKED_VIDEOS, Annotation, DataSet
from runtime.evaluate import evaluate
from runtime.rank import rank
from tests.annotated import write_activitynet, write_tacos
from tests.raising import raises, records

FEATURES = "C3D_unit16_overlap0.5_merged"


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """Return a directory with tables of two videos of 30 and 10 seconds, without a split."""
    for name, table in {
        "Charades_duration.json": {"AAAAA": 30.0, "BBBBB": 10},
        "Charades_frames_info.json": {"AAAAA": 900, "BBBBB": 300},
        "Charades_word2id.json": {"person": 1, "opens": 2, "door": 3},
    }.items():
        (tmp_path / name).write_text(json.dumps(table))
    return tmp_path


def write(directory: Path, *lines: str) -> DataSet:
    (directory / "Charades_sta_test.txt").write_text("".join(line + "\n" for line in lines))
    return DataSet(directory)


def test_lines_become_annotations_in_file_order(directory: Path) -> None:
    data_set = write(directory, "BBBBB 1.5 4##person opens door.", "AAAAA 0.0 30.0##door.")
    assert data_set.annotations("test") == [
        Annotation("BBBBB", 1.5, 4.0, "person opens door.", 1),
        Annotation("AAAAA", 0.0, 30.0, "door.", 2),
    ]


def test_spans_are_fractions_and_only_ends_are_clipped(directory: Path, caplog: pytest.LogCaptureFixture) -> None:
    data_set = write(directory, "AAAAA 3 15##door.", "AAAAA 3 31##door.", "BBBBB 11 12##door.")
    with caplog.at_level(logging.INFO, "drn"):
        spans = data_set.spans(data_set.annotations("test", "keep"))
    assert spans.tolist() == [[0.1, 0.5], [0.1, 1], [1.1, 1]]
    assert spans.dtype == np.float64
    assert data_set.spans([]).shape == (0, 2)
    assert len(records(caplog, logging.INFO, "Charades_sta_test.txt", 2, 3)) == 1


@pytest.mark.parametrize(
    "line",
    [
        "",
        "AAAAA 1 2",
        "AAAAA 1 2##door##person.",
        "AAAAA 1##door.",
        "AAAAA 1 2 3##door.",
        "AAAAA 1 2##",
        "##door.",
        "AAAAA one 2##door.",
        "AAAAA 1 nan##door.",
        "AAAAA -inf 2##door.",
        "CCCCC 1 2##door.",
    ],
)
def test_malformed_line_is_named_by_number(directory: Path, line: str) -> None:
    data_set = write(directory, "AAAAA 1 2##door.", line, "AAAAA 1 2##door.")
    code = "unlisted_video" if line.startswith("CCCCC") else "malformed_row"
    for invalid in ("error", "drop", "keep"):
        with raises(AnnotationError, code, directory / "Charades_sta_test.txt", 2):
            data_set.annotations("test", invalid)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("line", "quoted"),
    [
        ("AAAAA 5 4##door.", (4, 5)),
        ("AAAAA 5 5##door.", (5,)),
        ("BBBBB 10 12##door.", (10,)),
        ("BBBBB -1 2##door.", (-1,)),
    ],
)
def test_invalid_moment_follows_the_policy(
    directory: Path, line: str, quoted: tuple[int, ...], caplog: pytest.LogCaptureFixture
) -> None:
    data_set = write(directory, "AAAAA 1 2##door.", line)
    with raises(AnnotationError, "impossible_moment", directory / "Charades_sta_test.txt", 2, *quoted):
        data_set.annotations("test")
    assert not caplog.records
    assert [annotation.line for annotation in data_set.annotations("test", "drop")] == [1]
    assert len(caplog.records) == len(records(caplog, logging.WARNING, 2, *quoted)) == 1
    assert [annotation.line for annotation in data_set.annotations("test", "keep")] == [1, 2]


def test_unknown_video_error_names_the_table(directory: Path) -> None:
    with raises(AnnotationError, "unlisted_video", "'CCCCC'", "Charades_duration.json"):
        write(directory, "CCCCC 1 2##door.").annotations("test")
    (directory / "Charades_frames_info.json").write_text('{"AAAAA": 900}')
    with raises(AnnotationError, "unlisted_video", "'BBBBB'", "Charades_frames_info.json"):
        write(directory, "BBBBB 1 2##door.").annotations("test")


def put(name: str, content: str | bytes | None) -> Callable[[Path], object]:
    """Return a function that writes a file of a directory; None deletes the file."""
    if content is None:
        return lambda directory: (directory / name).unlink()
    return lambda directory: (directory / name).write_bytes(content.encode() if isinstance(content, str) else content)


SPLIT, LENGTHS, IDS = "Charades_sta_test.txt", "Charades_duration.json", "Charades_word2id.json"
REJECTED: dict[str, tuple[Callable[[Path], object], str, list[object]]] = {
    "no usable line": (put(SPLIT, "AAAAA 5 4##door.\n"), "empty_split", [SPLIT]),
    "empty split": (put(SPLIT, ""), "empty_file", [SPLIT]),
    "no split": (lambda directory: None, "missing_split", [SPLIT, "'test'"]),
    "not text": (put(SPLIT, b"\xff\xfe\x00"), "not_utf8", [SPLIT]),
    "directory": (lambda directory: (directory / SPLIT).mkdir(), "unreadable_file", [SPLIT]),
    "no directory": (shutil.rmtree, "missing_file", ["", "python -m train.simulate"]),
    "no table": (put(LENGTHS, None), "missing_file", [LENGTHS]),
    "separator": (put(LENGTHS, '{"AAAAA": 30.0, "day/BBBBB": 10}'), "invalid_video_name", [LENGTHS, "'day/BBBBB'"]),
    "gap in ids": (put(IDS, '{"person": 1, "door": 3}'), "word_numbers_not_consecutive", [IDS]),
}


@pytest.mark.parametrize("case", REJECTED)
def test_unusable_directory_is_rejected_naming_the_file(directory: Path, case: str) -> None:
    change, code, (name, *values) = REJECTED[case]
    change(directory)

    def read() -> None:
        data_set = DataSet(directory)
        _ = data_set.vocabulary
        data_set.annotations("test", "drop")

    with raises(AnnotationError, code, directory / str(name), *values):
        read()


def test_directory_without_data_set_lists_expected_files(tmp_path: Path) -> None:
    (tmp_path / "annotations.json").write_text("{}")
    with raises(AnnotationError, "data_set_missing", tmp_path, "Charades_sta_SPLIT.txt", "SPLIT.jsonl", "formats.md"):
        DataSet(tmp_path)


@pytest.mark.parametrize("name", ["Charades_duration.json", "Charades_frames_info.json", "Charades_word2id.json"])
def test_damaged_table_is_named(directory: Path, name: str) -> None:
    for content in ("", "{", "[1, 2]", "{}", '{"AAAAA": "30"}', '{"AAAAA": -1}', '{"AAAAA": NaN}'):
        (directory / name).write_text(content)
        is_json = content and content != "{" and "NaN" not in content
        code = "unexpected_structure" if is_json else "invalid_json"
        with raises(AnnotationError, code, directory / name):
            _ = DataSet(directory).vocabulary


def test_pt_features_take_precedence_over_npy(directory: Path) -> None:
    (directory / FEATURES).mkdir()
    data_set = DataSet(directory)
    with raises(FeatureError, "missing_features", "'AAAAA'", directory / FEATURES / "AAAAA.pt"):
        data_set.video("AAAAA")
    np.save(directory / FEATURES / "AAAAA.npy", np.ones((5, 4), np.float32))
    assert data_set.feature_path("AAAAA").suffix == ".npy"
    video = data_set.video("AAAAA")
    assert (video.name, video.num_frames, video.duration, video.features.shape) == ("AAAAA", 900, 30.0, (5, 4))
    (directory / FEATURES / "AAAAA.pt").touch()
    assert data_set.feature_path("AAAAA").suffix == ".pt"


def test_width_timing_and_origin_are_read(golden: Path, mini: Path, caplog: pytest.LogCaptureFixture) -> None:
    data_set = DataSet(golden / "mini")
    assert data_set.features().dim == 16
    data_set.check_clock(ClipTiming(16, 8))
    assert not caplog.messages
    data_set.check_clock(ClipTiming(60, 60))
    assert len(records(caplog, logging.WARNING, 16, 8, 60)) == 1
    assert not data_set.simulated
    (mini / "simulated.json").write_text("{}")
    assert DataSet(mini).simulated


@pytest.mark.parametrize("command", [evaluate, rank])
def test_commands_check_clip_timing_of_model_and_data(
    command: Any, tiny_model: Path, mini: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    timings: list[ClipTiming] = []
    monkeypatch.setattr(DataSet, "check_clock", lambda self, clock: timings.append(clock))
    command(tiny_model, mini, limit=1, **({"videos": 2} if command is rank else {}))
    assert timings == [ClipTiming(16, 8)]


def test_tokens_and_ground_truth_equal_published_loader(golden: Path) -> None:
    reference = np.load(golden / "dataset_mini.npz")
    data_set = DataSet(golden / "mini")
    annotations = data_set.annotations("test", "keep")
    assert len(annotations) == 7
    spans = data_set.spans(annotations).astype(np.float32)
    for index, annotation in enumerate(annotations):
        assert annotation.video == reference[f"mini_{index}_vid_name"]
        tokens = data_set.vocabulary.encode(annotation.sentence)
        assert tokens.tolist() == reference[f"mini_{index}_tokens"].tolist()
        assert len(tokens) == reference[f"mini_{index}_query_length"]
        np.testing.assert_array_equal(spans[index], reference[f"mini_{index}_gt_bbox"])


def test_four_invalid_lines_of_real_file_are_dropped(real_data: Path, caplog: pytest.LogCaptureFixture) -> None:
    data_set = DataSet(real_data / "charades_sta")
    annotations = data_set.annotations("train", "keep")
    dropped = data_set.annotations("train", "drop")
    broken = sorted({a.line for a in annotations} - {a.line for a in dropped})
    assert [annotations[line - 1].video for line in broken] == ["LEOL6", "IOL8Q", "AKKWU", "AKKWU"]
    assert len(records(caplog, logging.WARNING, "Charades_sta_train.txt", 4)) == 1
    with raises(AnnotationError, "impossible_moment", broken[0]):
        data_set.annotations("train")
    late = sum(a.end > data_set.durations[a.video] for a in annotations)
    assert late == 1768


def scaled(key: str, factor: float) -> Callable[[dict[str, Any]], None]:
    """Return a change of an entry that multiplies a duration, or timestamps."""
    return lambda entry: entry.update({key: (np.array(entry[key]) * factor).tolist()})


def as_fractions(entry: dict[str, Any]) -> None:
    scaled("timestamps", 1 / entry["duration"])(entry)
    entry["duration"] = 15.0


@pytest.mark.parametrize(
    ("write", "change"),
    [
        (write_activitynet, scaled("duration", 1000)),
        (write_activitynet, scaled("timestamps", 1000)),
        (write_activitynet, scaled("timestamps", 29.4)),
        (write_activitynet, as_fractions),
        (write_tacos, scaled("timestamps", 1 / 29.4)),
        (write_tacos, scaled("timestamps", 29.4)),
    ],
)
def test_annotations_in_another_unit_are_rejected(write: Any, change: Callable[[Any], None], tmp_path: Path) -> None:
    path = write(tmp_path / "data") / "test.json"
    entries = json.loads(path.read_text())
    for entry in entries.values():
        change(entry)
    path.write_text(json.dumps(entries))
    for invalid in ("error", "drop", "keep"):
        with raises(AnnotationError, "units_mismatch", path):
            DataSet(path.parent).annotations("test", invalid)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "counts", "valid"),
    [
        ("charades_sta", {"train": 12408, "test": 3720}, 12404),
        ("activitynet", {"train": 37421, "val": 17505, "test": 17031}, 37417),
        ("tacos", {"train": 9790, "val": 4436, "test": 4001}, 9790),
        ("qvhighlights", {"val": 1550}, None),
    ],
)
def test_published_annotations_have_known_counts_and_units(
    name: str, counts: dict[str, int], valid: int | None, real_data: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data_set = DataSet(real_data / name)
    assert {split: len(data_set.annotations(split, invalid="keep")) for split in data_set.splits} == counts
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    for video in data_set.num_frames.keys() & data_set.durations.keys():
        check_frame_rate(video, data_set.num_frames[video], data_set.durations[video])
    if valid is not None:
        assert len(data_set.annotations("train", "drop")) == valid


@pytest.mark.parametrize("has_frame_counts", [True, False])
@pytest.mark.parametrize(("factor", "outcome"), [(1000, "error"), (1 / 60, "error"), (24, "warning"), (7.5, "nothing")])
def test_one_duration_in_another_unit_is_reported(
    has_frame_counts: bool, factor: float, outcome: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "features").mkdir()
    clock, frames = ClipTiming(), ClipTiming().num_frames(60)
    durations = {f"v{index}": frames / 24 * (factor if index == 3 else 1) for index in range(9)}
    entries = {
        video: {"duration": seconds, "timestamps": [[0, seconds]], "sentences": ["the person opens the door"]}
        for video, seconds in durations.items()
    }
    (tmp_path / "train.json").write_text(json.dumps(entries))
    for video in entries:
        np.save(tmp_path / "features" / f"{video}.npy", np.random.default_rng(0).random((60, 4)))

    def opened() -> DataSet:
        data_set = DataSet(tmp_path)
        if has_frame_counts:
            data_set.num_frames.update(dict.fromkeys(entries, frames))
        return data_set

    opened().video("v2")
    assert not caplog.records
    for look in (
        lambda: opened().video("v3"),
        lambda: opened().check_clips(sorted(entries)),
        lambda: opened().check_clips(sorted(entries), clock, opened().store),
    ):
        caplog.clear()
        if outcome == "error":
            with raises(AnnotationError, "frame_rate_out_of_range", "'v3'", frames, f"{durations['v3']:g}"):
                look()
        else:
            look()
        warned = records(caplog, logging.WARNING, "'v3'", 1, 24, code="frame_rate_out_of_range")
        assert len(warned) == len(caplog.records) == (outcome == "warning")


def test_check_clips_checks_frame_rates_of_all_videos(tmp_path: Path) -> None:
    names = [f"v{index:04}" for index in range(3 * CHECKED_VIDEOS)]
    (tmp_path / "features").mkdir()
    entries = {
        name: {"fps": 29.4, "num_frames": 16, "timestamps": [[0, 9]], "sentences": ["the person waits"]}
        for name in names
    }
    (tmp_path / "train.json").write_text(json.dumps(entries))
    for name in names:
        np.save(tmp_path / "features" / f"{name}.npy", np.ones((1, 4)))
    for index in range(3):
        data_set = DataSet(tmp_path)
        data_set.durations[names[index]] *= 1000
        with raises(AnnotationError, "frame_rate_out_of_range", repr(names[index])):
            data_set.check_clips(names)


@pytest.mark.parametrize(("name", "similar"), [("CCCCC", "'CCCCC'"), ("aaaaa", "'AAAAA'"), ("AAAAAx", "'AAAAA'")])
def test_unknown_video_error_names_similar_video(directory: Path, name: str, similar: str) -> None:
    with raises(AnnotationError, "unlisted_video", repr(name), similar):
        DataSet(directory).video(name)
