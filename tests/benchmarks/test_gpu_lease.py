"""Test `benchmarks.gpu_lease`: calls resume, and invalid input is rejected before a task starts."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks import gpu_lease
from benchmarks.acceptance import engines, lease, lease_run
from benchmarks.acceptance.lease import TENSORRT, Task
from benchmarks.acceptance.lease_run import Lease, write_archive
from benchmarks.acceptance.run_config import Job
from runtime.artifacts.engine_layers import layers_path
from tests.benchmarks.fake_packages import write_chunks, write_packages

ROOT = Path(__file__).parents[2]
REHEARSE = ("--device", "cpu", "--small")
# Stands for `benchmarks.gpu LEG`: writes the results of its steps, after a while.
LEG = """
import json, os, sys, time
path, leg, seconds, outcome, *steps = sys.argv[1:]
time.sleep(float(seconds))
try:
    content = json.load(open(path))
except FileNotFoundError:
    content = {"format": "drn-gpu/2", "leg": leg, "told": "", "running": None, "cut_off": [], "date": "2026-01-01",
               "about": {}, "steps": []}
content["state"] = "chosen" if steps else "finished"
content["steps"] += [{"name": name, "outcome": outcome, "told": "It was.", "values": {}, "broken": [], "tables": [],
                      "seconds": 1.0} for name in steps or ["all"]]
with open(path + ".new", "w") as stream:
    json.dump(content, stream)
os.replace(path + ".new", path)
"""


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Run stubs in place of the legs; return what was started and, by task, how it is to end."""
    record: dict[str, Any] = {"tasks": [], "outcomes": {}, "seconds": {}, "environments": {}}

    def process(self: Lease, task: Task, limit_s: float) -> subprocess.Popen[bytes]:
        record["tasks"].append(task.name)
        record["environments"][task.name] = self._command(task)
        outcome, seconds = record["outcomes"].get(task.name, "kept"), record["seconds"].get(task.name, 0.0)
        words = [str(self.job.results(task.leg)), task.leg, str(seconds), outcome, *task.steps]
        return subprocess.Popen([sys.executable, "-c", LEG, *words], start_new_session=True)

    monkeypatch.setattr(Lease, "_process", process)
    monkeypatch.setattr(lease_run, "POLL_SECONDS", 0.02)
    return record


def state(output: Path) -> dict[str, Any]:
    return json.loads((output / "lease.json").read_text())


def call(packages: Path | None, output: Path, *words: str) -> int:
    brought = ["--packages", str(packages)] if packages else []
    return gpu_lease.main([*brought, "--output", str(output), *REHEARSE, *words])


def test_invalid_packages_are_rejected_without_output(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], started: dict[str, Any]
) -> None:
    packages = write_packages(tmp_path / "packages", chunks=3)
    (packages / TENSORRT / "chunk_001.bin").unlink()
    assert call(packages, tmp_path / "out", "--results", str(tmp_path / "results")) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: ")
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "results").exists()
    assert started["tasks"] == []


@pytest.mark.parametrize(
    "words",
    [
        ("--minutes", "0.2"),
        ("--call-minutes", "nan"),
        ("--packages", "absent"),
        ("--check", "--packages", "absent"),
        ("--device", "cuda"),
    ],
)
def test_invalid_options_are_rejected(
    words: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_lease, "cuda_gpu", lambda: None)
    assert gpu_lease.main(["--output", str(tmp_path / "out"), *REHEARSE, *words]) == 2
    assert capsys.readouterr().err.count("error: ") == 1
    assert not (tmp_path / "out").exists()


def test_damaged_chunk_leaves_lease_state_unchanged(tmp_path: Path, started: dict[str, Any]) -> None:
    packages = write_packages(tmp_path / "packages", chunks=3)
    later = packages / TENSORRT / "chunk_002.bin"
    content = later.read_bytes()
    later.unlink()
    assert call(packages, tmp_path / "out", "--more") == 0
    before = state(tmp_path / "out")
    later.write_bytes(content[:-1])
    assert call(packages, tmp_path / "out", "--more") == 2
    assert state(tmp_path / "out") == before
    later.write_bytes(content)
    assert call(packages, tmp_path / "out") == 0
    assert state(tmp_path / "out")["libraries"][TENSORRT]["verified"]


