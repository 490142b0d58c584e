"""Reject Parquet files whose pages decompress to more than their metadata declares."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from runtime.core.errors import FeatureError
from runtime.core.pooling import ClipTiming
from runtime.corpus.feature_sources import ParquetSource
from runtime.corpus.parquet_pages import decompressed_bytes
from tests.raising import quotes

pa = pytest.importorskip("pyarrow", reason="Parquet needs pyarrow")
parquet = pytest.importorskip("pyarrow.parquet", reason="Parquet needs pyarrow")
pytestmark = pytest.mark.usefixtures("unchecked")


def rows(path: Path, features: list[Any], **options: Any) -> Path:
    """Write one row per array of features."""
    names = [f"v{number}" for number in range(len(features))]
    table = pa.table({"video": names, "duration": [20.0] * len(names), "features": features})
    parquet.write_table(table, path, **options)
    return path


def columns(path: Path) -> list[Any]:
    about = parquet.ParquetFile(path).metadata
    return [about.row_group(0).column(index) for index in range(about.num_columns)]


def answers(path: Path) -> list[Any]:
    source = ParquetSource([path])
    return list(source.load(source.listing(), ClipTiming()))


@pytest.mark.parametrize("version", ["1.0", "2.0"])
@pytest.mark.parametrize("compression", ["none", "snappy", "zstd", "gzip"])
@pytest.mark.parametrize("dictionary", [True, False])
def test_decompressed_bytes_of_valid_files(tmp_path: Path, version: str, compression: str, dictionary: bool) -> None:
    features = [np.random.default_rng(row).normal(size=(40, 8)).astype(np.float32).tolist() for row in range(30)]
    options = {"data_page_version": version, "compression": compression, "use_dictionary": dictionary}
    path = rows(tmp_path / "a.parquet", features, data_page_size=1000, **options)
    with open(path, "rb") as stream:
        for column in columns(path):
            assert decompressed_bytes(stream, column) >= column.num_values
    actual = answers(path)
    np.testing.assert_array_equal(actual[7].features, np.float32(features[7]))


ZEROS = 100_000


@pytest.fixture
def bomb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file of 3 kB with a row of zeros that take 400 kB, where 256 kB are the limit."""
    monkeypatch.setattr("runtime.core.io.array_files.MAX_UNFOLDED_BYTES", 1 << 18)
    zeros = pa.array(np.zeros(ZEROS, np.float32))
    features = pa.LargeListArray.from_arrays(pa.array([0, len(zeros)], pa.int64()), zeros)
    return rows(tmp_path / "bomb.parquet", features, compression="zstd")


def test_decompression_bomb_row_is_rejected(bomb: Path) -> None:
    (problem,) = answers(bomb)
    assert quotes(problem, 4 * ZEROS)
    assert "\n" not in problem


def test_false_value_count_in_metadata_is_rejected(bomb: Path) -> None:
    content = bytearray(bomb.read_bytes())
    start = len(content) - 8 - int.from_bytes(content[-8:-4], "little")
    honest, lie = _zigzag(ZEROS, 3), _zigzag(100, 3)
    assert honest in content[start:]
    bomb.write_bytes(content[:start] + content[start:].replace(honest, lie))
    assert {column.num_values for column in columns(bomb)} <= {1, 100}
    (problem,) = answers(bomb)
    assert quotes(problem, 100)


def _zigzag(number: int, length: int) -> bytes:
    """Return a number of the compact protocol in a given number of bytes."""
    number <<= 1
    parts = [number >> 7 * index & 127 | 128 for index in range(length)]
    return bytes([*parts[:-1], parts[-1] & 127])


@pytest.mark.parametrize("damage", [b"", b"PAR1", b"PAR1PAR1", b"PAR1" + b"\xff" * 60 + b"\x20\0\0\0PAR1"])
def test_invalid_parquet_raises_one_line_error(tmp_path: Path, damage: bytes) -> None:
    path = tmp_path / "a.parquet"
    path.write_bytes(damage)
    with pytest.raises(FeatureError) as caught:
        ParquetSource([path]).listing()
    assert "\n" not in str(caught.value)
