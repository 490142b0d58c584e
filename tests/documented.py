"""Read commands from Markdown pages, and make them runnable from a checkout."""

from __future__ import annotations

import re
import shlex
import sys

DRN = "from runtime.core.command_list import main; main()"


def commands(text: str) -> list[str]:
    """Return the lines of a page's shell blocks that start a command of the toolkit."""
    blocks = re.findall(r"```sh\n(.*?)```", text, re.DOTALL)
    return [line for block in blocks for line in block.splitlines() if line.startswith(("python -m", "drn "))]


def arguments(line: str) -> list[str]:
    """Return the arguments that start a `python …` or `drn …` line with this interpreter."""
    program, *words = shlex.split(line, comments=True)
    return [sys.executable, *(["-c", DRN] if program == "drn" else []), *words]
