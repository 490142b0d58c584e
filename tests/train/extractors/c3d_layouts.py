"""Write the weights of a C3D in the layouts of published files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from train.extractors.c3d import C3D

State = dict[str, Any]


def plain_state_dict(model: C3D) -> State:
    """Return the weights as the plain c3d.pickle names them: for frames in BGR, with the layers after fc6."""
    state = {
        name.replace("conv1a", "conv1").replace("conv2a", "conv2"): value.clone()
        for name, value in model.state_dict().items()
    }
    state["conv1.weight"] = state["conv1.weight"].flip(1)
    return {**state, "fc7.weight": torch.ones(8, 8), "fc7.bias": torch.ones(8), "fc8.weight": torch.ones(9, 8)}


def mmaction2_state_dict(model: C3D, prefix: str) -> State:
    """Return the weights as mmaction2 names them, alone or as a recogniser's backbone."""
    state = {
        prefix + (name.replace(".", ".conv.", 1) if name.startswith("conv") else name): value.clone()
        for name, value in model.state_dict().items()
    }
    return {**state, f"{prefix}fc7.weight": torch.ones(8, 8)}


LAYOUTS: dict[str, Callable[[C3D, Path], None]] = {
    "c3d.pickle": lambda model, path: torch.save(plain_state_dict(model), path, _use_new_zipfile_serialization=False),
    "pretrain.pth": lambda model, path: torch.save({"state_dict": mmaction2_state_dict(model, "")}, path),
    "epoch_45.pth": lambda model, path: torch.save(
        {
            "meta": {"epoch": 45},
            "state_dict": {**mmaction2_state_dict(model, "backbone."), "cls_head.fc_cls.bias": torch.ones(2)},
        },
        path,
    ),
}
