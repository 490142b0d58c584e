"""Time the phases of a call: tokenization, pooling, encoding, network, decoding and NMS."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import cast

from runtime.backends.base import PairBackend
from runtime.benchmarking.timing import Clock
from runtime.core.batch import collate, pad_queries
from runtime.core.decoding import PUBLISHED_COUNT, apply_nms, score_proposals_with_fallback
from runtime.core.moments import Moment, to_moments
from runtime.core.video import Video
from runtime.grounding.grounder import Grounder
from runtime.grounding.scheduling import distinct


def time_phases(
    grounder: Grounder, pairs: Sequence[tuple[Video, str]], clock: Clock = time.perf_counter
) -> tuple[list[list[Moment]], dict[str, float]]:
    """Ground pairs in one batch without windows, as `Grounder.ground_batch` does, and time the phases.

    Args:
        clock: returns the time in seconds.

    Returns:
        The moments of each pair, and the seconds of each phase by name.
    """
    decoding, seconds = grounder.manifest.decoding, {}
    last = clock()

    def mark(phase: str) -> None:
        nonlocal last
        now = clock()
        seconds[phase] = now - last
        last = now

    word_ids = {query: grounder.encode_query(query) for query in dict.fromkeys(query for _, query in pairs)}
    tokens = [word_ids[query] for _, query in pairs]
    mark("tokenise")
    videos = {id(video): video for video, _ in pairs}
    segments = {key: grounder.segments(video) for key, video in videos.items()}
    mark("segment")
    if grounder.is_pair:
        pair = cast(PairBackend, grounder.backend)
        encoded = {
            key: grounder.encode_segments(pooled, videos[key].duration, videos[key].name)
            for key, pooled in segments.items()
        }
        mark("encode")
        videos_once, index = distinct([encoded[id(video)] for video, _ in pairs])
        ids, lengths = pad_queries(tokens)
        mark("collate")
        heads = pair.ask(ids, lengths, videos_once, index)
    else:
        batch = collate(tokens, [segments[id(video)] for video, _ in pairs])
        mark("collate")
        heads = grounder.backend.run(batch)
    mark("network")
    proposals = score_proposals_with_fallback(heads, decoding)
    mark("decode")
    detections = apply_nms(proposals, decoding, PUBLISHED_COUNT)
    mark("NMS")
    moments = [to_moments(rows, video.duration) for rows, (video, _) in zip(detections[:, :5], pairs)]
    mark("seconds")
    return moments, seconds
