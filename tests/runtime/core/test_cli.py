"""Test `runtime.core.cli`: exit codes, stdout and stderr."""

from __future__ import annotations

import logging
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from runtime.core.cli import report_written, suggest_next_command
from runtime.core.errors import CheckFailed, DeviceError, FeatureError, GroundingError
from runtime.core.interrupts import Interrupted
from runtime.core.io.atomic_files import write_text
from runtime.core.io.staging import Staging
from tests.processes import heed_ctrl_c

ROOT = Path(__file__).parents[3]


def add(first: int, *, second: int = 2) -> int:
    """Add two numbers.

    Args:
        first: one number.
        second: another.
    """
    print(first + second)
    return first + second


def test_function_signature_becomes_command_line(run_command: Any) -> None:
    outcome = run_command(add, "--first", 1)
    assert (outcome.out, outcome.err) == ("3\n", "")
    assert run_command(add, "--first", 1, "--second", 5).out == "6\n"
    shown = run_command(add, "--help")
    assert "Add two numbers." in shown.out
    assert "another." in shown.out


@pytest.mark.parametrize("arguments", [(), ("--first", "one"), ("--first", 1, "--third", 3)])
def test_invalid_command_line_exits_with_2(run_command: Any, arguments: tuple[Any, ...]) -> None:
    outcome = run_command(add, *arguments, code=2)
    assert outcome.out == ""
    assert "Traceback" not in outcome.err


@pytest.mark.parametrize(("error", "code"), [(FeatureError, 2), (CheckFailed, 1)])
def test_error_prints_message_and_exit_code(run_command: Any, error: type[Exception], code: int) -> None:
    def fails() -> None:
        print("a result")
        raise error("What happened; what to do.")

    outcome = run_command(fails, code=code)
    assert (outcome.out, outcome.err) == ("a result\n", "error: What happened; what to do.\n")


def test_keyboard_interrupt_exits_with_130(run_command: Any) -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    run_command(interrupted, code=130)


def test_unexpected_exception_keeps_its_traceback(run_command: Any) -> None:
    def broken() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run_command(broken)


def test_interruption_lists_the_files_finished_by_then(run_command: Any, tmp_path: Path) -> None:
    def stopped() -> None:
        for name in ("one.txt", "many/two.txt", "many/three.txt"):
            write_text(tmp_path / name, "text")
        report_written(tmp_path / "one.txt")
        write_text(tmp_path / "many" / "two.txt", "again")
        with Staging() as staging:
            write_text(staging.path(tmp_path / "four.txt"), "text")
            staging.commit()
            write_text(staging.path(tmp_path / "half.txt"), "text")
            raise Interrupted(signal.SIGTERM)

    # It compares the list with the files.
    run_command(stopped, code=143)
    assert {path.name for path in tmp_path.rglob("*.txt")} == {"one.txt", "two.txt", "three.txt", "four.txt"}


def test_interrupted_import_is_no_missing_package(run_command: Any) -> None:
    def stopped() -> None:
        try:
            try:
                raise Interrupted(signal.SIGTERM)
            except Interrupted as interruption:
                raise ImportError("initialization failed") from interruption
        except ImportError as error:
            raise DeviceError("ONNX Runtime is not installed.") from error

    run_command(stopped, code=143)


def test_error_that_is_its_own_cause_ends_the_command(run_command: Any) -> None:
    def broken() -> None:
        error = FeatureError("no clips")
        raise error from error

    run_command(broken, code=2)


def test_next_command_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", "drn"):
        suggest_next_command("runtime.infer", "--model", "a.onnx", "--query", 'person\'s "door"', "--top-k", 5)
    line = next(line for line in caplog.text.splitlines() if "Next:" in line)
    given = ["--model", "a.onnx", "--query", 'person\'s "door"', "--top-k", "5"]
    assert shlex.split(line)[1:] == ["python", "-m", "runtime.infer", *given]


