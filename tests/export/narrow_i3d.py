"""Define narrow published checkpoints of I3D in both layouts, with random weights."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from train.extractors.i3d import BLOCKS, BRANCHES, STEM, I3DConfig

TINY = I3DConfig((4, 4, 4), ((2, 2, 3, 2, 2, 1),) * 9, 5)

Arrays = dict[str, np.ndarray]


def kernels(config: I3DConfig = TINY) -> dict[str, tuple[int, int, int]]:
    """Return output channels, input channels and kernel size of each convolution with a batch norm."""
    sizes = dict(zip(STEM, zip(config.stem, (3, *config.stem), (7, 1, 3), strict=False), strict=True))
    inputs = config.stem[-1]
    for block, (b0, b1a, b1b, b2a, b2b, b3b) in zip(BLOCKS, config.blocks, strict=True):
        for branch, size in {
            "b0": (b0, inputs, 1),
            "b1a": (b1a, inputs, 1),
            "b1b": (b1b, b1a, 3),
            "b2a": (b2a, inputs, 1),
            "b2b": (b2b, b2a, 3),
            "b3b": (b3b, inputs, 1),
        }.items():
            sizes[f"{block}.{branch}"] = size
        inputs = b0 + b1b + b2b + b3b
    return sizes


def pytorch_i3d(seed: int = 0, scaled: bool = False) -> Arrays:
    """Return a state dict with the names of piergiaj/pytorch-i3d.

    Args:
        seed: of the weights, which keep features between 0.1 and 10.
        scaled: whether batch norms have scales other than 1, as fine-tuned networks have.
    """
    rng = np.random.default_rng(seed)
    state: Arrays = {}
    for name, (outputs, inputs, size) in kernels().items():
        spread = np.sqrt(2 / (inputs * size**3))
        state[f"{name}.conv3d.weight"] = rng.normal(0, spread, (outputs, inputs, size, size, size))
        state[f"{name}.bn.weight"] = rng.uniform(0.5, 2, outputs) if scaled else np.ones(outputs)
        state[f"{name}.bn.bias"] = rng.normal(0.2, 0.1, outputs)
        state[f"{name}.bn.running_mean"] = rng.normal(0, 0.1, outputs)
        # Below and above eps, so that a wrong eps shows.
        state[f"{name}.bn.running_var"] = rng.uniform(0.005, 1, outputs)
    state["logits.conv3d.weight"] = rng.normal(0, 1, (TINY.num_classes, TINY.dim, 1, 1, 1))
    state["logits.conv3d.bias"] = rng.normal(0, 1, TINY.num_classes)
    typed = {name: array.astype(np.float32) for name, array in state.items()}
    return typed | {f"{name}.bn.num_batches_tracked": np.array(7) for name in kernels()}


def flat(state: Mapping[str, np.ndarray]) -> Arrays:
    """Return the arrays of a `pytorch_i3d` without scales under the flat names of Flax."""
    result: Arrays = {}
    for name in kernels():
        block, _, branch = name.partition(".")
        scope = f"{block}/{BRANCHES[branch]}" if branch else block
        result[f"params/{scope}/Conv_0/kernel"] = state[f"{name}.conv3d.weight"].transpose(2, 3, 4, 1, 0)
        result[f"params/{scope}/BatchNorm_0/bias"] = state[f"{name}.bn.bias"]
        for part in ("mean", "var"):
            statistic = state[f"{name}.bn.running_{part}"]
            result[f"batch_stats/{scope}/BatchNorm_0/{part}"] = statistic.reshape(1, 1, 1, 1, -1)
    result["params/Logits/Conv3d_0c_1x1/Conv_0/kernel"] = state["logits.conv3d.weight"].transpose(2, 3, 4, 1, 0)
    result["params/Logits/Conv3d_0c_1x1/Conv_0/bias"] = state["logits.conv3d.bias"]
    return result
