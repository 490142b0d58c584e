"""The GPU acceptance in one command, `benchmarks/gpu.sh`: what must hold on a CUDA GPU, leg by leg.

Every leg is a process of its own, writes LEG.json after each step, and goes on there when it was cut off. A last step
gathers all of them into gpu-DATE-NAME.json and .md, which are what benchmarks/results/ keeps.
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

log = logging.getLogger("drn")

# Leg -> the module that has it, as `run(job, leg)`. All but the first stand by themselves.
MODULES = {
    "prepare": "leg_prepare",
    "cuda": "leg_cuda",
    "torch": "leg_torch",
    "ort-cuda": "leg_onnxruntime",
    "tensorrt": "leg_tensorrt",
}
LEGS = tuple(MODULES)[1:]
# Without these no leg but `cuda` starts; nltk wants regex, which is compiled for one version of Python.
NEEDED = ("numpy", "tqdm", "nltk", "tyro")
# Legs, and steps of other legs, that run on nothing that `prepare` makes.
UNPREPARED = ("cuda",)
UNPREPARED_STEPS = {"tensorrt": ("builder",)}
NEEDED_UNPREPARED = ("numpy",)
# Legs that need a GPU, and whose libraries have a double in the tests.
STAND_IN_LEGS, STAND_IN_MODULE = ("cuda", "tensorrt"), "benchmarks.acceptance.fake_gpu"
# A leg must end within ten minutes, with what it has to write.
LEG_SECONDS, GRACE_SECONDS = 570.0, 20.0


def parse(words: Sequence[str] | None = None) -> tuple[Job, argparse.Namespace]:
    """Return the job that the command line describes, and the other options."""
    parser = argparse.ArgumentParser(
        prog="benchmarks/gpu.sh",
        description="Acceptance on a CUDA GPU, with whichever of torch, onnxruntime-gpu, TensorRT and TensorRT-RTX can "
        "be imported. Each leg ends within ten minutes and leaves LEG.json; the same command goes on with a leg that "
        "was cut off. Exit code 0: every leg that ran kept its promises; 1: one did not; 2: nothing could run.",
    )
    parser.add_argument("legs", nargs="*", metavar="LEG", help=f"{', '.join(MODULES)}; all when none is named")
    parser.add_argument("--output", type=Path, required=True, help="directory of everything that is made and found")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu rehearses what runs there")
    parser.add_argument("--small", action="store_true", help="rehearse with a tiny network")
    parser.add_argument("--limit", type=float, default=LEG_SECONDS, help="seconds that a leg may take")
    parser.add_argument(
        "--order",
        choices=("full", "lease"),
        default="full",
        help="lease: for a machine that is available for minutes; engines are built without a data set, INT8 with a "
        "fixed calibration method, and each timing is shorter (see benchmarks/gpu_lease.sh)",
    )
    parser.add_argument("--step", nargs="+", default=[], help="only these steps of the one leg that is named")
    parser.add_argument("--stand-in", action="store_true", help="rehearse cuda and tensorrt on the tests' doubles")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args(words)
    return Job(given.output.resolve(), given.device, given.small, given.order, given.stand_in), given


def main(words: Sequence[str] | None = None) -> int:
    """Run legs and return the exit code: 0 every leg that ran kept its promises, 1 one did not, 2 nothing could run."""
    job, given = parse(words)
    logging.basicConfig(format="%(message)s", level=logging.WARNING, stream=sys.stderr)
    log.setLevel(logging.INFO)
    unknown = [leg for leg in given.legs if leg not in MODULES]
    if unknown:
        return _refuse(f"There is no leg {unknown[0]!r}; the legs are {', '.join(MODULES)}.")
    if given.step and len(given.legs) != 1:
        return _refuse(f"--step chooses steps of one leg, and {len(given.legs)} are named. Name one leg.")
    if job.stand_in and job.device != "cpu":
        return _refuse("--stand-in is for a rehearsal. Pass --device cpu with it.")
    if given.inside:
        run_inside(job, given.legs[0], given.limit, given.step)
        return 0
    needed = NEEDED_UNPREPARED if given.legs and set(given.legs) <= set(UNPREPARED) else NEEDED
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        return _refuse(
            f"{', '.join(missing)} cannot be imported, and {', '.join(needed)} are needed; bring their wheels and put "
            "them on PYTHONPATH."
        )
    if job.device == "cuda" and cuda_gpu() is None:
        return _refuse("CUDA finds no GPU here; `--device cpu --small` rehearses what runs without one.")
    try:
        check_writable(job.output / "torch.json")
        return _run_legs(job, given.legs or LEGS, given.limit, given.step)
    except GroundingError as error:
        return _refuse(str(error))
    except KeyboardInterrupt:
        print("Interrupted; what was found is kept, and the same command goes on.", file=sys.stderr)
        return 130


def _refuse(sentence: str) -> int:
    print(f"error: {sentence}", file=sys.stderr)
    return 2


def _run_legs(job: Job, wanted: Sequence[str], limit: float, steps: Sequence[str]) -> int:
    legs = [leg for leg in dict.fromkeys(wanted) if leg != "prepare"]
    environment = _environment(job)
    ran: list[str] = []
    # Chosen steps may run beside a `prepare` in the background, which must not run twice.
    implied = not steps and not set(legs) <= set(UNPREPARED) and not _prepared(job)
    if "prepare" in wanted or implied:
        _run_leg(job, "prepare", limit, environment)
        ran.append("prepare")
    for leg in legs:
        if _needs_nothing(leg, steps) or _prepared(job):
            _run_leg(job, leg, limit, environment, steps)
        else:
            _leg(job, leg).end("skipped", "There is nothing to run it on: the leg `prepare` did not end well.")
        ran.append(leg)
    contents = [read_leg(job.results(leg)) for leg in ran]
    report = write_report(job)
    print()
    for leg, content in zip(ran, contents):
        print(f"{leg:<10} {verdict(content)}")
    print(*report, sep="\n")
    # What is only made is no acceptance.
    tried = [c for c in contents if c["state"] != "skipped" and (c["leg"] != "prepare" or not kept(c) or not legs)]
    if not tried:
        return 2
    return 0 if all(map(kept, tried)) else 1


def _needs_nothing(leg: str, steps: Sequence[str]) -> bool:
    """Return whether a leg, or its chosen steps, run on nothing that `prepare` makes."""
    return leg in UNPREPARED or (bool(steps) and set(steps) <= set(UNPREPARED_STEPS.get(leg, ())))


def write_report(job: Job, about: Mapping[str, Any] | None = None) -> tuple[Path, Path]:
    """Gather all legs of a job into a JSON file and a Markdown report, and return where.

    Args:
        job: whose legs.
        about: what `about_machine` returned before; read anew when not given.
    """
    return gather(job.output, tuple(MODULES), about or about_machine(job), _name(job))


def _prepared(job: Job) -> bool:
    path = job.results("prepare")
    if not path.is_file() or not all(file.is_file() for file in (job.checkpoint, job.graph, job.query_graph)):
        return False
    content = read_leg(path)
    settings = content["about"]["settings"]
    # Made on one device it is as good on another.
    return kept(content) and (settings["small"], settings.get("order", "full")) == (job.small, job.order)


def _run_leg(job: Job, leg: str, limit: float, environment: Mapping[str, str], steps: Sequence[str] = ()) -> None:
    """Run a leg in a process of its own, and again behind a step in which that process dies."""
    print(f"\n== {leg}", file=sys.stderr, flush=True)
    deadline = time.time() + limit
    path = job.results(leg)
    while True:
        module = STAND_IN_MODULE if job.stand_in and leg in STAND_IN_LEGS else "benchmarks.gpu"
        words = [sys.executable, "-m", module, leg, *job.flags(), "--inside"]
        words += ["--limit", str(max(deadline - time.time(), 0)), *(["--step", *steps] if steps else [])]
        # A process group of its own, so that what it started ends with it.
        with subprocess.Popen(words, env=environment, cwd=ROOT, start_new_session=True) as process:
            try:
                code = process.wait(max(deadline - time.time(), 0) + GRACE_SECONDS)
            except BaseException as error:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                if isinstance(error, subprocess.TimeoutExpired):
                    log.warning("%s was ended after %.0f s; what it found is kept.", leg, limit)
                    return
                raise
        if not path.is_file():
            _leg(job, leg).end("unfinished", f"Its process ended with code {code} before it began.")
        if not code or not record_crash(path, code):
            return
        log.warning("%s: the process ended with code %d; going on with the next step.", leg, code)


def _environment(job: Job) -> dict[str, str]:
    """Return the environment of the legs: the checkout can be imported, and `.pt` files can be opened.

    The package is not installed in a plain checkout, so that nobody would tell which module opens `.pt`.
    """
    places = [str(ROOT)]
    installed = (entry.group for known in importlib.metadata.distributions() for entry in known.entry_points)
    if importlib.util.find_spec("torch") and "drn.backends" not in installed:
        # Not in Python 3.9, for which there is no torch that we take.
        import tomllib

        project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
        about = job.output / "installed" / f"drn_deploy-{project['version']}.dist-info"
        write_text(
            about / "METADATA", f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n"
        )
        lines = [f"{name} = {target}" for name, target in project["entry-points"]["drn.backends"].items()]
        write_text(about / "entry_points.txt", "\n".join(["[drn.backends]", *lines, ""]))
        places.append(str(about.parent))
    if os.environ.get("PYTHONPATH"):
        places.append(os.environ["PYTHONPATH"])
    return {**os.environ, "PYTHONPATH": os.pathsep.join(places)}


def about_machine(job: Job) -> dict[str, Any]:
    gpu = selected_gpu() if job.device == "cuda" else None
    told = f"{cpu_info.cpu_name()}, {cpu_info.cores()} cores"
    if gpu:
        told = f"{gpu.name}, driver {gpu.driver}, {told}"
    about: dict[str, Any] = {"told": f"{told},", "versions": _versions(), "gpu": gpu and dataclasses.asdict(gpu)}
    if job.rehearsal:
        about["note"] = "A rehearsal: its times and answers say that the command runs, and nothing of a GPU."
    return about


def _versions() -> dict[str, str]:
    libraries = ("torch", "onnxruntime", "onnxruntime-gpu", "onnx", "numpy")
    names = (*libraries, "tensorrt", "tensorrt-cu12", "tensorrt-cu13", "tensorrt-rtx-cu12", "tensorrt-rtx-cu13")
    found = {"python": sys.version.split()[0]}
    for name in names:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


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
        leg.end("unfinished", "Its time was over before its last step; the same command goes on.")
    else:
        leg.end("chosen" if steps else "finished")


if __name__ == "__main__":
    sys.exit(main())
