"""Run commands in processes that are forked from one with torch and onnx loaded, which saves seconds for each."""

from __future__ import annotations

import atexit
import contextlib
import functools
import multiprocessing
import multiprocessing.connection
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext
from pathlib import Path

import pytest

from runtime.core import command_list

ROOT = Path(__file__).parents[1]
# None of them starts a thread, whose locks a fork would copy. torch imports its submodules at the first step of an
# optimizer and the first export. Those that do not exist are left out.
PRELOADED = [
    "torch", "torch._dynamo", "torch.export._trace", "torch.onnx._internal.exporter._core", "onnx", "onnxruntime",
    "onnxscript", "matplotlib.figure", "nltk", "tyro", "fastapi", "uvicorn", __name__,
]  # fmt: skip
TIMEOUT_S = 300
# Changes of a process that last until it ends.
LASTING = contextlib.ExitStack()

Prepare = Callable[[Callable[[], None]], None]


class ForkedCommand:
    """A command in a process of its own, like one of `subprocess.Popen` with pipes.

    Args:
        words: ["drn", NAME, …] or ["python", "-m", MODULE, …].
        environment: all variables of the process, except PYTHONPATH, which is the checkout. Of those that torch reads
            when it is loaded, OMP_NUM_THREADS applies.
        directory: working directory.
        prepare: called in the process before the command, with a function that ends `wait_until_half_way`.
    """

    def __init__(
        self,
        words: list[str],
        environment: Mapping[str, str] = os.environ,
        directory: Path = ROOT,
        prepare: Prepare | None = None,
    ) -> None:
        self._output = tempfile.TemporaryDirectory(prefix="drn-output-")
        for name in ("stdout", "stderr"):
            (Path(self._output.name) / name).touch()
        self._half_way, there = multiprocessing.Pipe(duplex=False)
        values = (words, {**environment, "PYTHONPATH": str(ROOT)}, directory, Path(self._output.name), prepare, there)
        self._process = _context().Process(target=_run, args=values)
        self._process.start()
        # multiprocessing waits at exit for processes that run, such as those of failed tests.
        atexit.register(self._process.kill)
        there.close()

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    def first_line(self) -> str:
        """Return the first line on stdout, without its end; "" if the command ends without one."""
        while True:
            running = self.is_running()
            line, end, _ = (Path(self._output.name) / "stdout").read_text().partition("\n")
            if end or not running:
                return line
            time.sleep(0.01)

    def wait_until_half_way(self) -> None:
        """Return when `prepare` reports that the command is half-way; fail with its log if it ends before."""
        assert self._half_way.poll(TIMEOUT_S), "it did not get half-way"
        try:
            self._half_way.recv_bytes()
        except EOFError:
            pytest.fail(self.finish().stderr)

    def is_running(self) -> bool:
        return self._process.is_alive()

    def send_signal(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    def finish(self, timeout: float = TIMEOUT_S) -> subprocess.CompletedProcess[str]:
        """Wait for the end of the process; its exit code is -N after signal N."""
        self._process.join(timeout)
        ended = self._process.exitcode is not None
        if not ended:
            self._process.kill()
            self._process.join()
        with self._output:
            printed = (Path(self._output.name, name).read_text() for name in ("stdout", "stderr"))
            result = subprocess.CompletedProcess((), self._process.exitcode or 0, *printed)
        assert ended, f"no end after {timeout:g} s: {result.stderr}"
        return result


def hide_modules(names: Sequence[str], half_way: Callable[[], None]) -> None:
    """Make the import of modules fail, as if they were not installed; for `prepare`."""
    sys.modules.update(dict.fromkeys(names))  # type: ignore[arg-type]


def use_narrow_backbone(half_way: Callable[[], None]) -> None:
    """Give new networks a narrow backbone until the command ends; for `prepare`."""
    from tests.train.training.narrow import with_narrow_backbone

    LASTING.enter_context(with_narrow_backbone())


@functools.cache
def _context() -> ForkServerContext:
    """Return a context whose processes are forked from one that has imported `PRELOADED`."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("PYTHONPATH", str(ROOT))
        forkserver.ensure_running()
    return context


def _run(
    words: list[str],
    environment: dict[str, str],
    directory: Path,
    output: Path,
    prepare: Prepare | None,
    half_way: multiprocessing.connection.Connection,
) -> None:
    for number, name in enumerate(("stdout", "stderr"), start=1):
        os.dup2(os.open(output / name, os.O_WRONLY | os.O_APPEND), number)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(directory)
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(int(environment.get("OMP_NUM_THREADS", 1)))
    # A shell's background jobs, as CI may be, have SIGINT ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if prepare is not None:
        prepare(functools.partial(half_way.send_bytes, b"half-way"))
    program, *arguments = words
    # multiprocessing ends its processes without what other processes do at exit.
    with contextlib.ExitStack() as at_exit:
        at_exit.callback(atexit._run_exitfuncs)
        if program == "drn":
            sys.argv = words
            command_list.main()
        else:
            sys.argv = arguments[1:]
            runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
