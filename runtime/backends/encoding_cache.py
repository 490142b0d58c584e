"""Cache encoded videos on the GPU, in the type that a query engine reads."""

from __future__ import annotations

import collections
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from runtime.backends.tensorrt_engine import OUTPUTS
from runtime.backends.tensorrt_model import RowOutputs
from runtime.core.batch import Heads

if TYPE_CHECKING:
    pass


class EncodingCache:
    """Which encodings are in which slots of the device's memory; the one not asked for longest makes place."""

    def __init__(self, slots: int) -> None:
        self._free = list(range(slots))[::-1]
        self._slots: collections.OrderedDict[str, int] = collections.OrderedDict()

    def place(self, keys: Sequence[str]) -> tuple[np.ndarray, list[int]]:
        """Return (V,) int32 slots for keys, no more than there are slots, and the positions of those to be filled."""
        for key in keys:
            if key in self._slots:
                self._slots.move_to_end(key)
        missing = []
        for position, key in enumerate(keys):
            if key not in self._slots:
                missing.append(position)
                # Those asked for now were moved to the end, so the first is another.
                self._slots[key] = self._free.pop() if self._free else self._slots.popitem(last=False)[1]
        for key in keys:
            self._slots.move_to_end(key)
        return np.array([self._slots[key] for key in keys], np.int32), missing

    def clear(self) -> None:
        """Forget what is where."""
        self._free += self._slots.values()
        self._slots.clear()


def to_bfloat16(values: np.ndarray) -> np.ndarray:
    """Return the bits of floats rounded to bfloat16, ties to even, as uint16."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def from_bfloat16(bits: np.ndarray) -> np.ndarray:
    """Return bfloat16 numbers, given as uint16, as float32; nothing is lost."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def gather_rows(rows: int, answers: Sequence[RowOutputs], nothing: Callable[[], Mapping[str, np.ndarray]]) -> Heads:
    """Return the heads of all rows from those of some at a time, each in their order; `nothing` returns those of no
    row."""
    if len(answers) == 1:
        gathered = answers[0][1]
    elif rows:
        gathered = {name: np.empty((rows, *values.shape[1:]), np.float32) for name, values in answers[0][1].items()}
        for some, result in answers:
            for name in OUTPUTS:
                gathered[name][some] = result[name]
    else:
        gathered = nothing()
    return Heads(*[np.asarray(gathered[name], np.float32) for name in OUTPUTS])
