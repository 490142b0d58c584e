"""List the commands of all packages, and run one by its short name (the program `drn`)."""

from __future__ import annotations

import ast
import difflib
import importlib.metadata
import importlib.util
import re
import runpy
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import NoReturn

DISTRIBUTION = "drn-deploy"
# Group -> short name -> module, in the order of the help.
GROUPS: Mapping[str, Mapping[str, str]] = {
    "Answer queries": {
        "infer": "runtime.infer",
        "serve": "runtime.serve",
        "rank": "runtime.rank",
        "ground-corpus": "runtime.ground_corpus",
        "extract": "runtime.extract",
    },
    "Measure and inspect": {
        "evaluate": "runtime.evaluate",
        "benchmark": "runtime.benchmark",
        "compare": "runtime.benchmarking.compare",
        "describe": "runtime.describe",
        "words": "runtime.grounding.words",
        "doctor": "runtime.doctor",
    },
    "Train": {
        "train": "train",
        "convert": "train.convert",
        "prepare": "train.prepare",
        "simulate": "train.simulate",
        "fit-presence": "train.fit_presence",
    },
    "Export and build": {
        "export": "export.to_onnx",
        "build-engine": "export.build_engine",
        "verify": "export.verify",
        "triton": "export.triton",
        "seal": "export.seal",
    },
    "Quantize": {
        "calibrate": "calib.calibrate",
        "quantize": "calib.quantize",
        "rank-layers": "calib.rank_layers",
        "restore": "calib.restore",
    },
}
MODULES: Mapping[str, str] = {name: module for commands in GROUPS.values() for name, module in commands.items()}
_NAMES: Mapping[str, str] = {module: name for name, module in MODULES.items()}

_started_by_name = False


def main() -> NoReturn:
    """Run the command named by the first argument, or print the list of commands; the program `drn`.

    `drn infer` runs `python -m runtime.infer`, but Python does not search the working directory for modules, so a
    `train.py` there does not hide the package `train`. The exit code for an unknown name is 2.
    """
    global _started_by_name
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help"):
        print(overview())
        sys.exit(0)
    if arguments[0] == "--version":
        print(f"drn {importlib.metadata.version(DISTRIBUTION)}")
        sys.exit(0)
    name = arguments[0]
    module = MODULES.get(name.replace("_", "-"))
    if module is None:
        similar = difflib.get_close_matches(name, MODULES, n=3)
        advice = f"Similar names: {', '.join(similar)}." if similar else "`drn --help` lists the commands."
        print(f"error: There is no command {ascii(name)[:100]}. {advice}", file=sys.stderr)
        sys.exit(2)
    _started_by_name = True
    sys.argv = [f"drn {name}", *arguments[1:]]
    runpy.run_module(module, run_name="__main__", alter_sys=True)
    sys.exit(0)


def typed_name(module: str) -> str:
    """Return the name to type for a command: `drn infer` in a process of `drn`, else `python -m runtime.infer`."""
    if _started_by_name and module in _NAMES:
        return f"drn {_NAMES[module]}"
    return f"python -m {module}"


def as_typed(text: str) -> str:
    """Return `text` with the name to type for every command in it, as `typed_name` gives it."""
    return re.sub(r"python -m ([\w.]*\w)", lambda match: typed_name(match[1]), text)


def overview(package: str = "") -> str:
    """Return the list of commands in groups, each with the first line of its help.

    Args:
        package: a top-level package, to list only its commands as `python -m MODULE`; "" lists all as `drn NAME`.
    """
    lines = [] if package else ["usage: drn COMMAND [OPTIONS]      drn COMMAND --help      drn --version"]
    for group, commands in GROUPS.items():
        shown = {
            f"python -m {module}" if package else name: module
            for name, module in commands.items()
            if not package or module.partition(".")[0] == package
        }
        if shown:
            width = max(map(len, shown))
            rows = [f"  {name.ljust(width)}  {_first_line(module)}" for name, module in shown.items()]
            lines += ["", f"{group}:", *rows] if not package else rows
    return "\n".join(lines)


def _first_line(module: str) -> str:
    """Return the first sentence of the docstring of a command's function, without importing its module."""
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        return ""
    paths = [Path(spec.origin)]
    if spec.submodule_search_locations:
        # The function of a package is in either file, the call that starts it in the second.
        paths.append(Path(next(iter(spec.submodule_search_locations)), "__main__.py"))
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in paths]
    functions = {node.name: node for tree in trees for node in tree.body if isinstance(node, ast.FunctionDef)}
    for node in ast.walk(trees[-1]):
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "command" and node.args:
            function = functions.get(getattr(node.args[0], "id", ""))
            text = "" if function is None else ast.get_docstring(function) or ""
            return " ".join(text.partition("\n\n")[0].split())
    return ""
