"""Define the networks behind clip features in torch, C3D and I3D, and read and write their checkpoints."""
