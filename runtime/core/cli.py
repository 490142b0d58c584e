"""A typed function becomes a command: its signature is the command line, its docstring the help."""

from __future__ import annotations

import contextlib
import errno
import functools
import io
import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from runtime.core.command_help import documented
from runtime.core.command_list import typed_name
from runtime.core.errors import CheckFailed, DeviceError, GroundingError, OutputError, one_line, printable_line
from runtime.core.interrupts import handled, interrupted_by, uncovered
from runtime.core.terminal import DISK_FULL, Formatter, argument, discard_output, protected_streams, shell_words

log = logging.getLogger("drn")


def command(function: Callable[..., Any], expand: Callable[[Sequence[str]], list[str]] = list) -> NoReturn:
    """Run `function` with the arguments of the command line, and exit.

    Results go to stdout, the log and progress to stderr. Exit codes: 0 done, 1 a check failed, 2 the input is wrong,
    128 + N ended by signal N: 130 for Ctrl-C, 143 for SIGTERM.

    Args:
        function: the command.
        expand: function from the arguments typed to those to parse, for options that insert others.
    """
    with handled(), protected_streams() as no_colors:
        _run(functools.partial(_parsed, function, expand), no_colors)


def _run(parse: Callable[[], Callable[[], Any]], no_colors: Callable[[], None]) -> NoReturn:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(Formatter("%(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    log.setLevel(logging.INFO)
    try:
        with uncovered():
            call = parse()
            no_colors()
            call()
            sys.stdout.flush()
    except GroundingError as error:
        _fail(f"error: {printable_line(str(error))}", 2)
    except CheckFailed as error:
        _fail(f"error: {printable_line(str(error))}", 1)
    except KeyboardInterrupt as error:
        interrupted = interrupted_by(error)
        _fail(str(interrupted), interrupted.exit_code)
    except BrokenPipeError:
        # The reader of stdout (head, a pager) has gone; Python would complain once more at exit.
        discard_output(sys.stdout)
        sys.exit(0)
    except OSError as error:
        # Files report a full disk themselves; what is left is stdout sent to one.
        if error.errno in DISK_FULL:
            _fail("error: No space is left on the disk for the output; free some or send it elsewhere.", 2)
        if error.errno == errno.ENAMETOOLONG:
            _fail(f"error: A path is too long ({printable_line(one_line(error))}). Give a shorter one.", 2)
        raise
    sys.exit(0)


def _parsed(function: Callable[..., Any], expand: Callable[[Sequence[str]], list[str]]) -> Callable[[], Any]:
    """Return the call that the command line asks for; exits after --help and on arguments that do not fit."""
    import tyro

    # tyro names the module "__main__.py"; what the user typed is `python -m package.command` or `drn command`.
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    program = typed_name(spec.name.removesuffix(".__main__")) if spec else None
    documented_call, description = documented(function)
    config = (tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff, tyro.conf.DisallowNone)
    parse = functools.partial(tyro.cli, documented_call, prog=program, description=description, config=config)
    words = expand(sys.argv[1:])
    shown = [argument(word) for word in words]
    if shown == words:
        return parse(args=words)
    # tyro prints arguments as they are: one that a terminal would act on, or that fills it, is parsed in silence, and
    # what is wrong with it is reported of its escaped form.
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            return parse(args=words)
    except SystemExit:
        parse(args=shown)
        raise


def suggest_next_command(module: str, *words: object) -> None:
    """Say which command to type next, quoted for a shell, on stderr, so that stdout holds results alone."""
    log.info("\nNext:  %s", shell_words([*typed_name(module).split(), *map(str, words)]))


def _fail(sentence: str, code: int) -> NoReturn:
    try:
        sys.stdout.flush()
    except (OSError, GroundingError):
        discard_output(sys.stdout)
    print(sentence, file=sys.stderr)
    sys.exit(code)


def check_plots(path: Path) -> None:
    """Raise OutputError where a plot is not named .png, and DeviceError if matplotlib is not installed."""
    if path.suffix.lower() != ".png":
        raise OutputError(
            f"A plot is written as PNG, and {path} does not end in .png; call it {path.with_suffix('.png')}.",
            code="wrong_suffix",
        )
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise DeviceError(
            "--plot needs matplotlib; run `pip install '.[plot]'` in the drn-deploy directory.", code="missing_library"
        ) from error
