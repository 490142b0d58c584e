"""Test `runtime.core.io.torch_reader` against torch, and with hostile files."""

from __future__ import annotations

import collections
import datetime
import functools
import io
import os
import pickle
import struct
import sys
import tempfile
import time
import types
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from runtime.core.errors import CheckpointError
from runtime.core.io import torch_reader
from tests.array_bytes import npz
from tests.raising import raises

torch = pytest.importorskip("torch", reason="torch writes the files that are read here")

from train import checkpoints  # noqa: E402

FORMS = pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])


def save(value: Any, path: Path, zipped: bool = True) -> Path:
    torch.save(value, path, _use_new_zipfile_serialization=zipped)
    return path


class Persistent:
    """An object that is pickled as a persistent id."""

    def __init__(self, identity: Any) -> None:
        self.identity = identity


class Call:
    """An object that is pickled as a call of `function` with `arguments`."""

    def __init__(self, function: Any, *arguments: Any, state: Any = None) -> None:
        self.parts = (function, arguments) if state is None else (function, arguments, state)

    def __reduce__(self) -> tuple[Any, ...]:
        return self.parts


class Pickler(pickle.Pickler):
    def persistent_id(self, thing: Any) -> Any:
        return thing.identity if isinstance(thing, Persistent) else None


def pickled(value: Any, protocol: int = 2) -> bytes:
    stream = io.BytesIO()
    Pickler(stream, protocol).dump(value)
    return stream.getvalue()


def zip_file(path: Path, value: Any, records: dict[str, bytes] | None = None, **options: Any) -> Path:
    """Return a torch file with the pickle of `value`, or with `value` as the pickle if it is bytes."""
    content = value if isinstance(value, bytes) else pickled(value)
    with zipfile.ZipFile(path, "w", **options) as archive:
        archive.writestr("archive/data.pkl", content)
        archive.writestr("archive/version", b"3\n")
        for name, record in (records or {}).items():
            archive.writestr(f"archive/{name}", record)
    return path


def legacy_file(path: Path, value: Any) -> Path:
    parts = [pickle.dumps(part, 2) for part in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True})]
    path.write_bytes(b"".join(parts) + (value if isinstance(value, bytes) else pickled(value)) + pickle.dumps([], 2))
    return path


def storage(key: Any = "0", count: Any = 6, kind: Any = torch.FloatStorage) -> Persistent:
    return Persistent(("storage", kind, key, "cpu", count))


def tensor(offset: Any = 0, size: Any = (2, 3), stride: Any = (3, 1), **fields: Any) -> Call:
    hooks: Any = collections.OrderedDict()
    return Call(torch._utils._rebuild_tensor_v2, storage(**fields), offset, size, stride, False, hooks)


SIX = {"data/0": np.arange(6, dtype="<f4").tobytes()}


@pytest.fixture
def sentinel(tmp_path: Path) -> Path:
    return tmp_path / "was-run"


@FORMS
def test_containers_load_with_arrays_for_tensors(tmp_path: Path, zipped: bool) -> None:
    value = {
        "weights": collections.OrderedDict(a=torch.arange(6.0).reshape(2, 3), b=torch.nn.Parameter(torch.ones(2))),
        "list": [1, 2.5, None, True, "text", (torch.tensor(7), "x"), 1 << 62],
        3: {(1, "a"): -1},
    }
    value["weights"]._metadata = {"": {"version": 1}}
    actual = torch_reader.load(save(value, tmp_path / "f.pt", zipped))
    assert list(actual) == list(value)
    np.testing.assert_array_equal(actual["weights"]["a"], [[0, 1, 2], [3, 4, 5]])
    np.testing.assert_array_equal(actual["weights"]["b"], [1, 1])
    assert actual["list"] == value["list"]
    assert actual["list"][5][0].shape == ()
    assert actual[3] == value[3]


@FORMS
def test_tensor_dtypes_are_preserved_and_arrays_writable(tmp_path: Path, zipped: bool) -> None:
    dtypes = ("float64", "float32", "float16", "int64", "int32", "int16", "int8", "uint8")
    saved = [torch.tensor([0, 1, 100]).to(getattr(torch, dtype)) for dtype in dtypes]
    for dtype, expected, actual in zip(
        dtypes, saved, torch_reader.load(save(saved, tmp_path / "f.pt", zipped)), strict=True
    ):
        assert actual.dtype == dtype
        np.testing.assert_array_equal(actual, expected.numpy())
        actual[0] = 5


