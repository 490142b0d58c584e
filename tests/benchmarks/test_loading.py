"""Test `benchmarks.loading`: models open with and without the check of their digest."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.loading import loading
from runtime.artifacts.onnx_metadata import DigestCheck
from runtime.backends import onnxruntime_session
from runtime.core.errors import GroundingError, ModelFileError
from tests.train.training.narrow import narrow_backbone

__all__ = ["narrow_backbone"]


@pytest.mark.parametrize("name", ["drn.onnx", "drn.pt"])
def test_loading_times_both_modes_and_restores_digest_check(models: Path, name: str) -> None:
    actual = loading(models / name, repeats=1)
    assert actual["checked_s"] > 0
    assert actual["unchecked_s"] > 0
    assert onnxruntime_session.DigestCheck is DigestCheck


def test_loading_rejects_zero_repeats_and_engine_files(models: Path) -> None:
    with pytest.raises(GroundingError):
        loading(models / "drn.onnx", repeats=0)
    with pytest.raises(ModelFileError):
        loading(models / "drn.engine")
