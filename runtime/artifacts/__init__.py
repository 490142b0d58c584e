"""Read and write what is stored in and beside a model file."""

from __future__ import annotations
