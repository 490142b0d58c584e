"""Compute digests of files and of JSON values, and stamps that change when a file does."""

from __future__ import annotations

import hashlib
import json
import os
import stat
from typing import Any

# Blocks of a large file that `content_stamp` reads.
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
    """Return what changes when the content of a file does, without reading all of a large one.

    Returns:
        Its size in bytes, the time of its last change in ns, and the SHA-256 of blocks spread evenly over it, the first
        and the last among them.
    """
    digest = hashlib.sha256()
    with open(path, "rb", buffering=0) as stream:
        stat = os.fstat(stream.fileno())
        if stat.st_size <= SAMPLES * SAMPLE_BYTES:
            digest.update(stream.read())
        else:
            for index in range(SAMPLES):
                stream.seek((stat.st_size - SAMPLE_BYTES) * index // (SAMPLES - 1))
                digest.update(stream.read(SAMPLE_BYTES))
    return stat.st_size, stat.st_mtime_ns, digest.hexdigest()


def file_stamp(path: str | os.PathLike[str]) -> tuple[int, ...] | None:
    """Return what changes when a regular file is written or replaced, without opening it; None where there is none.

    The time of the last status change is part of it, because copies may keep the time of the last write.
    """
    try:
        status = os.stat(path)
    except OSError:
        return None
    if not stat.S_ISREG(status.st_mode):
        return None
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def json_digest(value: Any) -> str:
    """Return the SHA-256 of a JSON value, the same however it is laid out and whatever the order of its keys."""
    # Once there and back: tuples become lists and number keys text, as they are when they are read from a file.
    plain = json.loads(json.dumps(value))
    return hashlib.sha256(json.dumps(plain, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
