"""Test `runtime.core.cli`: exit codes, stdout and stderr."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from runtime.core.cli import suggest_next_command
from runtime.core.errors import CheckFailed, DeviceError, FeatureError, GroundingError
from runtime.core.interrupts import Interrupted
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


def test_function_signature_becomes_command_line(run_command: Callable[..., Any]) -> None:
    outcome = run_command(add, "--first", 1)
    assert (outcome.code, outcome.out, outcome.err) == (0, "3\n", "")
    assert run_command(add, "--first", 1, "--second", 5).out == "6\n"


def test_help_shows_the_docstring(run_command: Callable[..., Any]) -> None:
    outcome = run_command(add, "--help")
    assert outcome.code == 0
    assert "Add two numbers." in outcome.out
    assert "another." in outcome.out


@pytest.mark.parametrize("arguments", [(), ("--first", "one"), ("--first", 1, "--third", 3)])
def test_invalid_command_line_exits_with_2(run_command: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    outcome = run_command(add, *arguments)
    assert (outcome.code, outcome.out) == (2, "")
    assert "Traceback" not in outcome.err


@pytest.mark.parametrize(
    ("error", "code"), [(GroundingError, 2), (FeatureError, 2), (DeviceError, 2), (CheckFailed, 1)]
)
def test_error_prints_message_and_sets_exit_code(
    run_command: Callable[..., Any], error: type[Exception], code: int
) -> None:
    def fails() -> None:
        print("a result")
        raise error("What happened; what to do.")

    outcome = run_command(fails)
    assert (outcome.code, outcome.out, outcome.err) == (code, "a result\n", "error: What happened; what to do.\n")


def test_keyboard_interrupt_exits_with_130(run_command: Callable[..., Any]) -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    outcome = run_command(interrupted)
    assert outcome.code == 130
    assert outcome.err.startswith("Interrupted")


def test_interrupted_import_is_no_missing_package(run_command: Callable[..., Any]) -> None:
    def stopped() -> None:
        try:
            try:
                raise Interrupted(signal.SIGTERM)
            except Interrupted as interruption:
                raise ImportError("initialization failed") from interruption
        except ImportError as error:
            raise DeviceError("ONNX Runtime is not installed.") from error

    assert run_command(stopped).code == 143


def test_error_that_is_its_own_cause_ends_the_command(run_command: Callable[..., Any]) -> None:
    def broken() -> None:
        error = FeatureError("no clips")
        raise error from error

    assert run_command(broken).code == 2


def test_unexpected_exception_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    from runtime.core.cli import command

    def broken() -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(sys, "argv", ["command"])
    with pytest.raises(ZeroDivisionError):
        command(broken)


def test_next_command_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", "drn"):
        suggest_next_command("runtime.infer", "--model", "a.onnx", "--query", 'person\'s "door"', "--top-k", 5)
    line = next(line for line in caplog.text.splitlines() if "Next:" in line)
    given = ["--model", "a.onnx", "--query", 'person\'s "door"', "--top-k", "5"]
    assert shlex.split(line)[1:] == ["python", "-m", "runtime.infer", *given]


@pytest.mark.parametrize(
    ("command", "package", "extra"),
    [("train", "torch", "train"), ("train.convert", "torch", "train"), ("export.build_engine", "onnx", "engine")],
)
def test_missing_package_error_names_the_extra(tmp_path: Path, command: str, package: str, extra: str) -> None:
    (tmp_path / f"{package}.py").write_text(f"raise ModuleNotFoundError('none', name={package!r})\n")
    outcome = subprocess.run(
        [sys.executable, "-m", command, "--help"],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert outcome.returncode == 2
    assert outcome.stderr == (
        f"error: This command needs {package}, which is not installed. "
        f"Run `pip install '.[{extra}]'` in the drn-deploy directory.\n"
    )


def program(body: str) -> str:
    """Return the source of a program whose command has this body."""
    code = "import logging, os, sys, time\nfrom pathlib import Path\nfrom runtime.core.cli import command\n"
    code += "from runtime.core.errors import GroundingError\nfrom runtime.core.io.atomic_files import atomic_write\n"
    return code + "def run():\n" + "".join(f"    {line}\n" for line in body.splitlines()) + "command(run)\n"


def run_redirected(body: str, redirection: str) -> subprocess.CompletedProcess[str]:
    """Run a program in a shell that redirects or closes its streams."""
    words = ["sh", "-c", f'exec "$@" {redirection}', "sh", sys.executable, "-c", program(body)]
    return subprocess.run(words, cwd=ROOT, capture_output=True, text=True)


def start(body: str, *, unbuffered: bool = False, **options: Any) -> subprocess.Popen[str]:
    """Start a process whose command has this body."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"}
    if unbuffered:
        environment["PYTHONUNBUFFERED"] = "1"
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
    return subprocess.Popen(
        [sys.executable, "-c", program(body)],
        cwd=ROOT,
        text=True,
        env=environment,
        preexec_fn=heed_ctrl_c,
        **options,
    )


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full here")
@pytest.mark.parametrize(
    ("stream", "body", "unbuffered", "code", "text"),
    [
        ("stdout", "print('x' * 10)", False, 2, "error: No space is left on the disk"),
        ("stdout", "print('x' * 10)", True, 2, "error: No space is left on the disk"),
        ("stdout", "print('x')\nraise GroundingError('What happened.')", False, 2, "error: What happened.\n"),
        ("stderr", "print('x')\nprint('log', file=sys.stderr, flush=True)", False, 0, "x\n"),
    ],
)
def test_stream_on_full_disk_gives_at_most_one_line_error(
    stream: str, body: str, unbuffered: bool, code: int, text: str
) -> None:
    with open("/dev/full", "w") as full:
        process = start(body, **{stream: full}, unbuffered=unbuffered)
        out, err = process.communicate(timeout=30)
    shown = err if stream == "stdout" else out
    assert process.returncode == code
    assert shown.startswith(text)
    assert shown.count("\n") == 1


