"""Test what linters cannot: what an import loads, and calls that Python 3.9 does not know.

Import directions and circles are contracts of import-linter (pyproject.toml), syntax is checked by ruff (ruff.toml).
"""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("runtime", "train", "export", "calib")
HEAVY = ("torch", "onnx", "tensorrt", "tensorrt_rtx", "onnxruntime", "matplotlib", "nltk", "tyro")


@pytest.mark.parametrize("statement", ["import runtime", "import calib"])
def test_import_loads_no_heavy_modules(statement: str) -> None:
    code = f"import sys; {statement}; print(*[name for name in {HEAVY} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert result.stdout.split() == []


def test_engine_code_is_compatible_with_python_39() -> None:
    # TensorRT 8.6 is not for newer ones than 3.10, and torch, which needs one, is not for these.
    of_torch = {"exportable_model.py", "leg_torch.py", "torch_baselines.py", "leg_prepare.py"}
    paths = [path for package in ("runtime", "calib", "export") for path in (ROOT / package).rglob("*.py")]
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
    for package in PACKAGES:
        assert not {path.stem for path in (ROOT / package).rglob("*.py")} & taken


@pytest.mark.parametrize("package", PACKAGES)
def test_errors_quote_values_with_a_bound(package: str) -> None:
    """A value in an error is quoted by `excerpt`: only constants and slices are short by themselves."""
    for path in (ROOT / package).rglob("*.py"):
        raised = (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Raise))
        for value in (part for node in raised for part in ast.walk(node) if isinstance(part, ast.FormattedValue)):
            short = isinstance(value.value, ast.Name) and value.value.id.isupper()
            sliced = isinstance(value.value, ast.Subscript) and isinstance(value.value.slice, ast.Slice)
            assert value.conversion != ord("r") or short or sliced, f"{path.relative_to(ROOT)}:{value.lineno}"
