"""Test `runtime.backends.engine_compatibility`: whether an engine runs on a machine, and how to rebuild it."""

from __future__ import annotations

import dataclasses
import inspect
from pathlib import Path
from typing import Any

import pytest

from runtime.artifacts.engine_metadata import Sidecar, read_sidecar
from runtime.artifacts.manifest import Manifest
from runtime.backends import engine_compatibility
from runtime.backends.engine_compatibility import HostInfo, rebuild_command
from tests.raising import quotes
from tests.runtime.engine_bench import Bench, edit_metadata
from tests.runtime.planted import PlantedBackend

H100 = HostInfo("tensorrt 10.16.0", "NVIDIA H100", "9.0")
COMPATIBLE = {"options": {"version_compatible": True}}
HARDWARE = {"options": {"hardware_compatible": True}}
RTX = {"target": "tensorrt-rtx", "library": "tensorrt_rtx 1.7.1", "gpu": None, "compute_capabilities": ["8.6", "8.9"]}
PLAN = Path("models/drn.int8.engine")


@pytest.fixture
def about() -> Manifest:
    sources = {"drn.pt": "0" * 64, "drn.onnx": "1" * 64}
    return dataclasses.replace(PlantedBackend().manifest, precision="int8", sources=sources)


def sidecar_of(manifest: Manifest, **content: Any) -> Sidecar:
    profiles = [
        {"name": "one query", "batch": [1, 1, 1], "query_length": [1, 8, 16]},
        {"name": "several queries", "batch": [2, 8, 32], "query_length": [1, 8, 16]},
    ]
    known = {
        "library": "tensorrt 10.16.0",
        "target": "tensorrt",
        "gpu": "NVIDIA H100, 580.1, 81559 MiB, 9.0",
        "compute_capabilities": [],
        "options": {"version_compatible": False, "hardware_compatible": False},
        "profiles": profiles,
        "sha256": {"drn.int8.engine": "2", "drn.int8.onnx": "3"},
    }
    return Sidecar(manifest, {**known, **content})


@pytest.mark.parametrize(
    ("content", "changed", "values"),
    [
        ({}, {}, None),
        ({}, {"gpu": "NVIDIA H100 MIG 1g.10gb"}, ["NVIDIA H100 MIG 1g.10gb"]),
        ({}, {"gpu": "NVIDIA H200"}, ["NVIDIA H100 (9.0)", "NVIDIA H200 (9.0)"]),
        ({}, {"capability": "8.0"}, ["NVIDIA H100 (9.0)", "NVIDIA H100 (8.0)"]),
        ({}, {"library": "tensorrt 10.16.1"}, ["tensorrt 10.16.0", "NVIDIA H100 (9.0)", "tensorrt 10.16.1"]),
        ({}, {"library": "tensorrt_rtx 1.7.1"}, ["tensorrt_rtx 1.7.1", "tensorrt 10.16.0"]),
        ({}, {"library": None, "library_error": "No module"}, ["No module"]),
        ({}, {"gpu": None, "gpu_error": "no driver"}, ["no driver"]),
        (COMPATIBLE, {"library": "tensorrt 10.16.1"}, None),
        (COMPATIBLE, {"library": "tensorrt 10.20.0"}, None),
        (COMPATIBLE, {"library": "tensorrt_lean 10.16.0"}, None),
        (COMPATIBLE, {"library": "tensorrt 10.9.0"}, ["tensorrt 10.16.0", "tensorrt 10.9.0"]),
        (COMPATIBLE, {"library": "tensorrt 11.4.0"}, ["tensorrt 10.16.0", "tensorrt 11.4.0"]),
        (COMPATIBLE, {"gpu": "NVIDIA H200"}, ["NVIDIA H100", "NVIDIA H200"]),
        (HARDWARE, {"gpu": "NVIDIA A100", "capability": "8.0"}, None),
        (HARDWARE, {"gpu": "NVIDIA B200", "capability": "10.0"}, None),
        (HARDWARE, {"gpu": "NVIDIA T4", "capability": "7.5"}, ["Ampere", "NVIDIA T4"]),
        (RTX, {"library": "tensorrt_rtx 1.7.1", "gpu": "RTX 3090", "capability": "8.6"}, None),
        (RTX, {"library": "tensorrt_rtx 1.7.1"}, ["8.6, 8.9", "NVIDIA H100"]),
        ({"gpu": None}, {"gpu": "anything", "capability": "8.0"}, None),
    ],
)
def test_incompatibility_names_engine_and_machine(
    about: Manifest, content: dict[str, Any], changed: dict[str, Any], values: list[str] | None
) -> None:
    machine = dataclasses.replace(H100, **changed)
    reason = engine_compatibility.incompatibility(PLAN, sidecar_of(about, **content), machine)
    if values is None:
        assert reason is None
    else:
        assert quotes(str(reason), "drn.int8.engine", *values)
        assert quotes(str(reason), "python -m export.build_engine") or quotes(str(reason), "models/drn.int8.onnx")


