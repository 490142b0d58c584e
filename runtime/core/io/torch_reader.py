"""Read files written by `torch.save` into NumPy arrays, without torch and without running code.

A torch file contains a pickle, which is a program, and records of numbers. This module reads the pickle into a tree
that only describes its calls: nothing is imported, called or hashed. Then it bounds the tree and converts it.
"""

from __future__ import annotations

import io
import itertools
import math
import mmap
import os
import pickle
import pickletools
import struct
import zlib
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from typing import IO, Any, Callable

import numpy as np

from runtime.core.bfloat16 import from_bfloat16
from runtime.core.errors import CheckpointError, excerpt, reading
from runtime.core.io.array_files import MAX_UNFOLDED_BYTES, open_archive

MAGIC_NUMBER = 0x1950A86A20F9469CFC6C  # of torch/serialization.py
# Pickle instructions that call functions or hash keys in the base class, and that torch.save does not write.
REFUSED = ("EXT1", "EXT2", "EXT4", "INST", "OBJ", "NEWOBJ_EX", "DICT", "EMPTY_SET", "FROZENSET", "ADDITEMS")
# A checkpoint with its optimizer has about 30,000 instructions. With these limits reading takes seconds.
MAX_OPCODES = MAX_NODES = 1 << 20
# Sizes and settings need no more, and larger integers can be chosen to have equal hashes.
MAX_INTEGER_BITS = 64
# Storage class of torch -> NumPy type as stored. bfloat16 is widened to float32 after reading.
_NAMES = ("Double", "Float", "Half", "BFloat16", "Long", "Int", "Short", "Char", "Byte")
_DTYPES = ("<f8", "<f4", "<f2", "<u2", "<i8", "<i4", "<i2", "i1", "u1")
STORAGES = {f"torch.{name}Storage": np.dtype(dtype) for name, dtype in zip(_NAMES, _DTYPES)}
ORDERED_DICT = "collections.OrderedDict"
TENSORS = ("torch._utils._rebuild_tensor", "torch._utils._rebuild_tensor_v2")
PARAMETER = "torch._utils._rebuild_parameter"
STORAGE = object()  # represents the function that creates a storage, and cannot occur in a pickle
_PythonUnpickler: Any = pickle._Unpickler  # type: ignore[attr-defined,unused-ignore]


def check(path: str | os.PathLike[str]) -> frozenset[str]:
    """Check that the pickle of a file is intact and takes bounded time and memory; its numbers are not read.

    `torch.load(weights_only=True)` hashes everything that a pickle nests, which takes years for some files of 500
    bytes.

    Returns:
        Full names of all classes and functions in the file, in any module.

    Raises:
        CheckpointError: the file is missing, damaged or not of `torch.save`.
    """
    _read(content := _Content(path, strict=False))
    return frozenset(content.names)


def load(path: str | os.PathLike[str]) -> Any:
    """Return the content of a file of `torch.save`, with NumPy arrays instead of tensors and parameters.

    Dicts, lists, tuples, numbers and strings are returned as they were saved. Arrays are writable and in memory, and
    tensors of one storage share memory. bfloat16 becomes float32, which is exact.

    Raises:
        CheckpointError: the file is missing, damaged or not of `torch.save`, or contains other objects than tensors
            and containers.
    """
    return _read(_Content(path, strict=True))


class _Object(list):  # type: ignore[type-arg]
    """A call in a pickle, and the items and states that its result receives afterwards."""

    def __init__(self, callee: Any, args: Any = ()) -> None:
        super().__init__()
        self.callee, self.args, self.states = callee, tuple(args), list[Any]()


class _Unpickler(_PythonUnpickler):  # type: ignore[misc]
    """Build the tree of a pickle. The base class, which is in Python, hashes memo indices only."""

    def load_call(self) -> None:
        args = self.stack.pop()
        self.stack[-1] = _Object(self.stack[-1], args)

    def load_build(self) -> None:
        state = self.stack.pop()
        self.stack[-1].states.append(state)

    def load_empty_dict(self) -> None:
        self.append(_Object("dict"))

    def load_setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self.stack[-1].append((key, value))

    def load_setitems(self) -> None:
        items = self.pop_mark()
        self.stack[-1].extend(zip(items[::2], items[1::2]))

    dispatch = dict(_PythonUnpickler.dispatch)
    dispatch.update({pickle.REDUCE[0]: load_call, pickle.NEWOBJ[0]: load_call, pickle.BUILD[0]: load_build})
    dispatch.update({pickle.EMPTY_DICT[0]: load_empty_dict, pickle.SETITEM[0]: load_setitem})
    dispatch[pickle.SETITEMS[0]] = load_setitems


