"""Every reader against damaged files, and the fuzzer against readers that fail."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path

import numpy as np
import pytest

from runtime.core.errors import FeatureError
from tests import fuzzing
from tests.forked_commands import ForkedCommand
from tests.fuzz_readers import READERS
from tests.fuzzing import Finding, Reader, fuzz

CASES = 40


@pytest.fixture(scope="module")
def report() -> str:
    """Output of the fuzzer over all readers.

    It runs in a process without the threads of other tests, with which a forked process may hang or crash.
    """
    return ForkedCommand(["python", "-m", "tests.fuzzing", "--cases", str(CASES)]).finish().stdout


@pytest.mark.parametrize("name", [reader.name for reader in READERS])
def test_reader_of_damaged_file_returns_or_raises_one_error(name: str, report: str) -> None:
    lines = report.splitlines()
    assert any(line.startswith(f"{name} ") and " cases, " in line for line in lines), report[-2000:]
    assert not [line for line in lines if line.startswith(f"  --reader {name} ")]


def _make(directory: Path) -> list[Path]:
    (directory / "file").write_bytes(b"whole")
    return [directory / "file"]


def _findings(harm: object) -> list[Finding]:
    """Return what is found of a reader that does harm to whatever is not whole."""

    def read(directory: Path, path: Path) -> None:
        if path.read_bytes() != b"whole":
            assert callable(harm)
            harm()

    return fuzz(Reader("harmful", _make, read), [3])


def _raise(error: Exception) -> None:
    raise error


@pytest.mark.parametrize(
    ("harm", "what"),
    [
        (lambda: _raise(KeyError("x")), "KeyError"),
        (lambda: _raise(FeatureError("two\nlines")), "line"),
        (lambda: time.sleep(600), "no end after 1 s"),
        (lambda: [None for _ in iter(int, 1)], "no end after 0.5 s of CPU time"),
        (lambda: os.kill(os.getpid(), signal.SIGSEGV), "SIGSEGV"),
        (lambda: np.ones(100 << 20, np.uint8), "grew"),
    ],
)
def test_fuzz_reports_forbidden_outcomes(monkeypatch: pytest.MonkeyPatch, harm: object, what: str) -> None:
    limits = {"no end after 1 s": {"TIMEOUT_S": 1.0}, "grew": {"MAX_GROWTH_BYTES": 50 << 20}}
    for name, value in limits.get(what, {"CPU_S": 0.5}).items():
        monkeypatch.setattr(fuzzing, name, value)
    (finding,) = _findings(harm)
    assert (finding.reader, finding.seed) == ("harmful", 3)
    assert what in finding.what


@pytest.mark.parametrize("end", [lambda: os.kill(os.getpid(), signal.SIGKILL), lambda: time.sleep(600)])
def test_killed_worker_leaves_no_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: object) -> None:
    monkeypatch.setenv("DRN_FUZZ_DIRECTORY", str(tmp_path))
    monkeypatch.setattr(fuzzing, "TIMEOUT_S", 1.0)
    assert _findings(end)
    assert not list(tmp_path.iterdir())


def test_fuzz_accepts_one_line_errors_and_values() -> None:
    assert _findings(lambda: _raise(FeatureError("one sentence"))) == []
    assert _findings(lambda: None) == []


def test_fuzz_reports_reader_that_rejects_valid_files() -> None:
    def read(directory: Path, path: Path) -> None:
        raise FeatureError("always")

    (finding,) = fuzz(Reader("useless", _make, read), range(5))
    assert "whole" in finding.what


def test_fuzz_mutation_is_deterministic_per_seed() -> None:
    content = bytes(range(256))
    for seed in range(50):
        assert fuzzing.mutated(content, random.Random(seed)) == fuzzing.mutated(content, random.Random(seed))
