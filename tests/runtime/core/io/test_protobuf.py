"""Test `runtime.core.io.protobuf` against the protobuf package."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.core.io.protobuf import BYTES, FIXED32, VARINT, bytes_field, fields, mapped, number_field, varint, varints


@given(st.integers(1, 1 << 28), st.binary(max_size=300), st.integers(0, (1 << 64) - 1))
def test_fields_returns_written_fields(number: int, text: bytes, value: int) -> None:
    content = b"\x00" + bytes_field(number, text[:5], text[5:]) + number_field(number, value)
    first, second = fields(content, 1, len(content))
    assert first[:3] == (number, BYTES, 1)
    assert content[first[3] : first[4]] == text
    assert second[:3] == (number, VARINT, first[4])
    assert second[4] == len(content)
    assert varint(content, second[3]) == (value, len(content))


def test_fields_of_a_tensor_match_protobuf_package() -> None:
    tensor = onnx.helper.make_tensor("name", onnx.TensorProto.FLOAT, [300, 1], [0.5] * 300)
    content = tensor.SerializeToString()
    rows = {number: (kind, first, last) for number, kind, _, first, last in fields(content, 0, len(content))}
    assert content[slice(*rows[8][1:])] == b"name"
    assert rows[2][0] == VARINT
    written = onnx.TensorProto(name="x", int32_data=[1, -1, 300]).SerializeToString()
    values = next(row for row in fields(written, 0, len(written)) if row[0] == 5)
    assert list(varints(written, *values[3:])) == [1, (1 << 64) - 1, 300]


@pytest.mark.parametrize(
    "content",
    [
        b"\x0a\x05abc",
        b"\x0d\x00\x00",
        b"\x0a" + b"\xff" * 10 + b"\x01",
        b"\x0b",
        b"\x0f",
        b"\x02\x00",
        b"\x08",
        bytes([8 | FIXED32]),
    ],
)
def test_fields_of_damaged_message_raises_value_error(content: bytes) -> None:
    with pytest.raises(ValueError):  # noqa: PT011
        list(fields(content, 0, len(content)))


def test_mapped_empty_file_is_empty(tmp_path: Path) -> None:
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "file").write_bytes(b"ab")
    with open(tmp_path / "empty", "rb") as stream:
        assert len(mapped(stream)) == 0
    with open(tmp_path / "file", "rb") as stream:
        assert mapped(stream)[:] == b"ab"
