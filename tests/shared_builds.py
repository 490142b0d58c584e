"""Build slow inputs once a run and share them between the processes of pytest-xdist."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import importlib.util
import os
import shutil
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest


def run_directory(factory: pytest.TempPathFactory) -> Path:
    """Return the temporary directory that all processes of this run share."""
    own = factory.getbasetemp()
    return own.parent if "PYTEST_XDIST_WORKER" in os.environ else own


def build_once(directory: Path, build: Callable[[Path], object]) -> Path:
    """Fill a directory in the first process that needs it; others wait for that process.

    Args:
        directory: does not exist before the first call.
        build: writes the content into the empty directory that it gets.
    """
    with open(directory.with_name(f"{directory.name}.lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not directory.exists():
            unfinished = directory.with_name(f"{directory.name}.unfinished")
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir()
            build(unfinished)
            unfinished.rename(directory)
    return directory


@contextlib.contextmanager
def traced_once(directory: Path) -> Iterator[None]:
    """Trace each network structure once per run, because torch takes seconds for it.

    The key covers classes, attributes and the shapes of weights, the shapes of inputs, and the opset, but not the
    number of words. A graph that was traced with other weights gets those of the module. If torch folded weights into
    other constants, they must be equal in both, or else the module is traced anew.
    """
    import onnx
    import torch

    export = torch.onnx.export

    def traced(module: Any, inputs: tuple[Any, ...], **options: Any) -> Any:
        shapes = [(tensor.dtype, tuple(tensor.shape)) for tensor in inputs]
        key = hashlib.sha256(repr((_structure(module), shapes, options["opset_version"])).encode()).hexdigest()
        programs = []

        def build(unfinished: Path) -> None:
            programs.append(export(module, inputs, **options))
            model = programs[0].model_proto
            onnx.save(model, unfinished / "traced.onnx")
            np.savez(unfinished / "folded.npz", **_fill(model, module))

        path = build_once(directory / f"traced-{key}", build)
        if not programs:
            model = onnx.load(path / "traced.onnx")
            with np.load(path / "folded.npz") as stored:
                folded = _fill(model, module)
                if all(np.array_equal(stored[name], values) for name, values in folded.items()):
                    return types.SimpleNamespace(model_proto=model)
        return programs[0] if programs else export(module, inputs, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.onnx, "export", traced)
        yield


def _structure(value: Any, name: str = "") -> Any:
    """Return classes, attributes and shapes of weights of a module as plain values, without the rows of embeddings."""
    import torch

    if isinstance(value, torch.nn.Module):
        first = 1 if name == "embedding" else 0
        weights = [(key, tensor.dtype, tuple(tensor.shape)[first:]) for key, tensor in _weights(value, recurse=False)]
        others = {key: item for key, item in vars(value).items() if key not in ("_parameters", "_buffers")}
        return type(value).__qualname__, weights, _structure(others)
    if isinstance(value, torch.Tensor):
        return value.dtype, value.tolist()
    if isinstance(value, dict):
        return [(key, _structure(item, key)) for key, item in value.items()]
    return [_structure(item) for item in value] if isinstance(value, (list, tuple)) else value


def _weights(module: Any, recurse: bool) -> list[tuple[str, Any]]:
    return [*module.named_parameters(recurse=recurse), *module.named_buffers(recurse=recurse)]


def _fill(model: Any, module: Any) -> dict[str, np.ndarray]:
    """Write the weights of a module into a graph, and return those that the graph does not contain."""
    import onnx

    weights = {name: tensor.detach().numpy() for name, tensor in _weights(module, recurse=True)}
    for tensor in model.graph.initializer:
        if tensor.name in weights:
            tensor.CopyFrom(onnx.numpy_helper.from_array(weights.pop(tensor.name), tensor.name))
    return weights


def can_trace() -> bool:
    return all(importlib.util.find_spec(name) is not None for name in ("torch", "onnx", "onnxscript"))
