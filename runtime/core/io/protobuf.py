"""Walk the fields of serialized protobuf messages, and write fields, without the protobuf package."""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from typing import BinaryIO, Union

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5
Buffer = Union[bytes, mmap.mmap]


def mapped(stream: BinaryIO) -> Buffer:
    """Return the memory-mapped content of a file; empty bytes for an empty file, which cannot be mapped."""
    if not stream.seek(0, 2):
        return b""
    return mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)


def fields(content: Buffer, start: int, end: int) -> Iterator[tuple[int, int, int, int, int]]:
    """Yield the fields of a message; ValueError if the message is truncated or malformed.

    Args:
        start, end: offsets of the message in `content`.

    Yields:
        Field number, wire type, and three offsets: start of the tag, start and end of the value. The value of a `BYTES`
        field starts after its length.
    """
    offset = start
    while offset < end:
        tag_start = offset
        tag, offset = varint(content, offset)
        number, wire_type = tag >> 3, tag & 7
        if not number:
            raise ValueError("a field has the number 0")
        if wire_type == VARINT:
            value_start, offset = offset, varint(content, offset)[1]
        elif wire_type == BYTES:
            length, value_start = varint(content, offset)
            offset = value_start + length
        elif wire_type in (FIXED64, FIXED32):
            value_start = offset
            offset += 8 if wire_type == FIXED64 else 4
        else:
            raise ValueError(f"field {number} has the wire type {wire_type}")
        if offset > end:
            raise ValueError("it is truncated")
        yield number, wire_type, tag_start, value_start, offset


def varints(content: Buffer, start: int, end: int) -> Iterator[int]:
    """Yield the numbers of a varint field, packed or not.

    Args:
        start, end: offsets of the value in `content`, as `fields` yields them.
    """
    offset = start
    while offset < end:
        value, offset = varint(content, offset)
        yield value


def varint(content: Buffer, offset: int) -> tuple[int, int]:
    """Return the varint at an offset, and the offset after it; ValueError if it has more than ten bytes or no end."""
    value = shift = 0
    while offset < len(content) and shift < 70:
        byte = content[offset]
        offset += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, offset
        shift += 7
    raise ValueError("a varint has no end")


def number_field(number: int, value: int) -> bytes:
    """Return an encoded varint field."""
    return _encoded(number << 3 | VARINT) + _encoded(value)


def bytes_field(number: int, *parts: bytes) -> bytes:
    """Return an encoded field of bytes, whose content is the joined `parts`."""
    return b"".join((header(number, sum(map(len, parts))), *parts))


def header(number: int, size: int) -> bytes:
    """Return the tag and length before the content of a field of `size` bytes."""
    return _encoded(number << 3 | BYTES) + _encoded(size)


def _encoded(value: int) -> bytes:
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)
