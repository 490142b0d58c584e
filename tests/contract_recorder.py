"""Read the public interface off the code: commands, Python API, graphs, file formats and HTTP routes."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import json
import re
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx

COMMANDS = {
    "runtime": (
        "infer", "evaluate", "benchmark", "describe", "doctor", "serve", "ground_corpus", "extract", "rank",
    ),
    "export": ("to_onnx", "build_engine", "verify", "triton"),
    "calib": ("calibrate", "quantize", "rank_layers", "restore"),
    "train": ("__main__", "convert", "prepare", "simulate", "fit_presence"),
}  # fmt: skip


def commands() -> dict[str, Any]:
    """Return each command's parameters, in order: kind, default and the values it is limited to."""
    return {
        f"{package}.{name}".removesuffix(".__main__"): _parameters(_function(package, name), choices=True)
        for package, names in COMMANDS.items()
        for name in names
    }


def command_function(module: str) -> Callable[..., Any]:
    """Return the function of a command, such as `train` or `runtime.infer`."""
    package, _, name = module.rpartition(".")
    return getattr(importlib.import_module(module), "seal_model", None) or _function(
        package or name, name if package else "__main__"
    )


def _function(package: str, name: str) -> Callable[..., Any]:
    return getattr(importlib.import_module(f"{package}.{name}"), package if name == "__main__" else name)


def _parameters(function: Callable[..., Any], *, choices: bool = False) -> dict[str, Any]:
    hints = typing.get_type_hints(function, include_extras=True) if choices else {}
    recorded = {}
    for name, parameter in inspect.signature(function).parameters.items():
        default = parameter.default
        required = default is inspect.Parameter.empty
        entry: dict[str, Any] = {"kind": parameter.kind.name}
        if not required:
            entry["default"] = default if isinstance(default, (bool, int, float)) or default is None else str(default)
        values = sorted(map(str, _literals(hints.get(name))))
        if values:
            entry["choices"] = values
        recorded[name] = entry
    return recorded


def _literals(hint: Any) -> list[Any]:
    if typing.get_origin(hint) is typing.Literal:
        return list(typing.get_args(hint))
    return [value for inner in typing.get_args(hint) for value in _literals(inner)]


def python_interface() -> dict[str, Any]:
    """Return the names of `runtime`, with the signatures of functions and of public methods and fields of classes."""
    import runtime

    interface: dict[str, Any] = {}
    for name in runtime.__all__:
        value = getattr(runtime, name)
        if inspect.isclass(value):
            members = {
                member: _parameters(function)
                for member, function in inspect.getmembers(value, callable)
                if not member.startswith("_") and member in _own_members(value)
            }
            fields = [field.name for field in dataclasses.fields(value)] if dataclasses.is_dataclass(value) else []
            properties = [
                key for key in _own_members(value) if isinstance(inspect.getattr_static(value, key), property)
            ]
            interface[name] = {"methods": members, "fields": fields, "properties": sorted(properties)}
        else:
            interface[name] = _parameters(value)
    return interface


def _own_members(value: type) -> set[str]:
    return {
        name
        for base in value.__mro__
        if base.__module__.split(".")[0] == "runtime"
        for name in vars(base)
        if not name.startswith("_")
    }


def graphs(directory: Path) -> dict[str, Any]:
    """Return names, types and numbers of dimensions of the inputs and outputs of every ONNX file in a directory."""
    signatures = {}
    for path in sorted(directory.glob("*.onnx")):
        graph = onnx.load(path, load_external_data=False).graph
        signatures[path.name] = {
            side: {
                value.name: [value.type.tensor_type.elem_type, len(value.type.tensor_type.shape.dim)]
                for value in getattr(graph, side)
            }
            for side in ("input", "output")
        }
    return signatures


def keys(value: Any, path: str = "") -> set[str]:
    """Return the paths of all keys of a JSON value; the entries of a list share one, and so do keys that are data."""
    if isinstance(value, dict):
        # Tables from names of videos, words, tensors, files or versions to values are data.
        return {
            inner
            for key, item in value.items()
            for inner in {f"{path}.{key}", *keys(item, f"{path}.{key}")}
            if re.fullmatch(r"[A-Za-z_@=.0-9 ]+", key)
        }
    if isinstance(value, list):
        return {inner for item in value[:3] for inner in keys(item, f"{path}[]")}
    return set()


def formats(directory: Path) -> dict[str, list[str]]:
    """Return the key paths of each JSON, JSONL and NPZ file in a directory, and of the metadata of each ONNX file."""
    key_paths: dict[str, set[str]] = {}
    for path in sorted(directory.rglob("*")):
        name = path.relative_to(directory).as_posix()
        if path.suffix == ".json":
            key_paths[name] = keys(json.loads(path.read_text(encoding="utf-8")))
        elif path.suffix == ".jsonl":
            key_paths[name] = keys([json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line])
        elif path.suffix == ".npz":
            with np.load(path) as arrays:
                key_paths[name] = {*arrays.files, *keys(json.loads(str(arrays["about"])), "about")}
        elif path.suffix == ".onnx":
            entries = {entry.key: entry.value for entry in onnx.load(path, load_external_data=False).metadata_props}
            key_paths[name] = {
                *(key for key in entries if key.startswith("drn.")),
                *(inner for key in entries if key.startswith("drn.") for inner in keys(json.loads(entries[key]), key)),
            }
    data = (".vocabulary.words.", ".tensors.", ".ranges.", ".producer.", ".sources.", ".versions.", ".videos.")
    return {
        name: sorted(path for path in paths if not any(part in path for part in data))
        for name, paths in key_paths.items()
        if not name.startswith("data/")
    }


def routes(document: dict[str, Any]) -> dict[str, Any]:
    """Return paths, methods, parameters and the property names of every schema of an OpenAPI document."""
    operations = {
        f"{method.upper()} {path}": {
            "parameters": sorted(parameter["name"] for parameter in operation.get("parameters", ())),
            "body": sorted(operation.get("requestBody", {}).get("content", {})),
            "responses": sorted(operation["responses"]),
        }
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
    }
    schemas = {
        name: sorted(schema.get("properties", {})) for name, schema in document.get("components", {})["schemas"].items()
    }
    return {"operations": operations, "schemas": schemas}
