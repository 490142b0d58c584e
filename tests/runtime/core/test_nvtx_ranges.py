"""Test `runtime.core.nvtx_ranges`: steps of a query become NVTX ranges if `nvtx` is installed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest

from runtime.core.nvtx_ranges import marked

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
import nvtx
from runtime import Grounder, Video

video = Video(np.random.default_rng(0).random((40, 16), np.float32), 400, 30.0)
seen = []
for model in sys.argv[1:]:
    grounder = Grounder.load(model, "cpu", 1)
    for pairs in ([(video, "person door")], [(video, "person"), (video, "door")]):
        grounder.ground_batch(pairs)
    seen.append(list(nvtx.seen))
    nvtx.seen.clear()
print(json.dumps(seen))
"""


def test_each_query_step_is_an_nvtx_range(tiny_model: Path, pair_files: Path, tmp_path: Path) -> None:
    # Functions are marked when `runtime` is imported.
    (tmp_path / "nvtx.py").write_text(NVTX)
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tiny_model), str(pair_files)],
        env={**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    for seen, once in zip(json.loads(result.stdout), ([], ["encode video"]), strict=True):
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
        steps = ["encode query", "network", "decode", "encode query", "encode query", "network", "decode"]
        assert names == [*steps[:1], *once, *steps[1:]]


@pytest.mark.parametrize("disabled", [True, False])
def test_disabled_or_missing_nvtx_wraps_no_function(monkeypatch: pytest.MonkeyPatch, disabled: bool) -> None:
    def step() -> None: ...

    nvtx = types.SimpleNamespace(annotate=pytest.fail) if disabled else None
    monkeypatch.setitem(sys.modules, "nvtx", nvtx)
    monkeypatch.setenv("NVTX_DISABLE", "1" if disabled else "")
    assert marked("network")(step) is step
