"""Read the manifest of a model file, also on machines that cannot run the model."""

from __future__ import annotations

import contextlib
from pathlib import Path

from runtime.artifacts.engine_metadata import read_sidecar
from runtime.artifacts.manifest import METADATA_KEY, Manifest
from runtime.artifacts.onnx_metadata import MISMATCH, read_metadata
from runtime.backends import is_address, open_backend
from runtime.core.errors import ModelFileError


def read_manifest(model: Path) -> Manifest:
    """Return the manifest of a model file.

    An engine needs no GPU, because its sidecar contains the manifest. ONNX Runtime has no kernels for a bf16 graph,
    whose manifest is read without opening the graph.

    Args:
        model: .onnx, .engine or .pt file.

    Raises:
        ModelFileError: the file is missing, damaged, or no model of this toolkit.
        DeviceError: the library that opens the file is not installed.
    """
    if is_address(model):
        raise ModelFileError(
            f"Expected a model file, got the address {model}. Give the file that the server loads.",
            code="wrong_model_kind",
        )
    if model.suffix == ".engine" and model.is_file():
        return read_sidecar(model).manifest
    try:
        return open_backend(model, "cpu").manifest
    except ModelFileError as error:
        if error.code == MISMATCH:
            raise
        with contextlib.suppress(ModelFileError):
            manifest = Manifest.from_json(read_metadata(model).get(METADATA_KEY), str(model))
            if model.suffix == ".onnx" and manifest.precision == "bf16":
                return manifest
        raise
