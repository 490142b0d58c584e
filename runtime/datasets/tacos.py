"""Read TACoS as published for grounding, with frame counts and with timestamps in frames."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from runtime.core.io.text_files import is_number
from runtime.datasets.caption_json import Captions, Clock, Entries
from runtime.datasets.presets import PRESETS
from runtime.datasets.validation import MAX_FRAME_RATE


def tacos(root: Path, splits: Mapping[str, Entries]) -> Captions:
    """Return the data set of files `{"X.avi": {"fps", "num_frames", "timestamps": [[first, last]], "sentences"}}`.

    Timestamps are frame numbers.
    """
    return Captions(root, splits, PRESETS["tacos"], _clock, "fps and num_frames")


def is_tacos(entry: Mapping[str, Any]) -> bool:
    """Return whether the entry of a video may be of this format."""
    return "num_frames" in entry and "fps" in entry


def _clock(entry: Mapping[str, Any]) -> Clock:
    rate, count = entry["fps"], entry["num_frames"]
    if "duration" in entry or not is_number(rate) or not 0 < rate <= MAX_FRAME_RATE:
        raise ValueError
    return Clock(count / rate, count, rate)
