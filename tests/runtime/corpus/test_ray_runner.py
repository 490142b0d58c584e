"""A Ray cluster writes the same bytes as one process, even if processes are killed."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from runtime.core.pooling import ClipTiming
from runtime.core.video import Video
from runtime.corpus.feature_sources import open_source
from runtime.corpus.job import ground
from runtime.corpus.sharding import Settings
from runtime.corpus.worker import MAX_ATTEMPTS
from runtime.ground_corpus import ground_corpus
from tests.processes import free_port, heed_ctrl_c
from tests.raising import check_error, quotes
from tests.runtime.corpus.conftest import content, write_rows

pytest.importorskip("ray.data", reason="Ray needs the extra [corpus]")

ROOT = Path(__file__).parents[3]
# Timeout for events that should take seconds.
LONGEST_SECONDS = 300
SETTINGS = Settings(shard_pairs=120)


@dataclasses.dataclass(frozen=True)
class Inputs:
    """A corpus of a few seconds with pairs that fail, and its content when grounded in one process."""

    model: Path
    features: Path
    queries: Path
    expected: dict[str, bytes]

    def words(self, output: Path, *more: object, shard_pairs: int = SETTINGS.shard_pairs) -> list[str]:
        inputs = ("--model", self.model, "--features", self.features, "--queries", self.queries, "--output", output)
        return list(map(str, (*inputs, "--shard-pairs", shard_pairs, *more)))

    def ground_here(self, output: Path) -> None:
        ground(self.model, self.features, self.queries, output, SETTINGS, actors=0)


@pytest.fixture(scope="module")
def inputs(tiny_model: Path, golden: Path, tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    directory = tmp_path_factory.mktemp("inputs")
    features = shutil.copytree(golden / "mini", directory / "mini")
    (features / "C3D_unit16_overlap0.5_merged" / "CCCC3.pt").write_bytes(b"no tensor")
    sentences = [{"query": f"a person opens the {'door ' * (n % 9)}"} for n in range(600)]
    queries = write_rows(directory / "queries.jsonl", [*sentences, {"query": "xyzzy"}, {"query": "dog", "vid": "none"}])
    Inputs(tiny_model, features, queries, {}).ground_here(directory / "expected")
    return Inputs(tiny_model, features, queries, content(directory / "expected"))


def environment(directory: Path) -> dict[str, str]:
    """Return the environment of a process that uses Ray with its files in a directory, on loopback only."""
    others = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    alone = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_USAGE_STATS_ENABLED": "0", "RAY_TMPDIR": str(directory)}
    # By default workers have a niceness of 15, and take minutes to start on a busy machine.
    usual = {"RAY_worker_niceness": "0", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    return {**others, **alone, **usual}


@pytest.fixture(scope="module")
def ray_directory() -> Iterator[Path]:
    """A directory for Ray's files. Its path is short, because it contains sockets."""
    directory = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))
    yield directory
    shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture(scope="module")
def cluster(ray_directory: Path) -> Iterator[Path]:
    """The directory of a cluster from `ray start`, for `--address auto`."""
    words = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", f"--port={free_port()}"]
    words += ["--node-ip-address=127.0.0.1", "--include-dashboard=false", "--num-cpus=2"]
    # Each of these two processes takes a second to start, and no test needs them.
    words += ["--no-monitor", "--include-log-monitor=false"]
    words += [f"--object-store-memory={1 << 27}"]
    log = ray_directory / "start.log"
    with open(log, "w") as stream:
        process = subprocess.Popen(
            words, env=environment(ray_directory), stdout=stream, stderr=stream, start_new_session=True
        )
    try:
        wait(lambda: "block forever" in log.read_text() or process.poll() is not None)
        assert process.poll() is None, log.read_text()
        yield ray_directory
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(LONGEST_SECONDS)
        wait(lambda: not rays(ray_directory))


def started(words: list[str], directory: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "runtime.ground_corpus", *words],
        env=environment(directory),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=heed_ctrl_c,
    )


def rays(directory: Path) -> list[int]:
    """Return all processes of a Ray with its files in a directory."""
    variable = f"RAY_TMPDIR={directory}\0".encode()
    actual = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if variable in (process / "environ").read_bytes():
                actual.append(int(process.name))
    return actual


def wait(until: Callable[[], Any]) -> Any:
    """Return the first true result of `until`."""
    ends = time.monotonic() + LONGEST_SECONDS
    while not (actual := until()):
        assert time.monotonic() < ends, "it did not happen"
        time.sleep(0.002)
    return actual


def begun(output: Path, times: int) -> list[int]:
    """Return the processes of incomplete shards with a given number of attempts."""
    actual = []
    for note in output.glob(".attempts/*"):
        if any(output.glob(f"shard-{note.name}-of-*")):
            continue
        with contextlib.suppress(FileNotFoundError):
            processes = re.findall(r"process (\d+) on", note.read_text())
            if len(processes) >= times:
                actual.append(int(processes[-1]))
    return actual


