"""Train networks with a narrow backbone; `python -m tests.train.training.narrow` is `python -m train` with it.

The published channels of the backbone, up to 1024, take most of the time of a small network.
"""

from __future__ import annotations

import runpy

import pytest

from train.network.model import BACKBONE_CHANNELS

NARROW = (32, 64, 128)


def set_backbone(monkeypatch: pytest.MonkeyPatch, channels: tuple[int, ...] = BACKBONE_CHANNELS) -> None:
    """Set the channels of the backbone of new networks; the default is published."""
    for module in ("train.network.model", "train.training.batch_sources"):
        monkeypatch.setattr(f"{module}.BACKBONE_CHANNELS", channels)


if __name__ == "__main__":
    with pytest.MonkeyPatch.context() as patch:
        set_backbone(patch, NARROW)
        runpy.run_module("train", run_name="__main__", alter_sys=True)
