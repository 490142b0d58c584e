"""Test `export.engine.profiles`."""

from __future__ import annotations

import dataclasses

import pytest

from export.engine.profiles import Unrolling, default_query_lengths, profiles, unrolling
from runtime.core.errors import ShapeError
from tests.export.conftest import TINY, manifest
from tests.raising import raises

ABOUT = manifest(TINY)


def test_single_and_batched_queries_get_separate_profiles() -> None:
    one, several = profiles((1, 8, 32), (1, 8, 12), ABOUT)
    assert one.shapes["query_tokens"] == ((1, 1), (1, 8), (1, 12))
    assert one.shapes["segment_features"] == ((1, 16, 16),) * 3
    assert several.shapes["query_tokens"] == ((2, 1), (8, 8), (32, 12))
    assert several.shapes["query_length"] == ((2,), (8,), (32,))
    assert several.shapes["segment_spans"] == ((2, 16, 2), (8, 16, 2), (32, 16, 2))


@pytest.mark.parametrize("batch", [(1, 1, 1), (4, 8, 8)])
def test_range_of_one_kind_gets_one_profile(batch: tuple[int, int, int]) -> None:
    (only,) = profiles(batch, (1, 8, 12), ABOUT)
    assert only.shapes["query_length"] == tuple((size,) for size in batch)


def test_batch_profile_optimum_is_at_least_two() -> None:
    assert profiles((1, 1, 4), (1, 8, 12), ABOUT)[1].batch == (2, 2, 4)


@pytest.mark.parametrize("wrong", [(0, 1, 2), (4, 2, 8), (1, 9, 8), (8, 8, 1)])
def test_range_that_does_not_increase_is_rejected(wrong: tuple[int, int, int]) -> None:
    with raises(ShapeError, "invalid_option", "--batch", *wrong):
        profiles(wrong, (1, 8, 12), ABOUT)
    with raises(ShapeError, "invalid_option", "--query-length", *wrong):
        profiles((1, 1, 1), wrong, ABOUT)


def test_query_length_beyond_checked_range_is_rejected() -> None:
    with raises(ShapeError, "query_length_out_of_range", 12, "--max-query-length 13"):
        profiles((1, 1, 1), (1, 8, 13), ABOUT)


def test_query_lengths_follow_data_set_within_graph_limits() -> None:
    assert default_query_lengths(dataclasses.replace(ABOUT, max_query_length=64)) == (1, 8, 32)
    for longest, expected in ((96, (1, 16, 96)), (12, (1, 12, 12))):
        about = dataclasses.replace(ABOUT, max_query_length=longest, training={"query_length": [1, 16, 96]})
        assert default_query_lengths(about) == expected
        assert profiles((1, 1, 1), None, about)[0].shapes["query_tokens"] == tuple((1, length) for length in expected)


def lengths(longest: int, target: str = "tensorrt", requested: tuple[int, ...] = (), **training: object) -> Unrolling:
    return unrolling(requested, target, longest, dataclasses.replace(ABOUT, training=training), None, "test")


def test_tensorrt_unrolls_lstm_for_usual_query_lengths() -> None:
    assert lengths(32).steps == (9, 10)
    assert lengths(10).steps == (9,)
    assert lengths(9).steps == ()
    assert lengths(64, data_set="TACoS").steps == (15, 27)
    assert lengths(64, query_length_quantiles=[7, 7]).steps == (7,)
    for target in ("tensorrt-rtx", "onnxruntime"):
        assert lengths(32, target).steps == ()
        assert lengths(32, target, (6, 10)).steps == (6, 10)


def test_unknown_data_set_gets_no_default_lengths() -> None:
    chosen = lengths(32, data_set="Mine")
    assert chosen.steps == ()
    assert "Mine" in chosen.reason


def test_requested_lengths_replace_the_defaults() -> None:
    assert lengths(32, requested=(0,)) == Unrolling((), "--unroll 0")
    assert lengths(32, requested=(32,)).steps == (32,)
    for wrong in ((-1,), (33,)):
        with raises(ShapeError, "invalid_option", "--unroll", 32, wrong[0]):
            lengths(32, requested=wrong)
