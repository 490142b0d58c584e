"""What happens in the videos whose features are simulated, made up or read off annotations."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from runtime.core.video import ClipClock
from runtime.datasets.dataset import FEATURE_DIRECTORY

STATEMENT = "The features are simulated: recall on this data set is not comparable with published numbers."
CLOCK = ClipClock()
REFERENCE_VIDEOS = 256  # the videos that fix every channel's threshold, whichever are then written


@dataclass(frozen=True)
class Story:
    """What happens in one video: all that its features may depend on. `actions` holds (action, start, end), seconds."""

    name: str
    num_frames: int
    duration: float
    scene: str
    objects: tuple[str, ...]
    actions: tuple[tuple[str, float, float], ...]

    @property
    def num_clips(self) -> int:
        """One clip of 16 frames every 8; a video shorter than 16 frames still has one."""
        return CLOCK.num_clips(self.num_frames)


@dataclass(frozen=True)
class Plan:
    """A data set to be.

    Attributes:
        stories: what to simulate.
        reference: the videos that fix every channel's threshold.
        texts: the annotation files: name to content.
        parts: what an action is made of: names and their shares.
        siblings: actions that one is mistaken for.
        facts: what `simulated.json` says of the contents.
        statement: what recall on it is worth.
        directory: where its features go.
    """

    stories: list[Story]
    reference: list[Story]
    texts: dict[str, str]
    parts: Callable[[str], list[tuple[str, float]]]
    siblings: Callable[[str], list[str]]
    facts: dict[str, Any]
    statement: str = STATEMENT
    directory: str = FEATURE_DIRECTORY


def seeded_order(names: Iterable[str], seed: int) -> list[str]:
    """Return the names shuffled by seed, so that the first N of them are among the first N + 1."""
    return sorted(names, key=lambda name: hashlib.sha256(f"{seed}\0order\0{name}".encode()).digest())
