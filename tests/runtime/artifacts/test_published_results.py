"""Published results belong to checkpoints by their SHA-256."""

from __future__ import annotations

from runtime.artifacts.published_results import PUBLISHED, published_result
from tests.raising import quotes


def test_published_result_is_found_by_digest_and_not_by_name() -> None:
    (digest,) = PUBLISHED
    published = published_result({"other.pt": "0" * 64, "renamed.pth": digest + "0" * 56})
    assert published is PUBLISHED[digest]
    assert published.name.endswith(f"-{digest}.pth")
    assert quotes(published.sentence(), "R@1 IoU=0.5", 47.04, "R@5 IoU=0.5", 84.57, 3720, "mmaction2")
    assert published_result({published.name: "1" * 64}) is None
