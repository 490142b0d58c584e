"""Cache encoded videos on the GPU, in the type that a query engine reads."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from runtime.backends.tensorrt_model import RowOutputs
from runtime.core.batch import HEAD_NAMES, Heads
from runtime.core.lru_cache import LruCache


class EncodingSlots:
    """Assign slots of the device's memory to encodings by their key; the least recently used one gives up its slot.

    Args:
        slots: number of encodings that fit.
    """

    def __init__(self, slots: int) -> None:
        self._count = slots
        self.clear()

    def clear(self) -> None:
        """Free all slots."""
        self._free = list(range(self._count))[::-1]
        self._slots: LruCache[str, int] = LruCache(self._count)

    def acquire(self, keys: Sequence[str]) -> tuple[np.ndarray, list[int]]:
        """Return the slots of encodings, and which of them have to be filled.

        Args:
            keys: V keys, at most as many different ones as there are slots.

        Returns:
            (V,) int32 slots, and the positions in `keys` whose slot holds another encoding.
        """
        slots = [self._slots.get(key) for key in keys]
        missing = []
        if None in slots:
            for position, key in enumerate(keys):
                # Two objects of equal content have one key.
                if key not in self._slots:
                    missing.append(position)
                    # The other keys of this call were just used, so the oldest is none of them.
                    slot = self._free.pop() if self._free else self._slots.pop_oldest()
                    self._slots.put(key, slot)
            slots = [self._slots.get(key) for key in keys]
        return np.array(slots, np.int32), missing


def gather_rows(rows: int, answers: Sequence[RowOutputs], nothing: Callable[[], Mapping[str, np.ndarray]]) -> Heads:
    """Return the heads of all rows from those of some at a time, each in their order; `nothing` returns those of no
    row."""
    if len(answers) == 1:
        gathered = answers[0][1]
    elif rows:
        gathered = {name: np.empty((rows, *values.shape[1:]), np.float32) for name, values in answers[0][1].items()}
        for some, result in answers:
            for name in HEAD_NAMES:
                gathered[name][some] = result[name]
    else:
        gathered = nothing()
    return Heads(*[np.asarray(gathered[name], np.float32) for name in HEAD_NAMES])
