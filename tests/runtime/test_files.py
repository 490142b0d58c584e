"""`runtime.files`: whole or not there."""

from __future__ import annotations

import errno
import hashlib
import os
import resource
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import pytest

from calib.graphs import load_graph
from runtime.annotations import DataSet
from runtime.backends import open_backend
from runtime.corpus.questions import read_questions
from runtime.corpus.sources import open_source
from runtime.encodings import EncodedVideo
from runtime.errors import AnnotationError, GroundingError, ModelFileError, OutputError
from runtime.extractors import open_extractor
from runtime.files import (
    Staging,
    check_directory,
    check_file,
    check_writable,
    read_json,
    replace_when_whole,
    sha256,
    write_json,
    write_text,
)
from runtime.footage import look
from runtime.videos import load_features
from train.checkpoints import load_checkpoint

ROOT = Path(__file__).parents[2]


def content(directory: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in directory.iterdir()}


def test_the_file_takes_its_place_only_when_the_block_ends(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    path.write_text("old")
    with replace_when_whole(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
        assert temporary.parent == tmp_path
        assert temporary.suffix == ".json"
    assert content(tmp_path) == {"report.json": "new"}


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_after_any_interruption_all_is_as_before(error: type[BaseException], tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    path.write_text("old")

    def interrupted() -> NoReturn:
        with replace_when_whole(path) as temporary:
            temporary.write_text("half")
            raise error

    with pytest.raises(error):
        interrupted()
    assert content(tmp_path) == {"report.json": "old"}


def test_directories_are_made(tmp_path: Path) -> None:
    write_text(tmp_path / "a" / "b" / "report.txt", "text")
    assert content(tmp_path / "a" / "b") == {"report.txt": "text"}


def test_a_written_file_can_be_read_by_others_as_far_as_the_umask_lets_them(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_text(tmp_path / "report.txt", "text")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "report.txt").stat().st_mode) == 0o640


def failing(number: int) -> Any:
    def fail(*_: Any, **__: Any) -> NoReturn:
        raise OSError(number, os.strerror(number))

    return fail


@pytest.mark.parametrize("place", ["os.replace", "pathlib.Path.write_text", "tempfile.mkstemp"])
def test_a_full_disk_is_said_so_and_leaves_nothing(place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "report.json").write_text("old")
    with monkeypatch.context() as patched:
        patched.setattr(place, failing(errno.ENOSPC))
        with pytest.raises(OutputError, match=r"No space is left on the disk for .*report\.json"):
            write_json(tmp_path / "report.json", {"a": 1})
    assert content(tmp_path) == {"report.json": "old"}


def test_a_disk_that_fills_while_writing_leaves_nothing(tmp_path: Path) -> None:
    # The limit on file sizes stands for the disk's end; both stop a write half-way.
    code = f"from runtime.files import write_text; write_text({str(tmp_path / 'big.txt')!r}, 'x' * 100_000)"
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096)),
    )
    assert "OutputError" in result.stderr
    assert "big.txt cannot be written: File too large" in result.stderr
    assert not list(tmp_path.iterdir())


def test_other_failures_are_named_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "replace", failing(errno.EROFS))
    with pytest.raises(OutputError, match=r"report\.json cannot be written: Read-only file system"):
        write_text(tmp_path / "report.json", "text")
    assert not list(tmp_path.iterdir())


def test_a_file_where_a_directory_should_be_is_refused(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("a file")
    with pytest.raises(OutputError, match=r"report\.json cannot be written"):
        write_text(tmp_path / "runs" / "report.json", "text")
    assert content(tmp_path) == {"runs": "a file"}


def test_a_directory_where_the_file_should_be_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="is a directory"):
        write_text(tmp_path, "text")


@pytest.mark.skipif(hasattr(os, "geteuid") and os.geteuid() == 0, reason="root may write anywhere")
def test_a_directory_without_permission_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o555)
    with pytest.raises(OutputError, match="Permission denied"):
        write_text(tmp_path / "report.json", "text")


