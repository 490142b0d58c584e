"""SIGTERM in the middle of a command leaves nothing half-written, and the next run removes what SIGKILL leaves."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.films import film
from tests.processes import heed_ctrl_c

ROOT = Path(__file__).parents[1]
# Runs a command that stops, with a line on stderr, when its first file is whole under its temporary name.
STOPPING = """
import os, pathlib, runpy, sys, time
module, directory = sys.argv[1:3]
sys.argv = sys.argv[2:]
chmod = pathlib.Path.chmod
def stop(path, mode):
    if str(path).startswith(directory):
        print("half-way", file=sys.stderr, flush=True)
        for _ in range(1200):
            time.sleep(0.05)
    chmod(path, mode)
pathlib.Path.chmod = stop
runpy.run_module(module, run_name="__main__", alter_sys=True)
"""


def start(module: str, output: Path, words: list[str], stopping: bool = True) -> subprocess.Popen[str]:
    program = ["-c", STOPPING, module, str(output)] if stopping else ["-m", module]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DRN_CACHE": str(output / "cache"), "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, *program, *words],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=heed_ctrl_c,
    )


def half_way(process: subprocess.Popen[str]) -> None:
    assert process.stderr is not None
    log = []
    for line in process.stderr:
        if line == "half-way\n":
            return
        log.append(line)
    pytest.fail("".join(log))


def files(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


Words = Callable[[Path], list[str]]


@pytest.fixture(scope="module")
def commands(planted: Path, models: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Words]:
    """The words of each command, given the directory it writes into."""
    from tests.runtime.extractor_graphs import CLIPS, write_clips

    inputs = tmp_path_factory.mktemp("inputs")
    extractor, video = write_clips(inputs / "tiny.onnx", CLIPS), film(inputs / "film.mp4", 40)
    (inputs / "queries.jsonl").write_text(json.dumps({"query": "person opens the door"}) + "\n")
    small = "--embed-dim 8 --hidden-dim 8 --fpn-dim 8 --epochs 1 --batch-size 8 --validate-on none --device cpu"
    graph, data = str(models / "drn.onnx"), str(planted)
    corpus = ["--model", graph, "--features", data, "--queries", str(inputs / "queries.jsonl"), "--actors", "0"]
    return {
        "train.simulate": lambda out: ["--output", str(out / "new"), "--feature-dim", "8", "--videos", "4"],
        "train": lambda out: ["--data", data, "--output", str(out / "new"), *small.split()],
        "export.to_onnx": lambda out: ["--checkpoint", str(models / "drn.pt"), "--output", str(out / "new.onnx")],
        "export.build_engine": lambda out: [
            "--model", graph, "--precision", "fp32", "--target", "onnxruntime", "--output", str(out / "new.onnx"),
        ],
        "calib.calibrate": lambda out: [
            "--onnx", graph, "--data", data, "--output", str(out / "new.calibration.json"), "--samples", "32",
            "--method", "minmax",
        ],
        "runtime.extract": lambda out: [str(video), "--extractor", str(extractor), "--output", str(out / "new")],
        "runtime.ground_corpus": lambda out: [*corpus, "--output", str(out / "new")],
        "runtime.evaluate": lambda out: ["--model", graph, "--data", data, "--output", str(out / "new.json")],
    }  # fmt: skip


ALL = (
    "train.simulate", "train", "export.to_onnx", "export.build_engine", "calib.calibrate", "runtime.extract",
    "runtime.ground_corpus", "runtime.evaluate",
)  # fmt: skip


@pytest.mark.parametrize("module", ALL)
def test_sigterm_while_writing_leaves_nothing_half_written(
    module: str, commands: dict[str, Words], tmp_path: Path
) -> None:
    (tmp_path / "mine").write_text("mine")
    process = start(module, tmp_path, commands[module](tmp_path))
    half_way(process)
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 143, err
    assert "Traceback" not in err
    assert "SIGTERM" in err.splitlines()[-1]
    left = files(tmp_path)
    assert left.pop("mine") == b"mine"
    # Of simulate and ground_corpus the marks with which the same command goes on.
    assert not [name for name in left if Path(name).name not in (".simulating.json", "corpus.json", "run.json")], left


@pytest.mark.parametrize(
    "module", ["train.simulate", "export.build_engine", "runtime.extract", "runtime.ground_corpus"]
)
def test_next_run_removes_what_sigkill_left(module: str, commands: dict[str, Words], tmp_path: Path) -> None:
    words = commands[module](tmp_path)
    process = start(module, tmp_path, words)
    half_way(process)
    process.kill()
    process.communicate(timeout=60)
    assert list(tmp_path.rglob(".drn-*"))
    again = start(module, tmp_path, words, stopping=False)
    _, err = again.communicate(timeout=120)
    assert again.returncode == 0, err
    assert not list(tmp_path.rglob(".drn-*"))


def test_second_training_of_one_directory_is_refused_at_once(commands: dict[str, Words], tmp_path: Path) -> None:
    words = commands["train"](tmp_path)
    first = start("train", tmp_path, words)
    try:
        half_way(first)
        second = start("train", tmp_path, [*words, "--resume"], stopping=False)
        _, err = second.communicate(timeout=60)
        assert second.returncode == 2
        assert str(tmp_path / "new") in err
        assert err.count("\n") == 1
    finally:
        first.kill()
        first.communicate()
