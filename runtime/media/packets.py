"""Read the time stamps of all packets of a video file, and detect damage, without decoding."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from runtime.media.container import load_av
from runtime.media.timestamps import Part, Stamp, shown_times, split, usual_step

# libavformat's AVFMT_TS_DISCONT: broadcast containers, whose time stamps may restart.
TS_DISCONT = 0x0200


@dataclasses.dataclass
class Packets:
    """The time stamps and the damage of a file's packets.

    Attributes:
        stamps: time stamps of the packets of the video stream, in file order.
        corrupt: indices of truncated packets in `stamps`; -1 for other streams.
        others: times of the packets of all other streams, in seconds.
        end: largest end time of a packet of any stream, in seconds on the file's clock.
        last_byte: position of the end of the last packet in the file.
        error: reason why the file cannot be read to its end, as a clause; empty if it can.
    """

    stamps: list[Stamp] = dataclasses.field(default_factory=list)
    corrupt: set[int] = dataclasses.field(default_factory=set)
    others: list[float] = dataclasses.field(default_factory=list)
    end: float = 0.0
    last_byte: int = 1
    error: str = ""

    def times(self, container: Any, stream: Any) -> tuple[np.ndarray, tuple[Part, ...]]:
        """Return the times of the displayed frames, and the parts of the stream.

        Returns:
            (num_frames,) int64 increasing times in ticks, and the parts whose time stamps need different corrections.
        """
        unit = float(stream.time_base)
        ticks = 1 / (float(stream.guessed_rate or stream.average_rate or 25) * unit)
        broadcast = bool(int(container.format.flags) & TS_DISCONT)
        step = usual_step(self.stamps, ticks)
        parts = split(self.stamps, unit, step, ticks, broadcast=broadcast, others=self.others)
        return shown_times(self.stamps, parts, ticks), parts

    def damage(self, parts: Sequence[Part]) -> str:
        """Return the damage of the packets as a clause; empty if there is none."""
        if self.error:
            return self.error
        # MPEG-TS reports the last packet before another recording as truncated.
        at_ends = {part.first - back for part in parts[1:] for back in (1, 2)}
        return "contains a truncated frame" if self.corrupt - at_ends else ""


def read_packets(container: Any, stream: Any) -> Packets:
    """Read all packets of a container."""
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
                result.end = max(result.end, seconds + (packet.duration or 0) * float(packet.time_base))
            if packet.stream.index == stream.index:
                if packet.is_corrupt:
                    result.corrupt.add(len(result.stamps))
                result.stamps.append(Stamp(packet.pts, packet.dts, packet.is_keyframe, not packet.is_discard))
            elif packet.is_corrupt:
                result.corrupt.add(-1)
            if seconds is not None and packet.stream.index != stream.index:
                result.others.append(seconds)
    except (av.FFmpegError, OSError) as error:
        result.error = f"cannot be read to its end ({error.strerror or error})"
    return result
