"""Test `runtime.core.io.atomic_files`: files are complete or absent."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import signal
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import pytest

from runtime.core.errors import OutputError
from runtime.core.interrupts import Interrupted, handled
from runtime.core.io import atomic_files
from runtime.core.io.atomic_files import (
    atomic_write,
    check_writable,
    content_names,
    locked,
    remove_strays,
    write_json,
    write_text,
)
from runtime.core.io.staging import Staging
from tests.processes import send_signals
from tests.raising import quotes, raises

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


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
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


@pytest.mark.parametrize("kind", UNWRITABLE)
def test_path_that_cannot_be_written_is_rejected(kind: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("a file")
    (tmp_path / "directory").mkdir()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    before = sorted(tmp_path.iterdir())
    name, code, quoted = UNWRITABLE[kind]
    for write in (lambda path: write_text(path, "text"), check_writable):
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


def half(path: Path) -> str:
    return f"with atomic_write({str(path)!r}) as temporary:\n    temporary.write_text('half')\n    WAIT\n"


def staged(path: Path) -> str:
    write = f"staging.path({str(path)!r}).write_text('half')"
    return f"with Staging() as staging:\n    {write}\n    WAIT\n    staging.commit()\n"


@pytest.fixture
def writer() -> Iterator[Callable[[str], subprocess.Popen[str]]]:
    """Start processes that run a body, and wait where it has WAIT; they end after the test at the latest."""
    started: list[subprocess.Popen[str]] = []

    def begin(body: str) -> subprocess.Popen[str]:
        code = "import sys, time\nfrom pathlib import Path\n"
        code += "from runtime.core.io.atomic_files import locked, atomic_write\n"
        code += "from runtime.core.io.staging import Staging\n"
        code += body.replace("WAIT", "print('ready', flush=True); sys.stdin.read()")
        words = [sys.executable, "-c", code]
        process = subprocess.Popen(words, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
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


@pytest.mark.parametrize(("body", "write"), [(half, commit), (staged, write_text)])
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


def test_files_with_other_names_are_not_removed(tmp_path: Path) -> None:
    random = (".report.abcdefgh.json", ".drn-0123456-abcdefgh-report.json", "x.drn-01234567-abcdefgh")
    for name in (*random, ".drn-notes", ".drn-lock"):
        (tmp_path / name).write_text("mine")
        os.utime(tmp_path / name, (0, 0))
    write_text(tmp_path / "report.json", "text")
    assert len(content(tmp_path)) == 6


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


def test_long_file_names_can_be_written(tmp_path: Path) -> None:
    names = ("x" * 240 + ".json", "é" * 120 + ".npy", "a." + "b" * 240)
    for name in names:
        write_text(tmp_path / name, "text")
    assert content(tmp_path) == dict.fromkeys(names, "text")


def test_signal_during_commit_still_writes_all_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replace = os.replace

    def interrupted(*paths: Any) -> None:
        replace(*paths)
        send_signals(signal.SIGTERM)

    monkeypatch.setattr(os, "replace", interrupted)

    def commit_three() -> None:
        with handled(), Staging() as staging:
            for name in ("a", "b", "c"):
                staging.path(tmp_path / name).write_text("new")
            staging.commit()

    with pytest.raises(Interrupted):
        commit_three()
    assert content(tmp_path) == {"a": "new", "b": "new", "c": "new"}


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


def test_killed_process_and_its_child_release_the_lock(writer: Callable[[str], Any], tmp_path: Path) -> None:
    process = writer(
        "import os\n"
        f"with locked({str(tmp_path / 'run')!r}):\n"
        "    begun, begins = os.pipe()\n"
        "    child = os.fork()\n"
        "    if child == 0:\n        os.write(begins, b'.')\n        time.sleep(60)\n        os._exit(0)\n"
        # The child releases the lock when it runs, which may be later on a busy machine.
        "    os.read(begun, 1)\n"
        f"    Path({str(tmp_path / 'child')!r}).write_text(str(child))\n"
        "    WAIT\n"
    )
    process.kill()
    process.wait()
    try:
        with locked(tmp_path / "run"):
            pass
        assert content_names(tmp_path) == ["child", "run"]
        assert not list((tmp_path / "run").iterdir())
    finally:
        os.kill(int((tmp_path / "child").read_text()), signal.SIGKILL)


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
