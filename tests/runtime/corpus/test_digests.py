"""A resumed corpus compares its shards and its features with the digests that were recorded."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from runtime.core.errors import OutputError
from runtime.core.video import load_features
from runtime.corpus.job import Result
from runtime.corpus.worker import DIGESTS
from runtime.datasets.feature_stores import FeatureFiles
from tests.damage import flip, random_bits
from tests.raising import raises
from tests.runtime.corpus.conftest import content

Here = Callable[..., Result]
Corpus = Callable[..., tuple[Path, Path]]

ROWS = [{"query": "a person opens the door."}, {"query": "dog sits.", "vid": "CCCC3"}]


def replace(features: Path, video: str) -> None:
    """Replace features by others of the same size, name and modification time."""
    path = FeatureFiles(features / "C3D_unit16_overlap0.5_merged").path(video)
    before, stat = path.read_bytes(), path.stat()
    # A byte of the tensor's values, at the end of its record.
    middle = len(before) // 2
    path.write_bytes(before[:middle] + bytes(64) + before[middle + 64 :])
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_damaged_shard_is_rebuilt(here: Here, corpus: Corpus, tmp_path: Path, form: str) -> None:
    features, queries = corpus(ROWS)
    output = here(features, queries, form=form, shard_pairs=4).output
    complete = content(output)
    shard = min(output.glob("shard-*"))
    for bit in random_bits(shard.read_bytes(), 10):
        shard.write_bytes(flip(shard.read_bytes(), bit))
        result = here(features, queries, form=form, shard_pairs=4)
        assert result.grounded == 4
        assert content(output) == complete


def test_damaged_digest_file_rebuilds_its_shard(here: Here, corpus: Corpus) -> None:
    features, queries = corpus(ROWS)
    output = here(features, queries).output
    complete = content(output)
    (digests,) = (output / DIGESTS).iterdir()
    before = digests.read_bytes()
    for bit in random_bits(before, 20):
        digests.write_bytes(flip(before, bit))
        here(features, queries)
        assert content(output) == complete
        assert digests.read_bytes() == before


def test_changed_features_are_rejected_until_shard_is_removed(here: Here, corpus: Corpus) -> None:
    features, queries = corpus(ROWS)
    output = here(features, queries, shard_pairs=2).output
    complete = content(output)
    replace(features, "CCCC3")
    with raises(OutputError, "features_changed", "'CCCC3'"):
        here(features, queries, shard_pairs=2)
    assert content(output) == complete
    for path in output.glob("shard-*"):
        if b"CCCC3" in path.read_bytes():
            path.unlink()
    here(features, queries, shard_pairs=2)
    assert content(output).keys() == complete.keys()


def test_changed_archive_is_named_instead_of_a_video(here: Here, corpus: Corpus) -> None:
    h5py = pytest.importorskip("h5py", reason="features in HDF5 need h5py")
    features, queries = corpus(ROWS)
    directory = features / "C3D_unit16_overlap0.5_merged"
    arrays = {path.stem: load_features(path) for path in directory.iterdir()}
    shutil.rmtree(directory)
    archive = features / "all.hdf5"

    def write() -> None:
        archive.unlink(missing_ok=True)
        with h5py.File(archive, "w") as file:
            for name, array in arrays.items():
                file[name] = array

    write()
    here(features, queries)
    here(features, queries)
    # The last video changed, not the first of its shard.
    last = max(arrays)
    arrays[last] = arrays[last][::-1]
    write()
    with raises(OutputError, "features_changed", archive.name) as caught:
        here(features, queries)
    assert not [name for name in arrays if name in str(caught.value).replace(str(archive), "")]
    # The error names a video that was removed.
    del arrays[last]
    write()
    with raises(OutputError, "features_changed", repr(last)) as caught:
        here(features, queries)
    assert caught.value.code == "features_changed"


def test_added_features_are_reported_as_changed(here: Here, corpus: Corpus) -> None:
    features, queries = corpus(ROWS)
    path = FeatureFiles(features / "C3D_unit16_overlap0.5_merged").path("BBBB2")
    away = path.rename(features / "away")
    here(features, queries)
    here(features, queries)
    away.rename(path)
    with raises(OutputError, "features_changed"):
        here(features, queries)


def test_shard_without_digests_is_rejected(here: Here, corpus: Corpus) -> None:
    features, queries = corpus(ROWS)
    output = here(features, queries).output
    complete = content(output)
    (digests,) = (output / DIGESTS).iterdir()
    digests.unlink()
    with raises(OutputError, "unknown_features"):
        here(features, queries)
    assert content(output) == complete


def test_hdf5_stamp_changes_with_feature_content(tmp_path: Path) -> None:
    h5py = pytest.importorskip("h5py", reason="HDF5 needs drn-deploy[hdf5]")
    from runtime.datasets.feature_stores import FeatureArchive

    path = tmp_path / "features.hdf5"
    stamps = []
    for value in (1.0, 2.0):
        with h5py.File(path, "w") as file:
            file["a"] = np.full((5, 4), value, np.float32)
        os.utime(path, ns=(0, 0))
        stamps.append(FeatureArchive(path).stamp("a"))
    assert stamps[0][:3] == stamps[1][:3]
    assert stamps[0] != stamps[1]
