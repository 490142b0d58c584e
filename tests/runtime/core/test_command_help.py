"""Test `runtime.core.command_help`: help from docstrings, with options in groups."""

from __future__ import annotations

import inspect
import re
import shlex
from pathlib import Path

import pytest
import tyro

from runtime.core import command_list
from runtime.core.command_help import _parsed_docstring, documented
from tests.contract_recorder import command_function


def command(
    model: Path, *, window: float | None = None, overlap: float | None = None, threads: int = 1
) -> list[object]:
    """Do one thing.

    More about
    it.

    Example:
        python -m thing --model a

    Args:
        model: file
            to read.
        window: in seconds.
        overlap: in seconds.
        threads: number of threads.
    """
    return [model, window, overlap, threads]


def test_command_help_has_groups_and_a_description(capsys: pytest.CaptureFixture[str]) -> None:
    later, description = documented(command)
    assert description == "Do one thing.\n\nMore about it.\n\nexample:\n  python -m thing --model a"
    config = (tyro.conf.OmitArgPrefixes, tyro.conf.DisallowNone)
    assert tyro.cli(later, args=["--model", "a", "--overlap", "2.5"], config=config)() == [Path("a"), None, 2.5, 1]
    with pytest.raises(SystemExit):
        tyro.cli(later, args=["--help"], description=description, config=config)
    text = capsys.readouterr().out
    assert "file to read." in text
    assert "windows options" in text
    assert "None" not in text


@pytest.mark.parametrize("module", command_list.MODULES.values())
def test_every_command_has_complete_help(module: str, capsys: pytest.CaptureFixture[str]) -> None:
    function = command_function(module)
    _, help_texts = _parsed_docstring(inspect.getdoc(function) or "")
    assert set(help_texts) == set(inspect.signature(function).parameters)
    later, description = documented(function)
    config = (tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff)
    _, _, example = description.partition("example:\n")
    if example:
        *_, name, words = example.split(maxsplit=3)[1:]
        assert name == module
        tyro.cli(later, args=shlex.split(words), config=config)
    with pytest.raises(SystemExit):
        tyro.cli(later, args=["--help"], config=config)
    assert not re.search(r"\(default:[\s│]*\)", capsys.readouterr().out)


def test_parameter_that_may_be_none_is_an_optional_option() -> None:
    def required_in_python(model: Path | None, data: Path) -> tuple[Path | None, Path]:
        """Do one thing.

        Args:
            model: file.
            data: directory.
        """
        return model, data

    later, _ = documented(required_in_python)
    config = (tyro.conf.OmitArgPrefixes, tyro.conf.DisallowNone)
    assert tyro.cli(later, args=["--data", "d"], config=config)() == (None, Path("d"))
    with pytest.raises(SystemExit):
        tyro.cli(later, args=["--model", "m"], config=config)
