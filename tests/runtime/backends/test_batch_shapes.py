"""Test `runtime.backends.batch_shapes`: padded sizes, choice of a profile, slices of a batch, packed tensors."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.backends.batch_shapes import (
    ALIGNMENT,
    AXES,
    OptimizationProfile,
    bucket,
    choose_profile,
    pack_tensors,
    profile_from_shapes,
    referenced_videos,
    row_slices,
    row_slices_by_video,
)
from runtime.core.errors import ShapeError
from tests.raising import raises
from tests.runtime.engine_bench import profile


@given(st.integers(1, 5000))
def test_bucket_pads_by_at_most_a_third(size: int) -> None:
    padded = bucket(size)
    assert size <= padded
    assert padded - size <= padded / 3
    assert bucket(padded) == padded
    # Few sizes need few CUDA graphs.
    assert padded in {factor << power for factor in (1, 3) for power in range(14)}


def profiles_of(*batches: tuple[int, int, int]) -> list[OptimizationProfile]:
    profiles = []
    for index, batch in enumerate(batches):
        shapes = {name: [tuple(shape) for shape in trio] for name, trio in profile(batch)["shapes"].items()}
        profiles.append(profile_from_shapes(index, AXES["whole"], shapes))
    return profiles


@pytest.mark.parametrize(
    ("batch", "length", "index", "padded"),
    [(1, 1, 0, (1, 4)), (2, 5, 1, (2, 6)), (5, 9, 1, (6, 12)), (7, 12, 1, (8, 12)), (10, 11, 2, (12, 12))],
)
def test_profile_with_least_padding_is_chosen(batch: int, length: int, index: int, padded: tuple[int, int]) -> None:
    profiles = profiles_of((1, 1, 1), (2, 4, 8), (6, 16, 30))
    chosen, sizes = choose_profile(profiles, {"batch": batch, "query_length": length})
    assert chosen.index == index
    assert (sizes["batch"], sizes["query_length"]) == padded


def test_request_beyond_all_profiles_names_their_ranges() -> None:
    with raises(ShapeError, "shape_mismatch", "batch 1 to 1, query_length 2 to 12", "batch 2 to 8", "batch 9"):
        choose_profile(profiles_of((1, 1, 1), (2, 4, 8)), {"batch": 9, "query_length": 3})


@given(st.lists(st.integers(0, 9), min_size=1, max_size=60), st.integers(1, 8), st.integers(1, 4))
def test_slices_contain_each_row_once_and_limit_videos(which: list[int], max_rows: int, max_videos: int) -> None:
    index, videos = np.array(which, np.int32), max(which) + 1
    parts = list(row_slices_by_video(index, max_rows, max_videos, videos))
    assert sorted(np.concatenate(parts).tolist()) == list(range(len(which)))
    for rows in parts:
        assert 1 <= len(rows) <= max_rows
        referenced, row_videos = referenced_videos(index[rows], videos, max_videos)
        assert len(referenced) <= max_videos
        assert np.array_equal(referenced[row_videos], index[rows])
    plain = [row for part in row_slices(len(which), max_rows) for row in part.tolist()]
    assert plain == list(range(len(which)))


@given(st.lists(st.tuples(st.integers(1, 40), st.sampled_from(["f4", "f2", "i4"])), min_size=1, max_size=6))
def test_packed_tensors_are_aligned_and_do_not_overlap(tensors: list[tuple[int, str]]) -> None:
    shapes = {str(number): (size, 3) for number, (size, _) in enumerate(tensors)}
    dtypes = {str(number): np.dtype(kind) for number, (_, kind) in enumerate(tensors)}
    regions, size = pack_tensors(shapes, dtypes)
    buffer = np.zeros(size, np.uint8)
    for region in regions.values():
        assert region.offset % ALIGNMENT == 0
        view = region.view(buffer)
        assert view.shape == region.shape
        assert not view.any()
        view[...] = 1
