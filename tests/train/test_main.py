"""Test `python -m train`: invalid input raises one error with exit code 2 and leaves no files."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch

from runtime.core.cli import command
from runtime.core.errors import CheckpointError, GroundingError
from runtime.datasets.dataset import DataSet
from tests.forked_commands import ForkedCommand
from tests.raising import check_error, raises, records
from train.__main__ import _check_precision, train
from train.checkpoints import load_checkpoint
from train.training.dataset import split_by_video
from train.training.recipes import RECIPES
from train.training.run_config import with_config

FEATURES = "C3D_unit16_overlap0.5_merged"


@pytest.fixture
def data(planted: Path, tmp_path: Path) -> Path:
    """A copy of the planted data set, free to be spoilt."""
    shutil.copytree(planted, tmp_path / "data", ignore=shutil.ignore_patterns("cache"))
    return tmp_path / "data"


Outcome = tuple[int, str, BaseException | None]


@pytest.fixture
def outcome(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """Run the command line in this process; return its exit code, its last line on stderr, and the error behind it."""

    def run(*arguments: str | Path) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["train", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            command(train, with_config)
        err = capfd.readouterr().err
        assert "Traceback" not in err
        error = stopped.value.__context__
        return int(stopped.value.code or 0), err.strip().splitlines()[-1], error

    return run


def refused(outcome: Any, output: Path, code: str, values: tuple[object, ...], *arguments: str | Path) -> None:
    exit_code, said, error = outcome("--output", output, *arguments)
    assert exit_code == 2
    assert said == f"error: {error}"
    check_error(error, code, *values)
    assert not output.exists(), "nothing half-written is left"


@pytest.mark.parametrize(
    ("arguments", "code", "values"),
    [
        (["--stage", "2"], "missing_option", ("Stage 2", "--load")),
        (["--stage", "3"], "missing_option", ("Stage 3", "--load")),
        (["--held-out", "0"], "invalid_option", ("--held-out", "0.0")),
        (["--held-out", "1.5"], "invalid_option", ("--held-out", 1.5)),
        (["--batch-size", "0"], "invalid_option", ("--batch-size", 0)),
        (["--epochs", "0"], "invalid_option", ("--epochs", (0,))),
        (["--epochs", "1", "2"], "invalid_option", ("--epochs", 3, (1, 2))),
        (["--lr", "-1"], "invalid_option", ("--lr", (-1.0,))),
        (["--lr", "nan"], "invalid_option", ("--lr", "nan")),
        (["--seed", "-1"], "invalid_option", ("--seed", -1)),
        (["--num-segments", "30"], "invalid_option", ("--num-segments", 4, 30)),
        (["--embed-dim", "0"], "invalid_option", ("--embed-dim", 0)),
        (["--hidden-dim", "-3"], "invalid_option", ("--hidden-dim", -3)),
        (["--fpn-dim", "15"], "invalid_option", ("--fpn-dim", 15)),
        (["--device", "tpu"], "unknown_device", ("--device", "'tpu'")),
        (["--precision", "fp16", "--device", "cpu"], "precision_unsupported", ("fp16",)),
        (["--load", "absent.pt"], "missing_file", ("absent.pt",)),
        (["--glove", "absent.txt"], "unreadable_file", ("absent.txt",)),
        (["--negatives", "-1"], "invalid_option", ("--negatives", -1)),
        (["--negatives", "nan"], "invalid_option", ("--negatives", "nan")),
        (["--negatives", "0.01"], "invalid_option", ("--negatives", 16, 0.01)),
        (["--patience", "0"], "invalid_option", ("--patience", 0)),
        (["--patience", "2", "--validate-on", "none"], "conflicting_options", ("--patience", "--validate-on")),
        (["--config", "absent.yaml"], "missing_file", ("absent.yaml",)),
    ],
)
def test_impossible_argument_is_named(
    outcome: Any, planted: Path, tmp_path: Path, arguments: list[str], code: str, values: tuple[object, ...]
) -> None:
    refused(outcome, tmp_path / "run", code, values, "--data", planted, *arguments)


def test_batch_larger_than_the_data_set_is_named(outcome: Any, planted: Path, tmp_path: Path) -> None:
    exit_code, _, error = outcome("--data", planted, "--output", tmp_path / "run", "--batch-size", "100000")
    assert exit_code == 2
    check_error(error, "too_few_queries", "--batch-size", 100000)


@pytest.mark.parametrize(
    ("supported", "precision", "warnings"), [(False, "bf16", 1), (True, "bf16", 0), (False, "fp32", 0)]
)
def test_emulated_bf16_gives_a_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, supported: bool, precision: Any, warnings: int
) -> None:
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: supported)
    _check_precision(cast(Any, SimpleNamespace(precision=precision)), torch.device("cpu"))
    assert len(caplog.records) == warnings


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_missing_gpu_is_an_error(outcome: Any, planted: Path, tmp_path: Path) -> None:
    refused(outcome, tmp_path / "run", "gpu_unavailable", ("cuda",), "--data", planted, "--device", "cuda")


@pytest.mark.parametrize(
    "arguments", [["--recipe", "other"], ["--stage", "4"], ["--epochs", "one"], ["--no-such-flag"]]
)
def test_unknown_argument_exits_2(outcome: Any, planted: Path, tmp_path: Path, arguments: list[str]) -> None:
    code, *_ = outcome("--data", planted, "--output", tmp_path / "run", *arguments)
    assert code == 2
    assert not (tmp_path / "run").exists()


def append(path: Path, line: str) -> int:
    """Append a line and return its number."""
    lines = [*path.read_text().splitlines(), line]
    path.write_text("\n".join(lines) + "\n")
    return len(lines)


@pytest.mark.parametrize(
    "line",
    ["SIM00000 1.0 2.0 person opens the door.", "SIM00000 1.0##person opens", "SIM00000 one 2##person opens", "##"],
)
def test_malformed_line_is_named_by_number(outcome: Any, data: Path, tmp_path: Path, line: str) -> None:
    number = append(data / "Charades_sta_train.txt", line)
    refused(outcome, tmp_path / "run", "malformed_row", (f"line {number}",), "--data", data)


def test_unknown_video_is_named(outcome: Any, data: Path, tmp_path: Path) -> None:
    number = append(data / "Charades_sta_train.txt", "NOBODY 1.0 2.0##person opens the door.")
    refused(outcome, tmp_path / "run", "unlisted_video", ("NOBODY", f"line {number}"), "--data", data)


def test_query_of_unknown_words_only_is_named(outcome: Any, data: Path, tmp_path: Path) -> None:
    # One that is not held out: in validation the sentence counts as a miss.
    video = split_by_video(DataSet(data).annotations("train"), 0.1, 0)[0][0].video
    number = append(data / "Charades_sta_train.txt", f"{video} 1.0 2.0##xyzzy plugh.")
    refused(outcome, tmp_path / "run", "unknown_content_words", (number, video), "--data", data)


def test_invalid_moments_are_dropped_unless_faithful(
    data: Path, tmp_path: Path, tiny_sizes: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    video = (data / "Charades_sta_train.txt").read_text().split()[0]
    number = append(data / "Charades_sta_train.txt", f"{video} 2.0 1.0##person opens the door.")
    options = {**tiny_sizes, "epochs": (1,), "lr": None, "validate_on": "none"}
    with caplog.at_level("WARNING", "drn"):
        train(data, tmp_path / "dropped", stage="1", **options)
    assert records(caplog, logging.WARNING, 1, number)
    train(data, tmp_path / "kept", stage="1", faithful=True, **options)
    counts = [
        json.loads((tmp_path / run / "run.json").read_text())["inputs"]["queries"][0] for run in ("dropped", "kept")
    ]
    assert counts[1] == counts[0] + 1 == number


def feature_file(data: Path) -> Path:
    return sorted((data / FEATURES).iterdir())[5]


def save_array(value: Any) -> Callable[[Path], None]:
    return lambda path: np.save(path, value)


@pytest.mark.parametrize(
    ("spoil", "code", "values"),
    [
        (Path.unlink, "missing_features", ()),
        (lambda path: path.write_bytes(b""), "empty_file", ()),
        (lambda path: path.write_bytes(path.read_bytes()[:300]), "damaged_file", ()),
        (lambda path: path.write_bytes(b"not an array at all"), "damaged_file", ()),
        (save_array(np.full((9, 32), np.nan, np.float16)), "non_finite_features", (288,)),
        (save_array(np.empty((0, 32), np.float16)), "no_clips", ((0, 32),)),
        (save_array(np.ones((9, 33), np.float16)), "feature_width_mismatch", (33, 32)),
        (save_array(np.ones(9, np.float16)), "wrong_array", ((9,),)),
    ],
    ids=["missing", "empty", "truncated", "no array", "nan", "no clips", "wider", "flat"],
)
def test_unusable_feature_file_is_named(
    outcome: Any, data: Path, tmp_path: Path, spoil: Callable[[Path], Any], code: str, values: tuple[object, ...]
) -> None:
    path = feature_file(data)
    spoil(path)
    refused(outcome, tmp_path / "run", code, (path.stem, *values), "--data", data)
    assert not list((data / "cache").glob("*")) if (data / "cache").exists() else True


class Trap:
    def __reduce__(self) -> Any:
        return (os.mkdir, ("sprung",))


def test_feature_file_with_code_is_rejected_without_running(
    outcome: Any, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = feature_file(data)
    path.unlink()
    torch.save(Trap(), path.with_suffix(".pt"))
    refused(outcome, tmp_path / "run", "code_in_file", (path.stem,), "--data", data)
    assert not Path("sprung").exists()


@pytest.mark.parametrize("name", ["Charades_word2id.json", "Charades_duration.json", "Charades_frames_info.json"])
@pytest.mark.parametrize("content", [None, "", "{", "[]", "{}"])
def test_missing_or_malformed_table_is_named(
    outcome: Any, data: Path, tmp_path: Path, name: str, content: str | None
) -> None:
    (data / name).unlink()
    if content is not None:
        (data / name).write_text(content)
    code = {None: "missing_file", "": "invalid_json", "{": "invalid_json"}.get(content, "unexpected_structure")
    refused(outcome, tmp_path / "run", code, (name,), "--data", data)


def test_missing_data_directory_names_simulate_command(outcome: Any, tmp_path: Path) -> None:
    refused(outcome, tmp_path / "run", "missing_file", ("train.simulate",), "--data", tmp_path / "absent")


def test_output_that_is_a_file_is_rejected(outcome: Any, planted: Path, tmp_path: Path) -> None:
    (tmp_path / "run").write_text("mine")
    exit_code, _, error = outcome("--data", planted, "--output", tmp_path / "run", "--epochs", "1")
    assert exit_code == 2
    check_error(error, "unwritable_output", tmp_path / "run")
    assert (tmp_path / "run").read_text() == "mine"


def test_checkpoint_of_another_feature_width_is_rejected(
    outcome: Any, short_run: Path, data: Path, tmp_path: Path
) -> None:
    for path in (data / FEATURES).iterdir():
        np.save(path, np.load(path)[:, :31])
    arguments = ["--data", data, "--load", short_run / "drn.pt"]
    refused(outcome, tmp_path / "run", "feature_width_mismatch", ("--load", 32, 31), *arguments)


def test_glove_with_load_option_is_rejected(outcome: Any, short_run: Path, planted: Path, tmp_path: Path) -> None:
    (tmp_path / "glove.txt").write_text("door 1 2\n")
    arguments = ["--data", planted, "--load", short_run / "drn.pt", "--glove", tmp_path / "glove.txt"]
    refused(outcome, tmp_path / "run", "conflicting_options", ("--glove", "--load"), *arguments)


def test_glove_file_initializes_word_vectors(planted: Path, tiny_sizes: dict[str, Any], tmp_path: Path) -> None:
    words = json.loads((planted / "Charades_word2id.json").read_text())
    (tmp_path / "glove.txt").write_text("".join(f"{word} {' '.join(['9'] * 8)}\n" for word in words))
    options = {**tiny_sizes, "epochs": (1,), "lr": (1e-5,), "validate_on": "none"}
    train(planted, tmp_path / "run", stage="1", glove=tmp_path / "glove.txt", **options)
    table = load_checkpoint(tmp_path / "run" / "drn.pt").weights["query_encoder.embedding.weight"]
    assert float((table[1:] - 9).abs().max()) < 0.01
    assert not table[0].any()


def test_defaults_match_the_published_recipe(planted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    def stop(run: Any, *_: Any) -> None:
        seen.append(run.settings)
        raise KeyboardInterrupt

    monkeypatch.setattr("train.training.trainer.TrainingRun.open", stop)
    for recipe in ("mmaction2", "drn"):
        with pytest.raises(KeyboardInterrupt):
            train(planted, tmp_path / "run", recipe=recipe, embed_dim=8, hidden_dim=8, fpn_dim=8)  # type: ignore[arg-type]
        expected = RECIPES[recipe]
        assert seen[-1].stages == expected.stages
        assert (seen[-1].batch_size, seen[-1].clip_norm) == (expected.batch_size, expected.clip_norm)
    assert not seen[-1].faithful


def test_stage_without_a_checkpoint_names_the_one_to_load(planted: Path, tmp_path: Path) -> None:
    with raises(CheckpointError, "missing_option", "Stage 2", tmp_path / "run/stage1/best.pt"):
        train(planted, tmp_path / "run", stage="2")


def test_invalid_option_error_is_one_line(planted: Path, tmp_path: Path) -> None:
    with raises(GroundingError, "invalid_option", "--batch-size", -4) as caught:
        train(planted, tmp_path / "run", batch_size=-4)
    assert "\n" not in str(caught.value)


def test_ctrl_c_exits_130_with_message(planted: Path, tiny_sizes: dict[str, Any], tmp_path: Path) -> None:
    arguments: list[str] = []
    for name, value in {**tiny_sizes, "epochs": (50,)}.items():
        arguments += [f"--{name.replace('_', '-')}", *map(str, value if isinstance(value, tuple) else (value,))]
    words = ["python", "-m", "train", "--data", str(planted), "--output", str(tmp_path / "run"), *arguments]
    process = ForkedCommand(words)
    while not (tmp_path / "run" / "stage1" / "last.pt").exists() and process.is_running():
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    result = process.finish(timeout=60)
    assert result.returncode == 130
    assert "Traceback" not in result.stderr
    assert "nterrupted" in result.stderr.strip().splitlines()[-1]
    assert not list((tmp_path / "run").rglob(".*"))
