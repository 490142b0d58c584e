"""Define and fit the score below which no moment of a video matches a query."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from runtime.core.errors import GroundingError, from_fields, invalid_setting

BALANCED = "balanced accuracy"


@dataclasses.dataclass(frozen=True)
class Presence:
    """A threshold on the score of the best moment of a video, and its accuracy on held-out pairs.

    Stored in the manifest of a model, which then answers "no moment found" below the threshold.

    Attributes:
        threshold: minimum score of a moment, in (0, 1].
        kept: share of the matching pairs (a sentence and its video) at or above the threshold.
        refused: share of the mismatched pairs (a sentence and another video) below the threshold.
        matching, mismatched: numbers of pairs.
        rule: how the threshold was chosen: "balanced accuracy", or "at least 95 % kept" for a minimum share.
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
            expected = "a threshold in (0, 1], and shares kept and refused in [0, 1]"
            raise invalid_setting(expected, shares, "fit them again with `python -m train.fit_presence`")

    def __str__(self) -> str:
        return (
            f"below a score of {self.threshold:.3f}, which answers {100 * self.kept:.1f} % of {self.matching} matching "
            f"and refuses {100 * self.refused:.1f} % of {self.mismatched} mismatched pairs ({self.rule})"
        )

    def exist_score(self, score: float) -> float:
        """Return the score of the best moment as a `pred_exist_score` in [0, 1], at least 0.5 from the threshold on.

        Other evaluators separate at 0.5. Below and above, the result is linear in the score.

        Args:
            score: float32 score of the best moment of a video; -inf without a likely location.
        """
        # Scores are float32, so the threshold is rounded too: an equal score passes.
        threshold = float(np.float32(self.threshold))
        if score < threshold:
            return max(score, 0.0) / threshold / 2
        return 0.5 + (min(score, 1.0) - threshold) / (1 - threshold) / 2 if threshold < 1 else 1.0

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> Presence:
        """Return the presence in the result of `to_dict`; ModelFileError for other values."""
        return from_fields(cls, value)


def fit_threshold(matching: np.ndarray, mismatched: np.ndarray, keep: float | None = None) -> Presence:
    """Return the threshold that separates matching from mismatched pairs best.

    Args:
        matching, mismatched: (N,) and (M,) scores of the best moment of each pair, -inf for pairs without a likely
            location.
        keep: minimum share of the matching pairs at or above the threshold, which is the highest possible. With None,
            the threshold of the highest balanced accuracy is chosen, and the lowest of equal ones.

    Raises:
        GroundingError: no threshold keeps this share (code `no_threshold`), or `keep` is not in (0, 1].
    """
    if keep is not None and not 0 < keep <= 1:
        raise GroundingError(
            f"Expected a share in (0, 1] for --keep, got {keep}. Correct the option.", code="invalid_option"
        )
    candidates = np.unique(matching[matching > -np.inf])
    # One division of integers: 1 - 4 / 5 is below 0.2.
    retained = (len(matching) - np.searchsorted(np.sort(matching), candidates)) / len(matching)
    refused = np.searchsorted(np.sort(mismatched), candidates) / len(mismatched)
    allowed = np.ones(len(candidates), bool) if keep is None else retained >= keep
    if not allowed.any():
        required = "any" if keep is None else f"{100 * keep:g} %"
        advice = "Train longer, or lower --keep." if keep is not None and len(candidates) else "Train longer."
        raise GroundingError(
            f"No threshold keeps {required} of {len(matching)} matching pairs, because only "
            f"{100 * retained.max(initial=0):.1f} % have a likely location. {advice}",
            code="no_threshold",
        )
    best = int(np.argmax(np.where(allowed, retained + refused if keep is None else refused, -1)))
    # Halfway to the next lower score, so that rounding in another precision changes no matching pair.
    lower = np.concatenate((matching, mismatched))
    lower = lower[(lower < candidates[best]) & (lower > -np.inf)]
    threshold = (float(candidates[best]) + float(lower.max(initial=0))) / 2
    rule = BALANCED if keep is None else f"at least {100 * keep:g} % kept"
    return Presence(threshold, float(retained[best]), float(refused[best]), len(matching), len(mismatched), rule)