@pytest.mark.skipif(os.name != "posix", reason="only POSIX shells close descriptors")
@pytest.mark.parametrize(
    ("redirection", "body", "code"),
    [
        (">&-", "print('x')", 2),
        ("1</dev/null", "print('x')", 2),
        (">&-", "pass", 0),
        ("2>&-", "print('x')\nlogging.getLogger('drn').info('done')", 0),
        ("2</dev/null", "print('x')\nlogging.getLogger('drn').info('done')", 0),
        ("2>&-", "raise GroundingError('What happened.')", 2),
        (">&- 2>&-", "print('x')", 2),
        ("<&- >&- 2>&-", "print(sys.stdin.read(), file=sys.stderr)", 0),
    ],
)
def test_closed_streams_keep_exit_code_without_traceback(redirection: str, body: str, code: int) -> None:
    ended = run_redirected(body, redirection)
    assert ended.returncode == code
    assert "Traceback" not in ended.stderr
    assert ended.stderr.count("\n") == (1 if code and redirection in (">&-", "1</dev/null") else 0)
    assert ended.stdout == ("x\n" if code == 0 and redirection[0] == "2" else "")


@pytest.mark.skipif(os.name != "posix", reason="only POSIX shells close descriptors")
@pytest.mark.parametrize("redirection", [">&-", "2>&-"])
def test_files_do_not_reuse_descriptors_of_closed_streams(tmp_path: Path, redirection: str) -> None:
    # Otherwise text that a library prints to descriptor 1 or 2 would be written into the file.
    body = (
        f"with open({str(tmp_path / 'report')!r}, 'w') as stream:\n"
        "    os.write(1, b'noise'); os.write(2, b'noise'); stream.write('whole')"
    )
    ended = run_redirected(body, redirection)
    assert ended.returncode == 0
    assert (tmp_path / "report").read_text() == "whole"


@pytest.mark.skipif(os.name != "posix", reason="only POSIX shells close descriptors")
def test_help_into_a_closed_stdout_exits_with_2() -> None:
    command = ["sh", "-c", 'exec "$@" >&-', "sh", sys.executable, "-m", "runtime.describe", "--help"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 2
    assert ended.stderr.count("\n") == 1
    assert ended.stderr.startswith("error: ")


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
        "    while True: time.sleep(0.05)"
    )
    assert process.stdout
    assert process.stdout.readline() == "ready\n"
    assert len(list(tmp_path.iterdir())) == 1
    for number in signals:
        process.send_signal(number)
    _, err = process.communicate(timeout=30)
    assert process.returncode == code
    assert err.count("\n") == 1
    assert code != 130 or err == "Interrupted; nothing half-written was left behind.\n"
    assert not list(tmp_path.iterdir())


def test_termination_during_import_exits_with_143() -> None:
    code = (
        "import sys; sys.argv = ['-m']; import runtime, os, signal, time\n"
        "os.kill(os.getpid(), signal.SIGTERM)\ntime.sleep(10)"
    )
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 143
    assert ended.stderr.count("\n") == 1


def test_control_characters_are_escaped_on_both_streams() -> None:
    process = start(
        "import logging\nprint('a\\x1b[2Jb')\nlogging.getLogger('drn').info('%s', 'c\\x1b[2Jd\\ne')\n"
        "raise GroundingError('f\\x1b[2Jg\\nh')"
    )
    out, err = process.communicate(timeout=30)
    assert out == "a\\x1b[2Jb\n"
    assert err == "c\\x1b[2Jd\\ne\nerror: f\\x1b[2Jg\\nh\n"


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
def test_text_of_any_language_prints_in_every_encoding(encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONIOENCODING", encoding)
    process = start("print('█▒·“…” 日本 \\udcff')", encoding=encoding)
    out, err = process.communicate(timeout=30)
    assert (process.returncode, err) == (0, "")
    assert out.endswith("\\udcff\n")


def test_invalid_argument_is_printed_escaped_and_bounded(run_command: Callable[..., Any]) -> None:
    for word in ("--\x1b[31mred", "one\x1b]0;title\x07", "x" * 100_000):
        outcome = run_command(add, "--first", word)
        assert (outcome.code, outcome.out) == (2, "")
        assert "\x1b" not in outcome.err
        assert len(outcome.err) < 3000


def test_valid_long_argument_reaches_the_command(run_command: Callable[..., Any]) -> None:
    def echo(text: str) -> None:
        """Print the length of a text."""
        print(len(text))

    assert run_command(echo, "--text", "x\x1b" * 1000).out == "2000\n"


def test_too_long_path_gives_one_line_error(run_command: Callable[..., Any]) -> None:
    def look(path: Path) -> None:
        """Look at a file."""
        path.stat()

    outcome = run_command(look, "--path", "x" * 5000)
    assert (outcome.code, outcome.err.count("\n")) == (2, 1)
    assert len(outcome.err) < 1000
