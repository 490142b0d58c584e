"""Test `runtime.core.differences`: the differences of two JSON values."""

from __future__ import annotations

from typing import Any

import pytest

from runtime.core.differences import differences


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        ({"a": 1}, {"a": 1}, []),
        ({"a": 1, "b": 2}, {"a": 1, "c": 2}, [(("b",), 2, None), (("c",), None, 2)]),
        ({"a": {"b": 1}}, {"a": {"b": 2}}, [(("a", "b"), 1, 2)]),
        ({"a": [{"b": 1}, {"b": 2}]}, {"a": [{"b": 1}, {"b": 3}]}, [(("a", 1, "b"), 2, 3)]),
        ({"a": [{"b": 1}]}, {"a": []}, [(("a",), [{"b": 1}], [])]),
        ({"a": [1, 2]}, {"a": [1, 3]}, [(("a",), [1, 2], [1, 3])]),
        (None, {"a": 1}, [((), None, {"a": 1})]),
    ],
)
def test_differences_name_path_and_values(before: Any, after: Any, expected: list[Any]) -> None:
    assert list(differences(before, after)) == expected
