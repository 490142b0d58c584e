"""Rewrite ONNX graphs without torch: split, convert, unroll, equalize, and count what they compute in."""

from __future__ import annotations
