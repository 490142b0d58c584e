"""Published results belong to checkpoints by their SHA-256."""

from __future__ import annotations

from runtime.artifacts.published_results import PUBLISHED, published_result
from tests.raising import quotes


def test_published_result_is_found_by_digest_and_not_by_name() -> None:
    (digest,) = PUBLISHED
    found = published_result({"other.pt": "0" * 64, "renamed.pth": digest + "0" * 56})
    assert found is PUBLISHED[digest]
    assert found.name.endswith(f"-{digest}.pth")
    assert quotes(found.sentence(), "R@1 IoU=0.5", 47.04, "R@5 IoU=0.5", 84.57, 3720, "mmaction2")
    assert published_result({found.name: "1" * 64}) is None
