"""Imports go down only, and the floor stays light."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = ("runtime", "train", "export", "calib")
ALLOWED = {"runtime": set(), "train": {"runtime"}, "calib": {"runtime"}, "export": {"runtime", "calib", "train"}}
HEAVY = ("torch", "onnx", "tensorrt", "tensorrt_rtx", "onnxruntime", "matplotlib", "nltk", "tyro")


def imported(path: Path) -> set[str]:
    """Return the top-level names that a module imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("room", ROOMS)
def test_no_room_imports_upwards(room: str) -> None:
    for path in (ROOT / room).rglob("*.py"):
        upwards = imported(path) & (set(ROOMS) - ALLOWED[room] - {room})
        assert not upwards, f"{path.relative_to(ROOT)} imports {upwards}"


def test_runtime_never_names_torch_or_onnx() -> None:
    for path in (ROOT / "runtime").rglob("*.py"):
        assert not imported(path) & {"torch", "onnx"}, path


@pytest.mark.parametrize("statement", ["import runtime", "import calib"])
def test_the_floor_imports_nothing_heavy(statement: str) -> None:
    code = f"import sys; {statement}; print(*[name for name in {HEAVY} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert result.stdout.split() == []


def test_runtime_keeps_to_python_39_syntax() -> None:
    commands = {"infer.py", "evaluate.py", "describe.py", "doctor.py", "command.py"}
    for path in (ROOT / "runtime").rglob("*.py"):
        if path.name not in commands:
            tree = ast.parse(path.read_text(), feature_version=(3, 9))
            futures = {alias.name for node in tree.body if isinstance(node, ast.ImportFrom) for alias in node.names}
            assert "annotations" in futures, f"{path} evaluates its annotations, which Python 3.9 cannot"


def test_no_file_is_named_after_a_library() -> None:
    taken = {"onnxruntime", "tensorrt", "onnx", "torch", "numpy", "profile", "utils"}
    for room in ROOMS:
        assert not {path.stem for path in (ROOT / room).rglob("*.py")} & taken
