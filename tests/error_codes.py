"""Read the codes of errors from source code."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGES = ("runtime", "calib", "export", "train")

# Refusals of the HTTP service have codes of their own, which docs/serving.md lists.
OTHERS = {"Refusal"}


def error_codes(root: Path = ROOT) -> dict[str, list[str]]:
    """Return where each code occurs, as FILE:LINE: codes of classes, and those given to an error as `code`.

    Raises:
        AssertionError: a code is neither a string nor a constant of a module, so that it cannot be read.
    """
    paths = [path for package in PACKAGES for path in sorted((root / package).rglob("*.py"))]
    trees = {path: ast.parse(path.read_text()) for path in paths}
    constants = {
        target.id: node.value
        for tree in trees.values()
        for node in tree.body
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name) and target.id.isupper()
    }
    codes: dict[str, list[str]] = {}
    for path, tree in trees.items():
        for line, value in _codes(tree):
            where = f"{path.relative_to(root)}:{line}"
            for code in _texts(value, constants, where):
                codes.setdefault(code, []).append(where)
    return codes


def _codes(tree: ast.Module) -> Iterator[tuple[int, ast.expr]]:
    """Yield line and value of every `code` of a class and every `code=` of a call, also through a local variable."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            yield from _assigned(node.body, "code")
        elif isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] not in OTHERS:
            yield from ((node.lineno, word.value) for word in node.keywords if word.arg == "code")
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            inner = list(ast.walk(node))
            words = [
                word for call in inner if isinstance(call, ast.Call) for word in call.keywords if word.arg == "code"
            ]
            for name in {word.value.id for word in words if isinstance(word.value, ast.Name)}:
                yield from _assigned(inner, name)


def _assigned(nodes: Iterable[ast.AST], name: str) -> Iterator[tuple[int, ast.expr]]:
    for node in nodes:
        if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == name for t in node.targets):
            yield node.lineno, node.value


def _texts(value: ast.expr, constants: dict[str, ast.expr], where: str) -> list[str]:
    if isinstance(value, ast.Constant):
        return [value.value] if isinstance(value.value, str) else []
    if isinstance(value, ast.IfExp):
        return [*_texts(value.body, constants, where), *_texts(value.orelse, constants, where)]
    if isinstance(value, ast.Name) and value.id.isupper():
        return _texts(constants[value.id], constants, where)
    # A local variable, whose values are read where it is assigned, or the code of another error.
    passed_on = isinstance(value, (ast.Name, ast.Attribute, ast.Subscript))
    assert passed_on, f"{where}: the code is neither a string nor a constant of a module"
    return []
