"""Assert that a backend rejects word ids, lengths and indices out of range, which its library may accept."""

from __future__ import annotations

from typing import Any

import numpy as np

from runtime.artifacts.encoded_video import EncodedVideo
from runtime.core.batch import Batch
from runtime.core.errors import ShapeError
from tests.raising import raises


def check_words_and_lengths(model: Any, batch: Batch) -> None:
    """Assert that a backend runs numbers at both ends of their ranges, and rejects those beyond them.

    Args:
        batch: at least two queries; every length below 1 and beyond the columns of its word ids is out of range.
    """
    num_words, columns = len(model.manifest.vocabulary), batch.query_tokens.shape[1]
    for field, low, high in (("query_tokens", 0, num_words), ("query_length", 1, columns)):
        for number in (low, high):
            model.run(_changed(batch, field, number))
        for number in (low - 1, high + 1):
            with raises(ShapeError, "shape_mismatch", field, low, high, number):
                model.run(_changed(batch, field, number))
    with raises(ShapeError, "shape_mismatch", "query_length"):
        model.run(Batch(**{**vars(batch), "query_tokens": batch.query_tokens[:, :0]}))


def check_video_index(pair: Any, batch: Batch) -> None:
    """Assert that the backend of a split model rejects indices of videos that it did not get."""
    features = pair.encode(batch.segment_features)
    videos = [EncodedVideo(encoded, spans, 1.0) for encoded, spans in zip(features, batch.segment_spans, strict=True)]
    for index in (-1, len(videos)):
        for rows in (1, len(batch)):
            video_index = np.zeros(rows, np.int32)
            video_index[-1] = index
            with raises(ShapeError, "shape_mismatch", "video_index", 0, len(videos) - 1, index):
                pair.ask(batch.query_tokens[:rows], batch.query_length[:rows], videos, video_index)


def _changed(batch: Batch, field: str, number: int) -> Batch:
    """Return a copy of a batch with a number in its second row."""
    values = getattr(batch, field).copy()
    values[1] = number
    return Batch(**{**vars(batch), field: values})
