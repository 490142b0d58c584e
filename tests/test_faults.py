"""Small inputs on which earlier versions hung, ended in a traceback, or took gigabytes. They are not ours to ship."""

from __future__ import annotations

import resource
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from runtime.core.errors import GroundingError
from runtime.core.io.torch_reader import check, load
from runtime.core.pooling import ClipTiming
from runtime.core.video import load_features
from runtime.corpus.feature_sources import ParquetSource
from runtime.datasets.dataset import DataSet
from runtime.service.http_errors import HttpError


def _all_of(root: Path) -> None:
    data_set = DataSet(root)
    for split in data_set.splits:
        for annotation in data_set.annotations(split):
            data_set.vocabulary.encode(annotation.sentence)
            data_set.video(annotation.video)


def _corpus(path: Path) -> None:
    source = ParquetSource([path])
    for loaded in source.load(source.listing(), ClipTiming()):
        if isinstance(loaded, str):
            raise GroundingError(loaded)


def upload(path: Path) -> Any:
    """Read a file as the service reads what a client sends."""
    pytest.importorskip("prometheus_client", reason="the service needs the extra [serve]")
    from runtime.service.uploaded_files import read_features

    return read_features(path, 128 << 20, 8)


READERS: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "array": ("header_bomb.npz", load_features),
    "upload": ("header_bomb.npz", upload),
    "tensor": ("hash_bomb.pt", load_features),
    "pickle": ("hash_bomb.pt", load),
    "pickle for torch": ("hash_bomb.pt", check),
    "row of a corpus": ("bomb.parquet", _corpus),
    "damaged corpus": ("f.parquet", _corpus),
    **{name: (name, _all_of) for name in ("bad_second_npy", "big_int", "words", "surrogate", "hdf5")},
}


@pytest.mark.parametrize("name", READERS)
def test_faulty_file_gives_quick_one_line_error(tmp_path: Path, faults: Path, name: str) -> None:
    fault, read = READERS[name]
    source = faults / fault
    path = tmp_path / fault
    (shutil.copytree if source.is_dir() else shutil.copyfile)(source, path)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.monotonic()
    with pytest.raises((GroundingError, HttpError)) as caught:
        read(path)
    assert time.monotonic() - started < 10
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1 << 20
    assert "\n" not in str(caught.value)
