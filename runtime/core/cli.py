"""Run a typed function as a command: its signature is the command line, its docstring the help."""

from __future__ import annotations

import contextlib
import errno
import functools
import io
import logging
import os
import sys
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any, NoReturn

from runtime.core.command_help import documented
from runtime.core.command_list import as_typed, typed_name
from runtime.core.errors import CheckFailed, GroundingError, OutputError, importing, one_line, printable_line
from runtime.core.interrupts import handled, interrupted_by, uncovered
from runtime.core.io import finished_files
from runtime.core.model_argument import normalized
from runtime.core.terminal import DISK_FULL, Formatter, argument, discard_output, protected_streams, shell_words

log = logging.getLogger("drn")


def command(function: Callable[..., Any], expand: Callable[[Sequence[str]], list[str]] = list) -> NoReturn:
    """Run `function` with the arguments of the command line, and exit.

    Results go to stdout, the log and progress to stderr. Exit codes: 0 for success, 1 for a failed check, 2 for invalid
    input, and 128 + N after signal N: 130 for Ctrl-C, 143 for SIGTERM, after a list of the files finished by then.

    Args:
        expand: returns the arguments to parse, given those of the command line; for an option such as --config of
            `train`, which inserts the options of a file.
    """
    with handled(), protected_streams() as no_colors, finished_files.recording():
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
        for paths in finished_files.by_directory():
            report_many_written("finished", paths)
        _fail(str(interrupted), interrupted.exit_code)
    except BrokenPipeError:
        # The reader of stdout (head, a pager) has ended. Python would print another error at exit.
        discard_output(sys.stdout)
        sys.exit(0)
    except OSError as error:
        # `runtime.core.io.atomic_files` reports a full disk for files, so this is stdout.
        if error.errno in DISK_FULL:
            _fail("error: No space is left on the disk of stdout. Free some space, or write to another disk.", 2)
        if error.errno == errno.ENAMETOOLONG:
            _fail(f"error: A path is too long ({printable_line(one_line(error))}). Use a shorter path.", 2)
        raise
    sys.exit(0)


def _parsed(function: Callable[..., Any], expand: Callable[[Sequence[str]], list[str]]) -> Callable[[], Any]:
    """Return the call that the command line describes; exits after --help and for invalid arguments."""
    import tyro

    # tyro would print "__main__.py" as the name of the program.
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    program = typed_name(spec.name.removesuffix(".__main__")) if spec else None
    documented_call, description = documented(function)
    config = (tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff, tyro.conf.DisallowNone)
    parse = functools.partial(tyro.cli, documented_call, prog=program, description=description, config=config)
    words = normalized(function, expand(sys.argv[1:]))
    shown = [argument(word) for word in words]
    if shown == words:
        return parse(args=words)
    # tyro prints arguments unescaped. Long arguments and those with control characters are therefore parsed without
    # output first, and errors are printed for their escaped form.
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            return parse(args=words)
    except SystemExit:
        parse(args=shown)
        raise


def suggest_next_command(module: str, *words: object) -> None:
    """Print the next command to type, quoted for a shell, to stderr."""
    log.info("\nNext:  %s", shell_words([*typed_name(module).split(), *map(str, words)]))


def report_written(*paths: Path | None) -> None:
    """Print the files that a command wrote to stderr; None is omitted."""
    for path in paths:
        if path is not None:
            log.info("Written: %s", path)
            finished_files.forget(path)


def report_many_written(kind: str, paths: Collection[Path]) -> None:
    """Print the number and the directory of files that a command wrote; a single file is printed by its path.

    Args:
        kind: what the files are, such as "feature".
        paths: the files, in one directory or its subdirectories.
    """
    if len(paths) > 1:
        log.info("Written: %d %s files in %s", len(paths), kind, os.path.commonpath([path.parent for path in paths]))
        for path in paths:
            finished_files.forget(path)
    else:
        report_written(*paths)


def _fail(message: str, code: int) -> NoReturn:
    try:
        sys.stdout.flush()
    except (OSError, GroundingError):
        discard_output(sys.stdout)
    print(as_typed(message), file=sys.stderr)
    sys.exit(code)


def check_plots(path: Path | None) -> None:
    """Raise OutputError if the name of a plot does not end in .png, and DeviceError if matplotlib is not installed."""
    if path is None:
        return
    if path.suffix.lower() != ".png":
        raise OutputError(
            f"Expected a name of a plot that ends in .png, got {path}. Use {path.with_suffix('.png')}.",
            code="wrong_suffix",
        )
    with importing("matplotlib for --plot", "plot"):
        import matplotlib.figure  # noqa: F401
