"""`runtime.core.repeat_filter`: a message is logged once within a block."""

from __future__ import annotations

import logging

import pytest

from runtime.core.repeat_filter import said_once

log = logging.getLogger("drn")


def test_message_is_logged_once_in_a_block(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "drn"):
        with said_once():
            for count in (1, 1, 2):
                log.warning("%d left out", count)
            log.info("1 left out")
        log.warning("1 left out")
    assert [(record.levelname, record.getMessage()) for record in caplog.records] == [
        ("WARNING", "1 left out"),
        ("WARNING", "2 left out"),
        ("INFO", "1 left out"),
        ("WARNING", "1 left out"),
    ]
