"""`conftest`: directories of tests skip as a whole where what they need is not installed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.conftest import NEEDED

ROOT = Path(__file__).parents[1]
WITHOUT = """
import sys
from importlib.machinery import PathFinder

class Without(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name == sys.argv[1] else PathFinder.find_spec(name, path, target)

sys.meta_path = [Without if finder is PathFinder else finder for finder in sys.meta_path]

import pytest
sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", sys.argv[2]]))
"""


def test_tests_of_missing_extra_are_skipped_with_reason() -> None:
    directory, (names, reason) = next(iter(NEEDED.items()))
    words = [sys.executable, "-c", WITHOUT, names[0], str(directory)]
    done = subprocess.run(
        words, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 5, done.stdout + done.stderr
    assert reason in done.stdout
    assert f"{len(list(directory.glob('test_*.py')))} skipped" in done.stdout
