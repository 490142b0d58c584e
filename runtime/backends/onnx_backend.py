"""Run DRN models from ONNX files in ONNX Runtime or OpenVINO: one file, or the two parts of a split model."""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from runtime.artifacts import extractor_manifest
from runtime.artifacts.encoded_video import EncodedVideo
from runtime.artifacts.manifest import METADATA_KEY, Manifest
from runtime.artifacts.onnx_metadata import MISMATCH, check, raw_manifest, read_metadata
from runtime.backends import onnxruntime_session, openvino_session
from runtime.backends.base import Device, check_answers_queries, recorded_video_part, run_pair, sibling_file
from runtime.backends.cuda_driver import disable_in_forked_children
from runtime.backends.exact_int8 import precision_of_file
from runtime.core.batch import (
    DURATION,
    ENCODED_FEATURES,
    HEAD_NAMES,
    INPUT_NAMES,
    VIDEO_INDEX,
    Batch,
    Heads,
    check_numbers,
)
from runtime.core.errors import DeviceError, DeviceMemoryError, ModelFileError, ShapeError, is_out_of_memory
from runtime.core.io.digests import sha256
from runtime.core.lru_cache import LruCache

log = logging.getLogger("drn")

VIDEO_INPUTS = ("segment_features",)
VIDEO_OUTPUTS = (ENCODED_FEATURES,)
QUERY_INPUTS = ("query_tokens", "query_length", VIDEO_INDEX, ENCODED_FEATURES, "segment_spans")
# 0.5 MB each at full size.
MAX_ENCODINGS_ON_DEVICE = 256
_DTYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16}


