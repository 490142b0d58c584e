"""Run ONNX graphs in ONNX Runtime or OpenVINO on the CPU, from memory or from a file."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from calib.errors import CalibrationError
from calib.graph.graph_editing import copied
from calib.graph.onnx_graph import manifest_of, read_manifest
from runtime.backends.base import run_pair
from runtime.backends.exact_int8 import for_cpu, source_for_cpu
from runtime.backends.onnxruntime_session import new_session
from runtime.backends.openvino_session import OpenVinoSession
from runtime.core.batch import ENCODED_FEATURES, HEAD_NAMES, VIDEO_INDEX, Batch, Heads

if TYPE_CHECKING:
    import onnx

    from runtime.artifacts.encoded_video import EncodedVideo


def open_session(model: onnx.ModelProto | Path, threads: int | None = None, optimized: bool = False) -> Any:
    """Return an ONNX Runtime session on the CPU; see `runtime.backends.onnxruntime_session`.

    Args:
        model: a graph, or the path of an ONNX file.
        optimized: whether ONNX Runtime may rewrite the graph, as in production (`runtime.backends.exact_int8`).
            Otherwise INT8 is computed operator by operator, as in engines; ONNX Runtime's fusions differ by up to
            2.7e-2.

    Raises:
        DeviceError: ONNX Runtime is not installed.
    """
    if isinstance(model, Path):
        return new_session(source_for_cpu(model) if optimized else str(model), threads, optimize=optimized)
    content = model.SerializeToString()
    return new_session(for_cpu(content) if optimized else content, threads, optimize=optimized)


def observe(
    model: onnx.ModelProto, tensors: Sequence[str], batches: Iterable[Any], threads: int | None = None
) -> Iterator[dict[str, np.ndarray]]:
    """Run a graph over batches, and yield the values of tensors by name for each.

    Args:
        tensors: names of tensors in it.
        batches: objects with one attribute per input of the graph.

    Raises:
        CalibrationError: the graph has no tensor of a name.
    """
    session = open_session(with_extra_outputs(model, tensors), threads, optimized=True)
    for batch in batches:
        yield dict(zip(tensors, session.run(list(tensors), vars(batch))))


def with_extra_outputs(model: onnx.ModelProto, tensors: Sequence[str]) -> onnx.ModelProto:
    """Return a copy of a graph with more tensors as outputs; CalibrationError if there is no tensor of a name."""
    import onnx

    known = {name for node in model.graph.node for name in node.output} | {value.name for value in model.graph.input}
    missing = sorted(set(tensors) - known)
    if missing:
        raise CalibrationError(
            f"The graph has no tensor {', '.join(missing)}. Export the model again with this version.",
            code="unknown_tensor",
        )
    copy = copied(model)
    present = {value.name for value in copy.graph.output}
    for name in tensors:
        if name not in present:
            copy.graph.output.append(onnx.helper.make_empty_tensor_value_info(name))
    return copy


class InMemoryBackend:
    """A graph in memory as a `runtime.Backend`, computed operator by operator unless `optimized`."""

    def __init__(self, model: onnx.ModelProto, threads: int | None = None, optimized: bool = False) -> None:
        self.manifest = read_manifest(model)
        self._session = open_session(model, threads, optimized)

    def run(self, batch: Batch) -> Heads:
        """Return the heads of a batch; see `runtime.backends.base.Backend.run` for shapes."""
        return Heads(*self._session.run(HEAD_NAMES, vars(batch)))


class InMemorySplitBackend:
    """The two parts of a split graph in memory as a `runtime.PairBackend`, which encodes each video once.

    If `optimized`, the library that the manifest names runs them, else ONNX Runtime operator by operator.
    """

    def __init__(
        self, video: onnx.ModelProto, query: onnx.ModelProto, threads: int | None = None, optimized: bool = False
    ) -> None:
        self.manifest = manifest_of(query, "the query part")
        if optimized and self.manifest.library == "openvino":
            sessions: list[Any] = [OpenVinoSession(part.SerializeToString(), threads) for part in (video, query)]
        else:
            sessions = [open_session(part, threads, optimized) for part in (video, query)]
        self._video, self._query = sessions

    def encode(self, segment_features: np.ndarray) -> np.ndarray:
        """Return the encodings of V videos, (V, D, T), from their (V, T, D) float32 segments."""
        encoded: np.ndarray = self._video.run(None, {"segment_features": segment_features})[0]
        return encoded

    def ask(
        self,
        query_tokens: np.ndarray,
        query_length: np.ndarray,
        videos: Sequence[EncodedVideo],
        video_index: np.ndarray,
    ) -> Heads:
        """Return the heads of B queries; see `runtime.backends.base.PairBackend.ask` for shapes."""
        inputs = {
            "query_tokens": query_tokens,
            "query_length": query_length,
            VIDEO_INDEX: video_index,
            ENCODED_FEATURES: np.stack([video.features for video in videos]),
            "segment_spans": np.stack([video.spans for video in videos]),
        }
        return Heads(*self._query.run(HEAD_NAMES, inputs))

    def run(self, batch: Batch) -> Heads:
        """Return the heads of a batch, each row with a video of its own."""
        return run_pair(self, batch)
