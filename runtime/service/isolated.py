"""Run code that decodes files of others in another process, with limits on its memory and time."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Sequence

# More than a network and a video need; a malicious file then ends only its own process.
MAX_MEMORY = 8 << 30
LIMIT = "import resource, sys; size = int(sys.argv.pop(1)); resource.setrlimit(resource.RLIMIT_AS, (size, size)); "


async def run_isolated(
    code: str, arguments: Sequence[object], timeout_s: float | None = None, pass_fds: Sequence[int] = ()
) -> tuple[int | None, str]:
    """Run Python code, and kill its process after the timeout or if the caller is cancelled.

    Args:
        code: statements, whose `sys.argv[1:]` is `arguments` converted to text.
        timeout_s: maximum time in seconds; None has no limit.
        pass_fds: open files that the process inherits.

    Returns:
        The exit code and the standard error.

    Raises:
        asyncio.TimeoutError: after the timeout.
    """
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *("-c", LIMIT + code, str(MAX_MEMORY), *map(str, arguments)),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        pass_fds=tuple(pass_fds),
    )
    try:
        _, stderr = await asyncio.wait_for(process.communicate(), timeout_s)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    return process.returncode, stderr.decode("utf-8", "replace")
