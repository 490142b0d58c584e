"""Test `runtime.core.interrupts`: signals raise one exception, which is deferred while files are created or removed."""

from __future__ import annotations

import signal
import threading

import pytest

from runtime.core import interrupts
from runtime.core.interrupts import Interrupted, deferred, handled
from tests.processes import send_signals


@pytest.mark.usefixtures("default_signals")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_signal_raises_interrupted_with_exit_code(number: signal.Signals, code: int) -> None:
    before = signal.getsignal(number)
    with handled(), pytest.raises(KeyboardInterrupt) as caught:
        send_signals(number)
    assert isinstance(caught.value, Interrupted)
    assert caught.value.exit_code == code
    assert signal.getsignal(number) is before


def test_ignored_signal_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with handled():
            send_signals(signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)


def test_deferred_signal_raises_at_end_of_outermost_block() -> None:
    steps = []

    def deferring() -> None:
        with deferred():
            with deferred():
                send_signals(signal.SIGTERM)
                steps.append("inner")
            steps.append("outer")
        steps.append("after")

    with handled(), pytest.raises(Interrupted):
        deferring()
    assert steps == ["inner", "outer"]


def test_repeated_signal_does_not_interrupt_cleanup() -> None:
    steps = []

    def cleaning() -> None:
        try:
            send_signals(signal.SIGTERM)
        finally:
            send_signals(signal.SIGINT, signal.SIGTERM)
            steps.append("cleaned")

    with handled(), pytest.raises(Interrupted) as caught:
        cleaning()
    assert caught.value.number == signal.SIGTERM
    assert steps == ["cleaned"]


@pytest.mark.usefixtures("default_signals")
def test_later_signal_interrupts_again(monkeypatch: pytest.MonkeyPatch) -> None:
    # A library may have caught the first exception.
    monkeypatch.setattr(interrupts, "REPEAT_SECONDS", 0.0)
    with handled():
        for _ in range(2):
            with pytest.raises(Interrupted):
                send_signals(signal.SIGINT)


def test_threads_do_not_defer_signals_of_the_main_thread() -> None:
    entered, leave = threading.Event(), threading.Event()

    def hold() -> None:
        with deferred():
            entered.set()
            leave.wait(10)

    thread = threading.Thread(target=hold)
    thread.start()
    entered.wait(10)
    try:
        with handled(), pytest.raises(Interrupted):
            send_signals(signal.SIGTERM)
    finally:
        leave.set()
        thread.join()
