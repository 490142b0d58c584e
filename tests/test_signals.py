"""SIGTERM in the middle of a command leaves nothing half-written, and the next run removes what SIGKILL leaves."""

from __future__ import annotations

import functools
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.export.conftest import checkpoint, networks
from tests.films import film
from tests.forked_commands import ForkedCommand, Prepare
from tests.interrupted_commands import repeat_call, stop_before_rename, wait_after_uploads
from tests.shared_builds import run_directory

__all__ = ["checkpoint", "networks"]


def start(module: str, output: Path, words: list[str], prepare: Prepare | None = None) -> ForkedCommand:
    """Start a command that writes into a directory."""
    environment = {**os.environ, "DRN_CACHE": str(output / "cache")}
    return ForkedCommand(["python", "-m", module, *words], environment, prepare=prepare)


def files(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


Words = Callable[[Path], list[str]]
Start = Callable[[str], ForkedCommand]


@pytest.fixture(scope="module")
def commands(
    planted: Path, models: Path, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Words]:
    """The words of each command, given the directory it writes into."""
    from tests.runtime.media.extractor_graphs import CLIPS, write_clips

    inputs = tmp_path_factory.mktemp("inputs")
    extractor, video = write_clips(inputs / "tiny.onnx", CLIPS), film(inputs / "film.mp4", 40)
    (inputs / "queries.jsonl").write_text(json.dumps({"query": "person opens the door"}) + "\n")
    small = "--embed-dim 8 --hidden-dim 8 --fpn-dim 8 --epochs 1 --batch-size 8 --validate-on none --device cpu"
    graph, data = str(models / "drn.onnx"), str(planted)
    np.save(inputs / "film.npy", np.random.default_rng(0).random((4, 32), np.float32))
    infer_words = ["--model", graph, "--features", str(inputs / "film.npy"), "--duration", "1.6", "--num-frames", "40"]
    infer_words += ["--query", "person opens the door"]
    corpus = ["--model", graph, "--features", data, "--queries", str(inputs / "queries.jsonl"), "--actors", "0"]
    words: dict[str, Words] = {
        "train.simulate": lambda out: ["--output", str(out / "new"), "--feature-dim", "8", "--videos", "4"],
        "train": lambda out: ["--data", data, "--output", str(out / "new"), *small.split()],
        "export.to_onnx": lambda out: ["--checkpoint", str(checkpoint), "--output", str(out / "new.onnx")],
        "export.build_engine": lambda out: [
            "--model", graph, "--precision", "fp32", "--target", "onnxruntime", "--output", str(out / "new.onnx"),
        ],
        "calib.calibrate": lambda out: [
            "--onnx", graph, "--data", data, "--output", str(out / "new.calibration.json"), "--samples", "32",
            "--method", "minmax",
        ],
        "runtime.extract": lambda out: [str(video), "--extractor", str(extractor), "--output", str(out / "new")],
        "runtime.ground_corpus": lambda out: [*corpus, "--output", str(out / "new")],
        "train.prepare": lambda out: ["--data", data, "--output", str(out / "new")],
        "runtime.infer cut": lambda out: [*infer_words, "--footage", str(video), "--cut", str(out / "new")],
        "runtime.infer": lambda out: [*infer_words, *["person opens the door"] * 500, "--format", "json"],
        "runtime.benchmark": lambda out: [
            "--model", graph, "--output", str(out / "new.json"), "--samples", "2", "--batch", "1",
        ],
        "runtime.serve": lambda out: ["--model", graph, "--data", data, "--uploads", str(out / "new"), "--port", "0"],
    }  # fmt: skip
    return words


@pytest.fixture
def start_and_stop(commands: dict[str, Words], tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Start:
    """Start a command that writes into `tmp_path`, and wait until its first file is complete but not yet renamed."""

    def start_command(name: str) -> ForkedCommand:
        module = name.split()[0]
        stop = functools.partial(stop_before_rename, module, str(tmp_path), str(run_directory(tmp_path_factory)))
        process = start(module, tmp_path, commands[name](tmp_path), stop)
        process.wait_until_half_way()
        return process

    return start_command


# Evaluations, benchmarks and plots write one file, as `calib.calibrate` does.
WRITERS = (
    "train.simulate", "train", "export.to_onnx", "export.build_engine", "calib.calibrate", "runtime.extract",
    "runtime.ground_corpus", "runtime.infer cut",
)  # fmt: skip


def end_half_way(process: ForkedCommand) -> None:
    """Send SIGTERM to a command that is half-way, twice; check the exit code and the log."""
    process.wait_until_half_way()
    end(process)


def end(process: ForkedCommand) -> None:
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGTERM)
    result = process.finish(timeout=60)
    assert result.returncode == 143, result.stderr
    assert "Traceback" not in result.stderr
    assert "SIGTERM" in result.stderr.splitlines()[-1]


@pytest.mark.parametrize("name", WRITERS)
def test_sigterm_while_writing_leaves_no_partial_files(name: str, start_and_stop: Start, tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")
    end(start_and_stop(name))
    left = files(tmp_path)
    assert left.pop("mine") == b"mine"
    # Of simulate and ground_corpus the marks with which the same command goes on.
    assert not [name for name in left if Path(name).name not in (".simulating.json", "corpus.json", "run.json")], left


@pytest.mark.parametrize(
    ("module", "call"),
    [
        ("train.prepare", "pathlib:Path.write_text"),
        ("runtime.infer", "runtime.grounding.grounder:Grounder.ground_batch"),
        ("runtime.serve", "runtime.grounding.grounder:Grounder.load"),
        ("runtime.serve", "runtime.datasets.dataset:DataSet.video"),
        ("runtime.serve", "runtime.grounding.grounder:Grounder.warm"),
        ("runtime.ground_corpus", "runtime.grounding.grounder:Grounder.warm"),
    ],
)
def test_sigterm_in_long_call_is_clean(module: str, call: str, commands: dict[str, Words], tmp_path: Path) -> None:
    words = commands[module](tmp_path)
    end_half_way(start(module, tmp_path, words, functools.partial(repeat_call, call)))
    # A corpus keeps the record of its inputs, with which the same command continues.
    assert not [name for name in files(tmp_path) if module != "runtime.ground_corpus" or "shard-" in name]


@pytest.mark.parametrize("call", ["subprocess:Popen.__enter__", "runtime.grounding.grounder:Grounder.ground"])
def test_sigterm_in_benchmark_writes_complete_report(call: str, commands: dict[str, Words], tmp_path: Path) -> None:
    words = commands["runtime.benchmark"](tmp_path)
    end_half_way(start("runtime.benchmark", tmp_path, words, functools.partial(repeat_call, call)))
    assert files(tmp_path).keys() == {"new.json"}
    assert json.loads((tmp_path / "new.json").read_text())["interrupted"] is True


def test_sigterm_at_service_start_removes_its_directory(commands: dict[str, Words], tmp_path: Path) -> None:
    words = commands["runtime.serve"](tmp_path)
    end_half_way(start("runtime.serve", tmp_path, words, wait_after_uploads))
    assert not [path for path in tmp_path.rglob("*") if path.name != "new"]


@pytest.mark.parametrize(
    "module", ["train.simulate", "export.build_engine", "runtime.extract", "runtime.ground_corpus"]
)
def test_next_run_removes_files_left_by_sigkill(
    module: str, commands: dict[str, Words], start_and_stop: Start, tmp_path: Path
) -> None:
    process = start_and_stop(module)
    process.send_signal(signal.SIGKILL)
    process.finish()
    assert list(tmp_path.rglob(".drn-*"))
    again = start(module, tmp_path, commands[module](tmp_path)).finish(timeout=120)
    assert again.returncode == 0, again.stderr
    assert not list(tmp_path.rglob(".drn-*"))


def test_second_training_of_directory_fails(commands: dict[str, Words], start_and_stop: Start, tmp_path: Path) -> None:
    first = start_and_stop("train")
    try:
        second = start("train", tmp_path, [*commands["train"](tmp_path), "--resume"]).finish(timeout=60)
        assert second.returncode == 2
        assert str(tmp_path / "new") in second.stderr
        assert second.stderr.count("\n") == 1
    finally:
        first.send_signal(signal.SIGKILL)
        first.finish()
