"""What can go wrong while numbers are narrowed."""

from __future__ import annotations

from runtime.core.errors import GroundingError


class CalibrationError(GroundingError):
    """A calibration set, table or plan that cannot be used for what was asked."""
