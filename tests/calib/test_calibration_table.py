"""Test `calib.calibration_table`: contents of the file, and files that are rejected."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from pathlib import Path
from typing import Any

import onnx
import pytest

from calib.calibration_table import CalibrationTable
from calib.errors import CalibrationError
from calib.graph.gate_normalization import normalize_gated_features
from calib.graph.graph_editing import copied
from calib.graph.onnx_graph import graph_hash, weights_hash
from calib.qdq_quantizer import channel_energies, insert_qdq
from calib.range_estimation import ValueRange
from export.build_engine import build_engine
from runtime.datasets.dataset import DataSet
from tests.calib.conftest import altered
from tests.raising import check_error, raises

TENSOR = "fcos.head/Mul"
CONTENT = ("key", "ranges", "gains", "videos", "coverage", "choice")


def test_table_survives_save_and_load(table: CalibrationTable, tmp_path: Path) -> None:
    path = tmp_path / "drn.calibration.json"
    table.save(path)
    again = CalibrationTable.load(path)
    assert again == table
    assert again.digest == table.digest
    # Tables of version 0.1 have no content_digest.
    old = {name: value for name, value in json.loads(path.read_text()).items() if name != "content_digest"}
    path.write_text(json.dumps(old))
    assert CalibrationTable.load(path) == table
    with raises(CalibrationError, "missing_file", tmp_path / "absent.json"):
        CalibrationTable.load(tmp_path / "absent.json")


def test_saved_table_has_one_line_per_tensor(table: CalibrationTable, tmp_path: Path, model: onnx.ModelProto) -> None:
    table.save(tmp_path / "t.json")
    text = (tmp_path / "t.json").read_text()
    lines = text[text.index('"ranges"') : text.index('"gains"')].splitlines()
    for tensor in channel_energies(normalize_gated_features(model)):
        (line,) = [line for line in lines if line.strip().startswith(f'"{tensor}":')]
        low, high = json.loads(line.split(":", 1)[1].rstrip(","))
        assert low <= high
    key = json.loads(text)["key"]
    assert set(key) == {"graph", "weights", "samples", "method", "split"}
    assert (key["method"], key["split"]) == ("mse", "train")


def test_table_of_another_model_is_rejected(table: CalibrationTable, model: onnx.ModelProto) -> None:
    described = copied(model)
    described.doc_string = "another"
    table.check(described)
    with raises(CalibrationError, "table_of_another_model", "other.onnx", weights_hash(model)[:12]) as caught:
        table.check(altered(model), "other.onnx")
    assert weights_hash(altered(model))[:12] in str(caught.value)
    strided = copied(model)
    conv = next(node for node in strided.graph.node if node.op_type == "Conv")
    next(entry for entry in conv.attribute if entry.name == "strides").ints[1] = 2
    with raises(CalibrationError, "table_of_another_model", graph_hash(model)[:12], graph_hash(strided)[:12]):
        table.check(strided)


def test_table_of_test_videos_is_rejected(table: CalibrationTable, data_set: DataSet, tmp_path: Path) -> None:
    table.check_videos(data_set)
    test = tuple(sorted({entry.video for entry in data_set.annotations("test")}))
    with raises(CalibrationError, "test_videos_used", len(test), test[0]):
        dataclasses.replace(table, videos=test).check_videos(data_set)
    dataclasses.replace(table, key={**table.key, "split": "test"}).save(tmp_path / "t.json")
    with raises(CalibrationError, "test_videos_used", tmp_path / "t.json", "'test'"):
        CalibrationTable.load(tmp_path / "t.json")


def test_digest_depends_on_ranges_and_key(table: CalibrationTable) -> None:
    name, actual = next(iter(table.ranges.items()))
    wider = {**table.ranges, name: dataclasses.replace(actual, high=actual.high * 2)}
    assert dataclasses.replace(table, ranges=wider).digest != table.digest
    assert dataclasses.replace(table, key={**table.key, "samples": "other"}).digest != table.digest


def edited(fields: dict[str, Any], *names: str, value: Any) -> dict[str, Any]:
    """Set one value of nested dictionaries."""
    *path, last = names
    inner = fields
    for name in path:
        inner = inner[name]
    inner[last] = value
    return fields


def assert_rejected(
    table: CalibrationTable, directory: Path, code: str, *names: str, value: Any, keep_digests: bool = False
) -> None:
    """Assert that a table with one change is rejected, also if its digests match the changed content."""
    path = directory / "t.json"
    table.save(path)
    fields = edited(json.loads(path.read_text()), *names, value=value)
    digests = {"digest": digest_of(fields, "key", "ranges", "gains"), "content_digest": digest_of(fields, *CONTENT)}
    for changes in ({}, {} if keep_digests else digests):
        path.write_text(json.dumps({**fields, **changes}))
        with raises(CalibrationError, code, path):
            CalibrationTable.load(path)


def digest_of(fields: dict[str, Any], *names: str) -> str:
    content = {name: fields[name] for name in names}
    separators = (",", ":") if names == CONTENT else None
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=separators).encode()).hexdigest()


@pytest.mark.parametrize(
    ("names", "value"),
    [
        (("ranges", TENSOR), [0.0, 1e-3]),
        (("key", "method"), "mean"),
        (("videos",), ["other"]),
        (("coverage",), {}),
        (("choice",), {"by": "chance"}),
        (("content_digest",), "0" * 64),
        (("content_digest",), None),
    ],
)
def test_edited_table_is_rejected(table: CalibrationTable, tmp_path: Path, names: tuple[str, ...], value: Any) -> None:
    assert_rejected(table, tmp_path, "digest_mismatch", *names, value=value, keep_digests=True)


@pytest.mark.parametrize(
    ("code", "names", "value"),
    [
        ("unknown_format", ("format",), "other/1"),
        ("unknown_format", ("format",), ["drn-calibration/1"]),
        ("invalid_range", ("ranges",), {}),
        ("invalid_range", ("ranges", TENSOR), [1.0, 0.0]),
        ("invalid_table", ("ranges",), []),
        ("invalid_table", ("ranges",), None),
        ("invalid_table", ("ranges", TENSOR), [1.0]),
        ("invalid_table", ("ranges", TENSOR), "ab"),
        ("invalid_table", ("ranges", TENSOR), {"0.0": 1, "1.0": 2}),
        ("invalid_table", ("gains",), []),
        ("invalid_table", ("gains", "any"), 3),
        ("invalid_table", ("key",), []),
        ("invalid_table", ("key",), {}),
        ("invalid_table", ("key", "graph"), 7),
        ("invalid_table", ("videos",), "abc"),
        ("invalid_table", ("videos",), [7]),
        ("invalid_table", ("coverage",), [["a", 1]]),
        ("invalid_table", ("choice",), "mse"),
    ],
)
def test_damaged_table_fails(
    table: CalibrationTable, tmp_path: Path, code: str, names: tuple[str, ...], value: Any
) -> None:
    assert_rejected(table, tmp_path, code, *names, value=value)


def test_value_that_is_not_a_finite_number_is_rejected(table: CalibrationTable, tmp_path: Path) -> None:
    not_json = (10**400, -(10**400), math.nan, math.inf, -math.inf)
    for value in (None, True, "1", [1.0], *not_json):
        code = "invalid_json" if value in not_json else "invalid_table"
        assert_rejected(table, tmp_path, code, "gains", "any", value=[value])
        assert_rejected(table, tmp_path, code, "ranges", TENSOR, value=[value, 1.0])
        assert_rejected(table, tmp_path, code, "ranges", TENSOR, value=[0.0, value])
    for exponent in (1.5, 9, -9):
        assert_rejected(table, tmp_path, "invalid_table", "gains", "any", value=[exponent])


def test_file_that_is_not_an_object_is_rejected(tmp_path: Path) -> None:
    path = tmp_path / "t.json"
    path.write_text("[{}]")
    with raises(CalibrationError, "unknown_format", path):
        CalibrationTable.load(path)
    path.write_text('{"format": "drn-calibration/1", "ranges": ' + "[" * 100_000 + "]" * 100_000 + "}")
    with raises(CalibrationError, "nested_too_deeply", path, 64):
        CalibrationTable.load(path)


def test_damaged_table_exits_with_2(table: CalibrationTable, onnx_file: Path, tmp_path: Path, refused: Any) -> None:
    path = tmp_path / "t.json"
    table.save(path)
    path.write_text(json.dumps(edited(json.loads(path.read_text()), "ranges", TENSOR, value=[-math.inf, math.inf])))
    words = ["--model", onnx_file, "--precision", "int8", "--target", "onnxruntime", "--table", path]
    error = refused(build_engine, *words)
    check_error(error, "invalid_json", path)
    assert len(str(error)) < 1000


@pytest.mark.parametrize("ends", [(0.0, 1e9), (-1e300, 0.0)])
def test_range_with_non_finite_scale_names_the_tensor(
    table: CalibrationTable, model: onnx.ModelProto, ends: tuple[float, float]
) -> None:
    tensor = next(iter(channel_energies(model)))
    wide = dataclasses.replace(table, gains={}, ranges={**table.ranges, tensor: ValueRange(*ends)})
    with raises(CalibrationError, "invalid_scale", tensor):
        insert_qdq(model, wide)


def test_gains_of_wrong_channel_count_are_rejected(table: CalibrationTable, model: onnx.ModelProto) -> None:
    name, row = next(iter(table.gains.items()))
    for other in (row[:-1], row[:1], (), (*row, 0)):
        with raises(CalibrationError, "equalization_mismatch", name, len(other), len(row)):
            insert_qdq(model, dataclasses.replace(table, gains={**table.gains, name: other}))
