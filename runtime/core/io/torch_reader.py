"""Files written by `torch.save`, read into NumPy arrays without torch and without running anything in them.

A torch file is a pickle that points into records of raw numbers. A pickle is a program: whoever wrote it may
have it call any function. Here it may name only what tensors, arrays and plain containers are made of, and
even those names stand for small functions of this module. Reading goes in three steps: the opcodes are looked
over, the pickle builds notes (which record, which offset, which strides), and only then are the records read
and the notes, checked against what the records really hold, turned into arrays.
"""

from __future__ import annotations

import contextlib
import io
import math
import mmap
import os
import pickle
import pickletools
import re
import struct
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import IO, Any

import numpy as np

from runtime.core.bfloat16 import from_bfloat16
from runtime.core.errors import CheckpointError, reading
from runtime.core.io.array_files import open_archive
from runtime.core.io.torch_unpickler import (
    _DTYPES,
    UnknownObject,
    _AllowedGlobal,
    _bytes,
    _damaged,
    _is_size,
    _item_size,
    _NumpyArray,
    _NumpyDtype,
    _NumpyScalar,
    _Ordered,
    _shown,
    _Storage,
    _Tensor,
    _Unpickler,
)

# From torch/serialization.py.
_MAGIC_NUMBER = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL = 1001
# Strides of zero make a tensor of any size out of one number. Up to here that may be an honest `expand`.
_MAX_REPEATED_BYTES = 1 << 28
# A checkpoint with its optimizer takes about 30,000 opcodes and 1 MB. The bounds keep reading within seconds.
_MAX_PICKLE_BYTES = 1 << 28
_MAX_OPCODES = 1 << 20
# Containers that share parts are trees with the parts repeated to whoever compares, prints or copies them.
_MAX_REPEATED_NODES = 1 << 20


def check(path: str | os.PathLike[str]) -> None:
    """Refuse a file whose pickle is damaged, or takes time or memory without bound. Its numbers are not read.

    For files that torch itself then reads: `torch.load(weights_only=True)` hashes whatever a pickle nests, which a
    file of 500 bytes can prolong for years. Classes that the file asks for are left to torch to refuse.

    Raises:
        CheckpointError: as of `load`.
    """
    path = os.fspath(path)
    with _errors(path), open(path, "rb") as file:
        _load(file, path, inert=True, resolved=False)


def load(path: str | os.PathLike[str], *, inert: bool = False) -> Any:
    """What was given to `torch.save`, with NumPy arrays in place of tensors.

    Reads the zip files of torch 1.6 and later and the legacy files before it. Dicts, lists, tuples, sets,
    numbers and text come back as they were; parameters as arrays; `torch.Size` as a tuple; dtypes and devices
    as text (`"torch.float32"`, `"cuda:0"`). Tensors that shared their numbers share them still. Arrays are
    writable, in memory, and in the byte order of this machine; bfloat16 becomes float32, exactly.

    Args:
        path: the file.
        inert: where the file asks for a class or function not known here, put an `UnknownObject` object that knows
            its name and nothing else, instead of refusing the file. Nothing is imported or called either way.

    Raises:
        CheckpointError: there is no such file, it is not one that `torch.save` wrote, it is damaged, it asks
            for anything but tensors and plain containers, or a tensor reaches outside its storage.
    """
    path = os.fspath(path)
    with _errors(path), open(path, "rb") as file:
        return _load(file, path, inert)


@contextlib.contextmanager
def _errors(path: str) -> Iterator[None]:
    with reading(path, "a file that torch.save wrote", CheckpointError, "copy or download it again"):
        try:
            yield
        except RecursionError as error:
            raise CheckpointError(
                f"{path} nests its containers too deeply to be read; save it again.", code="nested_too_deeply"
            ) from error


