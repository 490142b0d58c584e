"""The metadata of an ONNX file, without opening the graph: for files in a precision that nothing here can run."""

from __future__ import annotations

import io
import os
from typing import BinaryIO

from runtime.errors import ModelFileError

# ModelProto.metadata_props, and key and value of its entries. Source: onnx.proto of ONNX.
METADATA_PROPS, KEY, VALUE = 14, 1, 2
VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5


def read_metadata(path: str | os.PathLike[str]) -> dict[str, str]:
    """Return the `metadata_props` of an ONNX file; ModelFileError if it is none. The graph is skipped, not read."""
    found = {}
    try:
        with open(path, "rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            while stream.tell() < size:
                field, content = _next_field(stream, size, METADATA_PROPS)
                if field == METADATA_PROPS:
                    key, value = _entry(content)
                    found[key] = value
    except (OSError, ValueError) as error:
        raise ModelFileError(f"{path} is not an ONNX file ({error}); export it again.") from error
    return found


def _entry(content: bytes) -> tuple[str, str]:
    stream, texts = io.BytesIO(content), {KEY: "", VALUE: ""}
    while stream.tell() < len(content):
        field, text = _next_field(stream, len(content), KEY, VALUE)
        if field in texts:
            texts[field] = text.decode()
    return texts[KEY], texts[VALUE]


def _next_field(stream: BinaryIO, end: int, *wanted: int) -> tuple[int, bytes]:
    """Return the number and, if it is wanted, the content of the next field of a protobuf message."""
    tag = _varint(stream)
    field, kind = tag >> 3, tag & 7
    if kind == VARINT:
        _varint(stream)
        return field, b""
    if kind not in (FIXED64, BYTES, FIXED32) or not field:
        raise ValueError(f"field {field} of kind {kind}")
    length = {FIXED64: 8, FIXED32: 4}.get(kind) or (_varint(stream) if kind == BYTES else 0)
    if stream.tell() + length > end:
        raise ValueError("it is cut off")
    if kind == BYTES and field in wanted:
        return field, stream.read(length)
    stream.seek(length, os.SEEK_CUR)
    return field, b""


def _varint(stream: BinaryIO) -> int:
    value = 0
    for shift in range(0, 70, 7):
        byte = stream.read(1)
        if not byte:
            raise ValueError("it is cut off")
        value |= (byte[0] & 0x7F) << shift
        if byte[0] < 0x80:
            return value
    raise ValueError("a number without end")
