"""Time models in turns on one machine, and report what was measured."""

from __future__ import annotations
