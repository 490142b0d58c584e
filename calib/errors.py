"""Define the error of calibration and quantization."""

from __future__ import annotations

from runtime.core.errors import GroundingError


class CalibrationError(GroundingError):
    """A calibration set, calibration table or quantization plan cannot be used."""
