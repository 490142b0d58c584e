"""Describe what happens in the videos whose features are simulated, synthetic or read from annotations."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from runtime.core.video import ClipTiming
from runtime.datasets.dataset import FEATURE_DIRECTORY

STATEMENT = "The features are simulated: recall on this data set is not comparable with published numbers."
CLIP_TIMING = ClipTiming()
REFERENCE_VIDEOS = 256  # the videos that fix every channel's threshold, whichever are then written


@dataclass(frozen=True)
class Scenario:
    """The events of one video, from which its features are computed. `actions` holds (action, start, end), in
    seconds.
    """

    name: str
    num_frames: int
    duration: float
    scene: str
    objects: tuple[str, ...]
    actions: tuple[tuple[str, float, float], ...]

    @property
    def num_clips(self) -> int:
        """One clip of 16 frames every 8; a video shorter than 16 frames still has one."""
        return CLIP_TIMING.num_clips(self.num_frames)


@dataclass(frozen=True)
class SimulationPlan:
    """The contents of a data set before its features are simulated.

    Attributes:
        scenarios: what to simulate, one a video.
        reference: the videos that fix every channel's threshold.
        texts: the annotation files to write: name to content.
        sources: names of the annotation files that were read; none if the data set is synthetic.
        action_parts: function from an action to its (part, share) pairs, from which its embedding is made.
        confusable_actions: function from an action to those that may replace its trace.
        contents: what `simulated.json` records of the contents.
        statement: what recall on the data set is worth.
        directory: where its features go.
    """

    scenarios: list[Scenario]
    reference: list[Scenario]
    texts: dict[str, str]
    sources: tuple[str, ...]
    action_parts: Callable[[str], list[tuple[str, float]]]
    confusable_actions: Callable[[str], list[str]]
    contents: dict[str, Any]
    statement: str = STATEMENT
    directory: str = FEATURE_DIRECTORY


def seeded_order(names: Iterable[str], seed: int) -> list[str]:
    """Return the names shuffled by seed, so that the first N of them are among the first N + 1."""
    return sorted(names, key=lambda name: hashlib.sha256(f"{seed}\0order\0{name}".encode()).digest())


def seeded_generator(*key: object) -> np.random.Generator:
    """Return the random numbers that belong to `key`, the same on every machine and in any order of calls."""
    digest = hashlib.sha256("\0".join(map(str, key)).encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:16], "little"))
