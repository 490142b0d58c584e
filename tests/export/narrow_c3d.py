"""A C3D that is computed in no time. Apart from the tests of extractors, which want PyAV: those of engines do not."""

from __future__ import annotations

import torch

from train.c3d import C3D, MEANS, C3DConfig

TINY = C3DConfig((4, 4, 8, 8, 8, 8, 8, 8), 32)


def lively() -> C3D:
    """Return a network whose features are of order 1 to 100, as those of trained weights."""
    torch.manual_seed(0)
    model = C3D(TINY, MEANS["plain"]).eval()
    for name, values in model.named_parameters():
        if name.endswith("weight"):
            torch.nn.init.kaiming_normal_(values)
    return model
