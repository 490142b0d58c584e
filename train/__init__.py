"""Everything torch: the DRN network, its losses and stages, checkpoints, simulated data."""

import runtime as runtime  # first: it answers Ctrl-C while the rest is imported
