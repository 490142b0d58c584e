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

from runtime.core.errors import CheckpointError, reading
from runtime.core.io.array_files import open_archive

# Name of a number type in torch -> NumPy's, as stored. bfloat16 is widened to float32 once read.
_DTYPES = {
    "float64": "f8",
    "float32": "f4",
    "float16": "f2",
    "bfloat16": "u2",
    "int64": "i8",
    "int32": "i4",
    "int16": "i2",
    "int8": "i1",
    "uint8": "u1",
    "uint16": "u2",
    "uint32": "u4",
    "uint64": "u8",
    "bool": "u1",
    "complex64": "c8",
    "complex128": "c16",
}
_STORAGES = {
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
    "ComplexFloatStorage": "complex64",
    "ComplexDoubleStorage": "complex128",
    "UntypedStorage": "uint8",
}
_DTYPE_ALIASES = {
    "double": "float64",
    "float": "float32",
    "half": "float16",
    "long": "int64",
    "int": "int32",
    "short": "int16",
}
# From torch/serialization.py.
_MAGIC_NUMBER = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL = 1001
# NumPy 1 stops at 32 axes.
_MAX_AXES = 32
# Strides of zero make a tensor of any size out of one number. Up to here that may be an honest `expand`.
_MAX_REPEATED_BYTES = 1 << 28
# A checkpoint with its optimizer takes about 30,000 opcodes and 1 MB. The bounds keep reading within seconds.
_MAX_PICKLE_BYTES = 1 << 28
_MAX_OPCODES = 1 << 20
# Containers that share parts are trees with the parts repeated to whoever compares, prints or copies them.
_MAX_REPEATED_NODES = 1 << 20
# Integers and tuples that may be keys: hashing more takes time without bound.
_MAX_KEY_BITS, _MAX_KEY_ITEMS = 60, 16
_NUMPY_DTYPE = re.compile(r"[<>|=]?(?:b1|[iuf][1248]|c(?:8|16)|[SU][1-9]\d{0,5})\Z")


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


class UnknownObject:
    """Stands for an object of an unknown class: knows its `name`, swallows all else, and calls nothing."""

    __slots__ = ()
    name = "?"

    def __new__(cls, *args: Any, **kwargs: Any) -> UnknownObject:
        return object.__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __call__(self, *args: Any, **kwargs: Any) -> UnknownObject:
        return self

    def __setstate__(self, state: Any) -> None:
        pass

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def append(self, value: Any) -> None:
        """Swallow an item."""

    def extend(self, values: Any) -> None:
        """Swallow items."""

    def add(self, value: Any) -> None:
        """Swallow an item."""

    def __repr__(self) -> str:
        return f"<unread {self.name}>"


class _Placeholder:
    """What the pickle said, to be looked into once it has said all."""

    __slots__ = ()

    def __setstate__(self, state: Any) -> None:
        raise pickle.UnpicklingError(f"a state for {type(self).__name__}")


class _AllowedGlobal(_Placeholder):
    """A name that a file may ask for. Never a class, so that there is nothing to patch or instantiate."""

    __slots__ = ("call", "dtype", "name")

    def __init__(self, name: str, call: Callable[..., Any] | None = None, dtype: str | None = None) -> None:
        self.name = name
        self.call = call
        self.dtype = dtype

    def __call__(self, *args: Any) -> Any:
        if self.call is None:
            raise pickle.UnpicklingError(f"a call of {self.name}")
        return self.call(*args)


class _Storage(_Placeholder):
    """A run of `count` numbers, `skip` numbers into the record `key`."""

    __slots__ = ("count", "dtype", "key", "skip")

    def __init__(self, dtype: str, key: str, count: int, skip: int = 0) -> None:
        self.dtype = dtype
        self.key = key
        self.count = count
        self.skip = skip


class _Tensor(_Placeholder):
    __slots__ = ("dtype", "offset", "size", "storage", "stride")

    def __init__(
        self, storage: _Storage, dtype: str, offset: int, size: tuple[int, ...], stride: tuple[int, ...]
    ) -> None:
        self.storage = storage
        self.dtype = dtype
        self.offset = offset
        self.size = size
        self.stride = stride


class _NumpyDtype(_Placeholder):
    __slots__ = ("text",)

    def __init__(self, text: str) -> None:
        self.text = text

    def __setstate__(self, state: Any) -> None:
        # (version, byte order, subarray, names, fields, ...), see numpy's arraydescr_reduce.
        if not (isinstance(state, tuple) and len(state) >= 5 and state[1] in ("<", ">", "|", "=")):
            raise pickle.UnpicklingError("the state of a numpy.dtype")
        if any(part is not None for part in state[2:5]):
            raise pickle.UnpicklingError("a numpy.dtype with fields")
        self.text = state[1] + self.text.lstrip("<>|=")

    def dtype(self) -> np.dtype[Any]:
        return np.dtype(self.text)


