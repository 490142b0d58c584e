"""Check that commands parse: those of pages, and those in "Next:" lines."""

from __future__ import annotations

import contextlib
import io
import shlex
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import tyro

from runtime.core import cli, command_list
from runtime.core.command_help import documented
from runtime.core.model_argument import normalized


def split_command(words: list[str]) -> tuple[str, list[str]]:
    """Return the module and the arguments of a `drn NAME …` or `python -m MODULE …` line."""
    if words[0] == "drn":
        return command_list.MODULES[words[1]], words[2:]
    assert words[:2] == ["python", "-m"]
    return words[2], words[3:]


def check_parses(words: list[str]) -> None:
    """Parse a command line as its command does; AssertionError if it is invalid."""
    module, arguments = split_command(words)
    function = _command_function(module)
    config = (tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff, tyro.conf.DisallowNone)
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            tyro.cli(documented(function)[0], args=normalized(function, arguments), config=config)
    except SystemExit:
        raise AssertionError(f"{' '.join(words)} does not parse: {printed.getvalue()}") from None


@contextlib.contextmanager
def next_commands_checked() -> Iterator[None]:
    """Call `check_parses` with every command that `suggest_next_command` prints in this process."""
    quoted, parsed = cli.shell_words, set()

    def checked(words: list[str]) -> str:
        module, arguments = split_command(words)
        assert module in command_list.MODULES.values(), words
        # Lines with the same options differ in values only.
        form = (module, *(word for word in arguments if word.startswith("-")))
        if form not in parsed and _can_import(module):
            check_parses(words)
            parsed.add(form)
        return quoted(words)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cli, "shell_words", checked)
        yield


def _command_function(module: str) -> Callable[..., Any]:
    # Imported here, because onnx is not installed everywhere.
    from tests.contract_recorder import command_function

    return command_function(module)


def _can_import(module: str) -> bool:
    try:
        _command_function(module)
    except ImportError:
        return False
    return True


def next_command(messages: list[str]) -> list[str]:
    """Return the words of the only "Next:" line of a log."""
    (line,) = (message for message in messages if "Next:" in message)
    return shlex.split(line.split("Next:", 1)[1])