class _Content:
    """Pickles and storages of one file; `strict` rejects names that `load` does not read, and reads tensors."""

    def __init__(self, path: str | os.PathLike[str], strict: bool) -> None:
        self.path, self.strict, self.num_nodes = path, strict, 0
        self.names: set[str] = set()
        # Class, numbers, and function that reads the bytes, by key of a storage.
        self.kinds: dict[str, str] = {}
        self.numbers: dict[str, np.ndarray] = {}
        self.read: Callable[[str], np.ndarray]

    def refuse(self, reason: str, code: str = "code_in_file") -> CheckpointError:
        """Return the error of a file that is intact, but is not read."""
        return CheckpointError(f"{self.path} was not loaded: {reason}. Save plain tensors with torch.save.", code=code)

    def unpickle(self, stream: Any) -> Any:
        """Return the tree of one pickle, and leave the stream at its end."""
        start = stream.tell()
        for count, (opcode, argument, _) in enumerate(pickletools.genops(stream)):
            if count > MAX_OPCODES:
                raise self.refuse(f"its pickle has more than {MAX_OPCODES} instructions", code="pickle_too_large")
            if opcode.name in REFUSED or (opcode.name == "LONG_BINPUT" and int(argument or 0) > count):
                raise self.refuse(f"torch.save writes no {opcode.name} {excerpt(argument)}")
        stream.seek(start)
        unpickler: Any = _Unpickler(stream, encoding="latin1")
        unpickler.find_class, unpickler.persistent_load = self._find_name, self._find_storage
        return unpickler.load()

    def _find_name(self, module: str, name: str) -> str:
        module, name = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))
        self.names.add(full_name := f"{module}.{name}")
        if self.strict and full_name not in (*STORAGES, *TENSORS, ORDERED_DICT, PARAMETER):
            raise self.refuse(f"it names {excerpt(full_name)}, which is no tensor or container and was not run")
        return full_name

    def _find_storage(self, pid: Any) -> _Object:
        if not (isinstance(pid, tuple) and len(pid) > 2 and isinstance(pid[1], str) and isinstance(pid[2], str)):
            raise ValueError("a reference in it does not name a storage")
        self.kinds[pid[2]] = pid[1]
        return _Object(STORAGE, pid)

    def convert(self, node: Any) -> Any:
        """Return a part of the tree with arrays instead of tensors; without `strict`, check only its size."""
        # Shared parts count each time, because they are hashed, compared and printed each time.
        self.num_nodes += 1
        if self.num_nodes > MAX_NODES:
            raise ValueError(f"it has more than {MAX_NODES} values")
        if isinstance(node, int) and node.bit_length() > MAX_INTEGER_BITS:
            raise ValueError(f"it contains an integer of {node.bit_length()} bits, more than {MAX_INTEGER_BITS}")
        if isinstance(node, _Object):
            return self._object(node) if self.strict else self.convert([node.callee, *node.args, *node.states, *node])
        return type(node)(map(self.convert, node)) if isinstance(node, (list, tuple)) else node

    def _object(self, node: _Object) -> Any:
        if node.callee in ("dict", ORDERED_DICT):
            # Files of Python 2 have the items as an argument.
            return {self.convert(key): self.convert(value) for key, value in itertools.chain(*node.args, node)}
        if node.callee == PARAMETER:
            return self.convert(node.args[0])
        if node.callee in TENSORS:
            return self._tensor(*node.args)
        raise ValueError(f"it calls {excerpt(node.callee)}, which is no function")

    def _tensor(self, storage: Any, offset: Any, size: Any, stride: Any, *options: Any) -> np.ndarray:
        # The options after the second are pending conjugations and negations.
        if any(options[2:]) or not isinstance(storage, _Object) or storage.callee is not STORAGE:
            raise ValueError("a tensor has no plain storage")
        if len(size) != len(stride) or not all(type(count) is int and count >= 0 for count in (offset, *size, *stride)):
            raise ValueError("a tensor has an invalid size, offset or stride")
        numbers = self._storage(*storage.args)
        count, last = math.prod(size), offset + sum((length - 1) * step for length, step in zip(size, stride))
        if not count:
            return np.empty(size, numbers.dtype)
        if last >= numbers.size:
            raise ValueError(f"a tensor needs element {last} of a storage of {numbers.size} elements")
        if count * numbers.itemsize > max(numbers.nbytes, MAX_UNFOLDED_BYTES):
            raise self.refuse(f"{numbers.nbytes} bytes expand to {count * numbers.itemsize}", code="unfolds_too_large")
        strides = [step * numbers.itemsize for step in stride]
        return np.ndarray(size, numbers.dtype, numbers, offset * numbers.itemsize, strides)

    def _storage(self, tag: Any, kind: str, key: str, device: Any, count: Any, view: Any = None) -> np.ndarray:
        if key not in self.numbers:
            stored = self.read(key).view(STORAGES[kind])
            self.numbers[key] = from_bfloat16(stored) if kind == "torch.BFloat16Storage" else stored
        if (tag, kind, view, type(count), count) != ("storage", self.kinds[key], None, int, self.numbers[key].size):
            raise ValueError(f"the storage {excerpt(key)} does not have {excerpt(count)} elements of {excerpt(kind)}")
        return self.numbers[key]


