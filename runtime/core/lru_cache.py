"""Cache the most recently used entries up to a total weight."""

from __future__ import annotations

import collections
import threading
from typing import Generic, TypeVar

Key = TypeVar("Key")
Value = TypeVar("Value")


class LruCache(Generic[Key, Value]):
    """A thread-safe map that removes the least recently used entries above a capacity.

    Args:
        capacity: maximum total weight of the entries, such as their number or size in bytes. The newest entry stays
            even if it exceeds the capacity alone.

    Attributes:
        weight: total weight of the entries.
    """

    def __init__(self, capacity: int) -> None:
        self.weight = 0
        self._capacity = capacity
        self._entries: collections.OrderedDict[Key, tuple[Value, int]] = collections.OrderedDict()
        self._lock = threading.RLock()

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, key: Key) -> bool:
        return key in self._entries

    def items(self) -> list[tuple[Key, Value]]:
        """Return keys and values, least recently used first."""
        with self._lock:
            return [(key, value) for key, (value, _) in self._entries.items()]

    def get(self, key: Key) -> Value | None:
        """Return the value of a key and mark it as used; None for an unknown key."""
        with self._lock:
            entry = self._entries.get(key)
            if entry is None:
                return None
            self._entries.move_to_end(key)
            return entry[0]

    def put(self, key: Key, value: Value, weight: int = 1) -> None:
        """Store a value as the most recently used, and remove the oldest entries above the capacity.

        Args:
            weight: weight of the entry in the unit of the capacity.
        """
        with self._lock:
            _, replaced = self._entries.pop(key, (None, 0))
            self._entries[key] = value, weight
            self.weight += weight - replaced
            while self.weight > self._capacity and len(self._entries) > 1:
                self.pop_oldest()

    def pop(self, key: Key) -> Value | None:
        """Remove a key and return its value; None for an unknown key."""
        with self._lock:
            value, weight = self._entries.pop(key, (None, 0))
            self.weight -= weight
            return value

    def pop_oldest(self) -> Value:
        """Remove the least recently used entry and return its value; KeyError if the cache is empty."""
        with self._lock:
            _, (value, weight) = self._entries.popitem(last=False)
            self.weight -= weight
            return value
