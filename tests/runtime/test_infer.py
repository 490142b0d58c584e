"""Test `python -m runtime.infer`: moments of files, and invalid inputs."""

from __future__ import annotations

import errno
import json
import logging
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from runtime import Grounder
from runtime.artifacts.manifest import METADATA_KEY, Features, Manifest
from runtime.datasets.dataset import DataSet
from runtime.infer import infer
from tests.raising import check_error, records

ROOT = Path(__file__).parents[2]
FEATURES = "C3D_unit16_overlap0.5_merged"


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    """A feature file for `tiny_model`."""
    path = tmp_path / "hall.npy"
    np.save(path, np.random.default_rng(0).random((30, 16)).astype(np.float32))
    return path


@pytest.fixture
def of_clip(tiny_model: Path, clip: Path) -> tuple[Any, ...]:
    return ("--model", tiny_model, "--features", clip, "--duration", 20)


def test_json_output_equals_grounder_moments(
    of_clip: tuple[Any, ...], tiny_model: Path, golden: Path, run_command: Any
) -> None:
    data = ("--data", golden / "mini", "--video", "AAAA1")
    queries = ("--query", "person opens the door", "dog sits")
    outcome = run_command(infer, "--model", tiny_model, *data, *queries, "--format", "json", "--top-k", 3)
    answers = json.loads(outcome.out)
    assert [(answer["query"], answer["video"]) for answer in answers] == [
        ("person opens the door", "AAAA1"),
        ("dog sits", "AAAA1"),
    ]
    grounder, video = Grounder.load(tiny_model), DataSet(golden / "mini").video("AAAA1")
    for answer in answers:
        expected = [vars(moment) for moment in grounder.ground(video, answer["query"], top_k=3)]
        assert answer["moments"] == expected
        assert len(expected) == 3
        assert all(0 <= moment["start"] <= moment["end"] <= 30 for moment in expected)


def test_feature_file_gives_answers(of_clip: tuple[Any, ...], tmp_path: Path, run_command: Any) -> None:
    pytest.importorskip("matplotlib")
    outcome = run_command(infer, *of_clip, "--query", "person opens the door", "--plot", tmp_path / "plot.png")
    assert "hall (0:20.0)" in outcome.out
    assert "█" in outcome.out
    assert (tmp_path / "plot.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_all_truths_are_shown_for_any_query_spacing(
    tiny_model: Path, tmp_path: Path, run_command: Any, golden: Path
) -> None:
    data = shutil.copytree(golden / "mini", tmp_path / "data")
    with open(data / "Charades_sta_train.txt", "a") as stream:
        stream.writelines(f"AAAA1 {times}##person closes the door.\n" for times in ("1.0 4.5", "6.0 9.5", "1.0 4.5"))
    arguments = ("--model", tiny_model, "--data", data, "--video", "AAAA1", "--query")
    shown = run_command(infer, *arguments, "  person closes  the door. ").out
    # The first ends with the video.
    assert [line[2:17] for line in shown.splitlines() if "truth" in line] == [
        "0:20.0 - 0:30.0", "0:01.0 - 0:04.5", "0:06.0 - 0:09.5",
    ]  # fmt: skip
    assert "truth" not in run_command(infer, *arguments, "dog sits").out


def test_video_file_of_other_length_than_features_is_rejected(
    of_clip: tuple[Any, ...], tmp_path: Path, run_command: Any, refused: Any
) -> None:
    films = pytest.importorskip("tests.films")
    pytest.importorskip("matplotlib")
    line = (*of_clip, "--query", "dog sits", "--plot", tmp_path / "plot.png", "--footage")
    short = films.film(tmp_path / "short.mp4", 100)
    check_error(refused(infer, *line, short), "footage_mismatch", short, "4.0", "hall", "20.0")
    check_error(refused(infer, *line, tmp_path / "gone.mp4"), "missing_file", tmp_path / "gone.mp4")
    assert not (tmp_path / "plot.png").exists()
    long = films.film(tmp_path / "long.mp4", 100, rate=5)
    run_command(infer, *line, long)
    check_error(refused(infer, *line[:-2], long, "--footage", long), "not_a_report", long)


