"""Read the time stamps and damage of all packets of a video stream."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from runtime.media.container import load_av
from runtime.media.timestamps import Part, Stamp, shown_times, split, usual_step

# Of libavformat's AVFMT_TS_DISCONT: containers of broadcasts, in which time stamps may restart.
TS_DISCONT = 0x0200


@dataclasses.dataclass
class Packets:
    """The data of a file's packets, read without decoding.

    Attributes:
        stamps: of the packets of the pictures, in the order of the file.
        corrupt: numbers of those that are cut short.
        others: seconds of the packets of all other streams.
        reached: the second that any stream reaches, as the file counts.
        last_byte: where the last packet ends in the file.
        broken: why the file cannot be read to its end; empty where it can.
    """

    stamps: list[Stamp] = dataclasses.field(default_factory=list)
    corrupt: set[int] = dataclasses.field(default_factory=set)
    others: list[float] = dataclasses.field(default_factory=list)
    reached: float = 0.0
    last_byte: int = 1
    broken: str = ""

    def times(self, container: Any, stream: Any) -> tuple[np.ndarray, tuple[Part, ...]]:
        """Return the rising times of the frames that are shown, in ticks, and the parts that they were made of."""
        unit = float(stream.time_base)
        ticks = 1 / (float(stream.guessed_rate or stream.average_rate or 25) * unit)
        broadcast = bool(int(container.format.flags) & TS_DISCONT)
        step = usual_step(self.stamps, ticks)
        parts = split(self.stamps, unit, step, ticks, broadcast=broadcast, others=self.others)
        return shown_times(self.stamps, parts, ticks), parts

    def damage(self, parts: Sequence[Part]) -> str:
        """Return what is wrong with the packets, as a clause; empty where nothing is."""
        if self.broken:
            return self.broken
        # Where another recording begins, MPEG-TS counts the packet before it as cut short.
        at_ends = {part.first - back for part in parts[1:] for back in (1, 2)}
        return "holds a frame that is cut short" if self.corrupt - at_ends else ""


def read_packets(container: Any, stream: Any) -> Packets:
    """Return what the packets of a file hold."""
    av = load_av()
    result = Packets()
    try:
        for packet in container.demux():
            if not packet.size:
                continue
            result.last_byte = max(result.last_byte, (packet.pos or 0) + packet.size)
            time = packet.pts if packet.pts is not None else packet.dts
            seconds = None if time is None else time * float(packet.time_base)
            if seconds is not None:
                result.reached = max(result.reached, seconds + (packet.duration or 0) * float(packet.time_base))
            if packet.stream.index == stream.index:
                if packet.is_corrupt:
                    result.corrupt.add(len(result.stamps))
                result.stamps.append(Stamp(packet.pts, packet.dts, packet.is_keyframe, not packet.is_discard))
            elif packet.is_corrupt:
                result.corrupt.add(-1)
            if seconds is not None and packet.stream.index != stream.index:
                result.others.append(seconds)
    except (av.FFmpegError, OSError) as error:
        result.broken = f"cannot be read to its end ({error.strerror or error})"
    return result
