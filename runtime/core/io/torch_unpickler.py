"""Unpickle the objects that torch saves, and nothing else."""

from __future__ import annotations

import io
import pickle
import re
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import numpy as np

from runtime.core.errors import CheckpointError

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
# NumPy 1 stops at 32 axes.
_MAX_AXES = 32
# Integers and tuples that may be keys: hashing more takes time without bound.
_MAX_KEY_BITS, _MAX_KEY_ITEMS = 60, 16
_NUMPY_DTYPE = re.compile(r"[<>|=]?(?:b1|[iuf][1248]|c(?:8|16)|[SU][1-9]\d{0,5})\Z")
# The Python implementation: that in C hashes whatever a file says, and nested tuples take exponential time.
_PythonUnpickler: Any = pickle._Unpickler  # type: ignore[attr-defined,unused-ignore]


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


def _check_key(key: Any) -> Any:
    """Return `key` if its hash takes a bounded time: an atom, a note, or a flat tuple of atoms."""
    for item in key if type(key) is tuple and len(key) <= _MAX_KEY_ITEMS else (key,):
        if type(item) is int and item.bit_length() > _MAX_KEY_BITS:
            raise pickle.UnpicklingError("a key that is a large integer")
        atom = item is None or isinstance(item, (str, bytes, int, float, complex, _Placeholder, UnknownObject))
        if not atom and not (isinstance(item, type) and issubclass(item, UnknownObject)):
            raise pickle.UnpicklingError("a key that is neither text, a number nor a flat tuple of such")
    return key


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


def _shown(thing: Any) -> str:
    """A name out of the file, or the message of an exception, fit for one line of a terminal."""
    text = "".join(c if c.isascii() and c.isprintable() else "?" for c in str(thing))
    return text if len(text) <= 100 else text[:100] + "..."
