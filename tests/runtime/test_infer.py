"""Test `python -m runtime.infer`: moments of files, and invalid inputs."""

from __future__ import annotations

import dataclasses
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
from runtime.core.errors import GroundingError
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
    of_clip: tuple[Any, ...], tiny_model: Path, golden: Path, run_command: Callable[..., Any]
) -> None:
    data = ("--data", golden / "mini", "--video", "AAAA1")
    queries = ("--query", "person opens the door", "dog sits")
    outcome = run_command(infer, "--model", tiny_model, *data, *queries, "--format", "json", "--top-k", 3)
    assert outcome.code == 0
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


def test_infer_accepts_feature_file_with_duration(of_clip: tuple[Any, ...], run_command: Callable[..., Any]) -> None:
    outcome = run_command(infer, *of_clip, "--query", "person opens the door")
    assert outcome.code == 0
    assert "hall (0:20.0)" in outcome.out
    assert "█" in outcome.out


def test_ground_truth_is_shown_clipped_to_the_video(
    tiny_model: Path, golden: Path, run_command: Callable[..., Any]
) -> None:
    arguments = ("--model", tiny_model, "--data", golden / "mini", "--video", "AAAA1")
    outcome = run_command(infer, *arguments, "--query", "person closes the door.")
    assert "0:20.0 - 0:30.0  truth" in outcome.out
    assert "truth" not in run_command(infer, *arguments, "--query", "dog sits").out


def test_all_moments_are_shown_for_any_query_spacing(
    tiny_model: Path, tmp_path: Path, run_command: Callable[..., Any], golden: Path
) -> None:
    data = shutil.copytree(golden / "mini", tmp_path / "data")
    with open(data / "Charades_sta_train.txt", "a") as stream:
        stream.writelines(f"AAAA1 {times}##person closes the door.\n" for times in ("1.0 4.5", "6.0 9.5", "1.0 4.5"))
    query = ("--query", "  person closes  the door. ")
    shown = run_command(infer, "--model", tiny_model, "--data", data, "--video", "AAAA1", *query).out
    assert [line[2:17] for line in shown.splitlines() if "truth" in line] == [
        "0:20.0 - 0:30.0", "0:01.0 - 0:04.5", "0:06.0 - 0:09.5",
    ]  # fmt: skip


def test_infer_writes_a_png_plot(of_clip: tuple[Any, ...], tmp_path: Path, run_command: Callable[..., Any]) -> None:
    pytest.importorskip("matplotlib")
    assert run_command(infer, *of_clip, "--query", "dog sits", "--plot", tmp_path / "plot.png").code == 0
    assert (tmp_path / "plot.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_video_file_of_other_length_than_features_is_rejected(
    of_clip: tuple[Any, ...], tmp_path: Path, run_command: Callable[..., Any], refused: Callable[..., GroundingError]
) -> None:
    films = pytest.importorskip("tests.films")
    pytest.importorskip("matplotlib")
    line = (*of_clip, "--query", "dog sits", "--plot", tmp_path / "plot.png", "--footage")
    short = films.film(tmp_path / "short.mp4", 100)
    check_error(refused(infer, *line, short), "footage_mismatch", short, "4.0", "hall", "20.0")
    check_error(refused(infer, *line, tmp_path / "gone.mp4"), "missing_file", tmp_path / "gone.mp4")
    assert not (tmp_path / "plot.png").exists()
    long = films.film(tmp_path / "long.mp4", 100, rate=5)
    assert run_command(infer, *line, long).code == 0
    check_error(refused(infer, *line[:-2], long, "--footage", long), "not_a_report", long)


def test_plot_is_checked_before_opening_model(
    of_clip: tuple[Any, ...], tmp_path: Path, refused: Callable[..., GroundingError], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Grounder, "load", lambda *_: pytest.fail("a model was opened"))
    for name in ("plot.jpg", "plot"):
        error = refused(infer, *of_clip, "--query", "dog sits", "--plot", tmp_path / name)
        check_error(error, "wrong_suffix", tmp_path / name, ".png")
        assert not (tmp_path / name).exists()
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    error = refused(infer, *of_clip, "--query", "dog sits", "--plot", tmp_path / "plot.png")
    check_error(error, "missing_library", "pip install '.[plot]'")


