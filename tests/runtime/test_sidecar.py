"""`runtime.sidecar`: no plan is taken that its sidecar does not vouch for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from runtime.describe import describe
from runtime.errors import ModelFileError
from runtime.files import sha256
from runtime.manifest import Manifest
from runtime.sidecar import FORMAT, path_beside, read_sidecar


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
        "sha256": {path.name: sha256(path)},
    }
    path_beside(path).write_text(json.dumps(content))
    return path


def change(plan: Path, **fields: Any) -> None:
    content = json.loads(path_beside(plan).read_text())
    path_beside(plan).write_text(json.dumps({**content, **fields}))


def test_a_whole_pair_is_read(plan: Path, tiny_manifest: Manifest) -> None:
    assert read_sidecar(plan).manifest.vocabulary == tiny_manifest.vocabulary


def test_a_changed_plan_is_refused(plan: Path) -> None:
    plan.write_bytes(b"plaN")
    with pytest.raises(ModelFileError, match="is not the plan"):
        read_sidecar(plan)


def test_a_plan_under_another_name_is_refused(plan: Path) -> None:
    other = plan.with_name("other.engine")
    other.write_bytes(plan.read_bytes())
    path_beside(other).write_text(path_beside(plan).read_text())
    with pytest.raises(ModelFileError, match="is not the plan"):
        read_sidecar(other)


@pytest.mark.parametrize("fields", [{"format": "drn-engine/9"}, {"manifest": {}}, {"sha256": None}])
def test_a_sidecar_of_another_kind_is_refused(plan: Path, fields: dict[str, Any]) -> None:
    change(plan, **fields)
    with pytest.raises(ModelFileError):
        read_sidecar(plan)


def test_a_plan_without_sidecar_is_refused(plan: Path) -> None:
    path_beside(plan).unlink()
    with pytest.raises(ModelFileError, match="does not exist"):
        read_sidecar(plan)


def test_describe_tells_of_an_engine(plan: Path, capsys: pytest.CaptureFixture[str]) -> None:
    describe(plan)
    told = capsys.readouterr().out
    assert "tensorrt 11.4.0, for 9.0" in told
    assert "97.0 % fp16, 3.0 % fp32" in told
    assert "profile: one query" in told
