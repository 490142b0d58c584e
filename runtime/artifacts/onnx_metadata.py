"""Read the metadata of an ONNX file and check its content, without the onnx package and without opening the graph.

A model file of this toolkit records a digest of itself in its manifest, as `"digest"`: the SHA-256 of the file with 64
zeros in the place of the digest, followed by every file of external data in the order of their names.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import logging
import os
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from runtime.core.errors import ModelFileError, excerpt, reading
from runtime.core.io.protobuf import BYTES, Buffer, bytes_field, fields, mapped

log = logging.getLogger("drn")

# Metadata keys of a DRN and of an extractor of clip features; see `runtime.artifacts.manifest` and
# `runtime.media.extractors`.
MANIFEST_KEYS = frozenset({"drn.manifest", "drn.extractor"})
DIGEST = "digest"
# Code of the error for a file that does not match its digest.
MISMATCH = "digest_mismatch"
UNSET = "0" * 64
BLOCK_BYTES = 1 << 20

# Fields of the messages in onnx.proto of ONNX that lead to tensors with external data.
METADATA_PROPS, KEY, VALUE = 14, 1, 2
_MODEL, _GRAPH, _NODE, _ATTRIBUTE, _SPARSE, _TENSOR, _FUNCTION = range(7)
_INNER = {
    (_MODEL, 7): _GRAPH,
    (_MODEL, 25): _FUNCTION,
    (_GRAPH, 1): _NODE,
    (_GRAPH, 5): _TENSOR,
    (_GRAPH, 15): _SPARSE,
    (_NODE, 5): _ATTRIBUTE,
    (_ATTRIBUTE, 5): _TENSOR,
    (_ATTRIBUTE, 6): _GRAPH,
    (_ATTRIBUTE, 10): _TENSOR,
    (_ATTRIBUTE, 11): _GRAPH,
    (_ATTRIBUTE, 22): _SPARSE,
    (_ATTRIBUTE, 23): _SPARSE,
    (_SPARSE, 1): _TENSOR,
    (_SPARSE, 2): _TENSOR,
    (_FUNCTION, 7): _NODE,
}
_EXTERNAL_DATA = 13
# `json.dumps` writes it so, at the end of the manifest, where `with_digest` puts it.
_SEAL = re.compile(rb'"digest": "(.{64})"\}\Z', re.DOTALL)


@dataclasses.dataclass(frozen=True)
class Content:
    """The hashes of a model file.

    Attributes:
        sha256: of the file alone.
        external: of each file of external data, by its name as the model gives it.
        recorded: the digest in the manifest; None where it has none.
        digest: what `recorded` should be.
    """

    sha256: str
    external: tuple[tuple[str, str], ...]
    recorded: str | None
    digest: str


def read_metadata(path: str | os.PathLike[str]) -> dict[str, str]:
    """Return the `metadata_props` of an ONNX file; ModelFileError if it is none. The graph is skipped, not read."""
    with _parsing(path), open(path, "rb") as stream:
        return {key: text.decode() for key, text, _, _ in _metadata(mapped(stream))}


def external_data(path: str | os.PathLike[str]) -> list[Path]:
    """Return the files beside an ONNX file that hold some of its tensors, in the order of their names.

    Raises:
        ModelFileError: the file is not ONNX, or names one that is missing or in another directory.
    """
    with _parsing(path), open(path, "rb") as stream:
        return _external(Path(path), mapped(stream))


def read_content(path: str | os.PathLike[str]) -> Content:
    """Return the hashes of a model file and its external data, in one pass; ModelFileError if it is not ONNX."""
    path = Path(path)
    with _parsing(path), open(path, "rb") as stream:
        content = mapped(stream)
        seal = _seal(content)
        external = _external(path, content)
        start = seal[0] if seal else len(content)
        whole = hashlib.sha256()
        stream.seek(0)
        _hash(stream, start, whole)
        unsealed = whole.copy()
        if seal:
            whole.update(stream.read(len(UNSET)))
            unsealed.update(UNSET.encode())
            _hash(stream, len(content), whole, unsealed)
        hashes = []
        for file in external:
            alone = hashlib.sha256()
            with open(file, "rb") as data:
                _hash(data, _size(data), alone, unsealed)
            hashes.append((file.name, alone.hexdigest()))
    return Content(whole.hexdigest(), tuple(hashes), seal[1] if seal else None, unsealed.hexdigest())


def check(path: str | os.PathLike[str]) -> Content:
    """Return the hashes of a model file after comparing them with the digest in it, where it has one.

    Raises:
        ModelFileError: the file or its external data changed since the digest was recorded, or it is not ONNX.
    """
    content = read_content(path)
    if content.recorded is not None and content.recorded != content.digest:
        raise ModelFileError(
            f"{path} does not match the digest that it records: it is damaged, or another tool changed it. Copy or "
            "export it again; `python -m export.seal` records the digest of a file that was changed on purpose.",
            code=MISMATCH,
        )
    return content


class DigestCheck:
    """`check` in a thread, beside the work of opening the file."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._path = path
        self._content: Content | None = None
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="drn-check", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._content = check(self._path)
        except Exception as error:
            self._error = error

    @property
    def mismatch(self) -> ModelFileError | None:
        """The error of a file that does not match its digest; None for any other file."""
        self._thread.join()
        error = self._error
        return error if isinstance(error, ModelFileError) and error.code == MISMATCH else None

    def result(self) -> Content:
        """Return the hashes once they are known; raises as `check`."""
        self._thread.join()
        if self._error is not None:
            raise self._error
        assert self._content is not None
        return self._content


