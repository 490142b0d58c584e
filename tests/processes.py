"""Processes that tests start as a person would in a terminal, and their ports."""

from __future__ import annotations

import signal
import socket


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def heed_ctrl_c() -> None:
    """To be run in a child before its program: a shell's background jobs, as CI may be, have SIGINT ignored."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
