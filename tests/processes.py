"""Processes that tests start as a person would in a terminal."""

from __future__ import annotations

import signal


def heed_ctrl_c() -> None:
    """To be run in a child before its program: a shell's background jobs, as CI may be, have SIGINT ignored."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
