"""Networks that turn frames into clip features: C3D on runs of frames, an image encoder on frames one by one."""

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
    """Something that turns clips of frames into features.

    Attributes:
        identity: digest of all that decides its features: every file of the network, and the manifest as it was read.
    """

    identity: str

    @property
    def manifest(self) -> ExtractorManifest:
        """Return the manifest of the extractor."""

    def extract(self, clips: np.ndarray) -> np.ndarray:
        """Return (N, D) float32 features of (N, window, height, width, 3) uint8 clips in RGB, of the size of `crop`."""


class ClipExtractor:
    """An ONNX graph that takes clips as they are, (N, window, height, width, 3) uint8: C3D of `export.to_onnx`."""

    def __init__(self, session: Any, manifest: ExtractorManifest, identity: str) -> None:
        self.manifest = manifest
        self.identity = identity
        self._session = session

    def extract(self, clips: np.ndarray) -> np.ndarray:
        """Return (N, D) float32 features; see `Extractor`."""
        return _run(self._session, clips, self.manifest)


class ImageExtractor:
    """An ONNX image encoder, (N, 3, height, width) float32 in and (N, D) out, on the middle frame of each clip."""

    def __init__(self, session: Any, manifest: ExtractorManifest, identity: str) -> None:
        self.manifest = manifest
        self.identity = identity
        self._session = session
        # One multiplication and one addition for scaling, mean and deviation together.
        self._factor = (1 / np.array(manifest.std, np.float32) / (255 / manifest.white)).astype(np.float32)
        self._offset = (-np.array(manifest.mean) / np.array(manifest.std)).astype(np.float32)

    def extract(self, clips: np.ndarray) -> np.ndarray:
        """Return (N, D) float32 features; see `Extractor`."""
        images = clips[:, clips.shape[1] // 2] * self._factor + self._offset
        return _run(self._session, np.ascontiguousarray(images.transpose(0, 3, 1, 2)), self.manifest)


def open_extractor(path: str | os.PathLike[str], device: Device = "auto", threads: int | None = None) -> Extractor:
    """Open an extractor: an `.onnx` file that carries its manifest or has it in NAME.onnx.json beside it, or an engine.

    What goes into a graph says of which kind it is: clips in uint8, or one picture a clip in float32.

    Raises:
        ModelFileError: there is no such file, or it is no extractor.
        DeviceError: ONNX Runtime or the device is missing.
    """
    path = Path(path)
    if path.suffix not in (".onnx", ".engine"):
        raise ModelFileError(
            f"An extractor is an .onnx or .engine file, and {excerpt(path.name)} is none; a c3d.pt becomes one by "
            "`python -m export.to_onnx`, as docs/your-own-video.md shows.",
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
    taken = [(entry.type, len(entry.shape)) for entry in session.get_inputs()]
    if taken == [("tensor(uint8)", 5)]:
        return ClipExtractor(session, manifest, identity)
    if taken == [("tensor(float)", 4)]:
        return ImageExtractor(session, manifest, identity)
    raise ModelFileError(
        f"{path} takes {', '.join(f'{kind} of {axes} axes' for kind, axes in taken) or 'nothing'}; an extractor takes "
        "clips (uint8, 5 axes) or images (float, 4 axes) alone.",
        code="unexpected_tensors",
    )


def _manifest(session: Any, path: Path, content: Content) -> ExtractorManifest:
    metadata = session.get_modelmeta().custom_metadata_map
    if drn_manifest.METADATA_KEY in metadata:
        raise ModelFileError(
            f"{path} grounds sentences and makes no clip features. Give it as --model, and an extractor as "
            "--extractor.",
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
    """Return where the description of an image encoder is: NAME.onnx.json."""
    return path.with_name(f"{path.name}.json")


def read_description(path: Path) -> dict[str, Any]:
    """Return the description beside an image encoder; ModelFileError where there is none."""
    siblings = description_path(path)
    if not siblings.is_file():
        raise ModelFileError(
            f"{path} does not say which frames it takes: export C3D with `python -m export.to_onnx`, or describe your "
            f"own encoder in {siblings.name} as docs/your-own-video.md shows.",
            code="missing_manifest",
        )
    value = read_json(siblings, "description of an extractor", ModelFileError)
    ExtractorManifest.from_dict(value, str(siblings))
    return value


def check_description(value: Mapping[str, Any], path: Path, content: Content) -> None:
    """Raise ModelFileError if a description records a digest, and the files of the encoder have another."""
    if DIGEST in value and value[DIGEST] != _description_digest(value, content):
        raise ModelFileError(
            f"{path} and {description_path(path).name} do not match the digest that is recorded there: one of them is "
            "damaged or was changed. Copy them again; `python -m export.seal` records the digest of files that were "
            "changed on purpose.",
            code=MISMATCH,
        )


def description_with_digest(path: Path) -> dict[str, Any]:
    """Return the description beside an image encoder with a digest of it, of the graph and of its external data."""
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
        said = str(error).strip().splitlines()[0]
        if is_out_of_memory(said):
            raise DeviceMemoryError(
                f"The device has no memory left for {len(batch)} clips ({said}); pass a smaller --batch-size."
            ) from error
        raise ModelFileError(
            f"The extractor does not take pictures as its manifest says: {said}.", code="shape_mismatch"
        ) from error
    features = np.asarray(result, np.float32)
    if features.shape != (len(batch), manifest.dim):
        raise ModelFileError(
            f"The extractor's manifest says features of {manifest.dim} channels, and it gave {features.shape} for "
            f"{len(batch)} clips; correct the manifest.",
            code="output_shape_mismatch",
        )
    return features
