"""Read NumPy arrays from `.npy` and `.npz` files, and check every size before memory is allocated.

A header of a few bytes can declare terabytes, and deflate expands data up to a thousand times. NumPy checks neither.
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

# NumPy has the same limit, but reads up to 4 GiB of header text before it checks.
MAX_HEADER_BYTES = 10_000
# The limit of NumPy 1.
MAX_AXES = 32
# Compressed data that expands beyond both limits is a mistake or an attack.
MAX_UNFOLDED_BYTES, MAX_UNFOLDED_RATIO = 1 << 28, 50
# The directory of an archive has 46 bytes and a name per member, of which `zipfile` makes several hundred bytes.
MAX_DIRECTORY_BYTES = 1 << 24
BLOCK_BYTES = 1 << 20

# Sizes of records of the zip format (APPNOTE.TXT 4.3): end, zip64 locator, zip64 end, comment.
_END_BYTES, _LOCATOR_BYTES, _LARGE_END_BYTES, _MAX_COMMENT_BYTES = 22, 20, 56, 65535


@dataclasses.dataclass(frozen=True)
class ArrayHeader:
    """The header of a `.npy` file.

    Attributes:
        fortran: whether the first axis changes fastest.
    """

    shape: tuple[int, ...]
    fortran: bool
    dtype: np.dtype[Any]

    @property
    def num_bytes(self) -> int:
        """Return the size of all elements in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


def check_unfolded(description: str, unfolded: int, stored: int) -> None:
    """Raise FeatureError (code `unfolds_too_large`) for compressed data that would expand far more than features do.

    Args:
        unfolded, stored: sizes in bytes after and before decompression.
    """
    if unfolded > max(MAX_UNFOLDED_BYTES, MAX_UNFOLDED_RATIO * stored):
        raise FeatureError(
            f"{description} expands from {stored} to {unfolded} bytes, more than features do. Store the features "
            "uncompressed.",
            code="unfolds_too_large",
        )


def read_header(stream: IO[bytes]) -> ArrayHeader:
    """Return the header of a `.npy` file, and leave the stream at the first element.

    Raises:
        ValueError: the stream does not start with the header of a plain array. NumPy raises other errors for damaged
            text.
    """
    start = stream.read(8)
    version = start[6:8]
    if start[:6] != b"\x93NUMPY" or version not in (b"\1\0", b"\2\0"):
        raise ValueError("it does not start like a NumPy array of format 1 or 2")
    length_bytes = stream.read(2 if version == b"\1\0" else 4)
    length = int.from_bytes(length_bytes, "little")
    if length > MAX_HEADER_BYTES:
        raise ValueError(f"its header has {length} bytes, more than {MAX_HEADER_BYTES}")
    text = io.BytesIO(length_bytes + stream.read(length))
    read = np.lib.format.read_array_header_1_0 if version == b"\1\0" else np.lib.format.read_array_header_2_0
    header = ArrayHeader(*read(text))
    if header.dtype.hasobject or not header.dtype.itemsize:
        raise ValueError(f"its elements are {header.dtype}, not numbers or text")
    if len(header.shape) > MAX_AXES or any(size < 0 for size in header.shape):
        raise ValueError(f"its shape has a negative size, or {len(header.shape)} of at most {MAX_AXES} axes")
    return header


def read_array(
    stream: IO[bytes], available: int, check: Callable[[ArrayHeader, int], None] | None = None
) -> np.ndarray:
    """Read the array of a `.npy` file into memory; ValueError if the file is not a plain array, or is truncated.

    Args:
        check: called with the header and the number of bytes after it, before memory is allocated; raises an error for
            an array that the caller does not accept.
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
            raise ValueError(f"its header declares {header.num_bytes} bytes, but it has {count}")
        content[count : count + len(block)] = np.frombuffer(block, np.uint8)
        count += len(block)
    return content.view(header.dtype).reshape(header.shape, order="F" if header.fortran else "C")


def load_array(path: str | os.PathLike[str], mapped_bytes: int = -1) -> np.ndarray:
    """Return the array of a `.npy` file; ValueError if the file is not a plain array, or is truncated.

    Args:
        mapped_bytes: file size in bytes above which the array is memory-mapped instead of read; a negative number maps
            every file.
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


def in_native_order(array: np.ndarray) -> np.ndarray:
    """Return an array in the byte order of this machine, as torch and raw copies of its bytes require."""
    return array.astype(array.dtype.newbyteorder("="), copy=False)


def open_archive(stream: IO[bytes], max_directory_bytes: int = MAX_DIRECTORY_BYTES) -> zipfile.ZipFile:
    """Open a zip archive whose directory has at most `max_directory_bytes` bytes.

    Raises:
        ValueError: the archive is truncated, or its directory is larger. `zipfile` raises other errors for damage.
    """
    size = stream.seek(0, os.SEEK_END)
    tail_bytes = min(size, _END_BYTES + _MAX_COMMENT_BYTES + _LOCATOR_BYTES + _LARGE_END_BYTES)
    stream.seek(size - tail_bytes)
    tail = stream.read(tail_bytes)
    end = tail.rfind(b"PK\5\6")
    if end < 0 or len(tail) < end + _END_BYTES:
        raise ValueError("it is truncated, or not a zip archive")
    directory_bytes = int.from_bytes(tail[end + 12 : end + 16], "little")
    locator = tail[max(0, end - _LOCATOR_BYTES) : end]
    if locator.startswith(b"PK\6\7"):
        # `zipfile` then uses the sizes in the zip64 end record.
        large = tail[max(0, end - _LOCATOR_BYTES - _LARGE_END_BYTES) : end - _LOCATOR_BYTES]
        directory_bytes = int.from_bytes(large[40:48], "little")
    if directory_bytes > max_directory_bytes:
        raise ValueError(f"its directory has {directory_bytes} bytes, more than {max_directory_bytes}")
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
        check: called with the header and the number of bytes after it, before memory is allocated; raises an error for
            an array that the caller does not accept.

    Raises:
        FeatureError: the array expands far more than features do; see `check_unfolded`.
        ValueError: the member is not a plain array. `zipfile` and zlib raise other errors for damaged archives.
    """
    if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) or member.flag_bits & 1:
        raise ValueError(f"{excerpt(member.filename)} is encrypted, or its compression is not deflate")
    assert archive.fp is not None
    size = archive.fp.seek(0, os.SEEK_END)
    check_unfolded(source, member.file_size, min(member.compress_size, size))
    with archive.open(member) as stream:
        array = read_array(stream, member.file_size, check)
        # `zipfile` compares the checksum of a member when its end is read.
        while stream.read(BLOCK_BYTES):
            pass
        return array


def read_archive(path: str | os.PathLike[str], max_members: int) -> dict[str, np.ndarray]:
    """Return the arrays of a `.npz` file by name.

    Raises:
        ValueError: the file has more than `max_members` arrays, or one that `read_member` does not accept.
    """
    with open(path, "rb") as stream, open_archive(stream) as archive:
        members = archive.infolist()
        if len(members) > max_members:
            raise ValueError(f"it contains {len(members)} arrays, more than {max_members}")
        return {
            member.filename.rpartition(".npy")[0] or member.filename: read_member(archive, member, f"{path}")
            for member in members
        }


def _check_complete(header: ArrayHeader, available: int) -> None:
    if header.num_bytes > available:
        raise ValueError(f"its header declares {header.num_bytes} bytes, but it has {available}")
