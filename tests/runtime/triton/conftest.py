"""Write a small network, whole and split, as repositories for Triton, and videos to query."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import onnx
import pytest

from calib.graph.split_model import split_graph, write_split_model
from export.tracing.tracer import export_model
from export.triton import triton
from runtime import Grounder, Video
from runtime.core.sliding_windows import Windows
from tests.export.conftest import TINY, lively, manifest

BOTH = pytest.mark.parametrize("network", ["whole", "pair"])
QUERIES = ("word1 word2 word3", "word7", "word4 word9 word2 word11 word3", "word5 word6")


@pytest.fixture(scope="session")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network and its query part. Videos longer than a minute are grounded in windows."""
    about = dataclasses.replace(manifest(TINY), windows=Windows(60.0, 40.0, 10.0))
    model = export_model(lively(TINY), about)
    path = tmp_path_factory.mktemp("triton") / "drn.onnx"
    onnx.save(model, path)
    write_split_model(*split_graph(model), path)
    return path


@pytest.fixture(scope="session")
def query_part(graph: Path) -> Path:
    return graph.with_name("drn.query.onnx")


@pytest.fixture(scope="session")
def repositories(graph: Path, query_part: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Repositories of the unsplit ("whole") and of the split ("pair") network."""
    directory = tmp_path_factory.mktemp("served")
    return {name: triton(model, directory / name) for name, model in (("whole", graph), ("pair", query_part))}


@pytest.fixture
def network() -> str:
    """The network that is served; `BOTH` replaces it."""
    return "pair"


@pytest.fixture
def repository(repositories: dict[str, Path], network: str) -> Path:
    return repositories[network]


@pytest.fixture(scope="session")
def direct(graph: Path) -> Grounder:
    """The model file."""
    return Grounder.load(graph, "cpu", 1)


def video(num_clips: int, seed: int = 0, duration: float | None = None) -> Video:
    features = np.random.default_rng(seed).random((num_clips, TINY.feature_dim), np.float32)
    frames = 8 * num_clips + 11
    return Video(features, frames, duration or frames / 25, f"video {seed}")