def test_plot_is_checked_before_opening_model(
    of_clip: tuple[Any, ...], tmp_path: Path, refused: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Grounder, "load", lambda *_: pytest.fail("a model was opened"))
    for name in ("plot.jpg", "plot"):
        error = refused(infer, *of_clip, "--query", "dog sits", "--plot", tmp_path / name)
        check_error(error, "wrong_suffix", tmp_path / name, ".png")
        assert not (tmp_path / name).exists()
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    error = refused(infer, *of_clip, "--query", "dog sits", "--plot", tmp_path / "plot.png")
    check_error(error, "missing_library", "pip install '.[plot]'")


class Attack:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return exec, (f"open({str(self.path)!r}, 'w')",)


def test_bad_feature_file_is_one_error_without_output(tiny_model: Path, tmp_path: Path, refused: Any) -> None:
    np.save(tmp_path / "wide.npy", np.ones((9, 17), np.float32))
    np.save(tmp_path / "objects.npy", np.array([Attack(tmp_path / "ran")], object))
    (tmp_path / "attack.pt").write_bytes(pickle.dumps(Attack(tmp_path / "ran")))
    (tmp_path / "film.mp4").write_bytes(b"\0\0")
    before = sorted(tmp_path.iterdir())
    for name, code, values in (
        ("wide.npy", "feature_width_mismatch", [17, "C3D", 16]),
        ("objects.npy", "damaged_file", []),
        ("attack.pt", "code_in_file", []),
        ("film.mp4", "wrong_suffix", []),
        ("gone.npy", "missing_file", []),
    ):
        arguments = ("--duration", 20, "--query", "dog sits", "--plot", tmp_path / "plot.png")
        error = refused(infer, "--model", tiny_model, "--features", tmp_path / name, *arguments)
        check_error(error, code, *(values or [name]))
    assert sorted(tmp_path.iterdir()) == before


def test_frame_count_is_derived(write_model: Callable[..., Path], clip: Path, tmp_path: Path, run_command: Any) -> None:
    model = write_model(tmp_path / "i3d.onnx", features=Features("I3D", 16, window=64, stride=4))
    arguments = ("--model", model, "--features", clip, "--duration", 20, "--query", "dog sits", "--format", "json")
    # 30 clips of 64 frames, one clip every 4 frames.
    assert run_command(infer, *arguments).out == run_command(infer, *arguments, "--num-frames", 180).out
    assert run_command(infer, *arguments).out != run_command(infer, *arguments, "--num-frames", 200).out


def test_unusual_frame_count_gives_warning(
    of_clip: tuple[Any, ...], run_command: Any, caplog: pytest.LogCaptureFixture
) -> None:
    arguments = (*of_clip, "--query", "dog sits", "--num-frames")
    run_command(infer, *arguments, 248)
    assert not [record for record in caplog.records if record.levelname == "WARNING"]
    run_command(infer, *arguments, 200)
    assert len(records(caplog, logging.WARNING, "--num-frames")) == 1


def test_infer_unquoted_query_gives_warning_with_quotes(
    of_clip: tuple[Any, ...], run_command: Any, caplog: pytest.LogCaptureFixture
) -> None:
    run_command(infer, *of_clip, "--query", "person", "opens", "the", "door")
    assert records(caplog, logging.WARNING, '--query "person opens the door"')
    caplog.clear()
    run_command(infer, *of_clip, "--query", "person")
    run_command(infer, *of_clip, "--query", "person", "opens the door")
    assert "--query" not in "".join(record.message for record in caplog.records if record.levelname == "WARNING")


