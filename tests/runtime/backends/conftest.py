"""Define the simulated machine on which tests open engines."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.runtime.engine_bench import Bench, Graphs


@pytest.fixture
def bench(tmp_path: Path, graphs: Graphs) -> Bench:
    return Bench(tmp_path, graphs)
