"""SIGTERM in the middle of a command leaves nothing half-written, and the next run removes what SIGKILL leaves."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.export.conftest import checkpoint, networks
from tests.films import film
from tests.processes import heed_ctrl_c
from tests.shared_builds import run_directory

__all__ = ["checkpoint", "networks"]

ROOT = Path(__file__).parents[1]
# Runs a command that stops, with a line on stderr, when its first file is whole under its temporary name.
STOPPING = """
import os, pathlib, runpy, sys, time
module, directory = sys.argv[1:3]
sys.argv = sys.argv[2:]
if module == "runtime.benchmark":
    # Takes half a minute, and writes nothing.
    from runtime.benchmarking.runner import BenchmarkRun
    BenchmarkRun.measure = lambda run: None
if module == "export.to_onnx":
    from tests.shared_builds import traced_once
    traces = traced_once(pathlib.Path(os.environ["DRN_TEST_TRACES"]))
    traces.__enter__()
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
# Runs a command that reports on stderr when it calls a function, and repeats the call until it is interrupted.
REPEATING = """
import importlib, inspect, runpy, sys
place, name = sys.argv[1].split(":")
owner, _, name = name.rpartition(".")
owner = getattr(importlib.import_module(place), owner) if owner else importlib.import_module(place)
call = getattr(owner, name)
def repeat(*values, **named):
    print("half-way", file=sys.stderr, flush=True)
    for _ in range(100000):
        call(*values, **named)
setattr(owner, name, staticmethod(repeat) if inspect.ismethod(call) else repeat)
sys.argv = sys.argv[2:]
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
"""
# Starts a service that waits for a second, with a line on stderr, when it has created its directory for uploads.
CREATED = """
import runpy, sys, time
from runtime.service.uploads import Uploads
create = Uploads.__init__
def wait(*values, **named):
    create(*values, **named)
    print("half-way", file=sys.stderr, flush=True)
    time.sleep(1)
Uploads.__init__ = wait
sys.argv = sys.argv[1:]
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
"""


def start(module: str, output: Path, words: list[str], program: list[str] | None = None) -> subprocess.Popen[str]:
    """Start a command; `program` has the words before its own, by default those of `STOPPING`."""
    program = ["-c", STOPPING, module, str(output)] if program is None else program
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
def commands(
    planted: Path, models: Path, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Words]]:
    """The words of each command, given the directory it writes into."""
    from tests.runtime.media.extractor_graphs import CLIPS, write_clips

    inputs = tmp_path_factory.mktemp("inputs")
    extractor, video = write_clips(inputs / "tiny.onnx", CLIPS), film(inputs / "film.mp4", 40)
    (inputs / "queries.jsonl").write_text(json.dumps({"query": "person opens the door"}) + "\n")
    small = "--embed-dim 8 --hidden-dim 8 --fpn-dim 8 --epochs 1 --batch-size 8 --validate-on none --device cpu"
    graph, data = str(models / "drn.onnx"), str(planted)
    np.save(inputs / "film.npy", np.random.default_rng(0).random((4, 32), np.float32))
    asked = ["--model", graph, "--features", str(inputs / "film.npy"), "--duration", "1.6", "--num-frames", "40"]
    asked += ["--query", "person opens the door"]
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
        "runtime.evaluate": lambda out: ["--model", graph, "--data", data, "--output", str(out / "new.json")],
        "train.prepare": lambda out: ["--data", data, "--output", str(out / "new")],
        "runtime.infer plot": lambda out: [*asked, "--plot", str(out / "new.png")],
        "runtime.infer cut": lambda out: [*asked, "--footage", str(video), "--cut", str(out / "new")],
        "runtime.infer": lambda out: [*asked, *["person opens the door"] * 500, "--format", "json"],
        "runtime.benchmark": lambda out: [
            "--model", graph, "--output", str(out / "new.json"), "--samples", "2", "--batch", "1",
        ],
        "runtime.serve": lambda out: ["--model", graph, "--data", data, "--uploads", str(out / "new"), "--port", "0"],
    }  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DRN_TEST_TRACES", str(run_directory(tmp_path_factory)))
        yield words


ALL = (
    "train.simulate", "train", "export.to_onnx", "export.build_engine", "calib.calibrate", "runtime.extract",
    "runtime.ground_corpus", "runtime.evaluate", "runtime.infer plot", "runtime.infer cut", "runtime.benchmark",
)  # fmt: skip


