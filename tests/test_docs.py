"""Check the pages of docs/ and the README: commands parse, links lead somewhere, addresses are listed."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pytest

from runtime.datasets.dataset import DataSet
from tests.documented import commands
from tests.test_readme import ROOT

PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").glob("*.md")),
    ROOT / "benchmarks/results/README.md",
]
LINK = re.compile(r"\]\(([^)\s]+)\)")
ADDRESS = re.compile(r"https?://[^\s)>`'\"|]+")
# Their commands run unchanged, or are parsed, by a test of their own.
ELSEWHERE = {"README", "scale", "serving", "tools", "triton", "your-own-video"}
LINES = [
    (page.stem, line) for page in PAGES if page.stem not in ELSEWHERE for line in commands(page.read_text("utf-8"))
]


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
    found = {match.rstrip(".,;:") for page in PAGES for match in ADDRESS.findall(page.read_text("utf-8"))}
    public = {address for address in found if urlsplit(address).hostname not in ("localhost", "127.0.0.1", "HOST")}
    listed = (ROOT / "docs" / "links.txt").read_text("utf-8").split()
    assert listed == sorted(public)


@pytest.mark.parametrize(("page", "line"), LINES)
def test_commands_of_pages_parse(page: str, line: str, check_parses: Callable[[str], None]) -> None:
    check_parses(line)


def test_own_data_page_describes_a_data_set_that_can_be_prepared(tmp_path: Path) -> None:
    from train.prepare import prepare

    (lines,) = re.findall(r"```json\n(.*?)```", (ROOT / "docs" / "own-data.md").read_text("utf-8"), re.DOTALL)
    directory = tmp_path / "mine"
    (directory / "features").mkdir(parents=True)
    for name in ("train", "val", "test"):
        (directory / f"{name}.jsonl").write_text(lines)
    for row in map(json.loads, lines.splitlines()):
        clips = int(row["duration"] * 30 - 16) // 8 + 1
        values = np.random.default_rng(0).random((clips, 6), np.float32)
        np.save(directory / "features" / f"{row['vid']}.npy", values)
    data = DataSet(prepare(directory, tmp_path / "common", clock=(16, 8)))
    windows = [(entry.sentence, list(map(list, entry.moments))) for entry in data.annotations("train")]
    assert windows == [(row["query"], row["relevant_windows"]) for row in map(json.loads, lines.splitlines())]


def test_site_builds_without_broken_links(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs", reason="the site needs the extra [docs]")
    words = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "--site-dir", str(tmp_path / "site")]
    result = subprocess.run(
        words, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "search" in (tmp_path / "site" / "index.html").read_text("utf-8")
    assert (tmp_path / "site" / "example.png").is_file()
