"""A video as the query part of a model meets it: encoded once, asked often, kept in memory or in a file."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from runtime.errors import FeatureError
from runtime.files import replace_when_whole
from runtime.videos import LONGEST_SECONDS

FORMAT = "drn-encoding/1"


@dataclasses.dataclass(frozen=True, eq=False)
class EncodedVideo:
    """What a model's video part makes of a video; `Grounder.encode` returns one, `Grounder.ground` takes it.

    Attributes:
        features: (D, T), as the query part takes them: float32, or float16 in half precision.
        spans: (T, 2) float32, starts and ends of the segments as fractions of the video.
        duration: length in seconds.
        name: how reports call the video.
        model: SHA-256 of the video part that made it; no other model's query part can read it.
        key: 64 hexadecimal digits that stand for features, spans and model; made of them where it is not given.
        prepared: (256 T, D) float32, 134 MB at full size: what makes dozens of queries at once faster on a CPU
            (`Grounder.encode(video, prepare=True)`). Not saved: it is made faster than it would be read.
    """

    features: np.ndarray
    spans: np.ndarray
    duration: float
    name: str = "video"
    model: str = ""
    key: str = ""
    prepared: np.ndarray | None = None

    def __post_init__(self) -> None:
        features, spans = self.features, self.spans
        if features.ndim != 2 or features.dtype.kind != "f" or spans.shape != (features.shape[1], 2):
            raise FeatureError(
                f"An encoding of {self.name} holds floats of shape (D, T) and spans of shape (T, 2), and "
                f"{features.dtype} of shape {features.shape} and spans of shape {spans.shape} were given; "
                "encode the video again."
            )
        if not 0 < self.duration <= LONGEST_SECONDS:
            raise FeatureError(
                f"The duration of {self.name} must be above 0 and at most {LONGEST_SECONDS:g} seconds, "
                f"and {self.duration} was given."
            )
        if not self.key:
            object.__setattr__(self, "key", _key(self))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the encoding to a `.npz` file, whole or not at all; OutputError if it cannot be written."""
        about = {"format": FORMAT, "duration": self.duration, "name": self.name, "model": self.model, "key": self.key}
        with replace_when_whole(path) as temporary, open(temporary, "wb") as stream:
            np.savez(stream, features=self.features, spans=self.spans, about=np.array(json.dumps(about)))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> EncodedVideo:
        """Read what `save` wrote; nothing in the file is run.

        Raises:
            FeatureError: the file is missing, damaged, or not an encoding.
        """
        path = Path(path)
        if not path.is_file():
            raise FeatureError(f"The encoding {path} does not exist; check the path.")
        try:
            with np.load(path, allow_pickle=False) as arrays:
                about = json.loads(str(arrays["about"]))
                features, spans = arrays["features"], arrays["spans"]
            found = _read(about, features, spans)
        # On damaged files zipfile and NumPy raise what their parsers do, without a common base.
        except Exception as error:
            said = " ".join(str(error).split()).rstrip(".")
            raise FeatureError(
                f"{path} should be an encoding that `EncodedVideo.save` wrote and cannot be read ({said}); "
                "encode the video again."
            ) from error
        if found.key != _key(found):
            raise FeatureError(f"{path} was changed since it was written; encode the video again.")
        return found


def _read(about: Any, features: np.ndarray, spans: np.ndarray) -> EncodedVideo:
    if about["format"] != FORMAT:
        raise ValueError(f"its format is {about['format']!r} and this version reads {FORMAT!r}")
    return EncodedVideo(
        features, spans, float(about["duration"]), str(about["name"]), str(about["model"]), str(about["key"])
    )


def _key(video: EncodedVideo) -> str:
    digest = hashlib.sha256(f"{video.model} {video.features.dtype} {video.features.shape} ".encode())
    for values in (video.features, video.spans):
        digest.update(np.ascontiguousarray(values).data)
    return digest.hexdigest()
