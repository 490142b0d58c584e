"""Processes that tests start as a person would in a terminal, and their ports."""

from __future__ import annotations

import os
import signal
import socket
import time


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def heed_ctrl_c() -> None:
    """To be run in a child before its program: a shell's background jobs, as CI may be, have SIGINT ignored."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def send_signals(*numbers: signal.Signals) -> None:
    """Send signals to this process, and wait until each arrives."""
    for number in numbers:
        os.kill(os.getpid(), number)
        time.sleep(0.01)
