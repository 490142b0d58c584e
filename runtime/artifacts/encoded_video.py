"""Store the encoding of a video by the video part of a split model, in memory or in a file."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import numbers
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from runtime.core.errors import FeatureError, OutputError, as_sentence, check_argument, check_path, excerpt, reading
from runtime.core.io.array_files import read_archive
from runtime.core.io.atomic_files import atomic_write
from runtime.core.io.digests import json_digest
from runtime.core.io.input_files import check_file
from runtime.core.io.text_files import check_format, is_number, parse_json
from runtime.core.sliding_windows import Window
from runtime.core.video import MAX_DURATION_S, check_duration

FORMAT = "drn-encoding/1"
WINDOWS_FORMAT = "drn-encoded-windows/1"
ADVICE = "encode the video again"

Encoded = TypeVar("Encoded", "EncodedVideo", "EncodedWindows")


@dataclasses.dataclass(frozen=True, eq=False)
class EncodedVideo:
    """The encoding of a video by the video part of a split model.

    `Grounder.encode` returns it, and `Grounder.ground` accepts it.

    Attributes:
        features: (D, T) input of the query part: float32, or float16 in half precision.
        spans: (T, 2) float32, starts and ends of the segments as fractions of the video.
        duration: length of the video in seconds.
        name: name of the video in reports.
        model: SHA-256 of the video part; only the query part of the same model can read the encoding.
        key: 64 hexadecimal digits that identify features, spans and model; default: their digest.
        prepared: has no effect; version 0.1 stored intermediate results here.
        offset: seconds from the start of the video file, as players count, to its first frame; see `Video`.
    """

    features: np.ndarray
    spans: np.ndarray
    duration: float
    name: str = "video"
    model: str = ""
    key: str = ""
    prepared: np.ndarray | None = None
    offset: float = 0.0

    def __post_init__(self) -> None:
        features, spans = self.features, self.spans
        for name in ("features", "spans"):
            check_argument(name, getattr(self, name), np.ndarray, "an array", FeatureError)
        for name in ("duration", "offset"):
            check_argument(name, getattr(self, name), numbers.Real, "a number of seconds", FeatureError)
        for name in ("name", "model", "key"):
            check_argument(name, getattr(self, name), str, "a text", FeatureError)
        if features.ndim != 2 or features.dtype.kind != "f" or spans.shape != (features.shape[1], 2):
            raise FeatureError(
                f"Expected floats of shape (D, T) and spans of shape (T, 2) for {self.name}, got {features.dtype} of "
                f"shape {features.shape} and spans of shape {spans.shape}. Encode the video again.",
                code="wrong_array",
            )
        check_duration(self.duration, self.name)
        if not self.key:
            object.__setattr__(self, "key", _key(self))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the encoding to a `.npz` file, atomically; OutputError if it cannot be written."""
        metadata = {
            "format": FORMAT, "duration": self.duration, "name": self.name, "model": self.model, "key": self.key,
            "offset": self.offset,
        }  # fmt: skip
        _save(path, metadata, self.features, self.spans)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> EncodedVideo:
        """Read an encoding that `save` wrote, without running code in the file.

        Raises:
            FeatureError: the file is missing, damaged, or not an encoding.
        """
        return _load(path, FORMAT, cls._read)

    @classmethod
    def _read(cls, metadata: Any, features: np.ndarray, spans: np.ndarray) -> EncodedVideo:
        name, model, key = (str(metadata[field]) for field in ("name", "model", "key"))
        offset = float(metadata.get("offset", 0.0))
        return cls(features, spans, float(metadata["duration"]), name, model, key, offset=offset)


