"""Test `runtime.artifacts.onnx_metadata`: metadata are read without the graph."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from runtime.artifacts.manifest import METADATA_KEY
from runtime.artifacts.onnx_metadata import raw_manifest, read_metadata
from runtime.core.errors import ModelFileError
from tests.raising import raises


def test_read_metadata_returns_written_properties(write_graph: Callable[..., Path], tmp_path: Path) -> None:
    written = {METADATA_KEY: "{}" * 5000, "other": "\u00fcber"}
    assert read_metadata(write_graph(tmp_path / "m.onnx", written)) == written


def test_read_metadata_rejects_files_that_are_not_onnx(write_graph: Callable[..., Path], tmp_path: Path) -> None:
    graph = write_graph(tmp_path / "m.onnx", {METADATA_KEY: "{}" * 5000}).read_bytes()
    for name, content in (("cut", graph[:-40]), ("text", b"not a graph at all"), ("odd", b"\xff" * 64)):
        path = tmp_path / name
        path.write_bytes(content)
        with raises(ModelFileError, "not_onnx", path):
            read_metadata(path)
    with pytest.raises(ModelFileError):
        read_metadata(tmp_path / "absent")


def test_raw_manifest_that_is_nested_too_deeply_is_empty(write_graph: Callable[..., Path], tmp_path: Path) -> None:
    assert raw_manifest(write_graph(tmp_path / "m.onnx", {METADATA_KEY: "[" * 200_000})) == {}
