"""Test the commands of `calib`: from a graph to an INT8 file, and inputs that are rejected."""

from __future__ import annotations

import dataclasses
import json
import logging
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

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
from tests.raising import quotes, raises, records
from tests.written import written_checked

ROOT = Path(__file__).parents[2]


def test_calib_modules_import_without_torch() -> None:
    names = [f"calib.{path.stem}" for path in (ROOT / "calib").glob("*.py") if path.stem != "__init__"]
    code = f"import sys, importlib; [importlib.import_module(n) for n in {names}]; print('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert result.stdout.strip() == "False"


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
    assert costs[str(Candidate(table.key["method"], bool(table.gains)))] == max(costs.values())  # type: ignore[arg-type]
    assert table.coverage["sentences"] == 40
    assert [entry.name for entry in table_file.parent.iterdir()] == [table_file.name]


def test_calibrate_uses_requested_method(onnx_file: Path, data_set: DataSet, tmp_path: Path) -> None:
    table = calibrate(onnx_file, data_set.root, tmp_path / "t.json", method="minmax", samples=40, threads=1)
    assert table.key["method"] == "minmax"
    assert table.choice == {}


def test_from_graph_to_int8_file_and_back_within_budget(
    onnx_file: Path,
    table_file: Path,
    data_set: DataSet,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    batch: Batch,
) -> None:
    output = tmp_path / "drn.int8.onnx"
    quantize(onnx_file, table_file, output)
    assert "INT8" in capsys.readouterr().out
    onnx.checker.check_model(output, full_check=True)
    backend = open_backend(output, device="cpu")
    assert backend.manifest.precision == "int8"
    ours, theirs = (actual.run(batch) for actual in (backend, open_backend(onnx_file, device="cpu")))
    assert np.abs(ours.matching_logits - theirs.matching_logits).max() > 0
    assert np.corrcoef(ours.matching_logits.ravel(), theirs.matching_logits.ravel())[0, 1] > 0.99

    with written_checked(tmp_path):
        ranking = rank_layers(
            onnx_file, data_set.root, table=table_file, output=tmp_path / "ranking.json", held_out=24, threads=1
        )
    written = read_json(tmp_path / "ranking.json", "ranking")
    assert [entry["module"] for entry in written["modules"]] == [entry.module for entry in ranking]
    text = capsys.readouterr().out
    assert all(entry.module in text for entry in ranking)

    plan = restore(
        onnx_file,
        data_set.root,
        table_file,
        tmp_path / "plan.json",
        ranking=tmp_path / "ranking.json",
        held_out=24,
        max_drop=100,
        threads=1,
    )
    assert plan.keep == ()
    dataclasses.replace(plan, keep=("fpn.layer_blocks.0",)).save(tmp_path / "plan.json")
    quantize(onnx_file, table_file, output, keep=("prop_fc",), plan=tmp_path / "plan.json")
    text = capsys.readouterr().out
    assert quotes(text, "prop_fc", "fpn.layer_blocks.0")
    (tmp_path / "ranking.json").write_text(json.dumps({**written, "table": "0" * 64}))
    with raises(CalibrationError, "ranking_of_another_table", tmp_path / "ranking.json", "0" * 12):
        restore(
            onnx_file, data_set.root, table_file, tmp_path / "plan.json", ranking=tmp_path / "ranking.json", threads=1
        )