def test_rebuild_command_is_complete_with_existing_flags(about: Manifest) -> None:
    pytest.importorskip("onnx")
    from export.build_engine import build_engine

    compatible = {"version_compatible": True, "hardware_compatible": True}
    command = rebuild_command(PLAN, sidecar_of(about, options=compatible))
    assert command == (
        "python -m export.build_engine --model models/drn.onnx --precision int8 --target tensorrt --data DIR "
        "--batch 1 8 32 --query-length 1 8 16 --unroll 0 --version-compatible --hardware-compatible "
        "--output models/drn.int8.engine"
    )
    flags = {word[2:].replace("-", "_") for word in command.split() if word.startswith("--")}
    assert flags <= set(inspect.signature(build_engine).parameters)


@pytest.mark.parametrize("part", ["video", "query"])
def test_rebuild_command_of_a_part_builds_the_split_model(about: Manifest, part: Any) -> None:
    manifest = dataclasses.replace(about, part=part, sources={**about.sources, "drn.int8.onnx": "2" * 64})
    command = rebuild_command(Path(f"models/drn.int8.{part}.engine"), sidecar_of(manifest))
    assert "--model models/drn.onnx " in command
    assert command.endswith("--split --output models/drn.int8.query.engine")


def test_rebuild_command_includes_short_query_engines(bench: Bench, tmp_path: Path) -> None:
    bench.pair(unroll=(6, 3)).close()
    plan, shorter = (tmp_path / f"drn.query{tokens}.engine" for tokens in ("", ".6"))
    expected = rebuild_command(plan, read_sidecar(plan), 20)
    assert f"--query-length 2 8 20 --unroll 3 6 --split --output {plan}" in expected
    assert rebuild_command(shorter, read_sidecar(shorter), 20) == expected
    # Next to a plan that does not record it, or without one, it is built alone.
    edit_metadata(plan, unrolled={})
    alone = rebuild_command(shorter, read_sidecar(shorter))
    plan.unlink()
    assert rebuild_command(shorter, read_sidecar(shorter)) == alone
    assert alone.endswith(f"--query-length 6 6 6 --unroll 0 --split --output {shorter}")


def test_unrolled_steps_are_read_from_file_names() -> None:
    names = ("a.fp16.12.engine", "a.6.engine", "a.fp16.9.rejected.engine", "8.engine", "a.²5.engine", "x.engine")
    assert engine_compatibility.unrolled_steps({"unrolled": dict.fromkeys(names, "")}) == [6, 9, 12]
    assert engine_compatibility.unrolled_steps({}) == []


def test_lean_runtime_is_used_only_for_compatible_engines() -> None:
    assert engine_compatibility.libraries({"target": "tensorrt"}) == ("tensorrt",)
    assert engine_compatibility.libraries({"target": "tensorrt", **COMPATIBLE}) == ("tensorrt", "tensorrt_lean")
    assert engine_compatibility.libraries(RTX) == ("tensorrt_rtx",)
    assert engine_compatibility.libraries({"target": "abacus"}) == ()
