"""Read the metadata of an ONNX file and check its digest, without the onnx package and without parsing the graph.

The manifest of a model file of this toolkit contains a `"digest"`: the SHA-256 of the file with 64 zeros instead of the
digest, followed by all files of external data in the order of their names.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from runtime.core.errors import ModelFileError, excerpt, one_line, reading
from runtime.core.io.protobuf import BYTES, Buffer, bytes_field, fields, mapped

# Metadata keys of a DRN and of an extractor of clip features; see `runtime.artifacts.manifest` and
# `runtime.media.extractors`.
MANIFEST_KEYS = frozenset({"drn.manifest", "drn.extractor"})
DIGEST = "digest"
# Error code of a file that does not match its digest.
MISMATCH = "digest_mismatch"
UNSET = "0" * 64
BLOCK_BYTES = 1 << 20

# Fields of messages in onnx.proto on the path to tensors with external data.
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
# The end of a manifest from `with_digest`, as `json.dumps` writes it.
_DIGEST_ENTRY = re.compile(rb'"digest": "(.{64})"\}\Z', re.DOTALL)


@dataclasses.dataclass(frozen=True)
class Content:
    """The digests of a model file.

    Attributes:
        sha256: SHA-256 of the file alone.
        external: name and SHA-256 of each file of external data.
        recorded: digest in the manifest; None if it has none.
        digest: expected value of `recorded`.
    """

    sha256: str
    external: tuple[tuple[str, str], ...]
    recorded: str | None
    digest: str


def read_metadata(path: str | os.PathLike[str]) -> dict[str, str]:
    """Return the `metadata_props` of an ONNX file without reading its graph; ModelFileError if it is not ONNX."""
    with _parsing(path), open(path, "rb") as stream:
        return {key: text.decode() for key, text, _, _ in _metadata(mapped(stream))}


def raw_manifest(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return the manifest of a DRN model file without checks; empty if it has none, or cannot be read."""
    with contextlib.suppress(ModelFileError, ValueError, RecursionError):
        manifest = json.loads(read_metadata(path).get("drn.manifest", ""))
        return manifest if isinstance(manifest, dict) else {}
    return {}


def external_data(path: str | os.PathLike[str]) -> list[Path]:
    """Return the files of external data of an ONNX file, in the order of their names.

    Raises:
        ModelFileError: the file is not ONNX, or a file of external data is missing or in another directory.
    """
    with _parsing(path), open(path, "rb") as stream:
        return _external(Path(path), mapped(stream))


def read_content(path: str | os.PathLike[str]) -> Content:
    """Return the digests of a model file and its external data, in one pass; ModelFileError if it is not ONNX."""
    path = Path(path)
    with _parsing(path), open(path, "rb") as stream:
        content = mapped(stream)
        recorded = _recorded_digest(content)
        external = _external(path, content)
        start = recorded[0] if recorded else len(content)
        file_hash = hashlib.sha256()
        stream.seek(0)
        _hash(stream, start, file_hash)
        model_hash = file_hash.copy()
        if recorded:
            file_hash.update(stream.read(len(UNSET)))
            model_hash.update(UNSET.encode())
            _hash(stream, len(content), file_hash, model_hash)
        external_hashes = []
        for file in external:
            external_hash = hashlib.sha256()
            with open(file, "rb") as data:
                _hash(data, _size(data), external_hash, model_hash)
            external_hashes.append((file.name, external_hash.hexdigest()))
    digest = recorded[1] if recorded else None
    return Content(file_hash.hexdigest(), tuple(external_hashes), digest, model_hash.hexdigest())


def check(path: str | os.PathLike[str]) -> Content:
    """Return the digests of a model file after comparing them with the recorded digest, if it has one.

    Raises:
        ModelFileError: the file or its external data changed after the digest was recorded (code `digest_mismatch`), or
            it is not ONNX.
    """
    content = read_content(path)
    if content.recorded is not None and content.recorded != content.digest:
        raise ModelFileError(
            f"{path} does not match its digest, because it is damaged or another tool changed it. Export it again, or "
            "record the digest of an intended change with `python -m export.seal`.",
            code=MISMATCH,
        )
    return content