def test_each_call_adds_chunks_and_later_tasks_start(
    tmp_path: Path, started: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    packages, store = write_packages(tmp_path / "packages", chunks=3), tmp_path / "store"
    store.mkdir()
    for path in sorted((packages / TENSORRT).glob("*.bin"))[1:]:
        path.rename(store / path.name)
    output, results = tmp_path / "out", tmp_path / "results"
    assert call(packages, output, "--more", "--used", "90", "--results", str(results)) == 0
    assert f"next: bring {TENSORRT}/chunk_001.bin {TENSORRT}/chunk_002.bin" in capsys.readouterr().out
    assert started["tasks"] == ["prepare", "cuda"]
    for number in (1, 2):
        # The machine holds nothing of an earlier call's packages but what was unpacked.
        for path in (packages / TENSORRT).glob("*.bin"):
            path.unlink()
        (store / f"chunk_{number:03d}.bin").rename(packages / TENSORRT / f"chunk_{number:03d}.bin")
        assert call(packages, output, "--more", "--results", str(results)) == 0
    content = state(output)
    assert content["plan_b"] == ""
    assert content["libraries"][TENSORRT]["unpacked"] == [f"chunk_{number:03d}.bin" for number in range(3)]
    assert started["tasks"][:5] == ["prepare", "cuda", "builder", "engine", "engine answers and bar"]
    assert len(started["tasks"]) == len(set(started["tasks"]))
    assert {entry["outcome"] for entry in content["tasks"].values()} == {"done"}
    assert [bool(entry["ended"]) for entry in content["calls"]] == [True] * 3
    # What TensorRT needs is visible to its own tasks.
    assert str(output / "libraries" / TENSORRT / "site") in started["environments"]["engine"][1]["PYTHONPATH"]
    assert str(output / "libraries" / TENSORRT) not in started["environments"]["torch speed"][1]["PYTHONPATH"]
    assert {path.name for path in results.iterdir()} == {"report.json", "report.md", "lease.json"}
    # Nothing is left, and nothing is done again.
    assert call(packages, output, "--results", str(results)) == 0
    assert len(started["tasks"]) == len(set(started["tasks"]))


def test_background_task_finished_between_calls_is_done(tmp_path: Path, started: dict[str, Any]) -> None:
    packages, output = write_packages(tmp_path / "packages", chunks=2), tmp_path / "out"
    last = packages / TENSORRT / "chunk_001.bin"
    content = last.read_bytes()
    last.unlink()
    started["seconds"]["prepare"] = 1.5
    assert call(packages, output, "--more") == 0
    assert state(output)["tasks"]["prepare"]["outcome"] is None
    while not (output / "prepare.json").is_file():
        time.sleep(0.02)
    last.write_bytes(content)
    assert call(packages, output) == 0
    entry = state(output)["tasks"]["prepare"]
    assert entry["outcome"] == "done"
    assert entry["seconds"] == pytest.approx((output / "prepare.json").stat().st_mtime - entry["began"], abs=0.1)


def test_killed_call_resumes_unfinished_tasks(tmp_path: Path, started: dict[str, Any]) -> None:
    packages, output = write_packages(tmp_path / "packages", chunks=1), tmp_path / "out"
    assert call(packages, output) == 0
    content = state(output)
    # As when the machine's call ended in the middle of a task.
    content["tasks"]["int8"].update(outcome=None)
    del content["tasks"]["faults"]
    content["calls"][-1]["ended"] = None
    (output / "lease.json").write_text(json.dumps(content))
    started["tasks"].clear()
    assert call(packages, output) == 0
    assert started["tasks"] == ["int8", "faults"]
    assert state(output)["tasks"]["int8"]["tries"] == 2


def test_failed_tensorrt_builder_selects_plan_b(tmp_path: Path, started: dict[str, Any]) -> None:
    packages, output = write_packages(tmp_path / "packages", chunks=1), tmp_path / "out"
    started["outcomes"]["builder"] = "failed"
    # A step failed, which is the exit code's business, and the rest goes on.
    assert call(packages, output) == 1
    assert state(output)["plan_b"]
    assert started["tasks"][3:6] == ["torch answers", "torch speed", "losses"]
    assert "engine" not in started["tasks"]


def no_chunks(packages: Path) -> None:
    shutil.rmtree(packages / TENSORRT)


def wrong_hash(packages: Path) -> None:
    manifest = packages / TENSORRT / "manifest.json"
    content = json.loads(manifest.read_text())
    content["files"]["site/made_up_library/part_0.py"]["sha256"] = "0" * 64
    manifest.write_text(json.dumps(content))


def other_python(packages: Path) -> None:
    write_chunks(packages / TENSORRT, 2, "export PYTHONHOME={dest}  # then {dest}/bin/python3.9")


@pytest.mark.parametrize(
    ("change", "reason"), [(no_chunks, ""), (wrong_hash, "1 bad"), (other_python, "wheels for Python 3.9")]
)
def test_unusable_library_selects_plan_b(
    change: Callable[[Path], None], reason: str, tmp_path: Path, started: dict[str, Any]
) -> None:
    packages = write_packages(tmp_path / "packages", chunks=2)
    change(packages)
    assert call(packages, tmp_path / "out") == 0
    plan_b = state(tmp_path / "out")["plan_b"]
    assert plan_b
    assert reason in plan_b
    assert "torch speed" in started["tasks"]
    assert "builder" not in started["tasks"]


def test_broken_engine_task_still_runs_answers_and_int8(tmp_path: Path, started: dict[str, Any]) -> None:
    packages, output = write_packages(tmp_path / "packages", chunks=1), tmp_path / "out"
    started["outcomes"]["engine"] = "broken"
    assert call(packages, output) == 1
    assert "engine answers and bar" in started["tasks"]
    assert "int8" in started["tasks"]


def test_hanging_task_is_stopped(tmp_path: Path, started: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    short = dataclasses.replace(lease.CUDA, expected_s=0.5, max_s=1.0)
    monkeypatch.setitem(lease.TASKS, "B", (lease.WHEELS, short))
    started["seconds"]["cuda"] = 60.0
    began = time.monotonic()
    assert call(write_packages(tmp_path / "packages"), tmp_path / "out") == 0
    assert time.monotonic() - began < 30
    assert state(tmp_path / "out")["tasks"]["cuda"]["outcome"] == "failed"


def test_lease_with_other_options_or_bad_json_is_rejected(
    tmp_path: Path, started: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    packages = write_packages(tmp_path / "packages")
    assert call(packages, tmp_path / "out") == 0
    before = state(tmp_path / "out")
    assert gpu_lease.main(["--packages", str(packages), "--output", str(tmp_path / "out"), "--device", "cpu"]) == 2
    (tmp_path / "out" / "lease.json").write_text("{")
    assert call(packages, tmp_path / "out") == 2
    assert capsys.readouterr().err.count("error: ") == 2
    assert before["settings"]["small"]


def test_write_archive_drops_oldest_files_over_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease_run, "MAX_ARCHIVE_BYTES", 1000)
    (tmp_path / "logs").mkdir()
    for number, size in enumerate((600, 600, 300)):
        path = tmp_path / "logs" / f"{number}.log"
        path.write_bytes(b"x" * size)
        os.utime(path, (1e9 + number, 1e9 + number))
    write_archive(tmp_path / "logs.zip", tmp_path, ("logs/*.log",))
    with zipfile.ZipFile(tmp_path / "logs.zip") as archive:
        assert archive.namelist() == ["logs/2.log", "logs/1.log"]
    write_archive(tmp_path / "none.zip", tmp_path, ("absent/*",))
    assert not (tmp_path / "none.zip").exists()


def test_layers_of_every_engine_are_archived(tmp_path: Path) -> None:
    job = Job(tmp_path, "cuda", small=True)
    variants = ("", engines.DEFAULT_EFFORT, engines.COMPUTED_ONLY)
    plans = {
        engines.engine_path(job, target, "int8", split=True, variant=variant)
        for target in ("tensorrt", "tensorrt-rtx")
        for variant in variants
    }
    for plan in plans:
        plan.parent.mkdir()
        layers_path(plan).write_bytes(b"layers")
    write_archive(tmp_path / "layers.zip", tmp_path, lease_run.ARCHIVES["layers.zip"])
    with zipfile.ZipFile(tmp_path / "layers.zip") as archive:
        assert set(archive.namelist()) == {layers_path(plan).relative_to(tmp_path).as_posix() for plan in plans}


def test_check_and_dry_run_print_packages_and_schedule(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    packages = write_packages(tmp_path / "packages", chunks=9)
    assert gpu_lease.main(["--packages", str(packages), "--check"]) == 0
    assert TENSORRT in capsys.readouterr().out
    assert gpu_lease.main(["--packages", str(packages), "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.endswith("int8") for line in lines)


def test_cuda_leg_runs_with_numpy_as_only_package(tmp_path: Path) -> None:
    blocked = ("nltk", "tyro", "tqdm", "torch", "onnx", "onnxruntime", "matplotlib", "tensorrt", "regex")
    blocker = (
        "import importlib.machinery as machinery\nfind = machinery.PathFinder.find_spec\n"
        "def find_spec(name, path=None, target=None):\n"
        f"    return None if name.split('.')[0] in {blocked!r} else find(name, path, target)\n"
        "machinery.PathFinder.find_spec = find_spec\n"
    )
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(blocker)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site"), "PYTHON": sys.executable}
    line = [ROOT / "benchmarks" / "gpu.sh", "cuda", "--output", tmp_path / "out", *REHEARSE, "--stand-in"]
    result = subprocess.run(line, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    steps = {step["name"]: step for step in json.loads((tmp_path / "out" / "cuda.json").read_text())["steps"]}
    assert [name for name, step in steps.items() if step["outcome"] != "kept"] == ["driver", "torch on the same device"]
    assert "CUDA_ERROR_OUT_OF_MEMORY" in steps["out of memory"]["told"]
    assert "900" in steps["capture broken by a wait"]["told"]
    assert "DeviceError" in steps["fork"]["told"]


def test_short_lease_runs_cuda_task_and_writes_report(tmp_path: Path) -> None:
    packages, results = write_packages(tmp_path / "packages"), tmp_path / "results"
    environment = {**os.environ, "PYTHON": sys.executable}
    line = [ROOT / "benchmarks" / "gpu_lease.sh", "--packages", packages, "--output", tmp_path / "out"]
    line += ["--results", results, "--minutes", "1.7", *REHEARSE]
    result = subprocess.run(line, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr + result.stdout
    assert list(state(tmp_path / "out")["tasks"]) == ["wheels", "cuda"]
    assert (tmp_path / "out" / f"site-{sys.version_info[0]}.{sys.version_info[1]}" / "made_up_wheel.py").is_file()
    assert "| graph of copies | kept |" in (results / "report.md").read_text()
    assert (results / "logs.zip").is_file()
    assert "give the machine back" in result.stdout
