"""Train networks with a narrow backbone; `python -m tests.train.training.narrow` is `python -m train` with it.

The published channels of the backbone, up to 1024, take most of the time of a small network.
"""

from __future__ import annotations

import contextlib
import runpy
from collections.abc import Iterator

import pytest

PUBLISHED = (256, 512, 1024)
NARROW = (32, 64, 128)


def set_backbone(monkeypatch: pytest.MonkeyPatch, channels: tuple[int, ...] = PUBLISHED) -> None:
    """Set the channels of the backbone of new networks; the default is published."""
    for module in ("train.network.model", "train.training.batch_sources"):
        monkeypatch.setattr(f"{module}.BACKBONE_CHANNELS", channels)


@contextlib.contextmanager
def with_narrow_backbone() -> Iterator[None]:
    """Give new networks a narrow backbone."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        set_backbone(monkeypatch, NARROW)
        yield


@pytest.fixture(scope="module", autouse=True)
def narrow_backbone() -> Iterator[None]:
    """Apply to all tests of a file or folder that imports this fixture, such as for the checkpoint of `models`."""
    with with_narrow_backbone():
        yield


if __name__ == "__main__":
    with with_narrow_backbone():
        runpy.run_module("train", run_name="__main__", alter_sys=True)