def test_unknown_word_is_warned_of_and_query_answered(
    of_clip: tuple[Any, ...], run_command: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    outcome = run_command(infer, *of_clip, "--query", "person zorbs the door", "--format", "json")
    assert outcome.code == 0
    assert json.loads(outcome.out)[0]["moments"]
    assert records(caplog, logging.WARNING, "'zorbs'")


class Attack:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return exec, (f"open({str(self.path)!r}, 'w')",)


def bad_features(directory: Path) -> dict[str, tuple[Path, str, list[object]]]:
    """Invalid feature files, each with the code of its error and values that the message quotes."""
    arrays: dict[str, tuple[np.ndarray, str, list[object]]] = {
        "wide": (np.ones((9, 17), np.float32), "feature_width_mismatch", [17, "C3D", 16]),
        "holes": (np.full((9, 16), np.nan, np.float32), "non_finite_features", [144]),
        "none": (np.ones((0, 16), np.float32), "no_clips", [(0, 16)]),
        "flat": (np.ones(16, np.float32), "wrong_array", [(16,)]),
        "counts": (np.ones((9, 16), np.int32), "wrong_array", ["int32"]),
        "objects": (np.array([Attack(directory / "ran")], object), "damaged_file", ["objects.npy"]),
    }
    files = {}
    for name, (array, code, values) in arrays.items():
        np.save(directory / f"{name}.npy", array)
        files[name] = directory / f"{name}.npy", code, values
    complete = (directory / "holes.npy").read_bytes()
    others = {
        "gone.npy": (None, "missing_file"),
        "empty.npy": (b"", "empty_file"),
        "empty.pt": (b"", "empty_file"),
        "cut.npy": (complete[:-100], "damaged_file"),
        "text.pt": (b"a text", "not_a_torch_file"),
        "attack.pt": (pickle.dumps(Attack(directory / "ran")), "code_in_file"),
        "film.mp4": (b"\0\0", "wrong_suffix"),
    }
    for name, (data, code) in others.items():
        if data is not None:
            (directory / name).write_bytes(data)
        files[name] = directory / name, code, [directory / name]
    return files


def test_bad_feature_file_is_one_error_without_output(
    tiny_model: Path, tmp_path: Path, refused: Callable[..., GroundingError]
) -> None:
    files = bad_features(tmp_path)
    before = sorted(path.name for path in tmp_path.iterdir())
    for name, (path, code, values) in files.items():
        arguments = ("--duration", 20, "--query", "dog sits", "--plot", tmp_path / "plot.png")
        error = refused(infer, "--model", tiny_model, "--features", path, *arguments)
        check_error(error, code, *values)
        assert name in str(error)
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_frame_count_is_derived_by_clip_timing_of_model(
    write_graph: Callable[..., Path],
    tiny_manifest: Manifest,
    clip: Path,
    tmp_path: Path,
    run_command: Callable[..., Any],
) -> None:
    manifest = dataclasses.replace(tiny_manifest, features=Features("I3D", 16, window=64, stride=4))
    model = write_graph(tmp_path / "i3d.onnx", {METADATA_KEY: manifest.to_json()})
    arguments = ("--model", model, "--features", clip, "--duration", 20, "--query", "dog sits", "--format", "json")
    # 30 clips of 64 frames, one clip every 4 frames.
    assert run_command(infer, *arguments).out == run_command(infer, *arguments, "--num-frames", 180).out
    assert run_command(infer, *arguments).out != run_command(infer, *arguments, "--num-frames", 248).out


def test_unusual_frame_count_gives_warning(
    of_clip: tuple[Any, ...], run_command: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    arguments = (*of_clip, "--query", "dog sits", "--num-frames")
    run_command(infer, *arguments, 248)
    assert not [record for record in caplog.records if record.levelname == "WARNING"]
    run_command(infer, *arguments, 200)
    assert len(records(caplog, logging.WARNING, "--num-frames")) == 1


@pytest.mark.parametrize(
    ("query", "code", "values"),
    [
        ("", "no_words", ["''"]),
        (" . ", "no_words", ["' . '"]),
        ("zorbs frimly", "unknown_content_words", ["'zorbs frimly'"]),
        ("the doar", "unknown_content_words", ["'doar'", "'door'"]),
        ("dog " * 14, "query_too_long", [14, 1, 13]),
    ],
)
def test_infer_rejects_invalid_query(
    of_clip: tuple[Any, ...], refused: Callable[..., GroundingError], query: str, code: str, values: list[object]
) -> None:
    check_error(refused(infer, *of_clip, "--query", "dog sits", query), code, *values)


def test_infer_unquoted_query_gives_warning_with_quotes(
    of_clip: tuple[Any, ...], run_command: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    run_command(infer, *of_clip, "--query", "person", "opens", "the", "door")
    assert records(caplog, logging.WARNING, '--query "person opens the door"')
    caplog.clear()
    run_command(infer, *of_clip, "--query", "person")
    run_command(infer, *of_clip, "--query", "person", "opens the door")
    assert "--query" not in "".join(record.message for record in caplog.records if record.levelname == "WARNING")


def test_missing_or_conflicting_options_are_rejected(
    tiny_model: Path, clip: Path, golden: Path, refused: Callable[..., GroundingError]
) -> None:
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
        ((*of_clip, "--window", 40, "--overlap", 21), "invalid_setting", ["40", "21"]),
        ((*of_clip, "--window", -1), "invalid_setting", ["-1"]),
    ]
    for arguments, code, values in wrong:
        check_error(refused(infer, *model, *query, *arguments), code, *values)


def test_infer_rejects_files_that_are_not_models(
    write_graph: Callable[..., Path],
    tiny_manifest: Manifest,
    clip: Path,
    tmp_path: Path,
    refused: Callable[..., GroundingError],
) -> None:
    other = json.dumps({**tiny_manifest.to_dict(), "format": "drn-manifest/9"})
    cut_off = {METADATA_KEY: tiny_manifest.to_json()}
    files = {
        tmp_path / "gone.onnx": "missing_file",
        tmp_path / "model.txt": "wrong_suffix",
        write_graph(tmp_path / "bare.onnx", {}): "missing_manifest",
        write_graph(tmp_path / "later.onnx", {METADATA_KEY: other}): "unknown_format",
        write_graph(tmp_path / "torn.onnx", {METADATA_KEY: "{"}): "invalid_json",
        write_graph(tmp_path / "part.onnx", cut_off, ("matching_logits", "boundary_distances")): "unexpected_tensors",
    }
    for name, data in {"text.onnx": b"a text", "empty.onnx": b"", "cut.onnx": b""}.items():
        (tmp_path / name).write_bytes(data or (tmp_path / "bare.onnx").read_bytes()[: 4000 * (name == "cut.onnx")])
        files[tmp_path / name] = "not_onnx"
    (tmp_path / "model.txt").touch()
    (tmp_path / "drn.engine").write_bytes(b"plan")
    files[tmp_path / "drn.engine"] = "missing_file"
    for path, code in files.items():
        error = refused(infer, "--model", path, "--features", clip, "--duration", 20, "--query", "dog sits")
        check_error(error, code, path.name)


def test_graph_width_unlike_manifest_is_rejected(
    write_graph: Callable[..., Path],
    tiny_manifest: Manifest,
    clip: Path,
    tmp_path: Path,
    refused: Callable[..., GroundingError],
) -> None:
    model = write_graph(tmp_path / "narrow.onnx", {METADATA_KEY: tiny_manifest.to_json()}, dim=12)
    arguments = ("--features", clip, "--duration", 20, "--query", "dog sits")
    check_error(refused(infer, "--model", model, *arguments), "shape_mismatch")


def test_infer_on_missing_gpu_is_rejected(of_clip: tuple[Any, ...], refused: Callable[..., GroundingError]) -> None:
    ort = pytest.importorskip("onnxruntime")
    if "CUDAExecutionProvider" in ort.get_available_providers():
        pytest.skip("this ONNX Runtime has a GPU")
    error = refused(infer, *of_clip, "--query", "dog sits", "--device", "cuda")
    check_error(error, "gpu_unavailable", "--device cpu")


def test_plot_on_full_disk_fails_without_file(
    of_clip: tuple[Any, ...], tmp_path: Path, run_command: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "replace", full)
    outcome = run_command(infer, *of_clip, "--query", "dog sits", "--plot", tmp_path / "plot.png")
    assert outcome.code == 2
    check_error(outcome.error, "disk_full", tmp_path / "plot.png")
    assert [path.name for path in tmp_path.iterdir()] == ["hall.npy"]


# The command from a shell


def shell(*arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "runtime.infer", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, **options)


def test_shell_stdout_contains_only_results(of_clip: tuple[Any, ...]) -> None:
    result = shell(*of_clip, "--query", "person zorbs", "--format", "json")
    assert result.returncode == 0
    assert len(json.loads(result.stdout)[0]["moments"]) == 5
    assert "'zorbs'" in result.stderr
    assert "Next:  python -m runtime.evaluate" in result.stderr


def test_shell_invalid_features_give_one_line_and_exit_code_2(tiny_model: Path, tmp_path: Path) -> None:
    path = bad_features(tmp_path)["attack.pt"][0]
    result = shell("--model", tiny_model, "--features", path, "--duration", 20, "--query", "dog sits")
    assert (result.returncode, result.stdout) == (2, "")
    # The line before reports that this model records no digest.
    *notes, error = result.stderr.splitlines()
    assert error.startswith("error: ")
    assert len(notes) <= 1
    assert not (tmp_path / "ran").exists()


def test_long_video_uses_and_reports_requested_windows(
    tiny_model: Path, tmp_path: Path, run_command: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "drn")
    np.save(tmp_path / "hall.npy", np.random.default_rng(0).random((900, 16)).astype(np.float32))
    of_hall = ("--model", tiny_model, "--features", tmp_path / "hall.npy", "--duration", 300, "--format", "json")
    asked = (*of_hall, "--query", "person opens the door")
    complete = run_command(infer, *asked)
    assert not records(caplog, logging.INFO, "300.0")
    cut = run_command(infer, *asked, "--window", 43, "--overlap", 14.5)
    assert len(records(caplog, logging.INFO, "hall", "300.0", 11, "43.0", "15.0")) == 1
    (answer,) = json.loads(cut.out)
    assert set(answer) == {"query", "video", "moments"}
    assert all(moment["end"] - moment["start"] <= 43.1 for moment in answer["moments"])
    assert run_command(infer, *asked, "--window", 0).out == complete.out
    run_command(infer, *asked, "--window", 43)
    assert len(records(caplog, logging.INFO, "hall", "22.0")) == 1
