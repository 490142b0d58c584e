"""Write a small corpus with every error of a pair, and read its shards."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from runtime.corpus.job import Result, ground
from runtime.corpus.sharding import Settings

Row = dict[str, Any]
# The fixtures `here` and `corpus`.
Here = Callable[..., Result]
Corpus = Callable[[Iterable[Row]], tuple[Path, Path]]


def write_rows(path: Path, rows: Iterable[Row]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def read_rows(output: Path) -> list[Row]:
    """Return every row of every shard, in order."""
    return [json.loads(line) for path in sorted(output.glob("shard-*.jsonl")) for line in path.read_text().splitlines()]


def content(output: Path) -> dict[str, bytes]:
    """Return the bytes of all files of a complete corpus; its directory must contain no other files."""
    names = {path.name: path for path in output.iterdir() if path.name not in ("corpus.json", ".lock", ".digests")}
    assert all(name.startswith("shard-") for name in names), sorted(names)
    return {name: path.read_bytes() for name, path in names.items()}


@pytest.fixture
def unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out the process of `parquet_check`, which has its own tests."""
    monkeypatch.setattr("runtime.corpus.feature_sources.check_metadata", lambda files: None)


@pytest.fixture
def corpus(mini: Path, tmp_path: Path) -> Corpus:
    """Return a function that writes the mini data set and a file of queries."""

    def make(rows: Iterable[Row]) -> tuple[Path, Path]:
        return mini, write_rows(tmp_path / "queries.jsonl", rows)

    return make


@pytest.fixture
def damaged(mini: Path) -> Path:
    """The mini data set with a video without features, one with invalid features, and one with too narrow features."""
    directory = mini / "C3D_unit16_overlap0.5_merged"
    (directory / "BBBB2.pt").unlink()
    (directory / "CCCC3.pt").write_bytes(b"no tensor")
    (directory / "DDDD4.pt").unlink()
    np.save(directory / "DDDD4.npy", np.ones((30, 8), np.float32))
    return mini


@pytest.fixture
def here(tiny_model: Path, tmp_path: Path) -> Here:
    """Return a function that grounds in this process: `here(features, queries, form=..., ...)`."""

    def run(
        features: Path, queries: Path, output: Path | None = None, model: Path = tiny_model, **about: Any
    ) -> Result:
        return ground(model, features, queries, output or tmp_path / "corpus", Settings(**about), actors=0)

    return run
