"""Test `train.simulate`: layout, determinism, dependencies of the features, and invalid input."""

from __future__ import annotations

import json
import os
import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from runtime.core.errors import AnnotationError, FeatureError, OutputError
from runtime.core.tokenizer import tokenize
from runtime.datasets.dataset import FEATURE_DIRECTORY, DataSet
from tests.raising import quotes, raises
from train.simulate import simulate
from train.simulation.charades_actions import SOURCE_FILES
from train.simulation.feature_simulator import Simulator
from train.simulation.scenario import STATEMENT, Scenario

Usage = namedtuple("Usage", "total used free")

CSV_HEAD = "id,subject,scene,quality,relevance,verified,script,objects,descriptions,actions,length\n"
CSV_ROWS = {
    "train": [
        'AAAAA,S1,Kitchen,5,6,Yes,"A, script.",cup;table,x,c010 1.00 6.00;c011 4.00 12.50;c150 9.00 8.00,14.0\n',
        "BBBBB,S2,Garage,5,6,Yes,s,box,x,c040 0.00 5.00,20.0\n",
        "EEEEE,S5,Garage,5,6,Yes,never annotated,box,x,c041 0.00 5.00,20.0\n",
    ],
    "test": ["CCCCC,S3,Kitchen,5,6,Yes,s,,x,,16.0\n", "DDDDD,S4,Other,5,6,Yes,s,cup,x,c011 2.00 9.00,18.0\n"],
}
LINES = {
    "train": [
        "AAAAA 1.0 6.0##person takes a cup.",
        "AAAAA 4.0 12.5##person's cup.",
        "BBBBB 0.0 5.0##person takes a box.",
    ],
    "test": ["CCCCC 1.0 5.0##person takes a cup.", "DDDDD 2.0 9.0##person takes a cup."],
}
FRAMES = {"AAAAA": 420, "BBBBB": 500, "CCCCC": 10, "DDDDD": 432, "EEEEE": 600}
DURATIONS = {"AAAAA": 14.0, "BBBBB": 20.0, "CCCCC": 16.0, "DDDDD": 18.0, "EEEEE": 20.0}


@pytest.fixture
def annotated(tmp_path: Path) -> Path:
    """Write annotations of four videos in the published layout, one of them shorter than a clip."""
    directory = tmp_path / "annotated"
    directory.mkdir()
    for split in ("train", "test"):
        (directory / f"Charades_sta_{split}.txt").write_text("\n".join(LINES[split]) + "\n")
        (directory / f"Charades_v1_{split}.csv").write_text(CSV_HEAD + "".join(CSV_ROWS[split]))
    words = {word: number for number, word in enumerate(["person", "takes", "a", "cup", "box", "'s"], start=1)}
    tables = {"word2id": words, "fps_dict": dict.fromkeys(FRAMES, "30"), "frames_info": FRAMES, "duration": DURATIONS}
    for name, table in tables.items():
        (directory / f"Charades_{name}.json").write_text(json.dumps(table))
    return directory


