"""Build TensorRT engines, write them, and decide from their layers which precision they have."""

from __future__ import annotations
