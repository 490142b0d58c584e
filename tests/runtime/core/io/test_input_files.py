"""Test `runtime.core.io.input_files` and `digests`: paths that cannot be read, and readers that check them."""

from __future__ import annotations

import errno
import hashlib
import os
import unicodedata
from collections.abc import Callable
from pathlib import Path

import pytest

from calib.graph.onnx_graph import load_onnx
from runtime.artifacts.encoded_video import EncodedVideo
from runtime.backends import open_backend
from runtime.core.errors import AnnotationError, GroundingError, ModelFileError
from runtime.core.io.atomic_files import write_json
from runtime.core.io.digests import sha256
from runtime.core.io.input_files import check_directory, check_file, merges_names, read_json
from runtime.core.names import folded
from runtime.core.video import load_features
from runtime.corpus.feature_sources import open_source
from runtime.corpus.queries import read_questions
from runtime.datasets.dataset import DataSet
from runtime.media.extractors import open_extractor
from runtime.media.video_file import probe
from tests.raising import raises
from train.checkpoints import load_checkpoint

# What is at a path of this name, the code of the error, and the quoted part of its message.
UNREADABLE: dict[str, tuple[Callable[[Path], object], str, Callable[[Path], list[object]]]] = {
    "missing": (lambda path: None, "missing_file", lambda path: [path]),
    "directory": (lambda path: path.mkdir(), "not_a_file", lambda path: [path]),
    "pipe": (lambda path: os.mkfifo(path), "not_a_file", lambda path: [path]),
    "link": (lambda path: path.symlink_to("gone"), "missing_file", lambda path: [path]),
    "file/below": (lambda path: path.parent.touch(), "missing_file", lambda path: [path, path.parent]),
    "x" * 300: (lambda path: None, "unreadable_file", lambda path: [os.strerror(errno.ENAMETOOLONG)]),
    "x\0y": (lambda path: None, "unreadable_file", lambda path: [path.parent]),
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_check_file_unreadable_names_true_cause(name: str, tmp_path: Path) -> None:
    make, code, quoted = UNREADABLE[name]
    path = tmp_path / name
    make(path)
    with raises(ModelFileError, code, *quoted(path)):
        check_file(path, "The model file", ModelFileError)
    if name != "directory":
        with raises(ModelFileError, "not_a_directory" if name == "pipe" else code, *quoted(path)):
            check_directory(path, "The directory", ModelFileError)


def test_check_directory_accepts_directories_only(tmp_path: Path) -> None:
    file = tmp_path / "x"
    file.touch()
    check_directory(tmp_path, "The directory", AnnotationError)
    check_file(file, "The file", AnnotationError)
    for check in (lambda path: check_directory(path, "The directory", AnnotationError), DataSet):
        with raises(AnnotationError, "not_a_directory", file):
            check(file)
    with raises(GroundingError, "unknown_feature_store", file):
        open_source(file)


# Readers of files on the command line, and their suffixes.
READERS: dict[Callable[[Path], object], str] = {
    open_backend: ".onnx",
    load_features: ".npy",
    probe: "",
    read_questions: "",
    open_extractor: ".onnx",
    load_checkpoint: ".pt",
    load_onnx: ".onnx",
    EncodedVideo.load: "",
}


@pytest.mark.parametrize("reader", READERS)
def test_readers_unreadable_path_names_true_cause(reader: Callable[[Path], object], tmp_path: Path) -> None:
    for name in ("missing", "directory", "file/below", "x" * 300):
        make, code, quoted = UNREADABLE[name]
        path = tmp_path / f"{name}{READERS[reader]}"
        make(path)
        with raises(GroundingError, code, *quoted(path)):
            reader(path)


def test_json_survives_writing_and_reading(tmp_path: Path) -> None:
    value = {"R@1 IoU=0.5": 0.25, "quote": "“person”", "list": [1, None]}
    write_json(tmp_path / "value.json", value)
    assert read_json(tmp_path / "value.json", "a value") == value


def test_unreadable_json_raises_the_requested_class(tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    with raises(ModelFileError, "missing_file", path):
        read_json(path, "video to seconds", ModelFileError)
    for content, code in ((b"", "invalid_json"), (b"{", "invalid_json"), (b"\xff\xfe", "not_utf8")):
        path.write_bytes(content)
        with raises(ModelFileError, code, path, *(["video to seconds"] if code == "invalid_json" else [])):
            read_json(path, "video to seconds", ModelFileError)
    with raises(ModelFileError, "unreadable_file", tmp_path, "video to seconds", os.strerror(errno.EISDIR)):
        read_json(tmp_path, "video to seconds", ModelFileError)


def test_file_systems_that_merge_names_are_recognized(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Check a file system of Linux, which distinguishes names, and an emulated one of macOS."""
    assert not merges_names(tmp_path)
    assert not merges_names(tmp_path / "new" / "directory")
    assert list(tmp_path.iterdir()) == []
    for merged in (folded, lambda name: unicodedata.normalize("NFC", name)):
        monkeypatch.setattr(
            Path,
            "exists",
            lambda path, merged=merged: merged(path.name) in {merged(other) for other in os.listdir(path.parent)},
        )
        assert merges_names(tmp_path)


def test_sha256_covers_the_full_file(tmp_path: Path) -> None:
    data = bytes(range(256)) * 8192 + b"end"
    (tmp_path / "plan").write_bytes(data)
    assert sha256(tmp_path / "plan") == hashlib.sha256(data).hexdigest()
