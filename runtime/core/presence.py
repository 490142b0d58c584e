"""When nothing in a video fits: the score below which the best moment is none."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from runtime.core.errors import GroundingError, ModelFileError, check_argument, one_line

BALANCED = "balanced accuracy"


@dataclasses.dataclass(frozen=True)
class Presence:
    """A threshold on the score of a video's best moment, and how well it separated held-out pairs.

    Travels in the manifest of a model, which then answers "no moment found" below the threshold.

    Attributes:
        threshold: scores from this on are answers, in (0, 1].
        kept: share of the matching pairs (a sentence and its video) that are answered.
        refused: share of the mismatched pairs (a sentence and another video) that are not.
        matching, mismatched: how many pairs these are shares of.
        rule: how the threshold was chosen.
    """

    threshold: float
    kept: float
    refused: float
    matching: int
    mismatched: int
    rule: str = BALANCED

    def __post_init__(self) -> None:
        shares = (self.threshold, self.kept, self.refused)
        if not all(isinstance(share, (int, float)) and 0 <= share <= 1 for share in shares) or not self.threshold:
            raise ModelFileError(
                f"A score below which no moment is found is above 0, and shares lie in [0, 1]; {shares} was given.",
                code="invalid_setting",
            )

    def __str__(self) -> str:
        return (
            f"below a score of {self.threshold:.3f}, which answers {100 * self.kept:.1f} % of {self.matching} matching "
            f"and refuses {100 * self.refused:.1f} % of {self.mismatched} mismatched pairs ({self.rule})"
        )

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> Presence:
        check_argument("value", value, Mapping, "what `to_dict` returns", ModelFileError)
        try:
            return cls(**value)
        except TypeError as error:
            raise ModelFileError(
                f"Expected what `to_dict` returns: {one_line(error)}. Export the model again."
            ) from error


def fit_threshold(matching: np.ndarray, mismatched: np.ndarray, keep: float | None = None) -> Presence:
    """Return the threshold that separates matching from mismatched pairs best.

    Args:
        matching, mismatched: (N,) and (M,) scores of the best moment of each pair, -inf where no location is likely.
        keep: share of the matching pairs that must be answered, as few more as can be; without it the threshold is the
            one of highest balanced accuracy, the mean of both shares, and the lowest of several.

    Raises:
        GroundingError: no threshold keeps so many, or `keep` is no share.
    """
    if keep is not None and not 0 < keep <= 1:
        raise GroundingError(
            f"--keep is a share of the matching pairs, above 0 and at most 1, and {keep} was given.",
            code="invalid_option",
        )
    result = np.unique(matching[matching > -np.inf])
    retained = 1 - np.searchsorted(np.sort(matching), result) / len(matching)
    refused = np.searchsorted(np.sort(mismatched), result) / len(mismatched)
    allowed = np.ones(len(result), bool) if keep is None else retained >= keep
    if not allowed.any():
        expected, advice = "separates them from others", "train longer"
        if keep is not None:
            expected = f"keeps {100 * keep:g} %"
            advice += ", or lower --keep" if len(result) else ""
        raise GroundingError(
            f"In only {100 * retained.max(initial=0):.1f} % of {len(matching)} matching pairs any location is likely, "
            f"so that no threshold {expected}; {advice}.",
            code="no_threshold",
        )
    best = int(np.argmax(np.where(allowed, retained + refused if keep is None else refused, -1)))
    # Halfway down to the next score, so that rounding in another precision refuses nobody who was kept.
    below = np.concatenate((matching, mismatched))
    below = below[(below < result[best]) & (below > -np.inf)]
    threshold = (float(result[best]) + float(below.max())) / 2 if len(below) else float(result[best]) / 2
    rule = BALANCED if keep is None else f"at least {100 * keep:g} % kept"
    return Presence(threshold, float(retained[best]), float(refused[best]), len(matching), len(mismatched), rule)
