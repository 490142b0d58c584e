"""Open and run the networks that extract clip features: C3D or I3D on clips, or an image encoder on single frames."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from runtime.artifacts import manifest as drn_manifest
from runtime.artifacts.extractor_manifest import METADATA_KEY, ExtractorManifest
from runtime.artifacts.onnx_metadata import DIGEST, MISMATCH, Content, read_content
from runtime.backends.base import Device
from runtime.core.errors import (
    DeviceMemoryError,
    ModelFileError,
    excerpt,
    is_out_of_memory,
)
from runtime.core.io.digests import json_digest
from runtime.core.io.input_files import check_file, read_json
from runtime.core.io.text_files import parse_json


class Extractor(Protocol):
    """A network that extracts features of clips.

    Attributes:
        identity: digest of everything that determines its features: all files of the network, and its manifest.
    """

    identity: str

    @property
    def manifest(self) -> ExtractorManifest:
        """Return the manifest of the extractor."""

    def extract(self, clips: np.ndarray) -> np.ndarray:
        """Return the features of clips.

        Args:
            clips: (N, window, height, width, 3) uint8 RGB, with `window` frames and the height and width of `crop` of
                the manifest.

        Returns:
            (N, D) float32.
        """


class ClipExtractor:
    """An ONNX extractor of (N, window, height, width, 3) uint8 clips: C3D or I3D of `export.to_onnx`."""

    def __init__(self, session: Any, manifest: ExtractorManifest, identity: str) -> None:
        self.manifest = manifest
        self.identity = identity
        self._session = session

    def extract(self, clips: np.ndarray) -> np.ndarray:
        """Return (N, D) float32 features of N clips; see `Extractor.extract` for the shape of clips."""
        return _run(self._session, clips, self.manifest)


class ImageExtractor(ClipExtractor):
    """An extractor whose ONNX graph encodes images, from (N, 3, height, width) float32 to (N, D).

    The image of a clip is its middle frame.
    """

    def __init__(self, session: Any, manifest: ExtractorManifest, identity: str) -> None:
        super().__init__(session, manifest, identity)
        # Scaling and normalization are one multiplication and one addition.
        self._factor = (1 / np.array(manifest.std, np.float32) / (255 / manifest.white)).astype(np.float32)
        self._offset = (-np.array(manifest.mean) / np.array(manifest.std)).astype(np.float32)

    def extract(self, clips: np.ndarray) -> np.ndarray:
        """Return (N, D) float32 features of N clips; see `Extractor.extract` for the shape of clips."""
        images = clips[:, clips.shape[1] // 2] * self._factor + self._offset
        return _run(self._session, np.ascontiguousarray(images.transpose(0, 3, 1, 2)), self.manifest)


def open_extractor(path: str | os.PathLike[str], device: Device = "auto", threads: int | None = None) -> Extractor:
    """Open an extractor: an `.onnx` file with its manifest inside or in NAME.onnx.json, or an engine.

    The input of a graph determines its kind: uint8 clips, or one float32 image per clip.

    Args:
        device: `auto`, `cpu` or `cuda`.
        threads: number of CPU threads of ONNX Runtime. Default: its own.

    Raises:
        ModelFileError: the file is missing or is not an extractor.
        DeviceError: ONNX Runtime or the device is missing.
    """
    path = Path(path)
    if path.suffix not in (".onnx", ".engine"):
        raise ModelFileError(
            f"Expected an .onnx or .engine file as extractor, got {excerpt(path.name)}. Export c3d.pt with `python -m "
            "export.to_onnx`; docs/your-own-video.md shows the steps.",
            code="wrong_suffix",
        )
    check_file(path, "The extractor", ModelFileError)
    if path.suffix == ".engine":
        from runtime.backends.tensorrt_backend import open_extractor_engine

        return open_extractor_engine(path, device)
    from runtime.backends.onnxruntime_session import create_session

    session, _, content = create_session(path, device, threads)
    manifest = _manifest(session, path, content)
    identity = json_digest([manifest.to_dict(), content.sha256, content.external])
    inputs = [(entry.type, len(entry.shape)) for entry in session.get_inputs()]
    if inputs == [("tensor(uint8)", 5)]:
        return ClipExtractor(session, manifest, identity)
    if inputs == [("tensor(float)", 4)]:
        return ImageExtractor(session, manifest, identity)
    actual = ", ".join(f"{kind} of {axes} axes" for kind, axes in inputs) or "none"
    raise ModelFileError(
        f"Expected one input of {path}, clips (uint8, 5 axes) or images (float, 4 axes), got {actual}. Give an "
        "extractor.",
        code="unexpected_tensors",
    )


def _manifest(session: Any, path: Path, content: Content) -> ExtractorManifest:
    metadata = session.get_modelmeta().custom_metadata_map
    if drn_manifest.METADATA_KEY in metadata:
        raise ModelFileError(
            f"{path} is a DRN model, not an extractor. Give it as --model, and an extractor as --extractor.",
            code="wrong_model_kind",
        )
    text = metadata.get(METADATA_KEY)
    if text is not None:
        value = parse_json(text, f"The manifest of {path}", ModelFileError, advice="export it again")
        return ExtractorManifest.from_dict(value, str(path))
    value = read_description(path)
    check_description(value, path, content)
    return ExtractorManifest.from_dict(value, str(description_path(path)))


def description_path(path: Path) -> Path:
    """Return the path of the description of an image encoder: NAME.onnx.json."""
    return path.with_name(f"{path.name}.json")


def read_description(path: Path) -> dict[str, Any]:
    """Return the description of an image encoder; ModelFileError if there is none."""
    description = description_path(path)
    if not description.is_file():
        raise ModelFileError(
            f"{path} contains no description of its input. Export C3D or I3D with `python -m export.to_onnx`, or "
            f"describe your own encoder in {description.name} as docs/your-own-video.md shows.",
            code="missing_manifest",
        )
    value = read_json(description, "description of an extractor", ModelFileError)
    ExtractorManifest.from_dict(value, str(description))
    return value


def check_description(value: Mapping[str, Any], path: Path, content: Content) -> None:
    """Raise ModelFileError if a description records a digest that differs from the digest of the files."""
    if DIGEST in value and value[DIGEST] != _description_digest(value, content):
        raise ModelFileError(
            f"{path} or {description_path(path).name} changed since the digest was recorded. Copy both again, or "
            "record intended changes with `python -m export.seal`.",
            code=MISMATCH,
        )


def description_with_digest(path: Path) -> dict[str, Any]:
    """Return the description of an image encoder with a digest of it, of the graph and of its external data."""
    value = read_description(path)
    return {**value, DIGEST: _description_digest(value, read_content(path))}


def _description_digest(value: Mapping[str, Any], content: Content) -> str:
    rest = {name: item for name, item in value.items() if name != DIGEST}
    return json_digest([rest, content.sha256, content.external])


def _run(session: Any, batch: np.ndarray, manifest: ExtractorManifest) -> np.ndarray:
    try:
        result = session.run(None, {session.get_inputs()[0].name: batch})[0]
    # ONNX Runtime's exceptions share no base class below Exception.
    except Exception as error:
        reason = str(error).strip().splitlines()[0]
        if is_out_of_memory(reason):
            raise DeviceMemoryError(
                f"The device has not enough memory for {len(batch)} clips ({reason}). Pass a smaller --batch-size."
            ) from error
        raise ModelFileError(
            f"The extractor rejects the input that its manifest describes: {reason}. Correct the manifest.",
            code="shape_mismatch",
        ) from error
    features = np.asarray(result, np.float32)
    if features.shape != (len(batch), manifest.dim):
        raise ModelFileError(
            f"Expected features of shape {(len(batch), manifest.dim)} by the manifest of the extractor, got "
            f"{features.shape}. Correct the manifest.",
            code="output_shape_mismatch",
        )
    return features
