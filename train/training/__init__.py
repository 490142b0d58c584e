"""Train a network in stages."""
