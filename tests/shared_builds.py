"""Build slow inputs once a run and share them between the processes of pytest-xdist."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import importlib.util
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

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
    """Trace each network once per run, because torch takes seconds for it.

    The key covers the class, attributes and weights of the traced module, its configuration and the opset; the same
    input always gives the same graph. Everything that follows the tracing runs as usual.
    """
    import onnx

    from export.tracing import tracer

    trace = tracer._trace

    def traced(graph: Any, config: Any, opset: int) -> onnx.ModelProto:
        key = hashlib.sha256(repr((_content(graph), config, opset)).encode()).hexdigest()

        def build(unfinished: Path) -> None:
            onnx.save(trace(graph, config, opset), unfinished / "traced.onnx")

        return onnx.load(build_once(directory / f"traced-{key}", build) / "traced.onnx")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tracer, "_trace", traced)
        yield


def _content(value: Any) -> Any:
    """Return the classes, attributes and weights of a module as plain values."""
    import torch

    if isinstance(value, torch.Tensor):
        return value.dtype, tuple(value.shape), hashlib.sha256(value.detach().numpy().tobytes()).hexdigest()
    if isinstance(value, torch.nn.Module):
        return type(value).__qualname__, _content(vars(value))
    if isinstance(value, dict):
        return [(name, _content(item)) for name, item in value.items()]
    return [_content(item) for item in value] if isinstance(value, (list, tuple)) else value


def can_trace() -> bool:
    return all(importlib.util.find_spec(name) is not None for name in ("torch", "onnx", "onnxscript"))
