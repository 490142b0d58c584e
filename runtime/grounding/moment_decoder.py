"""Decode heads into moments: score proposals, merge the windows of a video, apply NMS, convert to seconds."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from runtime.artifacts.manifest import Manifest
from runtime.core.batch import Heads
from runtime.core.decoding import apply_nms, blocks, score_proposals
from runtime.core.moments import Moment, to_moments
from runtime.core.nvtx_ranges import marked
from runtime.core.sliding_windows import Window, WindowProposals
from runtime.grounding.requests import VideoInput


class MomentDecoder:
    """Decode the heads of N (video, query) pairs, each as soon as all windows of its video have been added.

    Args:
        windows: the windows of the video of each pair; empty if the entire video is one window.
        presence: whether to drop the moments of a pair whose best score is below the model's presence threshold.

    Attributes:
        moments: moments of each pair, best first, in seconds of the video file.
    """

    def __init__(
        self,
        videos: Sequence[VideoInput],
        windows: Sequence[Sequence[Window]],
        manifest: Manifest,
        top_k: int,
        *,
        presence: bool,
    ) -> None:
        self.moments: list[list[Moment]] = [[] for _ in videos]
        self._videos, self._windows, self._top_k = videos, windows, top_k
        self._decoding = manifest.decoding
        # Scores are float32, so the threshold is rounded too: an equal score passes.
        self._threshold = float(np.float32(manifest.presence.threshold)) if presence and manifest.presence else None
        self._proposals = WindowProposals(windows)

    @marked("decode")
    def add(self, pairs: Sequence[int], window_index: Sequence[int], heads: Heads) -> None:
        """Decode the heads of B rows.

        Args:
            pairs: (B,) index of the pair of each row.
            window_index: (B,) index of the row's window in its video.

        Raises:
            ModelFileError: a head is not finite; see `score_proposals`.
        """
        for rows, block in blocks(heads):
            scored = score_proposals(block, self._decoding)
            complete, proposals = self._proposals.add(pairs[rows], window_index[rows], scored)
            count = min(self._top_k, proposals.scores.shape[1])
            for pair, detections in zip(complete, apply_nms(proposals, self._decoding, count)):
                self.moments[pair] = self._moments(pair, detections)

    def _moments(self, pair: int, detections: np.ndarray) -> list[Moment]:
        """Return the moments of (K, 3) detections, NaN after the last."""
        video, windows = self._videos[pair], self._windows[pair]
        moments = to_moments(detections, windows[0].duration if windows else video.duration, video.offset)
        if self._threshold is not None:
            return moments if moments and moments[0].score >= self._threshold else []
        if not moments and self._top_k:
            # As in the published code: without a likely location, the entire video with score 1.
            start = float(video.offset)
            return [Moment(start, start + float(video.duration), 1.0)]
        return moments
