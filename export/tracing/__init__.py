"""Trace torch modules to ONNX, and check the graphs against torch."""

from __future__ import annotations
