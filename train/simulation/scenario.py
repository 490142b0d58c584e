"""Define the events of the videos whose features are simulated."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from runtime.core.pooling import ClipTiming
from runtime.datasets.dataset import FEATURE_DIRECTORY

STATEMENT = "The features are simulated: recall on this data set is not comparable with published numbers."
CLIP_TIMING = ClipTiming()
REFERENCE_VIDEOS = 256  # number of videos that determine the thresholds of the channels


@dataclass(frozen=True)
class Scenario:
    """The events of one video; `actions` are (action, start, end), in seconds."""

    name: str
    num_frames: int
    duration: float
    scene: str
    objects: tuple[str, ...]
    actions: tuple[tuple[str, float, float], ...]

    @property
    def num_clips(self) -> int:
        """Number of clips of 16 frames, one every 8 frames, at least 1."""
        return CLIP_TIMING.num_clips(self.num_frames)


@dataclass(frozen=True)
class SimulationPlan:
    """The contents of a data set before its features are simulated.

    Attributes:
        scenarios: videos to simulate.
        reference: videos that determine the thresholds of the channels.
        texts: annotation files to write, name to content.
        sources: names of the annotation files that were read; none if the data set is synthetic.
        action_parts: function from an action to the (part, share) pairs of its embedding.
        confusable_actions: function from an action to those that it may look like.
        contents: summary that `simulated.json` records.
        statement: note on the meaning of recall on the data set.
        directory: name of the directory of features.
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
    """Return the names in a random order; adding a name does not change the order of the others."""
    return sorted(names, key=lambda name: hashlib.sha256(f"{seed}\0order\0{name}".encode()).digest())


def seeded_generator(*key: object) -> np.random.Generator:
    """Return a generator seeded by the strings of `key`, equal on every machine."""
    digest = hashlib.sha256("\0".join(map(str, key)).encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:16], "little"))
