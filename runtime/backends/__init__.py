"""What runs the network: one file per library, imported only when its kind of file is opened."""

from __future__ import annotations

import importlib.metadata
import os
from pathlib import Path
from typing import Literal, Protocol

from runtime.errors import DeviceError, ModelFileError
from runtime.manifest import Manifest
from runtime.tensors import Batch, Heads

Device = Literal["auto", "cpu", "cuda"]

# Packages that `runtime` must not import offer their backend here, named after the suffix they read.
ENTRY_POINT_GROUP = "drn.backends"
MOST_THREADS = 1024


class Backend(Protocol):
    """Something that runs the network."""

    @property
    def manifest(self) -> Manifest:
        """What the model says of itself."""

    def run(self, batch: Batch) -> Heads:
        """Return the heads of every query of the batch, in its order."""


def open_backend(path: str | os.PathLike[str], device: Device = "auto", threads: int | None = None) -> Backend:
    """Open a model file by its suffix: `.onnx`, or `.pt` where torch is installed.

    Args:
        path: the model file.
        device: `auto` takes a GPU if the library that runs this kind of file has one, else the CPU; `cuda` without
            a GPU is an error.
        threads: CPU threads for the network; the library's own choice when None.

    Raises:
        ModelFileError: there is no such file, or it is not a model of ours.
        DeviceError: the library or the device is missing.
    """
    path = Path(path)
    if threads is not None and not 1 <= threads <= MOST_THREADS:
        raise DeviceError(f"--threads must be 1 to {MOST_THREADS}, and {threads} was given.")
    if path.suffix not in (".onnx", ".pt", ".engine"):
        raise ModelFileError(f"A model file ends in .onnx, .engine or .pt, and {path.name!r} does not.")
    if not path.is_file():
        raise ModelFileError(f"The model file {path} does not exist; check the path.")
    if path.suffix == ".onnx":
        from runtime.backends.ort import OnnxRuntimeBackend

        return OnnxRuntimeBackend(path, device, threads)
    if path.suffix == ".engine":
        raise DeviceError(
            "This version runs no TensorRT engines yet; give the .onnx file that the engine was built from."
        )
    for entry_point in importlib.metadata.entry_points(group=ENTRY_POINT_GROUP):
        if entry_point.name == path.suffix[1:]:
            try:
                backend = entry_point.load()
            except ImportError as error:
                raise DeviceError(
                    f"{path.name} needs torch, which cannot be imported here ({error}); "
                    "run `pip install 'drn-deploy[train]'`, or give the exported .onnx file."
                ) from error
            return backend(path, device, threads)
    raise DeviceError("No installed package opens .pt files; run `pip install 'drn-deploy[train]'`.")
