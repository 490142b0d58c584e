"""A picture of the answers: every query's moments on one time axis, and frames of the video beneath it."""

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

# All in inches, so that rows are as high however many there are.
WIDTH, EDGE, LABELS = 10.0, 0.35, 1.95
LINE, BAR, THIN, GAP = 0.2, 0.22, 0.1, 0.07
STRIP = 0.85
DPI = 120
COLUMNS = 118
# Seconds between ticks: what clocks count by.
STEPS = (0.1, 0.2, 0.5, 1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 21600, 86400, 864000)
MAX_TICKS = 11
MAX_LINES = 3
# Frames of a strip: of a tall video more, of a wide one fewer, and none wider than this, in heights.
FRAMES = (3, 24)
SHAPES = (0.25, 8.0)
BEST, OTHERS, TRUTH, TRACK, INK, PALE = "#1f5fa8", "#8db4de", "#2f8f57", "#eceff3", "#1c2430", "#69707c"
# Shortest bar that can be seen, as a share of the axis.
LEAST = 0.003
# matplotlib's own font knows Latin, Greek, Cyrillic, Arabic, Hebrew and more; these, where they are, know the rest.
FALLBACKS = (
    "Noto Sans CJK JP", "Noto Sans CJK SC", "Noto Sans JP", "Noto Sans SC", "Noto Sans KR", "Noto Sans Devanagari",
    "Noto Sans Thai", "Noto Sans", "WenQuanYi Micro Hei", "Hiragino Sans", "PingFang SC", "Apple SD Gothic Neo",
    "Microsoft YaHei", "Yu Gothic", "Malgun Gothic", "Nirmala UI", "Arial Unicode MS",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class _Bar:
    start: float
    end: float
    colour: str
    height: float = 1.0


@dataclasses.dataclass(frozen=True)
class _Track:
    """One line of bars, the later over the earlier; what is said beside it, in which colour."""

    bars: Sequence[_Bar]
    label: str
    colour: str
    height: float = BAR


def draw(answers: Sequence[Answer], path: Path, video_file: VideoFile | None = None, *, partial: bool = True) -> None:
    """Draw the answers about one video into a PNG: truth beneath where known, frames of the video where it is at hand.

    One query gets a line for each moment; of several each gets one, with the best moment full and the others faded.

    Raises:
        DeviceError: matplotlib is not installed.
        VideoFileError: a frame on the way to one that is shown is damaged, and `partial` is not set.
        OutputError: the file cannot be written, or its name does not end in .png.
    """
    check_plots(path)
    from matplotlib.figure import Figure

    duration = answers[0].duration
    blocks = [(_wrapped(f"“{answer.query}”"), _tracks(answer, len(answers) == 1)) for answer in answers]
    height = LINE * 1.4 + sum(_height(lines, tracks) for lines, tracks in blocks)
    span = WIDTH - EDGE - LABELS
    pictures = _strip(video_file, span, duration, partial) if video_file else []
    strip = span / len(pictures) * pictures[0].shape[0] / pictures[0].shape[1] if pictures else 0.0
    total = 0.15 + height + strip + 0.35
    figure = Figure(figsize=(WIDTH, total), facecolor="white")
    axes = figure.add_axes((EDGE / WIDTH, (0.35 + strip) / total, span / WIDTH, height / total))
    axes.set_xlim(0, duration)
    axes.set_ylim(height, 0)
    axes.set_yticks([])
    for side in ("left", "right", "top"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set(color=PALE, visible=not pictures)
    axes.grid(axis="x", color=TRACK, linewidth=0.8)
    axes.set_axisbelow(True)
    _write(
        axes,
        f"{printable_line(answers[0].video)}   {format_timestamp(duration)}",
        0,
        LINE * 0.5,
        weight="bold",
        size=11,
    )
    location = LINE * 1.4
    for lines, tracks in blocks:
        for line in lines:
            _write(axes, line, 0, location + LINE / 2)
            location += LINE
        for track in tracks:
            _draw_track(axes, track, location, duration)
            location += track.height + GAP / 2
        location += GAP * 2
    lowest = axes
    if pictures:
        axes.tick_params(axis="x", length=0, labelbottom=False)
        lowest = figure.add_axes((EDGE / WIDTH, 0.35 / total, span / WIDTH, strip / total))
        _draw_strip(lowest, pictures, answers, duration)
    step = next((step for step in STEPS if duration / step <= MAX_TICKS), STEPS[-1])
    for panel in (axes, lowest):
        panel.set_xticks(np.arange(0, duration * (1 + 1e-9), step) if duration / step < 1000 else (0, duration))
    lowest.xaxis.set_major_formatter(lambda value, _: format_timestamp(value, 0 if step >= 1 else 1))
    lowest.tick_params(axis="x", colors=PALE, labelsize=8)
    with atomic_write(path) as temporary, warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        figure.savefig(temporary, dpi=DPI, format="png")
    if any("missing from" in str(entry.message) for entry in said):
        log.warning("No font here has all letters of the queries; install one that does, Noto Sans for example.")


def _tracks(answer: Answer, alone: bool) -> list[_Track]:
    """Return the lines of an answer: a moment on each where it is alone, else all on one; then the truth."""
    if not answer.moments:
        tracks = [_Track((), "no moment found", PALE)]
    elif alone:
        tracks = [
            _Track(
                [_Bar(moment.start, moment.end, _faded(moment, answer))], _caption(moment, "  "), INK if rank else BEST
            )
            for rank, moment in enumerate(answer.moments)
        ]
    else:
        best, *others = answer.moments
        bars = [_Bar(moment.start, moment.end, _faded(moment, answer), 0.55) for moment in reversed(others)]
        tracks = [_Track([*bars, _Bar(best.start, best.end, BEST)], _caption(best, "  "), BEST)]
    if answer.truths:
        start, end = answer.truths[0]
        message = (
            f"{format_timestamp(start)} – {format_timestamp(end)}"
            if len(answer.truths) == 1
            else f"{len(answer.truths)} moments"
        )
        tracks.append(_Track([_Bar(*truth, TRUTH) for truth in answer.truths], f"{message}  truth", TRUTH, THIN))
    return tracks


def _caption(moment: Moment, between: str) -> str:
    return f"{format_timestamp(moment.start)} – {format_timestamp(moment.end)}{between}{moment.score:.2f}"


def _faded(moment: Moment, answer: Answer) -> str:
    """Return the colour of a moment: of the best full, of the others the paler the lower their score."""
    if moment is answer.moments[0]:
        return BEST
    top = answer.moments[0].score
    share = min(max(moment.score / top, 0.0), 1.0) if top > 0 else 1.0
    channels = (int(OTHERS[location : location + 2], 16) for location in (1, 3, 5))
    mixed = (round(value + (1 - share) * 0.65 * (255 - value)) for value in channels)
    return "#" + "".join(f"{value:02x}" for value in mixed)


def _height(lines: Sequence[str], tracks: Sequence[_Track]) -> float:
    return LINE * len(lines) + sum(track.height + GAP / 2 for track in tracks) + GAP * 2


def _wrapped(text: str) -> list[str]:
    """Return a sentence in lines that fit; wide letters, as of Chinese, take two places."""
    text = printable(" ".join(text.split()))
    wide = sum(unicodedata.east_asian_width(letter) in "WF" for letter in text)
    columns = int(COLUMNS / (1 + wide / max(len(text), 1)))
    return textwrap.wrap(text, columns, max_lines=MAX_LINES, placeholder=" …”") or ["“”"]


def _write(axes: Any, text: str, x: float, y: float, **style: Any) -> Any:
    """Write a line that begins at `x` seconds; it may hold dollar signs, which are no formula here."""
    style = {"size": 9.5, "color": INK, "family": ["DejaVu Sans", *_fallbacks()], **style}
    # The lines of the ticks pass behind.
    style["bbox"] = {"facecolor": "white", "edgecolor": "none", "pad": 0.8}
    return axes.text(x, y, text, va="center", parse_math=False, clip_on=False, **style)


def _fallbacks() -> list[str]:
    from matplotlib import font_manager

    there = {font.name for font in font_manager.fontManager.ttflist}
    return [name for name in FALLBACKS if name in there]


def _draw_track(axes: Any, track: _Track, top: float, duration: float) -> None:
    middle = top + track.height / 2
    axes.barh(middle, duration, left=0, height=track.height, color=TRACK, gid="track")
    for bar in track.bars:
        length = max(bar.end - bar.start, LEAST * duration)
        start = min(max(bar.start, 0.0), duration - length)
        axes.barh(
            middle, length, left=start, height=track.height * bar.height, color=bar.colour, linewidth=0.6,
            edgecolor="white", gid="bar",
        )  # fmt: skip
    _write(axes, track.label, duration * (1 + 0.12 / (WIDTH - EDGE - LABELS)), middle, size=8.5, color=track.colour)


def _strip(video_file: VideoFile, span: float, duration: float, partial: bool) -> list[np.ndarray]:
    """Return frames of the video, each of the middle of its part of the time line, all of one shape."""
    ((height, width, _),) = (frame.shape for frame in frames_at(video_file, [0.0], round(STRIP * DPI), partial=partial))
    shape = min(max(width / height, SHAPES[0]), SHAPES[1])
    count = min(max(round(span / (STRIP * shape)), FRAMES[0]), FRAMES[1])
    # The time line is that of players, and before the first picture it is on already.
    times = (np.arange(count) + 0.5) * min(duration, video_file.offset + video_file.duration) / count
    times = np.maximum(times - video_file.offset, 0.0)
    # As many pixels as the picture has for them, and not more, however long or large the video is.
    pixels = max(1, round(span / count / shape * DPI))
    return [_cut(frame, shape) for frame in frames_at(video_file, times.tolist(), pixels, partial=partial)]


def _cut(frame: np.ndarray, shape: float) -> np.ndarray:
    """Return the middle of a frame that is `shape` times as wide as high."""
    height, width = frame.shape[:2]
    retained = min(width, max(1, round(height * shape))), min(height, max(1, round(width / shape)))
    left, top = (width - retained[0]) // 2, (height - retained[1]) // 2
    return frame[top : top + retained[1], left : left + retained[0]]


def _draw_strip(axes: Any, pictures: Sequence[np.ndarray], answers: Sequence[Answer], duration: float) -> None:
    each = duration / len(pictures)
    for number, picture in enumerate(pictures):
        axes.imshow(
            picture, extent=(number * each, (number + 1) * each, 0, 1), aspect="auto", interpolation="antialiased"
        )
    for number in range(1, len(pictures)):
        axes.axvline(number * each, color="white", linewidth=1)
    if len(answers) == 1 and answers[0].moments:
        # What is not of the best moment steps back.
        best = answers[0].moments[0]
        for start, end in ((0.0, best.start), (best.end, duration)):
            if end > start:
                axes.axvspan(start, end, color="white", alpha=0.6, linewidth=0)
    axes.set_xlim(0, duration)
    axes.set_ylim(0, 1)
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_visible(False)
