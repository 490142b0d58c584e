"""Test `calib.calibration_table`: contents of the file, and files that are rejected."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import subprocess
import sys
from pathlib import Path

import onnx
import pytest

from calib.calibration_table import CalibrationTable
from calib.errors import CalibrationError
from calib.graph.onnx_graph import graph_hash, weights_hash
from calib.qdq_quantizer import channel_energies, insert_qdq
from calib.range_estimation import ValueRange
from runtime.datasets.dataset import DataSet
from tests.calib.conftest import altered
from tests.raising import raises


def test_table_survives_save_and_load(table: CalibrationTable, tmp_path: Path) -> None:
    table.save(tmp_path / "drn.calibration.json")
    again = CalibrationTable.load(tmp_path / "drn.calibration.json")
    assert again == table
    assert again.digest == table.digest


def test_saved_table_has_one_line_per_tensor(table: CalibrationTable, tmp_path: Path, model: onnx.ModelProto) -> None:
    table.save(tmp_path / "t.json")
    text = (tmp_path / "t.json").read_text()
    for tensor in channel_energies(model):
        lines = text[text.index('"ranges"') : text.index('"gains"')].splitlines()
        (line,) = [line for line in lines if line.strip().startswith(f'"{tensor}":')]
        low, high = json.loads(line.split(":", 1)[1].rstrip(","))
        assert low <= high
    key = json.loads(text)["key"]
    assert set(key) == {"graph", "weights", "samples", "method", "split"}
    assert (key["method"], key["split"]) == ("mse", "train")


def test_table_of_another_network_is_rejected_naming_both(table: CalibrationTable, model: onnx.ModelProto) -> None:
    table.check(model)
    other = altered(model)
    hashes = (weights_hash(model)[:12], weights_hash(other)[:12])
    with raises(CalibrationError, "table_of_another_model", "other.onnx", *hashes):
        table.check(other, "other.onnx")


def test_table_of_another_graph_is_rejected(table: CalibrationTable, model: onnx.ModelProto) -> None:
    other = onnx.ModelProto()
    other.CopyFrom(model)
    conv = next(node for node in other.graph.node if node.op_type == "Conv")
    next(entry for entry in conv.attribute if entry.name == "strides").ints[1] = 2
    with raises(CalibrationError, "table_of_another_model", graph_hash(model)[:12], graph_hash(other)[:12]):
        table.check(other)


def test_doc_string_does_not_affect_table_check(table: CalibrationTable, model: onnx.ModelProto) -> None:
    other = onnx.ModelProto()
    other.CopyFrom(model)
    other.doc_string = "another"
    table.check(other)


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


def edited(value: dict, *path_and_new) -> dict:  # type: ignore[no-untyped-def, type-arg]
    *path, last, new = path_and_new
    inner = value
    for name in path:
        inner = inner[name]
    inner[last] = new
    return value


@pytest.mark.parametrize(
    ("spoil", "code", "values"),
    [
        (lambda value: edited(value, "format", "other/1"), "unknown_format", ("'other/1'",)),
        (lambda value: edited(value, "key", "method", "mean"), "digest_mismatch", ()),
        (lambda value: edited(value, "ranges", "fcos.head/Mul", [0.0, 1e-3]), "digest_mismatch", ()),
        (lambda value: edited(value, "ranges", "fcos.head/Mul", [1.0, 0.0]), "invalid_range", ()),
        (lambda value: edited(value, "ranges", "fcos.head/Mul", [1.0]), "invalid_table", ()),
        (lambda value: edited(value, "ranges", {}), "invalid_range", ()),
        (lambda value: edited(value, "key", {}), "invalid_table", ()),
        (lambda value: edited(value, "videos", ["other"]), "digest_mismatch", ()),
        (lambda value: edited(value, "videos", value["videos"][1:]), "digest_mismatch", ()),
        (lambda value: edited(value, "coverage", {}), "digest_mismatch", ()),
        (lambda value: edited(value, "choice", {"by": "chance"}), "digest_mismatch", ()),
        (lambda value: edited(value, "content_digest", "0" * 64), "digest_mismatch", ()),
        (lambda value: edited(value, "content_digest", None), "digest_mismatch", ()),
        (lambda value: [value], "unknown_format", (None,)),
    ],
)
def test_table_with_edited_content_is_rejected(
    table: CalibrationTable, tmp_path: Path, spoil, code: str, values
) -> None:  # type: ignore[no-untyped-def]
    path = tmp_path / "t.json"
    table.save(path)
    path.write_text(json.dumps(spoil(json.loads(path.read_text()))))
    with raises(CalibrationError, code, path, *values):
        CalibrationTable.load(path)


def test_table_without_content_digest_loads(table: CalibrationTable, tmp_path: Path) -> None:
    path = tmp_path / "t.json"
    table.save(path)
    value = json.loads(path.read_text())
    del value["content_digest"]
    path.write_text(json.dumps(value))
    assert CalibrationTable.load(path) == table


TENSOR, GAIN = "fcos.head/Mul", "any"
NOT_NUMBERS = [None, True, "1", [1.0], {}, 10**400, -(10**400)]


@pytest.mark.parametrize("value", [*NOT_NUMBERS, math.nan, math.inf, -math.inf], ids=repr)
@pytest.mark.parametrize("end", [0, 1])
def test_range_that_is_not_finite_number_is_rejected(
    table: CalibrationTable, tmp_path: Path, end: int, value: object
) -> None:
    ends = [0.0, 1.0]
    ends[end] = value  # type: ignore[call-overload]
    assert_refused(table, tmp_path, code_for(value), "ranges", TENSOR, ends)


@pytest.mark.parametrize(
    "change",
    [
        ("ranges", []),
        ("ranges", None),
        ("ranges", TENSOR, "ab"),
        ("ranges", TENSOR, [0.0, 1.0, 2.0]),
        ("ranges", TENSOR, {"0.0": 1, "1.0": 2}),
        *(("gains", GAIN, [value]) for value in (None, True, 1.5, "1", [1], 9, -9, 10**400, math.inf, math.nan)),
        ("gains", GAIN, 3),
        ("gains", []),
        ("key", []),
        ("key", "graph", 7),
        ("videos", "abc"),
        ("videos", [7]),
        ("videos", {}),
        ("coverage", [["a", 1]]),
        ("choice", "mse"),
        ("format", ["drn-calibration/1"]),
    ],
    ids=repr,
)
def test_damaged_table_is_rejected(table: CalibrationTable, tmp_path: Path, change: tuple[object, ...]) -> None:
    code = "unknown_format" if change[0] == "format" else code_for(change[-1])
    assert_refused(table, tmp_path, code, *change)


def code_for(value: object) -> str:
    """Return the error code of a table with this value, some of which are not JSON."""
    number = value[0] if isinstance(value, list) and value else value
    too_long = isinstance(number, int) and abs(number) > 10**300
    return "invalid_json" if too_long or number in (math.inf, -math.inf) or number != number else "invalid_table"


def assert_refused(table: CalibrationTable, directory: Path, code: str, *change: object) -> None:
    """Assert that a table with one change is rejected, also if its digests match the changed content."""
    path = directory / "t.json"
    table.save(path)
    value = edited(json.loads(path.read_text()), *change)
    changed = {"digest": digest_of(value, "key", "ranges", "gains"), "content_digest": digest_of(value, *CONTENT)}
    for digests in ({}, changed):
        path.write_text(json.dumps({**value, **digests}))
        with raises(CalibrationError, code, path):
            CalibrationTable.load(path)


CONTENT = ("key", "ranges", "gains", "videos", "coverage", "choice")


def digest_of(value: dict[str, object], *names: str) -> str:
    content = {name: value[name] for name in names}
    separators = (",", ":") if names == CONTENT else None
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=separators).encode()).hexdigest()


def test_deeply_nested_table_is_rejected(tmp_path: Path) -> None:
    path = tmp_path / "t.json"
    path.write_text('{"format": "drn-calibration/1", "ranges": ' + "[" * 100_000 + "]" * 100_000 + "}")
    with raises(CalibrationError, "nested_too_deeply", path, 64):
        CalibrationTable.load(path)


def test_damaged_table_ends_the_command_with_2(table: CalibrationTable, onnx_file: Path, tmp_path: Path) -> None:
    path = tmp_path / "t.json"
    table.save(path)
    path.write_text(json.dumps(edited(json.loads(path.read_text()), "ranges", TENSOR, [-math.inf, math.inf])))
    words = ["-m", "export.build_engine", "--model", onnx_file, "--precision", "int8", "--target", "onnxruntime"]
    result = subprocess.run([sys.executable, *words, "--table", path], capture_output=True, text=True)
    assert result.returncode == 2
    assert len(result.stderr.strip().splitlines()[-1]) < 1000
    assert "Traceback" not in result.stderr


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


def test_missing_table_raises_missing_file(tmp_path: Path) -> None:
    with raises(CalibrationError, "missing_file", tmp_path / "absent.json"):
        CalibrationTable.load(tmp_path / "absent.json")