class _NumpyArray(_Placeholder):
    __slots__ = ("state",)

    def __init__(self, state: tuple[Any, ...] | None = None) -> None:
        self.state = state

    def __setstate__(self, state: Any) -> None:
        # (version, shape, dtype, is Fortran ordered, bytes), see numpy's array_reduce.
        if not (isinstance(state, tuple) and len(state) == 5):
            raise pickle.UnpicklingError("the state of a numpy.ndarray")
        self.state = state


class _NumpyScalar(_Placeholder):
    __slots__ = ("content", "dtype")

    def __init__(self, dtype: _NumpyDtype, content: bytes) -> None:
        self.dtype = dtype
        self.content = content


class _Ordered(OrderedDict):  # type: ignore[type-arg]
    """An OrderedDict that takes no attributes (a module's state dict brings `_metadata`)."""

    def __setstate__(self, state: Any) -> None:
        pass


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


def _check_key(key: Any) -> Any:
    """Return `key` if its hash takes a bounded time: an atom, a note, or a flat tuple of atoms."""
    for item in key if type(key) is tuple and len(key) <= _MAX_KEY_ITEMS else (key,):
        if type(item) is int and item.bit_length() > _MAX_KEY_BITS:
            raise pickle.UnpicklingError("a key that is a large integer")
        atom = item is None or isinstance(item, (str, bytes, int, float, complex, _Placeholder, UnknownObject))
        if not atom and not (isinstance(item, type) and issubclass(item, UnknownObject)):
            raise pickle.UnpicklingError("a key that is neither text, a number nor a flat tuple of such")
    return key


# The Python implementation: that in C hashes whatever a file says, and nested tuples take exponential time.
_PythonUnpickler: Any = pickle._Unpickler  # type: ignore[attr-defined,unused-ignore]


