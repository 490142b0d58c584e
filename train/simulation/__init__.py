"""Simulate clip features for videos whose real features are not at hand."""

from __future__ import annotations
