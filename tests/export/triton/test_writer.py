"""Test `export.triton`: repositories are written completely or not at all, and models get new versions."""

from __future__ import annotations

import ast
import dataclasses
import json
import logging
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

pytest.importorskip("tritonclient.grpc", reason="tritonclient has Triton's definitions")

from export.build_engine import build_engine
from export.triton import triton
from export.triton import writer as module
from export.triton.writer import read_config
from runtime.artifacts.manifest import METADATA_KEY
from runtime.artifacts.onnx_metadata import check
from runtime.core.errors import DeviceError, ModelFileError, OutputError
from tests.export.conftest import TINY, manifest
from tests.raising import raises, records
from tests.tritonserver import Server
from tests.written import written_checked


def imported(path: Path) -> set[str]:
    """Return the top-level names that a module imports, including local imports."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module.split(".")[0])
    return names


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    return tmp_path / "served" / "repository"


def files(directory: Path) -> dict[str, bytes]:
    """Return the content of each file by its path in the directory, without the bytecode that Python writes."""
    paths = (path for path in directory.rglob("*") if path.is_file() and path.parent.name != "__pycache__")
    return {str(path.relative_to(directory)): path.read_bytes() for path in paths}


def changed(graph: Path, **values: Any) -> Path:
    """Write a copy of the graph with another manifest."""
    model, path = onnx.load(graph), graph.with_name("other.onnx")
    onnx.helper.set_model_props(model, {METADATA_KEY: dataclasses.replace(manifest(TINY), **values).to_json()})
    onnx.save(model, path)
    return path


def request() -> dict[str, np.ndarray]:
    return {
        "QUERY": np.array([[b"word1 word2"]], object),
        "FEATURES": np.arange(1.0, 145.0, dtype=np.float32).reshape(1, 9, 16),
        "DURATION": np.array([[7.0]]),
    }


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_int8_graph_has_uint8_weights_on_a_cpu(model: Path, table: Path, repository: Path, device: Any) -> None:
    path = build_engine(model, precision="int8", table=table, target="onnxruntime")
    triton(path, repository, device=device)
    (served,) = repository.rglob("model.onnx")
    kinds = {tensor.data_type for tensor in onnx.load(served).graph.initializer if len(tensor.dims) > 1}
    assert (onnx.TensorProto.INT8 in kinds) == (device == "cuda")
    assert (onnx.TensorProto.UINT8 in kinds) == (device == "cpu")
    assert served.read_bytes() == path.read_bytes() if device == "cuda" else check(served).recorded is not None


def test_repository_contains_the_files_triton_reads(graph: Path, repository: Path) -> None:
    # A server in a container runs as another user.
    mask = os.umask(0o022)
    try:
        triton(graph, repository)
    finally:
        os.umask(mask)
    assert set(files(repository)) == {
        "drn/config.pbtxt",
        "drn/1/model.py",
        "drn/1/about.json",
        "drn_network/config.pbtxt",
        "drn_network/1/model.onnx",
        "drn_network/warmup/query_tokens",
        "drn_network/warmup/query_length",
        "drn_network/warmup/segment_spans",
    }
    assert (repository / "drn_network/1/model.onnx").read_bytes() == graph.read_bytes()
    assert [entry.name for entry in repository.parent.iterdir()] == ["repository"]
    for path in repository.rglob("*"):
        assert path.stat().st_mode & 0o444 == 0o444, path
    names = imported(repository / "drn" / "1" / "model.py")
    assert names == {"__future__", "pathlib", "triton_python_backend_utils", "runtime"}
    lines = (repository / "drn" / "config.pbtxt").read_text().splitlines()
    assert lines[0].startswith("# Written by `python -m export.triton` for drn.onnx (SHA-256 ")
    assert next(index for index, line in enumerate(lines) if "drn.front" in line) > len(lines) - 6


def test_command_prints_written_files_and_next_command(
    graph: Path, repository: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "drn")
    for version in (1, 2):
        with written_checked(repository.parents[1]):
            triton(graph.with_name("drn.query.onnx"), repository, name="charades")
        out = capsys.readouterr().out.splitlines()
        assert out[-1] == f"{repository / 'charades'}: version {version}"
        assert len(out) == 3
    assert records(caplog, logging.INFO, "runtime.infer --model triton://localhost:8001/charades")


def test_new_version_uses_its_own_network(graph: Path, repository: Path) -> None:
    triton(graph, repository)
    before = files(repository)
    first = Server(repository).infer("drn", request())
    words = {f"word{index}": 21 - index for index in range(1, 21)}
    other = changed(graph, vocabulary=type(manifest(TINY).vocabulary)(words))
    triton(other, repository)
    after = files(repository)
    assert after.keys() - before.keys() == {"drn/2/model.py", "drn/2/about.json", "drn_network/2/model.onnx"}
    # Only the parameters of the front changed.
    assert {name for name in before if after[name] != before[name]} == {"drn/config.pbtxt"}
    server = Server(repository)
    assert sorted(server.models["drn"]) == [1, 2]
    old, new = (server.infer("drn", request(), version)["MOMENTS"] for version in (1, 2))
    np.testing.assert_array_equal(old, first["MOMENTS"])
    assert not np.array_equal(old, new)
    assert [(name, version) for name, version, _ in server.calls] == [("drn_network", 1), ("drn_network", 2)]
    printed = read_config(repository / "drn" / "config.pbtxt").parameters["drn.front"].string_value
    assert json.loads(printed) == json.loads((repository / "drn/2/about.json").read_text())
    triton(graph, repository)
    assert sorted(Server(repository).models["drn"]) == [2, 3]
    # Other models in the repository are unchanged.
    before = files(repository)
    triton(graph, repository, name="second")
    assert before.items() <= files(repository).items()
    assert sorted(Server(repository).models) == ["drn", "drn_network", "second", "second_network"]


def test_edited_model_configs_are_preserved(graph: Path, repository: Path) -> None:
    triton(graph, repository)
    network, front = repository / "drn_network" / "config.pbtxt", repository / "drn" / "config.pbtxt"
    network.write_text(network.read_text() + "# ours\n")
    front.write_text(front.read_text().replace("count: 2", "count: 7"))
    triton(graph, repository)
    assert network.read_text().endswith("# ours\n")
    assert read_config(front).instance_group[0].count == 7


def test_incompatible_model_versions_are_rejected(graph: Path, repository: Path) -> None:
    triton(graph, repository)
    before = files(repository)
    with raises(OutputError, "version_mismatch", repository, 12, 9):
        triton(changed(graph, max_query_length=9), repository)
    with raises(OutputError, "version_mismatch", repository, "max_batch_size"):
        triton(graph, repository, batch=3)
    assert files(repository) == before
    # An unsplit model is no version of a split one.
    triton(graph.with_name("drn.query.onnx"), repository.with_name("pair"))
    with raises(OutputError, "version_mismatch", repository.with_name("pair"), "drn", "drn_network"):
        triton(graph, repository.with_name("pair"))


def test_foreign_repository_models_are_not_overwritten(graph: Path, repository: Path) -> None:
    for name in ("drn", "drn_network"):
        (repository / name / "1").mkdir(parents=True)
        (repository / name / "config.pbtxt").write_text(f'name: "{name}"\nbackend: "onnxruntime"\n')
    before = files(repository)
    with raises(OutputError, "output_exists", repository / "drn_network"):
        triton(graph, repository)
    (repository / "drn" / "config.pbtxt").write_text("not a configuration {")
    (repository / "drn_network" / "config.pbtxt").write_text("not a configuration {")
    with raises(ModelFileError, "invalid_model_config", repository / "drn_network" / "config.pbtxt"):
        triton(graph, repository)
    shutil.rmtree(repository / "drn_network")
    with raises(OutputError, "version_mismatch", repository, "drn", "drn_network"):
        triton(graph, repository)
    assert before.keys() >= files(repository).keys()


@pytest.mark.parametrize("versions", [0, 1])
def test_full_disk_leaves_the_repository_unchanged(
    graph: Path, repository: Path, versions: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for _ in range(versions):
        triton(graph, repository)
    before = files(repository.parent) if repository.parent.exists() else None
    replace, left = os.replace, [1]

    def fails(source: Any, target: Any) -> None:
        if not left:
            raise OSError(28, "No space left on device")
        left.pop()
        replace(source, target)

    monkeypatch.setattr(module.os, "replace", fails)
    with raises(OutputError, "unwritable_output", repository, "No space left on device"):
        triton(graph, repository)
    assert (files(repository.parent) if repository.parent.exists() else None) == before


def test_file_as_repository_is_rejected(graph: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with raises(OutputError, "output_is_file", tmp_path / "file"):
        triton(graph, tmp_path / "file")
    with raises(OutputError, "unwritable_output", tmp_path / "file"):
        triton(graph, tmp_path / "file" / "below")


def test_missing_triton_client_is_reported(graph: Path, repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tritonclient.grpc", None)
    with raises(DeviceError, "missing_library", "tritonclient.grpc", "'.[triton]'"):
        triton(graph, repository)
    assert not repository.exists()