def _load(file: IO[bytes], path: str, inert: bool, resolved: bool = True) -> Any:
    start = file.read(265)
    if not start:
        raise CheckpointError(f"{path} is empty; copy or download it again.", code="empty_file")
    file.seek(0)
    if start.startswith(b"PK\x03\x04"):
        return _load_zip(file, path, inert, resolved)
    if start[:1] == b"\x80":
        return _load_legacy(file, path, inert, resolved)
    if start[257:262] == b"ustar":
        raise CheckpointError(
            f"{path} is a tar archive; unpack it first, or save it again with torch 1.6 or later.", code="tar_archive"
        )
    raise CheckpointError(
        f"{path} is not a file that torch.save writes: it starts with {start[:8]!r}.", code="not_a_torch_file"
    )


def _load_zip(file: IO[bytes], path: str, inert: bool, resolved: bool) -> Any:
    file_size = os.fstat(file.fileno()).st_size
    try:
        archive = open_archive(file)
    except Exception as error:  # zipfile raises many kinds on damaged archives
        raise _damaged(path, f"{_shown(error)}") from error
    records = {record.filename: record for record in archive.infolist()}
    prefixes = [name[: -len("data.pkl")] for name in records if re.fullmatch(r"[^/]+/data\.pkl", name)]
    if len(prefixes) != 1:
        raise CheckpointError(
            f"{path} is a zip archive without data.pkl, so not one that torch.save wrote.", code="not_a_torch_file"
        )
    prefix = prefixes[0]
    if any(name == f"{prefix}constants.pkl" or name.startswith(f"{prefix}code/") for name in records):
        raise CheckpointError(
            f"{path} is a TorchScript archive, which is a program; save its tensors by torch.save.",
            code="torchscript_archive",
        )
    if sum(record.file_size for record in records.values()) > file_size:
        raise CheckpointError(
            f"{path} claims to hold more than its {file_size} bytes; it is refused.", code="damaged_file"
        )

    def read(name: str) -> np.ndarray:
        return _read_record(file, records[prefix + name], path, file_size)

    byte_order = "<"
    if prefix + "byteorder" in records:
        said = read("byteorder").tobytes()
        if said not in (b"little", b"big"):
            raise _damaged(path, f"its byte order is {said[:16]!r}, neither little nor big")
        byte_order = "<" if said == b"little" else ">"

    def read_storage(key: str) -> np.ndarray:
        if f"{prefix}data/{key}" not in records:
            raise _damaged(path, f"the record data/{_shown(key)} of a tensor is missing")
        return read(f"data/{key}")

    if records[f"{prefix}data.pkl"].file_size > _MAX_PICKLE_BYTES:
        raise _too_large(path)
    tree = _unpickle(read("data.pkl").tobytes(), path, inert)
    return None if not resolved else _Arrays(path, read_storage, byte_order).resolve(tree)


def _read_record(file: IO[bytes], record: zipfile.ZipInfo, path: str, file_size: int) -> np.ndarray:
    """The bytes of one record, in one copy. Torch stores its records uncompressed."""
    name = _shown(record.filename)
    if record.compress_type != zipfile.ZIP_STORED or record.flag_bits & 1:
        raise CheckpointError(
            f"{path} holds {name} compressed or encrypted, as torch.save never does; save it again.",
            code="compressed_record",
        )
    damaged = _damaged(path, f"the record {name} is not whole")
    if not 0 <= record.header_offset <= file_size - 30:
        raise damaged
    file.seek(record.header_offset)
    header = file.read(30)
    if len(header) != 30 or header[:4] != b"PK\x03\x04":
        raise damaged
    begin = record.header_offset + 30 + sum(struct.unpack("<HH", header[26:30]))
    if record.file_size != record.compress_size or record.file_size > file_size - begin:
        raise damaged
    content = _read_bytes(file, begin, record.file_size)
    # torch.serialization.set_crc32_options(False) leaves zeros.
    if content.size != record.file_size or (record.CRC != 0 and zlib.crc32(content.data) != record.CRC):
        raise damaged
    return content


