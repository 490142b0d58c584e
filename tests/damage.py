"""Flip bits of stored files, for tests that nothing stored is read when it is damaged."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from runtime.core.errors import GroundingError


def flip(content: bytes, bit: int) -> bytes:
    """Return `content` with one bit flipped."""
    damaged = bytearray(content)
    damaged[bit // 8] ^= 1 << bit % 8
    return bytes(damaged)


def random_bits(content: bytes, count: int, seed: int = 0) -> list[int]:
    """Return the positions of `count` different bits of `content`."""
    return np.random.default_rng(seed).choice(8 * len(content), count, replace=False).tolist()


def damaged(path: Path, bits: list[int]) -> Iterator[int]:
    """Yield each bit while it is flipped in a file, which is whole again afterwards."""
    content = path.read_bytes()
    try:
        for bit in bits:
            path.write_bytes(flip(content, bit))
            yield bit
    finally:
        path.write_bytes(content)


def count_refused(path: Path, answer: Callable[[], bytes], error: type[GroundingError], count: int = 40) -> int:
    """Flip random bits of a file one at a time, and return how often reading it is refused.

    Fails for anything but a refusal of the right class or the same answer to the bit.
    """
    expected, refused = answer(), 0
    for bit in damaged(path, random_bits(path.read_bytes(), count)):
        try:
            actual = answer()
        except error:
            refused += 1
        else:
            assert actual == expected, f"bit {bit} of {path.name} changes the answer"
    assert answer() == expected
    return refused
