"""From a checkpoint to ONNX, and from ONNX to an engine."""

import runtime as runtime  # first: it answers Ctrl-C while the rest is imported