@FORMS
def test_bfloat16_becomes_float32_exactly(tmp_path: Path, zipped: bool) -> None:
    expected = torch.tensor([1.5, -3.0e38, float("inf"), 1e-40]).to(torch.bfloat16)
    actual = torch_reader.load(save({"a": expected, "view": expected[1:]}, tmp_path / "f.pt", zipped))
    assert actual["a"].dtype == np.float32
    np.testing.assert_array_equal(actual["a"], expected.float().numpy())
    assert np.shares_memory(actual["a"], actual["view"])


@FORMS
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_tensor_views_are_loaded(zipped: bool, data: st.DataObject) -> None:
    shape = data.draw(hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4))
    dtype = data.draw(st.sampled_from([np.float32, np.float16, np.int64, np.uint8]))
    base = torch.from_numpy(data.draw(hnp.arrays(dtype, shape)))
    view = base.permute(data.draw(st.permutations(range(base.ndim))))
    for axis in range(view.ndim):
        begin = data.draw(st.integers(0, view.shape[axis]))
        view = view[(slice(None),) * axis + (slice(begin, None, data.draw(st.integers(1, 3))),)]
    with tempfile.TemporaryDirectory() as directory:
        actual = torch_reader.load(save([base, view], Path(directory, "f.pt"), zipped))
    for array, expected in zip(actual, (base, view), strict=True):
        assert array.shape == tuple(expected.shape)
        assert array.dtype == expected.numpy().dtype
        np.testing.assert_array_equal(array, expected.numpy())
    if view.numel():
        assert np.shares_memory(*actual)


def test_expanded_tensor_without_checksums_is_read(tmp_path: Path) -> None:
    # Older versions of torch always write checksums.
    set_checksums = getattr(torch.serialization, "set_crc32_options", lambda on: None)
    set_checksums(False)
    try:
        path = save(torch.tensor([1.0, 2.0]).expand(3, 2), tmp_path / "odd name v1.2.pth.tar")
    finally:
        set_checksums(True)
    np.testing.assert_array_equal(torch_reader.load(path), [[1, 2]] * 3)


def test_published_glove_table_loads_as_in_torch(real_data: Path) -> None:
    path = real_data / "charades_sta" / "glove_weights"
    np.testing.assert_array_equal(torch_reader.load(path), torch.load(path, weights_only=True).numpy())


# Hostile files. `load` rejects all of them, `check` may accept them for torch, and neither runs them.


def attacks(sentinel: Path) -> dict[str, tuple[Any, str]]:
    command = f"touch {sentinel}"
    opened = Call(open, str(sentinel), "w")
    return {
        "os.system": (Call(os.system, command), f"{os.system.__module__}.system"),
        "nested": ({"state_dict": [{"a": (1, Call(os.system, command))}]}, f"{os.system.__module__}.system"),
        "eval": (Call(eval, f"open({str(sentinel)!r}, 'w')"), "eval"),
        "open": (opened, "open"),
        "getattr": (Call(getattr, "x", "upper"), "getattr"),
        "in a tensor's arguments": (Call(torch._utils._rebuild_tensor_v2, opened, 0, (1,), (1,), False, {}), "open"),
        "in a state": (Call(collections.OrderedDict, state={"hooks": opened}), "open"),
        "in a persistent id": (Persistent(("storage", opened, "0", "cpu", 6)), "open"),
        "as a partial": (Call(functools.partial(os.system, command)), "functools.partial"),
    }


@FORMS
@pytest.mark.parametrize("name", list(attacks(Path())))
def test_pickled_call_is_rejected_by_name_not_run(tmp_path: Path, sentinel: Path, name: str, zipped: bool) -> None:
    value, name_in_file = attacks(sentinel)[name]
    path = (zip_file if zipped else legacy_file)(tmp_path / "f.pt", value)
    with raises(CheckpointError, "code_in_file", path, name_in_file):
        torch_reader.load(path)
    assert not sentinel.exists()
    if name == "in a persistent id":
        with raises(CheckpointError, "damaged_file", path):
            torch_reader.check(path)
    else:
        assert any(known.endswith(name_in_file) for known in torch_reader.check(path))
    assert not sentinel.exists()


