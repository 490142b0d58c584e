"""Execute the decisions of `benchmarks.acceptance.lease`, and store the state of a lease in OUTPUT/lease.json."""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import json
import logging
import os
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import gpu
from benchmarks.acceptance.lease import (
    ORT_GPU,
    PREPARE,
    TASKS,
    TENSORRT,
    WHEELS,
    Decision,
    Limits,
    Outcome,
    Situation,
    Start,
    Stop,
    Task,
    Unpack,
    Verify,
    decide,
)
from benchmarks.acceptance.packages import (
    ChunkedLibrary,
    check_present,
    current_python,
    environment,
    install,
    libraries,
    normalized,
    unpack,
    wheels,
)
from benchmarks.acceptance.run_config import ROOT, Job
from benchmarks.acceptance.step_log import BAD, kept, read_leg
from runtime.core.errors import GroundingError
from runtime.core.io.atomic_files import atomic_write, write_json, write_text
from runtime.core.io.input_files import read_json

log = logging.getLogger("drn")

FORMAT = "drn-lease/1"
# Seconds that a process has to end after SIGINT; a part of CLOSING_S.
END_SECONDS = 5.0
POLL_SECONDS = 0.5
# Such machines return few files of limited size, so that large ones are archived.
MAX_ARCHIVE_BYTES = 15 << 20
ARCHIVES = {
    # See `engine_path` for the directories.
    "layers.zip": ("tensorrt*/*.layers.json.gz", "tensorrt*/*.engine.json"),
    "logs.zip": ("logs/*.log", "benchmark-*.json", "benchmark-*.png", "training.json"),
}
# Outcomes of a step with a result.
USABLE = ("kept", "measured", "broken")


class StateError(GroundingError):
    """The state of an earlier call cannot be used."""

    code = "invalid_lease_state"


