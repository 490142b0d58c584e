"""Write a model repository for Triton Inference Server."""

from __future__ import annotations
