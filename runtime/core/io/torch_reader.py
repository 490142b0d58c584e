"""Read files written by `torch.save` into NumPy arrays, without torch and without running code.

A torch file is a pickle, which is a program, and records of numbers. Here the pickle becomes a tree that only describes
its calls: no name is imported, nothing is called, nothing is hashed. Then the tree is bounded and converted.
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
# A checkpoint with its optimizer takes about 30,000 instructions. The limits keep reading within seconds.
MAX_OPCODES = MAX_NODES = 1 << 20
# Larger integers can be chosen to have equal hashes, and are no sizes or settings.
MAX_INTEGER_BITS = 64
# Storage class of torch -> NumPy type as stored. bfloat16 is widened to float32 after reading.
_NAMES = ("Double", "Float", "Half", "BFloat16", "Long", "Int", "Short", "Char", "Byte")
_DTYPES = ("<f8", "<f4", "<f2", "<u2", "<i8", "<i4", "<i2", "i1", "u1")
STORAGES = {f"torch.{name}Storage": np.dtype(dtype) for name, dtype in zip(_NAMES, _DTYPES)}
ORDERED_DICT = "collections.OrderedDict"
TENSORS = ("torch._utils._rebuild_tensor", "torch._utils._rebuild_tensor_v2")
PARAMETER = "torch._utils._rebuild_parameter"
STORAGE = object()  # stands for the function that makes a storage, and cannot occur in a pickle
_PythonUnpickler: Any = pickle._Unpickler  # type: ignore[attr-defined,unused-ignore]


def check(path: str | os.PathLike[str]) -> frozenset[str]:
    """Refuse a file whose pickle is damaged, or takes time or memory without bound; its numbers are not read.

    `torch.load(weights_only=True)` hashes all that a pickle nests, which a file of 500 bytes can prolong for years.

    Returns:
        The full names of the classes and functions in the file, which may be any. CheckpointError is as of `load`.
    """
    _read(content := _Content(path, strict=False))
    return frozenset(content.names)


def load(path: str | os.PathLike[str]) -> Any:
    """Return the content of a file of `torch.save`, with NumPy arrays in place of tensors and parameters.

    Dicts, lists, tuples, numbers and text are as they were written. Arrays are writable and in memory; tensors of one
    storage share it. bfloat16 becomes float32, which is exact.

    Raises:
        CheckpointError: the file is missing, damaged or not of `torch.save`, or holds more than tensors and containers.
    """
    return _read(_Content(path, strict=True))


class _Object(list):  # type: ignore[type-arg]
    """A call that a pickle describes, and the items and states that its result is given afterwards."""

    def __init__(self, callee: Any, args: Any = ()) -> None:
        super().__init__()
        self.callee, self.args, self.states = callee, tuple(args), list[Any]()


class _Unpickler(_PythonUnpickler):  # type: ignore[misc]
    """Build the tree that a pickle describes. The base class, in Python, hashes nothing but memo indices."""

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
    """Pickles and storages of one file; `strict` refuses names that `load` does not read, and reads tensors."""

    def __init__(self, path: str | os.PathLike[str], strict: bool) -> None:
        self.path, self.strict, self.num_nodes = path, strict, 0
        self.names: set[str] = set()
        # By the key of a storage: its class, its numbers, and the function that reads its bytes.
        self.kinds: dict[str, str] = {}
        self.numbers: dict[str, np.ndarray] = {}
        self.read: Callable[[str], np.ndarray]

    def refuse(self, reason: str, code: str = "code_in_file") -> CheckpointError:
        return CheckpointError(f"{self.path} was refused: {reason}. Save plain tensors with torch.save.", code=code)

    def unpickle(self, stream: Any) -> Any:
        """Return the tree of one pickle, and leave the stream at its end."""
        begin = stream.tell()
        for count, (opcode, argument, _) in enumerate(pickletools.genops(stream)):
            if count > MAX_OPCODES:
                raise self.refuse(f"its pickle has more than {MAX_OPCODES} instructions", code="pickle_too_large")
            if opcode.name in REFUSED or (opcode.name == "LONG_BINPUT" and int(argument or 0) > count):
                raise self.refuse(f"torch.save writes no {opcode.name} {excerpt(argument)}; nothing was run")
        stream.seek(begin)
        unpickler: Any = _Unpickler(stream, encoding="latin1")
        unpickler.find_class, unpickler.persistent_load = self._find_name, self._find_storage
        return unpickler.load()

    def _find_name(self, module: str, name: str) -> str:
        module, name = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))
        self.names.add(full_name := f"{module}.{name}")
        if self.strict and full_name not in (*STORAGES, *TENSORS, ORDERED_DICT, PARAMETER):
            raise self.refuse(f"it names {excerpt(full_name)}, no tensor or container; it was not run")
        return full_name

    def _find_storage(self, pid: Any) -> _Object:
        if not (isinstance(pid, tuple) and len(pid) > 2 and isinstance(pid[1], str) and isinstance(pid[2], str)):
            raise ValueError("it refers to something that is no storage")
        self.kinds[pid[2]] = pid[1]
        return _Object(STORAGE, pid)

    def convert(self, node: Any) -> Any:
        """Return a part of the tree with arrays in place of tensors; without `strict`, only bound its size."""
        # Parts that are shared count each time, because they are hashed, compared and printed each time.
        self.num_nodes += 1
        if self.num_nodes > MAX_NODES:
            raise ValueError(f"it has more than {MAX_NODES} values, or repeats its parts without bound")
        if isinstance(node, int) and node.bit_length() > MAX_INTEGER_BITS:
            raise ValueError(f"it holds an integer of {node.bit_length()} bits, and more than {MAX_INTEGER_BITS}")
        if isinstance(node, _Object):
            return self._object(node) if self.strict else self.convert([node.callee, *node.args, *node.states, *node])
        return type(node)(map(self.convert, node)) if isinstance(node, (list, tuple)) else node

    def _object(self, node: _Object) -> Any:
        if node.callee in ("dict", ORDERED_DICT):
            # Python 2 gives the items as an argument.
            return {self.convert(key): self.convert(value) for key, value in itertools.chain(*node.args, node)}
        if node.callee == PARAMETER:
            return self.convert(node.args[0])
        if node.callee in TENSORS:
            return self._tensor(*node.args)
        raise ValueError(f"it uses {excerpt(node.callee)} as a function")

    def _tensor(self, storage: Any, offset: Any, size: Any, stride: Any, *options: Any) -> np.ndarray:
        # The third option is a pending conjugation or negation.
        if any(options[2:]) or not isinstance(storage, _Object) or storage.callee is not STORAGE:
            raise ValueError("it holds a tensor without a plain storage")
        if len(size) != len(stride) or not all(type(count) is int and count >= 0 for count in (offset, *size, *stride)):
            raise ValueError("a tensor has an impossible size, offset or stride")
        numbers = self._storage(*storage.args)
        count, last = math.prod(size), offset + sum((length - 1) * step for length, step in zip(size, stride))
        if not count:
            return np.empty(size, numbers.dtype)
        if last >= numbers.size:
            raise ValueError(f"a tensor reaches number {last} of a storage of {numbers.size}")
        if count * numbers.itemsize > max(numbers.nbytes, MAX_UNFOLDED_BYTES):
            raise self.refuse(f"{numbers.nbytes} bytes expand to {count * numbers.itemsize}", code="unfolds_too_large")
        strides = [step * numbers.itemsize for step in stride]
        return np.ndarray(size, numbers.dtype, numbers, offset * numbers.itemsize, strides)

    def _storage(self, tag: Any, kind: str, key: str, device: Any, count: Any, view: Any = None) -> np.ndarray:
        if key not in self.numbers:
            stored = self.read(key).view(STORAGES[kind])
            self.numbers[key] = from_bfloat16(stored) if kind == "torch.BFloat16Storage" else stored
        if (tag, kind, view, type(count), count) != ("storage", self.kinds[key], None, int, self.numbers[key].size):
            raise ValueError(f"the storage {excerpt(key)} is not {excerpt(count)} numbers of {excerpt(kind)}")
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
        raise content.refuse("it is a tar archive of before torch 1.6", code="tar_archive")
    raise content.refuse(f"torch.save writes no file that starts with {start[:8]!r}", code="not_a_torch_file")


def _zip_tree(file: IO[bytes], content: _Content) -> Any:
    records = {record.filename: record for record in open_archive(file).infolist()}
    prefix = next((name[:-8] for name in records if name.count("/") == 1 and name.endswith("/data.pkl")), None)
    if prefix is None:
        raise content.refuse("it is a zip archive without data.pkl", code="not_a_torch_file")
    if any(name.startswith((f"{prefix}code/", f"{prefix}constants.pkl")) for name in records):
        raise content.refuse("it is a TorchScript archive, which is a program", code="torchscript_archive")
    if sum(record.file_size for record in records.values()) > os.fstat(file.fileno()).st_size:
        raise ValueError(f"its records have more than the {os.fstat(file.fileno()).st_size} bytes of the file")
    for name, record in records.items():
        if record.compress_type or record.flag_bits & 1:
            raise content.refuse(f"its record {excerpt(name)} is compressed or encrypted", code="compressed_record")

    # Without a reference to `content`, so that arrays are freed at once.
    def read(name: str) -> np.ndarray:
        record = records[name]
        file.seek(record.header_offset)
        lengths = struct.unpack("<26xHH", file.read(30))
        file.seek(record.header_offset + 30 + sum(lengths))
        numbers = np.fromfile(file, np.uint8, record.file_size)
        # torch.serialization.set_crc32_options(False) leaves zeros.
        if numbers.size != record.file_size or (record.CRC and zlib.crc32(numbers.data) != record.CRC):
            raise ValueError(f"the record {record.filename} differs from its size or checksum")
        return numbers

    if f"{prefix}byteorder" in records and read(f"{prefix}byteorder").tobytes() != b"little":
        raise ValueError("its byte order is not little-endian")
    content.read = lambda key: read(f"{prefix}data/{key}")
    return content.unpickle(io.BytesIO(read(f"{prefix}data.pkl").data))


def _legacy_tree(file: IO[bytes], content: _Content) -> Any:
    """Return the tree of a file of before torch 1.6: five pickles, and then the storages in the order of the last."""
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
