"""Trace torch modules to ONNX, and check the graphs against torch."""
