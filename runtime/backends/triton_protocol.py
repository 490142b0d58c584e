"""Name the tensors and files that the Triton front and its client exchange."""

from __future__ import annotations

ABOUT_FILE = "about.json"
QUERY, FEATURES, DURATION = "QUERY", "FEATURES", "DURATION"
NUM_FRAMES, TOP_K, WINDOWS, ALWAYS_ANSWER = "NUM_FRAMES", "TOP_K", "WINDOWS", "ALWAYS_ANSWER"
MOMENTS, COUNT = "MOMENTS", "COUNT"
NO_WINDOWS = (0.0, 0.0, 0.0)
"""Value of WINDOWS for a video that is not split."""
