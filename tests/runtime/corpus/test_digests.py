"""A resumed corpus compares its shards and its features with the digests that were recorded."""

from __future__ import annotations

import os
import shutil

import pytest

from runtime.core.errors import OutputError
from runtime.core.video import load_features
from runtime.corpus.worker import DIGESTS
from runtime.datasets.feature_stores import FeatureFiles
from tests.damage import flip, random_bits
from tests.raising import raises
from tests.runtime.corpus.conftest import Corpus, Here, content

ROWS = [{"query": "a person opens the door."}, {"query": "dog sits.", "vid": "CCCC3"}]


@pytest.mark.parametrize("name", ["shard-00001-of-00002.jsonl", f"{DIGESTS}/00001.json"])
def test_damaged_shard_or_digest_file_is_written_again(here: Here, corpus: Corpus, name: str) -> None:
    features, queries = corpus(ROWS)
    output = here(features, queries, shard_pairs=4).output
    complete, file = content(output), output / name
    before = file.read_bytes()
    for bit in random_bits(before, 8):
        file.write_bytes(flip(before, bit))
        assert here(features, queries, shard_pairs=4).grounded == 4
        assert content(output) == complete
        assert file.read_bytes() == before


def test_changed_features_are_rejected_until_shard_is_removed(here: Here, corpus: Corpus) -> None:
    features, queries = corpus(ROWS)
    files = FeatureFiles(features / "C3D_unit16_overlap0.5_merged")
    added, changed = files.path("BBBB2"), files.path("CCCC3")
    away = added.rename(features / "away")
    output = here(features, queries, shard_pairs=2).output
    complete = content(output)
    away.rename(added)
    with raises(OutputError, "features_changed", "'BBBB2'"):
        here(features, queries, shard_pairs=2)
    added.rename(away)
    # The same size, name and modification time, with other bytes of the tensor's values.
    before, stat = changed.read_bytes(), changed.stat()
    middle = len(before) // 2
    changed.write_bytes(before[:middle] + bytes(64) + before[middle + 64 :])
    os.utime(changed, ns=(stat.st_atime_ns, stat.st_mtime_ns))
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
        os.utime(archive, ns=(0, 0))

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
    with raises(OutputError, "features_changed", repr(last)):
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
