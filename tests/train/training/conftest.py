"""Give all networks of these tests a narrow backbone, except those that golden files describe."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.train.training.narrow import NARROW, set_backbone
from train.__main__ import train


@pytest.fixture(scope="module", autouse=True)
def narrow_backbone() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as monkeypatch:
        set_backbone(monkeypatch, NARROW)
        yield


@pytest.fixture(autouse=True)
def published_backbone(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "reference" in request.fixturenames:
        set_backbone(monkeypatch)


@pytest.fixture(scope="session")
def short_run(tmp_path_factory: pytest.TempPathFactory, planted: Path, tiny_sizes: dict[str, Any]) -> Path:
    """The directory of a three-stage run on the planted data set."""
    output = tmp_path_factory.mktemp("narrow") / "run"
    with pytest.MonkeyPatch.context() as monkeypatch:
        set_backbone(monkeypatch, NARROW)
        train(planted, output, **tiny_sizes)
    return output
