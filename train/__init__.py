"""Everything torch: the DRN network, its losses and stages, checkpoints, simulated data."""