def test_suggested_commands_write_unproven_graph_path(
    onnx_file: Path, table_file: Path, data_set: DataSet, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    unproven = onnx_file.with_name("drn.int8-unproven.onnx")
    with caplog.at_level("INFO", "drn"):
        calibrate(onnx_file, data_set.root, tmp_path / "t.json", method="minmax", samples=40, threads=1)
        command = f"calib.quantize --model {onnx_file} --table {tmp_path / 't.json'} --output {unproven}"
        assert records(caplog, logging.INFO, command)
        caplog.clear()
        given = {"held_out": 24, "max_drop": 100.0, "threads": 1}
        restore(onnx_file, data_set.root, table_file, tmp_path / "plan.json", **given)  # type: ignore[arg-type]
        assert records(caplog, logging.INFO, f"--plan {tmp_path / 'plan.json'} --output {unproven}")
        caplog.clear()
        quantize(onnx_file, table_file, tmp_path / unproven.name)
        command = f"export.verify --reference {onnx_file} --model {tmp_path / unproven.name}"
        assert records(caplog, logging.INFO, command)


def test_commands_reject_table_of_test_videos(
    onnx_file: Path, table_file: Path, data_set: DataSet, tmp_path: Path
) -> None:
    leaked = data_set.annotations("test")[0].video
    table = tmp_path / "t.json"
    loaded = CalibrationTable.load(table_file)
    dataclasses.replace(loaded, videos=(*loaded.videos, leaked)).save(table)
    with raises(CalibrationError, "test_videos_used", 1, leaked):
        rank_layers(onnx_file, data_set.root, table=table, threads=1)
    with raises(CalibrationError, "test_videos_used", 1, leaked):
        restore(onnx_file, data_set.root, table, tmp_path / "plan.json", threads=1)


def test_quantize_rejects_plan_of_another_table(
    onnx_file: Path, table_file: Path, data_set: DataSet, tmp_path: Path
) -> None:
    given = {"held_out": 24, "max_drop": 100.0, "threads": 1}
    restore(onnx_file, data_set.root, table_file, tmp_path / "plan.json", **given)  # type: ignore[arg-type]
    loaded = CalibrationTable.load(table_file)
    name, actual = next(iter(loaded.ranges.items()))
    wider = {**loaded.ranges, name: dataclasses.replace(actual, high=actual.high * 2)}
    dataclasses.replace(loaded, ranges=wider).save(tmp_path / "t.json")
    digests = (loaded.digest[:12], CalibrationTable.load(tmp_path / "t.json").digest[:12])
    with raises(CalibrationError, "plan_of_another_table", *digests):
        quantize(onnx_file, tmp_path / "t.json", tmp_path / "drn.int8.onnx", plan=tmp_path / "plan.json")
    assert not (tmp_path / "drn.int8.onnx").exists()


def refused(function, *arguments, error, output: Path, **options) -> None:  # type: ignore[no-untyped-def]
    """Assert that a command refuses in one sentence and leaves what was there.

    Args:
        error: class, code, and values that the message quotes.
    """
    output.write_text("before")
    beside = sorted(output.parent.iterdir())
    with raises(*error) as actual:
        function(*arguments, **options)
    assert "\n" not in str(actual.value)
    assert output.read_text() == "before"
    assert sorted(output.parent.iterdir()) == beside


def test_calibrate_rejects_invalid_arguments(
    onnx_file: Path, table_file: Path, data_set: DataSet, tmp_path: Path
) -> None:
    output = tmp_path / "t.json"
    root = data_set.root
    few = (CalibrationError, "too_few_samples", 5, 32)
    refused(calibrate, onnx_file, root, output, samples=5, error=few, output=output)
    option = (CalibrationError, "invalid_option", "--batch-size", 0)
    refused(calibrate, onnx_file, root, output, batch_size=0, error=option, output=output)
    absent = tmp_path / "no.onnx"
    refused(calibrate, absent, root, output, error=(ModelFileError, "missing_file", absent), output=output)
    absent = tmp_path / "no"
    refused(calibrate, onnx_file, absent, output, error=(AnnotationError, "missing_file", absent), output=output)
    directory = onnx_file.parent
    refused(calibrate, onnx_file, root, directory, error=(OutputError, "output_is_directory", directory), output=output)
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(onnx_file.read_bytes()[:5000])
    refused(calibrate, broken, root, output, error=(ModelFileError, "not_onnx", broken), output=output)
    narrowed = quantize(onnx_file, table_file, tmp_path / "drn.int8.onnx")
    refused(calibrate, narrowed, root, output, error=(ModelFileError, "not_fp32", narrowed, "int8"), output=output)
    strange = onnx.load(onnx_file)
    del strange.metadata_props[:]
    onnx.save(strange, broken)
    refused(calibrate, broken, root, output, error=(ModelFileError, "missing_manifest", broken), output=output)
    with raises(OutputError, "output_is_input", onnx_file):
        calibrate(onnx_file, root, onnx_file)


def test_calibration_data_without_features_is_rejected(onnx_file: Path, data_set: DataSet, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    for path in data_set.root.glob("Charades_*"):
        (bare / path.name).write_bytes(path.read_bytes())
    output = tmp_path / "t.json"
    refused(calibrate, onnx_file, bare, output, error=(FeatureError, "missing_file", bare, "'SIM00007'"), output=output)


def test_quantize_rejects_invalid_arguments(
    onnx_file: Path, table_file: Path, model: onnx.ModelProto, tmp_path: Path
) -> None:
    from tests.calib.conftest import altered

    output = tmp_path / "drn.int8.onnx"
    onnx.save(altered(model), tmp_path / "other.onnx")
    refused(
        quantize,
        tmp_path / "other.onnx",
        table_file,
        output,
        error=(CalibrationError, "table_of_another_model", tmp_path / "other.onnx"),
        output=output,
    )
    refused(quantize, onnx_file, onnx_file, output, error=(CalibrationError, "not_utf8", onnx_file), output=output)
    module = (CalibrationError, "unknown_module", "'no'")
    refused(quantize, onnx_file, table_file, output, keep=("no",), error=module, output=output)
    opset = (CalibrationError, "unsupported_opset", 16)
    refused(quantize, onnx_file, table_file, output, opset=16, error=opset, output=output)
    with raises(OutputError, "output_is_input", table_file):
        quantize(onnx_file, table_file, table_file)


def test_quantize_rejects_models_of_other_kinds(
    model: onnx.ModelProto, onnx_file: Path, table_file: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out.onnx"
    (tmp_path / "drn.pt").write_bytes(b"PK\x03\x04")
    with raises(ModelFileError, "not_onnx", tmp_path / "drn.pt", "export.to_onnx"):
        quantize(tmp_path / "drn.pt", table_file, output)
    extractor = copied(model)
    for entry in extractor.metadata_props:
        entry.key = EXTRACTOR_KEY if entry.key == METADATA_KEY else entry.key
    onnx.save(extractor, tmp_path / "c3d.onnx")
    with raises(ModelFileError, "wrong_model_kind", tmp_path / "c3d.onnx"):
        quantize(tmp_path / "c3d.onnx", table_file, output)


def test_calibrate_error_is_one_line_with_exit_code_2(
    onnx_file: Path, data_set: DataSet, tmp_path: Path, refused: Callable[..., GroundingError]
) -> None:
    output = tmp_path / "t.json"
    refused(calibrate, "--onnx", onnx_file, "--data", data_set.root, "--output", output, "--samples", "8")
    assert list(tmp_path.iterdir()) == []
