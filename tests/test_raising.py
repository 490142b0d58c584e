"""The assertions on errors fail for another class, code or value."""

from __future__ import annotations

import contextlib
import logging
from pathlib import Path

import pytest

from runtime.core.errors import FeatureError, GroundingError, QueryError
from tests.raising import quotes, raises, records


@pytest.mark.parametrize(
    ("error", "code", "values", "passes"),
    [
        (GroundingError, "no_clips", (3, "v_1", Path("a/b.npy"), (0, 32), 2.5), True),
        (FeatureError, "no_clips", (), True),
        (GroundingError, "invalid_features", (), False),
        (GroundingError, "no_clips", (4,), False),
        (GroundingError, "no_clips", (3, "v_10"), False),
    ],
)
def test_raises_passes_only_for_class_code_and_values(
    error: type[GroundingError], code: str, values: tuple[object, ...], passes: bool
) -> None:
    with contextlib.nullcontext() if passes else pytest.raises(AssertionError), raises(error, code, *values):
        raise FeatureError("a/b.npy holds 3 of v_1, of (0, 32) and 2.5 or 14.", code="no_clips")


def test_raises_fails_for_another_class_none_or_two_lines() -> None:
    with pytest.raises(AssertionError), raises(FeatureError, "no_clips"):
        raise FeatureError("one\ntwo", code="no_clips")
    with pytest.raises(FeatureError), raises(QueryError, "no_clips"):
        raise FeatureError("3", code="no_clips")
    with pytest.raises(pytest.fail.Exception), raises(QueryError, "no_clips"):
        pass


@pytest.mark.parametrize(
    ("text", "value", "is_quoted"),
    [
        ("has 13 clips", 3, False),
        ("has 3.5 clips", 3, False),
        ("has 3.", 3, True),
        ("has -4", -4, True),
        ("--data DIR", "--data", True),
        ("of v_10", "v_1", False),
        ("of 'v_1'", "v_1", True),
        ("line 12", "line 1", False),
        ("/tmp/a.npy: bad", Path("/tmp/a.npy"), True),
    ],
)
def test_quotes_finds_whole_words(text: str, value: object, is_quoted: bool) -> None:
    assert quotes(text, value) is is_quoted


def test_records_returns_matching_records_of_one_level(caplog: pytest.LogCaptureFixture) -> None:
    log = logging.getLogger("drn")
    log.warning("left out %d lines", 3)
    log.error("left out %d lines", 4)
    assert [record.getMessage() for record in records(caplog, logging.WARNING, 3)] == ["left out 3 lines"]
    assert not records(caplog, logging.WARNING, 4)
    log.warning("nothing left", extra={"code": "empty_split"})
    assert len(records(caplog, logging.WARNING, code="empty_split")) == 1
    assert not records(caplog, logging.WARNING, code="other")
