"""Define the default settings of each data set: segments, clip features, metrics and query lengths."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from runtime.artifacts.manifest import Features
from runtime.core.errors import AnnotationError, invalid_setting

ADVICE = "correct the preset of the data set"


@dataclasses.dataclass(frozen=True)
class Preset:
    """The default options of a data set.

    Attributes:
        title: name of the data set in papers.
        num_segments: T. Moments far shorter than 1 / T of their video cannot be found.
        features: kind, clip timing and width of the published features. The width in the files takes precedence.
        iou_thresholds: IoU thresholds of the recall in papers, such as 0.5 and 0.7.
        query_length: min, opt and max query length in tokens, for graphs and engines.
        spread: whether a video whose clips do not match its frame count is divided by its clips; see `DataSet.frames`.
    """

    title: str
    num_segments: int = 32
    features: Features = dataclasses.field(default_factory=Features)
    iou_thresholds: tuple[float, ...] = (0.3, 0.5, 0.7)
    query_length: tuple[int, int, int] = (1, 8, 32)
    spread: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "iou_thresholds", tuple(self.iou_thresholds))
        object.__setattr__(self, "query_length", tuple(self.query_length))
        lengths, thresholds = self.query_length, self.iou_thresholds
        if self.num_segments < 4 or self.num_segments % 4:
            raise invalid_setting("a multiple of 4 for num_segments", self.num_segments, ADVICE, AnnotationError)
        # Models are compared at 0.5 and 0.7 on every data set.
        if not {0.5, 0.7} <= set(thresholds) or not all(0 < threshold < 1 for threshold in thresholds):
            raise invalid_setting(
                "iou_thresholds between 0 and 1, including 0.5 and 0.7", thresholds, ADVICE, AnnotationError
            )
        if len(lengths) != 3 or not 1 <= lengths[0] <= lengths[1] <= lengths[2]:
            raise invalid_setting("1 <= min <= opt <= max for query_length", lengths, ADVICE, AnnotationError)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> Preset:
        """Return the preset in the result of `to_dict`; TypeError, ValueError or GroundingError for other values."""
        return cls(**{**value, "features": Features(**value["features"])})


def query_length_of(training: Mapping[str, Any]) -> tuple[int, int, int]:
    """Return min, opt and max query length, in tokens, of the data that a model was trained on.

    Args:
        training: `training` of the manifest of the model. Without `query_length` in it, those of Charades-STA are
            returned.
    """
    query_length = training.get("query_length")
    if (
        isinstance(query_length, (list, tuple))
        and len(query_length) == 3
        and all(isinstance(length, int) for length in query_length)
    ):
        return (query_length[0], query_length[1], query_length[2])
    return Preset.query_length


def length_quantiles(lengths: Iterable[int]) -> tuple[int, int]:
    """Return the 90 % and 99 % quantiles of query lengths, in tokens.

    Returns:
        The smallest lengths that at least 90 % and 99 % of the queries do not exceed.
    """
    usual, rare = np.quantile(np.fromiter(lengths, np.int64), QUANTILES, method="inverted_cdf")
    return int(usual), int(rare)


def length_quantiles_of(training: Mapping[str, Any]) -> tuple[tuple[int, int], str] | None:
    """Return the 90 % and 99 % quantiles of the query lengths in the training of a model, and their source.

    Args:
        training: `training` of a manifest. If it has no quantiles, those of the published data set are returned, and
            those of Charades-STA if it has no data set.

    Returns:
        Quantiles in tokens, and a phrase that names their source; None for an unknown data set.
    """
    recorded = training.get("query_length_quantiles")
    if isinstance(recorded, (list, tuple)) and len(recorded) == 2 and all(type(length) is int for length in recorded):
        return (recorded[0], recorded[1]), "the training queries, as recorded in the model"
    title = training.get("data_set", PRESETS["charades-sta"].title)
    published = LENGTH_QUANTILES.get(title) if isinstance(title, str) else None
    return (published, f"the queries of {title}") if published else None


QUANTILES = (0.9, 0.99)
"""Shares of queries for whose lengths a plan with an unrolled LSTM is built."""

# Measured with `length_quantiles` on the training splits as published, 2026-11-29; of QVHighlights on val.
LENGTH_QUANTILES: Mapping[str, tuple[int, int]] = {
    "Charades-STA": (9, 10),
    "ActivityNet Captions": (21, 37),
    "TACoS": (15, 27),
    "QVHighlights": (16, 23),
}

PRESETS: Mapping[str, Preset] = {
    "charades-sta": Preset("Charades-STA"),
    "activitynet": Preset("ActivityNet Captions", features=Features(dim=500), query_length=(1, 16, 96)),
    # A third of its moments are shorter than 1/32 of their video. Its features are published at several strides.
    "tacos": Preset(
        "TACoS", num_segments=128, iou_thresholds=(0.1, 0.3, 0.5, 0.7), query_length=(1, 8, 64), spread=True
    ),
    # Adjacent clips of two seconds, which are 60 frames at 30 frames per second.
    "qvhighlights": Preset(
        "QVHighlights", num_segments=64, features=Features("CLIP", 512, window=60, stride=60), query_length=(1, 10, 64)
    ),
}
