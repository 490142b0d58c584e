"""Draw the moments of queries on one time axis, with frames of the video below, into a PNG file."""

from __future__ import annotations

import dataclasses
import logging
import textwrap
import unicodedata
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from runtime.core.cli import check_plots
from runtime.core.errors import printable, printable_line
from runtime.core.io.atomic_files import atomic_write
from runtime.core.moments import Moment
from runtime.grounding.formatting import Answer, format_timestamp
from runtime.media.video_file import VideoFile, frames_at

log = logging.getLogger("drn")

# Sizes in inches, so that the height of a row does not depend on their number. BAR is that of the best moment, SMALL of
# the others if there are several queries, and LETTER the width of a letter of a caption.
WIDTH, EDGE = 10.0, 0.35
LINE, BAR, SMALL, THIN, GAP = 0.2, 0.22, 0.12, 0.1, 0.07
LETTER = 0.076
STRIP = 0.85
# Resolution, and maximum height in pixels, above which the resolution is lower: Agg draws at most 65,536.
DPI, MAX_PIXELS = 120, 32_000
# Maximum number of letters in a line, and of the name of the video, whose line ends with the legend.
COLUMNS, NAME_COLUMNS = 118, 36
# Seconds between ticks.
STEPS = (0.1, 0.2, 0.5, 1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 21600, 86400, 864000)
MAX_TICKS = 9
MAX_LINES = 3
# Minimum and maximum number of frames in the strip, and aspect ratio (width / height) of a frame.
FRAMES = (3, 24)
ASPECT_RATIOS = (0.25, 8.0)
BEST, OTHERS, TRUTH, TRACK, INK, PALE = "#1f5fa8", "#8db4de", "#2f8f57", "#eceff3", "#1c2430", "#69707c"
# Minimum length of a bar, as a fraction of the axis, so that it is visible.
MIN_BAR_LENGTH = 0.003
# Fonts for scripts that matplotlib's default font lacks.
FALLBACKS = (
    "Noto Sans CJK JP", "Noto Sans CJK SC", "Noto Sans JP", "Noto Sans SC", "Noto Sans KR", "Noto Sans Devanagari",
    "Noto Sans Thai", "Noto Sans", "WenQuanYi Micro Hei", "Hiragino Sans", "PingFang SC", "Apple SD Gothic Neo",
    "Microsoft YaHei", "Yu Gothic", "Malgun Gothic", "Nirmala UI", "Arial Unicode MS",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class _Track:
    """One row of bars, (start, end) in seconds, their color, and the caption of the row."""

    bars: Sequence[tuple[float, float]]
    bar_color: str
    caption: str
    caption_color: str
    height: float = BAR


def draw(answers: Sequence[Answer], path: Path, video_file: VideoFile | None = None, *, partial: bool = True) -> None:
    """Draw the answers about one video into a PNG file.

    Every moment has a row with its times and score; those of lower scores are paler. The ground truth of a query, if
    known, is drawn below its moments.

    Args:
        answers: at least one, all about one video.

    Raises:
        VideoFileError: the video file is damaged and `partial` is False.
    """
    check_plots(path)
    from matplotlib.figure import Figure

    duration = answers[0].duration
    blocks = [(_wrapped(f"“{answer.query}”"), _tracks(answer, len(answers) == 1)) for answer in answers]
    height = LINE * 1.4 + sum(_height(lines, tracks) for lines, tracks in blocks)
    captions = max(len(track.caption) for _, tracks in blocks for track in tracks)
    span = WIDTH - 2 * EDGE - LETTER * captions
    frames = _read_strip(video_file, span, duration, partial) if video_file else []
    strip = span / len(frames) * frames[0].shape[0] / frames[0].shape[1] if frames else 0.0
    total = 0.15 + height + strip + 0.35
    figure = Figure(figsize=(WIDTH, total), facecolor="white")
    axes = figure.add_axes((EDGE / WIDTH, (0.35 + strip) / total, span / WIDTH, height / total))
    axes.set_xlim(0, duration)
    axes.set_ylim(height, 0)
    axes.set_yticks([])
    for side in ("left", "right", "top"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set(color=PALE, visible=not frames)
    axes.grid(axis="x", color=TRACK, linewidth=0.8)
    axes.set_axisbelow(True)
    name = _shortened(printable_line(answers[0].video), NAME_COLUMNS)
    _write(axes, f"{name}   {format_timestamp(duration)}", 0, LINE * 0.5, weight="bold", size=11)
    _draw_legend(figure, answers, 1 - (0.15 + LINE * 0.5) / total)
    top = LINE * 1.4
    for lines, tracks in blocks:
        for line in lines:
            _write(axes, line, 0, top + LINE / 2)
            top += LINE
        for track in tracks:
            _draw_track(axes, track, top, duration, EDGE / 3 / span)
            top += track.height + GAP / 2
        top += GAP * 2
    lowest = axes
    if frames:
        axes.tick_params(axis="x", length=0, labelbottom=False)
        lowest = figure.add_axes((EDGE / WIDTH, 0.35 / total, span / WIDTH, strip / total))
        _draw_strip(lowest, frames, answers, duration)
    step = next((step for step in STEPS if duration / step <= MAX_TICKS), STEPS[-1])
    for panel in (axes, lowest):
        panel.set_xticks(np.arange(0, duration * (1 + 1e-9), step) if duration / step < 1000 else (0, duration))
    lowest.xaxis.set_major_formatter(lambda value, _: format_timestamp(value, 0 if step >= 1 else 1))
    lowest.tick_params(axis="x", colors=PALE, labelsize=8)
    with atomic_write(path) as temporary, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        figure.savefig(temporary, dpi=min(DPI, MAX_PIXELS / total), format="png")
    if any("missing from" in str(entry.message) for entry in caught):
        log.warning("No installed font has all letters of the queries. Install one that does, such as Noto Sans.")


def _tracks(answer: Answer, is_only: bool) -> list[_Track]:
    """Return a row for each moment of an answer, then one for the ground truth."""
    tracks = [
        _Track(
            [(moment.start, moment.end)],
            _color(moment, answer),
            f"{_interval(moment.start, moment.end)}  {moment.score:.2f}",
            INK if rank else BEST,
            BAR if is_only or not rank else SMALL,
        )
        for rank, moment in enumerate(answer.moments)
    ]
    if not tracks:
        tracks = [_Track((), BEST, "no moment found", PALE)]
    if answer.truths:
        times = _interval(*answer.truths[0]) if len(answer.truths) == 1 else f"{len(answer.truths)} moments"
        tracks.append(_Track(answer.truths, TRUTH, f"{times}  truth", TRUTH, THIN))
    return tracks


def _interval(start: float, end: float) -> str:
    return f"{format_timestamp(start)} – {format_timestamp(end)}"


def _color(moment: Moment, answer: Answer) -> str:
    """Return the color of a moment: full for the best, paler for lower scores."""
    if moment is answer.moments[0]:
        return BEST
    best_score = answer.moments[0].score
    ratio = min(max(moment.score / best_score, 0.0), 1.0) if best_score > 0 else 1.0
    channels = (int(OTHERS[index : index + 2], 16) for index in (1, 3, 5))
    mixed = (round(value + (1 - ratio) * 0.65 * (255 - value)) for value in channels)
    return "#" + "".join(f"{value:02x}" for value in mixed)


def _height(lines: Sequence[str], tracks: Sequence[_Track]) -> float:
    return LINE * len(lines) + sum(track.height + GAP / 2 for track in tracks) + GAP * 2


def _wrapped(text: str) -> list[str]:
    """Return a sentence in lines that fit; wide letters, such as Chinese, take two columns."""
    text = printable(" ".join(text.split()))
    wide = sum(unicodedata.east_asian_width(letter) in "WF" for letter in text)
    columns = int(COLUMNS / (1 + wide / max(len(text), 1)))
    return textwrap.wrap(text, columns, max_lines=MAX_LINES, placeholder=" …”") or ["“”"]


def _shortened(text: str, columns: int) -> str:
    """Return the start of a text that fits; wide letters take two columns."""
    width = 0
    for index, letter in enumerate(text):
        width += 2 if unicodedata.east_asian_width(letter) in "WF" else 1
        if width > columns:
            return f"{text[: index - 1]}…"
    return text


def _draw_legend(figure: Any, answers: Sequence[Answer], middle: float) -> None:
    """Explain the colors that occur, at the right of the line of the title."""
    from matplotlib.patches import Patch

    colors = {
        BEST: ("best moment", any(answer.moments for answer in answers)),
        OTHERS: ("others, paler for lower scores", any(len(answer.moments) > 1 for answer in answers)),
        TRUTH: ("ground truth", any(answer.truths for answer in answers)),
    }
    handles = [Patch(color=color, label=label) for color, (label, occurs) in colors.items() if occurs]
    if handles:
        figure.legend(
            handles=handles, loc="center right", bbox_to_anchor=(1 - EDGE / 2 / WIDTH, middle), ncols=len(handles),
            frameon=False, fontsize=8.5, labelcolor=INK, handlelength=1.2, handleheight=0.6, columnspacing=1.4,
        )  # fmt: skip


def _write(axes: Any, text: str, x: float, y: float, **style: Any) -> Any:
    """Write a line of text that starts at `x` seconds; dollar signs do not start a formula."""
    style = {"size": 9.5, "color": INK, "family": ["DejaVu Sans", *_fallbacks()], **style}
    # Hides the grid lines behind the text.
    style["bbox"] = {"facecolor": "white", "edgecolor": "none", "pad": 0.8}
    return axes.text(x, y, text, va="center", parse_math=False, clip_on=False, **style)


def _fallbacks() -> list[str]:
    from matplotlib import font_manager

    installed = {font.name for font in font_manager.fontManager.ttflist}
    return [name for name in FALLBACKS if name in installed]


def _draw_track(axes: Any, track: _Track, top: float, duration: float, gap: float) -> None:
    """Draw a row whose upper edge is at `top`, and its caption, at a distance of `gap` axis lengths."""
    middle = top + track.height / 2
    axes.barh(middle, duration, left=0, height=track.height, color=TRACK, gid="track")
    for start, end in track.bars:
        length = max(end - start, MIN_BAR_LENGTH * duration)
        left = min(max(start, 0.0), duration - length)
        axes.barh(
            middle, length, left=left, height=track.height, color=track.bar_color, linewidth=0.6,
            edgecolor=TRUTH if track.bar_color == TRUTH else BEST, gid="bar",
        )  # fmt: skip
    size = 8.5 if track.height > SMALL else 7.5
    _write(axes, track.caption, duration * (1 + gap), middle, size=size, color=track.caption_color)


def _read_strip(video_file: VideoFile, span: float, duration: float, partial: bool) -> list[np.ndarray]:
    """Return the middle frame of equal parts of the time axis, all of one shape (height, width, 3) uint8."""
    ((height, width, _),) = (frame.shape for frame in frames_at(video_file, [0.0], round(STRIP * DPI), partial=partial))
    aspect_ratio = min(max(width / height, ASPECT_RATIOS[0]), ASPECT_RATIOS[1])
    count = min(max(round(span / (STRIP * aspect_ratio)), FRAMES[0]), FRAMES[1])
    # The axis includes the time before the first frame.
    times = (np.arange(count) + 0.5) * min(duration, video_file.offset + video_file.duration) / count
    times = np.maximum(times - video_file.offset, 0.0)
    # Frames are scaled to their size in the plot, so that memory does not depend on the video.
    pixels = max(1, round(span / count / aspect_ratio * DPI))
    return [_crop(frame, aspect_ratio) for frame in frames_at(video_file, times.tolist(), pixels, partial=partial)]


def _crop(frame: np.ndarray, aspect_ratio: float) -> np.ndarray:
    """Return the middle of a frame with the given aspect ratio."""
    height, width = frame.shape[:2]
    new_width = min(width, max(1, round(height * aspect_ratio)))
    new_height = min(height, max(1, round(width / aspect_ratio)))
    left, top = (width - new_width) // 2, (height - new_height) // 2
    return frame[top : top + new_height, left : left + new_width]


def _draw_strip(axes: Any, frames: Sequence[np.ndarray], answers: Sequence[Answer], duration: float) -> None:
    width = duration / len(frames)
    for index, frame in enumerate(frames):
        extent = (index * width, (index + 1) * width, 0, 1)
        axes.imshow(frame, extent=extent, aspect="auto", interpolation="antialiased")
    for index in range(1, len(frames)):
        axes.axvline(index * width, color="white", linewidth=1)
    if len(answers) == 1 and answers[0].moments:
        # Frames outside the best moment are faded.
        best = answers[0].moments[0]
        for start, end in ((0.0, best.start), (best.end, duration)):
            if end > start:
                axes.axvspan(start, end, color="white", alpha=0.6, linewidth=0)
    axes.set_xlim(0, duration)
    axes.set_ylim(0, 1)
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_visible(False)
