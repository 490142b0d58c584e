"""Run the GPU acceptance leg by leg: `benchmarks/gpu.sh`.

Each leg runs in its own process, writes LEG.json after each step, and resumes from it if it was cut off. The results of
all legs are written to gpu-DATE-NAME.json and .md, for benchmarks/results/.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib
import importlib.metadata
import importlib.util
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.acceptance.run_config import ROOT, Job
from benchmarks.acceptance.step_log import Leg, OutOfTime, Skip, gather, kept, read_leg, record_crash, verdict
from runtime.core import cpu_info
from runtime.core.errors import GroundingError
from runtime.core.gpu_info import cuda_gpu, selected_gpu
from runtime.core.io.atomic_files import check_writable, write_text
from runtime.core.packages import installed_version

log = logging.getLogger("drn")

# Leg to the module with its `run(job, leg)`. `prepare` creates the inputs of the others.
MODULES = {
    "prepare": "leg_prepare",
    "cuda": "leg_cuda",
    "torch": "leg_torch",
    "ort-cuda": "leg_onnxruntime",
    "tensorrt": "leg_tensorrt",
}
LEGS = tuple(MODULES)[1:]
# Required by every leg but `cuda`. nltk requires regex, which is compiled for one version of Python.
NEEDED = ("numpy", "tqdm", "nltk", "tyro")
# Legs, and steps of other legs, that do not use the results of `prepare`.
UNPREPARED = ("cuda",)
UNPREPARED_STEPS = {"tensorrt": ("builder",)}
NEEDED_UNPREPARED = ("numpy",)
# Legs that need a GPU, and whose libraries have doubles.
STAND_IN_LEGS, STAND_IN_MODULE = ("cuda", "tensorrt"), "benchmarks.acceptance.fake_gpu"
# A leg must end within ten minutes, including the results that it writes.
LEG_SECONDS, GRACE_SECONDS = 570.0, 20.0


def parse(words: Sequence[str] | None = None) -> tuple[Job, argparse.Namespace]:
    """Return the job that the command line describes, and the other options."""
    parser = argparse.ArgumentParser(
        prog="benchmarks/gpu.sh",
        description="Acceptance on a CUDA GPU, with whichever of torch, onnxruntime-gpu, TensorRT and TensorRT-RTX can "
        "be imported. Each leg ends within ten minutes and writes LEG.json; repeat the command to resume a leg that "
        "was cut off. Exit code 0: every leg that ran passed; 1: one failed; 2: nothing could run.",
    )
    parser.add_argument("legs", nargs="*", metavar="LEG", help=f"{', '.join(MODULES)}. Default: all")
    parser.add_argument("--output", type=Path, required=True, help="directory of inputs and results")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: rehearse on the CPU")
    parser.add_argument("--small", action="store_true", help="rehearse with a tiny network")
    parser.add_argument("--limit", type=float, default=LEG_SECONDS, help="maximum seconds per leg")
    parser.add_argument(
        "--order",
        choices=("full", "lease"),
        default="full",
        help="lease: for a machine that is available for minutes; engines are built without a data set, INT8 with a "
        "fixed calibration method, and each timing is shorter (see benchmarks/gpu_lease.sh)",
    )
    parser.add_argument("--step", nargs="+", default=[], help="run only these steps of the leg")
    parser.add_argument("--stand-in", action="store_true", help="rehearse cuda and tensorrt on test doubles")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args(words)
    return Job(given.output.resolve(), given.device, given.small, given.order, given.stand_in), given


def main(words: Sequence[str] | None = None) -> int:
    """Run legs and return the exit code: 0 if every leg that ran passed, 1 if one failed, 2 if nothing could run."""
    job, given = parse(words)
    logging.basicConfig(format="%(message)s", level=logging.WARNING, stream=sys.stderr)
    log.setLevel(logging.INFO)
    unknown = [leg for leg in given.legs if leg not in MODULES]
    if unknown:
        return _refuse(f"Expected a leg out of {', '.join(MODULES)}, got {unknown[0]!r}.")
    if given.step and len(given.legs) != 1:
        return _refuse(f"Expected one leg with --step, got {len(given.legs)}. Pass one leg.")
    if job.stand_in and job.device != "cpu":
        return _refuse("--stand-in is for rehearsals. Pass --device cpu too.")
    if given.inside:
        run_inside(job, given.legs[0], given.limit, given.step)
        return 0
    needed = NEEDED_UNPREPARED if given.legs and set(given.legs) <= set(UNPREPARED) else NEEDED
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        return _refuse(
            f"{', '.join(missing)} cannot be imported; {', '.join(needed)} are required. Copy their wheels to this "
            "machine, and add them to PYTHONPATH."
        )
    if job.device == "cuda" and cuda_gpu() is None:
        return _refuse("CUDA finds no GPU. Pass --device cpu --small to rehearse without one.")
    try:
        check_writable(job.output / "torch.json")
        return _run_legs(job, given.legs or LEGS, given.limit, given.step)
    except GroundingError as error:
        return _refuse(str(error))
    except KeyboardInterrupt:
        print("Interrupted. Results are saved; repeat the command to continue.", file=sys.stderr)
        return 130


def _refuse(sentence: str) -> int:
    print(f"error: {sentence}", file=sys.stderr)
    return 2


def _run_legs(job: Job, names: Sequence[str], limit: float, steps: Sequence[str]) -> int:
    """Run legs, `prepare` first if they need it, write the report, and return the exit code."""
    legs = [leg for leg in dict.fromkeys(names) if leg != "prepare"]
    environment = _environment(job)
    ran: list[str] = []
    # With --step, `prepare` may already run in the background.
    implied = not steps and not set(legs) <= set(UNPREPARED) and not _prepared(job)
    if "prepare" in names or implied:
        _run_leg(job, "prepare", limit, environment)
        ran.append("prepare")
    for leg in legs:
        if _needs_nothing(leg, steps) or _prepared(job):
            _run_leg(job, leg, limit, environment, steps)
        else:
            _leg(job, leg).end("skipped", "The leg `prepare`, which creates its inputs, failed.")
        ran.append(leg)
    contents = [read_leg(job.results(leg)) for leg in ran]
    report = write_report(job)
    print()
    for leg, content in zip(ran, contents):
        print(f"{leg:<10} {verdict(content)}")
    print(*report, sep="\n")
    # A successful `prepare` alone is no acceptance.
    tried = [c for c in contents if c["state"] != "skipped" and (c["leg"] != "prepare" or not kept(c) or not legs)]
    if not tried:
        return 2
    return 0 if all(map(kept, tried)) else 1


def _needs_nothing(leg: str, steps: Sequence[str]) -> bool:
    """Return whether a leg, or its chosen steps, do not use the results of `prepare`."""
    return leg in UNPREPARED or (bool(steps) and set(steps) <= set(UNPREPARED_STEPS.get(leg, ())))


def write_report(job: Job, about: Mapping[str, Any] | None = None) -> tuple[Path, Path]:
    """Write the results of all legs of a job to a JSON file and a Markdown report.

    Args:
        job: the job.
        about: result of `about_machine`. Default: call it.

    Returns:
        The paths of both files.
    """
    return gather(job.output, tuple(MODULES), about or about_machine(job), _name(job))


def _prepared(job: Job) -> bool:
    """Return whether `prepare` has run for a job of the same size, on any device."""
    path = job.results("prepare")
    if not path.is_file() or not all(file.is_file() for file in (job.checkpoint, job.graph, job.query_graph)):
        return False
    content = read_leg(path)
    settings = content["about"]["settings"]
    return kept(content) and (settings["small"], settings.get("order", "full")) == (job.small, job.order)


def _run_leg(job: Job, leg: str, limit: float, environment: Mapping[str, str], steps: Sequence[str] = ()) -> None:
    """Run a leg in its own process, and again after a step in which the process crashes."""
    print(f"\n== {leg}", file=sys.stderr, flush=True)
    deadline = time.time() + limit
    path = job.results(leg)
    while True:
        module = STAND_IN_MODULE if job.stand_in and leg in STAND_IN_LEGS else "benchmarks.gpu"
        words = [sys.executable, "-m", module, leg, *job.flags(), "--inside"]
        words += ["--limit", str(max(deadline - time.time(), 0)), *(["--step", *steps] if steps else [])]
        # In a new process group, so that its child processes can be killed.
        with subprocess.Popen(words, env=environment, cwd=ROOT, start_new_session=True) as process:
            try:
                code = process.wait(max(deadline - time.time(), 0) + GRACE_SECONDS)
            except BaseException as error:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                if isinstance(error, subprocess.TimeoutExpired):
                    log.warning("%s was stopped after %.0f s; its results are saved.", leg, limit)
                    return
                raise
        if not path.is_file():
            _leg(job, leg).end("unfinished", f"Its process ended with code {code} before its first step.")
        if not code or not record_crash(path, code):
            return
        log.warning("%s: the process ended with code %d; continuing with the next step.", leg, code)


def _environment(job: Job) -> dict[str, str]:
    """Return environment variables with which legs can import the checkout and open `.pt` files.

    The package is not installed in a plain checkout, so that the entry point for `.pt` is written here.
    """
    paths = [str(ROOT)]
    installed = (entry.group for known in importlib.metadata.distributions() for entry in known.entry_points)
    if importlib.util.find_spec("torch") and "drn.backends" not in installed:
        # Not available in Python 3.9, for which there is no supported torch.
        import tomllib

        project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
        about = job.output / "installed" / f"drn_deploy-{project['version']}.dist-info"
        write_text(
            about / "METADATA", f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n"
        )
        lines = [f"{name} = {target}" for name, target in project["entry-points"]["drn.backends"].items()]
        write_text(about / "entry_points.txt", "\n".join(["[drn.backends]", *lines, ""]))
        paths.append(str(about.parent))
    if os.environ.get("PYTHONPATH"):
        paths.append(os.environ["PYTHONPATH"])
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}


def about_machine(job: Job) -> dict[str, Any]:
    """Return GPU, CPU and versions, for the report."""
    gpu = selected_gpu() if job.device == "cuda" else None
    summary = f"{cpu_info.cpu_name()}, {cpu_info.cores()} cores"
    if gpu:
        summary = f"{gpu.name}, driver {gpu.driver}, {summary}"
    about: dict[str, Any] = {"told": f"{summary},", "versions": _versions(), "gpu": gpu and dataclasses.asdict(gpu)}
    if job.rehearsal:
        about["note"] = "A rehearsal: it only shows that the command runs, and no results of a GPU."
    return about


def _versions() -> dict[str, str]:
    libraries = ("torch", "onnxruntime", "onnxruntime-gpu", "onnx", "numpy")
    names = (*libraries, "tensorrt", "tensorrt-cu12", "tensorrt-cu13", "tensorrt-rtx-cu12", "tensorrt-rtx-cu13")
    versions = {"python": sys.version.split()[0]}
    versions.update((name, version) for name in names if (version := installed_version(name)))
    return versions


def _name(job: Job) -> str:
    gpu = selected_gpu() if job.device == "cuda" else None
    name = gpu.name if gpu else job.device
    return f"rehearsal {name}" if job.rehearsal else name


def _leg(job: Job, leg: str, deadline: float | None = None, steps: Sequence[str] = ()) -> Leg:
    about = {"command": job.command(leg), "settings": job.settings(), "machine": about_machine(job)}
    return Leg(job.results(leg), leg, about, deadline, steps)


def run_inside(job: Job, name: str, limit: float, steps: Sequence[str] = ()) -> None:
    """Run a leg in this process, or the chosen steps of it."""
    # What a shell starts in the background ignores Ctrl-C, by which commands that take too long are ended.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    leg = _leg(job, name, time.time() + limit, steps)
    module = importlib.import_module(f"benchmarks.acceptance.{MODULES[name]}")
    try:
        module.run(job, leg)
    except Skip as reason:
        leg.end("skipped", str(reason))
    except OutOfTime:
        leg.end("unfinished", "The time limit passed before its last step. Repeat the command to continue.")
    else:
        leg.end("chosen" if steps else "finished")


if __name__ == "__main__":
    sys.exit(main())
