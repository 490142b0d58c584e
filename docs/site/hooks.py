"""Add the pages outside docs/ to the site, and rewrite links to them: README, CONTRIBUTING, recorded results."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[2]
PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md"}
RESULTS = "benchmarks/results/"


def on_files(files: Files, config: Any) -> Files:
    """Add the README as the first page, CONTRIBUTING, and the recorded results."""
    for source, target in PAGES.items():
        files.append(File.generated(config, target, abs_src_path=str(ROOT / source)))
    for path in sorted((ROOT / RESULTS).iterdir()):
        if path.suffix in (".md", ".json", ".png"):
            files.append(File.generated(config, f"results/{path.name}", abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Rewrite relative links of a page, which are relative to its place in the repository, for the site."""

    def target(match: re.Match[str]) -> str:
        path = match.group(1).removeprefix("../").removeprefix("docs/")
        path = path.replace(RESULTS, "results/")
        name, _, anchor = path.partition("#")
        name = PAGES.get(name, name)
        return f"]({name}{'#' + anchor if anchor else ''})"

    if page.file.src_uri.startswith("results/"):
        return markdown
    return re.sub(r"\]\(((?!https?://|#)[^)\s]+)\)", target, markdown)