def _read_bytes(file: IO[bytes], begin: int, count: int) -> np.ndarray:
    file.seek(begin)
    content = np.empty(count, np.uint8)
    taken = file.readinto(content.data) if count else 0  # type: ignore[attr-defined]
    return content[:taken]


def _load_legacy(file: IO[bytes], path: str, inert: bool, resolved: bool) -> Any:
    file_size = os.fstat(file.fileno()).st_size
    # Mapped only to find where each of the pickles ends: a mapping never reads past the end of the file.
    with contextlib.closing(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)) as mapped:
        magic_number = _next_pickle(mapped, path, inert)
        if type(magic_number) is not int or magic_number != _MAGIC_NUMBER:
            raise CheckpointError(
                f"{path} is a pickle that torch.save did not write; save it with torch.save.", code="not_a_torch_file"
            )
        protocol = _next_pickle(mapped, path, inert)
        if type(protocol) is not int or protocol != _LEGACY_PROTOCOL:
            raise _damaged(path, f"its protocol is not {_LEGACY_PROTOCOL}")
        _next_pickle(mapped, path, inert)  # of the machine that wrote it; the numbers are little-endian anyway
        stored: dict[str, _Storage] = {}
        tree = _next_pickle(mapped, path, inert, stored)
        keys = _next_pickle(mapped, path, inert)
        begin = mapped.tell()
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
        raise _damaged(path, "its list of storages is not a list of names")
    places: dict[str, tuple[int, int]] = {}
    for key in keys:
        if key not in stored:
            raise _damaged(path, f"its storage {_shown(key)} belongs to no tensor")
        header = _read_bytes(file, begin, 8) if begin <= file_size - 8 else np.empty(0, np.uint8)
        count = struct.unpack("<q", header.tobytes())[0] if header.size == 8 else -1
        begin += 8
        num_bytes = count * _item_size(stored[key].dtype)
        if not 0 <= num_bytes <= file_size - begin:
            raise _damaged(path, f"the file ends before the numbers of storage {_shown(key)} do")
        places[key] = (begin, num_bytes)
        begin += num_bytes

    def read_storage(key: str) -> np.ndarray:
        if key not in places:
            raise _damaged(path, f"the storage {_shown(key)} of a tensor is missing")
        return _read_bytes(file, *places[key])

    return _Arrays(path, read_storage, "<").resolve(tree) if resolved else None


def _next_pickle(mapped: mmap.mmap, path: str, inert: bool, stored: dict[str, _Storage] | None = None) -> Any:
    begin = mapped.tell()
    _check_opcodes(mapped, path)
    return _unpickle(mapped[begin : mapped.tell()], path, inert, stored, checked=True)


def _check_opcodes(stream: Any, path: str) -> None:
    """Read one pickle's opcodes without obeying them, up to its end.

    Finds truncation, and two things that `pickle` would do before anyone is asked: take objects out of the
    process's extension registry, and make room for as many memo entries as the file likes.
    """
    count = 0
    try:
        for opcode, argument, _ in pickletools.genops(stream):
            count += 1
            if count > _MAX_OPCODES:
                raise _too_large(path)
            if opcode.name in ("EXT1", "EXT2", "EXT4"):
                raise CheckpointError(f"{path} was refused: it uses pickle extension codes; torch.save does not.")
            memoized = opcode.name in ("PUT", "BINPUT", "LONG_BINPUT")
            if memoized and not (isinstance(argument, int) and 0 <= argument <= count):
                raise CheckpointError(f"{path} was refused: its pickle numbers its objects up to {argument}.")
    except CheckpointError:
        raise
    except Exception as error:  # pickletools raises many kinds on bytes that are no pickle
        raise _damaged(path, "its pickle breaks off or has no meaning") from error


