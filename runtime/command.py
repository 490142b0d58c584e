"""A typed function becomes a command: its signature is the command line, its docstring the help."""

from __future__ import annotations

import errno
import logging
import os
import shlex
import sys
from collections.abc import Callable
from typing import Any, NoReturn

from runtime.errors import GroundingError, PromiseBroken

log = logging.getLogger("drn")


def command(function: Callable[..., Any]) -> NoReturn:
    """Run `function` with the arguments of the command line, and exit.

    Results go to stdout, the log and progress to stderr. Exit codes: 0 done, 1 a promise was not met, 2 the
    input is wrong, 130 interrupted.
    """
    import tyro

    logging.basicConfig(format="%(message)s", level=logging.WARNING, stream=sys.stderr)
    log.setLevel(logging.INFO)
    # tyro names the module "__main__.py"; what the user typed is `python -m room.command`.
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    program = f"python -m {spec.name.removesuffix('.__main__')}" if spec else None
    try:
        tyro.cli(function, prog=program, config=(tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff))
        sys.stdout.flush()
    except GroundingError as error:
        _fail(str(error), 2)
    except PromiseBroken as error:
        _fail(str(error), 1)
    except KeyboardInterrupt:
        _fail("Interrupted; nothing half-written was left behind.", 130)
    except BrokenPipeError:
        # The reader of stdout (head, a pager) has gone; Python would complain once more at exit.
        _drop_stdout()
        sys.exit(0)
    except OSError as error:
        # Files report a full disk themselves; what is left is stdout sent to one.
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        _fail("No space is left on the disk for the output; free some or send it elsewhere.", 2)
    sys.exit(0)


def next_command(module: str, *words: object) -> None:
    """Say which command to type next, quoted for a shell, on stderr, so that stdout holds results alone."""
    log.info("\nNext:  python -m %s", shlex.join([module, *map(str, words)]))


def _drop_stdout() -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _fail(sentence: str, code: int) -> NoReturn:
    try:
        sys.stdout.flush()
    except OSError:
        _drop_stdout()
    print(f"error: {sentence}" if code != 130 else sentence, file=sys.stderr)
    sys.exit(code)
