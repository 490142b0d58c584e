"""Test `runtime.core.batch`: queries and videos in one batch."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from runtime.core.batch import collate
from runtime.core.pooling import Segments


def segments(value: float, dtype: type = np.float32) -> Segments:
    return Segments(np.full((4, 3), value, dtype), np.full((4, 2), value / 100))


def test_batch_names_and_dtypes_match_exported_graph() -> None:
    batch = collate([np.array([1], np.int64)], [segments(1, np.float16)])
    assert {name: str(value.dtype) for name, value in vars(batch).items()} == {
        "query_tokens": "int32",
        "query_length": "int32",
        "segment_features": "float32",
        "segment_spans": "float32",
    }


@given(st.lists(st.lists(st.integers(1, 99), min_size=1, max_size=9), min_size=1, max_size=8))
def test_collate_preserves_order_and_content(sentences: list[list[int]]) -> None:
    queries = [np.array(ids, np.int32) for ids in sentences]
    batch = collate(queries, [segments(index) for index in range(len(queries))])
    assert len(batch) == len(sentences)
    assert batch.query_tokens.shape[1] == max(map(len, sentences))
    for index, ids in enumerate(sentences):
        assert batch.query_tokens[index].tolist() == ids + [0] * (batch.query_tokens.shape[1] - len(ids))
        assert (batch.segment_features[index] == index).all()
        assert (batch.segment_spans[index] == np.float32(index / 100)).all()
    assert batch.query_length.tolist() == [len(ids) for ids in sentences]
