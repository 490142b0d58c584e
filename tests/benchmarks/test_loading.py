"""The time to open a model is measured with and without its digest."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.loading import loading
from runtime.artifacts.onnx_metadata import DigestCheck
from runtime.backends import onnxruntime_backend
from runtime.core.errors import GroundingError, ModelFileError


@pytest.mark.parametrize("name", ["drn.onnx", "drn.pt"])
def test_both_are_timed_and_the_check_is_back_afterwards(models: Path, name: str) -> None:
    found = loading(models / name, repeats=1)
    assert found["checked_s"] > 0
    assert found["unchecked_s"] > 0
    assert onnxruntime_backend.DigestCheck is DigestCheck


def test_what_cannot_be_timed_is_refused(models: Path) -> None:
    with pytest.raises(GroundingError):
        loading(models / "drn.onnx", repeats=0)
    with pytest.raises(ModelFileError):
        loading(models / "drn.engine")
