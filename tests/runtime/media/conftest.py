"""A small extractor, and a cache of features for each test."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An extractor of clips; see `write_clips`."""
    from tests.runtime.media.extractor_graphs import write_clips

    return write_clips(tmp_path_factory.mktemp("extractor") / "tiny.onnx")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DRN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"
