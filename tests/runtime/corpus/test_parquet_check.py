"""Test `runtime.corpus.parquet_check`: metadata that aborts libarrow is an error of one file."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from runtime.core.errors import FeatureError
from runtime.corpus import parquet_check
from runtime.corpus.parquet_check import check_metadata

pa = pytest.importorskip("pyarrow", reason="pyarrow reads Parquet")
parquet = pytest.importorskip("pyarrow.parquet")
ROOT = Path(__file__).parents[3]


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
    with pytest.raises(FeatureError) as raised:
        check_metadata(files)
    assert raised.value.code == "damaged_file"
    assert files[1 if stdout else 0].name in str(raised.value)


def test_hanging_check_process_raises_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquet_check, "START_TIMEOUT_S", 0.0)
    monkeypatch.setattr(parquet_check, "FILE_TIMEOUT_S", 0.01)
    with pytest.raises(FeatureError):
        check_metadata([written(tmp_path / "a.parquet")])


@pytest.mark.parametrize(("reader", "seed"), [("parquet-flat", 1044), ("parquet-lists", 10072)])
def test_metadata_aborting_pyarrow_26_is_rejected(reader: str, seed: int) -> None:
    words = [sys.executable, "-m", "tests.fuzzing", "--reader", reader, "--seed", str(seed)]
    result = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr[-500:]
