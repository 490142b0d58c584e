"""Record published results, by the checkpoint that they belong to."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping


@dataclasses.dataclass(frozen=True)
class PublishedResult:
    """The published recall of a checkpoint.

    Attributes:
        protocol: decoding and hit rule that it was measured with.
        percent: metric to percent.
    """

    name: str
    queries: int
    protocol: str
    percent: Mapping[str, float]
    source: str

    def sentence(self) -> str:
        """Return the result as one sentence."""
        values = " and ".join(f"{name} {value:.2f}" for name, value in self.percent.items())
        return f"Published for {self.name}: {values} ({self.queries} queries, protocol {self.protocol}; {self.source})."


# First eight digits of the SHA-256 of a checkpoint, which mmaction2 appends to its file name -> its result.
PUBLISHED: Mapping[str, PublishedResult] = {
    "ec0429a6": PublishedResult(
        "drn_2xb16-4096-10e_c3d-feature_20230809-ec0429a6.pth",
        3720,
        "mmaction2",
        {"R@1 IoU=0.5": 47.04, "R@5 IoU=0.5": 84.57},
        "https://github.com/open-mmlab/mmaction2/tree/main/configs/localization/drn",
    )
}


def published_result(sources: Mapping[str, str]) -> PublishedResult | None:
    """Return the published result of the checkpoint among the sources of a model (name to SHA-256), or None."""
    return next((PUBLISHED[digest[:8]] for digest in sources.values() if digest[:8] in PUBLISHED), None)
