"""Name the tensors and files that the Triton front and its client exchange."""

from __future__ import annotations

ABOUT_FILE = "about.json"
QUERY, FEATURES, DURATION = "QUERY", "FEATURES", "DURATION"
NUM_FRAMES, TOP_K, WINDOWS, ALWAYS_ANSWER = "NUM_FRAMES", "TOP_K", "WINDOWS", "ALWAYS_ANSWER"
MOMENTS, COUNT = "MOMENTS", "COUNT"
WHOLE = (0.0, 0.0, 0.0)
"""WINDOWS that ask for videos to be grounded whole."""
