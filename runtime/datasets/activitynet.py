"""Read ActivityNet Captions as published for grounding, with durations and timestamps in seconds."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from runtime.datasets.caption_json import Captions, Clock, Entries
from runtime.datasets.presets import PRESETS


def activitynet(root: Path, splits: Mapping[str, Entries]) -> Captions:
    """Return the data set of files `{"v_X": {"duration", "timestamps": [[start, end], ...], "sentences": [...]}}`.

    Durations and timestamps are in seconds.
    """
    return Captions(root, splits, PRESETS["activitynet"], _clock, "a duration in seconds")


def is_activitynet(entry: Mapping[str, Any]) -> bool:
    """Return whether the entry of a video may be of this format."""
    return "duration" in entry


def _clock(entry: Mapping[str, Any]) -> Clock:
    if "num_frames" in entry or "fps" in entry:
        raise ValueError
    return Clock(entry["duration"], None, 1.0)
