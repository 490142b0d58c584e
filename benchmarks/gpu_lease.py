"""Run the GPU acceptance on a machine that is available for minutes; `benchmarks/gpu_lease.sh` is the command.

`benchmarks.acceptance.lease` decides what to run next, `benchmarks.acceptance.lease_run` carries it out.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks.acceptance.lease import CLOSING_S, START_S, TENSORRT, Limits, schedule
from benchmarks.acceptance.lease_run import Lease
from benchmarks.acceptance.packages import check_whole, current_python
from benchmarks.acceptance.run_config import Job
from runtime.core.errors import GroundingError
from runtime.core.gpu_info import cuda_gpu
from runtime.core.io.atomic_files import check_writable

log = logging.getLogger("drn")


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """Turn SIGTERM into KeyboardInterrupt, and enable Ctrl-C in a process that a shell started in the background."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def print_schedule(limits: Limits, chunks: Sequence[str], before_s: float) -> None:
    """Print when each task runs if all take their expected time."""
    lines, plan_b = schedule(limits, chunks, before_s=before_s)
    if plan_b:
        print(f"plan B: {plan_b}")
    for line in lines:
        begin, end = (f"{int(seconds) // 60}:{int(seconds) % 60:02d}" for seconds in (line.begin_s, line.end_s))
        print(f"{begin:>5} - {end:>5}  {line.what}")


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(
        prog="benchmarks/gpu_lease.sh",
        description="Run the GPU acceptance on a machine that is available for minutes: the most valuable results "
        "first, no task that cannot end in time, and without TensorRT (plan B) if that cannot arrive in time. Exit "
        "code 0: every check so far passed; 1: one failed; 2: an option or a package is wrong, or there is no GPU.",
    )
    parser.add_argument("--packages", type=Path, help="wheels and chunks (`python -m benchmarks.gpu_packages`)")
    parser.add_argument("--output", type=Path, help="directory of the state, inputs and results")
    parser.add_argument("--results", type=Path, help="directory to which results are copied after every step")
    parser.add_argument("--minutes", type=float, default=13.0, help="maximum minutes of the lease, including its start")
    parser.add_argument("--call-minutes", type=float, default=9.5, help="maximum minutes of this call")
    parser.add_argument("--used", type=float, help="seconds of the lease before this call")
    parser.add_argument("--more", action="store_true", help="later calls bring the chunks that are missing")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: rehearse on test doubles")
    parser.add_argument("--small", action="store_true", help="rehearse with a tiny network")
    parser.add_argument("--check", action="store_true", help="check the packages, and stop")
    parser.add_argument("--python", default=current_python(), help="version of the machine's Python, for --check")
    parser.add_argument("--dry-run", action="store_true", help="print the expected schedule, and stop")
    return parser.parse_args(words)


def main(words: Sequence[str] | None = None) -> int:
    """Run one call of a lease and return its exit code."""
    given = parse(words)
    logging.basicConfig(format="%(message)s", level=logging.WARNING, stream=sys.stderr)
    log.setLevel(logging.INFO)
    limits = Limits(60 * given.minutes, 60 * given.call_minutes)
    try:
        if given.check or given.dry_run:
            return _check(given, limits)
        return _run(given, limits)
    except GroundingError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _check(given: argparse.Namespace, limits: Limits) -> int:
    if given.packages is None:
        raise GroundingError("--check and --dry-run need packages. Pass their directory with --packages.")
    libraries = {library.name: library for library in check_whole(given.packages, given.python)}
    chunks = sorted(libraries[TENSORRT].sha256) if TENSORRT in libraries else []
    if given.dry_run:
        print_schedule(limits, chunks, given.used if given.used is not None else START_S)
    else:
        print(f"{given.packages} is complete: wheels, {', '.join(libraries) or 'no library in chunks (plan B)'}.")
    return 0


def _run(given: argparse.Namespace, limits: Limits) -> int:
    if given.output is None:
        raise GroundingError("The directory of the state is missing. Pass --output.")
    if not limits.lease_s > CLOSING_S or not limits.call_s > CLOSING_S:
        raise GroundingError(
            f"Expected --minutes and --call-minutes of more than {CLOSING_S:.0f} s, got {given.minutes:g} and "
            f"{given.call_minutes:g} minutes. Increase them."
        )
    if given.packages is not None and not given.packages.is_dir():
        raise GroundingError(f"--packages {given.packages} is not a directory. Pass that of the wheels and chunks.")
    if given.device == "cuda" and cuda_gpu() is None:
        raise GroundingError("CUDA finds no GPU. Pass --device cpu --small to rehearse.")
    job = Job(given.output.resolve(), given.device, given.small, "lease", stand_in=given.device == "cpu")
    results = given.results.resolve() if given.results else None
    packages = given.packages.resolve() if given.packages else None
    lease = Lease(job, limits, given.used, given.more, packages, results)
    lease.check()
    check_writable(lease.path)
    check_writable(results / "report.md" if results else None)
    lease.begin()
    try:
        with _interruptible():
            stop = lease.run()
    except KeyboardInterrupt:
        print("Interrupted. Repeat the command to continue.", file=sys.stderr)
        return 130
    finally:
        lease.content["calls"][-1]["ended"] = time.time()
        lease.save()
        lease.mirror(now=True)
    if stop.again:
        print(f"next: {'bring ' + ' '.join(stop.bring) if stop.bring else 'call again'} ({stop.reason})")
    else:
        print(f"next: give the machine back ({stop.reason})")
    return 0 if lease.has_kept else 1


if __name__ == "__main__":
    sys.exit(main())
