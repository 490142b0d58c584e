"""Cache encoded videos on the GPU, in the type that a query engine reads."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from runtime.core.lru_cache import LruCache


class EncodingSlots:
    """Assign slots on the device to encodings by their key; a new encoding replaces the least recently used one."""

    def __init__(self, slots: int) -> None:
        self._count = slots
        self.clear()

    def clear(self) -> None:
        """Free all slots."""
        self._free = list(range(self._count))[::-1]
        self._slots: LruCache[str, int] = LruCache(self._count)

    def acquire(self, keys: Sequence[str]) -> tuple[np.ndarray, list[int]]:
        """Assign a slot to each encoding.

        Args:
            keys: V keys, not more different ones than slots. Objects of equal content have the same key.

        Returns:
            (V,) int32 slots, and the indices of the keys whose encoding must be copied to its slot.
        """
        slots = [self._slots.get(key) for key in keys]
        missing = []
        if None in slots:
            for index, key in enumerate(keys):
                if key not in self._slots:
                    missing.append(index)
                    # `get` has just marked the other keys of this call as used, so the oldest is none of them.
                    slot = self._free.pop() if self._free else self._slots.pop_oldest()
                    self._slots.put(key, slot)
            slots = [self._slots.get(key) for key in keys]
        return np.array(slots, np.int32), missing
