"""Test `export.engine.engine_writer`: verdicts, second attempts, metadata, and builds that fail."""

from __future__ import annotations

import contextlib
import errno
import gzip
import json
import logging
import os
from pathlib import Path
from typing import Any

import pytest

from calib.graph.fp32_scales import has_half_scales
from export.build_engine import build_engine
from export.engine.builder import BuildFailed, BuiltEngine
from export.engine.inspector import PlanNotLoaded
from runtime.artifacts.engine_layers import CONTRADICTED, NOT_PROVEN, PROVEN, layers_path, packed, read_layers_file
from runtime.artifacts.engine_metadata import read_sidecar
from runtime.backends.engine_compatibility import rebuild_command
from runtime.backends.onnxruntime_session import _cuda_options
from runtime.backends.tensorrt_backend import short_query_plans
from runtime.core.errors import CheckFailed, ModelFileError, OutputError
from runtime.core.io.digests import sha256
from runtime.describe import describe
from tests.export.engine.builder_double import gpu, stand_in
from tests.export.engine.engine_builds import Attempt, EngineBuilds, inspected
from tests.export.engine.inspector_doubles import document
from tests.raising import raises, records

ENGINES: dict[str, Any] = {"target": "tensorrt", "query_length": (1, 8, 12)}


def contents(directory: Path) -> dict[str, bytes]:
    """Return the files of a directory by name, without lock files."""
    return {path.name: path.read_bytes() for path in directory.iterdir() if not path.name.startswith(".")}


