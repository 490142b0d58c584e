"""Read and write files that may be damaged or hostile, and replace files atomically."""

from __future__ import annotations