@pytest.mark.parametrize(
    "program",
    [
        # Calls of os.system by REDUCE, INST, OBJ and NEWOBJ, and by names with dots.
        b"\x80\x02cos\nsystem\n(TEXTtR.",
        b"\x80\x02(TEXTios\nsystem\n.",
        b"\x80\x02(cos\nsystem\nTEXTo.",
        b"\x80\x02cos\nsystem\n(TEXTt\x81.",
        b"\x80\x04\x8c\x05torch\x8c\x0d_utils.os.sys\x93(TEXTtR.",
        b"\x80\x04\x8c\x02os\x8c\x06system\x93(TEXTtR.",
    ],
)
def test_no_pickle_opcode_can_call_a_function(tmp_path: Path, sentinel: Path, program: bytes) -> None:
    command = f"touch {sentinel}".encode()
    text = b"X" + len(command).to_bytes(4, "little") + command
    path = zip_file(tmp_path / "f.pt", program.replace(b"TEXT", text))
    for read in (torch_reader.load, functools.partial(checkpoints.read, unknown_objects=True)):
        with raises(CheckpointError, "code_in_file", path):
            read(path)
    assert not sentinel.exists()


@pytest.mark.parametrize(
    "program",
    [
        # BUILD on a function would set its attributes or defaults.
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(N}X\x0c\x00\x00\x00__defaults__)stb.",
        b"\x80\x02ccollections\nOrderedDict\n}X\x01\x00\x00\x00aK\x01sb.",
        b"\x80\x02ctorch\nSize\n)\x81}b.",
        b"\x80\x02ctorch\nFloatStorage\n)R.",
        b"\x80\x02K\x05)R.",
        b"\x80\x02\x82\x01.",  # EXT1
        b"\x80\x02K\x01r\xff\xff\xff\x7f.",  # a memo of two thousand million entries
        b"\x80\x02K\x01Q.",  # a persistent id that is a number
        b"Pos.system\n.",
        b"\x80\x04\x97.",  # NEXT_BUFFER without buffers
        b"\x80\x02T\xff\xff\xff\x7fabc.",
        b"\x80\x02",
        b".",
        b"\x80\x09N.",
        b"garbage",
    ],
)
def test_pickle_with_misused_opcodes_is_rejected(tmp_path: Path, program: bytes) -> None:
    with pytest.raises(CheckpointError):
        torch_reader.load(zip_file(tmp_path / "f.pt", program))


def test_unknown_objects_are_replaced_and_all_else_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("made_up.logging")

    class HistoryBuffer:
        calls = 0

        def __init__(self) -> None:
            self.log = np.arange(3.0)
            HistoryBuffer.calls += 1

        def mean(self) -> float:
            return 1.0

        def __setstate__(self, state: dict[str, Any]) -> None:
            HistoryBuffer.calls += 1

    HistoryBuffer.__module__, HistoryBuffer.__qualname__ = module.__name__, "HistoryBuffer"
    HistoryBuffer.mean.__module__, HistoryBuffer.mean.__qualname__ = module.__name__, "HistoryBuffer.mean"
    module.HistoryBuffer = HistoryBuffer  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "made_up", types.ModuleType("made_up"))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    content = {
        "hub": {"loss": HistoryBuffer(), "mean": HistoryBuffer.mean, "class": HistoryBuffer},
        "when": datetime.datetime(2026, 1, 1),
        "objects": np.array([None, "x"], dtype=object),
        "number": np.float64(2.5),
        "weights": {"a": torch.arange(3)},
    }
    path = save(content, tmp_path / "f.pth")
    monkeypatch.delitem(sys.modules, module.__name__)
    calls = HistoryBuffer.calls
    actual = checkpoints.read(path, unknown_objects=True)
    assert actual["weights"]["a"].tolist() == [0, 1, 2]
    for value in (actual["hub"]["loss"], actual["hub"]["mean"], actual["when"], actual["objects"], actual["number"]):
        assert isinstance(value, checkpoints.UnreadObject)
    assert actual["hub"]["class"] is checkpoints.UnreadObject
    assert HistoryBuffer.calls == calls
    assert module.__name__ not in sys.modules
    for read in (torch_reader.load, checkpoints.read):
        with raises(CheckpointError, "code_in_file", path):
            read(path)


def test_load_imports_no_modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "imported_by_a_pickle.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(str(tmp_path))
    path = zip_file(tmp_path / "f.pt", b"\x80\x02cimported_by_a_pickle\nf\n.")
    checkpoints.read(path, unknown_objects=True)
    assert "imported_by_a_pickle" not in sys.modules