def _read(content: _Content) -> Any:
    errors = reading(content.path, "a file that torch.save wrote", CheckpointError, "copy or download it again")
    with errors, open(content.path, "rb") as file:
        start = file.read(262)
        file.seek(0)
        if start.startswith((b"PK\x03\x04", b"\x80")):
            return content.convert((_legacy_tree if start.startswith(b"\x80") else _zip_tree)(file, content))
    if not start:
        raise content.refuse("it is empty", code="empty_file")
    if start[257:] == b"ustar":
        raise content.refuse("it is a tar archive of torch before 1.6", code="tar_archive")
    raise content.refuse(f"it starts with {start[:8]!r}, unlike files of torch.save", code="not_a_torch_file")


def _zip_tree(file: IO[bytes], content: _Content) -> Any:
    found = open_archive(file).infolist()
    records = {record.filename: record for record in found}
    # torch takes the first record of a name in any case, and the directory of the first record of all.
    if len({name.lower() for name in records}) < len(found) or len({name.split("/")[0] for name in records}) > 1:
        raise ValueError("its records are in several directories or have one name")
    prefix = next((name[:-8] for name in records if name.count("/") == 1 and name.endswith("/data.pkl")), None)
    if prefix is None:
        raise content.refuse("it is a zip archive without data.pkl", code="not_a_torch_file")
    if any(name.startswith((f"{prefix}code/", f"{prefix}constants.pkl")) for name in records):
        raise content.refuse("it is a TorchScript archive, which is a program", code="torchscript_archive")
    if (needed := sum(record.file_size for record in records.values())) > os.fstat(file.fileno()).st_size:
        raise ValueError(f"its records need {needed} bytes, but it has {os.fstat(file.fileno()).st_size}")
    for name, record in records.items():
        if record.compress_type or record.flag_bits & 1:
            raise content.refuse(f"its record {excerpt(name)} is compressed or encrypted", code="compressed_record")

    # Does not refer to `content`, so that arrays are freed without the garbage collector.
    def read(name: str) -> np.ndarray:
        record = records[name]
        file.seek(record.header_offset)
        lengths = struct.unpack("<26xHH", file.read(30))
        file.seek(record.header_offset + 30 + sum(lengths))
        numbers = np.fromfile(file, np.uint8, record.file_size)
        # The checksum is 0 with torch.serialization.set_crc32_options(False).
        if numbers.size != record.file_size or (record.CRC and zlib.crc32(numbers.data) != record.CRC):
            raise ValueError(f"the record {excerpt(record.filename)} does not match its size or checksum")
        return numbers

    if f"{prefix}byteorder" in records and read(f"{prefix}byteorder").tobytes() != b"little":
        raise ValueError("its byte order is not little-endian")
    content.read = lambda key: read(f"{prefix}data/{key}")
    return content.unpickle(io.BytesIO(read(f"{prefix}data.pkl").data))


def _legacy_tree(file: IO[bytes], content: _Content) -> Any:
    """Return the tree of a file of torch before 1.6: five pickles, then the storages in the order of the last one."""
    with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        if content.unpickle(mapped) != MAGIC_NUMBER:
            raise content.refuse("it is a pickle that torch.save did not write", code="not_a_torch_file")
        _protocol, _machine, tree, keys = (content.unpickle(mapped) for _ in range(4))
        file.seek(mapped.tell())
    storages = {}
    for key in content.convert(keys) if content.strict else ():
        count = int.from_bytes(file.read(8), "little")
        storages[key] = np.fromfile(file, np.uint8, count * STORAGES[content.kinds[key]].itemsize)
    content.read = storages.__getitem__
    return tree
