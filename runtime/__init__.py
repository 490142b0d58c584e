"""Ground sentences in videos with NumPy and a backend that runs the network; every top-level package may import it.

from runtime import Grounder, Video
grounder = Grounder.load("drn.onnx")
video = Video.load("3MSZA.npy", duration=30.96, num_frames=928)
for moment in grounder.ground(video, "person turns the light on"):
    print(moment.start, moment.end, moment.score)
"""

from __future__ import annotations

import os
import sys

if sys.argv[:1] == ["-m"] or os.path.basename(sys.argv[0] if sys.argv else "") == "drn":
    # While a command imports, which takes seconds with torch, Ctrl-C and missing packages must not print a traceback.
    # `runtime.core.cli` handles both afterwards. As process 1 of a container it would ignore SIGTERM without a handler.
    from traceback import walk_tb as _walk_tb
    from types import TracebackType as _TracebackType

    from runtime.core.errors import one_line as _one_line
    from runtime.core.interrupts import install as _install
    from runtime.core.interrupts import interrupted_by as _interrupted_by
    from runtime.core.terminal import replace_closed_streams as _replace_closed_streams

    _replace_closed_streams()
    _install()
    _excepthook = sys.excepthook
    # Packages that commands import at their start, with the extra that installs them.
    _extras = {"torch": "train", "onnx": "engine"}

    def _failed_package(error: ImportError, traceback: _TracebackType | None) -> str | None:
        """Return the package whose import failed, also if a library that it imports is missing; else None."""
        frames = (frame.f_globals.get("__name__", "") for frame, _ in _walk_tb(traceback))
        packages = (name.partition(".")[0] for name in (error.name or "", *frames))
        return next((package for package in packages if package in _extras), None)

    def _quiet(kind, error, traceback):  # type: ignore[no-untyped-def]
        if issubclass(kind, KeyboardInterrupt):
            interrupted = _interrupted_by(error)
            print(interrupted, file=sys.stderr)
            sys.exit(interrupted.exit_code)
        elif issubclass(kind, ImportError) and (package := _failed_package(error, traceback)):
            print(
                f"error: {package} cannot be imported ({_one_line(error)}). "
                f"Run `pip install '.[{_extras[package]}]'` in the drn-deploy directory.",
                file=sys.stderr,
            )
            sys.exit(2)
        else:
            _excepthook(kind, error, traceback)

    sys.excepthook = _quiet

from runtime.artifacts.encoded_video import EncodedVideo, EncodedWindows
from runtime.backends import open_backend
from runtime.backends.base import Backend, PairBackend
from runtime.core.errors import GroundingError
from runtime.core.moments import Moment, temporal_iou
from runtime.core.pooling import Segments
from runtime.core.presence import Presence
from runtime.core.sliding_windows import Windows
from runtime.core.tokenizer import Vocabulary
from runtime.core.video import Video
from runtime.grounding.grounder import Grounder

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


def __getattr__(name: str) -> str:
    if name == "__version__":
        import importlib.metadata

        return importlib.metadata.version("drn-deploy")
    raise AttributeError(name)
