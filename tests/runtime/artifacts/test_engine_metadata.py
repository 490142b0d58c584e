"""Test `runtime.artifacts.engine_metadata`: a plan is accepted only if it matches its sidecar."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from runtime.artifacts.engine_metadata import FORMAT, metadata_path, read_sidecar, with_digest
from runtime.artifacts.manifest import Manifest
from runtime.core.errors import ModelFileError
from runtime.core.io.digests import sha256
from runtime.describe import describe
from runtime.doctor import Finding
from tests.raising import check_error, raises


@pytest.fixture
def plan(tmp_path: Path, tiny_manifest: Manifest) -> Path:
    path = tmp_path / "drn.fp16.engine"
    path.write_bytes(b"plan")
    profile = {"name": "one query", "batch": [1, 1, 1], "query_length": [1, 8, 16], "shapes": {}}
    content = {
        "format": FORMAT,
        "manifest": tiny_manifest.to_dict(),
        "library": "tensorrt 11.4.0",
        "compute_capabilities": ["9.0"],
        "profiles": [profile],
        "census": {"twin": {"shares": {"fp16": 0.97, "fp32": 0.03}}},
        "sha256": {path.name: sha256(path), "twin.of.it.onnx": "0" * 64},
    }
    metadata_path(path).write_text(json.dumps(with_digest(content)))
    return path


REMOVED = object()


def change(plan: Path, **fields: Any) -> None:
    """Replace or remove fields of a sidecar, and write its digest."""
    content = {**json.loads(metadata_path(plan).read_text()), **fields}
    content = {key: value for key, value in content.items() if value is not REMOVED}
    metadata_path(plan).write_text(json.dumps(with_digest(content)))


def test_engine_with_metadata_is_read(plan: Path, tiny_manifest: Manifest) -> None:
    assert read_sidecar(plan).manifest.vocabulary == tiny_manifest.vocabulary


def test_changed_or_renamed_engine_is_rejected(plan: Path) -> None:
    other = plan.with_name("other.engine")
    other.write_bytes(plan.read_bytes())
    metadata_path(other).write_text(metadata_path(plan).read_text())
    plan.write_bytes(b"plaN")
    for path in (plan, other):
        with raises(ModelFileError, "digest_mismatch", path):
            read_sidecar(path)


@pytest.mark.parametrize("key", ["manifest", "profiles", "digest"])
def test_edited_or_removed_metadata_field_is_rejected(plan: Path, key: str) -> None:
    content = json.loads(metadata_path(plan).read_text())
    removed = {name: value for name, value in content.items() if name != key}
    for edited in (removed, {**content, key: content[key] * 2 if key != "manifest" else {}}):
        metadata_path(plan).write_text(json.dumps(edited))
        with raises(ModelFileError, "digest_mismatch", metadata_path(plan), "python -m export.build_engine"):
            read_sidecar(plan)


def test_metadata_digest_ignores_json_formatting(plan: Path) -> None:
    content = json.loads(metadata_path(plan).read_text())
    assert with_digest(content) == content
    assert (
        with_digest({**content, "shape": (1, 2), "by_size": {10: "a", 9: "b"}})["digest"]
        == (with_digest({**content, "by_size": {"9": "b", "10": "a"}, "shape": [1, 2]})["digest"])
    )
    metadata_path(plan).write_text(json.dumps(dict(reversed(content.items())), indent=7))
    read_sidecar(plan)


PROFILE = {"name": "one query", "batch": [1, 1, 1], "query_length": [1, 8, 16]}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("manifest", "fp16"),
        ("sha256", None),
        ("sha256", {"drn.fp16.engine": 7}),
        ("library", 10),
        ("target", ["tensorrt"]),
        ("gpu", 9.0),
        ("compute_capabilities", "9.0"),
        ("profiles", "x"),
        ("profiles", [7]),
        ("profiles", [{**PROFILE, "name": None}]),
        ("profiles", [{**PROFILE, "batch": [1, 2]}]),
        ("profiles", [{**PROFILE, "query_length": [1, 8, "16"]}]),
        ("profiles", [{"name": "one query", "batch": [1, 1, 1]}]),
        ("options", []),
        ("unrolled", ["drn.fp16.8.engine"]),
        ("unrolled", {"drn.fp16.8.engine": 8}),
        *(("unrolled", {name: "0" * 64}) for name in ("", ".", "..", "../drn.fp16.8.engine", "C:\\drn.8.engine", "8")),
        ("census", 7),
        ("census", {"twin": 7}),
        ("census", {"twin": {"shares": {"fp16": "most"}}}),
        ("census", {"engine": {"layers": 7}}),
        *((field, REMOVED) for field in ("manifest", "sha256", "library", "profiles")),
    ],
)
def test_malformed_metadata_field_is_named_in_error(plan: Path, field: str, value: Any, refused: Any) -> None:
    change(plan, **{field: value})
    check_error(refused(describe, plan), "damaged_file", metadata_path(plan), repr(field))


def test_precision_audit_of_the_graph_alone_is_valid(plan: Path) -> None:
    change(plan, census={"twin": {"shares": {"fp16": 1}}, "engine": None}, gpu=None)
    read_sidecar(plan)


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        ({"format": "drn-engine/9"}, "unknown_format"),
        ({"manifest": {}}, "unknown_format"),
        ({"sha256": {}}, "digest_mismatch"),
    ],
)
def test_metadata_file_of_another_kind_is_rejected(plan: Path, fields: dict[str, Any], code: str) -> None:
    change(plan, **fields)
    with raises(ModelFileError, code, plan):
        read_sidecar(plan)


def test_engine_without_metadata_file_is_rejected(plan: Path) -> None:
    metadata_path(plan).unlink()
    with raises(ModelFileError, "missing_file", metadata_path(plan), plan.name, "python -m export.build_engine"):
        read_sidecar(plan)


def test_describe_prints_engine_facts(plan: Path, capsys: pytest.CaptureFixture[str]) -> None:
    describe(plan)
    output = capsys.readouterr().out
    assert "tensorrt 11.4.0, for 9.0" in output
    assert "97.0 % fp16, 3.0 % fp32" in output
    assert "profile: one query" in output
    assert "unrolled" not in output
    change(plan, unrolled={"drn.fp16.12.engine": "0" * 64, "drn.fp16.8.engine": "1" * 64})
    describe(plan)
    assert "queries of at most 8 and 12 tokens" in capsys.readouterr().out


@pytest.mark.parametrize(("works", "runs"), [(False, "twin.of.it.onnx"), (True, "drn.fp16.engine")])
def test_without_gpu_the_onnx_graph_in_metadata_is_suggested(
    plan: Path, works: bool, runs: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("runtime.describe.gpus", lambda: [Finding("NVIDIA GPU", works, "")])
    with caplog.at_level("INFO", "drn"):
        describe(plan)
    assert f"runtime.infer --model {plan.with_name(runs)} " in caplog.text


def test_multi_line_hash_gives_one_line_error(plan: Path) -> None:
    change(plan, sha256={plan.name: "\n" + "0" * 63})
    with pytest.raises(ModelFileError) as caught:
        read_sidecar(plan)
    assert "\n" not in str(caught.value)
