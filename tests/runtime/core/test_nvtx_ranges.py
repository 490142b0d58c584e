"""Test `runtime.core.nvtx_ranges`: steps of a query become NVTX ranges if `nvtx` is installed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.runtime.backends.test_tensorrt_backend import Graphs, graphs

__all__ = ["graphs"]

ROOT = Path(__file__).parents[3]
# nvtx 0.2 has a context manager that is also a decorator, with these keywords.
NVTX = """
from contextlib import ContextDecorator

seen = []

class annotate(ContextDecorator):
    def __init__(self, message=None, color=None, domain=None, category=None):
        self.message, self.domain = message, domain

    def __enter__(self):
        seen.append(("start", self.domain, self.message))
        return self

    def __exit__(self, *exc):
        seen.append(("end", self.domain, self.message))
        return False
"""
PROGRAM = """
import json, sys
import numpy as np
from runtime import Grounder, Video

grounder = Grounder.load(sys.argv[1], "cpu", 1)
video = Video(np.random.default_rng(0).random((40, 16), np.float32), 400, 30.0)
for pairs in ([(video, "word1 word2")], [(video, "word1"), (video, "word2")]):
    grounder.ground_batch(pairs)
seen = sys.modules["nvtx"].seen if "nvtx" in sys.modules else None
print(json.dumps([seen, hasattr(Grounder._run_rows, "__wrapped__")]))
"""


def ranges(model: Path, folder: Path, **environment: str) -> list[object]:
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(model)],
        env={**os.environ, "PYTHONPATH": f"{folder}{os.pathsep}{ROOT}", "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    return list(json.loads(result.stdout))


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    (tmp_path / "nvtx.py").write_text(NVTX)
    return tmp_path


@pytest.mark.parametrize("part", ["whole", "query"])
def test_each_query_step_is_an_nvtx_range(graphs: Graphs, installed: Path, part: str) -> None:
    seen, _ = ranges(getattr(graphs, part), installed)
    assert isinstance(seen, list)
    assert {domain for _, domain, _ in seen} == {"drn"}
    # Ranges end in the reverse order of their starts.
    opened: list[str] = []
    names: list[str] = []
    for kind, _, name in seen:
        if kind == "start":
            opened.append(name)
            names.append(name)
        else:
            assert opened.pop() == name
    assert not opened
    once = ["encode video"] if part == "query" else []
    assert names == ["encode query", *once, "network", "decode", "encode query", "encode query", "network", "decode"]


def test_disabled_nvtx_wraps_no_function(graphs: Graphs, installed: Path) -> None:
    assert ranges(graphs.whole, installed, NVTX_DISABLE="1") == [None, False]
    (installed / "nvtx.py").write_text("raise ImportError")
    assert ranges(graphs.whole, installed) == [None, False]
