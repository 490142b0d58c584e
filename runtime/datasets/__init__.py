"""Read data sets as they are published into one form."""

from __future__ import annotations
