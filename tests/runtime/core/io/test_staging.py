"""Test `runtime.core.io.staging`: files are replaced together, also through links."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from runtime.core.errors import OutputError
from runtime.core.io.atomic_files import write_text
from runtime.core.io.staging import Staging
from tests.raising import raises
from tests.runtime.core.io.test_atomic_files import content, failing


def test_staged_files_are_committed_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text("old")
    monkeypatch.chdir(tmp_path)
    with Staging() as staging:
        for name in ("a.txt", "b.txt", "draft.txt"):
            staging.path(name).write_text("new")
        assert (tmp_path / "a.txt").read_text() == "old"
        written = staging.commit(lambda name: name != "draft.txt")
    # As given, for "Written:" lines.
    assert written == [Path("a.txt"), Path("b.txt")]
    assert content(tmp_path) == {"a.txt": "new", "b.txt": "new"}


def test_staging_error_names_the_final_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Staging() as staging:
        with raises(OutputError, "output_is_directory", tmp_path):
            staging.path(tmp_path)
        waiting = staging.path(tmp_path / "a.txt")
        monkeypatch.setattr(Path, "write_text", failing(errno.ENOSPC))
        with raises(OutputError, "disk_full", tmp_path.resolve() / "a.txt"):
            write_text(waiting, "a")


@pytest.fixture
def linked(tmp_path: Path) -> Path:
    """A directory `out` with links to files of `store`: to drn.7.engine, and to a report that does not exist."""
    for name in ("out", "store"):
        (tmp_path / name).mkdir()
    (tmp_path / "store" / "drn.7.engine").write_text("old")
    (tmp_path / "out" / "drn.engine").symlink_to(tmp_path / "store" / "drn.7.engine")
    (tmp_path / "out" / "drn.json").symlink_to(Path("..", "reports", "7.json"))
    return tmp_path


def write_with_companions(output: Path) -> list[Path]:
    """Write an output, and files that derive their names from its temporary path; return the written paths."""
    with Staging() as staging:
        path = staging.path(output)
        for suffix in (".engine", ".html", ".json"):
            path.with_suffix(suffix).write_text(f"new {suffix}")
        return staging.commit()


@pytest.mark.parametrize("one_file_system", [True, False])
def test_links_stay_and_their_targets_are_replaced(
    linked: Path, monkeypatch: pytest.MonkeyPatch, one_file_system: bool
) -> None:
    replace = os.replace

    def within_a_directory(source: Any, target: Any) -> None:
        if Path(source).parent.parent != Path(target).parent:
            raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))
        replace(source, target)

    if not one_file_system:
        monkeypatch.setattr(os, "replace", within_a_directory)
        monkeypatch.setattr(os, "rename", failing(errno.EXDEV))
    out = linked / "out"
    written = write_with_companions(out / "drn.engine")
    assert written == [out / name for name in ("drn.engine", "drn.html", "drn.json")]
    assert [path.is_symlink() for path in written] == [True, False, True]
    # Only the names of links lead elsewhere; the page has no link, so it is next to the name that was given.
    assert content(linked / "store") == {"drn.7.engine": "new .engine"}
    assert content(linked / "reports") == {"7.json": "new .json"}
    assert content(out) == {"drn.engine": "new .engine", "drn.html": "new .html", "drn.json": "new .json"}


def test_output_in_a_linked_directory_is_written_there(linked: Path) -> None:
    (linked / "alias").symlink_to(linked / "store")
    (linked / "store" / "drn.html").symlink_to("page.html")
    written = write_with_companions(linked / "alias" / "drn.engine")
    assert written == [linked / "alias" / name for name in ("drn.engine", "drn.html", "drn.json")]
    assert (linked / "alias").is_symlink()
    names = ["drn.7.engine", "drn.engine", "drn.html", "drn.json", "page.html"]
    assert sorted(path.name for path in (linked / "store").iterdir()) == names
    assert (linked / "store" / "page.html").read_text() == "new .html"


def test_link_that_cannot_be_followed_replaces_nothing(linked: Path) -> None:
    (linked / "out" / "drn.html").symlink_to("drn.html")
    with raises(OutputError, "unwritable_output", linked / "out" / "drn.html"):
        write_with_companions(linked / "out" / "drn.engine")
    assert content(linked / "store") == {"drn.7.engine": "old"}
    assert not (linked / "reports").exists()
    assert sorted(path.name for path in (linked / "out").iterdir()) == ["drn.engine", "drn.html", "drn.json"]
