"""Export checkpoints to ONNX, and build and check engines."""

import runtime as runtime  # first: it handles Ctrl-C while the rest is imported
