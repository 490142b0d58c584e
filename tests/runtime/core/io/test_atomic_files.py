"""Test `runtime.core.io.atomic_files`: files are complete or absent."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import resource
import signal
import stat
import subprocess
import sys
import threading
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import pytest

from calib.graph.onnx_graph import load_onnx
from runtime.artifacts.encoded_video import EncodedVideo
from runtime.backends import open_backend
from runtime.core.errors import AnnotationError, GroundingError, ModelFileError, OutputError
from runtime.core.interrupts import Interrupted, handled
from runtime.core.io import atomic_files
from runtime.core.io.atomic_files import (
    Staging,
    atomic_write,
    check_writable,
    content_names,
    locked,
    remove_strays,
    write_json,
    write_text,
)
from runtime.core.io.digests import sha256
from runtime.core.io.input_files import check_directory, check_file, merges_names, read_json
from runtime.core.names import folded
from runtime.core.video import load_features
from runtime.corpus.feature_sources import open_source
from runtime.corpus.queries import read_questions
from runtime.datasets.dataset import DataSet
from runtime.media.extractors import open_extractor
from runtime.media.video_file import probe
from tests.raising import quotes, raises
from tests.runtime.core.test_interrupts import send
from train.checkpoints import load_checkpoint

ROOT = Path(__file__).parents[4]


def content(directory: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in directory.iterdir()}


def test_atomic_write_replaces_file_when_block_ends(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    path.write_text("old")
    with atomic_write(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
        assert temporary.parent == tmp_path
        assert temporary.suffix == ".json"
    assert content(tmp_path) == {"report.json": "new"}


@contextlib.contextmanager
def staged_in_this_process(path: Path) -> Iterator[Path]:
    with Staging() as staging:
        yield staging.path(path)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("write", [atomic_write, staged_in_this_process])
def test_interrupted_write_keeps_previous_file(write: Any, error: type[BaseException], tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    path.write_text("old")

    def interrupted() -> NoReturn:
        with write(path) as temporary:
            temporary.write_text("half")
            raise error

    with pytest.raises(error):
        interrupted()
    assert content(tmp_path) == {"report.json": "old"}


def test_written_file_mode_follows_the_umask(tmp_path: Path) -> None:
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


@pytest.mark.parametrize(
    ("target", "number", "code"),
    [
        ("os.replace", errno.ENOSPC, "disk_full"),
        ("pathlib.Path.write_text", errno.ENOSPC, "disk_full"),
        ("tempfile.mkstemp", errno.ENOSPC, "disk_full"),
        ("os.replace", errno.EROFS, "unwritable_output"),
    ],
)
def test_failed_write_raises_and_keeps_previous_file(
    target: str, number: int, code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "report.json").write_text("old")
    with monkeypatch.context() as patched:
        patched.setattr(target, failing(number))
        cause = [] if code == "disk_full" else [os.strerror(number)]
        with raises(OutputError, code, tmp_path / "report.json", *cause):
            write_json(tmp_path / "report.json", {"a": 1})
    assert content(tmp_path) == {"report.json": "old"}


def test_disk_filling_during_write_leaves_no_file(tmp_path: Path) -> None:
    # The limit on file sizes stops a write like a full disk does.
    code = (
        f"from runtime.core.io.atomic_files import write_text; write_text({str(tmp_path / 'big.txt')!r}, 'x' * 100_000)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096)),
    )
    assert quotes(result.stderr, "OutputError", tmp_path / "big.txt", os.strerror(errno.EFBIG))
    assert not list(tmp_path.iterdir())


UNWRITABLE = {
    "below a file": ("file/report.json", "unwritable_output", "file"),
    "directory": ("directory", "output_is_directory", "directory"),
    "pipe": ("pipe", "unwritable_output", "pipe"),
    "link to itself": ("loop", "unwritable_output", "loop"),
    "long name": ("x" * 300, "unwritable_output", ""),
    "long path": ("y/" * 3000 + "z", "unwritable_output", ""),
}


@pytest.mark.parametrize("write", [lambda path: write_text(path, "text"), check_writable], ids=["write", "check"])
@pytest.mark.parametrize("kind", UNWRITABLE)
def test_path_that_cannot_be_written_is_rejected(write: Any, kind: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("a file")
    (tmp_path / "directory").mkdir()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    before = sorted(tmp_path.iterdir())
    name, code, quoted = UNWRITABLE[kind]
    with raises(OutputError, code, tmp_path / quoted if quoted else ""):
        write(tmp_path / name)
    assert sorted(tmp_path.iterdir()) == before
    assert (tmp_path / "file").read_text() == "a file"
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)


@pytest.mark.skipif(hasattr(os, "geteuid") and os.geteuid() == 0, reason="root may write anywhere")
def test_output_directory_without_permission_is_rejected(tmp_path: Path) -> None:
    tmp_path.chmod(0o555)
    with raises(OutputError, "unwritable_output", tmp_path / "report.json", os.strerror(errno.EACCES)):
        write_text(tmp_path / "report.json", "text")


def test_write_json_rejects_nan(tmp_path: Path) -> None:
    with pytest.raises(ValueError):  # noqa: PT011
        write_json(tmp_path / "report.json", {"a": float("nan")})
    assert not list(tmp_path.iterdir())


def test_json_survives_writing_and_reading(tmp_path: Path) -> None:
    value = {"R@1 IoU=0.5": 0.25, "quote": "“person”", "list": [1, None]}
    write_json(tmp_path / "value.json", value)
    assert read_json(tmp_path / "value.json", "a value") == value


@pytest.mark.parametrize(
    ("content", "code"),
    [(b"", "invalid_json"), (b"{", "invalid_json"), (b"\xff\xfe", "not_utf8"), (None, "missing_file")],
)
@pytest.mark.parametrize("error", [AnnotationError, ModelFileError])
def test_unreadable_json_raises_the_requested_class(
    content: bytes | None, code: str, error: type[GroundingError], tmp_path: Path
) -> None:
    path = tmp_path / "table.json"
    if content is not None:
        path.write_bytes(content)
    with raises(error, code, path, *(["video to seconds"] if code == "invalid_json" else [])):
        read_json(path, "video to seconds", error)
    with raises(error, "unreadable_file", tmp_path, "video to seconds", os.strerror(errno.EISDIR)):
        read_json(tmp_path, "video to seconds", error)


def test_sha256_covers_the_full_file(tmp_path: Path) -> None:
    data = bytes(range(256)) * 8192 + b"end"
    (tmp_path / "plan").write_bytes(data)
    assert sha256(tmp_path / "plan") == hashlib.sha256(data).hexdigest()


def test_check_writable_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    check_writable(path)
    assert content(tmp_path) == {}
    path.write_text("old")
    check_writable(path)
    check_writable(None)
    assert content(tmp_path) == {"report.json": "old"}


def test_write_through_link_replaces_its_target(tmp_path: Path) -> None:
    link, target = tmp_path / "link.txt", tmp_path / "target.txt"
    target.write_text("old")
    link.symlink_to(target)
    write_text(link, "new")
    assert link.is_symlink()
    assert target.read_text() == "new"


def test_output_that_is_an_input_is_rejected(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_text("weights")
    (tmp_path / "same.onnx").symlink_to(tmp_path / "model.onnx")
    check_writable(tmp_path / "report.json", tmp_path / "model.onnx", None)
    with raises(OutputError, "output_exists", tmp_path / "same.onnx"):
        check_writable(tmp_path / "same.onnx", tmp_path / "model.onnx")


def test_failed_write_removes_created_directories(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "report.json"
    with pytest.raises(ZeroDivisionError), atomic_write(path):
        raise ZeroDivisionError
    with Staging() as staging:
        staging.path(path).write_text("text")
    assert list(tmp_path.iterdir()) == []
    write_text(path, "text")
    assert content(tmp_path / "a" / "b") == {"report.json": "text"}


def test_staged_files_are_committed_together(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("old")
    with Staging() as staging:
        for name in ("a.txt", "b.txt", "draft.txt"):
            staging.path(tmp_path / name).write_text("new")
        assert (tmp_path / "a.txt").read_text() == "old"
        written = staging.commit(lambda name: name != "draft.txt")
    assert [path.name for path in written] == ["a.txt", "b.txt"]
    assert content(tmp_path) == {"a.txt": "new", "b.txt": "new"}


def test_staging_rejects_a_directory_path(tmp_path: Path) -> None:
    with Staging() as staging, raises(OutputError, "output_is_directory", tmp_path):
        staging.path(tmp_path)


def test_staging_error_names_the_final_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Staging() as staging:
        waiting = staging.path(tmp_path / "a.txt")
        monkeypatch.setattr(Path, "write_text", failing(errno.ENOSPC))
        with raises(OutputError, "disk_full", tmp_path.resolve() / "a.txt"):
            write_text(waiting, "a")


UNREADABLE = {
    "missing": (lambda path: None, "missing_file"),
    "directory": (lambda path: path.mkdir(), "not_a_file"),
    "pipe": (lambda path: os.mkfifo(path), "not_a_file"),
    "link": (lambda path: path.symlink_to("gone"), "missing_file"),
    "long": (lambda path: None, "unreadable_file"),
    "under_file": (lambda path: path.parent.touch(), "missing_file"),
    "null": (lambda path: None, "unreadable_file"),
}
NAMES = {"long": "x" * 300, "under_file": "file/below", "null": "x\0y"}


def causes(kind: str, path: Path) -> list[object]:
    """Return the quoted part of the message about an unreadable path."""
    if kind == "long":
        return [os.strerror(errno.ENAMETOOLONG)]
    if kind == "null":
        return [path.parent]
    return [path, path.parent] if kind == "under_file" else [path]


@pytest.mark.parametrize("kind", UNREADABLE)
def test_check_file_unreadable_names_true_cause(kind: str, tmp_path: Path) -> None:
    make, code = UNREADABLE[kind]
    path = tmp_path / NAMES.get(kind, "x")
    make(path)
    values = causes(kind, path)
    with raises(ModelFileError, code, *values):
        check_file(path, "The model file", ModelFileError)
    if kind != "directory":
        with raises(ModelFileError, "not_a_directory" if kind == "pipe" else code, *values):
            check_directory(path, "The directory", ModelFileError)


def test_check_directory_file_is_not_called_missing(tmp_path: Path) -> None:
    (tmp_path / "x").touch()
    with raises(AnnotationError, "not_a_directory", tmp_path / "x"):
        check_directory(tmp_path / "x", "The directory", AnnotationError)
    check_directory(tmp_path, "The directory", AnnotationError)
    check_file(tmp_path / "x", "The file", AnnotationError)


# Readers of files on the command line, and their flags.
READERS: dict[str, Callable[[Path], object]] = {
    "--model": open_backend,
    "--features": load_features,
    "--video": probe,
    "--queries": read_questions,
    "--extractor": open_extractor,
    "--checkpoint": load_checkpoint,
    "graph": load_onnx,
    "encoding": EncodedVideo.load,
}
SUFFIX = {"--model": ".onnx", "--features": ".npy", "--extractor": ".onnx", "--checkpoint": ".pt", "graph": ".onnx"}


@pytest.mark.parametrize("flag", READERS)
@pytest.mark.parametrize("kind", ["missing", "directory", "long", "under_file"])
def test_readers_unreadable_path_names_true_cause(flag: str, kind: str, tmp_path: Path) -> None:
    make, code = UNREADABLE[kind]
    path = tmp_path / (NAMES.get(kind, "x") + SUFFIX.get(flag, ""))
    make(path)
    with raises(GroundingError, code, *causes(kind, path)):
        READERS[flag](path)


@pytest.mark.parametrize("reader", [DataSet, open_source])
def test_data_directory_that_is_a_file_is_not_called_missing(reader: Callable[[Path], object], tmp_path: Path) -> None:
    (tmp_path / "x").touch()
    with pytest.raises(GroundingError) as raised:
        reader(tmp_path / "x")
    assert raised.value.code != "missing_file"


# Temporary files of killed processes


def start_writer(body: str) -> subprocess.Popen[str]:
    """Start a process that prints a line in the middle of this body, and waits."""
    code = "import sys, time\nfrom pathlib import Path\n"
    code += "from runtime.core.io.atomic_files import Staging, locked, atomic_write\n"
    wait = "print('ready', flush=True); sys.stdin.read()"
    return subprocess.Popen(
        [sys.executable, "-c", code + body.replace("WAIT", wait)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def half(path: Path) -> str:
    return f"with atomic_write({str(path)!r}) as temporary:\n    temporary.write_text('half')\n    WAIT\n"


def staged(path: Path) -> str:
    write = f"staging.path({str(path)!r}).write_text('half')"
    return f"with Staging() as staging:\n    {write}\n    WAIT\n    staging.commit()\n"


@pytest.fixture
def writer() -> Iterator[Callable[[str], subprocess.Popen[str]]]:
    """Start writers that wait in the middle of a write, and end them after the test."""
    started: list[subprocess.Popen[str]] = []

    def begin(body: str) -> subprocess.Popen[str]:
        process = start_writer(body)
        started.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        return process

    yield begin
    for process in started:
        process.kill()
        process.communicate()


def commit(path: Path, text: str) -> None:
    with Staging() as staging:
        staging.path(path).write_text(text)
        staging.commit()


@pytest.mark.parametrize("body", [half, staged])
@pytest.mark.parametrize("write", [write_text, commit])
def test_next_write_removes_files_of_killed_process(
    body: Callable[[Path], str], write: Callable[[Path, str], None], writer: Callable[[str], Any], tmp_path: Path
) -> None:
    process = writer(body(tmp_path / "report.json"))
    process.kill()
    process.wait()
    assert len(list(tmp_path.iterdir())) == 1
    write(tmp_path / "other.json", "complete")
    assert content(tmp_path) == {"other.json": "complete"}


@pytest.mark.parametrize("body", [half, staged])
def test_live_writers_of_one_file_keep_their_temporary_files(
    body: Callable[[Path], str], writer: Callable[[str], Any], tmp_path: Path
) -> None:
    path = tmp_path / "report.json"
    processes = [writer(body(path)) for _ in range(2)]
    write_text(path, "complete")
    remove_strays(tmp_path)
    assert len(list(tmp_path.iterdir())) == 3
    for process in processes:
        process.communicate(timeout=30)
        assert process.returncode == 0
    assert content(tmp_path) == {"report.json": "half"}


def test_sigterm_during_staging_leaves_no_files(writer: Callable[[str], Any], tmp_path: Path) -> None:
    process = writer(f"from runtime.core.interrupts import install; install()\n{staged(tmp_path / 'report.json')}")
    process.terminate()
    process.wait(timeout=30)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "name",
    [
        ".report.abcdefgh.json",
        ".drn-notes",
        ".drn-0123456-abcdefgh-report.json",
        "x.drn-01234567-abcdefgh",
        ".drn-lock",
    ],
)
def test_files_with_other_names_are_not_removed(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("mine")
    os.utime(tmp_path / name, (0, 0))
    write_text(tmp_path / "report.json", "text")
    assert content(tmp_path) == {"report.json": "text", name: "mine"}


def test_foreign_temporary_files_are_removed_after_a_day(tmp_path: Path) -> None:
    file, directory = tmp_path / ".drn-01234567-abcdefgh-report.json", tmp_path / ".drn-01234567-hgfedcba"
    file.write_text("half")
    directory.mkdir()
    (directory / "drn.onnx").write_text("half")
    remove_strays(tmp_path)
    assert file.exists()
    assert directory.exists()
    for path in (directory / "drn.onnx", directory, file):
        os.utime(path, (0, 0))
    remove_strays(tmp_path)
    assert not list(tmp_path.iterdir())


def test_without_file_locks_only_old_files_are_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("runtime.core.io.atomic_files.fcntl.flock", failing(errno.ENOLCK))
    with atomic_write(tmp_path / "report.json") as temporary:
        temporary.write_text("half")
        remove_strays(tmp_path)
        assert temporary.exists()
        os.utime(temporary, (0, 0))
        remove_strays(tmp_path)
        assert not temporary.exists()
        temporary.write_text("complete")


def test_link_named_like_temporary_file_is_not_followed(tmp_path: Path) -> None:
    target = tmp_path / "mine"
    target.mkdir()
    (target / "file").write_text("mine")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".drn-01234567-abcdefgh").symlink_to(target)
    os.utime(target / "file", (0, 0))
    write_text(tmp_path / "out" / "report.json", "text")
    assert (target / "file").read_text() == "mine"


@pytest.mark.parametrize("name", ["x" * 240 + ".json", "é" * 120 + ".npy", "a." + "b" * 240])
def test_long_file_names_can_be_written(name: str, tmp_path: Path) -> None:
    write_text(tmp_path / name, "text")
    assert content(tmp_path) == {name: "text"}


def test_signal_during_commit_still_writes_all_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replace = os.replace

    def interrupted(*paths: Any) -> None:
        replace(*paths)
        send(signal.SIGTERM)

    monkeypatch.setattr(os, "replace", interrupted)

    def commit_three() -> None:
        with handled(), Staging() as staging:
            for name in ("a", "b", "c"):
                staging.path(tmp_path / name).write_text("new")
            staging.commit()

    with pytest.raises(Interrupted):
        commit_three()
    assert content(tmp_path) == {"a": "new", "b": "new", "c": "new"}


# Locks


def hold(directory: Path) -> str:
    return f"with locked({str(directory)!r}):\n    WAIT\n"


def test_second_process_cannot_lock_a_directory(writer: Callable[[str], Any], tmp_path: Path) -> None:
    process = writer(hold(tmp_path / "run"))
    with raises(OutputError, "output_locked", tmp_path / "run"):
        locked(tmp_path / "run").__enter__()
    process.communicate(timeout=30)
    assert not list(tmp_path.iterdir())
    with locked(tmp_path / "run"):
        pass


def test_lock_is_released_when_process_is_killed(writer: Callable[[str], Any], tmp_path: Path) -> None:
    process = writer(hold(tmp_path))
    process.kill()
    process.wait()
    with locked(tmp_path):
        pass
    assert not list(tmp_path.iterdir())


def test_lock_is_not_inherited_by_forked_children(writer: Callable[[str], Any], tmp_path: Path) -> None:
    body = (
        "import os, signal\n"
        f"with locked({str(tmp_path)!r}):\n"
        "    begun, begins = os.pipe()\n"
        "    child = os.fork()\n"
        "    if child == 0:\n        os.write(begins, b'.')\n        time.sleep(60)\n        os._exit(0)\n"
        # The child releases the lock when it runs, which may be later on a busy machine.
        "    os.read(begun, 1)\n"
        "    print(child, flush=True)\n    WAIT\n"
    )
    process = start_writer(body)
    assert process.stdout is not None
    child = int(process.stdout.readline())
    try:
        assert process.stdout.readline() == "ready\n"
        process.kill()
        process.wait()
        with locked(tmp_path):
            pass
    finally:
        os.kill(child, signal.SIGKILL)
        process.communicate()


def test_waiting_lock_is_acquired_after_release(writer: Callable[[str], Any], tmp_path: Path) -> None:
    process = writer(hold(tmp_path))
    got = threading.Event()

    def wait() -> None:
        with locked(tmp_path, wait=True):
            got.set()

    thread = threading.Thread(target=wait)
    thread.start()
    assert not got.wait(0.1)
    process.communicate(timeout=30)
    assert got.wait(30)
    thread.join()


def test_files_of_one_directory_are_locked_separately(tmp_path: Path) -> None:
    again = locked(tmp_path, "a.engine")
    with (
        locked(tmp_path, "a.engine"),
        locked(tmp_path, "b.engine"),
        raises(OutputError, "output_locked", tmp_path / "a.engine"),
    ):
        again.__enter__()
    assert not list(tmp_path.iterdir())


def test_locks_and_temporary_files_do_not_count_as_content(tmp_path: Path) -> None:
    with locked(tmp_path), atomic_write(tmp_path / "a"):
        assert content_names(tmp_path) == []
        assert len(os.listdir(tmp_path)) == 2
    assert content_names(tmp_path / "none") == []


def test_concurrently_removed_directory_is_recreated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sweep, removals = atomic_files._sweep, [1, 1]

    def removed(directory: Path) -> None:
        sweep(directory)
        if removals:
            removals.pop()
            directory.rmdir()

    monkeypatch.setattr(atomic_files, "_sweep", removed)
    atomic_files.write_text(tmp_path / "run" / "a.txt", "complete")
    assert (tmp_path / "run" / "a.txt").read_text() == "complete"
    assert not removals


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
