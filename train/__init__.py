"""Everything torch: the DRN network, its losses and stages, checkpoints, simulated data."""

import runtime as runtime  # first: it handles Ctrl-C while the rest is imported
