"""From a video and a sentence to moments and a report, in NumPy; the network stands behind a backend.

from runtime import Grounder, Video
grounder = Grounder.load("drn.onnx")
video = Video.load("3MSZA.npy", duration=30.96, num_frames=928)
for moment in grounder.ground(video, "person turns the light on"):
    print(moment.start, moment.end, moment.score)
"""

from __future__ import annotations

from runtime.backends import Backend, open_backend
from runtime.errors import GroundingError
from runtime.grounder import Grounder
from runtime.moments import Moment, temporal_iou
from runtime.videos import Segments, Video
from runtime.vocabulary import Vocabulary

__all__ = [
    "Backend",
    "Grounder",
    "GroundingError",
    "Moment",
    "Segments",
    "Video",
    "Vocabulary",
    "open_backend",
    "temporal_iou",
]