@pytest.mark.parametrize(
    "lie",
    [
        tensor(offset=1),
        tensor(stride=(4, 1)),
        tensor(size=(7,), stride=(1,)),
        tensor(size=(2, 1 << 61), stride=(1, 8)),
        tensor(size=(-1, 3)),
        tensor(stride=(-3, 1)),
        tensor(offset=-1),
        tensor(offset=5, size=(2,), stride=(-1,)),
        tensor(size=(2, 3), stride=(1,)),
        tensor(size=(0, 3), stride=(1,)),
        tensor(size=(2.0, 3)),
        tensor(size=(1,) * 99, stride=(1,) * 99),
        tensor(size=(0, 1 << 61, 1 << 61), stride=(1, 1, 1)),
        tensor(count=7),
        tensor(count=1 << 61),
        tensor(count=-6),
        tensor(count=True),
        tensor(key="../../etc/passwd"),
        tensor(key=0),
        tensor(kind=torch.DoubleStorage),
        tensor(kind=torch.Size),
        tensor(size=(1 << 40,), stride=(0,)),
        Persistent(("storage", torch.FloatStorage, "0")),
        Persistent(("module", "x")),
        Persistent(("storage", torch.FloatStorage, "0", "cpu", 6, ("1", 4, 3))),
        Call(torch._utils._rebuild_tensor_v2, "storage", 0, (1,), (1,), False, None),
        Call(torch._utils._rebuild_tensor_v2, storage(), 0, (1,), (1,), False, None, {"conj": True}),
        [storage(), storage(kind=torch.IntStorage)],
    ],
)
def test_tensor_beyond_its_storage_is_rejected(tmp_path: Path, lie: Any) -> None:
    assert torch_reader.load(zip_file(tmp_path / "honest.pt", tensor(), SIX)).shape == (2, 3)
    with pytest.raises(CheckpointError):
        torch_reader.load(zip_file(tmp_path / "f.pt", lie, SIX))


def test_tensor_beyond_its_storage_names_the_element(tmp_path: Path) -> None:
    # Without the missing numbers, the larger one would seem to repeat those there are (code unfolds_too_large).
    for size in (7, 1 << 40):
        with raises(CheckpointError, "damaged_file", size - 1, 6):
            torch_reader.load(zip_file(tmp_path / "f.pt", tensor(size=(size,), stride=(1,)), SIX))


def test_record_larger_than_the_file_is_rejected(tmp_path: Path) -> None:
    path = zip_file(tmp_path / "f.pt", tensor(), SIX)
    content = bytearray(path.read_bytes())
    entry = content.rindex(b"PK\x01\x02")
    content[entry + 20 : entry + 28] = (1 << 30).to_bytes(4, "little") * 2
    path.write_bytes(content)
    with raises(CheckpointError, "damaged_file", path, path.stat().st_size):
        torch_reader.load(path)


def test_overlapping_records_are_rejected(tmp_path: Path) -> None:
    path = tmp_path / "f.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickled([tensor(key=str(i), count=1000) for i in range(50)]))
        archive.writestr("archive/data/0", bytes(4000))
        first = archive.getinfo("archive/data/0")
        for i in range(1, 50):
            copy = zipfile.ZipInfo(f"archive/data/{i}")
            copy.header_offset, copy.file_size = first.header_offset, first.file_size
            copy.compress_size, copy.CRC = first.compress_size, first.CRC
            archive.filelist.append(copy)
            archive.NameToInfo[copy.filename] = copy
    with raises(CheckpointError, "damaged_file", path, path.stat().st_size):
        torch_reader.load(path)


@pytest.mark.parametrize(
    "names",
    [
        ("a/data.pkl", "a/data.pkl"),
        ("a/DATA.PKL", "a/data.pkl"),
        ("b/data.pkl", "a/data.pkl"),
        ("b/version", "a/data.pkl", "b/data.pkl"),
    ],
)
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_records_that_torch_reads_otherwise_are_rejected(tmp_path: Path, names: tuple[str, ...], first: bool) -> None:
    """torch would take another pickle than the one that was checked."""
    path = tmp_path / "f.pt"
    with zipfile.ZipFile(path, "w") as archive:
        for name in names if first else reversed(names):
            archive.writestr(name, pickled([1, 2]))
    for read in (torch_reader.load, torch_reader.check):
        with raises(CheckpointError, "damaged_file", path):
            read(path)


