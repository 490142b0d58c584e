"""Test the commands of `calib`: from a graph to an INT8 file, and inputs that are rejected."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from calib.accuracy import Candidate
from calib.calibrate import calibrate
from calib.calibration_table import CalibrationTable
from calib.errors import CalibrationError
from calib.graph.graph_editing import copied
from calib.quantize import quantize
from calib.rank_layers import rank_layers
from calib.restore import restore
from runtime import open_backend
from runtime.artifacts.extractor_manifest import METADATA_KEY as EXTRACTOR_KEY
from runtime.artifacts.manifest import METADATA_KEY
from runtime.core.batch import Batch
from runtime.core.errors import AnnotationError, FeatureError, GroundingError, ModelFileError, OutputError
from runtime.core.io.input_files import read_json
from runtime.datasets.dataset import DataSet
from tests.calib.conftest import altered
from tests.raising import quotes, raises, records
from tests.written import written_checked

SEARCH: dict[str, Any] = {"held_out": 24, "max_drop": 100.0, "threads": 1}


@pytest.fixture(scope="module")
def table_file(onnx_file: Path, data_set: DataSet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tables") / "drn.calibration.json"
    calibrate(onnx_file, data_set.root, path, samples=40, held_out=24, threads=1)
    return path


def test_calibrate_chooses_method_and_records_comparison(table_file: Path) -> None:
    table = CalibrationTable.load(table_file)
    assert {"minmax", "percentile", "entropy", "mse", "output"} < set(table.choice["costs"])
    costs = {name: cost["agreement with FP32, mean IoU"] for name, cost in table.choice["costs"].items()}
    assert table.choice["equalized"] == bool(table.gains)
    assert costs[str(Candidate(table.key["method"], bool(table.gains)))] == max(costs.values())
    assert table.coverage["sentences"] == 40
    assert [entry.name for entry in table_file.parent.iterdir()] == [table_file.name]


def test_commands_convert_graph_to_int8_within_budget(
    onnx_file: Path,
    table_file: Path,
    data_set: DataSet,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    batch: Batch,
) -> None:
    caplog.set_level("INFO", "drn")
    unproven = onnx_file.with_name("drn.int8-unproven.onnx")
    output, ranking_file, plan_file = (tmp_path / name for name in ("drn.int8.onnx", "ranking.json", "plan.json"))

    table = calibrate(onnx_file, data_set.root, tmp_path / "t.json", method="minmax", samples=33, threads=1)
    assert (table.key["method"], table.choice) == ("minmax", {})
    command = f"calib.quantize --model {onnx_file} --table {tmp_path / 't.json'} --output {unproven}"
    assert records(caplog, logging.INFO, command)

    capsys.readouterr()
    quantize(onnx_file, table_file, output)
    assert "INT8" in capsys.readouterr().out
    assert records(caplog, logging.INFO, f"export.verify --reference {onnx_file} --model {output}")
    onnx.checker.check_model(output, full_check=True)
    int8, fp32 = (open_backend(path, device="cpu") for path in (output, onnx_file))
    assert int8.manifest.precision == "int8"
    actual, expected = (backend.run(batch).matching_logits for backend in (int8, fp32))
    assert np.abs(actual - expected).max() > 0
    assert np.corrcoef(actual.ravel(), expected.ravel())[0, 1] > 0.99

    with written_checked(tmp_path):
        ranking = rank_layers(onnx_file, data_set.root, table=table_file, output=ranking_file, held_out=24, threads=1)
    written = read_json(ranking_file, "ranking")
    assert [entry["module"] for entry in written["modules"]] == [entry.module for entry in ranking]
    text = capsys.readouterr().out
    assert all(entry.module in text for entry in ranking)

    plan = restore(onnx_file, data_set.root, table_file, plan_file, ranking=ranking_file, **SEARCH)
    assert plan.keep == ()
    assert records(caplog, logging.INFO, f"--plan {plan_file} --output {unproven}")
    dataclasses.replace(plan, keep=("fpn.layer_blocks.0",)).save(plan_file)
    quantize(onnx_file, table_file, output, keep=("prop_fc",), plan=plan_file)
    assert quotes(capsys.readouterr().out, "prop_fc", "fpn.layer_blocks.0")
    with raises(CalibrationError, "plan_of_another_table", plan.table[:12], table.digest[:12]):
        quantize(onnx_file, tmp_path / "t.json", tmp_path / "other.onnx", plan=plan_file)
    assert not (tmp_path / "other.onnx").exists()

    ranking_file.write_text(json.dumps({**written, "table": "0" * 64}))
    with raises(CalibrationError, "ranking_of_another_table", ranking_file, "0" * 12):
        restore(onnx_file, data_set.root, table_file, plan_file, ranking=ranking_file, threads=1)


def test_commands_reject_test_videos(onnx_file: Path, table_file: Path, data_set: DataSet, tmp_path: Path) -> None:
    leaked = data_set.annotations("test")[0].video
    table = tmp_path / "t.json"
    loaded = CalibrationTable.load(table_file)
    dataclasses.replace(loaded, videos=(*loaded.videos, leaked)).save(table)
    with raises(CalibrationError, "test_videos_used", 1, leaked):
        rank_layers(onnx_file, data_set.root, table=table, threads=1)
    with raises(CalibrationError, "test_videos_used", 1, leaked):
        restore(onnx_file, data_set.root, table, tmp_path / "plan.json", threads=1)


def assert_rejected(
    command: Callable[..., Any], *paths: Path, error: type[GroundingError], code: str, values: Any, **options: Any
) -> None:
    """Assert that a command fails with a message of one line and changes no file.

    Args:
        command: calibrate or quantize.
        paths: its two inputs and its output.
        error, code, values: class and code of the error, and the values that its message quotes.
        options: of the command.
    """
    output = paths[-1]
    if not output.is_dir():
        output.write_text("before")
    before = sorted(output.parent.iterdir())
    with raises(error, code, *values):
        command(*paths, **options)
    assert output.is_dir() or output.read_text() == "before"
    assert sorted(output.parent.iterdir()) == before


def test_calibrate_rejects_invalid_inputs(onnx_file: Path, table_file: Path, data_set: DataSet, tmp_path: Path) -> None:
    output, root = tmp_path / "t.json", data_set.root
    broken, bare, undescribed = tmp_path / "broken.onnx", tmp_path / "bare", tmp_path / "undescribed.onnx"
    broken.write_bytes(onnx_file.read_bytes()[:5000])
    bare.mkdir()
    for path in root.glob("Charades_*"):
        (bare / path.name).write_bytes(path.read_bytes())
    model = onnx.load(onnx_file)
    del model.metadata_props[:]
    onnx.save(model, undescribed)
    int8 = quantize(onnx_file, table_file, tmp_path / "drn.int8.onnx")
    for paths, options, error, code, values in (
        ((onnx_file, root, output), {"samples": 5}, CalibrationError, "too_few_samples", (5, 32)),
        ((onnx_file, root, output), {"batch_size": 0}, CalibrationError, "invalid_option", ("--batch-size", 0)),
        ((tmp_path / "no.onnx", root, output), {}, ModelFileError, "missing_file", (tmp_path / "no.onnx",)),
        ((onnx_file, tmp_path / "no", output), {}, AnnotationError, "missing_file", (tmp_path / "no",)),
        ((onnx_file, bare, output), {}, FeatureError, "missing_file", (bare, "'SIM00007'")),
        ((onnx_file, root, onnx_file.parent), {}, OutputError, "output_is_directory", (onnx_file.parent,)),
        ((broken, root, output), {}, ModelFileError, "not_onnx", (broken,)),
        ((int8, root, output), {}, ModelFileError, "not_fp32", (int8, "int8")),
        ((undescribed, root, output), {}, ModelFileError, "missing_manifest", (undescribed,)),
    ):
        assert_rejected(calibrate, *paths, error=error, code=code, values=values, **options)
    with raises(OutputError, "output_is_input", onnx_file):
        calibrate(onnx_file, root, onnx_file)


def test_quantize_invalid_input_fails(
    model: onnx.ModelProto, onnx_file: Path, table_file: Path, tmp_path: Path
) -> None:
    output, checkpoint, other, extractor = (
        tmp_path / name for name in ("drn.int8.onnx", "drn.pt", "other.onnx", "c3d.onnx")
    )
    checkpoint.write_bytes(b"PK\x03\x04")
    onnx.save(altered(model), other)
    graph = copied(model)
    for entry in graph.metadata_props:
        entry.key = EXTRACTOR_KEY if entry.key == METADATA_KEY else entry.key
    onnx.save(graph, extractor)
    for paths, options, error, code, values in (
        ((checkpoint, table_file), {}, ModelFileError, "not_onnx", (checkpoint, "export.to_onnx")),
        ((extractor, table_file), {}, ModelFileError, "wrong_model_kind", (extractor,)),
        ((other, table_file), {}, CalibrationError, "table_of_another_model", (other,)),
        ((onnx_file, onnx_file), {}, CalibrationError, "not_utf8", (onnx_file,)),
        ((onnx_file, table_file), {"keep": ("no",)}, CalibrationError, "unknown_module", ("'no'",)),
        ((onnx_file, table_file), {"opset": 16}, CalibrationError, "unsupported_opset", (16,)),
    ):
        assert_rejected(quantize, *paths, output, error=error, code=code, values=values, **options)
    with raises(OutputError, "output_is_input", table_file):
        quantize(onnx_file, table_file, table_file)
