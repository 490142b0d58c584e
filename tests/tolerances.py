"""How far results may differ, each with its reason."""

HEADS = 1e-4
"""Relative to the largest value of an output: another order of float32 sums, over 4,096 channels at most."""

GRADIENTS = 1e-4
"""Relative to the gradient's norm: as HEADS, through the backward pass."""

DETECTIONS = 1e-5
"""Spans and scores in [0, 1] decoded from heads that differ by HEADS at most; the published figures are float32."""

EXPORTED = 1e-4
"""Heads of a graph against torch, absolute: folded batch norm and merged convolutions round once more."""

LOSSES = 2e-6
"""Relative: sums of at most 840 float32 numbers in another order; losses of whole networks are held to HEADS."""

STEPS = 1e-3
"""Relative: losses over three optimiser steps. The recorded ones ran in float32, where Adam turns the rounding noise in
gradients that are nearly zero into full steps of either sign."""

STEP_HEADS = 5e-3
"""Relative to the largest value of an output: heads after those steps; in stage 1 their median. There, at 1e-3 a step,
the same code in float32 and in float64 is as far apart as either is from the recorded heads."""

PROCESSES = 1e-4
"""Relative: losses and gradient norms of two processes against one with the whole batch, in float32 at small learning
rates, where 3e-7 was seen: sums over a batch are rounded in another order. In float64 nine digits agree; at a rate of
1e-3 Adam makes full steps of rounding noise, and float32 drifts by up to 1e-2 in thirty steps."""

PROCESS_WEIGHTS = 1e-3
"""Relative to the largest of a tensor, median: its weights after such runs."""

EXPORTED_SECONDS = 1e-3
"""Boundaries of a graph against torch: EXPORTED of a few segments of a second each."""

HALF = 5e-3
"""Relative to the largest value of an output: FP16 rounds each tensor by 5e-4, some twenty times over (2e-3 seen)."""

INT8 = 0.05
"""Relative to the largest value of an output, for 99 % of the values: INT8 rounds by up to 4e-3 of a tensor's range a
dozen times over; 2e-2 was seen."""

BATCHED_SECONDS = 1e-4
"""Moments (in seconds) and scores asked in a batch against alone: float32 sums in another order, as HEADS."""