@pytest.mark.parametrize(
    ("version", "scenario", "verdict"),
    [("8.6.1", "convolutions", PROVEN), ("10.16.1", "foreign", NOT_PROVEN), ("11.4.0", "wide", CONTRADICTED)],
)
def test_build_result_follows_inspector_verdict(
    version: str,
    scenario: str,
    verdict: str,
    model: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    library, _ = stand_in(version, scenario)
    monkeypatch.setattr("export.engine.builder.load_library", lambda target: library)
    monkeypatch.setattr("export.build.run_build.unavailable_reason", lambda target: None)
    monkeypatch.setattr("export.engine.inspector.Cuda", gpu)
    rejected = verdict == CONTRADICTED
    with raises(CheckFailed, "precision_contradicted", "fp16") if rejected else contextlib.nullcontext():
        build_engine(model, **ENGINES, unroll=(0,))
    engine = model.with_name("drn.fp16.rejected.engine" if rejected else "drn.fp16.engine")
    assert read_sidecar(engine).content["census"]["verdict"] == verdict
    layers = read_layers_file(layers_path(engine))
    assert [view["name"] for view in layers["profiles"]] == ["one query", "several queries"]
    assert layers["unbound"] == json.loads(document(version, scenario, bound=False), strict=False)
    assert layers["profiles"][1]["bound"] == json.loads(document(version, scenario, bound=True), strict=False)
    capsys.readouterr()
    describe(engine)
    described = capsys.readouterr().out
    assert verdict in described
    assert "layers: several queries" in described


def test_engine_that_was_not_opened_is_not_proven(
    model: Path,
    tensorrt: EngineBuilds,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    large = BuiltEngine(bytes(90_000_000), "tensorrt 11.4.0", True, None, None, "no GPU is here to open the plan")
    monkeypatch.setattr("export.engine.engine_writer.build", lambda *_: large)
    output = build_engine(model, **ENGINES, unroll=(0,))
    reported = read_sidecar(output).content["census"]
    assert (reported["verdict"], reported["engine"]) == (NOT_PROVEN, None)
    assert "90 MB" in reported["reason"]
    assert "not proven" in capsys.readouterr().out
    assert records(caplog, logging.WARNING, NOT_PROVEN)
    assert not layers_path(output).exists()


def test_layers_of_other_build_hidden(model: Path, tensorrt: EngineBuilds, capsys: pytest.CaptureFixture[str]) -> None:
    engine = build_engine(model, **ENGINES, unroll=(0,))
    complete = packed(inspected("wide"), engine.name, "0" * 64, "tensorrt 11.4.0")
    for layers in (complete, complete[:40], b"text", gzip.compress(b"[]"), gzip.compress(b"{}"), b""):
        layers_path(engine).write_bytes(layers)
        capsys.readouterr()
        describe(engine)
        described = capsys.readouterr().out
        assert "30 in fp32" not in described
        assert layers_path(engine).name in described


def refuse_two_profiles(attempt: Attempt) -> None:
    if len(attempt.options.profiles) > 1:
        # The message in NVIDIA/TensorRT#2977.
        raise PlanNotLoaded("tensorrt 8.6.1 cannot load the plan that it built: missing offset in id2offset.")


def test_two_profile_engine_that_fails_to_load_gets_one_profile(
    model: Path, tensorrt: EngineBuilds, capsys: pytest.CaptureFixture[str]
) -> None:
    tensorrt.before = refuse_two_profiles
    output = build_engine(model, **ENGINES, split=True, unroll=(4, 6), batch=(1, 4, 8))
    # The video part has one profile. Of the other plans only the first is built with two.
    assert [len(attempt.options.profiles) for attempt in tensorrt.attempts] == [1, 2, 1, 1, 1]
    # Each plan gets the timing cache of the plan before it.
    assert [attempt.timing_cache for attempt in tensorrt.attempts] == [None, b"1", b"1", b"3", b"4"]
    for name in ("drn.fp16.query.4.engine", "drn.fp16.query.6.engine", output.name):
        options = read_sidecar(output.with_name(name)).content["options"]
        assert options["profiles"] == 1
        assert any("--profiles 1" in change for change in options["changes"])
    (profile,) = read_sidecar(output).content["profiles"]
    assert profile["batch"] == [1, 4, 8]
    assert profile["shapes"]["query_tokens"] == [[1, 1], [4, 8], [8, 12]]
    assert "--profiles 1" in capsys.readouterr().out
    assert "--profiles 1" in rebuild_command(output, read_sidecar(output))


def test_timing_cache_of_an_earlier_build_has_priority(model: Path, tensorrt: EngineBuilds, tmp_path: Path) -> None:
    tensorrt.before = refuse_two_profiles
    cache = tmp_path / "times.cache"
    cache.write_bytes(b"earlier")
    build_engine(model, **ENGINES, profiles=1, unroll=(4,), timing_cache=cache)
    # With --profiles 1 each plan is built once.
    assert [attempt.timing_cache for attempt in tensorrt.attempts] == [b"earlier", b"1"]
    assert cache.read_bytes() == b"2"


def test_one_profile_engine_that_fails_to_load_raises_error(model: Path, tensorrt: EngineBuilds) -> None:
    def fail(attempt: Attempt) -> None:
        raise PlanNotLoaded("no")

    tensorrt.before = fail
    for profiles, attempts in ((1, 1), (2, 3)):
        with pytest.raises(PlanNotLoaded):
            build_engine(model, **ENGINES, unroll=(0,), profiles=profiles)
        assert len(tensorrt.attempts) == attempts
    assert [*contents(model.parent)] == ["drn.onnx"]


def test_int8_build_failure_is_retried_with_fp32_scales(
    model: Path,
    table: Path,
    tensorrt: EngineBuilds,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(attempt: Attempt) -> None:
        if has_half_scales(attempt.graph):
            # NVIDIA/TensorRT#4832.
            raise BuildFailed("Could not infer output types for operation: dequantize")

    tensorrt.before, tensorrt.scenarios = fail, ["int8"]
    options: dict[str, Any] = {**ENGINES, "precision": "int8", "threads": 1, "unroll": (4, 6), "table": table}
    output = build_engine(model, **options)
    # The first plan is built twice, later ones have FP32 scales at once.
    assert [has_half_scales(attempt.graph) for attempt in tensorrt.attempts] == [True, False, False, False]
    for name in ("drn.int8.4.engine", "drn.int8.6.engine", output.name):
        assert read_sidecar(output.with_name(name)).content["options"]["changes"]
    assert "FP32" in capsys.readouterr().out
    # Without FP16 scales there is no second attempt.
    monkeypatch.setattr("export.engine.engine_writer.has_half_scales", lambda graph: False)
    with pytest.raises(BuildFailed):
        build_engine(model, **options)


def test_tf32_option_is_recorded_in_metadata(model: Path, tensorrt: EngineBuilds) -> None:
    tensorrt.scenarios = ["wide"]
    output = build_engine(model, **ENGINES, precision="fp32", unroll=(0,), tf32=True)
    assert [attempt.options.tf32 for attempt in tensorrt.attempts] == [True]
    sidecar = read_sidecar(output)
    assert sidecar.content["options"]["tf32"]
    assert "--tf32" in rebuild_command(output, sidecar)
    # ONNX Runtime reads the option from the graph.
    assert _cuda_options(model.with_name("drn.fp32.onnx"))["use_tf32"] == "1"


@pytest.mark.parametrize(("wide", "kept"), [(0, "drn.fp16.6.rejected"), (1, "drn.fp16.rejected")])
def test_contradicted_engine_leaves_all_unchanged(model: Path, tensorrt: EngineBuilds, wide: int, kept: str) -> None:
    tensorrt.scenarios = ["convolutions", "mixed"]
    output = build_engine(model, **ENGINES, unroll=(6,))
    before = contents(model.parent)
    assert {"drn.fp16.6.engine", "drn.fp16.6.engine.json", "drn.fp16.6.layers.json.gz"} < {*before}
    tensorrt.scenarios = ["wide" if index == wide else "convolutions" for index in range(2)]
    with raises(CheckFailed, "precision_contradicted", "fp16", f"{kept}.engine"):
        build_engine(model, **ENGINES, unroll=(6,))
    after = contents(model.parent)
    assert {*after} - {*before} == {f"{kept}.engine", f"{kept}.engine.json", f"{kept}.layers.json.gz"}
    assert {name: after[name] for name in before} == before
    # No other file of that build remains.
    rejected = output.with_name(f"{kept}.engine")
    assert not short_query_plans(rejected, read_sidecar(rejected))
    assert read_sidecar(rejected).content["census"]["verdict"] == CONTRADICTED
    layers = read_layers_file(layers_path(rejected))
    assert layers["sha256"] == sha256(rejected)
    assert [view["bound"]["Layers"][0]["Name"] for view in layers["profiles"]]
    assert [path.name for path, _ in short_query_plans(output, read_sidecar(output))] == ["drn.fp16.6.engine"]


@pytest.mark.parametrize(
    ("error", "number"),
    [(BuildFailed("No."), 0), (ModelFileError("No."), 1), (BuildFailed("No."), 2), (KeyboardInterrupt(), 1)],
)
def test_interrupted_build_has_no_file(model: Path, tensorrt: EngineBuilds, error: BaseException, number: int) -> None:
    def fail(attempt: Attempt) -> None:
        if len(tensorrt.attempts) > number:
            raise error

    model.with_name("drn.fp16.onnx").write_text("an earlier one")
    before = contents(model.parent)
    tensorrt.before = fail
    with pytest.raises(type(error)) as caught:
        build_engine(model, **ENGINES, unroll=(4, 6))
    assert len(tensorrt.attempts) == number + 1
    # Only engines for short queries can be left out.
    assert ("--unroll 0" in str(caught.value)) == (isinstance(error, ModelFileError) and number < 2)
    assert contents(model.parent) == before


@pytest.mark.parametrize("full", ["plan", "metadata"])
def test_full_disk_preserves_the_previous_engine(
    full: str, model: Path, tensorrt: EngineBuilds, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {**ENGINES, "precision": "fp32", "unroll": (0,)}
    tensorrt.scenarios = ["wide"]
    output = build_engine(model, **options)
    before, names = contents(model.parent), {*model.parent.iterdir()}
    name, suffix = ("write_bytes", ".engine") if full == "plan" else ("write_text", ".json")
    original = getattr(Path, name)

    def write(path: Path, content: Any, *arguments: Any, **others: Any) -> Any:
        if path.name.startswith(".") and path.suffix == suffix:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return original(path, content, *arguments, **others)

    tensorrt.plan = b"second"
    with monkeypatch.context() as patch:
        patch.setattr(Path, name, write)
        with raises(OutputError, "disk_full"):
            build_engine(model, **options)
    assert len(tensorrt.attempts) == 2
    assert {*model.parent.iterdir()} == names
    assert contents(model.parent) == before
    assert read_sidecar(output).manifest.precision == "fp32"
