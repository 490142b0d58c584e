"""Export checkpoints to ONNX, and build and check engines."""

import runtime as runtime  # first: it answers Ctrl-C while the rest is imported
