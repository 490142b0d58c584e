"""Read NumPy arrays from `.npy` and `.npz` files, with every size checked before memory is allocated.

A header of a few bytes can declare terabytes, and deflate expands a thousand times. NumPy checks neither.
"""

from __future__ import annotations

import dataclasses
import io
import math
import os
import zipfile
from collections.abc import Callable
from typing import IO, Any

import numpy as np

from runtime.core.errors import FeatureError, excerpt

# Limit of NumPy for the text of a header. It reads a length of up to 4 GiB before it checks.
MAX_HEADER_BYTES = 10_000
# NumPy 1 stops at 32 axes.
MAX_AXES = 32
# Compressed features: what unfolds to more than this, and to so many times its size, is a mistake or an attack.
MAX_UNFOLDED_BYTES, MAX_UNFOLDED_RATIO = 1 << 28, 50
# Of an archive: 46 bytes and a name for each member. `zipfile` makes an object of several hundred bytes of each.
MAX_DIRECTORY_BYTES = 1 << 24
BLOCK_BYTES = 1 << 20

# Of a zip archive: the end record, the record of larger sizes before it, and what leads to that.
_END_BYTES, _LOCATOR_BYTES, _LARGE_END_BYTES, _MAX_COMMENT_BYTES = 22, 20, 56, 65535


