"""Ground queries in videos: one Grounder, its evaluation, and how answers are written and drawn."""

from __future__ import annotations
