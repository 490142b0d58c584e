"""Test `runtime.core.command_list`: the program `drn`, and the lists of commands."""

from __future__ import annotations

import importlib.util
import os
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from runtime.core import command_list

ROOT = Path(__file__).parents[3]


def test_every_command_is_listed_with_one_sentence() -> None:
    text = command_list.overview()
    for name, module in command_list.MODULES.items():
        assert importlib.util.find_spec(module) is not None
        (line,) = [line for line in text.splitlines() if line.split()[:1] == [name]]
        sentence = line.split(maxsplit=1)[1]
        assert sentence.endswith(".")
        assert ". " not in sentence
        assert len(line) < 125


@pytest.mark.parametrize("package", ["runtime", "export"])
def test_package_lists_its_own_commands(package: str, capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_module(package, run_name="__main__")
    listed = {line.split()[2] for line in capsys.readouterr().out.splitlines()}
    assert listed == {module for module in command_list.MODULES.values() if module.partition(".")[0] == package}


def test_drn_ignores_modules_of_the_working_directory(tmp_path: Path) -> None:
    for name in ("train.py", "export.py", "runtime.py"):
        (tmp_path / name).write_text("raise SystemExit(99)")
    # Like the installed script, without the working directory in the module search path.
    start = "from runtime.core.command_list import main; main()"
    words = [sys.executable, "-P", "-c", start, "describe", "missing.onnx"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    result = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.returncode == 2
    assert "missing.onnx" in result.stderr


@pytest.fixture
def drn(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[Any, str, str]]:
    """Run `drn` in this process; return its exit code, stdout and stderr."""

    def run(*arguments: str) -> tuple[Any, str, str]:
        monkeypatch.setattr(command_list, "_started_by_name", False)
        monkeypatch.setattr(sys, "argv", ["drn", *arguments])
        with pytest.raises(SystemExit) as ended:
            command_list.main()
        return (ended.value.code, *capsys.readouterr())

    return run


def test_drn_help_and_errors_show_the_short_name(drn: Any, tmp_path: Path) -> None:
    code, out, _ = drn("describe", "--help")
    assert code == 0
    assert out.startswith("usage: drn describe ")
    assert "  drn describe drn.onnx\n" in out
    code, _, err = drn("evaluate", "--predictions-from", "p.jsonl", "--data", str(tmp_path / "missing"))
    assert code == 2
    assert "`drn simulate --output DIR`" in err


def test_drn_accepts_underscores_and_suggests_near_names(drn: Any) -> None:
    code, out, _ = drn("ground_corpus", "--help")
    assert (code, out.split()[:2]) == (0, ["usage:", "drn"])
    code, _, err = drn("evalute")
    assert code == 2
    assert "evaluate" in err


def test_drn_prints_version_and_overview(drn: Any) -> None:
    code, out, _ = drn("--version")
    assert (code, out.split()[0]) == (0, "drn")
    assert drn() == drn("--help") == (0, command_list.overview() + "\n", "")
