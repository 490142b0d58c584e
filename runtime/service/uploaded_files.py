"""Check the names and contents of uploaded files: arrays of features, and the formats of videos."""

from __future__ import annotations

import functools
import os
import zipfile
from pathlib import Path

import numpy as np

from runtime.core.errors import one_line
from runtime.core.io.array_files import ArrayHeader, open_archive, read_array, read_member
from runtime.service.http_errors import HttpError
from runtime.service.video_cache import MEDIA_TYPES

# A .npz file of one array has a directory entry of about 100 bytes; a directory of millions would fill the memory.
ZIP_DIRECTORY_BYTES = 4 << 10
MAX_NAME_LENGTH = 100


def display_name(name: str) -> str:
    """Return the last path component of a client's name for a video, in printable characters and bounded length."""
    stem = name.replace("\\", "/").rsplit("/", 1)[-1]
    return "".join(letter if letter.isprintable() else " " for letter in stem).strip()[:MAX_NAME_LENGTH] or "video"


def read_features(path: Path, max_bytes: int, dim: int) -> np.ndarray:
    """Return the features in a `.npy` file, or in a `.npz` file of one array.

    Sizes are checked before anything is decompressed, and no more is read than the header declares.

    Args:
        dim: D, feature width of the model.

    Returns:
        (num_clips, D) in the float type of the file.

    Raises:
        HttpError: 415 for another kind of file, 413 if it is too large, 422 if it is damaged or has another shape.
    """
    check = functools.partial(_check_header, max_bytes=max_bytes, dim=dim)
    with open(path, "rb") as stream:
        start = stream.read(512)
        stream.seek(0)
        # torch.save writes a zip archive with this as its first member.
        torch = b"/data.pkl" in start
        try:
            if start.startswith(b"\x93NUMPY"):
                return _native(read_array(stream, os.fstat(stream.fileno()).st_size, check))
            if start.startswith(b"PK") and not torch:
                with open_archive(stream, ZIP_DIRECTORY_BYTES) as archive:
                    return _native(read_member(archive, _array_of(archive), "The features", check))
        except HttpError:
            raise
        # On damaged files NumPy, zipfile and zlib raise exceptions without a common base class.
        except Exception as error:
            reason = one_line(error)[:200] or type(error).__name__
            raise HttpError(
                422, f"The features cannot be read: {reason}. Write one array with numpy.save or numpy.savez."
            ) from error
    if start.startswith(b"\x89HDF"):
        kind = "an HDF5 file"
    elif torch:
        kind = "a torch file, which is a pickle and never loaded"
    elif start.startswith(b"\x80"):
        kind = "a pickle, which is never loaded"
    else:
        kind = "not a NumPy file"
    raise HttpError(415, f"The features are {kind}. Send one array, as numpy.save or numpy.savez writes it.")


def sniff_container(path: Path) -> str:
    """Return the suffix of a video file, such as ".mp4", by its first bytes.

    Raises:
        HttpError: 415 for a format that is not supported.
    """
    with open(path, "rb") as stream:
        start = stream.read(64)
    if start[4:8] == b"ftyp":
        return ".mov" if start[8:12] == b"qt  " else ".mp4"
    if start.startswith(b"\x1a\x45\xdf\xa3"):
        return ".webm" if b"webm" in start else ".mkv"
    if start.startswith(b"RIFF") and start[8:12] == b"AVI ":
        return ".avi"
    formats = ", ".join(suffix[1:] for suffix in MEDIA_TYPES if suffix not in (".m4v", ".ogv"))
    raise HttpError(415, f"Expected a video file of one of these formats: {formats}. Convert the video to one of them.")


def _check_header(header: ArrayHeader, num_bytes: int, *, max_bytes: int, dim: int) -> None:
    """Raise HttpError unless an array has the type, shape and size that the model takes."""
    shape, dtype, size = header.shape, header.dtype, header.num_bytes
    if dtype.kind != "f" or dtype.itemsize > 8 or len(shape) != 2 or min(shape) < 1 or shape[1] != dim:
        raise HttpError(
            422,
            f"Expected floats of shape (num_clips, {dim}), got {dtype!s:.40} of shape {str(shape)[:60]}. Extract the "
            "features with the network that the model was trained with.",
        )
    if size > max_bytes:
        raise HttpError(413, f"Expected at most {max_bytes} bytes of features, got {size}. Send fewer clips.")
    if size != num_bytes:
        raise HttpError(
            422, f"The header of the features declares {size} bytes, got {num_bytes}. Write the file again."
        )


def _array_of(archive: zipfile.ZipFile) -> zipfile.ZipInfo:
    """Return the only array of a `.npz` file, or the one with the name features."""
    arrays = [member for member in archive.infolist() if member.filename.endswith(".npy")]
    named = [member for member in arrays if member.filename == "features.npy"] or arrays
    if len(named) != 1:
        raise ValueError(f"expected a .npz file of one array, or of one called features, got {len(arrays)} arrays")
    return named[0]


def _native(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array, array.dtype.newbyteorder("="))
