"""Test `export.build.run_build`: which engines for short queries are built, and what a dry run and reports contain."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch

from calib.graph.onnx_graph import read_manifest
from export.build_engine import build_engine
from export.engine.builder import BuildFailed
from export.engine.inspector import PlanNotLoaded
from runtime import Grounder
from runtime.artifacts.engine_layers import NOT_PROVEN
from runtime.artifacts.engine_metadata import read_sidecar
from runtime.artifacts.manifest import METADATA_KEY
from runtime.backends.engine_compatibility import rebuild_command, unrolled_steps
from runtime.core.errors import DeviceError, GroundingError, ModelFileError, ShapeError
from runtime.datasets.dataset import DataSet
from tests.export.engine.engine_builds import Attempt, EngineBuilds
from tests.raising import quotes, raises, records

LENGTHS = (1, 8, 12)


def change_manifest(model: Path, training: dict[str, Any] | None = None, **fields: Any) -> None:
    """Replace entries of `training` and other fields of the manifest of a graph."""
    graph = onnx.load(model)
    manifest = read_manifest(graph)
    manifest = dataclasses.replace(manifest, training={**manifest.training, **(training or {})}, **fields)
    onnx.helper.set_model_props(graph, {METADATA_KEY: manifest.to_json()})
    onnx.save(graph, model)


def record_quantiles(model: Path, *quantiles: int) -> None:
    change_manifest(model, {"query_length_quantiles": [*quantiles]})


def rename_lstm(model: Path) -> None:
    """Give an LSTM a name by which it cannot be unrolled."""
    graph = onnx.load(model)
    next(node for node in graph.graph.node if node.op_type == "LSTM").name = "another/LSTM"
    onnx.save(graph, model)


def test_tensorrt_build_adds_usual_query_length_engines(
    model: Path, planted: Path, tensorrt: EngineBuilds, capsys: pytest.CaptureFixture[str]
) -> None:
    data = DataSet(planted)
    vocabulary = Grounder.load(model).manifest.vocabulary
    lengths = sorted(len(vocabulary.encode(one.sentence, Counter())) for one in data.annotations("train"))
    expected = sorted({lengths[math.ceil(share * len(lengths)) - 1] for share in (0.9, 0.99)})
    tensorrt.scenarios = ["convolutions"] * len(expected) + ["mixed"]
    output = build_engine(model, target="tensorrt", data=planted, query_length=LENGTHS, threads=1, limit=4)
    assert tensorrt.tokens == [*expected, 0]
    assert unrolled_steps(read_sidecar(output).content) == expected
    assert quotes(capsys.readouterr().out, len(lengths), data.annotations_path("train"))
    # The recorded command reproduces the build with other data.
    report = json.loads(model.with_name("drn.fp16.parity.json").read_text())
    option = f"--unroll {' '.join(map(str, expected))}"
    assert option in report["command"]
    assert option in rebuild_command(output, read_sidecar(output))
    # The reports have the verdict of the engine.
    assert report["engine_precision"]["verdict"] == NOT_PROVEN
    assert "ForeignNode" in report["engine_precision"]["reason"]
    assert f"is {NOT_PROVEN}" in model.with_name("drn.fp16.passport.html").read_text()


@pytest.mark.parametrize(
    ("options", "tokens"),
    [
        # A length that is not below the maximum of the engine is left out.
        ({}, [5, 0]),
        ({"unroll": (0,)}, [0]),
        # The video part reads no tokens.
        ({"split": True}, [None, 5, 0]),
    ],
)
def test_usual_query_lengths_of_the_model_are_the_default(
    options: dict[str, Any], tokens: list[int | None], model: Path, tensorrt: EngineBuilds
) -> None:
    record_quantiles(model, 5, 12)
    output = build_engine(model, target="tensorrt", query_length=LENGTHS, **options)
    assert tensorrt.tokens == tokens
    sidecar = read_sidecar(output)
    assert unrolled_steps(sidecar.content) == [length for length in tokens if length]
    assert ("--unroll 0" in rebuild_command(output, sidecar)) == ("unroll" in options)
    if "split" in options:
        assert output.with_name("drn.fp16.query.5.engine").is_file()
        assert "unrolled" not in read_sidecar(output.with_name("drn.fp16.video.engine")).content


def test_lstm_that_cannot_be_unrolled_keeps_the_loop(
    model: Path, tensorrt: EngineBuilds, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    record_quantiles(model, 4, 6)
    rename_lstm(model)
    build_engine(model, target="tensorrt", query_length=LENGTHS)
    assert tensorrt.tokens == [0]
    assert records(caplog, logging.WARNING, "LSTM")
    monkeypatch.setattr("export.build.run_build.convert_precision", lambda *_: pytest.fail("minutes were spent"))
    with raises(ModelFileError, "unsupported_lstm"):
        build_engine(model, target="tensorrt", query_length=LENGTHS, unroll=(6,))


def test_unroll_of_a_published_model_is_checked_after_conversion(
    model: Path, tensorrt: EngineBuilds, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("export.build.build_config.BuildConfig.early_profiles", lambda *_: None)
    with raises(ShapeError, "invalid_option", "--unroll", 1, 12, 13):
        build_engine(model, target="tensorrt", unroll=(13,), query_length=LENGTHS)
    assert tensorrt.attempts == []


def dry_run(
    capsys: pytest.CaptureFixture[str], model: Path, target: Any = "tensorrt", **options: Any
) -> tuple[list[str], str]:
    """Return the engines for short queries that a dry run lists, and the source of their lengths."""
    capsys.readouterr()
    build_engine(model, target=target, dry_run=True, **options)
    lines = capsys.readouterr().out.splitlines()
    (reason,) = [line.partition(" ")[2].strip() for line in lines if line.startswith("lengths ")]
    return [Path(line.split()[1]).name for line in lines if line.startswith("unrolled")], reason


def test_dry_run_lists_only_engines_that_are_built(
    model: Path, models: Path, tensorrt: EngineBuilds, capsys: pytest.CaptureFixture[str]
) -> None:
    record_quantiles(model, 4, 12)
    listed, reason = dry_run(capsys, model, query_length=LENGTHS)
    assert listed == ["drn.fp16.4.engine"]
    assert quotes(reason, 4, 12)
    assert dry_run(capsys, model, query_length=LENGTHS, unroll=(12, 8))[0] == [
        "drn.fp16.8.engine",
        "drn.fp16.12.engine",
    ]
    assert dry_run(capsys, model, "tensorrt-rtx", compute_capability=("8.6",))[0] == []
    rename_lstm(model)
    listed, reason = dry_run(capsys, model, query_length=LENGTHS)
    assert listed == []
    assert quotes(reason, "LSTM", "unrolled")
    with raises(ModelFileError, "unsupported_lstm"):
        build_engine(model, target="tensorrt", query_length=LENGTHS, unroll=(6,), dry_run=True)
    # A graph that was exported earlier is used if it accepts the longest query.
    checkpoint = Path(shutil.copy(models / "drn.pt", model.parent))
    assert dry_run(capsys, checkpoint)[0] != []
    change_manifest(model, max_query_length=64)
    assert dry_run(capsys, checkpoint)[0] == []
    model.unlink()
    assert dry_run(capsys, checkpoint)[0] != []


def test_dry_run_names_query_lengths_and_their_source(
    planted: Path, tmp_path: Path, tensorrt: EngineBuilds, capsys: pytest.CaptureFixture[str]
) -> None:
    published = tmp_path / "published.pth"
    torch.save({"state_dict": {"prop_fc.weight": torch.zeros(1)}}, published)
    listed, reason = dry_run(capsys, published)
    assert listed == ["published.fp16.9.engine", "published.fp16.10.engine"]
    assert "Charades-STA" in reason
    assert dry_run(capsys, published, query_length=(1, 8, 10))[0] == ["published.fp16.9.engine"]
    assert dry_run(capsys, published, unroll=(0,)) == ([], "--unroll 0")
    listed, reason = dry_run(capsys, published, data=planted)
    assert listed == []
    assert str(planted) in reason


@pytest.mark.parametrize(
    ("error", "failing", "split"),
    [(BuildFailed("No."), (4,), False), (PlanNotLoaded("No."), (6,), True), (DeviceError("No."), (4, 6), False)],
)
def test_default_engine_that_fails_to_build_is_skipped(
    model: Path,
    planted: Path,
    tensorrt: EngineBuilds,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    error: GroundingError,
    failing: tuple[int, ...],
    split: bool,
) -> None:
    def fail(attempt: Attempt) -> None:
        if attempt.tokens in failing:
            raise error

    record_quantiles(model, 4, 6)
    tensorrt.before = fail
    monkeypatch.setattr("export.engine.profiles._data_quantiles", lambda *_: None)
    options: dict[str, Any] = {"target": "tensorrt", "query_length": LENGTHS, "split": split}
    output = build_engine(model, data=planted, limit=3, threads=1, **options)
    left = [steps for steps in (4, 6) if steps not in failing]
    assert unrolled_steps(read_sidecar(output).content) == left
    for steps in (4, 6):
        plan = output.with_name(f"{output.stem}.{steps}.engine")
        assert plan.is_file() == (steps in left)
        warnings = records(caplog, logging.WARNING, plan.name, "No.")
        assert bool(warnings) == (steps in failing)
    # The recorded command reproduces the build.
    command = json.loads(model.with_name("drn.fp16.parity.json").read_text())["command"]
    assert f"--unroll {' '.join(map(str, left or [0]))}" in command
    assert read_sidecar(output).content["options"]["changes"]
    # A length that was requested must be built.
    with pytest.raises(type(error)):
        build_engine(model, unroll=(4, 6), **options)
