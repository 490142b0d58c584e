"""A video as the query part of a model meets it: encoded once, asked often, kept in memory or in a file."""

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

from runtime.core.errors import FeatureError, OutputError, check_argument, check_path, excerpt, reading
from runtime.core.io.array_files import read_archive
from runtime.core.io.atomic_files import atomic_write
from runtime.core.io.digests import json_digest
from runtime.core.io.input_files import check_file
from runtime.core.io.text_files import is_number, parse_json
from runtime.core.sliding_windows import Window
from runtime.core.video import LONGEST_SECONDS

FORMAT = "drn-encoding/1"
WINDOWS_FORMAT = "drn-encoded-windows/1"

Read = TypeVar("Read")


@dataclasses.dataclass(frozen=True, eq=False)
class EncodedVideo:
    """The encoding of a video by the video part of a split model; `Grounder.encode` returns it, `Grounder.ground` takes
    it.

    Attributes:
        features: (D, T), as the query part takes them: float32, or float16 in half precision.
        spans: (T, 2) float32, starts and ends of the segments as fractions of the video.
        duration: length in seconds.
        name: how reports call the video.
        model: SHA-256 of the video part that made it; no other model's query part can read it.
        key: 64 hexadecimal digits that stand for features, spans and model; made of them where it is not given.
        offset: as that of the `Video`.
        prepared: has no effect; version 0.1 stored what made dozens of queries on one video faster.
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
                f"An encoding of {self.name} holds floats of shape (D, T) and spans of shape (T, 2), and "
                f"{features.dtype} of shape {features.shape} and spans of shape {spans.shape} were given; "
                "encode the video again.",
                code="wrong_array",
            )
        if not 0 < self.duration <= LONGEST_SECONDS:
            raise FeatureError(
                f"The duration of {self.name} must be above 0 and at most {LONGEST_SECONDS:g} seconds, "
                f"and {self.duration} was given.",
                code="invalid_frame_count",
            )
        if not self.key:
            object.__setattr__(self, "key", _key(self))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the encoding to a `.npz` file, whole or not at all; OutputError if it cannot be written."""
        about = {"format": FORMAT, "duration": self.duration, "name": self.name, "model": self.model, "key": self.key}
        _save(path, {**about, "offset": self.offset}, self.features, self.spans)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> EncodedVideo:
        """Read what `save` wrote; nothing in the file is run.

        Raises:
            FeatureError: the file is missing, damaged, or not an encoding.
        """
        result = _load(path, _read)
        if result.key != _key(result):
            raise FeatureError(
                f"{path} was changed since it was written; encode the video again.", code="digest_mismatch"
            )
        return result


@dataclasses.dataclass(frozen=True, eq=False)
class EncodedWindows:
    """The encodings of the windows of a long video; at full size 0.5 MB per window.

    Attributes:
        parts: an encoding for each window.
        windows: the windows, in time order.
        duration: length of the video in seconds.
        name: how reports call the video.
        offset: as that of the `Video`.
    """

    parts: tuple[EncodedVideo, ...]
    windows: tuple[Window, ...]
    duration: float
    name: str = "video"
    offset: float = 0.0

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the encodings to a `.npz` file, whole or not at all; OutputError if it cannot be written."""
        first = self.parts[0]
        about = {"format": WINDOWS_FORMAT, "duration": self.duration, "name": self.name, "model": first.model}
        header = {"keys": [part.key for part in self.parts], "windows": [dataclasses.astuple(w) for w in self.windows]}
        arrays = (np.stack([getattr(part, name) for part in self.parts]) for name in ("features", "spans"))
        _save(path, {**about, **header, "offset": self.offset}, *arrays)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> EncodedWindows:
        """Read what `save` wrote; see `EncodedVideo.load`."""
        result = _load(path, _read_windows)
        if any(part.key != _key(part) for part in result.parts):
            raise FeatureError(
                f"{path} was changed since it was written; encode the video again.", code="digest_mismatch"
            )
        return result


def _save(path: str | os.PathLike[str], about: dict[str, Any], features: np.ndarray, spans: np.ndarray) -> None:
    check_path(path, OutputError)
    # The keys stand for the arrays; this digest stands for the rest.
    about = {**about, "digest": json_digest(about)}
    with atomic_write(path) as temporary, open(temporary, "wb") as stream:
        np.savez(stream, features=features, spans=spans, about=np.array(json.dumps(about)))


def _load(path: str | os.PathLike[str], read: Callable[[Any, np.ndarray, np.ndarray], Read]) -> Read:
    """Return what `read` makes of a file's facts, features and spans."""
    check_path(path, FeatureError)
    path = Path(path)
    check_file(path, "The encoding", FeatureError)
    with reading(path, "an encoding that drn-deploy saved", FeatureError, "encode the video again"):
        arrays = read_archive(path, max_members=3)
        about, features, spans = arrays["about"], arrays["features"], arrays["spans"]
        if about.shape or about.dtype.kind != "U":
            raise ValueError("its facts are not a text")
        facts = parse_json(str(about), f"{path}", FeatureError, advice="encode the video again")
        for name in ("duration", "offset"):
            if not (is_number(facts.get(name, 0.0)) and 0 <= facts.get(name, 0.0) <= LONGEST_SECONDS):
                raise ValueError(f"its {name} is {excerpt(facts[name])}")
        # Files of version 0.1 have no digest.
        digest = facts.pop("digest", None)
        if digest is not None and digest != json_digest(facts):
            raise ValueError("it was changed since it was written")
        return read(facts, features, spans)


def _read(about: Any, features: np.ndarray, spans: np.ndarray) -> EncodedVideo:
    _check_format(about, FORMAT)
    return EncodedVideo(
        features,
        spans,
        float(about["duration"]),
        str(about["name"]),
        str(about["model"]),
        str(about["key"]),
        offset=float(about.get("offset", 0.0)),
    )


def _read_windows(about: Any, features: np.ndarray, spans: np.ndarray) -> EncodedWindows:
    _check_format(about, WINDOWS_FORMAT)
    if not all(is_number(value) for values in about["windows"] for value in values):
        raise ValueError("its windows are not numbers")
    windows = tuple(Window(*values) for values in about["windows"])
    name, model = str(about["name"]), str(about["model"])
    if not len(features) == len(spans) == len(windows) == len(about["keys"]) > 0:
        raise ValueError("it does not hold as many encodings as windows")
    parts = tuple(
        EncodedVideo(encoded, borders, window.duration, name, model, str(key))
        for encoded, borders, window, key in zip(features, spans, windows, about["keys"])
    )
    return EncodedWindows(parts, windows, float(about["duration"]), name, float(about.get("offset", 0.0)))


def _check_format(about: Any, expected: str) -> None:
    if about["format"] != expected:
        raise ValueError(f"its format is {excerpt(about['format'])} and {excerpt(expected)} is read here")


def _key(video: EncodedVideo) -> str:
    digest = hashlib.sha256(f"{video.model} {video.features.dtype} {video.features.shape} ".encode())
    for values in (video.features, video.spans):
        digest.update(np.ascontiguousarray(values).data)
    return digest.hexdigest()