def _unpickle(
    content: bytes,
    path: str,
    inert: bool,
    stored: dict[str, _Storage] | None = None,
    *,
    checked: bool = False,
) -> Any:
    """What a pickle describes, as plain containers around notes."""
    if not checked:
        _check_opcodes(io.BytesIO(content), path)
    unpickler = _Unpickler(content, path, inert, {} if stored is None else stored)
    try:
        tree = unpickler.load()
        _check_sharing(tree, path)
        return tree
    except (CheckpointError, RecursionError, MemoryError):
        raise
    except Exception as error:  # the pickle module documents no particular exception for hostile bytes
        raise _damaged(path, f"its pickle fails on {_shown(error)}") from error


def _check_sharing(tree: Any, path: str) -> None:
    """Raise CheckpointError if a tree whose parts are shared grows without bound when it is printed or compared."""
    sizes: dict[int, int] = {}

    def size(node: Any) -> int:
        if not isinstance(node, (list, tuple, set, frozenset, dict)):
            return 1
        if id(node) not in sizes:
            sizes[id(node)] = 1  # of a cycle
            children = [*node.values(), *node] if isinstance(node, dict) else node
            sizes[id(node)] = 1 + sum(map(size, children))
        return sizes[id(node)]

    if size(tree) > max(_MAX_REPEATED_NODES, 16 * len(sizes)):
        raise CheckpointError(f"{path} was refused: its containers repeat their parts without bound.")


def _too_large(path: str) -> CheckpointError:
    return CheckpointError(
        f"{path} was refused: its pickle is larger than that of any checkpoint; save tensors instead of lists.",
        code="pickle_too_large",
    )


