"""Make a film to try the commands on where none is at hand: a sun rises, crosses the sky, and sets.

python examples/film.py clip.mp4
"""

from __future__ import annotations

import sys

import av
import numpy as np

SECONDS, RATE, HEIGHT, WIDTH = 24, 25, 240, 426
NIGHT, DUSK, DAY = np.array([[14, 20, 48], [232, 120, 70], [120, 185, 240]])


def picture(time: float) -> np.ndarray:
    """Return (HEIGHT, WIDTH, 3) uint8: the sky at a time of day from 0 to 1, hills below it."""
    rows, columns = np.mgrid[:HEIGHT, :WIDTH] / HEIGHT
    height = np.sin(np.pi * (time * 1.3 - 0.15))
    light = np.clip(height * 2 + 0.5, 0, 1)
    glow = np.clip(1 - abs(height) * 2, 0, 1) * rows
    sky = (NIGHT + (DAY - NIGHT) * light)[None, None] * (0.75 + 0.25 * rows[..., None])
    sky = sky + (DUSK - sky) * glow[..., None]
    across, down = 0.15 + time * (WIDTH / HEIGHT - 0.3), 0.8 - 0.6 * height
    distance = np.hypot(columns - across, rows - down)[..., None]
    sky = np.where(distance < 0.09, [255, 226, 130], sky + 90 * np.exp(-distance * 6) * light)
    hills = rows > 0.78 + 0.06 * np.sin(columns * 4) + 0.03 * np.sin(columns * 11 + 1)
    ground = (np.array([38, 84, 52]) * (0.25 + 0.75 * light))[None, None]
    return np.where(hills[..., None], ground, sky).clip(0, 255).astype(np.uint8)


def main(path: str) -> None:
    """Write the film."""
    with av.open(path, "w") as container:
        stream = container.add_stream("mpeg4", rate=RATE)
        stream.height, stream.width, stream.pix_fmt, stream.bit_rate = HEIGHT, WIDTH, "yuv420p", 2_000_000
        for number in range(SECONDS * RATE):
            frame = av.VideoFrame.from_ndarray(picture(number / (SECONDS * RATE)), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


if __name__ == "__main__":
    main(*sys.argv[1:])
