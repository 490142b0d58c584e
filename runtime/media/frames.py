"""Scale, crop and turn decoded frames, and cut them into clips."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from runtime.artifacts.extractor_manifest import ResizeCrop

log = logging.getLogger("drn")


# Shares of pixels are whole numbers that add up to this, as finely divided as OpenCV's; rounded, to one or two more or
# less, which is a quarter of a grey level.
WHOLE_BITS = 11


WHOLE = 1 << WHOLE_BITS


# Degrees that a display matrix may be off a quarter turn, as ffmpeg allows.
TURN_TOLERANCE = 1.0


class FrameResizer:
    """Makes the network's picture of every frame of one size, by bilinear interpolation between pixel centres.

    Nothing is smoothed before: the published C3D features come from OpenCV's `resize`, which does not. Only pixels
    that the crop keeps are computed.

    Args:
        height, width: of the frames.
        framing: what becomes of them.
        quarter_turns, mirrored: how frames are made upright, as `VideoFile` has it, before all else.
    """

    def __init__(
        self, height: int, width: int, framing: ResizeCrop, quarter_turns: int = 0, mirrored: bool = False
    ) -> None:
        pixels = upright(np.arange(height * width, dtype=np.intp).reshape(height, width), quarter_turns, mirrored)
        (top, below, across), (left, right, along) = (
            _taps(length, resized, cut)
            for length, resized, cut in zip(pixels.shape, framing.resized(*pixels.shape), framing.crop)
        )
        self._places, result = [], []
        for rows, vertical in ((top, 1 - across), (below, across)):
            for columns, horizontal in ((left, 1 - along), (right, along)):
                self._places.append(np.ascontiguousarray(pixels[np.ix_(rows, columns)]))
                result.append(np.rint(np.outer(vertical, horizontal) * WHOLE).astype(np.uint32))
        self._shares = np.stack(result)[..., None].repeat(4, -1)
        self._total, self._parts = np.empty((2, *framing.crop, 4), np.uint32)

    def of(self, frame: np.ndarray) -> np.ndarray:
        """Return the picture, `crop` by 3 uint8, of a (height, width, 4) uint8 frame, RGB and one byte to spare."""
        # Whole pixels are gathered as one number each, and integers of one size multiply fastest: a third of the time
        # that floats take.
        pixels = frame.reshape(-1).view(np.uint32)
        self._total.fill(WHOLE // 2)
        for places, shares in zip(self._places, self._shares):
            self._parts[:] = pixels.take(places).view(np.uint8).reshape(self._parts.shape)
            np.multiply(self._parts, shares, out=self._parts)
            np.add(self._total, self._parts, out=self._total)
        np.right_shift(self._total, WHOLE_BITS, out=self._total)
        return self._total[..., :3].astype(np.uint8)


def upright(pixels: np.ndarray, quarter_turns: int, mirrored: bool) -> np.ndarray:
    """Return a picture, (height, width, ...), mirrored left to right if so, then turned counterclockwise."""
    return np.rot90(pixels[:, ::-1] if mirrored else pixels, quarter_turns)


def _taps(length: int, resized: int, cut: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the pixels before and after each kept place along one side, and the share of the second."""
    first = (resized - cut) // 2
    places = (np.arange(first, first + cut) + 0.5) * (length / resized) - 0.5
    places = places.clip(0, length - 1)
    before = np.floor(places).astype(np.intp)
    return before, np.minimum(before + 1, length - 1), places - before


def clips(frames: Iterator[np.ndarray], window: int, stride: int) -> Iterator[np.ndarray]:
    """Yield every whole window of consecutive pictures, one every `stride`, as (window, height, width, 3) uint8."""
    held: list[np.ndarray] = []
    skipped = 0
    for frame in frames:
        if skipped:
            skipped -= 1
            continue
        held.append(frame)
        if len(held) == window:
            yield np.stack(held)
            skipped = max(0, stride - window)
            held = held[stride:]


def orientation(frame: Any, path: Path) -> tuple[int, bool]:
    """Return the counterclockwise quarter turns that make a frame upright, and whether it is mirrored before.

    Source: the matrix (a, b, u, c, d, v, x, y, w) of ISO/IEC 14496-12, 8.3.2: a stored pixel at (p, q), counted to the
    right and down, is shown at (a p + c q + x, b p + d q + y).
    """
    matrix = frame.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return 0, False
    a, b, _, c, d = np.frombuffer(bytes(matrix), np.int32).astype(float)[:5]
    if a * d == b * c:
        log.warning("%s has a display matrix of which nothing can be seen; its frames are taken as stored.", path)
        return 0, False
    mirrored = a * d < b * c
    degrees = math.degrees(math.atan2(-b, a)) + (180 if mirrored else 0)
    turns = round(degrees / 90)
    if abs(degrees - 90 * turns) > TURN_TOLERANCE:
        log.warning("%s says it is turned by %d degrees; it is turned by %d.", path, degrees, 90 * turns)
    return turns % 4, mirrored