def kill_at_work(output: Path, times: int = 1) -> None:
    """Kill a process within a shard: it is stopped before the check that the shard is still incomplete."""
    while True:
        worker = wait(lambda: begun(output, times))[0]
        os.kill(worker, signal.SIGSTOP)
        wait(lambda worker=worker: Path(f"/proc/{worker}/stat").read_text().rpartition(")")[2].split()[0] == "T")
        if worker in begun(output, times):
            os.kill(worker, signal.SIGKILL)
            return
        os.kill(worker, signal.SIGCONT)


def modified(output: Path) -> dict[str, int]:
    """Return the modification time of each shard."""
    return {path.name: path.stat().st_mtime_ns for path in output.glob("shard-*")}


def test_interrupted_job_resumes_despite_killed_worker(inputs: Inputs, cluster: Path, tmp_path: Path) -> None:
    for number, code in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
        output = tmp_path / number.name
        job = started(inputs.words(output, "--address", "auto"), cluster)
        wait(lambda output=output: len(modified(output)) > 3)
        job.send_signal(number)
        _, errors = job.communicate(timeout=LONGEST_SECONDS)
        assert job.returncode == code, errors
        assert errors.strip().endswith("nothing half-written was left behind.")
        created = content(output)
        assert 3 < len(created) < len(inputs.expected)
        assert created.items() <= inputs.expected.items()
    before = modified(output)
    job = started(inputs.words(output, "--address", "auto"), cluster)
    kill_at_work(output)
    printed, errors = job.communicate(timeout=LONGEST_SECONDS)
    assert job.returncode == 0, errors
    assert content(output) == inputs.expected
    assert modified(output).items() >= before.items()
    assert re.search(r"Shard \d+ took 2 attempts", errors), errors
    assert quotes(printed, 3607, len(inputs.expected))
    assert "grounded before" in printed


def test_shard_that_kills_every_worker_fails_the_job(inputs: Inputs, cluster: Path, tmp_path: Path) -> None:
    output = tmp_path / "corpus"
    # One shard of all pairs takes so long that every process can be killed within it.
    job = started(inputs.words(output, "--address", "auto", shard_pairs=100_000), cluster)
    for times in range(1, MAX_ATTEMPTS + 1):
        kill_at_work(output, times=times)
    _, errors = job.communicate(timeout=LONGEST_SECONDS)
    assert job.returncode == 2, errors
    assert re.search(
        r"shard-00001-of-00001\.jsonl: The process ended in each of 3 attempts, .*process \d+ on", errors
    ), errors
    assert content(output) == {}


def test_killed_local_ray_job_resumes_from_finished_shards(inputs: Inputs, ray_directory: Path, tmp_path: Path) -> None:
    output, own = tmp_path / "corpus", ray_directory / "own"
    own.mkdir()
    # Ray starts with the job.
    job = started(inputs.words(output, "--actors", 2), own)
    wait(lambda: len(modified(output)) > 5)
    # The job is stopped during the check, or all shards would be complete before the kill.
    os.killpg(job.pid, signal.SIGSTOP)
    processes = rays(own)
    # Without `ss` the listening sockets are not checked.
    listening = subprocess.run(["ss", "-ltnp"], capture_output=True, text=True).stdout if shutil.which("ss") else None
    os.killpg(job.pid, signal.SIGKILL)
    job.communicate(timeout=LONGEST_SECONDS)
    wait(lambda: not rays(own))
    before = modified(output)
    assert 5 < len(before) < len(inputs.expected)
    inputs.ground_here(output)
    assert content(output) == inputs.expected
    assert modified(output).items() >= before.items()
    if listening is not None:
        ours = [line for line in listening.splitlines() if any(f"pid={process}," in line for process in processes)]
        assert ours
        assert all("127.0.0.1" in line for line in ours), ours


def test_missing_ray_cluster_is_reported(
    inputs: Inputs, tmp_path: Path, run_command: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    outcome = run_command(ground_corpus, *inputs.words(tmp_path / "corpus", "--address", "nowhere"), code=2)
    check_error(outcome.error, "ray_failed", "--address nowhere")


def test_tensors_written_by_ray_data_are_read(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet
    from ray.data.extensions import ArrowTensorArray

    for shapes in ([(2, 3), (4, 3)], [(2, 3), (2, 3)]):
        features = [np.full(shape, number, np.float32) for number, shape in enumerate(shapes)]
        columns = {"video": ["a", "b"], "duration": [1.0, 2.0], "features": ArrowTensorArray.from_numpy(features)}
        pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "features.parquet")
        source = open_source(tmp_path)
        for video, expected in zip(source.load(source.listing(), ClipTiming()), features, strict=True):
            assert isinstance(video, Video), video
            np.testing.assert_array_equal(video.features, expected)