class Session:
    """A DRN model file, or one part of a split model, open in the library that its manifest names.

    Args:
        part_of: for a video part, the path of the query part and the SHA-256 that it records for this file; else None.

    Attributes:
        device: `cpu` or `cuda`.
        manifest: manifest of the model, with the precision of its weights.
        uses_io_binding: whether tensors are bound, so that those on the GPU are not copied again.

    Raises:
        ModelFileError: the file is no DRN model, is damaged, or is not the one that the query part records.
        DeviceError: the library is not installed, or does not support the device.
    """

    def __init__(
        self,
        path: Path,
        device: Device = "auto",
        threads: int | None = None,
        part_of: tuple[Path, str] | None = None,
    ) -> None:
        # First, because a file that cannot be parsed names no library.
        metadata = read_metadata(path)
        library = openvino_session if raw_manifest(path).get("library") == "openvino" else onnxruntime_session
        session, device, content = library.create_session(path, device, threads)
        if part_of is not None and content.sha256 != part_of[1]:
            raise _other_part(path, part_of[0])
        if content.recorded is None:
            log.info("%s records no digest, so damage cannot be detected. Export it again to add one.", path)
        self.path = path
        self.device: Device = device
        self.uses_io_binding = device == "cuda"
        self._process = os.getpid()
        if extractor_manifest.METADATA_KEY in metadata:
            raise extractor_manifest.no_model(path)
        manifest = Manifest.from_json(metadata.get(METADATA_KEY), source=str(path))
        self.manifest = dataclasses.replace(manifest, precision=precision_of_file(path, manifest.precision))
        checked_on = manifest.training.get("precision")
        if manifest.precision == "int8" and not (isinstance(checked_on, Mapping) and "cpu" in checked_on):
            log.warning(
                "%s does not record the CPU on which it was compared with FP32, so its reported accuracy may be too "
                "low for this CPU. Compare it again with `python -m export.verify`.",
                path,
            )
        self._session = session
        self._outputs = {output.name: (output.shape, output.type) for output in session.get_outputs()}
        if self.uses_io_binding:
            disable_in_forked_children(self)

    def require(self, inputs: Sequence[str], outputs: Sequence[str]) -> None:
        """Raise ModelFileError unless the graph has these inputs and outputs."""
        missing = (set(inputs) - {argument.name for argument in self._session.get_inputs()}) | (
            set(outputs) - set(self._outputs)
        )
        if missing:
            raise ModelFileError(
                f"{self.path} is no DRN graph: it lacks {', '.join(sorted(missing))}. Export the model again.",
                code="unexpected_tensors",
            )

    def run(self, outputs: Sequence[str], feed: Mapping[str, Any]) -> list[Any]:
        """Run the graph.

        Args:
            feed: array of each input by name, or on a GPU a tensor that `to_device` returned.

        Returns:
            The outputs as arrays, in the order of `outputs`.

        Raises:
            ShapeError: the arrays do not fit the graph.
            DeviceMemoryError: the device has no memory left.
            DeviceError: this process was forked after CUDA was started.
        """
        self._check_process()
        # ONNX Runtime divides by the number of rows, which crashes the process for an empty batch.
        if not len(next(iter(feed.values()))):
            shapes_and_types = [self._outputs[name] for name in outputs]
            return [np.empty((0, *shape[1:]), _DTYPES[dtype]) for shape, dtype in shapes_and_types]
        try:
            return self._run_bound(outputs, feed) if self.uses_io_binding else self._session.run(outputs, feed)
        # ONNX Runtime's exceptions have no common base class below Exception, and I/O binding raises RuntimeError.
        except Exception as error:
            if not (type(error).__module__.startswith("onnxruntime") or isinstance(error, RuntimeError)):
                raise
            message = str(error).strip().splitlines()[0]
            if is_out_of_memory(message):
                raise DeviceMemoryError(
                    f"The {self.device} device has no memory left for this batch ({message}). Pass a smaller "
                    "--batch-size."
                ) from error
            raise ShapeError(f"The model does not accept this batch: {message}. Check the shapes.") from error

    def to_device(self, array: np.ndarray) -> Any:
        """Copy an array to the session's device, as a tensor for `run`."""
        self._check_process()
        import onnxruntime as ort

        return ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array), self.device, 0)

    def _check_process(self) -> None:
        if self.uses_io_binding and os.getpid() != self._process:
            raise DeviceError(
                "This process was forked after CUDA was started, and CUDA does not work in forked processes. Open the "
                "model in this process, or start processes with 'spawn'.",
                code="forked_process",
            )

    def _run_bound(self, outputs: Sequence[str], feed: Mapping[str, Any]) -> list[Any]:
        binding = self._session.io_binding()
        for name, value in feed.items():
            if isinstance(value, np.ndarray):
                binding.bind_cpu_input(name, np.ascontiguousarray(value))
            else:
                binding.bind_ortvalue_input(name, value)
        for name in outputs:
            binding.bind_output(name, "cpu")
        self._session.run_with_iobinding(binding)
        return binding.copy_outputs_to_cpu()


class OnnxBackend:
    """Run a model that is one `.onnx` file; see `Backend`."""

    def __init__(self, session: Session) -> None:
        session.require(INPUT_NAMES, HEAD_NAMES)
        self.device = session.device
        self.manifest = session.manifest
        self._session = session

    def run(self, batch: Batch) -> Heads:
        """Return the heads of a batch; see `Backend.run` for shapes and ranges, and `Session.run` for other errors."""
        check_numbers(batch.query_tokens, batch.query_length, len(self.manifest.vocabulary))
        feed = vars(batch)
        if self.manifest.moments:
            # A graph with decoding needs durations, which the heads do not depend on.
            feed = {**feed, DURATION: np.ones(len(batch), np.float32)}
        return Heads(*self._session.run(HEAD_NAMES, feed))