def with_digest(content: bytes, external: tuple[Path, ...] = ()) -> bytes:
    """Return an ONNX file with its digest in the manifest; one that it has already is replaced.

    Args:
        content: the file, which carries a manifest.
        external: its files of external data, in the order of their names.
    """
    key, text, begin, end = next(entry for entry in _metadata(content) if entry[0] in MANIFEST_KEYS)
    value = json.loads(text)
    value.pop(DIGEST, None)
    manifest = json.dumps({**value, DIGEST: UNSET}, allow_nan=False).encode()
    entry = bytes_field(METADATA_PROPS, bytes_field(KEY, key.encode()), bytes_field(VALUE, manifest))
    digest = hashlib.sha256(memoryview(content)[:begin])
    digest.update(entry)
    digest.update(memoryview(content)[end:])
    for file in external:
        with open(file, "rb") as data:
            _hash(data, _size(data), digest)
    # The manifest ends the entry, and its digest the manifest.
    written = entry[: -len(UNSET) - 2] + digest.hexdigest().encode() + b'"}'
    return b"".join((memoryview(content)[:begin], written, memoryview(content)[end:]))


def write_digest(path: str | os.PathLike[str]) -> bytes:
    """Return the content of an ONNX file with the digest of the file and its external data recorded anew.

    Raises:
        ModelFileError: it is not ONNX, or carries no manifest.
    """
    path = Path(path)
    if not MANIFEST_KEYS & read_metadata(path).keys():
        raise ModelFileError(
            f"{path} carries no manifest to record a digest in; give a file of `python -m export.to_onnx`.",
            code="missing_manifest",
        )
    external = tuple(external_data(path))
    with reading(path, "an ONNX file with a manifest", ModelFileError, "export it again"):
        return with_digest(path.read_bytes(), external)


@contextlib.contextmanager
def _parsing(path: str | os.PathLike[str]) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, RecursionError) as error:
        raise ModelFileError(f"{path} is not an ONNX file ({error}); export it again.", code="not_onnx") from error


def _seal(content: Buffer) -> tuple[int, str] | None:
    """Return where in the file the digest of the manifest begins, and the digest; None where there is none."""
    for key, text, _, end in _metadata(content):
        match = _SEAL.search(text) if key in MANIFEST_KEYS else None
        if match:
            return end - len(UNSET) - 2, match.group(1).decode("ascii", "replace")
    return None


def _hash(stream: BinaryIO, end: int, *digests: hashlib._Hash) -> None:
    """Feed what is between the position of a stream and `end` to the digests."""
    left = end - stream.tell()
    while left:
        block = stream.read(min(left, BLOCK_BYTES))
        if not block:
            raise ValueError("it is cut off")
        left -= len(block)
        for digest in digests:
            digest.update(block)


def _metadata(content: Buffer) -> Iterator[tuple[str, bytes, int, int]]:
    """Yield key and value of each entry of `metadata_props`, and where in the file its field begins and ends."""
    for number, kind, begin, first, last in fields(content, 0, len(content)):
        if (number, kind) == (METADATA_PROPS, BYTES):
            key, value = _entry(content, first, last)
            yield key.decode(), value, begin, last


def _entry(content: Buffer, start: int, end: int) -> tuple[bytes, bytes]:
    """Return key and value of a `StringStringEntryProto`."""
    texts = {KEY: b"", VALUE: b""}
    for number, kind, _, first, last in fields(content, start, end):
        if number in texts and kind == BYTES:
            texts[number] = content[first:last]
    return texts[KEY], texts[VALUE]


def _external(path: Path, content: Buffer) -> list[Path]:
    """Return the files of external data that the tensors of a model name."""
    names = sorted(set(_locations(content, 0, len(content), _MODEL)))
    files = []
    for name in names:
        file = path.parent / name
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise ModelFileError(f"{path} keeps tensors in {excerpt(name)}, outside its directory; save it again.")
        if not file.is_file():
            raise ModelFileError(
                f"{path} needs its external data {excerpt(name)} beside it; copy it there.", code="missing_file"
            )
        files.append(file)
    return files


def _locations(content: Buffer, start: int, end: int, message: int) -> Iterator[str]:
    """Yield the names of the files that the tensors of a protobuf message lie in."""
    for number, kind, _, first, last in fields(content, start, end):
        inner = _INNER.get((message, number))
        if kind == BYTES and inner is not None:
            yield from _locations(content, first, last, inner)
        elif kind == BYTES and (message, number) == (_TENSOR, _EXTERNAL_DATA):
            key, value = _entry(content, first, last)
            if key == b"location":
                yield value.decode()


def _size(stream: BinaryIO) -> int:
    at = stream.tell()
    size = stream.seek(0, os.SEEK_END)
    stream.seek(at)
    return size