@dataclasses.dataclass(frozen=True)
class ArrayHeader:
    """The header of a `.npy` file.

    Attributes:
        shape: sizes of the axes.
        fortran: whether the first axis changes fastest.
        dtype: of the elements.
    """

    shape: tuple[int, ...]
    fortran: bool
    dtype: np.dtype[Any]

    @property
    def num_bytes(self) -> int:
        """Size of the elements in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


def check_unfolded(description: str, unfolded: int, stored: int) -> None:
    """Raise FeatureError for stored bytes that would unfold to far more than features do.

    Args:
        description: what is read, for messages.
        unfolded, stored: sizes in bytes.
    """
    if unfolded > max(MAX_UNFOLDED_BYTES, MAX_UNFOLDED_RATIO * stored):
        raise FeatureError(
            f"{description} would unfold from {stored} bytes to {unfolded}, as no features do; "
            "store them uncompressed.",
            code="unfolds_too_large",
        )


def read_header(stream: IO[bytes]) -> ArrayHeader:
    """Return the header of a `.npy` file; the stream is then at the first element.

    Raises:
        ValueError: it is not the header of a plain array. Parsers of NumPy raise others on damaged text.
    """
    start = stream.read(8)
    version = start[6:8]
    if start[:6] != b"\x93NUMPY" or version not in (b"\1\0", b"\2\0"):
        raise ValueError("its format is not that of a plain NumPy array")
    length_bytes = stream.read(2 if version == b"\1\0" else 4)
    length = int.from_bytes(length_bytes, "little")
    if length > MAX_HEADER_BYTES:
        raise ValueError(f"its header takes {length} bytes, and at most {MAX_HEADER_BYTES} are read")
    text = io.BytesIO(length_bytes + stream.read(length))
    read = np.lib.format.read_array_header_1_0 if version == b"\1\0" else np.lib.format.read_array_header_2_0
    header = ArrayHeader(*read(text))
    if header.dtype.hasobject or not header.dtype.itemsize:
        raise ValueError(f"its elements are {header.dtype}, which is not read")
    if len(header.shape) > MAX_AXES or any(size < 0 for size in header.shape):
        raise ValueError(f"it has an impossible shape of {len(header.shape)} axes")
    return header


def read_array(
    stream: IO[bytes], available: int, check: Callable[[ArrayHeader, int], None] | None = None
) -> np.ndarray:
    """Return the array of a `.npy` file in memory.

    Args:
        stream: the file, at its beginning.
        available: bytes that the whole file has.
        check: takes the header and the number of bytes after it, and raises an error if the caller does not take
            them; called before memory is allocated.

    Raises:
        ValueError: it is not a plain array, or is cut off.
    """
    header = read_header(stream)
    if check is not None:
        check(header, available - stream.tell())
    _check_complete(header, available - stream.tell())
    content = np.empty(header.num_bytes, np.uint8)
    count = 0
    while count < header.num_bytes:
        block = stream.read(min(BLOCK_BYTES, header.num_bytes - count))
        if not block:
            raise ValueError(f"its header declares {header.num_bytes} bytes and {count} are there")
        content[count : count + len(block)] = np.frombuffer(block, np.uint8)
        count += len(block)
    return content.view(header.dtype).reshape(header.shape, order="F" if header.fortran else "C")


def load_array(path: str | os.PathLike[str], mapped_bytes: int = -1) -> np.ndarray:
    """Return the array of a `.npy` file, mapped from the disk if the file has more than `mapped_bytes` bytes.

    Raises:
        ValueError: as of `read_array`. OSError: the file cannot be read.
    """
    with open(path, "rb") as stream:
        available = os.fstat(stream.fileno()).st_size
        if available <= mapped_bytes:
            return read_array(stream, available)
        header = read_header(stream)
        _check_complete(header, available - stream.tell())
        if not header.num_bytes or not header.shape:
            stream.seek(0)
            return read_array(stream, available)
        order: Any = "F" if header.fortran else "C"
        return np.memmap(stream, header.dtype, "r", stream.tell(), header.shape, order)


def open_archive(stream: IO[bytes], max_directory_bytes: int = MAX_DIRECTORY_BYTES) -> zipfile.ZipFile:
    """Return a zip archive whose directory is not larger than so many bytes.

    Raises:
        ValueError: it is cut off, or its directory is larger. `zipfile` raises others on damaged archives.
    """
    size = stream.seek(0, os.SEEK_END)
    tail_bytes = min(size, _END_BYTES + _MAX_COMMENT_BYTES + _LOCATOR_BYTES + _LARGE_END_BYTES)
    stream.seek(size - tail_bytes)
    tail = stream.read(tail_bytes)
    end = tail.rfind(b"PK\5\6")
    if end < 0 or len(tail) < end + _END_BYTES:
        raise ValueError("it is cut off, or not a zip archive")
    directory_bytes = [int.from_bytes(tail[end + 12 : end + 16], "little")]
    locator = tail[max(0, end - _LOCATOR_BYTES) : end]
    if locator.startswith(b"PK\6\7"):
        # `zipfile` then takes the sizes of the record before.
        large = tail[max(0, end - _LOCATOR_BYTES - _LARGE_END_BYTES) : end - _LOCATOR_BYTES]
        directory_bytes = [int.from_bytes(large[40:48], "little")]
    if max(directory_bytes) > max_directory_bytes:
        raise ValueError(f"its directory takes more than {max_directory_bytes} bytes")
    stream.seek(0)
    return zipfile.ZipFile(stream)


def read_member(
    archive: zipfile.ZipFile,
    member: zipfile.ZipInfo,
    source: str,
    check: Callable[[ArrayHeader, int], None] | None = None,
) -> np.ndarray:
    """Return the array of one member of a `.npz` file.

    Args:
        archive, member: from `open_archive`.
        source: names the file in messages.
        check: as of `read_array`.

    Raises:
        FeatureError: it would unfold to far more than features do.
        ValueError: it is not a plain array. `zipfile` and zlib raise others on damaged archives.
    """
    if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) or member.flag_bits & 1:
        raise ValueError(f"{excerpt(member.filename)} is packed in another way than deflate, or encrypted")
    assert archive.fp is not None
    size = archive.fp.seek(0, os.SEEK_END)
    check_unfolded(source, member.file_size, min(member.compress_size, size))
    with archive.open(member) as stream:
        array = read_array(stream, member.file_size, check)
        # Only at its end is the checksum of a member compared.
        while stream.read(BLOCK_BYTES):
            pass
        return array


def read_archive(path: str | os.PathLike[str], max_members: int) -> dict[str, np.ndarray]:
    """Return the arrays of a `.npz` file by name.

    Raises:
        FeatureError, ValueError: as of `read_member`, or it has more than `max_members` arrays.
    """
    with open(path, "rb") as stream, open_archive(stream) as archive:
        members = archive.infolist()
        if len(members) > max_members:
            raise ValueError(f"it holds {len(members)} arrays, and at most {max_members} are expected")
        return {
            member.filename.rpartition(".npy")[0] or member.filename: read_member(archive, member, f"{path}")
            for member in members
        }


def _check_complete(header: ArrayHeader, available: int) -> None:
    if header.num_bytes > available:
        raise ValueError(f"its header declares {header.num_bytes} bytes and {available} are there")
