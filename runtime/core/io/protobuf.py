"""Walk the fields of serialized protobuf messages, and write fields, without the protobuf package."""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from typing import BinaryIO, Union

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5
Buffer = Union[bytes, mmap.mmap]


def mapped(stream: BinaryIO) -> Buffer:
    """Return the content of a file for `fields`; pages are read as they are used, and an empty file is empty bytes."""
    if not stream.seek(0, 2):
        return b""
    return mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)


def fields(content: Buffer, start: int, end: int) -> Iterator[tuple[int, int, int, int, int]]:
    """Yield number, wire type, start of the tag, start and end of the value of each field of a message.

    The value of a `BYTES` field starts behind its length.

    Args:
        content: holds the message.
        start, end: of the message, as offsets into `content`.

    Raises:
        ValueError: it is cut off, or no such message.
    """
    at = start
    while at < end:
        begin = at
        tag, at = varint(content, at)
        number, kind = tag >> 3, tag & 7
        if not number:
            raise ValueError("a field of number 0")
        if kind == VARINT:
            first, at = at, varint(content, at)[1]
        elif kind == BYTES:
            length, first = varint(content, at)
            at = first + length
        elif kind in (FIXED64, FIXED32):
            first = at
            at += 8 if kind == FIXED64 else 4
        else:
            raise ValueError(f"field {number} of kind {kind}")
        if at > end:
            raise ValueError("it is cut off")
        yield number, kind, begin, first, at


def varints(content: Buffer, start: int, end: int) -> Iterator[int]:
    """Yield the numbers of a packed field, or the one of a field that is not packed."""
    at = start
    while at < end:
        value, at = varint(content, at)
        yield value


def varint(content: Buffer, at: int) -> tuple[int, int]:
    """Return the number at an offset, and the offset behind it; ValueError if it does not end."""
    value = shift = 0
    while at < len(content) and shift < 70:
        byte = content[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
    raise ValueError("a number without end")


def number_field(number: int, value: int) -> bytes:
    """Return a field that holds a number."""
    return _encoded(number << 3 | VARINT) + _encoded(value)


def bytes_field(number: int, *parts: bytes) -> bytes:
    """Return a field that holds bytes, which may come in parts."""
    return b"".join((header(number, sum(map(len, parts))), *parts))


def header(number: int, size: int) -> bytes:
    """Return what precedes the content of a field that holds `size` bytes."""
    return _encoded(number << 3 | BYTES) + _encoded(size)


def _encoded(value: int) -> bytes:
    written = bytearray()
    while value > 0x7F:
        written.append(value & 0x7F | 0x80)
        value >>= 7
    written.append(value)
    return bytes(written)
