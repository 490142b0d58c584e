"""Compute the decompressed size of Parquet columns from their page headers, before pages are decompressed.

The metadata at the end of a malicious file may differ from its pages, and 100 bytes may contain two billion values.
Source: PageHeader in parquet.thrift of Apache Parquet; the compact protocol of Apache Thrift.
"""

from __future__ import annotations

import os
from typing import Any, BinaryIO

# Maximum size of a page header, whose statistics contain the smallest and the largest value.
MAX_HEADER_BYTES = 1 << 20
HEADER_BLOCK_BYTES = 1 << 10
MAX_DEPTH = 8
# Bytes of a value in memory by physical type. Byte strings are counted by the size of their pages.
VALUE_BYTES = {"BOOLEAN": 1, "INT32": 4, "FLOAT": 4, "INT64": 8, "DOUBLE": 8, "INT96": 12}

# Types of the compact protocol, sizes of the types that are skipped, and fields of a PageHeader.
_TRUE, _FALSE, _BYTE, _I16, _I32, _I64, _DOUBLE, _BINARY, _LIST, _SET, _MAP, _STRUCT = range(1, 13)
_SKIPPED_BYTES = {_TRUE: 0, _FALSE: 0, _BYTE: 1, _DOUBLE: 8}
_UNCOMPRESSED, _COMPRESSED, _DATA, _DICTIONARY, _DATA_V2 = 2, 3, 5, 7, 8
_NUM_VALUES = 1


def decompressed_bytes(stream: BinaryIO, column: Any) -> int:
    """Return an upper bound of the memory that the values of a column chunk take, in bytes.

    Args:
        column: a `pyarrow.parquet.ColumnChunkMetaData`.

    Raises:
        ValueError: the chunk is truncated, or its pages contradict the metadata.
    """
    position = column.data_page_offset
    if column.has_dictionary_page and column.dictionary_page_offset is not None:
        position = min(position, column.dictionary_page_offset)
    end = position + column.total_compressed_size
    size = os.fstat(stream.fileno()).st_size
    if not 0 <= position < end <= size:
        raise ValueError("a column extends beyond the file")
    num_values = decompressed = 0
    while position < end:
        header, length = _page_header(stream, position)
        stored, page = header.get(_COMPRESSED, -1), header.get(_UNCOMPRESSED, -1)
        count = sum(header.get(field, {}).get(_NUM_VALUES, 0) for field in (_DATA, _DATA_V2))
        if stored < 0 or page < 0 or count < 0:
            raise ValueError("a page has a negative size")
        num_values, decompressed = num_values + count, decompressed + page
        position += length + stored
    if position != end or num_values != column.num_values:
        raise ValueError(
            f"expected {column.num_values} values in the pages of {column.path_in_schema}, got {num_values}"
        )
    return max(decompressed, num_values * VALUE_BYTES.get(column.physical_type, 4))


def _page_header(stream: BinaryIO, position: int) -> tuple[dict[int, Any], int]:
    """Return the fields of the page header at a position, and its length in bytes."""
    size = HEADER_BLOCK_BYTES
    while True:
        stream.seek(position)
        content = stream.read(size)
        try:
            return _struct(content, 0, 0)
        except IndexError:
            if len(content) < size or size >= MAX_HEADER_BYTES:
                raise ValueError("a page header is truncated") from None
            size *= 8


def _struct(content: bytes, position: int, depth: int) -> tuple[dict[int, Any], int]:
    """Return the integers and structs of a struct by field number, and the position after it."""
    if depth > MAX_DEPTH:
        raise ValueError("a page header nests too deeply")
    fields: dict[int, Any] = {}
    field = 0
    while content[position]:
        delta, kind = content[position] >> 4, content[position] & 15
        position += 1
        if delta:
            field += delta
        else:
            field, position = _integer(content, position)
        value, position = _value(content, position, kind, depth)
        if value is not None:
            fields[field] = value
    return fields, position + 1


def _value(content: bytes, position: int, kind: int, depth: int) -> tuple[Any, int]:
    """Return the value of a field, and the position after it.

    Args:
        kind: type code of Thrift's compact protocol.

    Returns:
        An integer, or the fields of a struct, or None for a type that is skipped; and the position.
    """
    if kind in _SKIPPED_BYTES:
        return None, position + _SKIPPED_BYTES[kind]
    if kind in (_I16, _I32, _I64):
        return _integer(content, position)
    if kind == _BINARY:
        length, position = _varint(content, position)
        return None, position + length
    if kind == _STRUCT:
        return _struct(content, position, depth + 1)
    # Page headers have no lists, sets or maps.
    raise ValueError("a page header is damaged")


def _integer(content: bytes, position: int) -> tuple[int, int]:
    value, position = _varint(content, position)
    return (value >> 1) ^ -(value & 1), position


def _varint(content: bytes, position: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        byte = content[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
    raise ValueError("a page header is damaged")
