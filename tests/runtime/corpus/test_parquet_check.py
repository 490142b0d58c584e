"""Test `runtime.corpus.parquet_check`: metadata that aborts libarrow is an error of one file."""

from __future__ import annotations

import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest

from runtime.core.errors import FeatureError
from runtime.corpus import parquet_check
from runtime.corpus.feature_sources import ParquetSource
from runtime.corpus.parquet_check import check_metadata
from tests.fuzz_readers import READERS
from tests.fuzzing import damage
from tests.raising import raises

pa = pytest.importorskip("pyarrow", reason="pyarrow reads Parquet")
parquet = pytest.importorskip("pyarrow.parquet")


def written(path: Path) -> Path:
    parquet.write_table(pa.table({"video": ["a", "b"], "features": [[[1.0, 2.0]], [[3.0, 4.0]]]}), path)
    return path


def test_check_metadata_passes_valid_and_unreadable_files(tmp_path: Path) -> None:
    (tmp_path / "text.parquet").write_text("no Parquet")
    check_metadata([written(tmp_path / "ä b.parquet"), tmp_path / "text.parquet", tmp_path / "missing.parquet"])


@pytest.mark.parametrize("stdout", [b"0\n1\n", b""])
def test_aborted_check_names_the_current_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stdout: bytes) -> None:
    files = [tmp_path / "first.parquet", tmp_path / "second.parquet"]
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: SimpleNamespace(returncode=-6, stdout=stdout))
    with raises(FeatureError, "damaged_file") as raised:
        check_metadata(files)
    assert files[1 if stdout else 0].name in str(raised.value)


def test_hanging_check_process_raises_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquet_check, "START_TIMEOUT_S", 0.0)
    monkeypatch.setattr(parquet_check, "FILE_TIMEOUT_S", 0.01)
    with pytest.raises(FeatureError):
        check_metadata([written(tmp_path / "a.parquet")])


@pytest.mark.parametrize(("name", "seed"), [("parquet-flat", 1044), ("parquet-lists", 10072)])
def test_metadata_aborting_pyarrow_26_is_rejected(name: str, seed: int, tmp_path: Path) -> None:
    (reader,) = [reader for reader in READERS if reader.name == name]
    path = damage(reader, seed, tmp_path)
    with raises(FeatureError, "damaged_file", path):
        ParquetSource([path])