class DigestCheck:
    """A `check` that runs in a thread while the file is opened."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._path = path
        executor = concurrent.futures.ThreadPoolExecutor(1, "drn-check")
        self._check = executor.submit(check, path)
        executor.shutdown(wait=False)

    @property
    def mismatch(self) -> ModelFileError | None:
        """Return the error of a file that does not match its digest; None for other files."""
        error = self._check.exception()
        return error if isinstance(error, ModelFileError) and error.code == MISMATCH else None

    @contextlib.contextmanager
    def opening(self, library: str, advice: str, errors: type[Exception]) -> Iterator[None]:
        """Raise ModelFileError for errors of a library that opens the file; of a damaged file, that it is damaged.

        Args:
            library: name and version of the library.
            advice: what to do, as a sentence.
            errors: class of the library's errors.
        """
        try:
            yield
        except errors as error:
            if self.mismatch is not None:
                raise self.mismatch from error
            raise ModelFileError(
                f"{library} cannot open {self._path} ({one_line(error)}). {advice}", code="not_onnx"
            ) from error

    def result(self) -> Content:
        """Wait for the result of `check` and return it, or raise its error."""
        return self._check.result()


def with_digest(content: bytes, external: tuple[Path, ...] = ()) -> bytes:
    """Return the content of an ONNX file with a new digest in its manifest.

    Args:
        external: its files of external data, in the order of their names.
    """
    key, text, start, end = next(entry for entry in _metadata(content) if entry[0] in MANIFEST_KEYS)
    value = json.loads(text)
    value.pop(DIGEST, None)
    manifest = json.dumps({**value, DIGEST: UNSET}, allow_nan=False).encode()
    entry = bytes_field(METADATA_PROPS, bytes_field(KEY, key.encode()), bytes_field(VALUE, manifest))
    before, after = memoryview(content)[:start], memoryview(content)[end:]
    digest = hashlib.sha256(before)
    digest.update(entry)
    digest.update(after)
    for file in external:
        with open(file, "rb") as data:
            _hash(data, _size(data), digest)
    # The digest is the last value of the manifest, which is the end of the entry.
    return b"".join((before, entry[: -len(UNSET) - 2], digest.hexdigest().encode(), b'"}', after))


def write_digest(path: str | os.PathLike[str]) -> bytes:
    """Return the content of an ONNX file with a new digest of the file and its external data.

    Raises:
        ModelFileError: the file is not ONNX, or has no manifest.
    """
    path = Path(path)
    if not MANIFEST_KEYS & read_metadata(path).keys():
        raise ModelFileError(
            f"{path} has no manifest for a digest. Use a file of `python -m export.to_onnx`.", code="missing_manifest"
        )
    external = tuple(external_data(path))
    with reading(path, "an ONNX file with a manifest", ModelFileError, "export it again"):
        return with_digest(path.read_bytes(), external)


@contextlib.contextmanager
def _parsing(path: str | os.PathLike[str]) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, RecursionError) as error:
        problem = f"{path} is not an ONNX file ({error}). Copy it again, or export or build it again."
        if Path(path).suffix != ".onnx":
            problem = f"Expected an .onnx file, got {path}. Export a checkpoint with `python -m export.to_onnx`."
        raise ModelFileError(problem, code="not_onnx") from error


def _recorded_digest(content: Buffer) -> tuple[int, str] | None:
    """Return the offset of the digest of the manifest in the file, and the digest; None if it has none."""
    for key, text, _, end in _metadata(content):
        match = _DIGEST_ENTRY.search(text) if key in MANIFEST_KEYS else None
        if match:
            return end - len(UNSET) - 2, match.group(1).decode("ascii", "replace")
    return None


def _hash(stream: BinaryIO, end: int, *digests: hashlib._Hash) -> None:
    """Update the digests with the bytes from the position of a stream to `end`."""
    remaining = end - stream.tell()
    while remaining:
        block = stream.read(min(remaining, BLOCK_BYTES))
        if not block:
            raise ValueError("it is truncated")
        remaining -= len(block)
        for digest in digests:
            digest.update(block)


def _metadata(content: Buffer) -> Iterator[tuple[str, bytes, int, int]]:
    """Yield key and value of each entry of `metadata_props`, and start and end of its field in the file."""
    for number, wire_type, field_start, start, end in fields(content, 0, len(content)):
        if (number, wire_type) == (METADATA_PROPS, BYTES):
            key, value = _entry(content, start, end)
            yield key.decode(), value, field_start, end


def _entry(content: Buffer, start: int, end: int) -> tuple[bytes, bytes]:
    """Return key and value of a `StringStringEntryProto`."""
    texts = {KEY: b"", VALUE: b""}
    for number, wire_type, _, value_start, value_end in fields(content, start, end):
        if number in texts and wire_type == BYTES:
            texts[number] = content[value_start:value_end]
    return texts[KEY], texts[VALUE]


def _external(path: Path, content: Buffer) -> list[Path]:
    """Return the files of external data of all tensors of a model, in the order of their names."""
    files = []
    for name in sorted(set(_locations(content, 0, len(content), _MODEL))):
        file = path.parent / name
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise ModelFileError(f"{path} has external data outside its directory, {excerpt(name)}. Save it again.")
        if not file.is_file():
            raise ModelFileError(
                f"{path} needs its external data {excerpt(name)} in the same directory. Copy it there.",
                code="missing_file",
            )
        files.append(file)
    return files


def _locations(content: Buffer, start: int, end: int, message: int) -> Iterator[str]:
    """Yield the names of the files of external data of a protobuf message, given the kind of the message."""
    for number, wire_type, _, value_start, value_end in fields(content, start, end):
        inner = _INNER.get((message, number))
        if wire_type == BYTES and inner is not None:
            yield from _locations(content, value_start, value_end, inner)
        elif wire_type == BYTES and (message, number) == (_TENSOR, _EXTERNAL_DATA):
            key, value = _entry(content, value_start, value_end)
            if key == b"location":
                yield value.decode()


def _size(stream: BinaryIO) -> int:
    return os.fstat(stream.fileno()).st_size
