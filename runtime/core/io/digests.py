"""Compute SHA-256 digests of files and JSON values, and stamps that change when a file changes."""

from __future__ import annotations

import hashlib
import json
import os
import stat
from typing import Any

# Number and size of the blocks of a large file that `content_stamp` reads.
SAMPLES = 8
SAMPLE_BYTES = 4096


def sha256(path: str | os.PathLike[str]) -> str:
    """Return the SHA-256 of a file as 64 hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        for block in iter(lambda: stream.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()


def content_stamp(path: str | os.PathLike[str]) -> tuple[int, int, str]:
    """Return a stamp that changes when the content of a file changes; of a large file only samples are read.

    Returns:
        Size in bytes, modification time in ns, and the SHA-256 of evenly spaced blocks, including the first and the
        last.
    """
    digest = hashlib.sha256()
    with open(path, "rb", buffering=0) as stream:
        status = os.fstat(stream.fileno())
        if status.st_size <= SAMPLES * SAMPLE_BYTES:
            digest.update(stream.read())
        else:
            for index in range(SAMPLES):
                stream.seek((status.st_size - SAMPLE_BYTES) * index // (SAMPLES - 1))
                digest.update(stream.read(SAMPLE_BYTES))
    return status.st_size, status.st_mtime_ns, digest.hexdigest()


def file_stamp(path: str | os.PathLike[str]) -> tuple[int, ...] | None:
    """Return a stamp that changes when a regular file is written or replaced; None if there is no such file.

    The file is not opened. The stamp includes the time of the last status change, because copies may preserve the time
    of the last write.
    """
    try:
        status = os.stat(path)
    except OSError:
        return None
    if not stat.S_ISREG(status.st_mode):
        return None
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def json_digest(value: Any) -> str:
    """Return the SHA-256 of a JSON value, which does not depend on layout and order of keys."""
    # Converts tuples to lists and number keys to strings, as in a value that was read from a file.
    plain = json.loads(json.dumps(value))
    return hashlib.sha256(json.dumps(plain, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