class Lease:
    """A lease: its state on disk, and the processes of this call.

    Attributes:
        job: job of `benchmarks.gpu`; the state is in its output directory.
        limits: maximum seconds of the lease and of this call.
        more: whether later calls bring more chunks.
        libraries: libraries in chunks, by name.
    """

    def __init__(
        self, job: Job, limits: Limits, used_s: float | None, more: bool, packages: Path | None, results: Path | None
    ) -> None:
        self.job, self.limits, self.more, self.packages, self.results = job, limits, more, packages, results
        self.path = job.output / "lease.json"
        self.began = time.time()
        self.content = self._load(used_s)
        self.libraries = self._libraries()
        self._background: dict[str, subprocess.Popen[bytes]] = {}
        self._about: Mapping[str, Any] | None = None
        self._mirrored = 0.0

    def _load(self, used_s: float | None) -> dict[str, Any]:
        """Return the state of earlier calls, or a new one."""
        settings = self.job.settings()
        if not self.path.is_file():
            return {
                "format": FORMAT, "settings": settings, "began": self.began, "used_before_s": used_s or 0.0,
                "plan_b": "", "calls": [], "libraries": {}, "tasks": {}, "log": [],
            }  # fmt: skip
        content = read_json(self.path, "state of a lease", StateError)
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise StateError(f"{self.path} is not the state of a lease. Pass another --output.")
        if content["settings"] != settings:
            raise StateError(
                f"{self.path} was started with {json.dumps(content['settings'])}. Pass the same --device and --small, "
                "or another --output."
            )
        if used_s is not None:
            content["used_before_s"] = used_s - (self.began - content["began"])
        for name, entry in content["tasks"].items():
            # The call was killed.
            if entry["outcome"] is None and name != PREPARE.name:
                entry["outcome"] = "cut off"
        return content

    def _libraries(self) -> dict[str, ChunkedLibrary]:
        """Return the libraries whose chunks arrived with this call or earlier ones, after checking new chunks."""
        known = {library.name: library for library in libraries(self.packages)} if self.packages else {}
        for name, entry in self.content["libraries"].items():
            folder = (self.packages or self.job.output) / name
            known.setdefault(name, ChunkedLibrary(name, folder, entry["sha256"], entry["use"]))
        return known

    def check(self) -> None:
        """Raise GroundingError if packages that this call needs are missing."""
        python = current_python()
        if self.packages is not None and not self.site(python).is_dir():
            wheels(self.packages, python)
        library = self.libraries.get(TENSORRT)
        if library and not self.more and not self.content["plan_b"]:
            check_present(library, self._unpacked(TENSORRT))

    def begin(self) -> None:
        """Record the start of a call."""
        for name, library in self.libraries.items():
            entry = self.content["libraries"].setdefault(name, {"unpacked": [], "verified": False, "failed": ""})
            entry.update(sha256=dict(library.sha256), use=library.use)
        self.content["calls"].append({"began": self.began, "ended": None})
        self.save()

    def save(self) -> None:
        """Write the state."""
        write_json(self.path, self.content)

    @property
    def used_s(self) -> float:
        """Seconds of the lease so far."""
        return self.content["used_before_s"] + time.time() - self.content["began"]

    def site(self, python: str) -> Path:
        """Return the directory of the unpacked wheels for a version of Python."""
        return self.job.output / f"site-{python}"

    def unpacked(self, library: str) -> Path:
        """Return the directory of the unpacked chunks of a library."""
        return self.job.output / "libraries" / library

    def _unpacked(self, library: str) -> list[str]:
        return list(self.content["libraries"].get(library, {}).get("unpacked", ()))

    def situation(self) -> Situation:
        """Return the input of the next decision."""
        entries = self.content["libraries"]
        calls = self.content["calls"]
        tasks = self.content["tasks"]
        return Situation(
            used_s=self.used_s,
            call_used_s=time.time() - self.began,
            outcomes={name: entry["outcome"] for name, entry in tasks.items() if entry["outcome"]},
            tries={name: entry["tries"] for name, entry in tasks.items()},
            running=frozenset(name for name, entry in tasks.items() if not entry["outcome"]),
            importable=self._importable(),
            chunks={
                name: library.chunks(entries[name]["unpacked"], entries[name]["verified"], entries[name]["failed"])
                for name, library in self.libraries.items()
            },
            transfers_s=[
                after["began"] - calls[number]["ended"]
                for number, after in enumerate(calls[1:])
                if calls[number]["ended"]
            ],
            more=self.more,
            plan_b=self.content["plan_b"],
        )

    def _importable(self) -> frozenset[str]:
        if self.job.device == "cpu":
            # A rehearsal uses ONNX Runtime on the CPU, and the double of TensorRT if chunks represent it.
            return frozenset([ORT_GPU] if importlib.util.find_spec("onnxruntime") else [])
        names = [TENSORRT] if importlib.util.find_spec("tensorrt") else []
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            importlib.metadata.version("onnxruntime-gpu")
            names.append(ORT_GPU)
        return frozenset(names)

    def run(self) -> Stop:
        """Execute decisions until one ends this call."""
        while True:
            self._look_after_background()
            self._install_beside()
            decision = decide(self.situation(), self.limits)
            self._note_plan(decision)
            action = decision.action
            if isinstance(action, Stop):
                if not action.again:
                    self._end_background()
                return action
            if isinstance(action, Start):
                self._start(action)
            elif isinstance(action, Unpack):
                self._unpack(action)
            elif isinstance(action, Verify):
                self._verify(action)
            else:
                time.sleep(POLL_SECONDS)
                self.mirror()
                continue
            self.save()
            self.mirror(now=True)

    def _note_plan(self, decision: Decision) -> None:
        if decision.plan_b and not self.content["plan_b"]:
            self.content["plan_b"] = decision.plan_b
            self.say(f"plan B, torch only: {decision.plan_b}")
            self.save()

    def say(self, text: str) -> None:
        """Print and record a line with the time of the lease."""
        minutes, seconds = divmod(int(self.used_s), 60)
        line = f"[{minutes:2d}:{seconds:02d}] {text}"
        self.content["log"].append(line)
        print(line, flush=True)

    def _start(self, action: Start) -> None:
        task = action.task
        entry = self.content["tasks"].setdefault(task.name, {"tries": 0})
        entry.update(tries=entry["tries"] + 1, outcome=None, began=time.time(), limit_s=action.limit_s)
        self.say(f"{task.name}: at most {action.limit_s:.0f} s{', in the background' if task.background else ''}")
        self.save()
        if task is WHEELS:
            outcome: Outcome = self._install_wheels()
        elif task.background:
            self._background[task.name] = self._process(task, action.limit_s)
            entry["pid"] = self._background[task.name].pid
            return
        else:
            outcome = self._run_task(task, action.limit_s)
        self._end_task(task, outcome)

    def _end_task(self, task: Task, outcome: Outcome, ended: float | None = None) -> None:
        entry = self.content["tasks"][task.name]
        entry.update(outcome=outcome, seconds=round((ended or time.time()) - entry["began"], 1))
        self.say(f"{task.name}: {outcome} after {entry['seconds']:.0f} s")

    def _install_wheels(self) -> Outcome:
        if self.packages is not None:
            site = self.site(current_python())
            present = {normalized(known.metadata["Name"] or "") for known in importlib.metadata.distributions()}
            names = install(wheels(self.packages, current_python()), site, present)
            self.say(f"unpacked {', '.join(names) or 'no wheel, because all are installed'}")
        return "done"

    def _install_beside(self) -> None:
        """Unpack the wheels for a Python that comes with a library, if they have arrived."""
        for python in {library.python for library in self.libraries.values()} - {""}:
            if self.packages and not self.site(python).is_dir() and (self.packages / f"wheels-{python}").is_dir():
                install(wheels(self.packages, python), self.site(python), ())

    def _unpack(self, action: Unpack) -> None:
        entry = self.content["libraries"][action.library]
        reason = unpack(
            self.libraries[action.library], "add", self.unpacked(action.library), action.chunk, action.limit_s
        )
        if reason:
            entry["failed"] = reason
        else:
            entry["unpacked"].append(action.chunk)
        self.say(reason or f"unpacked {action.library}/{action.chunk}")

    def _verify(self, action: Verify) -> None:
        library = self.libraries[action.library]
        entry = self.content["libraries"][action.library]
        reason = unpack(library, "verify", self.unpacked(action.library), limit_s=action.limit_s)
        if not reason and library.python and not self.site(library.python).is_dir():
            reason = f"{library.name} needs the wheels for Python {library.python}, which have not arrived"
        entry["failed"], entry["verified"] = reason, not reason
        self.say(reason or f"{action.library} is complete")

    def _command(self, task: Task) -> tuple[list[str], dict[str, str]]:
        """Return the Python and the environment variables of a task."""
        library = self.libraries.get(task.library)
        python, variables, paths = sys.executable, {}, [str(ROOT)]
        if library is not None and self.content["libraries"][library.name]["verified"]:
            variables, own = environment(library, self.unpacked(library.name))
            python = own or python
            # The packages of this Python do not work in another.
            paths += [str(self.site(library.python or current_python())), variables.pop("PYTHONPATH", "")]
            inherited = "" if own else os.environ.get("PYTHONPATH", "")
        else:
            paths.append(str(self.site(current_python())))
            inherited = os.environ.get("PYTHONPATH", "")
        joined = os.pathsep.join(path for path in [*paths, inherited] if path)
        return [python], {**os.environ, **variables, "PYTHONPATH": joined}

    def _process(self, task: Task, limit_s: float) -> subprocess.Popen[bytes]:
        python, variables = self._command(task)
        words = [*python, "-m", "benchmarks.gpu", task.leg, *self.job.flags()]
        words += ["--limit", str(max(limit_s - END_SECONDS, 1)), *(["--step", *task.steps] if task.steps else [])]
        log_file = self.job.output / "logs" / f"lease-{task.name.replace(' ', '-')}.log"
        log_file.parent.mkdir(parents=True, exist_ok=True)
        with open(log_file, "ab") as stream:
            return subprocess.Popen(
                words, cwd=ROOT, env=variables, stdout=stream, stderr=stream, stdin=subprocess.DEVNULL,
                start_new_session=True,
            )  # fmt: skip

    def _run_task(self, task: Task, limit_s: float) -> Outcome:
        process = self._process(task, limit_s)
        deadline = time.time() + limit_s
        try:
            while process.poll() is None and time.time() < deadline:
                time.sleep(POLL_SECONDS)
                self._look_after_background()
                self.mirror()
        finally:
            _end(process)
        return self._outcome(task, limited=limit_s >= task.max_s)

    def _outcome(self, task: Task, limited: bool) -> Outcome:
        """Return the outcome of a task from the results of its leg.

        Args:
            task: a task that has ended.
            limited: whether it used its maximum time, so that it is not repeated.
        """
        path = self.job.results(task.leg)
        try:
            content = read_leg(path)
        except GroundingError:
            return "failed"
        outcomes = {step["name"]: step["outcome"] for step in content["steps"]}
        if content["state"] == "skipped":
            return "failed"
        if not task.steps:
            if content["state"] == "finished":
                return "done" if kept(content) or task is not PREPARE else "failed"
            return "failed" if limited else "cut off"
        first = outcomes.get(task.steps[0])
        if all(name in outcomes for name in task.steps) or limited:
            return "done" if first in USABLE else "failed"
        # The leg has ended, and skipped a step because an earlier one failed.
        if content["state"] == "chosen":
            return "done" if first in USABLE else "failed"
        return "cut off"

    def _look_after_background(self) -> None:
        """Record the background tasks that have ended, and stop those that exceed their time limit."""
        for name, entry in self.content["tasks"].items():
            if entry["outcome"] is not None or "pid" not in entry:
                continue
            process = self._background.get(name)
            alive = process.poll() is None if process else _is_alive(entry["pid"])
            over = time.time() > entry["began"] + entry["limit_s"]
            if alive and not over:
                continue
            if alive:
                _end_group(entry["pid"])
            task = next(task for task in TASKS["A"] if task.name == name)
            # If it ended between two calls, the results have the time of its end.
            results = self.job.results(task.leg)
            ended = results.stat().st_mtime if results.is_file() and not over else None
            self._end_task(task, self._outcome(task, limited=True), ended)
            self.save()

    def _end_background(self) -> None:
        for name, entry in self.content["tasks"].items():
            if entry["outcome"] is None and "pid" in entry:
                _end_group(entry["pid"])
                entry["outcome"] = "cut off"
                self.say(f"{name}: stopped, because no task that waits for it can end in time")

    def mirror(self, now: bool = False) -> None:
        """Write the report, and copy it with the archives to the directory of results, if there are new results."""
        files = [path for leg in gpu.MODULES if (path := self.job.results(leg)).is_file()]
        newest = max((path.stat().st_mtime for path in files), default=0.0)
        if not now and newest <= self._mirrored:
            return
        self._mirrored = newest
        try:
            self._copy_results()
        except GroundingError as error:
            # The lease continues, because the results are also in the output directory.
            log.warning("The results were not copied: %s", error)

    def _copy_results(self) -> None:
        self._about = self._about or gpu.about_machine(self.job)
        report = gpu.write_report(self.job, self._about)
        if self.results is None:
            return
        for source, name in zip((*report, self.path), ("report.json", "report.md", "lease.json")):
            write_text(self.results / name, source.read_text(encoding="utf-8"))
        for name, patterns in ARCHIVES.items():
            write_archive(self.results / name, self.job.output, patterns)

    @property
    def has_kept(self) -> bool:
        """Whether no step of any leg is broken or failed."""
        contents = [read_leg(path) for leg in gpu.MODULES if (path := self.job.results(leg)).is_file()]
        return not any(step["outcome"] in BAD for content in contents for step in content["steps"])


