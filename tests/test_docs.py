"""Check the pages of docs/ and the README: commands parse, links lead to files, addresses are listed."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from tests import documented
from tests.documented import ROOT, shell_lines
from tests.next_commands import check_parses

PAGES = [*documented.PAGES, ROOT / "CONTRIBUTING.md", ROOT / "benchmarks/results/README.md"]
LINK = re.compile(r"\]\(([^)\s]+)\)")
ADDRESS = re.compile(r"https?://[^\s)>`'\"|]+")
LINES = [line for page in documented.PAGES for line in shell_lines(page)]
MARKED = dict.fromkeys(line.text for line in LINES if line.is_of_toolkit and line.reason)
# An indented block is code in Markdown too, but has no place for a comment that names a test.
INDENTED = re.compile(r"^(?: {4,}|\t)\$? ?(?:[A-Z_]+=\S+ )*(?:drn|python3?|pip|make|docker|curl|polygraphy|trtexec) \S")


def anchors(page: Path) -> set[str]:
    """Return the anchors that GitHub makes of the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", page.read_text("utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_relative_links_lead_to_files_and_headings(page: Path) -> None:
    for link in LINK.findall(page.read_text("utf-8")):
        path, _, anchor = link.partition("#")
        if path.startswith(("http://", "https://")):
            continue
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_links_file_lists_every_public_address() -> None:
    addresses = {match.rstrip(".,;:") for page in PAGES for match in ADDRESS.findall(page.read_text("utf-8"))}
    public = {address for address in addresses if urlsplit(address).hostname not in ("localhost", "127.0.0.1", "HOST")}
    listed = (ROOT / "docs" / "links.txt").read_text("utf-8").split()
    assert listed == sorted(public)


@pytest.mark.parametrize("line", MARKED)
def test_marked_commands_parse(line: str) -> None:
    check_parses(shlex.split(line, comments=True))


def test_benchmarks_of_pages_exist() -> None:
    names = {line.text.split()[2] for line in LINES if line.text.startswith("python -m benchmarks.")}
    assert names
    assert not [name for name in names if not (ROOT / f"{name.replace('.', '/')}.py").is_file()]


@pytest.mark.parametrize("page", documented.PAGES, ids=lambda page: page.stem)
def test_commands_are_in_fenced_blocks(page: Path) -> None:
    outside = re.sub(r"^```.*?^```", "", page.read_text("utf-8"), flags=re.DOTALL | re.MULTILINE)
    assert not [line for line in outside.splitlines() if INDENTED.match(line)]


def test_named_test_files_run_their_blocks() -> None:
    for runner in {line.runner for line in LINES}:
        assert "lines_run_by(" in (ROOT / runner).read_text("utf-8"), runner


def test_marks_apply_to_their_line_or_to_those_below(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    first = "drn a  # about a\ndrn b  # not run here: needs b\n\n# about c\ndrn c\n"
    second = "drn d\n# not run in the tests: needs e\n# about e\ndrn e\nmake f\n"
    page.write_text(
        f"```sh\n{first}```\n<!-- tests/test_x.py runs this block -->\n```sh\n{second}```\n```python\ndrn = 1\n```\n"
    )
    assert [(line.text[:5].rstrip(), line.reason, line.runner[-6:]) for line in shell_lines(page)] == [
        ("drn a", None, "ges.py"),
        ("drn b", "needs b", "ges.py"),
        ("drn c", None, "ges.py"),
        ("drn d", None, "t_x.py"),
        ("drn e", "needs e", "t_x.py"),
        ("make", "needs e", "t_x.py"),
    ]


def test_site_builds_without_broken_links(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs", reason="the site needs the extra [docs]")
    words = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "--site-dir", str(tmp_path / "site")]
    result = subprocess.run(
        words, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "search" in (tmp_path / "site" / "index.html").read_text("utf-8")
    assert (tmp_path / "site" / "example.png").is_file()
