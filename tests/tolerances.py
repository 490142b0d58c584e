"""How far results may differ, each with its reason."""

HEADS = 1e-4
"""Relative to the largest value of an output: another order of float32 sums, over 4,096 channels at most."""

GRADIENTS = 1e-4
"""Relative to the gradient's norm: as HEADS, through the backward pass."""

DETECTIONS = 1e-5
"""Spans and scores in [0, 1] decoded from heads that differ by HEADS at most; the published figures are float32."""

EXPORTED = 1e-4
"""Heads of a graph against torch, absolute: folded batch norm and merged convolutions round once more."""
