"""Test `runtime.datasets.formats`: files determine the format, and all formats are read into one form."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from runtime.core.errors import AnnotationError
from runtime.datasets.charades_sta import DURATIONS, FRAMES, WORDS
from runtime.datasets.dataset import DataSet, one_per_moment
from runtime.datasets.presets import PRESETS, Preset
from runtime.datasets.qvhighlights import FORMAT
from tests.raising import raises

ACTIVITYNET = {
    "v_a": {"duration": 50, "timestamps": [[0, 5.5], [10, 60]], "sentences": ["A man  sits.", "\nHe stands up."]},
    "v_b": {"duration": 20.5, "timestamps": [[1, 2]], "sentences": [" A dog runs."]},
}
TACOS = {
    "s1-d1.avi": {
        "fps": 29.4,
        "num_frames": 1470,
        "timestamps": [[294, 588], [0, 1500]],
        "sentences": ["He took out a pan", "He cooked."],
    }
}
ROWS: list[dict[str, Any]] = [
    {"qid": 7, "query": "A cat.", "vid": "x_0_150", "duration": 150, "relevant_windows": [[0, 10], [40, 60.5]]},
    {"qid": 9, "query": "A dog.", "vid": "x_0_150", "duration": 150, "relevant_windows": [[20, 30]]},
]


def write_json(directory: Path, **splits: Any) -> Path:
    for split, content in splits.items():
        (directory / f"{split}.json").write_text(json.dumps(content))
    return directory


def write_rows(directory: Path, name: str, rows: list[dict[str, Any]] = ROWS) -> Path:
    (directory / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return directory


def test_activitynet_rows_have_seconds_and_sentence_numbers(tmp_path: Path) -> None:
    data_set = DataSet(write_json(tmp_path, train=ACTIVITYNET, val={"v_b": ACTIVITYNET["v_b"]}))
    first, second, third = data_set.annotations("train")
    assert (first.video, first.start, first.end, first.sentence, first.line) == ("v_a", 0, 5.5, "A man sits.", 1)
    assert (second.sentence, second.line, third.video, third.line) == ("He stands up.", 2, "v_b", 3)
    assert data_set.spans([first, second]).tolist() == [[0, 0.11], [0.2, 1]]
    assert list(data_set.words) == ["a", "dog", "he", "man", "runs", "sits", "stands", "up"]
    assert data_set.vocabulary.encode("A man runs.").tolist() == [1, 4, 5]
    assert (data_set.durations, data_set.num_frames) == ({"v_a": 50, "v_b": 20.5}, {})
    assert (data_set.splits, data_set.preset.title) == (["train", "val"], "ActivityNet Captions")


def test_unknown_split_error_lists_existing_splits(tmp_path: Path) -> None:
    (tmp_path / "rows").mkdir()
    for data_set in (
        DataSet(write_json(tmp_path, train=ACTIVITYNET)),
        DataSet(write_rows(tmp_path / "rows", "val.jsonl")),
    ):
        with raises(AnnotationError, "missing_split", "'test'", data_set.splits[0]):
            data_set.annotations("test")


def test_timestamps_of_tacos_are_frame_numbers(tmp_path: Path) -> None:
    data_set = DataSet(write_json(tmp_path, test=TACOS))
    first, second = data_set.annotations("test")
    assert (first.start, first.end) == pytest.approx((10, 20))
    np.testing.assert_allclose(data_set.spans([first, second]), [[0.2, 0.4], [0, 1]])
    assert data_set.num_frames == {"s1-d1.avi": 1470}
    assert data_set.durations["s1-d1.avi"] == pytest.approx(50)
    assert (data_set.preset.num_segments, data_set.preset.iou_thresholds[0]) == (128, 0.1)


@pytest.mark.parametrize("name", ["val.jsonl", "highlight_val_release.jsonl"])
def test_qvhighlights_query_keeps_id_and_all_moments(tmp_path: Path, name: str) -> None:
    data_set = DataSet(write_rows(tmp_path, name))
    several, one = data_set.annotations("val")
    assert (several.qid, several.several, several.start, several.end) == (7, ((0, 10), (40, 60.5)), 0, 10)
    assert (one.qid, one.several, one.moments) == (9, (), ((20, 30),))
    assert [(a.qid, a.start, a.several) for a in one_per_moment([several, one])] == [
        (7, 0, ()),
        (7, 40, ()),
        (9, 20, ()),
    ]
    truths = data_set.truths([several, one])
    np.testing.assert_allclose(truths[0], [[0, 10 / 150], [40 / 150, 60.5 / 150]])
    np.testing.assert_allclose(truths[1], [[20 / 150, 0.2], [np.nan, np.nan]])
    assert data_set.truths([one]).shape == (1, 2)


def test_only_impossible_moments_of_a_query_are_dropped(tmp_path: Path) -> None:
    rows = [{**ROWS[0], "relevant_windows": [[5, 4], [20, 30], [151, 160]]}, {**ROWS[1], "relevant_windows": [[9, 9]]}]
    data_set = DataSet(write_rows(tmp_path, "train.jsonl", rows))
    (annotation,) = data_set.annotations("train", "drop")
    assert (annotation.qid, annotation.moments, annotation.several) == (7, ((20, 30),), ())
    with raises(AnnotationError, "impossible_moment", tmp_path / "train.jsonl", 1, 4, 5):
        data_set.annotations("train")


def test_common_format_loads_preset_words_and_frame_counts(tmp_path: Path) -> None:
    write_rows(tmp_path, "train.jsonl")
    preset = Preset("Mine", num_segments=16, query_length=(1, 2, 3))
    about = {"format": FORMAT, "preset": preset.to_dict(), "num_frames": {"x_0_150": 4500}, "simulated": True}
    (tmp_path / "dataset.json").write_text(json.dumps(about))
    (tmp_path / "vocabulary.json").write_text('{"cat": 1, "dog": 2}')
    data_set = DataSet(tmp_path)
    assert data_set.preset == preset
    assert (dict(data_set.words), data_set.frames("x_0_150"), data_set.simulated) == ({"cat": 1, "dog": 2}, 4500, True)


def twice(directory: Path) -> None:
    text = json.dumps(ACTIVITYNET)
    (directory / "train.json").write_text(text[:-1] + ", " + text[1:])


REJECTED: dict[str, tuple[Callable[[Path], object], str, list[object]]] = {
    "activitynet and tacos": (
        lambda d: write_json(d, train=ACTIVITYNET, val=TACOS),
        "mixed_formats",
        ["train.json (ActivityNet Captions)", "val.json (TACoS)"],
    ),
    "tacos and rows": (
        lambda d: write_rows(write_json(d, train=TACOS), "val.jsonl"),
        "mixed_formats",
        ["train.json (TACoS)", "val.jsonl (QVHighlights)"],
    ),
    "charades and activitynet": (
        lambda d: ((d / "Charades_sta_train.txt").write_text(""), write_json(d, train=ACTIVITYNET)),
        "mixed_formats",
        ["Charades_sta_train.txt (Charades-STA)", "train.json (ActivityNet Captions)"],
    ),
    "entries of tacos and activitynet": (
        lambda d: write_json(d, train={**TACOS, **ACTIVITYNET}),
        "missing_field",
        ["train.json", "'v_a'", "fps", "num_frames"],
    ),
    "entries of activitynet and tacos": (
        lambda d: write_json(d, train={**ACTIVITYNET, **TACOS}),
        "missing_field",
        ["train.json", "'s1-d1.avi'", "duration"],
    ),
    "entry with a duration and frames": (
        lambda d: write_json(d, train={**ACTIVITYNET, "v_c": {**ACTIVITYNET["v_b"], "fps": 30}}),
        "missing_field",
        ["train.json", "'v_c'", "fps"],
    ),
    "two files of one split": (
        lambda d: write_rows(write_rows(d, "val.jsonl"), "highlight_val_release.jsonl"),
        "duplicate_split",
        ["val.jsonl", "highlight_val_release.jsonl"],
    ),
    "unknown entries": (
        lambda d: write_json(d, train={"v": {"sentences": []}}),
        "unknown_format",
        ["train.json", "duration", "fps", "num_frames"],
    ),
    "a list": (lambda d: write_json(d, train=[1]), "unexpected_structure", ["train.json"]),
    "two videos of one name in one file": (twice, "invalid_json", ["train.json", "'v_a'"]),
    "in two splits": (
        lambda d: write_json(d, train=ACTIVITYNET, val={"v_b": {**ACTIVITYNET["v_b"], "duration": 99}}),
        "ambiguous_video_name",
        ["val.json", "'v_b'", 20.5, 99],
    ),
    "but for a suffix": (
        lambda d: write_json(d, train=TACOS, val={"s1-d1": TACOS["s1-d1.avi"]}),
        "ambiguous_video_name",
        ["val.json", "'s1-d1.avi'", "'s1-d1'"],
    ),
    "in rows": (
        lambda d: write_rows(d, "train.jsonl", [ROWS[0], {**ROWS[1], "duration": 90}]),
        "ambiguous_video_name",
        ["train.jsonl", 2, "'x_0_150'", 150, 90],
    ),
}


@pytest.mark.parametrize("case", REJECTED)
def test_contradictory_files_are_rejected_by_name(tmp_path: Path, case: str) -> None:
    write, code, values = REJECTED[case]
    write(tmp_path)
    with raises(AnnotationError, code, *values):
        DataSet(tmp_path)


@pytest.mark.parametrize("layout", ["activitynet", "tacos", "qvhighlights", "charades"])
def test_video_names_sharing_a_feature_file_are_rejected(tmp_path: Path, layout: str) -> None:
    for names in (("a", "a.avi"), ("a.MP4", "a.webm"), ("a", "a.mkv")):
        if layout == "charades":
            for table in (DURATIONS, FRAMES):
                (tmp_path / table).write_text(json.dumps(dict.fromkeys(names, 48)))
            (tmp_path / WORDS).write_text('{"person": 1}')
        elif layout == "qvhighlights":
            rows = [{**ROWS[0], "vid": name, "qid": number} for number, name in enumerate(names)]
            write_rows(tmp_path, "train.jsonl", rows)
        else:
            entry = ACTIVITYNET["v_a"] if layout == "activitynet" else TACOS["s1-d1.avi"]
            write_json(tmp_path, train={names[0]: entry}, val={names[1]: entry})
        with raises(AnnotationError, "ambiguous_video_name"):
            DataSet(tmp_path)


@pytest.mark.parametrize("name", ["../x", "a/b", "..", " ", "a\nb"])
def test_video_name_outside_feature_directory_is_rejected(tmp_path: Path, name: str) -> None:
    with raises(AnnotationError, "invalid_video_name", repr(name)):
        DataSet(write_json(tmp_path, train={name: ACTIVITYNET["v_a"]}))


@pytest.mark.parametrize(
    ("change", "code", "values"),
    [
        ({"duration": 0}, "invalid_frame_count", [0]),
        ({"duration": "50"}, "invalid_frame_count", ["'50'"]),
        ({"timestamps": [[0, 5.5]]}, "malformed_row", ["timestamps"]),
        ({"timestamps": None}, "malformed_row", ["timestamps"]),
        ({"timestamps": [[0, 5.5], [1]]}, "malformed_row", [2, "[1]"]),
        ({"timestamps": [[0, 5.5], [1, "2"]]}, "malformed_row", [2, "[1, '2']"]),
        ({"sentences": ["A man sits.", " "]}, "malformed_row", [2, "' '"]),
        ({"sentences": ["A man sits.", 3]}, "malformed_row", [2, 3]),
        ({"timestamps": [[0, 5.5], [4, 3]]}, "impossible_moment", [2, 4, 3]),
        ({"timestamps": [[-1, 5.5], [4, 5]]}, "impossible_moment", [1, -1]),
    ],
)
def test_invalid_entry_is_named_by_video_and_sentence(
    tmp_path: Path, change: dict[str, Any], code: str, values: list[object]
) -> None:
    write_json(tmp_path, train={**ACTIVITYNET, "v_a": {**ACTIVITYNET["v_a"], **change}})
    with raises(AnnotationError, code, tmp_path / "train.json", "'v_a'", *values):
        DataSet(tmp_path).annotations("train")


@pytest.mark.parametrize("key", ["duration", "fps", "num_frames", "timestamps", "sentences"])
@pytest.mark.parametrize("number", [10**400, 10**299, -(10**299), True, [1], {}, "1", None])
def test_captions_with_value_of_wrong_type_are_rejected(tmp_path: Path, key: str, number: Any) -> None:
    for entries in (ACTIVITYNET, TACOS):
        name = next(iter(entries))
        for value in (number, [number], [[number, number]]) if key in entries[name] else ():
            write_json(tmp_path, train={**entries, name: {**entries[name], key: value}})
            with pytest.raises(AnnotationError) as caught:
                DataSet(tmp_path).annotations("train")
            assert "\n" not in str(caught.value)
            assert len(str(caught.value)) < 1500


@pytest.mark.parametrize(
    ("change", "code", "values"),
    [
        ("{", "invalid_json", []),
        ("[1]", "malformed_row", ["qid"]),
        ({"qid": None}, "malformed_row", ["qid"]),
        ({"query": 3}, "malformed_row", ["query"]),
        ({"vid": "../x"}, "invalid_video_name", ["'../x'"]),
        ({"vid": "é" * 126}, "invalid_video_name", []),
        ({"relevant_windows": []}, "malformed_row", ["relevant_windows", "[]"]),
        ({"relevant_windows": [[1, 2, 3]]}, "malformed_row", ["relevant_windows", "[[1, 2, 3]]"]),
        ({"qid": 7}, "duplicate_query", ["qid 7"]),
    ],
)
def test_invalid_row_is_named_by_line(tmp_path: Path, change: Any, code: str, values: list[object]) -> None:
    line = change if isinstance(change, str) else json.dumps({**ROWS[1], **change})
    (tmp_path / "train.jsonl").write_text(f"{json.dumps(ROWS[0])}\n{line}\n")
    with raises(AnnotationError, code, tmp_path / "train.jsonl", 2, *values):
        DataSet(tmp_path)


@pytest.mark.parametrize("change", [{"format": "drn-dataset/0"}, {"preset": None}, {"num_frames": {"x": 0}}])
def test_damaged_dataset_json_is_rejected(tmp_path: Path, change: dict[str, Any]) -> None:
    code = "unknown_format" if "format" in change else "damaged_file"
    about = {"format": FORMAT, "preset": PRESETS["tacos"].to_dict()}
    (write_rows(tmp_path, "train.jsonl") / "dataset.json").write_text(json.dumps({**about, **change}))
    with raises(AnnotationError, code, tmp_path / "dataset.json"):
        DataSet(tmp_path)


@pytest.mark.parametrize("layout", ["rows", "activitynet", "tacos"])
def test_files_written_by_other_programs_are_read(tmp_path: Path, layout: str) -> None:
    odd = "a person\u2028opens\u0085the door."
    if layout == "rows":
        write_rows(tmp_path, "train.jsonl", [{**ROWS[0], "query": odd}, *ROWS[1:]])
        (tmp_path / "vocabulary.json").write_text('{"a": 1}')
    else:
        name, entry = next(iter((ACTIVITYNET if layout == "activitynet" else TACOS).items()))
        write_json(tmp_path, train={name: {**entry, "sentences": [odd] * len(entry["timestamps"])}})
    for path in tmp_path.iterdir():
        # A byte order mark, Windows line ends and blank last lines.
        text = path.read_text(encoding="utf-8").replace("\n", "\r\n")
        path.write_bytes(f"\ufeff{text}\r\n\r\n".encode())
    annotations = DataSet(tmp_path).annotations("train")
    assert (len(annotations), annotations[0].sentence) == (2, "a person opens the door.")
    assert layout != "rows" or DataSet(tmp_path).words == {"a": 1}


def test_published_qvhighlights_have_several_moments(real_data: Path) -> None:
    rows = DataSet(real_data / "qvhighlights").annotations("val")
    assert len({row.video for row in rows}) == 1519
    assert len(one_per_moment(rows)) / len(rows) == pytest.approx(1.8, abs=0.05)


def test_split_with_hidden_moments_is_not_scored(tmp_path: Path) -> None:
    write_rows(tmp_path, "train.jsonl")
    secret = {key: value for key, value in ROWS[0].items() if key != "relevant_windows"}
    write_rows(tmp_path, "highlight_test_release.jsonl", [{**secret, "vid": "y_0_150"}])
    data_set = DataSet(tmp_path)
    assert data_set.videos("test") == {"y_0_150"}
    assert len(data_set.annotations("train")) == 2
    with raises(AnnotationError, "unpublished_moments", tmp_path / "highlight_test_release.jsonl", 1):
        data_set.annotations("test")
