"""Return the bytes of NumPy's files, of valid and of invalid ones."""

from __future__ import annotations

import io
import zipfile

import numpy as np


def npy(array: np.ndarray, version: tuple[int, int] | None = None) -> bytes:
    """Return an array as a .npy file; objects are pickled."""
    stream = io.BytesIO()
    np.lib.format.write_array(stream, array, version)
    return stream.getvalue()


def npz(packed: bool = False, **arrays: np.ndarray) -> bytes:
    """Return arrays as a .npz file."""
    stream = io.BytesIO()
    (np.savez_compressed if packed else np.savez)(stream, **arrays)  # type: ignore[arg-type]
    return stream.getvalue()


def headed(shape: object, descr: str = "'<f4'", content: bytes = b"") -> bytes:
    """Return a .npy file with any shape and type in its header, as Python expressions, and any content."""
    head = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}".encode()
    head += b" " * (-(len(head) + 11) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(head).to_bytes(2, "little") + head + content


def zipped(content: bytes, name: str = "a.npy", kind: int = zipfile.ZIP_DEFLATED, times: int = 1) -> bytes:
    """Return an archive with a file that has the content, repeated."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", kind) as archive, archive.open(name, "w", force_zip64=True) as member:
        for _ in range(times):
            member.write(content)
    return stream.getvalue()