class _Arrays:
    """Turns notes into arrays, reading each record once."""

    def __init__(self, path: str, read_storage: Callable[[str], np.ndarray], byte_order: str) -> None:
        self.path = path
        self.read_storage = read_storage
        self.byte_order = byte_order
        self.records: dict[str, np.ndarray] = {}
        self.numbers: dict[tuple[str, str], np.ndarray] = {}
        # Notes and containers by identity; the tree being resolved keeps them alive.
        self.done: dict[int, Any] = {}

    def resolve(self, node: Any) -> Any:
        """`node` with arrays in place of notes, each container replaced by a new one, cycles included."""
        if node is None or isinstance(node, (bool, int, float, complex, str, bytes, bytearray, UnknownObject)):
            return node
        if id(node) in self.done:
            return self.done[id(node)]
        if isinstance(node, list):
            filled: list[Any] = []
            self.done[id(node)] = filled
            filled.extend(self.resolve(item) for item in node)
            return filled
        if isinstance(node, dict):
            table: dict[Any, Any] = OrderedDict() if isinstance(node, _Ordered) else {}
            self.done[id(node)] = table
            for key, value in node.items():
                table[self._key(key)] = self.resolve(value)
            return table
        self.done[id(node)] = result = self._leaf(node)
        return result

    def _leaf(self, node: Any) -> Any:
        if isinstance(node, tuple):
            return tuple(self.resolve(item) for item in node)
        if isinstance(node, (set, frozenset)):
            return type(node)(self._key(item) for item in node)
        if isinstance(node, _Tensor):
            return self._tensor(node)
        if isinstance(node, _Storage):
            return self._tensor(_Tensor(node, node.dtype, 0, (node.count,), (1,)))
        if isinstance(node, _NumpyArray):
            return self._numpy_array(node)
        if isinstance(node, _NumpyScalar):
            return self._numpy_items((), node.dtype, node.content)[()]
        if isinstance(node, _NumpyDtype):
            return node.dtype()
        if isinstance(node, _AllowedGlobal):
            return node.name
        if isinstance(node, type) and issubclass(node, UnknownObject):
            return node()
        raise _damaged(self.path, f"it holds a {type(node).__name__}")

    def _key(self, node: Any) -> Any:
        key = self.resolve(node)
        try:
            hash(key)
        except TypeError as error:
            raise CheckpointError(f"{self.path} uses an array as a key, which is not read here.") from error
        return key

    def _tensor(self, tensor: _Tensor) -> np.ndarray:
        numbers = self._numbers(tensor.storage.key, tensor.dtype)
        stored_size = np.dtype(_DTYPES[tensor.dtype]).itemsize
        # Views of legacy storages count in their storage's own type; so do the sizes checked here.
        skip = tensor.storage.skip * _item_size(tensor.storage.dtype) // stored_size
        room = tensor.storage.count * _item_size(tensor.storage.dtype) // stored_size
        if skip + room > numbers.size:
            raise _damaged(self.path, f"a storage of {skip + room} numbers holds only {numbers.size}")
        count = math.prod(tensor.size)
        if count == 0:
            try:
                return np.empty(tensor.size, numbers.dtype)
            except ValueError as error:
                raise _damaged(self.path, "an empty tensor has impossible sizes") from error
        last = tensor.offset + sum((tensor.size[axis] - 1) * step for axis, step in enumerate(tensor.stride))
        if last >= room:
            raise _damaged(
                self.path,
                f"a tensor of size {_shown(tensor.size)} reaches number {last} of a storage of only {room}",
            )
        item = numbers.dtype.itemsize
        if count * item > max(numbers.nbytes, _MAX_REPEATED_BYTES):
            raise CheckpointError(
                f"{self.path} blows up {numbers.nbytes} bytes to a tensor of {count * item}; save a copy.",
                code="unfolds_too_large",
            )
        # NumPy checks sizes and strides against the buffer once more.
        return np.ndarray(
            tensor.size,
            numbers.dtype,
            buffer=numbers,
            offset=(skip + tensor.offset) * item,
            strides=[step * item if tensor.size[axis] > 1 else item for axis, step in enumerate(tensor.stride)],
        )

    def _numbers(self, key: str, dtype: str) -> np.ndarray:
        """All numbers of a record as one type, shared by every tensor that asks for them so."""
        if (key, dtype) not in self.numbers:
            if key not in self.records:
                self.records[key] = self.read_storage(key)
            content = self.records[key]
            stored = np.dtype(_DTYPES[dtype])
            numbers = content[: content.size - content.size % stored.itemsize].view(stored)
            if self.byte_order != _NATIVE_ORDER and stored.itemsize > 1:
                numbers = numbers.byteswap()
            if dtype == "bfloat16":
                numbers = from_bfloat16(numbers)
            elif dtype == "bool":
                numbers = numbers != 0
            self.numbers[key, dtype] = numbers
        return self.numbers[key, dtype]

    def _numpy_array(self, note: _NumpyArray) -> Any:
        if note.state is None:
            raise _damaged(self.path, "a NumPy array has no content")
        _, shape, dtype, fortran, content = note.state
        if isinstance(dtype, UnknownObject):
            return dtype
        if not (isinstance(shape, tuple) and all(map(_is_size, shape)) and isinstance(dtype, _NumpyDtype)):
            raise _damaged(self.path, "a NumPy array has no proper shape or type")
        if fortran:
            return self._numpy_items(shape[::-1], dtype, content).T
        return self._numpy_items(shape, dtype, content)

    def _numpy_items(self, shape: tuple[int, ...], note: _NumpyDtype, content: Any) -> np.ndarray:
        try:
            dtype = note.dtype()
            content = bytearray(_bytes(content))
            if len(content) != math.prod(shape) * dtype.itemsize:
                raise ValueError("length")
            items = np.ndarray(shape, dtype, buffer=content if content else None)
        except (TypeError, ValueError, pickle.UnpicklingError) as error:
            raise _damaged(self.path, "a NumPy array does not have the bytes it needs") from error
        if items.dtype.kind == "b":
            items = items.view(np.uint8) != 0
        return items.astype(items.dtype.newbyteorder("="), copy=False)


_NATIVE_ORDER = "<" if np.little_endian else ">"
