"""Test `runtime.core.io.array_files`: truncated arrays, and archives that expand beyond the limits."""

from __future__ import annotations

import io
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest

from runtime.core.errors import FeatureError
from runtime.core.io.array_files import (
    MAX_DIRECTORY_BYTES,
    load_array,
    open_archive,
    read_archive,
    read_array,
    read_header,
)
from runtime.core.video import load_features
from tests.array_bytes import headed, npy
from tests.raising import quotes


@pytest.mark.parametrize("version", [(1, 0), (2, 0)])
@pytest.mark.parametrize(
    "array",
    [
        np.arange(6, dtype=">f8").reshape(2, 3),
        np.asfortranarray(np.ones((3, 2), np.float16)),
        np.zeros((0, 5)),
        np.float32(1),
        np.array("text"),
    ],
)
def test_read_array_returns_what_numpy_wrote(array: np.ndarray, version: tuple[int, int], tmp_path: Path) -> None:
    content = npy(np.asarray(array), version)
    read = read_array(io.BytesIO(content), len(content))
    np.testing.assert_array_equal(read, array)
    assert read.dtype == np.asarray(array).dtype
    (tmp_path / "a.npy").write_bytes(content)
    np.testing.assert_array_equal(load_array(tmp_path / "a.npy"), array)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x93NUMPY",
        b"\x93NUMPY\2\0" + struct.pack("<I", 2**32 - 1) + b"{",
        headed((10**12, 4096)),
        headed((2**62, 2**62)),
        headed((-1, 4)),
        headed((1,) * 64, content=b"1234"),
        headed((4, 4), content=b"\0" * 63),
        headed((1,), "'|O'", b"\x80\x04N."),
        headed((10**15,), "'|V0'"),
        headed("'no shape'"),
        npy(np.ones(3))[:-1],
    ],
)
def test_read_array_rejects_truncated_and_oversized_content(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.npy").write_bytes(content)
    with pytest.raises(FeatureError) as caught:
        load_features(tmp_path / "a.npy")
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError):  # noqa: PT011
        read_array(io.BytesIO(content), len(content))


def test_huge_array_header_is_rejected_without_reading(tmp_path: Path) -> None:
    class Counting(io.BytesIO):
        taken = 0

        def read(self, size: int | None = -1) -> bytes:
            assert size is not None
            assert size >= 0
            Counting.taken += size
            return super().read(size)

    stream = Counting(b"\x93NUMPY\2\0" + struct.pack("<I", 2**31) + b" " * 2**20)
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        read_header(stream)
    assert quotes(str(caught.value), 2**31)
    assert Counting.taken < 100


def test_read_archive_returns_arrays_by_name(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", one=np.ones(3), two=np.array("text"))
    arrays = read_archive(tmp_path / "a.npz", 2)
    assert set(arrays) == {"one", "two"}
    assert str(arrays["two"]) == "text"
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        read_archive(tmp_path / "a.npz", 1)
    assert quotes(str(caught.value), 2, 1)


def test_open_archive_rejects_large_directories() -> None:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("a", b"1")
    content = bytearray(stream.getvalue())
    content[-10:-6] = struct.pack("<I", MAX_DIRECTORY_BYTES + 1)
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        open_archive(io.BytesIO(bytes(content)))
    assert quotes(str(caught.value), MAX_DIRECTORY_BYTES)
    with pytest.raises(ValueError):  # noqa: PT011
        open_archive(io.BytesIO(bytes(content[:-1])))
