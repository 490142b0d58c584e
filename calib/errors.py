"""Define the errors of calibration and quantization."""

from __future__ import annotations

from runtime.core.errors import GroundingError


class CalibrationError(GroundingError):
    """A calibration set, table or plan that cannot be used for what was asked."""
