"""The public interface of version 0.1 is still there: additions are free, removals and changes are not.

`tests/contracts/v0.1.json` was recorded on 2026-11-29. A new name, flag, key or route needs no new record.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import contract_recorder as recorder

ROOT = Path(__file__).parents[1]
RECORD = Path(__file__).parent / "contracts" / "v0.1.json"


@pytest.fixture(scope="module")
def recorded() -> dict[str, Any]:
    return json.loads(RECORD.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("stored")
    with tarfile.open(Path(__file__).parent / "artifacts" / "v0.1.tar.xz") as archive:
        archive.extractall(directory, filter="data")
    return directory


@pytest.fixture(scope="module")
def service(stored: Path) -> Iterator[str]:
    """The address of a running service."""
    pytest.importorskip("fastapi", reason="the service needs the extra [serve]")
    words = ["--model", stored / "drn.query.onnx", "--data", stored / "data", "--port", 0, "--uploads", stored / "up"]
    process = subprocess.Popen(
        [sys.executable, "-m", "runtime.serve", *map(str, words)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    yield process.stdout.readline().strip().rstrip("/")
    process.terminate()
    process.wait(30)


def missing(expected: Any, actual: Any, path: str = "") -> list[str]:
    """Return where `actual` lacks, or differs from, what `expected` holds; additions to tables and lists are free."""
    if isinstance(expected, dict):
        if not isinstance(actual, dict):
            return [f"{path}: {actual!r} in place of a table"]
        return [
            problem
            for key, value in expected.items()
            for problem in (
                missing(value, actual[key], f"{path}/{key}") if key in actual else [f"{path}/{key}: removed"]
            )
        ]
    if isinstance(expected, list) and all(isinstance(item, str) for item in expected):
        return [f"{path}/{item}: removed" for item in expected if item not in actual]
    return [] if expected == actual else [f"{path}: {actual!r} in place of {expected!r}"]


def test_commands_accept_the_recorded_options(recorded: dict[str, Any]) -> None:
    actual = recorder.commands()
    assert missing(recorded["commands"], actual) == []
    for command, options in actual.items():
        required = {name for name, option in options.items() if "default" not in option}
        before = {name for name, option in recorded["commands"][command].items() if "default" not in option}
        assert required == before, f"{command} requires other options"


def test_python_interface_has_the_recorded_signatures(recorded: dict[str, Any]) -> None:
    assert missing(recorded["python"], recorder.python_interface()) == []


def test_graphs_have_the_recorded_inputs_and_outputs(recorded: dict[str, Any], stored: Path, tmp_path: Path) -> None:
    from export.to_onnx import to_onnx

    to_onnx(stored / "drn.pt", tmp_path / "drn.onnx", split=True, prepare=True)
    assert missing(recorded["graphs"], recorder.graphs(tmp_path)) == []
    written = recorder.formats(tmp_path)
    assert missing({name: recorded["formats"][name] for name in written}, written) == []


def test_results_have_the_recorded_keys(recorded: dict[str, Any], stored: Path, tmp_path: Path) -> None:
    from runtime.evaluate import evaluate
    from runtime.ground_corpus import ground_corpus

    model, data = stored / "drn.onnx", stored / "data"
    evaluate(model, data, output=tmp_path / "report.json", predictions=tmp_path / "predictions.jsonl", device="cpu")
    ground_corpus(
        stored / "drn.query.onnx", data, stored / "queries.jsonl", tmp_path / "corpus", actors=0, shard_pairs=3
    )
    written = recorder.formats(tmp_path)
    assert missing({name: recorded["formats"][name] for name in written if name in recorded["formats"]}, written) == []
    assert {"report.json", "predictions.jsonl", "corpus/corpus.json"} <= set(written)


def test_service_has_the_recorded_routes_and_metrics(recorded: dict[str, Any], service: str) -> None:
    with urllib.request.urlopen(f"{service}/openapi.json", timeout=30) as reply:
        assert missing(recorded["http"], recorder.routes(json.load(reply))) == []
    with urllib.request.urlopen(f"{service}/metrics", timeout=30) as reply:
        names = {line.split()[2] for line in reply.read().decode().splitlines() if line.startswith("# TYPE drn_")}
    assert set(recorded["metrics"]) <= names


def test_missing_reports_removals_and_changes() -> None:
    expected = {"a": {"default": 1}, "b": ["x", "y"]}
    assert missing(expected, {"a": {"default": 1, "more": 2}, "b": ["y", "x", "z"], "c": 3}) == []
    assert len(missing(expected, {"a": {"default": 2}, "b": ["x"]})) == 2
    assert len(missing(expected, {"b": ["x", "y"]})) == 1