def test_changed_tensor_value_is_detected(tmp_path: Path) -> None:
    path = save(torch.full((100,), 3.0), tmp_path / "f.pt")
    content = path.read_bytes()
    path.write_bytes(content.replace(b"\0\0\x40\x40", b"\0\1\x40\x40", 1))
    with raises(CheckpointError, "damaged_file", path, "f/data/0"):
        torch_reader.load(path)


@FORMS
def test_truncated_file_is_rejected(tmp_path: Path, zipped: bool) -> None:
    content = save({"a": torch.arange(20.0), "b": torch.ones(3)}, tmp_path / "whole.pt", zipped).read_bytes()
    cut = tmp_path / "cut.pt"
    for length in range(0, len(content), 7):
        cut.write_bytes(content[:length])
        with raises(CheckpointError, "damaged_file" if length else "empty_file", cut):
            torch_reader.load(cut)


OTHER_FILES: list[tuple[Any, str, str]] = [
    (b"", "empty_file", ""),
    (b"not a tensor at all", "not_a_torch_file", ""),
    (pickle.dumps([1, 2], 2), "not_a_torch_file", ""),
    (b"PK\x03\x04 and no more", "damaged_file", ""),
    (b"\0" * 257 + b"ustar\x0000", "tar_archive", ""),
    (npz(a=np.ones(2)), "not_a_torch_file", "data.pkl"),
    (lambda path: zip_file(path, {}, {"constants.pkl": b"", "code/__torch__.py": b""}), "torchscript_archive", ""),
    (lambda path: zip_file(path, tensor(), {**SIX, "byteorder": b"big"}), "damaged_file", ""),
    (lambda path: zip_file(path, 1, compression=zipfile.ZIP_DEFLATED), "compressed_record", "archive/data.pkl"),
    (lambda path: zip_file(path, b"\x80\x02" + b"]" * 200_000 + b"a" * 199_999 + b"."), "nested_too_deeply", ""),
    (lambda path: None, "missing_file", ""),
    (lambda path: path.mkdir(), "unreadable_file", ""),
]


@pytest.mark.parametrize(("content", "code", "quoted"), OTHER_FILES)
def test_other_files_raise_specific_codes(tmp_path: Path, content: Any, code: str, quoted: str) -> None:
    path = tmp_path / "f.pt"
    path.write_bytes(content) if isinstance(content, bytes) else content(path)
    with raises(CheckpointError, code, path, quoted):
        torch_reader.load(path)


def _doubled(levels: int, pair: bytes, start: bytes = b"K\1\x85") -> bytes:
    """Return opcodes of `levels` nested containers, each with two references to the next."""
    steps = b"".join(b"q" + bytes([n]) + b"h" + bytes([n]) + pair for n in range(levels))
    return start + steps


HOSTILE = {
    "tuple as a key": b"\x80\2}" + _doubled(60, b"\x86") + b"K\1s.",
    "tuple in a set": b"\x80\4\x8f(" + _doubled(60, b"\x86") + b"\x90.",
    "tuple in a frozenset": b"\x80\4(" + _doubled(60, b"\x86") + b"\x91.",
    "tuple in a call of set": b"\x80\2c__builtin__\nset\n](" + _doubled(60, b"\x86") + b"e\x85R.",
    "tuple as a key of an OrderedDict": b"\x80\2ccollections\nOrderedDict\n]("
    + _doubled(60, b"\x86")
    + b"K\1\x86e\x85R.",
    "tuple without a key": b"\x80\2" + _doubled(60, b"\x86") + b".",
    "large integers as keys": b"\x80\2}\x8b" + struct.pack("<i", 1 << 16) + b"\1" * (1 << 16) + b"K\1s.",
    "deep tuple as a key": b"\x80\2}" + b"K\1" + b"\x85" * 100_000 + b"K\1s.",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_pickle_with_exponential_hash_fails_fast(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # The real limit takes a second.
    monkeypatch.setattr(torch_reader, "MAX_NODES", 1 << 12)
    path = zip_file(tmp_path / "bomb.pt", HOSTILE[name])
    started = time.process_time()
    for read in (torch_reader.load, torch_reader.check):
        with pytest.raises(CheckpointError):
            read(path)
    assert time.process_time() - started < 5


def test_non_string_keys_and_shared_lists_are_read(tmp_path: Path) -> None:
    part = [1, 2]
    value = {1: part, "a": part, (1, "b"): part, None: (4, 5), 2.5: [part, part]}
    torch.save(value, tmp_path / "a.pt")
    assert torch_reader.load(tmp_path / "a.pt") == value
    torch_reader.check(tmp_path / "a.pt")