class OnnxPair:
    """Run a model that was split into two `.onnx` files; see `PairBackend`.

    Raises:
        ModelFileError: the video part is missing, is not the one that the query part records, or is no video part.
    """

    def __init__(self, query: Session, threads: int | None = None) -> None:
        query.require(QUERY_INPUTS, HEAD_NAMES)
        self.device = query.device
        self.manifest = query.manifest
        self._query = query
        self._threads = threads
        self._on_device: LruCache[str, Any] = LruCache(MAX_ENCODINGS_ON_DEVICE)
        if query.uses_io_binding:
            disable_in_forked_children(self)
        self._video = self._open_video_part(*recorded_video_part(query.path, self.manifest, ".onnx"))
        self._video.require(VIDEO_INPUTS, VIDEO_OUTPUTS)

    def encode(self, segment_features: np.ndarray) -> np.ndarray:
        """Return the encodings of V videos, (V, D, T) float32 or float16, from their (V, T, D) float32 segments."""
        (encoded,) = self._video.run(VIDEO_OUTPUTS, {"segment_features": segment_features})
        return encoded

    def ask(
        self,
        query_tokens: np.ndarray,
        query_length: np.ndarray,
        videos: Sequence[EncodedVideo],
        video_index: np.ndarray,
    ) -> Heads:
        """Return the heads of B queries; see `PairBackend.ask` for shapes and ranges."""
        if not len(query_length):
            return Heads(*self._query.run(HEAD_NAMES, {"query_length": query_length}))
        check_numbers(query_tokens, query_length, len(self.manifest.vocabulary), video_index, len(videos))
        (first, *others) = videos
        features = np.stack([video.features for video in videos]) if others else self._features(first)
        spans = np.stack([video.spans for video in videos]) if others else first.spans[None]
        arrays: tuple[Any, ...] = (query_tokens, query_length, video_index, features, spans)
        return Heads(*self._query.run(HEAD_NAMES, dict(zip(QUERY_INPUTS, arrays))))

    def _features(self, video: EncodedVideo) -> Any:
        """Return the features of one video, (1, D, T): an array, or on a GPU a tensor that stays there."""
        if not self._query.uses_io_binding:
            return video.features[None]
        tensor = self._on_device.get(video.key)
        if tensor is None:
            tensor = self._query.to_device(video.features[None])
            self._on_device.put(video.key, tensor)
        return tensor

    def _open_video_part(self, path: Path, digest: str) -> Session:
        try:
            return Session(path, self.device, self._threads, (self._query.path, digest))
        except ModelFileError as error:
            if sha256(path) != digest:
                raise _other_part(path, self._query.path) from error
            raise

    def run(self, batch: Batch) -> Heads:
        """Return the heads of a batch, each row with a video of its own; see `Backend.run` for shapes."""
        return run_pair(self, batch)


def open_graph(
    path: str | os.PathLike[str], device: Device = "auto", threads: int | None = None
) -> OnnxBackend | OnnxPair:
    """Open a whole model, or both parts of a split model from its query part.

    Args:
        device: `auto`, `cpu` or `cuda`.
        threads: number of CPU threads of ONNX Runtime. Default: its own.

    Raises:
        ModelFileError: the file is damaged, is no DRN model, or is a video part; or the video part of a query part is
            missing or is not the one that it records.
    """
    session = Session(Path(path), device, threads)
    check_answers_queries(session.path, session.manifest)
    return OnnxPair(session, threads) if session.manifest.part == "query" else OnnxBackend(session)


def locate_part(query: Path, name: str, digest: str) -> Path:
    """Return the path of a model part in the directory of the query part, after comparing its SHA-256 with `digest`.

    Raises:
        ModelFileError: the file is missing, or its content differs.
    """
    path = sibling_file(query, name)
    if sha256(path) != digest:
        raise _other_part(path, query)
    check(path)
    return path


def _other_part(path: Path, query: Path) -> ModelFileError:
    return ModelFileError(
        f"{path} has another SHA-256 than {query.name} records, so it is damaged or of another export. Copy all files "
        "of one export, or export again with --split.",
        code=MISMATCH,
    )
