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
    commands = {"infer.py", "evaluate.py", "describe.py", "doctor.py", "cli.py"}
    for path in (ROOT / "runtime").rglob("*.py"):
        if path.name not in commands:
            tree = ast.parse(path.read_text(), feature_version=(3, 9))
            futures = {alias.name for node in tree.body if isinstance(node, ast.ImportFrom) for alias in node.names}
            assert "annotations" in futures, f"{path} evaluates its annotations, which Python 3.9 cannot"


def test_what_makes_and_judges_engines_keeps_to_python_39() -> None:
    # TensorRT 8.6 is not for newer ones than 3.10, and torch, which needs one, is not for these.
    of_torch = {"exportable_model.py", "on_torch.py", "rivals.py", "prepare.py"}
    paths = [path for room in ("runtime", "calib", "export") for path in (ROOT / room).rglob("*.py")]
    paths += [ROOT / "benchmarks" / "gpu.py", *(ROOT / "benchmarks" / "acceptance").glob("*.py")]
    for path in paths:
        tree = ast.parse(path.read_text(), feature_version=(3, 9))
        for node in ast.walk(tree) if path.name not in of_torch else ():
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name):
                continue
            where = f"{path.relative_to(ROOT)}:{node.lineno}"
            assert node.func.id != "zip" or not node.keywords, f"{where}: zip has no strict there"
            unions = [argument for argument in node.args if isinstance(argument, ast.BinOp)]
            assert node.func.id != "isinstance" or not unions, f"{where}: no union is a class there"
        newest = [node for node in tree.body if isinstance(node, ast.Import) and node.names[0].name == "tomllib"]
        assert not newest, f"{path.relative_to(ROOT)} imports tomllib"


def test_no_file_is_named_after_a_library() -> None:
    taken = {"onnxruntime", "tensorrt", "onnx", "torch", "numpy", "profile", "utils"}
    for room in ROOMS:
        assert not {path.stem for path in (ROOT / room).rglob("*.py")} & taken


@pytest.mark.parametrize("room", ROOMS)
def test_errors_quote_values_with_a_bound(room: str) -> None:
    """A value in an error is quoted by `excerpt`: only constants and slices are short by themselves."""
    for path in (ROOT / room).rglob("*.py"):
        raised = (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Raise))
        for value in (part for node in raised for part in ast.walk(node) if isinstance(part, ast.FormattedValue)):
            short = isinstance(value.value, ast.Name) and value.value.id.isupper()
            sliced = isinstance(value.value, ast.Subscript) and isinstance(value.value.slice, ast.Slice)
            assert value.conversion != ord("r") or short or sliced, f"{path.relative_to(ROOT)}:{value.lineno}"
