"""Train a network in stages."""

from __future__ import annotations
