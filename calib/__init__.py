"""Ranges are measured on a calibration set, and an ONNX model becomes INT8. Imports no torch."""

import runtime as runtime  # first: it answers Ctrl-C while the rest is imported
