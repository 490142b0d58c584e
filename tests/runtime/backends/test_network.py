"""Test `runtime.backends.network`: a split and an unsplit model run alike on encoded windows."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from runtime.backends.network import SplitNetwork, UnsplitNetwork, network_of
from runtime.core.batch import Batch, pad_queries
from runtime.core.errors import FeatureError, ModelFileError
from runtime.core.pooling import Segments
from tests.raising import raises
from tests.runtime.artifacts.test_encoded_video import PlantedPair

QUERIES = [np.array(ids, np.int32) for ids in ([2], [6, 2], [1, 4, 3], [5])]
INDEX = np.array([1, 0, 1, 2], np.int32)


def windows(count: int) -> list[Segments]:
    generator = np.random.default_rng(0)
    spans = np.stack([np.arange(32), np.arange(1, 33)], 1) / 32
    return [Segments(generator.random((32, 8), np.float32), spans) for _ in range(count)]


@pytest.mark.parametrize("rows", [[0, 1, 2, 3], [2], [1, 3]])
def test_both_networks_run_windows_as_the_backend_runs_batches(planted_backend: Any, rows: list[int]) -> None:
    backend, segments = planted_backend(), windows(3)
    tokens, lengths = pad_queries([QUERIES[row] for row in rows])
    of_rows = [segments[index] for index in INDEX[rows]]
    batch = Batch(
        tokens,
        lengths,
        np.stack([window.features for window in of_rows]),
        np.stack([window.spans for window in of_rows]).astype(np.float32),
    )
    expected = vars(backend.run(batch))
    for network, kind in ((network_of(backend), UnsplitNetwork), (network_of(PlantedPair(backend)), SplitNetwork)):
        assert type(network) is kind
        encodings = [network.encode(window, 9.0, "window") for window in segments]
        for name, values in vars(network.run(tokens, lengths, encodings, INDEX[rows])).items():
            np.testing.assert_array_equal(values, expected[name])


def test_encodings_are_checked_by_both_networks(planted_backend: Any) -> None:
    split, other = (SplitNetwork(PlantedPair(planted_backend(), digit * 64)) for digit in "12")
    encoded = split.encode(windows(1)[0], 9.0, "hall")
    split.check(encoded)
    with raises(FeatureError, "encoding_of_another_model", "hall", "1" * 12, "2" * 12):
        other.check(encoded)
    with raises(ModelFileError, "query_part_required", "hall"):
        UnsplitNetwork(planted_backend()).check(encoded)