def end_half_way(process: subprocess.Popen[str]) -> str:
    """Send SIGTERM to a command that is half-way, twice; check the exit code, and return its log."""
    half_way(process)
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 143, err
    assert "Traceback" not in err
    assert "SIGTERM" in err.splitlines()[-1]
    return err


@pytest.mark.parametrize("name", ALL)
def test_sigterm_while_writing_leaves_no_partial_files(name: str, commands: dict[str, Words], tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")
    end_half_way(start(name.split()[0], tmp_path, commands[name](tmp_path)))
    left = files(tmp_path)
    assert left.pop("mine") == b"mine"
    # Of simulate and ground_corpus the marks with which the same command goes on.
    assert not [name for name in left if Path(name).name not in (".simulating.json", "corpus.json", "run.json")], left


@pytest.mark.parametrize(
    ("module", "call"),
    [
        ("train.prepare", "runtime.datasets.dataset:DataSet.__init__"),
        ("train.prepare", "pathlib:Path.write_text"),
        ("runtime.infer", "runtime.grounding.grounder:Grounder.load"),
        ("runtime.infer", "runtime.grounding.grounder:Grounder.ground_batch"),
        ("runtime.benchmark", "runtime.grounding.grounder:Grounder.load"),
        ("runtime.serve", "runtime.grounding.grounder:Grounder.load"),
        ("runtime.serve", "runtime.datasets.dataset:DataSet.video"),
    ],
)
def test_sigterm_during_a_long_call_leaves_no_files(
    module: str, call: str, commands: dict[str, Words], tmp_path: Path
) -> None:
    words = commands[module](tmp_path)
    end_half_way(start(module, tmp_path, words, ["-c", REPEATING, call, module]))
    # An interrupted benchmark reports what it has measured.
    assert files(tmp_path).keys() <= {"new.json"}
    if module == "runtime.benchmark":
        assert json.loads((tmp_path / "new.json").read_text())["interrupted"] is True
    else:
        assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("call", ["subprocess:Popen.__enter__", "runtime.grounding.grounder:Grounder.ground"])
def test_sigterm_while_benchmarking_writes_complete_report(
    call: str, commands: dict[str, Words], tmp_path: Path
) -> None:
    words = commands["runtime.benchmark"](tmp_path)
    end_half_way(start("runtime.benchmark", tmp_path, words, ["-c", REPEATING, call, "runtime.benchmark"]))
    assert files(tmp_path).keys() == {"new.json"}
    assert json.loads((tmp_path / "new.json").read_text())["interrupted"] is True


def test_sigterm_at_service_start_removes_its_directory(commands: dict[str, Words], tmp_path: Path) -> None:
    words = commands["runtime.serve"](tmp_path)
    end_half_way(start("runtime.serve", tmp_path, words, ["-c", CREATED, "runtime.serve"]))
    assert not [path for path in tmp_path.rglob("*") if path.name != "new"]


@pytest.mark.parametrize("module", ["runtime.serve", "runtime.ground_corpus"])
def test_sigterm_while_warming_ends_the_command(module: str, commands: dict[str, Words], tmp_path: Path) -> None:
    words = commands[module](tmp_path)
    end_half_way(start(module, tmp_path, words, ["-c", REPEATING, "runtime.grounding.grounder:Grounder.warm", module]))
    assert not list(tmp_path.rglob("shard-*"))


@pytest.mark.parametrize(
    "module", ["train.simulate", "export.build_engine", "runtime.extract", "runtime.ground_corpus"]
)
def test_next_run_removes_files_left_by_sigkill(module: str, commands: dict[str, Words], tmp_path: Path) -> None:
    words = commands[module](tmp_path)
    process = start(module, tmp_path, words)
    half_way(process)
    process.kill()
    process.communicate(timeout=60)
    assert list(tmp_path.rglob(".drn-*"))
    again = start(module, tmp_path, words, ["-m", module])
    _, err = again.communicate(timeout=120)
    assert again.returncode == 0, err
    assert not list(tmp_path.rglob(".drn-*"))


def test_second_training_of_one_directory_is_rejected(commands: dict[str, Words], tmp_path: Path) -> None:
    words = commands["train"](tmp_path)
    first = start("train", tmp_path, words)
    try:
        half_way(first)
        second = start("train", tmp_path, [*words, "--resume"], ["-m", "train"])
        _, err = second.communicate(timeout=60)
        assert second.returncode == 2
        assert str(tmp_path / "new") in err
        assert err.count("\n") == 1
    finally:
        first.kill()
        first.communicate()
