"""Record a new digest in an ONNX file that another tool changed: `python -m export.seal`."""

from __future__ import annotations

from pathlib import Path

import tyro

from runtime.artifacts.onnx_metadata import MANIFEST_KEYS, read_metadata, write_digest
from runtime.core.cli import command, report_written, suggest_next_command
from runtime.core.errors import ModelFileError
from runtime.core.io.atomic_files import atomic_write, write_json
from runtime.core.io.input_files import check_file
from runtime.media.extractors import description_path, description_with_digest


def seal_model(model: tyro.conf.Positional[Path], /) -> Path:
    """Record a new digest in an ONNX file that another tool changed, so that it can be opened.

    The digest covers the weights, the graph, the manifest and external data. It detects damage from now on, but not
    earlier changes: check the file with `python -m export.verify`.

    Args:
        model: .onnx file from `export.to_onnx` or `export.build_engine`; or an image encoder with its description
            file, which then contains the digest. The parts of a split model refer to each other by SHA-256: split
            the full model again instead.

    Returns:
        The file that contains the digest.

    Raises:
        ModelFileError: the file does not exist, or has no manifest.
    """
    if model.suffix != ".onnx":
        raise ModelFileError(
            f"Expected a model with the suffix .onnx, got {model}. Give the file that was changed.", code="wrong_suffix"
        )
    check_file(model, "The model file", ModelFileError)
    written = model
    if not MANIFEST_KEYS & read_metadata(model).keys() and description_path(model).is_file():
        written = description_path(model)
        write_json(written, description_with_digest(model))
    else:
        content = write_digest(model)
        with atomic_write(model) as temporary:
            temporary.write_bytes(content)
    print(f"{written}: digest recorded.")
    report_written(written)
    suggest_next_command("runtime.describe", model)
    return written


if __name__ == "__main__":
    command(seal_model)
