"""Define the protocols of backends and the names of devices."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, Protocol

import numpy as np

from runtime.artifacts.encoded_video import EncodedVideo
from runtime.artifacts.manifest import Manifest
from runtime.core.batch import Batch, Heads
from runtime.core.errors import ModelFileError

Device = Literal["auto", "cpu", "cuda"]

MAX_THREADS = 1024


class Backend(Protocol):
    """Protocol of an object that runs a whole model.

    A class needs only the two members below; it does not have to inherit from this one. `Grounder(backend)` adds
    tokenization, segment pooling, decoding and NMS.

    Example:
        class Recorded:
            def __init__(self, manifest: Manifest, heads: Heads) -> None:
                self.manifest, self.heads = manifest, heads

            def run(self, batch: Batch) -> Heads:
                return self.heads
    """

    @property
    def manifest(self) -> Manifest:
        """Return the manifest of the model."""

    def run(self, batch: Batch) -> Heads:
        """Run the network on B queries, each with the segments of its video.

        Args:
            batch: `query_tokens` (B, L) int32 from 0 to the number of words, `query_length` (B,) int32 from 1 to L,
                `segment_features` (B, T, D) float32 and `segment_spans` (B, T, 2) float32 in [0, 1].

        Returns:
            Heads of the queries in the order of the batch, float32, finest pyramid level first: `matching_logits`
            (B, P), `boundary_distances` (B, P, 2) and `iou_logits` (B, P).

        Raises:
            ShapeError: a word id or a length is out of range; see `runtime.core.batch.check_numbers`.
        """


class PairBackend(Backend, Protocol):
    """Protocol of an object that runs a split model, which encodes each video once for any number of queries.

    Its manifest is that of the query part: `part` is "query", and `video_part` names the file of the video part.

    Example:
        encoded = pair.encode(segments.features[None])[0]
        video = EncodedVideo(encoded, segments.spans, duration)
        heads = pair.ask(query_tokens, query_length, [video], np.zeros(len(query_length), np.int32))
    """

    def encode(self, segment_features: np.ndarray) -> np.ndarray:
        """Run the video part.

        Args:
            segment_features: (V, T, D) float32 segments of V videos.

        Returns:
            (V, D, T) float32 encodings.
        """

    def ask(
        self,
        query_tokens: np.ndarray,
        query_length: np.ndarray,
        videos: Sequence[EncodedVideo],
        video_index: np.ndarray,
    ) -> Heads:
        """Run the query part on B queries about V encoded videos.

        Args:
            query_tokens: (B, L) int32 word ids, 0 past each length.
            query_length: (B,) int32 lengths in tokens.
            videos: encodings of V videos.
            video_index: (B,) int32 index in `videos` for each query.

        Returns:
            Heads of the queries, as `Backend.run` returns them.

        Raises:
            ShapeError: a word id, a length or an index is out of range; see `runtime.core.batch.check_numbers`.
        """


def recorded_video_part(path: Path, manifest: Manifest, suffix: str) -> tuple[Path, str]:
    """Return the path and the SHA-256 of the video part that a query part records.

    Args:
        suffix: suffix of the video part, which may have been converted since.

    Raises:
        ModelFileError: the manifest does not record one video part, or the file is missing.
    """
    if len(manifest.video_part) != 1:
        raise ModelFileError(
            f"Expected one video part in the manifest of {path}, got {len(manifest.video_part)}. Export the model "
            "again.",
            code="missing_part",
        )
    ((name, digest),) = manifest.video_part.items()
    return sibling_file(path, Path(name).with_suffix(suffix).name), digest


def sibling_file(path: Path, name: str) -> Path:
    """Return the path of a model part in the directory of another part; ModelFileError if it is missing."""
    sibling = path.with_name(Path(name).name)
    if not sibling.is_file():
        raise ModelFileError(
            f"{path} needs {sibling.name} in the same directory, but the file is missing. Copy it there.",
            code="missing_file",
        )
    return sibling


def check_answers_queries(path: Path, manifest: Manifest) -> None:
    """Raise ModelFileError (code `model_part`) unless a file is a complete model or the query part of a split one."""
    if manifest.part not in ("whole", "query"):
        query = path.with_name(path.name.replace(f".{manifest.part}.", ".query."))
        raise ModelFileError(
            f"{path} is the {manifest.part} part of a split model, and cannot answer queries alone. Give the query "
            f"part, {query}, which opens the other part from the same directory.",
            code="model_part",
        )


def run_pair(pair: PairBackend, batch: Batch) -> Heads:
    """Run a split model on a batch of segments: encode the segments of every row, then run the queries."""
    features = pair.encode(batch.segment_features)
    videos = [EncodedVideo(encoded, spans, 1.0) for encoded, spans in zip(features, batch.segment_spans)]
    return pair.ask(batch.query_tokens, batch.query_length, videos, np.arange(len(batch), dtype=np.int32))
