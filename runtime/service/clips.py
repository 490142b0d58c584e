"""Cut clips from the video files of the service, one at a time and in another process."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path

from runtime.service.http_errors import HttpError
from runtime.service.isolated import run_isolated

log = logging.getLogger("drn.service")

# Maximum length of a clip, and number of clips that are cut or wait.
MAX_SECONDS = 120.0
MAX_CLIPS = 4
# Arguments: video file, start and end as players count, output, and CPU threads or "".
CUT = """
from pathlib import Path
from runtime.media.clip_writer import write_clips
from runtime.media.video_file import probe
source, start, end, output, threads = sys.argv[1:]
video = probe(Path(source))
span = max(0.0, float(start) - video.offset), float(end) - video.offset
write_clips(video, [span], [Path(output)], int(threads) if threads else None)
"""


class ClipCutter:
    """Cut clips as mp4 files."""

    def __init__(self, threads: int | None) -> None:
        self._threads = threads
        self._cutting = asyncio.Semaphore(1)
        self._clips = 0

    async def cut(self, media: int, start: float, end: float, output: Path) -> None:
        """Write a span of a video file as an mp4 file. Cancellation ends the process that cuts it.

        Args:
            media: descriptor of the open video file.
            start, end: in seconds.

        Raises:
            HttpError: the span is empty or longer than `MAX_SECONDS`; too many clips wait; or FFmpeg fails.
        """
        if not 0 < end - start <= MAX_SECONDS:
            raise HttpError(
                422,
                f"Expected start < end, and at most {MAX_SECONDS:g} s, got {start:g} to {end:g}. Choose another span.",
            )
        if self._clips >= MAX_CLIPS:
            raise HttpError(
                429,
                f"{self._clips} clips wait, which is the limit. Try again later.",
                "queue_full",
                {"retry-after": "5"},
            )
        self._clips += 1
        try:
            async with self._cutting:
                arguments = (f"/dev/fd/{media}", start, end, output, self._threads or "")
                exit_code, messages = await run_isolated(CUT, arguments, pass_fds=(media,))
        finally:
            self._clips -= 1
        if exit_code != 0:
            log.error("A clip failed with exit code %s: %s", exit_code, messages[-2000:])
            raise HttpError(422, "The clip cannot be cut from the video file. Choose another span.", "no_clip")
