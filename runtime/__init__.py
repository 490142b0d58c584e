"""From a video and a sentence to moments and a report, in NumPy; the network stands behind a backend.

from runtime import Grounder, Video
grounder = Grounder.load("drn.onnx")
video = Video.load("3MSZA.npy", duration=30.96, num_frames=928)
for moment in grounder.ground(video, "person turns the light on"):
    print(moment.start, moment.end, moment.score)
"""

from __future__ import annotations

import sys

if sys.argv[:1] == ["-m"]:
    # Started as a command and still importing, which takes seconds with torch: Ctrl-C should not print a traceback.
    # Once imported, `runtime.command` answers it.
    _excepthook = sys.excepthook

    def _quiet(kind, error, traceback):  # type: ignore[no-untyped-def]
        if issubclass(kind, KeyboardInterrupt):
            print("Interrupted; nothing half-written was left behind.", file=sys.stderr)
        else:
            _excepthook(kind, error, traceback)

    sys.excepthook = _quiet

from runtime.backends import Backend, PairBackend, open_backend
from runtime.encodings import EncodedVideo, EncodedWindows
from runtime.errors import GroundingError
from runtime.grounder import Grounder
from runtime.moments import Moment, temporal_iou
from runtime.presence import Presence
from runtime.videos import Segments, Video
from runtime.vocabulary import Vocabulary
from runtime.windows import Windows

__all__ = [
    "Backend",
    "EncodedVideo",
    "EncodedWindows",
    "Grounder",
    "GroundingError",
    "Moment",
    "PairBackend",
    "Presence",
    "Segments",
    "Video",
    "Vocabulary",
    "Windows",
    "open_backend",
    "temporal_iou",
]
