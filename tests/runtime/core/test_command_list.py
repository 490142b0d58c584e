"""Test `runtime.core.command_list`: the program `drn`, and the lists of commands."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from runtime.core import command_list

ROOT = Path(__file__).parents[3]
DRN = "import sys; sys.argv[0] = 'drn'; from runtime.core.command_list import main; main()"


def drn(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run `drn` like the installed script, without the working directory in the module search path."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    line = [sys.executable, "-P", "-c", DRN, *arguments]
    return subprocess.run(line, cwd=cwd, env=environment, capture_output=True, text=True)


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
def test_package_lists_its_own_commands(package: str) -> None:
    result = subprocess.run([sys.executable, "-m", package], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0
    listed = {line.split()[2] for line in result.stdout.splitlines()}
    assert listed == {module for module in command_list.MODULES.values() if module.partition(".")[0] == package}


def test_drn_ignores_modules_of_the_working_directory(tmp_path: Path) -> None:
    for name in ("train.py", "export.py", "runtime.py"):
        (tmp_path / name).write_text("raise SystemExit(99)")
    result = drn("describe", "missing.onnx", cwd=tmp_path)
    assert result.returncode == 2
    assert "missing.onnx" in result.stderr


def test_drn_help_and_next_lines_show_the_short_name() -> None:
    result = drn("describe", "--help")
    assert result.returncode == 0
    assert result.stdout.startswith("usage: drn describe ")
    assert "  drn describe drn.onnx\n" in result.stdout


def test_drn_errors_show_the_short_name(tmp_path: Path) -> None:
    result = drn("evaluate", "--predictions-from", "p.jsonl", "--data", str(tmp_path / "missing"))
    assert result.returncode == 2
    assert "`drn simulate --output DIR`" in result.stderr


def test_drn_accepts_underscores_and_passes_exit_codes() -> None:
    assert drn("ground_corpus", "--no-such-option").returncode == 2


def test_drn_unknown_command_suggests_near_names() -> None:
    result = drn("evalute")
    assert result.returncode == 2
    assert "evaluate" in result.stderr


def test_drn_prints_version_and_overview() -> None:
    version = drn("--version")
    assert version.returncode == 0
    assert version.stdout.split()[0] == "drn"
    assert drn().stdout == drn("--help").stdout == command_list.overview() + "\n"


def test_typed_name_without_drn_is_python_m() -> None:
    assert command_list.typed_name("train.convert") == "python -m train.convert"
