"""Test `runtime.core.errors`: bounded and printable messages, and one error class for all exceptions of a reader."""

from __future__ import annotations

import pickle
import zipfile

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.core.errors import (
    MAX_MESSAGE_LENGTH,
    MAX_VALUE_LENGTH,
    DeviceError,
    FeatureError,
    GroundingError,
    check_option,
    excerpt,
    importing,
    one_line,
    printable,
    reading,
)
from tests.raising import check_error, quotes, raises


def subclasses(error: type[GroundingError]) -> list[type[GroundingError]]:
    return [error, *(inner for direct in error.__subclasses__() for inner in subclasses(direct))]


def test_error_classes_have_distinct_codes() -> None:
    ours = [error for error in subclasses(GroundingError) if error.__module__ == "runtime.core.errors"]
    assert len({error.code for error in ours}) == len(ours)


def test_code_given_to_an_error_survives_pickling() -> None:
    error = pickle.loads(pickle.dumps(FeatureError("too large", code="array_too_large")))
    assert (type(error), str(error), error.code) == (FeatureError, "too large", "array_too_large")
    assert FeatureError.code == "invalid_features"


@pytest.mark.parametrize(("value", "maximum"), [(None, None), (1, None), (9, None), (1, 4), (4, 4)])
def test_option_in_range_is_accepted(value: int | None, maximum: int | None) -> None:
    check_option("--threads", value, 1, maximum)


@pytest.mark.parametrize(("value", "maximum"), [(0, None), (-1, 4), (5, 4), (float("nan"), None)])
def test_option_out_of_range_is_rejected_with_its_limits(value: float, maximum: int | None) -> None:
    with raises(FeatureError, "invalid_option", "--threads", 1, value, *([4] if maximum else [])):
        check_option("--threads", value, 1, maximum, FeatureError)


@pytest.mark.parametrize("error", [ImportError, OSError, RuntimeError])
def test_failed_import_names_the_extra(error: type[Exception]) -> None:
    with raises(DeviceError, "missing_library", "none", "pip install '.[plot]'"), importing("matplotlib", "plot"):
        raise error("none")


HUGE = {
    "text": "x" * 10**6,
    "bytes": b"x" * 10**6,
    "list": list(range(10**6)),
    "integer": 10**5000,
    "table": {"a": "x" * 10**6},
    "nested": ["x" * 10**6],
}


@pytest.mark.parametrize("value", HUGE.values(), ids=HUGE)
def test_excerpt_of_a_huge_value_is_bounded(value: object) -> None:
    assert 0 < len(excerpt(value)) <= MAX_VALUE_LENGTH


def test_excerpt_of_a_small_value_is_its_repr() -> None:
    assert excerpt("a\x1b[31m") == "'a\\x1b[31m'"


def test_messages_are_bounded() -> None:
    assert len(str(GroundingError("x " * 10**6))) == MAX_MESSAGE_LENGTH
    assert len(one_line(ValueError("x " * 10**6))) == MAX_VALUE_LENGTH


@given(st.text(alphabet=st.characters(codec=None)))
def test_printable_text_is_encodable_without_control_characters(text: str) -> None:
    escaped = printable(text)
    escaped.encode()
    assert not [c for c in escaped if (ord(c) < 32 and c not in "\t\n") or 127 <= ord(c) < 160 or c in "\u202e\u2028"]


def test_printable_keeps_plain_sentences() -> None:
    assert printable("une fille rit à 5 °C\n\t“日本”") == "une fille rit à 5 °C\n\t“日本”"


@pytest.mark.parametrize(
    ("problem", "code"),
    [
        (ValueError("bad"), "damaged_file"),
        (MemoryError(), "file_too_large"),
        (RecursionError("deep"), "nested_too_deeply"),
        (zipfile.BadZipFile("cut"), "damaged_file"),
        (OSError(5, "I/O"), "unreadable_file"),
        (FileNotFoundError(2, "None"), "missing_file"),
        (KeyError(), "damaged_file"),
    ],
)
def test_reading_converts_exceptions_to_given_error(problem: Exception, code: str) -> None:
    with raises(FeatureError, code, "f.npy"), reading("f.npy", "an array", FeatureError, "extract it again"):
        raise problem


def test_reading_reraises_project_errors_and_interrupts() -> None:
    with pytest.raises(GroundingError) as raised, reading("f.npy", "an array", FeatureError, "extract it again"):
        raise GroundingError("known")
    assert type(raised.value) is GroundingError
    with pytest.raises(KeyboardInterrupt), reading("f.npy", "an array", FeatureError, "extract it again"):
        raise KeyboardInterrupt


@pytest.mark.parametrize(("key", "missing"), [("shape", True), ("Unable to open object (bad checksum)", False)])
def test_reading_quotes_missing_keys_but_not_messages(key: str, missing: bool) -> None:
    with pytest.raises(FeatureError) as caught, reading("a.h5", "an HDF5 file", FeatureError, "copy it again"):
        raise KeyError(key)
    check_error(caught.value, "damaged_file", key)
    # Keys are quoted, messages are not.
    assert quotes(str(caught.value), repr(key)) == missing
