"""Count what the pages of a Parquet file unfold to, from their headers, before any is unfolded.

The directory at the end of a file can lie about its pages, and a page of 100 bytes can hold two billion values.
Source: PageHeader in parquet.thrift of Apache Parquet; the compact protocol of Apache Thrift.
"""

from __future__ import annotations

import os
from typing import Any, BinaryIO

# Of a page header, whose statistics repeat the smallest and the largest value.
MAX_HEADER_BYTES = 1 << 20
HEADER_BLOCK_BYTES = 1 << 10
MAX_DEPTH = 8
# Bytes of a value and its levels in memory, by physical type. Values of bytes count by the pages they lie in.
VALUE_BYTES = {"BOOLEAN": 1, "INT32": 4, "FLOAT": 4, "INT64": 8, "DOUBLE": 8, "INT96": 12}

# Types of the compact protocol, and fields of a PageHeader.
_TRUE, _FALSE, _BYTE, _I16, _I32, _I64, _DOUBLE, _BINARY, _LIST, _SET, _MAP, _STRUCT = range(1, 13)
_UNCOMPRESSED, _COMPRESSED, _DATA, _DICTIONARY, _DATA_V2 = 2, 3, 5, 7, 8
_NUM_VALUES = 1


def unfolded_bytes(stream: BinaryIO, column: Any) -> int:
    """Return how much memory the values of a column chunk take at most.

    Args:
        stream: the file.
        column: a `pyarrow.parquet.ColumnChunkMetaData`.

    Raises:
        ValueError: the chunk is not whole, or its pages hold other counts than the directory has.
    """
    begin = column.data_page_offset
    if column.has_dictionary_page and column.dictionary_page_offset is not None:
        begin = min(begin, column.dictionary_page_offset)
    end = begin + column.total_compressed_size
    size = os.fstat(stream.fileno()).st_size
    if not 0 <= begin < end <= size:
        raise ValueError("a column reaches outside the file")
    values = unfolded = 0
    while begin < end:
        header, length = _page_header(stream, begin)
        stored, page = header.get(_COMPRESSED, -1), header.get(_UNCOMPRESSED, -1)
        count = sum(header.get(field, {}).get(_NUM_VALUES, 0) for field in (_DATA, _DATA_V2))
        if stored < 0 or page < 0 or count < 0:
            raise ValueError("a page has a negative size")
        values, unfolded = values + count, unfolded + page
        begin += length + stored
    if begin != end or values != column.num_values:
        raise ValueError(f"the pages of {column.path_in_schema} hold {values} values instead of {column.num_values}")
    return max(unfolded, values * VALUE_BYTES.get(column.physical_type, 4))


def _page_header(stream: BinaryIO, begin: int) -> tuple[dict[int, Any], int]:
    """Return the fields of the page header at a position, and its length in bytes."""
    size = HEADER_BLOCK_BYTES
    while True:
        stream.seek(begin)
        content = stream.read(size)
        try:
            return _struct(content, 0, 0)
        except IndexError:
            if len(content) < size or size >= MAX_HEADER_BYTES:
                raise ValueError("the header of a page is cut off") from None
            size *= 8


def _struct(content: bytes, location: int, depth: int) -> tuple[dict[int, Any], int]:
    """Return the integers and structs of a struct by field, and where it ends."""
    if depth > MAX_DEPTH:
        raise ValueError("the header of a page nests too deeply")
    fields: dict[int, Any] = {}
    field = 0
    while content[location]:
        delta, kind = content[location] >> 4, content[location] & 15
        location += 1
        if delta:
            field += delta
        else:
            field, location = _integer(content, location)
        value, location = _value(content, location, kind, depth)
        if value is not None:
            fields[field] = value
    return fields, location + 1


def _value(content: bytes, location: int, kind: int, depth: int) -> tuple[Any, int]:
    if kind in (_TRUE, _FALSE):
        return None, location
    if kind == _BYTE:
        return None, location + 1
    if kind in (_I16, _I32, _I64):
        return _integer(content, location)
    if kind == _DOUBLE:
        return None, location + 8
    if kind == _BINARY:
        length, location = _varint(content, location)
        return None, location + length
    if kind == _STRUCT:
        return _struct(content, location, depth + 1)
    # Page headers have no lists, sets or maps.
    raise ValueError("the header of a page is damaged")


def _integer(content: bytes, location: int) -> tuple[int, int]:
    value, location = _varint(content, location)
    return (value >> 1) ^ -(value & 1), location


def _varint(content: bytes, location: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        byte = content[location]
        location += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, location
    raise ValueError("the header of a page is damaged")
