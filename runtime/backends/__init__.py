"""Run networks with ONNX Runtime, OpenVINO, TensorRT and Triton; each is imported when a file of its kind is opened.

All packages except `runtime.core`, `artifacts` and `datasets` may import it.
"""

from __future__ import annotations

import importlib.metadata
import numbers
import os
from pathlib import Path

from runtime.backends.base import MAX_THREADS, Backend, Device
from runtime.core.errors import DeviceError, ModelFileError, check_argument, check_option, check_path, excerpt
from runtime.core.io.input_files import check_file

# Packages that `runtime` must not import register a backend in this group, under the suffix of its files.
ENTRY_POINT_GROUP = "drn.backends"


def check_model_path(path: Path) -> None:
    """Raise ModelFileError unless a file exists and has the suffix of a model."""
    if path.suffix not in (".onnx", ".pt", ".engine"):
        raise ModelFileError(
            f"Expected a model file (.onnx, .engine or .pt), got {excerpt(str(path))}. Give another file.",
            code="wrong_suffix",
        )
    check_file(path, "The model file", ModelFileError)


def is_address(path: str | os.PathLike[str]) -> bool:
    """Return whether a path is the address of a model served by Triton, `triton://host:port/model`."""
    check_path(path, ModelFileError)
    return os.fspath(path).startswith(("triton:/", "triton+"))


def open_backend(path: str | os.PathLike[str], device: Device = "auto", threads: int | None = None) -> Backend:
    """Open a model, without tokenization and decoding; `Grounder.load` adds them.

    The library is selected by the suffix: TensorRT for `.engine`, torch for `.pt`, and for `.onnx` the one that the
    manifest names. For a split model, give its query part; the video part is opened from the same directory.

    Args:
        path: the model file, or the address of a model served by Triton: `triton://HOST:PORT/MODEL`.
        device: `auto` selects a GPU if the library supports one, otherwise the CPU. `cuda` requires a GPU.
        threads: CPU threads of the network, 1 to 1024; the library's default when None.

    Returns:
        The backend; also a `PairBackend` if the model was split (`manifest.part == "query"`).

    Raises:
        ModelFileError: the file is missing, damaged, or no model of this toolkit.
        DeviceError: the library or the device is missing, or an option is out of range.
        ServerError: the Triton server cannot be reached, or has not loaded the model.

    Example:
        backend = open_backend("drn.onnx", device="cpu", threads=2)
        heads = backend.run(batch)
        print(heads.matching_logits.shape)  # (B, P)
    """
    if is_address(path):
        from runtime.backends.triton_client import connect

        return connect(path, device, threads)[0]
    path = Path(path)
    if not isinstance(device, str) or device.partition(":")[0] not in ("auto", "cpu", "cuda"):
        raise DeviceError(
            f"Expected auto, cpu or cuda for --device, got {excerpt(device)}. Correct the option.",
            code="unknown_device",
        )
    if threads is not None:
        check_argument("threads", threads, numbers.Integral, "a number of threads", DeviceError)
    check_option("--threads", threads, 1, MAX_THREADS, DeviceError)
    check_model_path(path)
    if path.suffix == ".onnx":
        from runtime.backends.onnx_backend import open_graph

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
                    f"{path.name} needs torch, which cannot be imported ({error}). Run `pip install '.[train]'` in the "
                    "drn-deploy directory, or give the exported .onnx file.",
                    code="missing_library",
                ) from error
            return backend(path, device, threads)
    raise DeviceError(
        "No installed package opens .pt files. Run `pip install '.[train]'` in the drn-deploy directory.",
        code="missing_library",
    )