@dataclasses.dataclass(frozen=True, eq=False)
class EncodedWindows:
    """The encodings of the windows of a long video, 0.5 MB each for the published configuration.

    Attributes:
        parts: encoding of each window.
        windows: windows of the video, in time order.
        duration: length of the video in seconds.
        name: name of the video in reports.
        offset: seconds from the start of the video file, as players count, to its first frame; see `Video`.
    """

    parts: tuple[EncodedVideo, ...]
    windows: tuple[Window, ...]
    duration: float
    name: str = "video"
    offset: float = 0.0

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the encodings to a `.npz` file, atomically; OutputError if it cannot be written."""
        metadata = {
            "format": WINDOWS_FORMAT, "duration": self.duration, "name": self.name, "model": self.parts[0].model,
            "keys": [part.key for part in self.parts], "windows": [dataclasses.astuple(w) for w in self.windows],
            "offset": self.offset,
        }  # fmt: skip
        arrays = (np.stack([getattr(part, name) for part in self.parts]) for name in ("features", "spans"))
        _save(path, metadata, *arrays)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> EncodedWindows:
        """Read encodings that `save` wrote, without running code in the file.

        Raises:
            FeatureError: the file is missing, damaged, or not a file of encoded windows.
        """
        return _load(path, WINDOWS_FORMAT, cls._read)

    @classmethod
    def _read(cls, metadata: Any, features: np.ndarray, spans: np.ndarray) -> EncodedWindows:
        if not all(is_number(value) for values in metadata["windows"] for value in values):
            raise ValueError("its windows are not lists of numbers")
        windows = tuple(Window(*values) for values in metadata["windows"])
        name, model, keys = str(metadata["name"]), str(metadata["model"]), metadata["keys"]
        if not len(features) == len(spans) == len(windows) == len(keys) > 0:
            raise ValueError(f"it has {len(windows)} windows, but {len(features)} encodings")
        parts = tuple(
            EncodedVideo(encoded, borders, window.duration, name, model, str(key))
            for encoded, borders, window, key in zip(features, spans, windows, keys)
        )
        return cls(parts, windows, float(metadata["duration"]), name, float(metadata.get("offset", 0.0)))


def _save(path: str | os.PathLike[str], metadata: dict[str, Any], features: np.ndarray, spans: np.ndarray) -> None:
    check_path(path, OutputError)
    # The keys are digests of the arrays, and this is the digest of everything else.
    metadata = {**metadata, "digest": json_digest(metadata)}
    with atomic_write(path) as temporary, open(temporary, "wb") as stream:
        np.savez(stream, features=features, spans=spans, about=np.array(json.dumps(metadata)))


def _load(
    path: str | os.PathLike[str], expected_format: str, read: Callable[[Any, np.ndarray, np.ndarray], Encoded]
) -> Encoded:
    """Return the result of `read` for the metadata, features and spans of a file, after checking their digests."""
    check_path(path, FeatureError)
    path = Path(path)
    check_file(path, "The encoding", FeatureError)
    with reading(path, "an encoding that drn-deploy saved", FeatureError, ADVICE):
        arrays = read_archive(path, max_members=3)
        text, features, spans = arrays["about"], arrays["features"], arrays["spans"]
        if text.shape or text.dtype.kind != "U":
            raise ValueError("its metadata is not text")
        metadata = parse_json(str(text), f"{path}", FeatureError, advice=ADVICE)
        check_format(metadata, expected_format, f"{path}", FeatureError, ADVICE)
        for name in ("duration", "offset"):
            if not (is_number(metadata.get(name, 0.0)) and 0 <= metadata.get(name, 0.0) <= MAX_DURATION_S):
                raise ValueError(f"its {name} is {excerpt(metadata[name])}, expected 0 to {MAX_DURATION_S:g} seconds")
        # Files of version 0.1 have no digest.
        digest = metadata.pop("digest", None)
        if digest is not None and digest != json_digest(metadata):
            raise ValueError("it was changed after it was written")
        encoded = read(metadata, features, spans)
    for part in encoded.parts if isinstance(encoded, EncodedWindows) else (encoded,):
        if part.key != _key(part):
            raise FeatureError(
                f"{path} was changed after it was written. {as_sentence(ADVICE)}", code="digest_mismatch"
            )
    return encoded


def _key(video: EncodedVideo) -> str:
    digest = hashlib.sha256(f"{video.model} {video.features.dtype} {video.features.shape} ".encode())
    for values in (video.features, video.spans):
        digest.update(np.ascontiguousarray(values).data)
    return digest.hexdigest()
