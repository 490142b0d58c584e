"""Scale, crop and rotate decoded frames, and group them into clips."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from runtime.artifacts.extractor_manifest import ResizeCrop

log = logging.getLogger("drn")

# Interpolation weights are integers with OpenCV's number of bits. Rounding changes their sum by one or two, which is a
# quarter of a gray level.
WEIGHT_BITS = 11
WEIGHT_SUM = 1 << WEIGHT_BITS
# Maximum deviation of a display matrix from a quarter turn in degrees, as in ffmpeg.
TURN_TOLERANCE = 1.0


class FrameResizer:
    """Resize and crop frames of one size, by bilinear interpolation between pixel centers.

    Frames are not smoothed first, because OpenCV's `resize`, which the published C3D features come from, does not do
    it. Only pixels inside the crop are computed.

    Args:
        height, width: size of the frames as they are stored, in pixels.
        quarter_turns, mirrored: rotation and mirroring that are applied first; see `VideoFile`.
    """

    def __init__(
        self, height: int, width: int, framing: ResizeCrop, quarter_turns: int = 0, mirrored: bool = False
    ) -> None:
        pixels = upright(np.arange(height * width, dtype=np.intp).reshape(height, width), quarter_turns, mirrored)
        (top, bottom, vertical_weight), (left, right, horizontal_weight) = (
            _taps(length, resized, cropped)
            for length, resized, cropped in zip(pixels.shape, framing.resized(*pixels.shape), framing.crop)
        )
        self._indices, weights = [], []
        for rows, vertical in ((top, 1 - vertical_weight), (bottom, vertical_weight)):
            for columns, horizontal in ((left, 1 - horizontal_weight), (right, horizontal_weight)):
                self._indices.append(np.ascontiguousarray(pixels[np.ix_(rows, columns)]))
                weights.append(np.rint(np.outer(vertical, horizontal) * WEIGHT_SUM).astype(np.uint32))
        self._weights = np.stack(weights)[..., None].repeat(4, -1)
        self._total, self._product = np.empty((2, *framing.crop, 4), np.uint32)

    def resize(self, frame: np.ndarray) -> np.ndarray:
        """Return a frame resized and cropped, (crop height, crop width, 3) uint8 RGB.

        Args:
            frame: (height, width, 4) uint8, RGB and one unused byte.
        """
        # Four bytes are gathered as one integer, and integers of one size multiply fastest: a third of the time of
        # floats.
        pixels = frame.reshape(-1).view(np.uint32)
        self._total.fill(WEIGHT_SUM // 2)
        for indices, weights in zip(self._indices, self._weights):
            self._product[:] = pixels.take(indices).view(np.uint8).reshape(self._product.shape)
            np.multiply(self._product, weights, out=self._product)
            np.add(self._total, self._product, out=self._total)
        np.right_shift(self._total, WEIGHT_BITS, out=self._total)
        return self._total[..., :3].astype(np.uint8)


def upright(pixels: np.ndarray, quarter_turns: int, mirrored: bool) -> np.ndarray:
    """Return an image in upright orientation, as a view.

    Args:
        pixels: (height, width, ...) image.
        quarter_turns: rotations by 90 degrees counterclockwise.
        mirrored: whether left and right are exchanged before the rotation.
    """
    return np.rot90(pixels[:, ::-1] if mirrored else pixels, quarter_turns)


def _taps(length: int, resized: int, cropped: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the source indices before and after each pixel of the crop along one axis, and the weight of the second.

    Args:
        length, resized, cropped: size of the axis before and after resizing, and of the centered crop.
    """
    first = (resized - cropped) // 2
    positions = (np.arange(first, first + cropped) + 0.5) * (length / resized) - 0.5
    positions = positions.clip(0, length - 1)
    before = np.floor(positions).astype(np.intp)
    return before, np.minimum(before + 1, length - 1), positions - before


def clips(frames: Iterator[np.ndarray], window: int, stride: int) -> Iterator[np.ndarray]:
    """Yield every complete window of consecutive frames, as (window, height, width, 3) uint8.

    Args:
        frames: frames of one size, (height, width, 3) uint8.
        window: number of frames of a clip.
        stride: number of frames from the start of a clip to the next.
    """
    clip: list[np.ndarray] = []
    skipped = 0
    for frame in frames:
        if skipped:
            skipped -= 1
            continue
        clip.append(frame)
        if len(clip) == window:
            yield np.stack(clip)
            skipped = max(0, stride - window)
            clip = clip[stride:]


def orientation(frame: Any, path: Path) -> tuple[int, bool]:
    """Return the counterclockwise quarter turns that make a frame upright, and whether it is mirrored first.

    Source: the matrix (a, b, u, c, d, v, x, y, w) of ISO/IEC 14496-12, 8.3.2. The stored pixel (p, q), counted to the
    right and down, is displayed at (a p + c q + x, b p + d q + y).
    """
    matrix = frame.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return 0, False
    a, b, _, c, d = np.frombuffer(bytes(matrix), np.int32).astype(float)[:5]
    if a * d == b * c:
        log.warning("%s has a singular display matrix. Its frames are used as they are stored.", path)
        return 0, False
    mirrored = a * d < b * c
    degrees = math.degrees(math.atan2(-b, a)) + (180 if mirrored else 0)
    turns = round(degrees / 90)
    if abs(degrees - 90 * turns) > TURN_TOLERANCE:
        log.warning("%s declares a rotation of %d degrees. It is rotated by %d degrees.", path, degrees, 90 * turns)
    return turns % 4, mirrored