def test_not_a_number_never_gets_into_a_json_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "report.json", {"a": float("nan")})
    assert not list(tmp_path.iterdir())


def test_json_survives_writing_and_reading(tmp_path: Path) -> None:
    value = {"R@1 IoU=0.5": 0.25, "quote": "“person”", "list": [1, None]}
    write_json(tmp_path / "value.json", value)
    assert read_json(tmp_path / "value.json", "a value") == value


@pytest.mark.parametrize("text", ["", "{"])
def test_a_file_that_is_no_json_is_named_with_its_purpose(tmp_path: Path, text: str) -> None:
    (tmp_path / "table.json").write_text(text)
    with pytest.raises(AnnotationError, match=r"table\.json \(video to seconds\)"):
        read_json(tmp_path / "table.json", "video to seconds")


def test_a_missing_or_unreadable_json_file_is_named_in_the_class_asked_for(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match=r"gone\.json does not exist"):
        read_json(tmp_path / "gone.json", "ranges", ModelFileError)
    with pytest.raises(ModelFileError, match=r"\(ranges\).*Is a directory"):
        read_json(tmp_path, "ranges", ModelFileError)
    (tmp_path / "bytes.json").write_bytes(b"\xff\xfe")
    with pytest.raises(AnnotationError, match=r"bytes\.json"):
        read_json(tmp_path / "bytes.json", "ranges")


def test_a_digest_is_that_of_the_whole_file(tmp_path: Path) -> None:
    data = bytes(range(256)) * 8192 + b"end"
    (tmp_path / "plan").write_bytes(data)
    assert sha256(tmp_path / "plan") == hashlib.sha256(data).hexdigest()