class _Unpickler(_PythonUnpickler):  # type: ignore[misc]
    """A pickle reader to which only `_AllowedGlobal` names exist, and `UnknownObject` ones where that was asked for."""

    dispatch: dict[int, Any] = dict(_PythonUnpickler.dispatch)

    def load_dict(self) -> None:
        items = self.pop_mark()
        self.append({_check_key(key): value for key, value in zip(items[::2], items[1::2])})

    def load_setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self.stack[-1][_check_key(key)] = value

    def load_setitems(self) -> None:
        items = self.pop_mark()
        table = self.stack[-1]
        for key, value in zip(items[::2], items[1::2]):
            table[_check_key(key)] = value

    def load_additems(self) -> None:
        items = self.pop_mark()
        for item in items:
            self.stack[-1].add(_check_key(item))

    def load_frozenset(self) -> None:
        self.append(frozenset(map(_check_key, self.pop_mark())))

    dispatch[pickle.DICT[0]] = load_dict
    dispatch[pickle.SETITEM[0]] = load_setitem
    dispatch[pickle.SETITEMS[0]] = load_setitems
    dispatch[pickle.ADDITEMS[0]] = load_additems
    dispatch[pickle.FROZENSET[0]] = load_frozenset

    def __init__(self, content: bytes, path: str, inert: bool, stored: dict[str, _Storage]) -> None:
        # Text of Python 2 is Latin-1 here, so that the bytes inside its NumPy arrays survive.
        super().__init__(io.BytesIO(content), encoding="latin1")
        self.path = path
        self.inert = inert
        self.stored = stored
        self.names: dict[tuple[str, str], Any] = {}

    def find_class(self, module: str, name: str) -> Any:
        result = self.names.get((module, name))
        if result is None:
            result = self.names[module, name] = self._find(module, name)
        return result

    def _find(self, module: str, name: str) -> Any:
        full_name = f"{module}.{name}"
        if module in ("torch", "torch.cuda", "torch.storage") and name in _STORAGES:
            return _AllowedGlobal(full_name, dtype=_STORAGES[name])
        if module == "torch" and (name in _DTYPES or name in _DTYPE_ALIASES):
            return _AllowedGlobal(full_name, dtype=_DTYPE_ALIASES.get(name, name))
        call = self._calls().get(full_name)
        if call is not None:
            return _AllowedGlobal(full_name, self._spread_inert(call) if self.inert else call)
        if full_name == "numpy.ndarray":
            return _AllowedGlobal(full_name)
        return self._unread_class(full_name)

    def _calls(self) -> dict[str, Callable[..., Any]]:
        calls: dict[str, Callable[..., Any]] = {
            "collections.OrderedDict": _ordered,
            "torch._utils._rebuild_tensor": self._tensor,
            "torch._utils._rebuild_tensor_v2": self._tensor_v2,
            "torch._utils._rebuild_tensor_v3": self._tensor_v3,
            "torch._utils._rebuild_parameter": lambda tensor, requires_grad, hooks: tensor,
            "torch._utils._rebuild_parameter_with_state": lambda tensor, requires_grad, hooks, state: tensor,
            "torch.Size": _plain_tuple,
            "torch.device": _device,
            "_codecs.encode": _latin1_bytes,
            "numpy.dtype": self._numpy_dtype,
        }
        for builtins in ("builtins", "__builtin__"):
            calls[f"{builtins}.set"] = lambda items=(): set(map(_check_key, _list(items)))
            calls[f"{builtins}.frozenset"] = lambda items=(): frozenset(map(_check_key, _list(items)))
            calls[f"{builtins}.bytes"] = _no_bytes
            calls[f"{builtins}.complex"] = _complex
        for core in ("numpy.core", "numpy._core"):
            calls[f"{core}.multiarray._reconstruct"] = _empty_numpy_array
            calls[f"{core}.multiarray.scalar"] = self._numpy_scalar
        return calls

    def _unread_class(self, full_name: str) -> Any:
        if not self.inert:
            raise CheckpointError(
                f"{self.path} was refused: it asks to run {_shown(full_name)}, where only tensors, numbers, "
                f"text and plain containers are expected; nothing in it was run.",
                code="code_in_file",
            )
        return type("Inert", (UnknownObject,), {"__slots__": (), "name": _shown(full_name)})

    def _unread(self, what: str) -> Any:
        """An inert object for something of a known kind that cannot be read, where that was asked for."""
        if not self.inert:
            raise CheckpointError(f"{self.path} holds {what}, which is not read here.")
        return type("Inert", (UnknownObject,), {"__slots__": (), "name": what})()

    def _spread_inert(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """`call`, with an inert result where an argument is inert."""
        return lambda *args: self._unread("a part of it") if any(map(_is_unknown, args)) else call(*args)

    def persistent_load(self, pid: Any) -> Any:
        if isinstance(pid, tuple) and len(pid) == 4 and pid[0] == "module":
            # Legacy torch.save(module): (class, source file, source text) stands for the class.
            return pid[1]
        if not (isinstance(pid, tuple) and len(pid) in (5, 6) and pid[0] == "storage"):
            raise pickle.UnpicklingError("a reference of unknown shape")
        storage_type, key, _, count = pid[1:5]
        view = pid[5] if len(pid) == 6 else None
        if _is_unknown(storage_type):
            return self._unread("tensors of an unknown type")
        if not (isinstance(storage_type, _AllowedGlobal) and storage_type.name.endswith("Storage")):
            raise pickle.UnpicklingError("a storage of unknown type")
        if not isinstance(key, str) or not _is_size(count):
            raise pickle.UnpicklingError("a storage without a name or size")
        assert storage_type.dtype is not None
        storage = _Storage(storage_type.dtype, key, count)
        known = self.stored.setdefault(key, storage)
        if known.dtype != storage.dtype:
            raise pickle.UnpicklingError("a storage of two types")
        if view is None:
            return storage
        if not (isinstance(view, tuple) and len(view) == 3 and _is_size(view[1]) and _is_size(view[2])):
            raise pickle.UnpicklingError("a storage view of unknown shape")
        if view[1] + view[2] > count:
            raise pickle.UnpicklingError("a storage view that reaches outside its storage")
        return _Storage(storage.dtype, key, count=view[2], skip=view[1])

    def _tensor(self, storage: Any, offset: Any, size: Any, stride: Any, dtype: str | None = None) -> Any:
        if not isinstance(storage, _Storage):
            raise pickle.UnpicklingError("a tensor without a storage")
        size, stride = _plain_tuple(size), _plain_tuple(stride)
        if not _is_size(offset) or not all(map(_is_size, size)) or not all(map(_is_size, stride)):
            raise _damaged(self.path, "a tensor has a negative or impossible size, offset or stride")
        if len(size) != len(stride) or len(size) > _MAX_AXES:
            raise _damaged(self.path, f"a tensor has {len(size)} sizes and {len(stride)} strides")
        return _Tensor(storage, storage.dtype if dtype is None else dtype, offset, size, stride)

    def _tensor_v2(
        self,
        storage: Any,
        offset: Any,
        size: Any,
        stride: Any,
        requires_grad: Any = False,
        hooks: Any = None,
        metadata: Any = None,
    ) -> Any:
        if metadata:
            return self._unread("a tensor with a pending conjugation or sign")
        return self._tensor(storage, offset, size, stride)

    def _tensor_v3(
        self,
        storage: Any,
        offset: Any,
        size: Any,
        stride: Any,
        requires_grad: Any,
        hooks: Any,
        dtype: Any,
        metadata: Any = None,
    ) -> Any:
        if metadata:
            return self._unread("a tensor with a pending conjugation or sign")
        if not (isinstance(dtype, _AllowedGlobal) and dtype.dtype is not None):
            raise pickle.UnpicklingError("a tensor of unknown type")
        return self._tensor(storage, offset, size, stride, dtype.dtype)

    def _numpy_dtype(self, text: Any, align: Any = False, copy: Any = True) -> Any:
        if isinstance(text, str) and _NUMPY_DTYPE.match(text):
            try:
                np.dtype(text)
            except TypeError:
                return self._unread(f"a NumPy array of {text}")
            return _NumpyDtype(text)
        return self._unread(f"a NumPy array of {_shown(text)}")

    def _numpy_scalar(self, dtype: Any, content: Any) -> Any:
        if not isinstance(dtype, _NumpyDtype):
            raise pickle.UnpicklingError("a NumPy number without a type")
        return _NumpyScalar(dtype, _bytes(content))


def _is_unknown(thing: Any) -> bool:
    return isinstance(thing, UnknownObject) or (isinstance(thing, type) and issubclass(thing, UnknownObject))


def _ordered(items: Any = ()) -> _Ordered:
    pairs = _list(items)
    if not all(isinstance(pair, (list, tuple)) and len(pair) == 2 for pair in pairs):
        raise pickle.UnpicklingError("the items of an OrderedDict")
    for key, _ in pairs:
        _check_key(key)
    return _Ordered(pairs)


def _list(items: Any) -> list[Any]:
    if not isinstance(items, (list, tuple, set)):
        raise pickle.UnpicklingError("a list of items")
    return list(items)


def _plain_tuple(items: Any = ()) -> tuple[Any, ...]:
    return tuple(_list(items))


def _device(kind: Any, index: Any = None) -> str:
    if not isinstance(kind, str) or not (index is None or _is_size(index)):
        raise pickle.UnpicklingError("a torch.device")
    return kind if index is None else f"{kind}:{index}"


def _complex(real: Any, imaginary: Any) -> complex:
    if not (isinstance(real, float) and isinstance(imaginary, float)):
        raise pickle.UnpicklingError("a complex number")
    return complex(real, imaginary)


def _no_bytes() -> bytes:
    return b""


def _latin1_bytes(text: Any, encoding: Any) -> bytes:
    """Protocol 2 writes bytes as text and this call."""
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
        raise pickle.UnpicklingError("a codec")
    return text.encode("latin1")


def _bytes(content: Any) -> bytes:
    if isinstance(content, str):  # of Python 2
        return content.encode("latin1")
    if not isinstance(content, (bytes, bytearray)):
        raise pickle.UnpicklingError("the bytes of a NumPy array")
    return bytes(content)


def _empty_numpy_array(kind: Any, shape: Any, typecode: Any) -> _NumpyArray:
    if not (isinstance(kind, _AllowedGlobal) and kind.name == "numpy.ndarray"):
        raise pickle.UnpicklingError("a subclass of numpy.ndarray")
    return _NumpyArray()


def _is_size(number: Any) -> bool:
    return type(number) is int and 0 <= number < 1 << 62


def _item_size(dtype: str) -> int:
    return np.dtype(_DTYPES[dtype]).itemsize


def _damaged(path: str, what: str) -> CheckpointError:
    return CheckpointError(f"{path} is truncated or damaged: {what}; copy or download it again.", code="damaged_file")


def _too_large(path: str) -> CheckpointError:
    return CheckpointError(
        f"{path} was refused: its pickle is larger than that of any checkpoint; save tensors instead of lists.",
        code="pickle_too_large",
    )


def _shown(thing: Any) -> str:
    """A name out of the file, or the message of an exception, fit for one line of a terminal."""
    text = "".join(c if c.isascii() and c.isprintable() else "?" for c in str(thing))
    return text if len(text) <= 100 else text[:100] + "..."


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
                numbers = (numbers.astype(np.uint32) << np.uint32(16)).view(np.float32)
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
