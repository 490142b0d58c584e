"""Turn Ctrl-C, SIGTERM and SIGHUP into one exception, and defer it while files are created or removed."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType
from typing import Any

# `docker stop`, Kubernetes and Slurm send SIGTERM, a closing terminal sends SIGHUP.
SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
# Supervisors and terminals often send a second signal at once; it must not interrupt the cleanup after the first.
REPEAT_SECONDS = 2.0


class Interrupted(KeyboardInterrupt):
    """A signal that ends the process.

    Attributes:
        exit_code: 128 + number, as shells report it: 130 for Ctrl-C, 143 for SIGTERM.
    """

    def __init__(self, number: int = signal.SIGINT) -> None:
        super().__init__(number)
        self.number = number
        self.exit_code = 128 + number

    def __str__(self) -> str:
        cause = "Interrupted" if self.number == signal.SIGINT else f"Ended by {signal.Signals(self.number).name}"
        return f"{cause}; nothing half-written was left behind."


def interrupted_by(error: KeyboardInterrupt) -> Interrupted:
    """Return an exception as Interrupted; a plain KeyboardInterrupt is a Ctrl-C."""
    return error if isinstance(error, Interrupted) else Interrupted()


@contextlib.contextmanager
def uncovered() -> Iterator[None]:
    """Raise an interruption instead of the errors that it caused.

    An extension module that is being imported turns it into an ImportError, which looks like a missing package.
    """
    try:
        yield
    except Exception as error:
        causes: list[BaseException] = [error]
        # An error may be its own cause.
        while (cause := causes[-1].__cause__) is not None and cause not in causes:
            if isinstance(cause, KeyboardInterrupt):
                raise cause from None
            causes.append(cause)
        raise


class _State:
    """State of the signal handler; only the main thread accesses it."""

    deferred = 0
    pending: int | None = None
    last_seconds: float | None = None


def _handle(number: int, frame: FrameType | None) -> None:
    if _State.deferred:
        _State.pending = number
        return
    now = time.monotonic()
    if _State.last_seconds is not None and now - _State.last_seconds < REPEAT_SECONDS:
        return
    _State.last_seconds = now
    raise Interrupted(number)


class deferred:
    """A context that defers signals in the main thread: they raise Interrupted at its end."""

    def __enter__(self) -> None:
        self._main = threading.current_thread() is threading.main_thread()
        if self._main:
            _State.deferred += 1

    def __exit__(self, *_: object) -> None:
        if not self._main:
            return
        _State.deferred -= 1
        if not _State.deferred and _State.pending is not None:
            number, _State.pending = _State.pending, None
            _handle(number, None)


def install() -> dict[signal.Signals, Any]:
    """Make signals raise Interrupted, and return the previous handlers.

    Ignored signals stay ignored: `nohup` ignores SIGHUP, and shells ignore SIGINT for background jobs. Outside the main
    thread, where Python cannot set handlers, nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        return {}
    before = {number: signal.getsignal(number) for number in SIGNALS}
    # None is a handler that was not installed from Python and cannot be restored.
    before = {number: handler for number, handler in before.items() if handler not in (signal.SIG_IGN, None)}
    for number in before:
        signal.signal(number, _handle)
    return before


@contextlib.contextmanager
def preserved() -> Iterator[None]:
    """Restore the signal handlers that a library in the block replaces."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            for number, handler in before.items():
                if handler is not None and signal.getsignal(number) is not handler:
                    signal.signal(number, handler)


@contextlib.contextmanager
def handled() -> Iterator[None]:
    """Make signals raise Interrupted within the block."""
    before = install()
    _State.last_seconds = None
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
