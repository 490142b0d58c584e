"""Read the shell commands of Markdown pages, and make them runnable from a checkout."""

from __future__ import annotations

import dataclasses
import re
import shlex
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
EXTRAS: dict[str, list[str]] = PROJECT["optional-dependencies"]
DRN = "from runtime.core.command_list import main; main()"
# The test file that runs the blocks without a comment that names another.
DEFAULT_RUNNER = "tests/test_pages.py"
_BLOCK = re.compile(r"(?:<!-- (tests/\S+\.py) runs this block[^>]*-->\n)?^```sh\n(.*?)^```", re.DOTALL | re.MULTILINE)
# "here" for commands that nobody has run on a page's machine, "in the tests" for those that were run by hand.
_MARK = re.compile(r"# not run (?:here|in the tests): (.+)")
_TOOLKIT = ("drn ", "python -m runtime.", "python -m export.", "python -m calib.", "python -m train")


@dataclasses.dataclass(frozen=True)
class Line:
    """A line of a shell block.

    Attributes:
        page: name of the page, such as "README" or "training".
        text: the command.
        reason: why no test runs it; None if `runner` does.
        runner: path of the test file that runs the block.
    """

    page: str
    text: str
    reason: str | None
    runner: str

    @property
    def is_of_toolkit(self) -> bool:
        """Whether the line starts a command of the toolkit."""
        return self.text.startswith(_TOOLKIT)


def shell_lines(page: Path) -> list[Line]:
    """Return the commands of the fenced shell blocks of a page.

    A comment "# not run here: REASON" or "# not run in the tests: REASON" marks its own line, or all lines below it in
    the block if it is a line of its own.
    """
    lines = []
    for runner, block in _BLOCK.findall(page.read_text("utf-8")):
        block_reason = None
        for text in block.splitlines():
            mark = _MARK.search(text)
            if text.startswith("#"):
                block_reason = mark[1] if mark else block_reason
            elif text:
                lines.append(Line(page.stem, text, mark[1] if mark else block_reason, runner or DEFAULT_RUNNER))
    return lines


def lines_run_by(runner: str) -> list[Line]:
    """Return the commands that a test file has to run, in the order of the pages."""
    return [line for page in PAGES for line in shell_lines(page) if line.runner == runner and line.reason is None]


def arguments(line: str) -> list[str]:
    """Return the arguments that start a `python …` or `drn …` line with this interpreter."""
    program, *words = shlex.split(line, comments=True)
    return [sys.executable, *(["-c", DRN] if program == "drn" else []), *words]