def contents(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def features(directory: Path) -> dict[str, np.ndarray]:
    return {path.stem: np.load(path) for path in (directory / FEATURE_DIRECTORY).glob("*.npy")}


def test_simulated_data_set_is_complete_and_consistent(tmp_path: Path) -> None:
    data = DataSet(simulate(tmp_path / "data", feature_dim=16, videos=20, seed=3))
    names = {split: {one.video for one in data.annotations(split)} for split in ("train", "test")}
    assert len(names["train"]) == 16
    assert len(names["test"]) == 4
    assert not names["train"] & names["test"]
    # Word ids follow the first occurrence in the training split.
    assert sorted(data.words.values()) == list(range(1, len(data.words) + 1))
    words = dict.fromkeys(word for one in data.annotations("train") for word in tokenize(one.sentence))
    assert list(data.words)[: len(words)] == list(words)
    rates = json.loads((data.root / "Charades_fps_dict.json").read_text())
    for split in ("train", "test"):
        for one in data.annotations(split):
            assert 0 <= one.start < one.end <= data.durations[one.video]
            assert set(tokenize(one.sentence)) <= set(data.words)
    for name in names["train"] | names["test"]:
        video = data.video(name)
        assert video.features.shape == ((video.num_frames - 16) // 8 + 1, 16)
        assert isinstance(rates[name], str)
        assert video.num_frames == pytest.approx(float(rates[name]) * video.duration, abs=1)
    assert data.simulated
    assert json.loads((data.root / "simulated.json").read_text())["statement"] == STATEMENT


def test_annotation_files_are_copied_unchanged(annotated: Path, tmp_path: Path) -> None:
    directory = simulate(tmp_path / "data", annotations=annotated, feature_dim=8)
    for path in directory.glob("Charades_*"):
        assert path.read_bytes() == (annotated / path.name).read_bytes()
    assert {name: rows.shape for name, rows in features(directory).items()} == {
        "AAAAA": (51, 8),
        "BBBBB": (61, 8),
        "CCCCC": (1, 8),
        "DDDDD": (53, 8),
    }
    assert json.loads((directory / "simulated.json").read_text())["contents"]["moments_equal_to_an_action"] == {
        "train": 3,
        "test": 1,
    }


def test_pt_files_equal_npy_files(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    npy = simulate(tmp_path / "npy", feature_dim=8, videos=2)
    pt = simulate(tmp_path / "pt", feature_dim=8, videos=2, file_format="pt")
    for name, rows in features(npy).items():
        tensor = torch.load(pt / FEATURE_DIRECTORY / f"{name}.pt", weights_only=True)
        np.testing.assert_array_equal(tensor.numpy(), rows)


def test_same_arguments_write_identical_files(annotated: Path, tmp_path: Path) -> None:
    for source in (None, annotated):
        first = simulate(tmp_path / f"first{source is None}", annotations=source, feature_dim=8, videos=3, seed=5)
        second = simulate(tmp_path / f"second{source is None}", annotations=source, feature_dim=8, videos=3, seed=5)
        assert contents(first) == contents(second)
    one, other = (features(simulate(tmp_path / f"{seed}", feature_dim=8, videos=2, seed=seed)) for seed in (0, 1))
    assert not np.array_equal(one["SIM00000"], other["SIM00000"])


def test_subset_keeps_features_and_annotations_of_its_videos(annotated: Path, tmp_path: Path) -> None:
    for source, few, many in ((None, 3, 9), (annotated, 1, None)):
        name = "made up" if source is None else "annotated"
        small = features(simulate(tmp_path / f"{name} few", annotations=source, feature_dim=8, videos=few))
        large = features(simulate(tmp_path / f"{name} all", annotations=source, feature_dim=8, videos=many))
        assert set(small) < set(large)
        for video, rows in small.items():
            np.testing.assert_array_equal(rows, large[video])
    for split in ("train", "test"):
        lines = (tmp_path / "annotated few" / f"Charades_sta_{split}.txt").read_text().splitlines()
        (video,) = {line.split()[0] for line in lines}
        assert video in small
        assert lines == [line for line in LINES[split] if line.split()[0] == video]


def test_annotation_text_does_not_change_features(annotated: Path, tmp_path: Path) -> None:
    before = features(simulate(tmp_path / "before", annotations=annotated, feature_dim=8))
    for split in ("train", "test"):
        path = annotated / f"Charades_sta_{split}.txt"
        path.write_text("".join(f"{line.split('##')[0]}##takes a box.\n" for line in LINES[split]))
        path = annotated / f"Charades_v1_{split}.csv"
        path.write_text(path.read_text().replace(",x,", ",another description,").replace(",s,", ",another script,"))
    after = features(simulate(tmp_path / "after", annotations=annotated, feature_dim=8))
    for video, rows in before.items():
        np.testing.assert_array_equal(rows, after[video])


def test_features_are_80_percent_zero_and_heavy_tailed(tmp_path: Path) -> None:
    directory = simulate(tmp_path / "data", feature_dim=512, videos=80)
    values = np.concatenate(list(features(directory).values())).astype(np.float32)
    assert (values == 0).mean() == pytest.approx(0.8, abs=0.02)
    assert np.isfinite(values).all()
    assert values.min() == 0
    kurtosis = ((values - values.mean()) ** 4).mean() / values.var() ** 2
    assert kurtosis > 10, "a normal distribution has 3"


def test_interrupted_simulation_is_incomplete_and_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    complete, cut = (tmp_path / name for name in ("complete", "cut"))
    simulate(complete, feature_dim=8, videos=6)
    simulated, original = [], Simulator.features

    def interrupted(self: Simulator, scenario: Scenario) -> np.ndarray:
        simulated.append(scenario.name)
        if len(simulated) == 4:
            raise KeyboardInterrupt
        return original(self, scenario)

    monkeypatch.setattr(Simulator, "features", interrupted)
    with pytest.raises(KeyboardInterrupt):
        simulate(cut, feature_dim=8, videos=6)
    assert not (cut / "simulated.json").exists()
    with raises(AnnotationError, "data_set_missing", cut):
        DataSet(cut)
    left = cut / FEATURE_DIRECTORY / ".drn-01234567-abcdefgh-SIM00004.npy"
    left.write_bytes(b"half")
    os.utime(left, (0, 0))

    simulate(cut, feature_dim=8, videos=6)
    assert simulated[4:] == ["SIM00003", "SIM00004", "SIM00005"]
    assert contents(cut) == contents(complete)
    times = {path: path.stat().st_mtime_ns for path in (cut / FEATURE_DIRECTORY).iterdir()}
    simulate(cut, feature_dim=8, videos=6)
    assert times == {path: path.stat().st_mtime_ns for path in (cut / FEATURE_DIRECTORY).iterdir()}


@pytest.mark.parametrize("change", [{"seed": 1}, {"feature_dim": 9}, {"difficulty": "hard"}, {"videos": 4}])
def test_simulation_of_other_parameters_is_rejected_unchanged(tmp_path: Path, change: dict[str, int]) -> None:
    directory = simulate(tmp_path / "data", feature_dim=8, videos=3)
    before = contents(directory)
    with raises(OutputError, "settings_mismatch", directory, *change):
        simulate(directory, **{"feature_dim": 8, "videos": 3, **change})
    assert contents(directory) == before


def test_unusable_output_is_rejected_unchanged(annotated: Path, tmp_path: Path) -> None:
    before = contents(annotated)
    with raises(OutputError, "output_not_empty", annotated):
        simulate(annotated, annotations=annotated, feature_dim=8)
    assert contents(annotated) == before
    (tmp_path / "file").write_text("x")
    with raises(OutputError, "output_is_file", tmp_path / "file", "--output"):
        simulate(tmp_path / "file", feature_dim=8, videos=2)
    with raises(OutputError, "unwritable_output", tmp_path / "file" / "below"):
        simulate(tmp_path / "file" / "below", feature_dim=8, videos=2)


def test_insufficient_disk_space_is_rejected_before_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**6, 10**6, 100))
    with raises(OutputError, "disk_full", tmp_path / "data", "--videos", "--feature-dim"):
        simulate(tmp_path / "data", feature_dim=8, videos=2)
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize(
    "arguments",
    [{"feature_dim": 0}, {"videos": 0}, {"videos": 1}, {"seed": -1}, {"difficulty": "nightmare"}, {"dtype": "int8"}],
)
def test_invalid_simulation_options_are_rejected(tmp_path: Path, arguments: dict[str, int]) -> None:
    ((name, value),) = arguments.items()
    named = () if name == "dtype" else (f"--{name.replace('_', '-')}",)
    with raises(FeatureError, "invalid_option", *named, value):
        simulate(tmp_path / "data", **arguments)
    assert not (tmp_path / "data").exists()


def test_missing_annotation_file_is_named(annotated: Path, tmp_path: Path) -> None:
    for name in SOURCE_FILES:
        content = (annotated / name).read_bytes()
        (annotated / name).unlink()
        with raises(AnnotationError, "missing_file", annotated, name):
            simulate(tmp_path / "data", annotations=annotated, feature_dim=8)
        assert not (tmp_path / "data").exists()
        (annotated / name).write_bytes(content)


@pytest.mark.parametrize(
    ("name", "old", "new", "code", "values"),
    [
        ("Charades_v1_train.csv", "c040 0.00 5.00", "c040 0.00 five", "malformed_row", ("line 3", "'c040 0.00 five'")),
        ("Charades_v1_train.csv", "c040 0.00 5.00", "door 0.00 5.00", "malformed_row", ("line 3", "'door 0.00 5.00'")),
        ("Charades_v1_train.csv", ",c040 0.00 5.00,20.0", "", "malformed_row", ("line 3", 11)),
        ("Charades_v1_test.csv", "actions", "deeds", "missing_columns", ("line 1", "actions")),
        ("Charades_v1_test.csv", "DDDDD", "FFFFF", "unlisted_video", ("DDDDD",)),
        ("Charades_sta_train.txt", "AAAAA 4.0", "AAAAA", "malformed_row", ("line 2",)),
        ("Charades_sta_test.txt", "CCCCC", "../CCCCC", "unlisted_video", ("line 1", "../CCCCC")),
        ("Charades_frames_info.json", '"BBBBB"', '"FFFFF"', "unlisted_video", ("BBBBB", "Charades_frames_info.json")),
        ("Charades_frames_info.json", "500", "0.5", "unexpected_structure", ("BBBBB", 0.5)),
        ("Charades_duration.json", "{", "", "invalid_json", ()),
    ],
)
def test_malformed_annotations_are_named(
    annotated: Path, tmp_path: Path, name: str, old: str, new: str, code: str, values: tuple[object, ...]
) -> None:
    text = (annotated / name).read_text()
    assert old in text
    (annotated / name).write_text(text.replace(old, new))
    # This error names the video, which may have no line of its own in that file.
    files = () if code == "unlisted_video" else (annotated / name,)
    with raises(AnnotationError, code, *files, *values):
        simulate(tmp_path / "data", annotations=annotated, feature_dim=8)
    assert not (tmp_path / "data").exists()


def test_simulate_command_prints_statement(tmp_path: Path, run_command: Any, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "drn")
    done = run_command(simulate, "--output", tmp_path / "data", "--feature-dim", "8", "--videos", "5")
    assert STATEMENT in done.out
    assert "Next:" in caplog.text
    failed = run_command(simulate, "--output", tmp_path / "data", "--feature-dim", "0", code=2)
    assert failed.out == ""
    assert quotes(failed.err, "--feature-dim", 0)
