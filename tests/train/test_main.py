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
from runtime.core.errors import OutputError
from runtime.datasets.dataset import DataSet
from tests.forked_commands import ForkedCommand
from tests.raising import check_error, raises, records
from tests.train.conftest import TrainTiny, train_words
from train.__main__ import _check_precision, train
from train.checkpoints import load_checkpoint
from train.training.dataset import split_by_video
from train.training.recipes import RECIPES
from train.training.run_config import with_config

FEATURES = "C3D_unit16_overlap0.5_merged"


@pytest.fixture
def data(planted: Path, tmp_path: Path) -> Path:
    """Return a copy of the planted data set, which a test may change."""
    shutil.copytree(planted, tmp_path / "data", ignore=shutil.ignore_patterns("cache"))
    return tmp_path / "data"


@pytest.fixture
def assert_rejected(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> Callable[..., None]:
    """Run the command line in this process; it must exit with 2, one line for the error, and without files."""

    def run(code: str | None, values: tuple[object, ...], *arguments: str | Path) -> None:
        output = tmp_path / "run"
        monkeypatch.setattr(sys, "argv", ["train", "--output", str(output), *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            command(train, with_config)
        err = capfd.readouterr().err
        assert stopped.value.code == 2
        assert "Traceback" not in err
        assert not output.exists()
        # The parser of the command line rejects unknown arguments, without a GroundingError.
        if code:
            error = stopped.value.__context__
            assert error is not None
            assert err.strip().splitlines()[-1] == f"error: {error}"
            check_error(error, code, *values)

    return run


@pytest.mark.parametrize(
    ("arguments", "code", "values"),
    [
        (["--recipe", "other"], None, ()),
        (["--stage", "4"], None, ()),
        (["--epochs", "one"], None, ()),
        (["--no-such-flag"], None, ()),
        (["--stage", "2"], "missing_option", ("Stage 2", "--load", "stage1/best.pt")),
        (["--stage", "3"], "missing_option", ("Stage 3", "--load")),
        (["--held-out", "0"], "invalid_option", ("--held-out", "0.0")),
        (["--held-out", "1.5"], "invalid_option", ("--held-out", 1.5)),
        (["--batch-size", "0"], "invalid_option", ("--batch-size", 0)),
        (["--batch-size", "100000"], "too_few_queries", ("--batch-size", 100000)),
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
    assert_rejected: Any, planted: Path, arguments: list[str], code: str | None, values: tuple[object, ...]
) -> None:
    assert_rejected(code, values, "--data", planted, *arguments)


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
def test_missing_gpu_is_an_error(assert_rejected: Any, planted: Path) -> None:
    assert_rejected("gpu_unavailable", ("cuda",), "--data", planted, "--device", "cuda")


def append(path: Path, line: str) -> int:
    """Append a line and return its number."""
    lines = [*path.read_text().splitlines(), line]
    path.write_text("\n".join(lines) + "\n")
    return len(lines)


def test_unusable_data_set_is_named(assert_rejected: Any, data: Path, tmp_path: Path) -> None:
    assert_rejected("missing_file", ("train.simulate",), "--data", tmp_path / "absent")
    annotations = data / "Charades_sta_train.txt"
    text = annotations.read_text()
    number = append(annotations, "SIM00000 one 2##person opens")
    assert_rejected("malformed_row", (f"line {number}",), "--data", data)
    # A query of a training video; in validation it counts as a miss.
    annotations.write_text(text)
    video = split_by_video(DataSet(data).annotations("train"), 0.1, 0)[0][0].video
    number = append(annotations, f"{video} 1.0 2.0##xyzzy plugh.")
    assert_rejected("unknown_content_words", (number, video), "--data", data)
    (data / "Charades_duration.json").write_text("{")
    assert_rejected("invalid_json", ("Charades_duration.json",), "--data", data)


def test_invalid_moments_are_dropped_unless_faithful(
    train_tiny: TrainTiny, data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    video = (data / "Charades_sta_train.txt").read_text().split()[0]
    number = append(data / "Charades_sta_train.txt", f"{video} 2.0 1.0##person opens the door.")
    options = {"epochs": (1,), "lr": None, "validate_on": "none"}
    with caplog.at_level("WARNING", "drn"):
        train_tiny(tmp_path / "dropped", data, stage="1", **options)
    assert records(caplog, logging.WARNING, 1, number)
    train_tiny(tmp_path / "faithful", data, stage="1", faithful=True, **options)
    dropped, faithful = (
        json.loads((tmp_path / run / "run.json").read_text())["inputs"]["queries"][0] for run in ("dropped", "faithful")
    )
    assert faithful == dropped + 1 == number


class Trap:
    def __reduce__(self) -> Any:
        return (os.mkdir, ("trapped",))


def test_unusable_feature_file_is_named_without_running_code(
    assert_rejected: Any, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = sorted((data / FEATURES).iterdir())[5]
    path.write_bytes(path.read_bytes()[:300])
    assert_rejected("damaged_file", (path.stem,), "--data", data)
    path.unlink()
    assert_rejected("missing_features", (path.stem,), "--data", data)
    torch.save(Trap(), path.with_suffix(".pt"))
    assert_rejected("code_in_file", (path.stem,), "--data", data)
    assert not Path("trapped").exists()
    assert not list(data.glob("cache/*"))


def test_output_that_is_a_file_is_rejected(planted: Path, tmp_path: Path) -> None:
    (tmp_path / "run").write_text("mine")
    with raises(OutputError, "unwritable_output", tmp_path / "run"):
        train(planted, tmp_path / "run", epochs=(1,))
    assert (tmp_path / "run").read_text() == "mine"


def test_checkpoint_of_other_size_fails(assert_rejected: Any, short_run: Path, data: Path, tmp_path: Path) -> None:
    arguments = ["--data", data, "--load", short_run / "drn.pt"]
    (tmp_path / "glove.txt").write_text("door 1 2\n")
    conflict = ("--glove", "--load")
    assert_rejected("conflicting_options", conflict, *arguments, "--glove", tmp_path / "glove.txt")
    for path in (data / FEATURES).iterdir():
        np.save(path, np.load(path)[:, :31])
    assert_rejected("feature_width_mismatch", ("--load", 32, 31), *arguments)


def test_glove_file_initializes_word_vectors(train_tiny: TrainTiny, planted: Path, tmp_path: Path) -> None:
    words = json.loads((planted / "Charades_word2id.json").read_text())
    (tmp_path / "glove.txt").write_text("".join(f"{word} {' '.join(['9'] * 8)}\n" for word in words))
    options = {"epochs": (1,), "lr": (1e-5,), "validate_on": "none"}
    train_tiny(tmp_path / "run", stage="1", glove=tmp_path / "glove.txt", **options)
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


def test_ctrl_c_exits_130_with_message(planted: Path, tmp_path: Path) -> None:
    words = train_words(planted, tmp_path / "run", epochs=(50,))
    process = ForkedCommand(["python", "-m", "tests.train.training.narrow", *words])
    while not (tmp_path / "run" / "stage1" / "last.pt").exists() and process.is_running():
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    result = process.finish(timeout=60)
    assert result.returncode == 130
    assert "Traceback" not in result.stderr
    assert "nterrupted" in result.stderr.strip().splitlines()[-1]
    assert not list((tmp_path / "run").rglob(".*"))
