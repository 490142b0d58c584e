"""Run the networks of a Triton server as a backend of `Grounder`."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np

from runtime.artifacts.encoded_video import EncodedVideo
from runtime.artifacts.manifest import Manifest
from runtime.artifacts.onnx_metadata import MISMATCH
from runtime.backends.base import run_pair
from runtime.backends.batch_shapes import padded_length, row_slices, row_slices_by_video
from runtime.core.batch import ENCODED_FEATURES, HEAD_NAMES, VIDEO_INDEX, Batch, Heads
from runtime.core.errors import ModelFileError, ShapeError, excerpt, reading
from runtime.core.io.digests import json_digest
from runtime.core.io.text_files import check_format, parse_json

FORMAT = "drn-triton/1"
PARAMETER = "drn.front"
"""Of the front's configuration: where clients find what `About.to_json` wrote."""


class Call(Protocol):
    """Runs a model of the server."""

    def __call__(self, model: str, inputs: Mapping[str, np.ndarray], outputs: Sequence[str]) -> list[np.ndarray]:
        """Return the outputs named, in this order."""


@dataclasses.dataclass(frozen=True)
class FrontConfig:
    """The properties of the networks that the front model and its clients need; stored next to the front model and in
    its configuration.

    Attributes:
        manifest: of the model; its longest query is the longest that the network takes.
        network: name of the whole network, or of the query part.
        video_network: name of the video part; empty for a whole network.
        batch: most queries that go through together.
        videos: most encoded videos that a query part takes.
        encoded_together: most videos that go through a video part together.
        files: of the networks, `MODEL/FILE` within a version to SHA-256; empty in repositories of before.
    """

    manifest: Manifest
    network: str
    video_network: str = ""
    batch: int = 32
    videos: int = 32
    encoded_together: int = 8
    files: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def to_json(self) -> str:
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        content = {"format": FORMAT, **values, "files": dict(self.files), "manifest": self.manifest.to_dict()}
        return json.dumps({**content, "digest": json_digest(content)}, allow_nan=False)

    @classmethod
    def from_json(cls, text: str, source: str) -> FrontConfig:
        """Read what `to_json` wrote; ModelFileError, naming `source`, if it is something else."""
        command = "write the repository again with `python -m export.triton`"
        value = parse_json(text, source, ModelFileError, advice=command)
        with reading(source, "the description of a model behind Triton", ModelFileError, command):
            digest = value.pop("digest", None)
            if digest is not None and digest != json_digest(value):
                raise ModelFileError(
                    f"{source} does not match its own digest, so it was edited or damaged; {command}.", code=MISMATCH
                )
            check_format(value, FORMAT, source, ModelFileError, command)
            del value["format"]
            about = cls(**{**value, "manifest": Manifest.from_dict(value["manifest"], source)})
            sizes = (about.batch, about.videos, about.encoded_together)
            if not all(type(size) is int and size > 0 for size in sizes):
                raise ValueError(f"its sizes are {excerpt(sizes)}")
            if not isinstance(about.network, str) or not isinstance(about.video_network, str):
                raise ValueError("its networks have no names")
            return about


class TritonBackend:
    """A whole network behind Triton."""

    def __init__(self, about: FrontConfig, call: Call) -> None:
        self.manifest = about.manifest
        self._about = about
        self._call = call

    def run(self, batch: Batch) -> Heads:
        """Return the heads of a batch; what is beyond the largest batch goes in pieces. Raises what the call does."""
        tokens = _padded(batch.query_tokens, self.manifest.max_query_length)
        # In a batched model of Triton's every tensor has a size beyond the batch.
        lengths = batch.query_length[:, None]
        parts = []
        for part in row_slices(len(batch), self._about.batch):
            inputs = {
                "query_tokens": tokens[part],
                "query_length": lengths[part],
                "segment_features": batch.segment_features[part],
                "segment_spans": batch.segment_spans[part],
            }
            parts.append((np.arange(part.start, part.stop), self._call(self._about.network, inputs, HEAD_NAMES)))
        return _joined(len(batch), parts)


class TritonPair:
    """The two parts of a network behind Triton."""

    def __init__(self, about: FrontConfig, call: Call) -> None:
        self.manifest = about.manifest
        self._about = about
        self._call = call

    def encode(self, segment_features: np.ndarray) -> np.ndarray:
        """Return (V, D, T) encoded features of (V, T, D) float32 segments."""
        results = [
            self._call(self._about.video_network, {"segment_features": segment_features[part]}, (ENCODED_FEATURES,))[0]
            for part in row_slices(len(segment_features), self._about.encoded_together)
        ]
        return results[0] if len(results) == 1 else np.concatenate(results)

    def ask(
        self,
        query_tokens: np.ndarray,
        query_length: np.ndarray,
        videos: Sequence[EncodedVideo],
        video_index: np.ndarray,
    ) -> Heads:
        """Return the heads of B queries; see `PairBackend`."""
        tokens = _padded(query_tokens, self.manifest.max_query_length)
        parts = []
        for rows in row_slices_by_video(video_index, self._about.batch, self._about.videos, len(videos)):
            needed, which = np.unique(video_index[rows], return_inverse=True)
            inputs = {
                "query_tokens": tokens[rows],
                "query_length": query_length[rows],
                VIDEO_INDEX: which.astype(np.int32),
                ENCODED_FEATURES: np.stack([videos[index].features for index in needed]),
                "segment_spans": np.stack([videos[index].spans for index in needed]),
            }
            parts.append((rows, self._call(self._about.network, inputs, HEAD_NAMES)))
        return _joined(len(query_length), parts)

    def run(self, batch: Batch) -> Heads:
        """Return the heads of a batch, as the whole model would."""
        return run_pair(self, batch)


def open_networks(about: FrontConfig, call: Call) -> TritonBackend | TritonPair:
    """Return the backend of a whole network, or of a pair."""
    return TritonPair(about, call) if about.video_network else TritonBackend(about, call)


def _padded(tokens: np.ndarray, longest: int) -> np.ndarray:
    """Return (B, L) word ids at the length that queries are padded to, 0 past each length.

    Triton joins requests of equal shape only, and captures a CUDA graph for each.
    """
    length = tokens.shape[1]
    if length > longest:
        raise ShapeError(
            f"The query has {length} tokens and the network behind Triton takes 1 to {longest}.",
            code="query_length_out_of_range",
        )
    return np.pad(tokens, ((0, 0), (0, padded_length(length, longest) - length)))


def _joined(rows: int, parts: Sequence[tuple[np.ndarray, list[np.ndarray]]]) -> Heads:
    """Return the heads of all rows from those of some at a time."""
    if len(parts) == 1:
        return Heads(*parts[0][1])
    joined = [np.empty((rows, *values.shape[1:]), np.float32) for values in parts[0][1]]
    for some, result in parts:
        for location, values in zip(joined, result):
            location[some] = values
    return Heads(*joined)
