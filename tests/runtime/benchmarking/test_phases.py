"""Test `runtime.benchmarking.phases`: the phases together answer as the grounder."""

from __future__ import annotations

import pytest

from runtime import Grounder
from runtime.benchmarking.phases import time_phases
from runtime.benchmarking.workload import synthetic_workload
from tests.runtime.planted import PlantedBackend, PlantedPair


@pytest.mark.parametrize("split", [False, True])
def test_time_phases_returns_same_moments_as_grounder(split: bool) -> None:
    backend = PlantedBackend()
    grounder = Grounder(PlantedPair(backend) if split else backend)
    pairs = synthetic_workload([backend.manifest]).pairs[:12]
    ticks = iter(range(100))
    answers, seconds = time_phases(grounder, pairs, lambda: float(next(ticks)))
    assert answers == grounder.ground_batch(pairs)
    assert len(answers[0]) > 0
    assert set(seconds.values()) == {1.0}
    assert ("encode" in seconds) is split
