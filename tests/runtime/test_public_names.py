"""Test that public functions of `runtime` reject arguments of a wrong type with a GroundingError."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from runtime import (
    EncodedVideo,
    EncodedWindows,
    Grounder,
    GroundingError,
    Presence,
    Video,
    Vocabulary,
    Windows,
    open_backend,
    temporal_iou,
)
from runtime.core.pooling import ClipTiming
from tests.raising import raises

WRONG: dict[str, Any] = {
    "None": None,
    "integer": 5,
    "negative": -1,
    "float": 1.5,
    "nan": float("nan"),
    "inf": float("inf"),
    "large": 10**400,
    "bool": True,
    "text": "x",
    "empty": "",
    "nul": "a\0b",
    "bytes": b"x",
    "list": [1, "a"],
    "dict": {"a": 1},
    "set": {1},
    "class": int,
    "object": object(),
    "array": np.zeros((2, 2)),
    "scalar array": np.array(3.0),
}
Call = tuple[Callable[..., Any], Mapping[str, Any]]


@pytest.fixture(scope="module")
def calls(tiny_model: Path, pair_files: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Call]:
    """Every public function and method with valid arguments, by name."""
    complete, pair = Grounder.load(tiny_model), Grounder.load(pair_files)
    features = complete.manifest.features
    clips = np.random.default_rng(0).random((115, features.dim)).astype(np.float32)
    video = Video(clips, features.clock.num_frames(115), 30.96)
    encoded = pair.encode(video)
    assert isinstance(encoded, EncodedVideo)
    path = tmp_path_factory.mktemp("files")
    np.save(path / "video.npy", clips)
    encoded.save(path / "encoded.npz")
    vocabulary, sentence = Vocabulary({"person": 1, "door": 2}), next(iter(complete.manifest.vocabulary.words))
    shown: dict[str, Any] = {"features": encoded.features, "spans": encoded.spans, "duration": 3.0}
    spans = np.array([[0.0, 1.0]])
    return {
        "open_backend": (open_backend, {"path": tiny_model, "device": "cpu", "threads": 1}),
        "Grounder": (Grounder, {"backend": complete.backend}),
        "Grounder.load": (Grounder.load, {"path": tiny_model, "device": "cpu", "threads": 1}),
        "Grounder.ground": (complete.ground, {"video": video, "query": sentence, "top_k": 5}),
        "Grounder.ground of a pair": (pair.ground, {"video": encoded, "query": sentence, "top_k": 5}),
        "Grounder.ground_batch": (complete.ground_batch, {"pairs": [(video, sentence)], "top_k": 5, "batch_size": 4}),
        "Grounder.cut": (complete.cut, {"video": video}),
        "Grounder.warm": (complete.warm, {"batches": [1], "lengths": [4]}),
        "Grounder.encode": (pair.encode, {"video": video}),
        "Grounder.encode_query": (complete.encode_query, {"query": sentence}),
        "Grounder.check_fits": (complete.check_fits, {"video": video}),
        "Video": (Video, {"features": clips, "num_frames": 928, "duration": 30.96, "name": "a", "offset": 0.0}),
        "Video.load": (
            Video.load,
            {"path": path / "video.npy", "duration": 30.96, "num_frames": 928, "clock": ClipTiming()},
        ),
        "Video.segments": (video.segments, {"num_segments": 32, "pooling": "mmaction2", "clock": features.clock}),
        "Video.check": (video.check, {"clock": features.clock}),
        "EncodedVideo": (EncodedVideo, {**shown, "name": "a", "model": "b", "key": "c", "offset": 0.0}),
        "EncodedVideo.load": (EncodedVideo.load, {"path": path / "encoded.npz"}),
        "EncodedVideo.save": (encoded.save, {"path": path / "saved.npz"}),
        "EncodedWindows.load": (EncodedWindows.load, {"path": path / "encoded.npz"}),
        "Presence": (Presence, {"threshold": 0.5, "kept": 0.5, "refused": 0.5, "matching": 1, "mismatched": 1}),
        "Presence.from_dict": (Presence.from_dict, {"value": Presence(0.5, 0.5, 0.5, 1, 1).to_dict()}),
        "Windows": (Windows, {"longest": 100.0, "length": 40.0, "overlap": 10.0}),
        "Windows.from_dict": (Windows.from_dict, {"value": Windows(100.0, 40.0, 10.0).to_dict()}),
        "Vocabulary": (Vocabulary, {"words": {"a": 1}, "unknown": "skip"}),
        "Vocabulary.encode": (vocabulary.encode, {"sentence": "person"}),
        "Vocabulary.near": (vocabulary.near, {"word": "person"}),
        "Vocabulary.knows_any": (vocabulary.knows_any, {"sentence": "person"}),
        "Vocabulary.from_dict": (Vocabulary.from_dict, {"value": vocabulary.to_dict()}),
        "temporal_iou": (temporal_iou, {"a": spans, "b": spans}),
    }


def test_wrong_types_raise_our_errors(calls: dict[str, Call], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A path such as "x" is one that may be written.
    monkeypatch.chdir(tmp_path)
    crashes = []
    for name, (function, arguments) in calls.items():
        for argument in arguments:
            for kind, value in WRONG.items():
                try:
                    function(**{**arguments, argument: value})
                except GroundingError:
                    continue
                # No public function may raise an error of a library.
                except Exception as error:
                    crashes.append(f"{name}({argument}={kind}): {type(error).__name__}: {error}"[:200])
    assert crashes == []


def test_invalid_argument_error_names_the_argument(calls: dict[str, Call]) -> None:
    examples = [
        *(("open_backend", "path"), ("open_backend", "threads"), ("Grounder", "backend"), ("Grounder.load", "path")),
        *(("Grounder.check_fits", "video"), ("Grounder.warm", "lengths"), ("Video.load", "path")),
        *(("Video.segments", "num_segments"), ("Video.check", "clock"), ("EncodedVideo", "features")),
        *(("EncodedVideo.save", "path"), ("Vocabulary.encode", "sentence"), ("Windows.from_dict", "value")),
        ("temporal_iou", "a"),
    ]
    for name, argument in examples:
        function, arguments = calls[name]
        with raises(GroundingError, "invalid_argument", argument):
            function(**{**arguments, argument: object()})


def test_arguments_of_right_types_are_accepted(calls: dict[str, Call]) -> None:
    for name, (function, arguments) in calls.items():
        if name != "EncodedWindows.load":
            function(**arguments)
