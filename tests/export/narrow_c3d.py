"""Define a narrow C3D that runs fast, in a module that does not need PyAV."""

from __future__ import annotations

import torch

from train.extractors.c3d import C3D, MEANS, C3DConfig

TINY = C3DConfig((4, 4, 8, 8, 8, 8, 8, 8), 32)


def lively() -> C3D:
    """Return a network with features of 1 to 100, like those of trained weights."""
    torch.manual_seed(0)
    model = C3D(TINY, MEANS["plain"]).eval()
    for name, values in model.named_parameters():
        if name.endswith("weight"):
            torch.nn.init.kaiming_normal_(values)
    return model