@pytest.mark.parametrize(
    ("command", "package", "extra"), [("train", "torch", "train"), ("export.build_engine", "onnx", "engine")]
)
@pytest.mark.parametrize("source", ["raise ModuleNotFoundError('none', name={!r})", "raise ImportError('none')"])
def test_missing_package_names_the_extra(tmp_path: Path, command: str, package: str, extra: str, source: str) -> None:
    (tmp_path / f"{package}.py").write_text(source.format(package))
    outcome = subprocess.run(
        [sys.executable, "-m", command, "--help"],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert outcome.returncode == 2
    assert outcome.stderr == (
        f"error: {package} cannot be imported (none). Run `pip install '.[{extra}]'` in the drn-deploy directory.\n"
    )


def program(body: str) -> list[str]:
    """Return the words that start a process with a command of this body."""
    code = "import logging, os, sys, time\nfrom runtime.core.cli import command\n"
    code += "from runtime.core.errors import GroundingError\nfrom runtime.core.io.atomic_files import atomic_write\n"
    code += "def run():\n" + "".join(f"    {line}\n" for line in body.splitlines()) + "command(run)\n"
    return [sys.executable, "-c", code]


def run_redirected(redirection: str, body: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a command in a shell that redirects or closes its streams."""
    words = ["sh", "-c", f'exec "$@" {redirection}', "sh", *program(body), *arguments]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    return subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)


def start(body: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        program(body), cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, preexec_fn=heed_ctrl_c
    )


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full here")
@pytest.mark.parametrize(
    ("redirection", "body", "code"),
    [
        (">&-", "pass", 0),
        (">&-", "print('x')", 2),
        ("1</dev/null", "print('x')", 2),
        (">/dev/full", "print('x')", 2),
        # More than a buffer, so that writing fails before the end of the command.
        (">/dev/full", "print('x' * 100_000)", 2),
        (">/dev/full", "print('x')\nraise GroundingError('What happened.')", 2),
        ("2>&-", "print('x')\nlogging.getLogger('drn').info('done')", 0),
        ("2>/dev/full", "print('x')\nprint('log', file=sys.stderr, flush=True)", 0),
        ("2>&-", "raise GroundingError('What happened.')", 2),
        ("<&- >&- 2>&-", "print(sys.stdin.read(), file=sys.stderr)", 0),
    ],
)
def test_unwritable_stream_keeps_exit_code_without_traceback(redirection: str, body: str, code: int) -> None:
    ended = run_redirected(redirection, body)
    assert ended.returncode == code
    assert ended.stderr.count("\n") == (1 if code and "2>" not in redirection else 0)
    assert ended.stderr.startswith("error: " if ended.stderr else "")
    assert ("What happened." in ended.stderr) == ("raise" in body and "2>" not in redirection)
    assert ended.stdout == ("x\n" if code == 0 and redirection.startswith("2") else "")


def test_help_into_a_closed_stdout_exits_with_2() -> None:
    ended = run_redirected(">&-", '"""Do nothing."""', "--help")
    assert (ended.returncode, ended.stderr.count("\n")) == (2, 1)


def test_files_do_not_reuse_descriptors_of_closed_streams(tmp_path: Path) -> None:
    # Otherwise text that a library prints to descriptor 1 or 2 would be written into the file.
    body = f"with open({str(tmp_path / 'report')!r}, 'w') as stream:\n"
    body += "    os.write(1, b'noise'); os.write(2, b'noise'); stream.write('complete')"
    assert run_redirected(">&- 2>&-", body).returncode == 0
    assert (tmp_path / "report").read_text() == "complete"


def test_reader_closing_stdout_early_is_not_an_error() -> None:
    process = start("for number in range(100_000): print(number)")
    assert process.stdout
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr
    assert process.stderr.read() == ""
    assert process.wait(timeout=30) == 0


@pytest.mark.usefixtures("default_signals")
@pytest.mark.parametrize(
    ("signals", "code"),
    [((signal.SIGINT,), 130), ((signal.SIGTERM, signal.SIGTERM), 143), ((signal.SIGHUP, signal.SIGHUP), 129)],
)
def test_signal_while_writing_leaves_no_files(tmp_path: Path, signals: tuple[signal.Signals, ...], code: int) -> None:
    process = start(
        f"with atomic_write({str(tmp_path / 'report.json')!r}) as temporary:\n"
        "    temporary.write_text('half')\n"
        "    print('ready', flush=True)\n"
        "    time.sleep(60)"
    )
    assert process.stdout
    assert process.stdout.readline() == "ready\n"
    assert len(list(tmp_path.iterdir())) == 1
    for number in signals:
        process.send_signal(number)
    _, err = process.communicate(timeout=30)
    assert (process.returncode, err.count("\n")) == (code, 1)
    assert not list(tmp_path.iterdir())


def test_termination_during_import_exits_with_143() -> None:
    code = (
        "import sys; sys.argv = ['-m']; import runtime, os, signal, time\n"
        "os.kill(os.getpid(), signal.SIGTERM)\ntime.sleep(10)"
    )
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (ended.returncode, ended.stderr.count("\n")) == (143, 1)


def test_control_characters_are_escaped_on_both_streams(run_command: Any) -> None:
    def draw() -> None:
        print("a\x1b[2Jb")
        logging.getLogger("drn").info("%s", "c\x1b[2Jd\ne")
        raise GroundingError("f\x1b[2Jg\nh")

    outcome = run_command(draw, code=2)
    assert outcome.out == "a\\x1b[2Jb\n"
    assert outcome.err.endswith("error: f\\x1b[2Jg\\nh\n")


def test_invalid_argument_is_printed_escaped_and_bounded(run_command: Any) -> None:
    for word in ("--\x1b[31mred", "one\x1b]0;title\x07", "x" * 100_000):
        outcome = run_command(add, "--first", word, code=2)
        assert outcome.out == ""
        assert "\x1b" not in outcome.err
        assert len(outcome.err) < 3000


def test_valid_long_argument_reaches_the_command(run_command: Any) -> None:
    def echo(text: str) -> None:
        """Print the length of a text."""
        print(len(text))

    assert run_command(echo, "--text", "x\x1b" * 1000).out == "2000\n"


def test_too_long_path_gives_one_line_error(run_command: Any) -> None:
    def look(path: Path) -> None:
        """Look at a file."""
        path.stat()

    outcome = run_command(look, "--path", "x" * 5000, code=2)
    assert outcome.err.count("\n") == 1
    assert len(outcome.err) < 1000
