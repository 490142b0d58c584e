"""Calibrate FP32 ONNX models of this toolkit and quantize them to INT8 or FP8, without torch."""

import runtime as runtime  # first: it handles Ctrl-C while the rest is imported