def test_missing_or_conflicting_options_are_rejected(tiny_model: Path, clip: Path, golden: Path, refused: Any) -> None:
    model, query, mini = ("--model", tiny_model), ("--query", "dog sits"), golden / "mini"
    of_one, gone = ("--features", clip, "--duration", 1), clip.parent / "gone"
    of_clip = ("--features", clip, "--duration", 20)
    wrong: list[tuple[tuple[object, ...], str, list[object]]] = [
        ((), "missing_option", ["--features FILE", "--data DIR", "--video NAME"]),
        (("--features", clip, "--data", mini, "--duration", 1), "missing_option", ["--features FILE", "--data DIR"]),
        (("--data", mini), "missing_option", ["--features FILE", "--data DIR", "--video NAME"]),
        (("--features", clip), "missing_option", ["--features", "--duration"]),
        (("--features", clip, "--duration", 0), "invalid_frame_count", ["hall", 0]),
        ((*of_one, "--num-frames", 1), "invalid_frame_count", ["hall", 1]),
        ((*of_one, "--top-k", 0), "invalid_option", ["--top-k", 0]),
        (("--data", mini, "--video", "ZZZZZ"), "unlisted_video", ["'ZZZZZ'"]),
        (("--data", gone, "--video", "AAAA1"), "missing_file", [gone]),
        (("--data", mini, "--video", "AAAA1", "--duration", 1), "conflicting_options", ["--data", "--duration"]),
        ((*of_clip, "--num-frames", 100), "clip_timing_mismatch", ["--num-frames", 100]),
        ((*of_clip, "--num-frames", 10000), "frame_rate_out_of_range", [10000]),
        ((*of_clip, "--overlap", 10), "missing_option", ["--overlap", "--window"]),
        ((*of_clip, "--window", 0, "--overlap", 5), "conflicting_options", ["--window", 0, "--overlap", 5]),
        ((*of_clip, "--window", 40, "--overlap", 21), "invalid_setting", ["40", "21"]),
        ((*of_clip, "--window", -1), "invalid_setting", ["-1"]),
    ]
    for arguments, code, values in wrong:
        check_error(refused(infer, *model, *query, *arguments), code, *values)
    error = refused(infer, *model, *of_clip, "--query", "dog sits", "the doar")
    check_error(error, "unknown_content_words", "'doar'", "'door'")


def test_infer_rejects_files_that_are_not_models(
    write_graph: Callable[..., Path], tiny_manifest: Manifest, clip: Path, tmp_path: Path, refused: Any
) -> None:
    about = {METADATA_KEY: tiny_manifest.to_json()}
    files = {
        tmp_path / "gone.onnx": "missing_file",
        tmp_path / "model.txt": "wrong_suffix",
        tmp_path / "text.onnx": "not_onnx",
        # Its metadata file is missing.
        tmp_path / "drn.engine": "missing_file",
        write_graph(tmp_path / "bare.onnx", {}): "missing_manifest",
        write_graph(tmp_path / "part.onnx", about, ("matching_logits", "boundary_distances")): "unexpected_tensors",
    }
    for name in ("model.txt", "text.onnx", "drn.engine"):
        (tmp_path / name).write_bytes(b"a text")
    arguments = ("--features", clip, "--duration", 20, "--query", "dog sits")
    for path, code in files.items():
        check_error(refused(infer, "--model", path, *arguments), code, path.name)
    narrow = write_graph(tmp_path / "narrow.onnx", about, dim=12)
    check_error(refused(infer, "--model", narrow, *arguments), "shape_mismatch")


def test_plot_on_full_disk_fails_without_file(
    of_clip: tuple[Any, ...], tmp_path: Path, run_command: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "replace", full)
    outcome = run_command(infer, *of_clip, "--query", "dog sits", "--plot", tmp_path / "plot.png", code=2)
    check_error(outcome.error, "disk_full", tmp_path / "plot.png")
    assert [path.name for path in tmp_path.iterdir()] == ["hall.npy"]


def test_shell_stdout_contains_only_results(of_clip: tuple[Any, ...]) -> None:
    words = map(str, (*of_clip, "--query", "person zorbs", "--format", "json"))
    command = [sys.executable, "-m", "runtime.infer", *words]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0
    assert len(json.loads(result.stdout)[0]["moments"]) == 5
    assert "'zorbs'" in result.stderr
    assert "Next:  python -m runtime.evaluate" in result.stderr


def test_long_video_uses_and_reports_requested_windows(
    tiny_model: Path, tmp_path: Path, run_command: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "drn")
    np.save(tmp_path / "hall.npy", np.random.default_rng(0).random((900, 16)).astype(np.float32))
    of_hall = ("--model", tiny_model, "--features", tmp_path / "hall.npy", "--duration", 300, "--format", "json")
    arguments = (*of_hall, "--query", "person opens the door")
    complete = run_command(infer, *arguments)
    assert not records(caplog, logging.INFO, "300.0")
    cut = run_command(infer, *arguments, "--window", 43, "--overlap", 14.5)
    assert len(records(caplog, logging.INFO, "hall", "300.0", 11, "43.0", "15.0")) == 1
    (answer,) = json.loads(cut.out)
    assert set(answer) == {"query", "video", "moments"}
    assert all(moment["end"] - moment["start"] <= 43.1 for moment in answer["moments"])
    assert run_command(infer, *arguments, "--window", 0).out == complete.out
    run_command(infer, *arguments, "--window", 43)
    assert len(records(caplog, logging.INFO, "hall", "22.0")) == 1