def test_a_trial_write_changes_nothing_and_names_what_cannot_be_written(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    check_writable(path)
    assert content(tmp_path) == {}
    path.write_text("old")
    check_writable(path)
    check_writable(None)
    assert content(tmp_path) == {"report.json": "old"}
    with pytest.raises(OutputError, match="cannot be written"):
        check_writable(path / "below a file.json")


def test_a_device_is_never_replaced_by_a_file(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for refused in (pipe, tmp_path):
        with pytest.raises(OutputError):
            write_text(refused, "text")
    assert stat.S_ISFIFO(pipe.stat().st_mode)


def test_a_link_stays_one_and_what_it_points_to_is_replaced(tmp_path: Path) -> None:
    link, target = tmp_path / "link.txt", tmp_path / "target.txt"
    target.write_text("old")
    link.symlink_to(target)
    write_text(link, "new")
    assert link.is_symlink()
    assert target.read_text() == "new"


def test_an_output_that_is_an_input_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_text("weights")
    (tmp_path / "same.onnx").symlink_to(tmp_path / "model.onnx")
    check_writable(tmp_path / "report.json", tmp_path / "model.onnx", None)
    with pytest.raises(OutputError, match="would be written over"):
        check_writable(tmp_path / "same.onnx", tmp_path / "model.onnx")


def test_directories_made_for_a_file_that_did_not_come_about_are_gone(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no"), replace_when_whole(tmp_path / "a" / "b" / "report.json"):
        raise ValueError("no")
    assert list(tmp_path.iterdir()) == []
    write_text(tmp_path / "a" / "b" / "report.json", "text")
    assert (tmp_path / "a" / "b" / "report.json").is_file()


def test_staged_files_take_their_places_together_and_leave_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("old")
    with Staging() as staging:
        for name in ("a.txt", "b.txt", "draft.txt"):
            staging.path(tmp_path / name).write_text("new")
        assert (tmp_path / "a.txt").read_text() == "old"
        settled = staging.settle(lambda name: name != "draft.txt")
    assert [path.name for path in settled] == ["a.txt", "b.txt"]
    assert content(tmp_path) == {"a.txt": "new", "b.txt": "new"}


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_what_was_staged_before_an_interruption_is_gone(error: type[BaseException], tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("old")

    def interrupted() -> NoReturn:
        with Staging() as staging:
            staging.path(tmp_path / "a.txt").write_text("half")
            raise error

    with pytest.raises(error):
        interrupted()
    assert content(tmp_path) == {"a.txt": "old"}


def test_nothing_is_staged_for_a_directory(tmp_path: Path) -> None:
    with Staging() as staging, pytest.raises(OutputError, match="is a directory"):
        staging.path(tmp_path)


def test_what_cannot_be_staged_is_called_by_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Staging() as staging:
        waiting = staging.path(tmp_path / "a.txt")
        monkeypatch.setattr(Path, "write_text", failing(errno.ENOSPC))
        with pytest.raises(OutputError, match=rf"disk for {tmp_path.resolve()}/a\.txt;"):
            write_text(waiting, "a")


UNREADABLE = {
    "missing": (lambda path: None, "does not exist"),
    "directory": (lambda path: path.mkdir(), "is a directory"),
    "pipe": (lambda path: os.mkfifo(path), "is a pipe"),
    "link": (lambda path: path.symlink_to("gone"), "is a link to a file that does not exist"),
    "long": (lambda path: None, "File name too long"),
    "under_file": (lambda path: path.parent.touch(), "is a file and not a directory"),
    "null": (lambda path: None, "null"),
}
NAMES = {"long": "x" * 300, "under_file": "file/below", "null": "x\0y"}


@pytest.mark.parametrize("kind", UNREADABLE)
def test_check_file_unreadable_names_true_cause(kind: str, tmp_path: Path) -> None:
    make, cause = UNREADABLE[kind]
    path = tmp_path / NAMES.get(kind, "x")
    make(path)
    with pytest.raises(ModelFileError, match=cause):
        check_file(path, "The model file", ModelFileError)
    if kind != "directory":
        with pytest.raises(ModelFileError, match=cause):
            check_directory(path, "The directory", ModelFileError)


def test_check_directory_file_is_not_called_missing(tmp_path: Path) -> None:
    (tmp_path / "x").touch()
    with pytest.raises(AnnotationError, match="is a file, not a directory"):
        check_directory(tmp_path / "x", "The directory", AnnotationError)
    check_directory(tmp_path, "The directory", AnnotationError)
    check_file(tmp_path / "x", "The file", AnnotationError)


# Every reader of a file that a command line names, and the flag that names it.
READERS: dict[str, Callable[[Path], object]] = {
    "--model": open_backend,
    "--features": load_features,
    "--video": look,
    "--queries": read_questions,
    "--extractor": open_extractor,
    "--checkpoint": load_checkpoint,
    "graph": load_graph,
    "encoding": EncodedVideo.load,
}
SUFFIX = {"--model": ".onnx", "--features": ".npy", "--extractor": ".onnx", "--checkpoint": ".pt", "graph": ".onnx"}


@pytest.mark.parametrize("flag", READERS)
@pytest.mark.parametrize("kind", ["missing", "directory", "long", "under_file"])
def test_readers_unreadable_path_names_true_cause(flag: str, kind: str, tmp_path: Path) -> None:
    make, cause = UNREADABLE[kind]
    path = tmp_path / (NAMES.get(kind, "x") + SUFFIX.get(flag, ""))
    make(path)
    with pytest.raises(GroundingError, match=cause):
        READERS[flag](path)


@pytest.mark.parametrize("reader", [DataSet, open_source])
def test_data_directory_that_is_a_file_is_not_called_missing(reader: Callable[[Path], object], tmp_path: Path) -> None:
    (tmp_path / "x").touch()
    with pytest.raises(GroundingError) as raised:
        reader(tmp_path / "x")
    assert "does not exist" not in str(raised.value)


def test_output_below_a_file_names_that_file(tmp_path: Path) -> None:
    (tmp_path / "x").touch()
    with pytest.raises(OutputError, match="x is not a directory"):
        check_writable(tmp_path / "x" / "run.json")
