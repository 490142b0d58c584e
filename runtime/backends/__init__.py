"""Run networks: one file for each library, imported only when its kind of file is opened."""

from __future__ import annotations

import importlib.metadata
import numbers
import os
from pathlib import Path

from runtime.backends.base import MAX_THREADS, Backend, Device
from runtime.core.errors import DeviceError, ModelFileError, check_argument, check_path, excerpt
from runtime.core.io.input_files import check_file

# Packages that `runtime` must not import offer their backend here, named after the suffix they read.
ENTRY_POINT_GROUP = "drn.backends"


def check_model_path(path: Path) -> None:
    """Raise ModelFileError unless there is a file of this name, and the name is a model's."""
    if path.suffix not in (".onnx", ".pt", ".engine"):
        raise ModelFileError(
            f"A model file ends in .onnx, .engine or .pt, and {excerpt(path.name)} does not.", code="wrong_suffix"
        )
    check_file(path, "The model file", ModelFileError)


def is_address(path: str | os.PathLike[str]) -> bool:
    """Return whether a path is the address of a model served by Triton, `triton://host:port/model`, and not a file."""
    check_path(path, ModelFileError)
    return os.fspath(path).startswith(("triton:/", "triton+"))


def open_backend(path: str | os.PathLike[str], device: Device = "auto", threads: int | None = None) -> Backend:
    """Open a model file by its suffix: `.onnx`, `.engine` on a GPU, or `.pt` where torch is installed.

    The query part of a model that was split opens both parts: the other is beside it. An address opens the networks
    behind the front that Triton serves there (`runtime.backends.triton_client`, which has its errors).

    Args:
        path: the model file, or an address.
        device: `auto` takes a GPU if the library that runs this kind of file has one, else the CPU; `cuda` without
            a GPU is an error.
        threads: CPU threads for the network; the library's own choice when None.

    Raises:
        ModelFileError: there is no such file, or it is not a model of this toolkit.
        DeviceError: the library or the device is missing.
    """
    if is_address(path):
        from runtime.backends.triton_client import connect

        return connect(path, device, threads)[0]
    path = Path(path)
    if not isinstance(device, str) or device.partition(":")[0] not in ("auto", "cpu", "cuda"):
        raise DeviceError(f"--device is auto, cpu or cuda, and {excerpt(device)} was given.", code="unknown_device")
    if threads is not None:
        check_argument("threads", threads, numbers.Integral, "a number of threads", DeviceError)
    if threads is not None and not 1 <= threads <= MAX_THREADS:
        raise DeviceError(f"--threads must be 1 to {MAX_THREADS}, and {threads} was given.", code="invalid_option")
    check_model_path(path)
    if path.suffix == ".onnx":
        from runtime.backends.onnxruntime_backend import open_graph

        return open_graph(path, device, threads)
    if path.suffix == ".engine":
        from runtime.backends.tensorrt_backend import open_engine

        return open_engine(path, device, threads)
    for entry_point in importlib.metadata.entry_points(group=ENTRY_POINT_GROUP):
        if entry_point.name == path.suffix[1:]:
            try:
                backend = entry_point.load()
            except ImportError as error:
                raise DeviceError(
                    f"{path.name} needs torch, which cannot be imported here ({error}); "
                    "run `pip install '.[train]'` in the drn-deploy directory, or give the exported .onnx file.",
                    code="missing_library",
                ) from error
            return backend(path, device, threads)
    raise DeviceError(
        "No installed package opens .pt files; run `pip install '.[train]'` in the drn-deploy directory.",
        code="missing_library",
    )
