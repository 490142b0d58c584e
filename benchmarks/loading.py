"""Measure the time that the digest check adds to opening a model file."""

from __future__ import annotations

import concurrent.futures
import contextlib
import functools
import os
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from runtime.artifacts import onnx_metadata
from runtime.backends import onnxruntime_session
from runtime.backends.onnx_backend import open_graph
from runtime.core.cli import command
from runtime.core.errors import GroundingError, ModelFileError
from runtime.core.io.digests import sha256


class _Unchecked(onnx_metadata.DigestCheck):
    """A digest check that reads nothing."""

    @property
    def mismatch(self) -> None:
        """Return None, because nothing is compared."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._path = path

    def result(self) -> onnx_metadata.Content:
        return onnx_metadata.Content("", (), "", "")


def loading(model: Path, *, repeats: int = 9) -> dict[str, float]:
    """Open a model in turns with and without the check of its digest.

    Args:
        model: .onnx file of a model that is not split, or .pt file.
        repeats: number of turns; the report has medians.
    """
    if repeats < 1:
        raise GroundingError(f"Expected --repeats of at least 1, got {repeats}.", code="invalid_option")
    if model.suffix not in (".onnx", ".pt"):
        raise ModelFileError(f"Expected a .onnx or .pt file, got {model}. Pass one of these.", code="wrong_suffix")
    opened, unchecked = _graph(model) if model.suffix == ".onnx" else _checkpoint(model)
    opened()
    times: dict[str, list[float]] = {}
    for _ in range(repeats):
        for name, open_model in (("checked", opened), ("unchecked", unchecked)):
            started, cpu = time.perf_counter(), time.process_time()
            open_model()
            times.setdefault(f"{name}_s", []).append(time.perf_counter() - started)
            times.setdefault(f"{name}_cpu_s", []).append(time.process_time() - cpu)
        with _waits() as waits:
            opened()
        times.setdefault("waited_s", []).append(sum(waits))
    results = {name: statistics.median(values) for name, values in times.items()}
    print(
        f"{model.name}, {model.stat().st_size / 1e6:.0f} MB: {results['checked_s']:.3f} s with the check, "
        f"{results['unchecked_s']:.3f} s without; CPU time {results['checked_cpu_s']:.3f} s and "
        f"{results['unchecked_cpu_s']:.3f} s; {results['waited_s']:.3f} s waiting for the check"
    )
    return results


@contextlib.contextmanager
def _waits() -> Iterator[list[float]]:
    """Yield a list that collects the seconds of every wait for a digest or for the result of a thread."""
    waits: list[float] = []

    def timed(wait: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(wait)
        def waited(*arguments: Any, **options: Any) -> Any:
            started = time.perf_counter()
            try:
                return wait(*arguments, **options)
            finally:
                waits.append(time.perf_counter() - started)

        return waited

    result, future = onnx_metadata.DigestCheck.result, concurrent.futures.Future.result
    onnx_metadata.DigestCheck.result = timed(result)  # type: ignore[method-assign]
    concurrent.futures.Future.result = timed(future)  # type: ignore[method-assign]
    try:
        yield waits
    finally:
        onnx_metadata.DigestCheck.result, concurrent.futures.Future.result = result, future  # type: ignore[method-assign]


def _graph(model: Path) -> tuple[Callable[[], object], Callable[[], object]]:
    def unchecked() -> object:
        with _replaced():
            return open_graph(model, "cpu")

    return lambda: open_graph(model, "cpu"), unchecked


@contextlib.contextmanager
def _replaced() -> Iterator[None]:
    checks = onnxruntime_session.DigestCheck
    onnxruntime_session.DigestCheck = _Unchecked  # type: ignore[misc]
    try:
        yield
    finally:
        onnxruntime_session.DigestCheck = checks  # type: ignore[misc]


def _checkpoint(model: Path) -> tuple[Callable[[], object], Callable[[], object]]:
    from train import backend, checkpoints

    def unchecked() -> object:
        hashed = checkpoints.sha256_and_seal
        # The manifest still records the SHA-256 of the file.
        checkpoints.sha256_and_seal = lambda path: (sha256(path), True)
        try:
            return backend.open_checkpoint(model, "cpu")
        finally:
            checkpoints.sha256_and_seal = hashed

    return lambda: backend.open_checkpoint(model, "cpu"), unchecked


if __name__ == "__main__":
    command(loading)