def write_archive(path: Path, root: Path, patterns: Sequence[str]) -> None:
    """Write the files below `root` that match to a zip file, newest first, up to `MAX_ARCHIVE_BYTES`."""
    files = [file for pattern in patterns for file in root.glob(pattern)]
    if not files:
        return
    left = MAX_ARCHIVE_BYTES
    with atomic_write(path) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in sorted(files, key=lambda file: -file.stat().st_mtime):
            size = file.stat().st_size
            if size <= left:
                archive.write(file, file.relative_to(root))
                left -= size


def _is_alive(pid: int) -> bool:
    """Return whether a process that an earlier call started is running; another process may have its number."""
    try:
        return b"benchmarks.gpu" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


def _end(process: subprocess.Popen[bytes]) -> None:
    """Stop a process with SIGINT, so that it stops its child processes; after `END_SECONDS`, with SIGKILL."""
    if process.poll() is None:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _end_group(pid: int) -> None:
    """Stop a background process of this call or of an earlier one."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGINT)
        deadline = time.time() + END_SECONDS
        while time.time() < deadline and _is_running(pid):
            time.sleep(0.1)
        if _is_running(pid):
            os.kill(pid, signal.SIGKILL)


def _is_running(pid: int) -> bool:
    with contextlib.suppress(ChildProcessError):
        # A child process exists until it is waited for.
        if os.waitpid(pid, os.WNOHANG)[0] == pid:
            return False
    return Path(f"/proc/{pid}").exists()
