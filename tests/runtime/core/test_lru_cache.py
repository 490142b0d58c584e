"""Test `runtime.core.lru_cache`: the most recently used entries stay, up to a total weight."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.core.lru_cache import LruCache

OPERATIONS = st.lists(st.tuples(st.sampled_from(["get", "put", "pop"]), st.sampled_from("abcdef"), st.integers(1, 5)))


@given(st.integers(1, 9), OPERATIONS)
def test_cache_keeps_last_used_entries(capacity: int, operations: list[tuple[str, str, int]]) -> None:
    cache: LruCache[str, int] = LruCache(capacity)
    # Key, value and weight, least recently used first.
    expected: list[tuple[str, int, int]] = []
    for number, (operation, key, weight) in enumerate(operations):
        stored = next((entry for entry in expected if entry[0] == key), None)
        expected = [entry for entry in expected if entry[0] != key]
        if operation == "put":
            cache.put(key, number, weight)
            expected.append((key, number, weight))
            while len(expected) > 1 and sum(entry[2] for entry in expected) > capacity:
                expected.pop(0)
        else:
            assert getattr(cache, operation)(key) == (stored[1] if stored else None)
            expected += [stored] if stored and operation == "get" else []
        assert cache.items() == [(name, value) for name, value, _ in expected]
        assert (key in cache) == (key in [name for name, _, _ in expected])
        assert (len(cache), cache.weight) == (len(expected), sum(entry[2] for entry in expected))


def test_pop_oldest_returns_least_recently_used_value() -> None:
    cache: LruCache[str, int] = LruCache(3)
    for value, key in enumerate("abc"):
        cache.put(key, value)
    cache.get("a")
    assert [cache.pop_oldest() for _ in range(3)] == [1, 2, 0]
    with pytest.raises(KeyError):
        cache.pop_oldest()
