"""Ranges are measured on a calibration set, and an ONNX model becomes INT8. Imports no torch."""
