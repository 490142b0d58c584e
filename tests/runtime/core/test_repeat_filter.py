"""Test `runtime.core.repeat_filter`: a message is logged once within a block."""

from __future__ import annotations

import logging

import pytest

from runtime.core.repeat_filter import RepeatFilter, logged_once

log = logging.getLogger("drn")


def test_message_is_logged_once_in_a_block(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "drn"):
        with logged_once():
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


def test_repeat_filter_counts_templates_over_blocks(caplog: pytest.LogCaptureFixture) -> None:
    repeats = RepeatFilter(2, by_template=True)
    with caplog.at_level(logging.INFO, "drn"):
        for count in (1, 2, 3):
            with logged_once(repeats):
                log.warning("%d left out", count)
                log.warning("other")
    messages = [record.getMessage() for record in caplog.records]
    assert messages == ["1 left out", "other", "2 left out", "other"]
