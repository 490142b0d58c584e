"""Give all networks of these tests a narrow backbone, except those that golden files describe."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.train.training.narrow import narrow_backbone, set_backbone, with_narrow_backbone
from train.__main__ import train

__all__ = ["narrow_backbone"]


@pytest.fixture(autouse=True)
def published_backbone(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "reference" in request.fixturenames:
        set_backbone(monkeypatch)


@pytest.fixture(scope="session")
def short_run(tmp_path_factory: pytest.TempPathFactory, planted: Path, tiny_sizes: dict[str, Any]) -> Path:
    """The directory of a three-stage run on the planted data set."""
    output = tmp_path_factory.mktemp("narrow") / "run"
    with with_narrow_backbone():
        train(planted, output, **tiny_sizes)
    return output
