"""Run the networks of a Triton server as a backend of `Grounder`."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from runtime.artifacts.encoded_video import EncodedVideo
from runtime.artifacts.manifest import Manifest
from runtime.artifacts.onnx_metadata import MISMATCH
from runtime.backends.base import run_pair
from runtime.backends.batch_shapes import as_slice, padded_length, row_slices, row_slices_by_video
from runtime.core.batch import ENCODED_FEATURES, HEAD_NAMES, VIDEO_INDEX, Batch, Heads, check_numbers
from runtime.core.errors import ModelFileError, ShapeError, excerpt, reading
from runtime.core.io.digests import json_digest
from runtime.core.io.text_files import check_format, parse_json

FORMAT = "drn-triton/1"
PARAMETER = "drn.front"
"""Parameter in the configuration of the front model that contains `FrontConfig.to_json`."""


# Runs a model of the server: its name, inputs by name with the batch as the first axis, and names of the outputs to
# return in their order. Raises ServerError if the server cannot be reached, or the model failed.
Call = Callable[[str, Mapping[str, np.ndarray], Sequence[str]], "list[np.ndarray]"]


@dataclasses.dataclass(frozen=True)
class FrontConfig:
    """The properties of the networks that the front model and its clients need.

    They are stored next to the front model and in its configuration.

    Attributes:
        manifest: manifest of the model; its maximum query length is that of the network.
        network: Triton name of the whole network, or of the query part.
        video_network: Triton name of the video part; empty for a whole network.
        batch: maximum number of queries in a request.
        videos: maximum number of encoded videos in a request to a query part.
        encoded_together: maximum number of videos in a request to a video part.
        files: SHA-256 of the files of the networks by `MODEL/FILE`, without the version; empty in older repositories.
    """

    manifest: Manifest
    network: str
    video_network: str = ""
    batch: int = 32
    videos: int = 32
    encoded_together: int = 8
    files: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def to_json(self) -> str:
        content = {"format": FORMAT, **vars(self), "files": dict(self.files), "manifest": self.manifest.to_dict()}
        return json.dumps({**content, "digest": json_digest(content)}, allow_nan=False)

    @classmethod
    def from_json(cls, text: str, source: str) -> FrontConfig:
        """Parse JSON that `to_json` wrote; ModelFileError with `source` if it is invalid."""
        advice = "write the repository again with `python -m export.triton`"
        value = parse_json(text, source, ModelFileError, advice=advice)
        with reading(source, "the description of a model behind Triton", ModelFileError, advice):
            digest = value.pop("digest", None)
            if digest is not None and digest != json_digest(value):
                raise ModelFileError(
                    f"{source} does not match its digest, so it was edited or damaged. Write the repository again with "
                    "`python -m export.triton`.",
                    code=MISMATCH,
                )
            check_format(value, FORMAT, source, ModelFileError, advice)
            del value["format"]
            config = cls(**{**value, "manifest": Manifest.from_dict(value["manifest"], source)})
            sizes = (config.batch, config.videos, config.encoded_together)
            if not all(type(size) is int and size > 0 for size in sizes):
                raise ValueError(f"its batch sizes are {excerpt(sizes)}, expected integers above 0")
            if not isinstance(config.network, str) or not isinstance(config.video_network, str):
                raise ValueError("its networks have no names")
            return config


class TritonBackend:
    """Run a model that was not split on a Triton server; see `Backend`."""

    def __init__(self, config: FrontConfig, call: Call) -> None:
        self.manifest = config.manifest
        self._config = config
        self._call = call

    def run(self, batch: Batch) -> Heads:
        """Return the heads of a batch, requested in parts of the maximum batch size; see `Backend.run` for shapes.

        Raises:
            ShapeError: a query is longer than the network accepts, or a number is out of range.
            ServerError: the server cannot be reached, or the model failed.
        """
        check_numbers(batch.query_tokens, batch.query_length, len(self.manifest.vocabulary))
        tokens = _padded(batch.query_tokens, self.manifest.max_query_length)
        # Tensors of a batched Triton model have at least one axis besides the batch.
        lengths = batch.query_length[:, None]
        parts = []
        for rows in row_slices(len(batch), self._config.batch):
            index = as_slice(rows)
            inputs = {
                "query_tokens": tokens[index],
                "query_length": lengths[index],
                "segment_features": batch.segment_features[index],
                "segment_spans": batch.segment_spans[index],
            }
            parts.append((rows, self._call(self._config.network, inputs, HEAD_NAMES)))
        return _gather_rows(len(batch), parts)


class TritonPair(TritonBackend):
    """Run a split model on a Triton server; see `PairBackend`."""

    def encode(self, segment_features: np.ndarray) -> np.ndarray:
        """Return the encodings of V videos, (V, D, T) float32 or float16, from their (V, T, D) float32 segments."""
        name, results = self._config.video_network, []
        for rows in row_slices(len(segment_features), self._config.encoded_together):
            inputs = {"segment_features": segment_features[as_slice(rows)]}
            results += self._call(name, inputs, (ENCODED_FEATURES,))
        return results[0] if len(results) == 1 else np.concatenate(results)

    def ask(
        self,
        query_tokens: np.ndarray,
        query_length: np.ndarray,
        videos: Sequence[EncodedVideo],
        video_index: np.ndarray,
    ) -> Heads:
        """Return the heads of B queries; see `PairBackend.ask` for shapes, and `TritonBackend.run` for errors."""
        check_numbers(query_tokens, query_length, len(self.manifest.vocabulary), video_index, len(videos))
        tokens = _padded(query_tokens, self.manifest.max_query_length)
        parts = []
        for rows in row_slices_by_video(video_index, self._config.batch, self._config.videos, len(videos)):
            referenced, row_videos = np.unique(video_index[rows], return_inverse=True)
            inputs = {
                "query_tokens": tokens[rows],
                "query_length": query_length[rows],
                VIDEO_INDEX: row_videos.astype(np.int32),
                ENCODED_FEATURES: np.stack([videos[index].features for index in referenced]),
                "segment_spans": np.stack([videos[index].spans for index in referenced]),
            }
            parts.append((rows, self._call(self._config.network, inputs, HEAD_NAMES)))
        return _gather_rows(len(query_length), parts)

    def run(self, batch: Batch) -> Heads:
        """Return the heads of a batch, each row with a video of its own; see `Backend.run` for shapes."""
        return run_pair(self, batch)


def open_networks(config: FrontConfig, call: Call) -> TritonBackend | TritonPair:
    """Return the backend of a whole or a split model."""
    return TritonPair(config, call) if config.video_network else TritonBackend(config, call)


def _padded(tokens: np.ndarray, max_length: int) -> np.ndarray:
    """Pad (B, L) word ids with zeros to a length of `padded_length`: Triton batches only requests of equal shape."""
    length = tokens.shape[1]
    if length > max_length:
        raise ShapeError(
            f"Expected a query of 1 to {max_length} tokens for the network behind Triton, got {length}. Shorten the "
            "query.",
            code="query_length_out_of_range",
        )
    return np.pad(tokens, ((0, 0), (0, padded_length(length, max_length) - length)))


def _gather_rows(num_rows: int, parts: Sequence[tuple[np.ndarray, list[np.ndarray]]]) -> Heads:
    """Return the heads of a batch from the row indices and heads of its parts."""
    if len(parts) == 1:
        return Heads(*parts[0][1])
    heads = [np.empty((num_rows, *values.shape[1:]), np.float32) for values in parts[0][1]]
    for rows, part in parts:
        for gathered, values in zip(heads, part):
            gathered[rows] = values
    return Heads(*heads)
