"""Test `runtime.artifacts.manifest`: the manifest of a model file."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

from runtime.artifacts.manifest import FORMAT, Features, Manifest
from runtime.core.decoding import Decoding
from runtime.core.errors import ModelFileError
from runtime.core.sliding_windows import Windows
from runtime.core.tokenizer import Vocabulary
from tests.raising import raises


def full() -> Manifest:
    """Return a manifest without default values."""
    return Manifest(
        Vocabulary({"person": 1, "“door”": 2}, "zero"),
        Decoding(64, (1, 2, 4, 8), 0.1, 16, False, "drn"),
        Features("I3D", 1024, 32, 4, "drn"),
        stage=1,
        precision="int8",
        max_query_length=20,
        sources={"drn.pt": "ab" * 32},
        producer={"torch": "2.13.0"},
        training={"seed": 3, "validation": {"mIoU": 0.5}},
        windows=Windows(194.42, 43.0, 14.5),
    )


def test_manifest_survives_json() -> None:
    assert Manifest.from_json(full().to_json()) == full()
    minimal = Manifest(Vocabulary({"a": 1}), Decoding(), Features())
    assert Manifest.from_json(minimal.to_json()) == minimal
    # As in files of version 0.1.
    assert not {"windows", "part", "video_part", "prepared_parts", "presence"} & set(minimal.to_dict())


def test_json_names_the_format_first_and_every_field() -> None:
    value = json.loads(full().to_json())
    assert next(iter(value)) == "format"
    assert value["format"] == FORMAT == "drn-manifest/1"
    assert value["vocabulary"] == {"unknown": "zero", "words": {"person": 1, "“door”": 2}}
    assert value["features"] == {"kind": "I3D", "dim": 1024, "window": 32, "stride": 4, "pooling": "drn"}
    assert value["decoding"]["strides"] == [1, 2, 4, 8]
    assert (value["stage"], value["precision"], value["max_query_length"]) == (1, "int8", 20)


@pytest.mark.parametrize(
    ("text", "code", "quoted"),
    [
        (None, "missing_manifest", ("'drn.manifest'", "python -m export.to_onnx")),
        *((text, "invalid_json", ()) for text in ("", "{", "not json")),
        *((text, "unknown_format", ()) for text in ("[]", "null", "3", "{}")),
        *(
            (
                json.dumps({**full().to_dict(), "format": other}),
                "unknown_format",
                (repr(other), repr(FORMAT), "python -m export.to_onnx"),
            )
            for other in ("drn-manifest/2", "drn-manifest/0", None, 1)
        ),
    ],
)
def test_text_that_is_not_a_manifest_is_rejected(text: str | None, code: str, quoted: tuple[str, ...]) -> None:
    with raises(ModelFileError, code, "door.onnx", *quoted):
        Manifest.from_json(text, "door.onnx")


@pytest.mark.parametrize("field", [name for name in full().to_dict() if name not in ("format", "windows")])
def test_manifest_with_missing_field_is_rejected(field: str) -> None:
    value = full().to_dict()
    del value[field]
    with raises(ModelFileError, "damaged_file", repr(field)):
        Manifest.from_dict(value)


@pytest.mark.parametrize(
    ("field", "content"),
    [
        ("features", {"width": 3}),
        ("features", 3),
        ("decoding", {"nms": 1}),
        ("decoding", {"num_segments": 30}),
        ("decoding", {"protocol": "best"}),
        ("vocabulary", {"unknown": "skip", "words": {"a": 7}}),
        ("vocabulary", {"unknown": "guess", "words": {"a": 1}}),
        ("vocabulary", {"words": {"a": 1}}),
        ("vocabulary", {"unknown": "skip", "words": {"a": "1"}}),
        ("vocabulary", []),
        ("stage", "three"),
        ("max_query_length", None),
        ("sources", 3),
    ],
)
def test_manifest_field_of_wrong_type_is_rejected(field: str, content: Any) -> None:
    with pytest.raises(ModelFileError):
        Manifest.from_dict({**full().to_dict(), field: content}, "door.onnx")


def test_manifest_of_a_part_names_the_other_parts(tiny_manifest: Manifest) -> None:
    parts = {"drn.prepare.onnx": "2" * 64, "drn.prepared.onnx": "3" * 64}
    query = dataclasses.replace(
        tiny_manifest, part="query", video_part={"drn.video.onnx": "1" * 64}, prepared_parts=parts
    )
    back = Manifest.from_json(query.to_json())
    assert back == query
    assert list(back.prepared_parts) == list(parts)
    with raises(ModelFileError, "invalid_setting", "'half'"):
        Manifest.from_dict({**query.to_dict(), "part": "half"})
