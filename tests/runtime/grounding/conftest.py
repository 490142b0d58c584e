"""Define a model whose output is not finite."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from runtime import Grounder


@pytest.fixture
def overflowing(tiny_model: Path) -> Grounder:
    """Return a grounder whose boundaries are infinite, except for features of zeros."""
    grounder = Grounder.load(tiny_model)
    run = grounder.backend.run

    def run_to_infinity(batch: Any) -> Any:
        heads = run(batch)
        if batch.segment_features.any():
            heads.boundary_distances[...] = np.inf
        return heads

    grounder.backend.run = run_to_infinity  # type: ignore[method-assign]
    return grounder
